"""`quant_method: fewbits`: for weights that compressed-tensors cannot hold or its clients cannot load.

The same tensors as compressed-tensors writes, except that the codes take the *source's own name*, so a
client that does not know the format meets a tensor of the wrong shape and stops, instead of filling in
random weights. `(out, in)` on disk whatever the source's orientation; experts that the source keeps
in one 3-D tensor keep their axis in front. Columns kept in 16 bit have tensors of their own. Promised
for `fewbits.load`, and for `from_pretrained` of transformers in a process that has imported fewbits.

    X.weight   X.weight_scale   X.weight_zero_point   X.weight_shape
               X.weight_outliers   X.weight_outlier_columns

    config.json  "quantization_config": {"quant_method": "fewbits", "version": 1,
                                         "weights": {"X.weight": "w4-g32-asym", ...}}
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import InputError
from fewbits.formats.layout import TWO_LEVELS, Headers, Integers, Names, ScaleRange, Stored
from fewbits.formats.packed import (
    decode_packed,
    names_packed,
    on_disk,
    packed_bytes,
    packed_headers,
    read_packed,
    shape_packed,
    write_packed,
)
from fewbits.formats.placement import Placement
from fewbits.scheme import QuantScheme
from fewbits.tensor import QuantizedTensor

VERSION = 1


@dataclass(frozen=True, slots=True)
class Own:
    """Holds every scheme but those with two levels of scales, and every placement."""

    @property
    def name(self) -> str:
        """As in `--format`."""
        return "fewbits"

    @property
    def quant_method(self) -> str:
        """The same."""
        return self.name

    def reads(self, config: dict[str, Any]) -> bool:
        """By the method."""
        return config.get("quant_method") == self.quant_method

    def scales(self, dtype: torch.dtype) -> ScaleRange:
        """In the source's dtype."""
        return ScaleRange(dtype, dtype)

    def refuses(self, placement: Placement, scheme: QuantScheme) -> str | None:
        """Two levels of scales."""
        return TWO_LEVELS if scheme.two_level else None

    def alike(self, name: str, placement: Placement) -> tuple[str, Hashable] | None:
        """Every weight has a scheme of its own."""
        return None

    def held(self, weight: QuantizedTensor) -> QuantizedTensor:
        """Itself."""
        return weight

    def write(self, name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """`X.weight` -> `X.weight` (packed), `X.weight_scale`, ..."""
        return write_packed(name, "", weight)

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """The inverse of `write`."""
        return read_packed(name, "", tensors, scheme)

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> Integers:
        """By the compressed-tensors library."""
        return decode_packed(name, "", tensors, scheme, shape)

    def tensors(self, name: str) -> Names:
        """Codes, scale, shape, and what only some weights have."""
        return names_packed(name, "")

    def shape(self, config: dict[str, Any], name: str, stored: Stored) -> tuple[int, ...]:
        """As stored beside the codes."""
        return shape_packed(name, "", stored)

    def written_bytes(self, rows: int, columns: int, scheme: QuantScheme, itemsize: int) -> int:
        """Codes, scales, zero points and the shape."""
        return packed_bytes(rows, columns, scheme, itemsize)

    def headers(
        self, name: str, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> Headers:
        """Likewise."""
        return packed_headers(name, "", shape, scheme, dtype)

    def config(self, placements: Mapping[str, Placement], floats: list[str]) -> dict[str, Any]:
        """Every weight by name."""
        weights = {name: on_disk(p.scheme).label for name, p in placements.items()}
        return {"quant_method": self.name, "version": VERSION, "weights": weights}

    def remarks(self, placements: Mapping[str, Placement]) -> list[str]:
        """Where the kernels are slower than floats (`benchmarks/linears.py`, 2026-11-25)."""
        inputs = [p.scheme.inputs for p in placements.values() if p.scheme.inputs is not None]
        if any(kind.threshold and not kind.static for kind in inputs):
            return [
                "outlier columns are looked for in each call: 16 rows take up to 1.5 times as long as "
                "in bfloat16 (1 and 512 rows less); not where --calibration has found them"
            ]
        return []

    def quantized_names(self, config: dict[str, Any], tensors: Iterable[str]) -> set[str]:
        """As the configuration lists them."""
        return set(config["weights"])

    def scheme_of(self, config: dict[str, Any], name: str, module: str) -> QuantScheme | None:
        """By name."""
        if config.get("version") != VERSION:
            raise InputError(
                f"quant_method fewbits, version {config.get('version')} is not read; "
                f"accepted is {VERSION}"
            )
        label = config["weights"].get(name)
        return None if label is None else QuantScheme.parse(label)
