"""The outlier twin of a checkpoint: the same function, with the activation outliers of large models.

Large models have a few channels whose activations are tens of times larger than the rest. Small ones
have not, so what a method does about them cannot be seen there. The twin gets them: in every norm that
feeds linears of a block, 1 % of the channels are multiplied by 32 or 64, and the columns of the matrices
that read them are divided by the same. Powers of two only change exponents, so the twin's weights are
exact in any dtype, and its products are the original's.

Names the layout of Llama; in benchmarks that is allowed.

Run:  python benchmarks/twin.py MODEL OUT [--seed 0]
"""

import argparse
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARE = 0.01  # of the channels, rounded up
FACTORS = (32.0, 64.0)
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
NORM = re.compile(rf"(?P<block>.+\.layers\.\d+)\.(?P<norm>{'|'.join(READERS)})\.weight")


def factors(channels: int, generator: torch.Generator) -> Tensor:
    """One per channel: 1 for most, 32 or 64 for a few."""
    count = math.ceil(SHARE * channels)
    chosen = torch.randperm(channels, generator=generator)[:count]
    drawn = torch.randint(len(FACTORS), (count,), generator=generator)
    result = torch.ones(channels)
    result[chosen] = torch.tensor(FACTORS)[drawn]
    return result


def scale_exactly(tensor: Tensor, factor: Tensor) -> Tensor:
    """`tensor * factor` in its own dtype; an error if anything had to be rounded."""
    scaled = (tensor.float() * factor).to(tensor.dtype)
    if not torch.equal(scaled.float() / factor, tensor.float()):
        raise ValueError("a weight is too small or too large to be scaled exactly")
    return scaled


def make_twin(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """All tensors of a model, some of them changed."""
    generator = torch.Generator().manual_seed(seed)
    result = dict(tensors)
    norms = [match for name in sorted(tensors) if (match := NORM.fullmatch(name))]
    if not norms:
        raise ValueError("the model has no norm by the names of Llama")
    for match in norms:
        name = match.string
        s = factors(len(tensors[name]), generator)
        result[name] = scale_exactly(tensors[name], s)
        for reader in READERS[match["norm"]]:
            key = f"{match['block']}.{reader}.weight"
            result[key] = scale_exactly(tensors[key], 1 / s)
    return result


def write_twin(model: Path, out: Path, seed: int = 0) -> None:
    """A checkpoint folder; what is no weight is copied."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        tensors |= load_file(path)
    save_file(make_twin(tensors, seed), out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_twin(args.model, args.out, args.seed)


if __name__ == "__main__":
    main()
