"""Products straight from codes on GPUs, in Triton."""

from fewbits.kernels.gpu.kernel import MANY_ROWS, Triton, multiply
from fewbits.kernels.gpu.launch import Tile, choose_tile

__all__ = ["MANY_ROWS", "Tile", "Triton", "choose_tile", "multiply"]
