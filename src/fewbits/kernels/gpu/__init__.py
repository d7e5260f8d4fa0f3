"""Products straight from codes on GPUs, in Triton."""

from fewbits.kernels.gpu.kernel import MANY_ROWS, Tile, Triton, choose_tile, multiply

__all__ = ["MANY_ROWS", "Tile", "Triton", "choose_tile", "multiply"]
