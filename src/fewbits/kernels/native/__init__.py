"""Products straight from codes in C++ (fewbits.h), one file per instruction set, opened by ctypes."""

from fewbits.kernels.native.kernel import Native, NativeInt8
from fewbits.kernels.native.library import (
    INTERFACE,
    Library,
    Weight,
    describe,
    library,
    summary,
    torch_parallel,
    why_absent,
)

__all__ = [
    "INTERFACE",
    "Library",
    "Native",
    "NativeInt8",
    "Weight",
    "describe",
    "library",
    "summary",
    "torch_parallel",
    "why_absent",
]
