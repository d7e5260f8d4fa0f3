"""Pack drawn codes with gptqmodel's own linears: the golden file that two tests compare with.

Run by hand, in an environment with torch 2.13.0 and gptqmodel 7.6.0 (2026-11-26):
    python tests/formats/pack_golden.py [FILE]
Its packers round weights. Those here are multiples of powers of two, so that the codes are those drawn.
"""

import os
import random
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

OUT, IN, GROUP = 32, 64, 32  # the least that its packers take
GOLDEN = Path(__file__).parent / "golden" / "gptqmodel.safetensors"
CASES = (
    *(f"gptq.w{bits}-g32" for bits in (2, 3, 4, 8)),
    *(f"gptq-v2.w{bits}-g32-asym" for bits in (2, 3, 4, 8)),
    *("gptq-v2.w4-g32", "gptq.w3-channel", "gptq-v2.w4-channel-asym"),
    *("awq.w4-g32", "awq.w4-g32-asym", "awq.w4-channel-asym"),
)


def draw(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), zero points and scales (out, groups) of a case, the same each time."""
    bits, size, symmetric = parse(case)
    numbers = random.Random(case)

    def whole(shape: tuple[int, int], least: int, most: int) -> Tensor:
        drawn = [int(numbers.random() * (most - least)) + least for _ in range(shape[0] * shape[1])]
        return torch.tensor(drawn).view(shape)

    codes = whole((OUT, IN), 0, 2**bits)
    points = whole((OUT, IN // size), 0, 2**bits)
    if symmetric:
        points = torch.full_like(points, 2 ** (bits - 1))
    scale = torch.exp2(whole((OUT, IN // size), -9, 0).float()).half()
    return codes.to(torch.uint8), points.to(torch.uint8), scale


def parse(case: str) -> tuple[int, int, bool]:
    """Bits, columns in a group, and whether it is symmetric."""
    bits, size, *more = case.split(".")[1].removeprefix("w").split("-")
    return int(bits), IN if size == "channel" else int(size.removeprefix("g")), not more


def pack(case: str) -> dict[str, Tensor]:
    """The tensors that a checkpoint of GPTQModel holds of one linear."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.config import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    (codes, points, scale), (bits, size, symmetric) = draw(case), parse(case)
    linear = nn.Linear(IN, OUT, bias=False)
    zero, step = (t.float().repeat_interleave(size, 1) for t in (points, scale))
    linear.weight.data = (codes - zero) * step
    settings = {
        "bits": bits, "group_size": -1 if size == IN else size, "sym": symmetric, "desc_act": False,
        "in_features": IN, "out_features": OUT, "bias": False,
    }  # fmt: skip
    if case.startswith("awq"):
        packed = AwqTorchLinear(**settings)
        packed.pack(linear, scale, points.half())
        return {end: getattr(packed, end) for end in ("qweight", "qzeros", "scales")}
    first = case.startswith("gptq.")
    packed = TorchLinear(**settings, format=FORMAT.GPTQ if first else FORMAT.GPTQ_V2)
    index = torch.arange(IN, dtype=torch.int32) // size
    packed.pack_block(linear, scale.float(), points.float(), index)
    if first:  # as it does when it saves
        convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=bits))
    return {end: getattr(packed, end) for end in ("qweight", "qzeros", "scales", "g_idx")}


def main(path: Path) -> None:
    """Write the golden file."""
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = (
        "1"  # its packer in Python; the other is compiled when run
    )
    found = {f"{case}.{end}": t.contiguous() for case in CASES for end, t in pack(case).items()}
    save_file(found, path, {"gptqmodel": version("gptqmodel"), "torch": version("torch")})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
