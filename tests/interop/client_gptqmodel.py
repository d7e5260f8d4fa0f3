"""gptqmodel, with the kernel that it chooses by itself on a CPU unless a job names a `backend`."""

from typing import Any

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from hf import kinds, logits_and_text
from protocol import Answer, answer


def run(job: dict[str, Any], tokens: np.ndarray, prompt: np.ndarray) -> Answer:
    backend = BACKEND(job.get("backend") or "auto")
    dtype = getattr(torch, job["dtype"])
    model = GPTQModel.load(job["checkpoint"], backend=backend, device="cpu", dtype=dtype).model
    return Answer(*logits_and_text(model, tokens, prompt), kinds(model))


if __name__ == "__main__":
    answer(run)
