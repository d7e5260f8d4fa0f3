"""Plain transformers. A job's `dtype` is what it computes in; `dequantize`, `gguf_file` are options.

Of a twin, `rounded` and `bfloat16` are regular expressions: parameters of such names are rounded to
bfloat16, the dtype of the sources, or also kept in it, as readers do with what they dequantize.
"""

import re
from typing import Any

import numpy as np
import torch
from hf import kinds, logits_and_text
from protocol import Answer, answer
from transformers import AutoModelForCausalLM


def run(job: dict[str, Any], tokens: np.ndarray, prompt: np.ndarray) -> Answer:
    dtype, more = getattr(torch, job["dtype"]), {}
    if job.get("dequantize"):
        from transformers import CompressedTensorsConfig

        more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if job.get("gguf_file"):
        more["gguf_file"] = job["gguf_file"]
    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=dtype, **more)
    for name, parameter in model.named_parameters():
        if job.get("rounded") and re.search(job["rounded"], name):
            parameter.data = parameter.data.bfloat16().to(dtype)
        if job.get("bfloat16") and re.search(job["bfloat16"], name):
            parameter.data = parameter.data.bfloat16()
    return Answer(*logits_and_text(model, tokens, prompt), kinds(model))


if __name__ == "__main__":
    answer(run)
