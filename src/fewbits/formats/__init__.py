"""Layouts of quantized weights on disk: one file each.

Every other tool's zero-point and layout convention is translated in exactly one of them.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from fewbits.formats.compressed_tensors import CompressedTensors
from fewbits.formats.own import Own
from fewbits.formats.placement import Placement
from fewbits.scheme import QuantScheme
from fewbits.tensor import QuantizedTensor


class Format(Protocol):
    """Refuses what it cannot hold, or what its clients cannot load; never rounds."""

    @property
    def name(self) -> str:
        """As in `--format`, and `quant_method` in config.json."""

    def refuses(self, placement: Placement, scheme: QuantScheme) -> str | None:
        """Why a weight cannot be written in this format; None if it can."""

    def write(self, name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Tensors on disk for the weight that the source calls `name`."""

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """The inverse of `write`, from any mapping that holds those tensors."""

    def packed_name(self, name: str) -> str:
        """Of the tensor whose presence shows that the weight is quantized."""

    def config(self, placements: Mapping[str, Placement], floats: list[str]) -> dict[str, Any]:
        """`quantization_config` for config.json.

        Args:
            placements: source name -> where each quantized weight stands.
            floats: module names of matrices left in float.

        Raises:
            InputError: an assignment that this format cannot express.
        """

    def remarks(self, placements: Mapping[str, Placement]) -> list[str]:
        """What a user must know to load these weights in the format's clients."""

    def scheme_of(self, config: dict[str, Any], name: str, module: str) -> QuantScheme | None:
        """The scheme that `quantization_config` gives to the weight `name` of `module`; None: float.

        Raises:
            InputError: the configuration is not understood.
        """

    def quantized_names(self, config: dict[str, Any], tensors: Iterable[str]) -> set[str]:
        """The weights of which a checkpoint with these tensors holds codes, or part of them."""


FORMATS: dict[str, Format] = {"compressed-tensors": CompressedTensors(), "fewbits": Own()}

__all__ = ["FORMATS", "CompressedTensors", "Format", "Own", "Placement"]
