"""Round to nearest: every weight takes the nearest point of its own grid. Needs no data.

The baseline that all other methods are measured against; at 8 bits usually all that is needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.methods.q4k import Q4K
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note, QuantizedTensor, quantize_tensor


@dataclass(frozen=True, slots=True)
class RTN:
    """Round to nearest; no options."""

    @property
    def needs(self) -> frozenset[str]:
        """No statistics."""
        return frozenset()

    def __call__(
        self,
        weight: Tensor,
        scheme: QuantScheme,
        stats: dict[str, Tensor],
        scale_dtype: torch.dtype | None = None,
    ) -> tuple[QuantizedTensor, list[Note]]:
        """Codes for `weight` (out, in); those of two levels of scales are searched for."""
        if scheme.two_level:
            return Q4K()(weight, scheme, {}, scale_dtype)
        return quantize_tensor(weight, scheme, scale_dtype), []
