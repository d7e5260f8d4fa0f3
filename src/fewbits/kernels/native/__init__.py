"""Products straight from codes in C++ (fewbits.h), one file per instruction set, opened by ctypes."""

from fewbits.kernels.native.library import (
    INTERFACE,
    Library,
    Weight,
    describe,
    library,
    torch_parallel,
    why_absent,
)

__all__ = ["INTERFACE", "Library", "Weight", "describe", "library", "torch_parallel", "why_absent"]
