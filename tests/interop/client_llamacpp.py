"""llama.cpp, by llama-cpp-python; its cache is kept in float32."""

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama
from protocol import NEW_TOKENS, Answer, answer


def run(job: dict[str, Any], tokens: np.ndarray, prompt: np.ndarray) -> Answer:
    file = Path(job["checkpoint"]) / "model.gguf"
    model = Llama(
        str(file),
        n_ctx=128,
        n_batch=128,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    logits = []
    for row in tokens.tolist():
        model.reset()
        model.eval(row)
        logits.append(np.array(model.scores[: len(row)]))
    model.reset()
    model.eval(prompt.tolist())
    text: list[int] = []
    while len(text) < NEW_TOKENS:
        text.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(text[-1:])
    version = f"llama-cpp-python {llama_cpp.__version__}"
    model.close()
    return Answer(np.stack(logits), np.array(text), version)


if __name__ == "__main__":
    answer(run)
