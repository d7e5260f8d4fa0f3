"""How a weight becomes codes: one file per algorithm."""

from typing import Protocol

from torch import Tensor

from fewbits.methods.rtn import RTN
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note, QuantizedTensor


class Method(Protocol):
    """A frozen dataclass of options; calling it rounds one matrix and touches no model."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that calibration must collect; empty if none."""

    def __call__(
        self, weight: Tensor, scheme: QuantScheme, stats: dict[str, Tensor]
    ) -> tuple[QuantizedTensor, list[Note]]:
        """Codes for `weight` (out, in); the weight is not modified."""


METHODS: dict[str, type[Method]] = {"rtn": RTN}

__all__ = ["METHODS", "RTN", "Method"]
