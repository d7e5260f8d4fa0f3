"""Ways to compute `x @ W.T` from codes: one file each, and the choice among them.

A kernel is a module made from one weight. `refuses` says why it cannot hold a weight, so that the
choice, and what was passed over, can be shown (`fewbits bench`).
"""

import torch

from fewbits.kernels.aten import Int4Pack, Int8Pack
from fewbits.kernels.gpu import Triton
from fewbits.kernels.int8 import Int8Inputs
from fewbits.kernels.native import Native, NativeInt8
from fewbits.kernels.reference import Kernel, Reference
from fewbits.tensor import QuantizedTensor

# In order of preference; the first that does not refuse is taken. Reference refuses nothing.
KERNELS: dict[str, type[Kernel]] = {
    "int8": Int8Inputs,
    "triton": Triton,
    "native-int8": NativeInt8,
    "native": Native,
    "int4pack": Int4Pack,
    "int8pack": Int8Pack,
    "reference": Reference,
}


def choose_kernel(
    weight: QuantizedTensor, dtype: torch.dtype, device: torch.device, *, int8_inputs: bool = False
) -> tuple[str, dict[str, str]]:
    """The name of the first kernel that takes the weight, and why the ones before it refused.

    Args:
        weight, dtype, device: what is to be multiplied, by what, where.
        int8_inputs: whether inputs may be rounded to 8 bits where the scheme does not ask for it.
    """
    refusals: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        reason = kernel.refuses(weight, dtype, device)
        if kernel is NativeInt8 and not int8_inputs:
            reason = "rounds inputs to 8 bits, which was not asked for"
        if reason is None:
            return name, refusals
        refusals[name] = reason
    raise AssertionError("the reference kernel refuses nothing")


__all__ = [
    "KERNELS",
    "Int4Pack",
    "Int8Inputs",
    "Int8Pack",
    "Kernel",
    "Native",
    "NativeInt8",
    "Reference",
    "Triton",
    "choose_kernel",
]
