"""What every layout is asked for, and the types of the answers."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fewbits.errors import InputError
from fewbits.formats.placement import Placement
from fewbits.scheme import QuantScheme
from fewbits.tensor import Levels, QuantizedTensor

TWO_LEVELS = "two levels of scales have a layout in gguf only"
TRELLIS = "codes of a trellis have a layout in our own format only (--format fewbits)"
# Of compressed-tensors tried 2026-11-26: 0.20 packs an `Embedding` that a target names, which in
# transformers 5.23 then has no weight and cannot be called. GPTQ and AWQ have layouts for linears alone.
FLOAT_EMBEDDINGS = "its clients look up embeddings in float; accepted are --format fewbits and gguf"


class ScaleRange(NamedTuple):
    """In which dtype scales are to be chosen so that a format holds them exactly.

    Args:
        dtype: of the scales that methods choose.
        stored: of those on disk, which need not be the same.
        least: the smallest of the first that the second holds as well.
    """

    dtype: torch.dtype
    stored: torch.dtype
    least: float = 0.0


def float16_scales(dtype: torch.dtype) -> ScaleRange:
    """Of formats that store float16: for bfloat16 sources what both hold, so that nothing is rounded.

    Others choose them in float16, of which no number is too small to be held: `round_held` says which
    have few digits. Raising those would cost more than the digits do.
    """
    if dtype == torch.bfloat16:
        # Every bfloat16 from here to the largest float16 is a float16 too: eight digits above 2**-24.
        return ScaleRange(torch.bfloat16, torch.float16, 2.0**-17)
    return ScaleRange(torch.float16, torch.float16)


def as_float16(scale: Tensor) -> Tensor:
    """The same scales in float16.

    Raises:
        InputError: it does not hold one of them exactly.
    """
    narrow = scale.to(torch.float16)
    lost = narrow.to(torch.float64) != scale.to(torch.float64)
    if bool(lost.any()):
        raise InputError(
            f"a scale of {scale[lost][0].item():.9g} is no float16; accepted are scales that are"
        )
    return narrow


class Names(NamedTuple):
    """Tensors on disk of one weight: those that must be there, and those that may be."""

    needed: tuple[str, ...]
    possible: tuple[str, ...] = ()

    @property
    def every(self) -> tuple[str, ...]:
        """Both."""
        return self.needed + self.possible


# Tensors on disk of one weight, in the order in which they are written: their dtype and shape.
Headers = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Integers:
    """A weight (out, in) as another library unpacks it: the parts of a QuantizedTensor."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    levels: Levels | None = None


class Header(Protocol):
    """Of one tensor, as `fewbits.checkpoint.TensorInfo`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""


class Stored(Protocol):
    """What is on disk, as `fewbits.checkpoint.Checkpoint`."""

    @property
    def tensors(self) -> Mapping[str, Header]:
        """Headers by name."""

    def read(self, name: str) -> Tensor:
        """One tensor."""


class Reader(Protocol):
    """Of a layout that other tools write, and fewbits perhaps as well."""

    @property
    def name(self) -> str:
        """As in `--format`, where it is written too."""

    @property
    def quant_method(self) -> str:
        """As in config.json."""

    def reads(self, config: dict[str, Any]) -> bool:
        """Whether a `quantization_config` is this format's."""

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """The inverse of `write`, from any mapping that holds those tensors.

        Raises:
            InputError: a tensor is missing, or its shape does not belong to the scheme.
        """

    def tensors(self, name: str) -> Names:
        """What a weight consists of on disk."""

    def shape(self, config: dict[str, Any], name: str, stored: Stored) -> tuple[int, ...]:
        """(out, in) of a quantized weight, experts in front where they are stacked."""

    def scheme_of(self, config: dict[str, Any], name: str, module: str) -> QuantScheme | None:
        """The scheme that `quantization_config` gives to the weight `name` of `module`; None: float.

        Raises:
            InputError: the configuration is not understood.
        """

    def quantized_names(self, config: dict[str, Any], tensors: Iterable[str]) -> set[str]:
        """The weights of which a checkpoint with these tensors holds codes, or part of them."""


class Format(Reader, Protocol):
    """Is written too; refuses what it cannot hold, or what its clients cannot load; never rounds."""

    def scales(self, dtype: torch.dtype) -> ScaleRange:
        """How methods must choose the scales of a source weight in `dtype`."""

    def refuses(self, placement: Placement, scheme: QuantScheme) -> str | None:
        """Why a weight cannot be written in this format; None if it can."""

    def alike(self, name: str, placement: Placement) -> tuple[str, Hashable] | None:
        """What a weight is written alike with: of one first, all must have the same second; None: none.

        `config` refuses weights for which that is not so.
        """

    def held(self, weight: QuantizedTensor) -> QuantizedTensor:
        """The same weight as `read` gives it back: scales in their dtype on disk, scheme as read.

        Raises:
            InputError: a scale is not among those that the format holds.
        """

    def write(self, name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Tensors on disk for the weight that the source calls `name`.

        Raises:
            InputError: as `held`.
        """

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> Integers:
        """What `read` gives, by a library that is not ours."""

    def written_bytes(self, rows: int, columns: int, scheme: QuantScheme, itemsize: int) -> int:
        """What `write` writes for one weight whose source has values of `itemsize` bytes."""

    def headers(
        self, name: str, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> Headers:
        """What `write` gives for a weight (out, in) with scales chosen in `dtype`.

        Without columns in 16 bit: how many there are is known only when inputs were seen.
        """

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
