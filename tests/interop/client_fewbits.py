"""fewbits itself, and what the others are measured by: logits in float32, straight from the codes.

A job's `source` is the float checkpoint; its logits go to RESULT.source.npy. `twin` is a folder that
gets the same model with every weight dequantized, a float32 checkpoint that any client can load.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hf import logits_and_text
from protocol import Answer, answer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.linear import ExpertLinears


def run(job: dict[str, Any], tokens: np.ndarray, prompt: np.ndarray) -> Answer:
    model = fewbits.load(job["checkpoint"], dtype=torch.float32)
    if job.get("table"):
        round_gelu(model)
    elif job["rounded_inputs"]:
        round_inputs(model, Path(job["checkpoint"]) / "model.gguf")
    else:
        source = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32)
        logits = logits_and_text(source, tokens, prompt)[0]
        np.save(Path(job["result"]).with_suffix(".source.npy"), logits)
        dequantize_into(source, model)
        source.save_pretrained(job["twin"])
    kernels = {m.kernel_name for m in model.modules() if isinstance(m, fewbits.QuantizedLinear)}
    logits, text = logits_and_text(model, tokens, prompt)
    np.save(Path(job["result"]).with_suffix(".margins.npy"), margins(model, prompt, text))
    return Answer(logits, text, ", ".join(sorted(kernels)))


@torch.no_grad()
def margins(model: nn.Module, prompt: np.ndarray, text: np.ndarray) -> np.ndarray:
    """By how much each token of the text was the most likely."""
    ids = torch.from_numpy(np.concatenate([prompt, text]))[None]
    first, second = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].topk(2).values.T
    return (first - second).numpy()


def round_inputs(model: nn.Module, file: Path) -> None:
    """As llama.cpp does on a CPU: inputs are rounded to what the type of a matrix is multiplied by."""
    import gguf

    reader = gguf.GGUFReader(file)
    kinds = {tensor.name.removesuffix(".weight"): tensor.tensor_type.name for tensor in reader.tensors}
    blocks = 1 + max(int(name.split(".")[1]) for name in kinds if name.startswith("blk."))
    architecture = str(reader.fields["general.architecture"].contents())
    number = {name: i for i, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, blocks)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            name = names.get_name(path) or names.get_name(
                path.partition(".experts")[0] + ".experts.down_proj"
            )
            kind = kinds.get(name or "", kinds["token_embd"] if path == "lm_head" else None)
            if kind is None:
                raise ValueError(f"{path} is {name} there, which is not among {sorted(kinds)}")
            how = _INPUTS[kind]
            module.register_forward_pre_hook(lambda _, inputs, how=how: (how(inputs[0]), *inputs[1:]))


def round_gelu(model: nn.Module) -> None:
    """llama.cpp looks GELU up in a table of float16."""
    for module in model.modules():
        if "GELU" in type(module).__name__:
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().float(),))
            module.register_forward_hook(lambda *given: given[2].half().float())


def _eight_bits(x: Tensor) -> Tensor:
    """Blocks of 32, scales in float16."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(largest > 0, 127 / largest, 0))
    return (codes * (largest / 127).half().float()).flatten(-2)


def _eight_bits_of_256(x: Tensor) -> Tensor:
    """Blocks of 256, scales in float32."""
    blocks = x.unflatten(-1, (-1, 256))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(largest > 0, 127 / largest, 0))
    return (codes * (largest / 127)).flatten(-2)


_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda x: x,
    "F16": lambda x: x.half().float(),
    "BF16": lambda x: x.bfloat16().float(),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q8_0"), _eight_bits),
    **dict.fromkeys(("Q4_K", "Q6_K"), _eight_bits_of_256),
}


@torch.no_grad()
def dequantize_into(target: nn.Module, model: nn.Module) -> None:
    """Give a float model of transformers the weights of one that holds codes."""
    for path, module in target.named_modules():
        theirs = model.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            found = getattr(theirs, name)
            if isinstance(found, ExpertLinears):
                found = torch.stack([plain(linear.weight) for linear in found])
                transposed = bool(getattr(module, "is_transposed", False))
            else:
                transposed = isinstance(theirs, fewbits.QuantizedLinear) and name == "weight"
                transposed &= not isinstance(module, nn.Linear)  # Conv1D
            weight = plain(found).mT if transposed else plain(found)
            assert weight.shape == parameter.shape, (path, name, weight.shape, parameter.shape)
            parameter.copy_(weight)


def plain(tensor: Tensor) -> Tensor:
    """Without the subclass that forbids writing."""
    return tensor.detach().as_subclass(Tensor)


if __name__ == "__main__":
    answer(run)
