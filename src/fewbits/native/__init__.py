"""C++ behind a plain C interface (fewbits.h), one file per instruction set, opened by ctypes."""

from fewbits.native.library import (
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
    "Weight",
    "describe",
    "library",
    "summary",
    "torch_parallel",
    "why_absent",
]
