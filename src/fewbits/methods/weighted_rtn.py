"""Round to nearest on the grid of least output error: what AWQ rounds with after its scaling.

The Hessian's blocks tell what the errors of a group cost together (see `methods.grid`); nothing is
compensated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.affine import quantize
from fewbits.methods.grid import search_qparams
from fewbits.methods.q4k import Q4K
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note, QuantizedTensor, quantize_tensor


@dataclass(frozen=True, slots=True)
class WeightedRTN:
    """Round to nearest after a search for the grid; no options."""

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian of the inputs."""
        return frozenset({"hessian"})

    def __call__(
        self,
        weight: Tensor,
        scheme: QuantScheme,
        stats: dict[str, Tensor],
        scale_dtype: torch.dtype | None = None,
    ) -> tuple[QuantizedTensor, list[Note]]:
        """Codes for `weight` (out, in); `stats["hessian"]` is the mean of x.T @ x, (in, in)."""
        if scheme.two_level:
            return Q4K(weighted=True)(weight, scheme, stats, scale_dtype)
        H = stats["hessian"]
        if not bool(torch.isfinite(H.sum())):
            note = Note("fallback", "", "the Hessian is not finite: plain rounding to nearest")
            return quantize_tensor(weight, scheme, scale_dtype), [note]
        scale, zero_point = search_qparams(weight, scheme, H, scale_dtype)
        codes = quantize(weight, scale, zero_point, scheme)
        return QuantizedTensor(codes, scale, zero_point, scheme), []
