"""compressed-tensors, `pack-quantized`: the format of vLLM and llm-compressor, read by transformers.

    X.weight_packed        codes + nothing: they are stored unsigned, q + 2**(bits-1), as ours are
    X.weight_scale         in the model's dtype
    X.weight_zero_point    likewise unsigned
    X.weight_shape

    config.json  "quantization_config": {"quant_method": "compressed-tensors",
      "config_groups": {"group_0": {"format": "pack-quantized", "targets": ["Linear"], "weights": {
         "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128}}},
      "ignore": ["lm_head"]}

Weight-only INT8 is pack-quantized with 8 bits: as `int-quantized` transformers loads it with weights
missing. Every group carries its own `format`. A dequantized weight is `(q - zero_point) * scale`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import InputError
from fewbits.formats.layout import Integers, Names, ScaleRange, Stored
from fewbits.formats.packed import (
    decode_packed,
    names_packed,
    on_disk,
    packed_bytes,
    read_packed,
    shape_packed,
    write_packed,
)
from fewbits.formats.placement import Placement
from fewbits.scheme import QuantScheme
from fewbits.tensor import QuantizedTensor

_OPTION = "plain transformers loads them with CompressedTensorsConfig(dequantize=True) only"


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """`pack-quantized`, weight-only."""

    @property
    def name(self) -> str:
        """As in `--format`."""
        return "compressed-tensors"

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
        """Rounded inputs, transposed or stacked weights: there is no layout; and asymmetric experts."""
        if scheme.inputs is not None:
            return "inputs in 8 bits, and columns in 16 bits, have no layout in pack-quantized"
        if placement.stacked:
            return "experts that are fused in one tensor on disk have no layout in it"
        if placement.transposed:
            return "weights stored (in, out) have no layout in it"
        if placement.expert and not scheme.symmetric:
            return "its clients do not load asymmetric experts"
        return None

    def held(self, weight: QuantizedTensor) -> QuantizedTensor:
        """Itself."""
        return weight

    def write(self, name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """`X.weight` -> `X.weight_packed`, `X.weight_scale`, ..."""
        return write_packed(name, "_packed", weight)

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """The inverse of `write`."""
        return read_packed(name, "_packed", tensors, scheme)

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> Integers:
        """By the compressed-tensors library."""
        return decode_packed(name, "_packed", tensors, scheme, shape)

    def tensors(self, name: str) -> Names:
        """Codes, scale, shape, and what only some weights have."""
        return names_packed(name, "_packed")

    def shape(self, config: dict[str, Any], name: str, stored: Stored) -> tuple[int, ...]:
        """As stored beside the codes."""
        return shape_packed(name, "_packed", stored)

    def written_bytes(self, rows: int, columns: int, scheme: QuantScheme, itemsize: int) -> int:
        """Codes, scales, zero points and the shape."""
        return packed_bytes(rows, columns, scheme, itemsize)

    def config(self, placements: Mapping[str, Placement], floats: list[str]) -> dict[str, Any]:
        """One config group per scheme; with several, their modules are named by pattern."""
        # Clients match the names of their own modules, which may differ from those of the source.
        modules: dict[QuantScheme, set[str]] = defaultdict(set)
        for source, placement in placements.items():
            modules[on_disk(placement.scheme)] |= {source.removesuffix(".weight"), placement.module}
        if len({on_disk(p.scheme) for p in placements.values() if p.expert}) > 1:
            raise InputError(
                "compressed-tensors: its clients load all experts in one scheme; use --format fewbits"
            )
        groups = {}
        for i, (scheme, members) in enumerate(modules.items()):
            others = {m for other in modules if other != scheme for m in modules[other]}
            targets = ["Linear"] if len(modules) == 1 else _patterns(members, others)
            groups[f"group_{i}"] = {
                "format": "pack-quantized",
                "targets": targets,
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": self.name,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": _patterns(set(floats), {name for names in modules.values() for name in names}),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def remarks(self, placements: Mapping[str, Placement]) -> list[str]:
        """Where transformers needs an option (2026-11, transformers 5.23, compressed-tensors 0.20)."""
        values = placements.values()
        remarks = []
        if any(not placement.scheme.symmetric for placement in values):
            remarks.append(f"asymmetric weights: with compressed-tensors 0.18 to 0.20, {_OPTION}")
        if any(placement.own_forward for placement in values):
            remarks.append(f"linears of a class of their own: {_OPTION}")
        return remarks

    def quantized_names(self, config: dict[str, Any], tensors: Iterable[str]) -> set[str]:
        """By the tensors that stand for `X.weight`."""
        return {
            base
            for name in tensors
            for suffix in ("_packed", "_scale", "_zero_point", "_shape")
            if (base := name.removesuffix(suffix)) != name and base.endswith(".weight")
        }

    def scheme_of(self, config: dict[str, Any], name: str, module: str) -> QuantScheme | None:
        """By exact name first, then by pattern, then by the class "Linear", as its clients do."""
        names = {module, name.removesuffix(".weight")}
        if any(_match(ignored, names) is not None for ignored in config.get("ignore") or ()):
            return None
        found = [
            (rank, group)
            for group in config.get("config_groups", {}).values()
            for target in group["targets"]
            if (rank := _match(target, names)) is not None
        ]
        if not found:
            return None
        group = min(found, key=lambda item: item[0])[1]
        return _scheme(group, group.get("format") or config.get("format"))


def _weights(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }


def _scheme(group: dict[str, Any], layout: str | None) -> QuantScheme:
    weights = group["weights"]
    if layout != "pack-quantized" or weights["type"] != "int" or group.get("input_activations"):
        raise InputError(
            f"compressed-tensors format {layout!r} of type {weights['type']!r} is not read; "
            "accepted is weight-only 'pack-quantized' of type 'int'"
        )
    if weights.get("actorder") in ("group", "weight"):
        raise InputError(
            f"compressed-tensors with actorder {weights['actorder']!r} is not read; "
            "accepted are null and 'static'"
        )
    strategy = weights["strategy"]
    if strategy not in ("group", "channel"):
        raise InputError(
            f"compressed-tensors strategy {strategy!r} is not read; accepted are group and channel"
        )
    size = weights["group_size"] if strategy == "group" else None
    return QuantScheme(weights["num_bits"], strategy, size, weights["symmetric"])


def _match(target: str, names: set[str]) -> int | None:
    if target in names:
        return 0
    if target.startswith("re:"):
        try:
            return 1 if any(re.match(target[3:], name) for name in names) else None
        except re.error as error:
            raise InputError(f"quantization_config: {target!r} is no pattern: {error}") from None
    return 2 if target == "Linear" else None


def _patterns(members: set[str], others: set[str]) -> list[str]:
    r"""Members with their numbers as `\d+`, where that catches no other module; else one by one."""
    taken = {_general(other) for other in others}
    patterns: set[str] = set()
    for member in members:
        general = _general(member)
        if general == member:  # no number in it
            patterns.add(member)
        elif general in taken:
            patterns.add(f"re:^{re.escape(member)}$")
        else:
            parts = [r"\d+" if part == "#" else re.escape(part) for part in general.split(".")]
            patterns.add("re:^" + r"\.".join(parts) + "$")
    return sorted(patterns)


def _general(name: str) -> str:
    """The name with its numbers as `#`."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))
