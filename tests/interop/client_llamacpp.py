"""llama.cpp, by llama-cpp-python; its cache is kept in float32.

A job with `floats` first writes the file anew there, every matrix in float32, by the gguf package.
"""

from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from llama_cpp import Llama
from protocol import NEW_TOKENS, Answer, answer

_usual_params = llama_cpp.llama_model_default_params


def plain_layout() -> llama_cpp.llama_model_params:
    """Weights as they lie in the file: laid out for AMX, small models crash it (0.3.36)."""
    params = _usual_params()
    params.use_extra_bufts = False
    return params


def run(job: dict[str, Any], tokens: np.ndarray, prompt: np.ndarray) -> Answer:
    file = Path(job["checkpoint"]) / "model.gguf"
    if "floats" in job:
        file = write_floats(file, Path(job["floats"]) / "model.gguf")
    llama_cpp.llama_cpp.llama_model_default_params = plain_layout
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


def write_floats(file: Path, out: Path) -> Path:
    """The same model with its blocks dequantized."""
    reader = gguf.GGUFReader(file)
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(out), str(reader.fields["general.architecture"].contents()))
    for name, entry in reader.fields.items():
        if name.startswith(("GGUF.", "fewbits.")) or name == "general.architecture":
            continue
        if entry.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, entry.contents())
        else:
            writer.add_key_value(name, entry.contents(), entry.types[0])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values.astype(np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


if __name__ == "__main__":
    answer(run)
