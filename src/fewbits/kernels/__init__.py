"""Ways to compute `x @ W.T` from codes: one file each, and the choice among them.

A kernel is a module made from one weight. `refuses` says why it cannot hold a weight, so that the
choice, and what was passed over, can be shown (`fewbits bench`).
"""

import torch

from fewbits.kernels.aten import Int4Pack, Int8Pack
from fewbits.kernels.cuda import Int4PackCuda
from fewbits.kernels.int8 import Int8Inputs
from fewbits.kernels.reference import Kernel, Reference
from fewbits.tensor import QuantizedTensor

# In order of preference; the first that does not refuse is taken. Reference refuses nothing.
KERNELS: dict[str, type[Kernel]] = {
    "int8": Int8Inputs,
    "int4pack-cuda": Int4PackCuda,
    "int4pack": Int4Pack,
    "int8pack": Int8Pack,
    "reference": Reference,
}


def choose_kernel(
    weight: QuantizedTensor, dtype: torch.dtype, device: torch.device
) -> tuple[str, dict[str, str]]:
    """The name of the first kernel that takes the weight, and why the ones before it refused."""
    refusals: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        reason = kernel.refuses(weight, dtype, device)
        if reason is None:
            return name, refusals
        refusals[name] = reason
    raise AssertionError("the reference kernel refuses nothing")


__all__ = [
    "KERNELS",
    "Int4Pack",
    "Int4PackCuda",
    "Int8Inputs",
    "Int8Pack",
    "Kernel",
    "Reference",
    "choose_kernel",
]
