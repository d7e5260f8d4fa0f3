"""AWQ: AutoAWQ's layout "gemm", of 4 bits; read by vLLM, SGLang, and through GPTQModel by transformers.

    X.qweight   int32 (in, out / 8)       codes, packed along out, eight in a word in an order of its own
    X.qzeros    int32 (groups, out / 8)   zero points, likewise
    X.scales    float16 (groups, out)

    config.json  "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128,
      "zero_point": true, "version": "gemm", "modules_to_not_convert": ["lm_head"]}

A symmetric weight is written with a zero point of 8, and is read back as an asymmetric one: the
configuration says zero_point true, as the fast kernels of vLLM want it. What the AWQ transform did does
not show here: its scales are folded into the weights before.

GPTQModel leaves modules in float that `dynamic` names (see fewbits.formats.gptq), transformers and vLLM
those of `modules_to_not_convert`; vLLM also those whose names contain one of these, so a float's name
inside of a quantized one's is refused (read in gptqmodel 7.6.0, transformers 5.23 and vLLM, 2026-11-26).
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbits import packing
from fewbits.errors import InputError
from fewbits.formats.gptq import (
    EXPERTS,
    base_of,
    check_shapes,
    float_rules,
    grouped,
    groups_in,
    is_inside,
    names_by_tensors,
    refuses_placement,
    setting,
    stored_parts,
    zero_points,
)
from fewbits.formats.layout import (
    Headers,
    Integers,
    Names,
    ScaleRange,
    Stored,
    as_float16,
    float16_scales,
)
from fewbits.formats.packed import on_disk, unpack_elsewhere
from fewbits.formats.placement import Placement
from fewbits.scheme import QuantScheme
from fewbits.tensor import QuantizedTensor
from fewbits.untrusted import shown

_BITS = 4
_ENDS = (".qweight", ".qzeros", ".scales")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each place of a word, from its lowest bits
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each output


@dataclass(frozen=True, slots=True)
class AwqLayout:
    """Layout "gemm".

        bits of a word    31-28  27-24  23-20  19-16  15-12  11-8   7-4   3-0
        qweight[i, w]     8w+7   8w+5   8w+3   8w+1   8w+6   8w+4  8w+2   8w    of input i

    >>> codes = torch.arange(8, dtype=torch.uint8)[:, None]  # 8 outputs of one input
    >>> point = torch.full((8, 1), 3, dtype=torch.uint8)
    >>> weight = QuantizedTensor(codes, torch.ones(8, 1), point, QuantScheme(4, symmetric=False))
    >>> tensors = AwqLayout().write("X.weight", weight)
    >>> hex(tensors["X.qweight"].item()), hex(tensors["X.qzeros"].item())
    ('0x75316420', '0x33333333')
    """

    @property
    def name(self) -> str:
        """As in `--format`."""
        return "awq"

    @property
    def quant_method(self) -> str:
        """The same."""
        return self.name

    def reads(self, config: dict[str, Any]) -> bool:
        """By `quant_method`."""
        return config.get("quant_method") == self.name

    def scales(self, dtype: torch.dtype) -> ScaleRange:
        """Those that are float16 too."""
        return float16_scales(dtype)

    def refuses(self, placement: Placement, scheme: QuantScheme) -> str | None:
        """Other bits than 4, rounded inputs, stacked weights, outputs that fill no words; heads."""
        if "." not in placement.module and not placement.embedding:
            return (
                "its clients look for no codes in a head; accepted is to leave it in float, or "
                "--format gptq-v2"
            )
        return self._unfit(placement, scheme)

    def _unfit(self, placement: Placement, scheme: QuantScheme) -> str | None:
        """`refuses`, wherever in the model it stands."""
        reason = refuses_placement(placement, scheme)
        if reason is not None:
            return reason
        if scheme.bits != _BITS:
            return f"it holds 4 bits, not {scheme.bits}; accepted are --format gptq or gptq-v2"
        if placement.shape is not None and placement.shape[0] % 8:
            return f"out is {placement.shape[0]}; accepted are multiples of 8"
        return None

    def alike(self, name: str, placement: Placement) -> tuple[str, Hashable] | None:
        """All weights have groups of one size."""
        return "all weights", on_disk(placement.scheme).group_size

    def held(self, weight: QuantizedTensor) -> QuantizedTensor:
        """With scales in float16, and asymmetric: that is what the configuration says."""
        weight = weight.per_row()
        scheme = replace(weight.scheme, symmetric=False)
        return replace(weight, scale=as_float16(weight.scale), scheme=scheme)

    def write(self, name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """`X.weight` -> `X.qweight`, `X.qzeros`, `X.scales`."""
        weight, base = weight.per_row(), base_of(name)
        reason = self._unfit(Placement(base, weight.scheme, shape=weight.shape), weight.scheme)
        if weight.outliers is not None:
            reason = "columns in 16 bits have no layout in it"
        if weight.order is not None:
            reason = "groups that are not of neighbouring columns have no layout in it"
        if reason is not None:
            raise InputError(f"{name}: {self.name}: {reason}")
        return {
            f"{base}.qweight": packing.pack(_reorder(weight.codes.t(), _ORDER), _BITS),
            f"{base}.qzeros": packing.pack(_reorder(weight.zero_point.t(), _ORDER), _BITS),
            f"{base}.scales": self.held(weight).scale.t().contiguous(),
        }

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """The inverse of `write`, for the scheme that the configuration gives; scales as stored."""
        packed, points, scale = stored_parts(name, tensors)
        rows, columns = _shape_of(name, tuple(packed.shape))
        _check(name, tensors, scheme, (rows, columns))
        codes, zeros = (packing.unpack(words, _BITS, rows) for words in (packed, points))
        return QuantizedTensor(
            _reorder(codes, _PLACES).t().contiguous(),
            scale.t().contiguous(),
            zero_points(name, _reorder(zeros, _PLACES).t().contiguous(), scheme),
            on_disk(scheme),
        )

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> Integers:
        """By the compressed-tensors library, up to the order in a word."""
        _check(name, tensors, scheme, shape)
        packed, points, scale = stored_parts(name, tensors)
        found = [unpack_elsewhere(words, _BITS, (len(words), shape[0]), 1) for words in (packed, points)]
        codes, zeros = (_reorder(values, _PLACES).t().contiguous() for values in found)
        return Integers(codes, scale.t().contiguous(), zero_points(name, zeros, scheme))

    def tensors(self, name: str) -> Names:
        """All three."""
        return Names(tuple(base_of(name) + end for end in _ENDS))

    def shape(self, config: dict[str, Any], name: str, stored: Stored) -> tuple[int, ...]:
        """Of the words of codes."""
        return _shape_of(name, stored.tensors[f"{base_of(name)}.qweight"].shape)

    def written_bytes(self, rows: int, columns: int, scheme: QuantScheme, itemsize: int) -> int:
        """Codes, zero points and scales."""
        groups, words = scheme.groups(columns), packing.packed_columns(rows, _BITS)
        return 4 * words * (columns + groups) + 2 * groups * rows

    def headers(
        self, name: str, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> Headers:
        """Of those three."""
        (rows, columns), base = shape, base_of(name)
        groups, words = scheme.groups(columns), packing.packed_columns(rows, _BITS)
        return {
            f"{base}.qweight": (torch.int32, (columns, words)),
            f"{base}.qzeros": (torch.int32, (groups, words)),
            f"{base}.scales": (torch.float16, (groups, rows)),
        }

    def config(self, placements: Mapping[str, Placement], floats: list[str]) -> dict[str, Any]:
        """One scheme for all, and the names of what stays in float."""
        sizes = {on_disk(p.scheme).group_size for p in placements.values()}
        if len(sizes) > 1:
            labels = " and ".join(sorted({on_disk(p.scheme).label for p in placements.values()}))
            raise InputError(f"awq: all weights have one scheme, not {labels}; accepted is gptq-v2")
        named = {name.removesuffix(".weight") for name in placements}
        named |= {placement.module for placement in placements.values()}
        left = set(floats) - named
        listed, every = sorted(left), "\n".join(named)
        inside = next((name for name in listed if name in every), None)
        if inside is not None:
            whole = next(name for name in sorted(named) if inside in name)
            raise InputError(
                f"awq: clients that leave {inside} in float do so with {whole} too, which contains that "
                "name; accepted is the same for both, or --format gptq-v2"
            )
        size = next(iter(sizes))
        rules = float_rules({name for name in left if is_inside(name)}, [named])
        return {
            "quant_method": self.quant_method,
            "bits": _BITS,
            "group_size": -1 if size is None else size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": listed,
            **({"dynamic": rules} if rules else {}),
        }

    def remarks(self, placements: Mapping[str, Placement]) -> list[str]:
        """What of it only some clients load (tried as in fewbits.formats.gptq)."""
        values = placements.values()
        found = {
            f"experts: {EXPERTS}": any(p.expert for p in values),
            "weights stored (in, out): plain transformers does not load them, gptqmodel does": any(
                p.transposed for p in values
            ),
            "matrices outside of the blocks: gptqmodel makes them noise, not plain transformers": any(
                not is_inside(p.module) for p in values
            ),
        }
        return [remark for remark, here in found.items() if here]

    def scheme_of(self, config: dict[str, Any], name: str, module: str) -> QuantScheme | None:
        """The one scheme, of all modules but heads and those that are named as floats."""
        _check_config(config)
        floats = setting(config, ("modules_to_not_convert",), list[str], [])
        names = (module, name.removesuffix(".weight"))
        if "." not in module or any(f".{x}." in f".{name}." for x in floats for name in names):
            return None
        bits = setting(config, ("bits", "w_bit"), int)
        size = setting(config, ("group_size", "q_group_size"), int)
        if bits != _BITS:
            raise InputError(f"AWQ of {bits} bits is not read; accepted is 4")
        return grouped(bits, size, not setting(config, ("zero_point",), bool, True))

    def quantized_names(self, config: dict[str, Any], tensors: Iterable[str]) -> set[str]:
        """By the tensors that stand for `X.weight`."""
        _check_config(config)
        return names_by_tensors(tensors, _ENDS)


def _reorder(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """(n, out) with each eight of a row in an order."""
    eights = values.reshape(len(values), -1, 8)
    return eights[..., list(order)].reshape(values.shape)


def _shape_of(name: str, words: tuple[int, ...]) -> tuple[int, int]:
    """(out, in) of a weight whose words of codes have a shape."""
    if len(words) != 2:
        raise InputError(f"{name}: words {words} do not hold a matrix of 4 bits")
    return words[1] * 8, words[0]


def _check(
    name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
) -> None:
    """Whether the tensors have the shapes that a weight (out, in) has in this scheme."""
    rows, columns = shape
    if scheme.bits != _BITS:
        raise InputError(f"{name}: AWQ of {scheme.bits} bits is not read; accepted is 4")
    groups = groups_in(name, columns, scheme)
    expected = ((columns, rows / 8), (groups, rows / 8), (groups, rows))
    check_shapes(name, stored_parts(name, tensors), expected)


def _check_config(config: dict[str, Any]) -> None:
    """Refuse what would be read wrongly: other layouts, and settings of single modules."""
    values = [config.get(key) for key in ("version", "format", "checkpoint_format")]
    layout = next((value for value in values if value is not None), "gemm")  # AutoAWQ's own default
    if config.get("backend") == "llm-awq":
        layout = "llm-awq"
    if not isinstance(layout, str) or layout.lower() != "gemm":
        raise InputError(f"AWQ in version {shown(layout)} is not read; accepted is 'gemm'")
    rules = setting(config, ("dynamic",), dict[str, dict[str, Any]], {})
    for pattern in rules:
        if not pattern.startswith("-:"):
            raise InputError(
                f"AWQ with a scheme of its own for {shown(pattern)} is not read; accepted is one for all"
            )
