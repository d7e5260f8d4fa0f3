"""What every method is."""

from typing import Protocol

import torch
from torch import Tensor

from fewbits.scheme import QuantScheme
from fewbits.tensor import Note, QuantizedTensor


class Method(Protocol):
    """A frozen dataclass of options; calling it rounds one matrix and touches no model."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that calibration must collect; empty if none."""

    def __call__(
        self,
        weight: Tensor,
        scheme: QuantScheme,
        stats: dict[str, Tensor],
        scale_dtype: torch.dtype | None = None,
    ) -> tuple[QuantizedTensor, list[Note]]:
        """Codes for a weight, which is not modified.

        Args:
            weight: (out, in).
            scheme: its grid.
            stats: what `needs` names.
            scale_dtype: of the scale on disk; the weight's own by default.
        """
