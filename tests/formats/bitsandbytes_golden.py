"""Quantize drawn weights with bitsandbytes' own linear: the golden file that a test compares with.

Run by hand, in an environment with torch 2.13.0 and bitsandbytes 0.50.2 (2026-11-26):
    python tests/formats/bitsandbytes_golden.py [FILE]
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

OUT, IN, TOKENS, THRESHOLD = 48, 64, 9, 6.0
GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes.safetensors"


def make() -> dict[str, Tensor]:
    """What a checkpoint holds of one linear, the weights that it stands for, inputs, and outputs."""
    import bitsandbytes as bnb

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator) / 8
    weight[3] = 0
    inputs = torch.randn(TOKENS, IN, generator=generator)
    inputs[:, 5] *= 40  # a column of outliers
    linear = bnb.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False, threshold=THRESHOLD)
    linear.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    linear = linear.to("cpu").eval()
    with torch.no_grad():
        outputs = linear(inputs.half())
    found = dict(linear.state_dict())
    dequantized = bnb.functional.int8_vectorwise_dequant(found["weight"], found["SCB"])
    return {f"X.{name}": tensor.contiguous() for name, tensor in found.items()} | {
        "source": weight, "dequantized": dequantized, "inputs": inputs.half(), "outputs": outputs,
    }  # fmt: skip


def main(path: Path) -> None:
    """Write the golden file."""
    save_file(make(), path, {name: version(name) for name in ("bitsandbytes", "torch")})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
