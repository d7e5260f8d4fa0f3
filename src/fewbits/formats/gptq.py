r"""GPTQ: the layout of AutoGPTQ and GPTQModel, read by more clients than any other of 4 bits.

    X.qweight   int32 (in * bits / 32, out)       codes, packed along in (see fewbits.packing)
    X.qzeros    int32 (groups, out * bits / 32)   zero points, packed along out
    X.scales    float16 (groups, out)
    X.g_idx     int32 (in,)                       the group of each column: i // group_size

    config.json  "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128,
      "desc_act": false, "sym": true, "checkpoint_format": "gptq", "lm_head": false,
      "pack_dtype": "int32", "dynamic": {"-:^model\\.layers\\.\\d+\\.mlp\\.gate$": {}},
      "meta": {"quantizer": ["fewbits:0.1"]}}

All is (in, out), the transpose of ours, however the source stores it; granularity "channel" is a group
size of -1. Version 1 (checkpoint_format "gptq") stores `zero_point - 1`: a 0 becomes -1 there, which old
writers spilled into the neighbours and clients read as they please. So it holds symmetric weights only
here; version 2 ("gptq_v2") stores the zero point as it is, and holds all. Groups are written of
neighbours; those of `desc_act` are read too, where `g_idx` gives a group to columns that are scattered.

What clients honour of the configuration (gptqmodel 7.6.0, optimum 2.3.0 under transformers 5.23, read
2026-11-26): GPTQModel and vLLM take the first pattern of `dynamic` that matches the start of a module's
name, "-:" for float, else with settings of its own. optimum ignores `dynamic` and goes by
`modules_in_block_to_quantize`, ends of names that hold for all blocks; one scheme for all of them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version as version_of
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor

from fewbits import packing
from fewbits.errors import InputError
from fewbits.formats.layout import (
    FLOAT_EMBEDDINGS,
    TRELLIS,
    TWO_LEVELS,
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
from fewbits.untrusted import check_types, shown

_ENDS = (".qweight", ".qzeros", ".scales", ".g_idx")
# Tried on tiny models, 2026-11-26: gptqmodel 7.6.0, transformers 5.24 with optimum 2.3.0.
_WRONG = (
    "plain transformers (optimum 2.3) fills in noise and says so in a warning only; gptqmodel loads it"
)
_REFUSED = "plain transformers (optimum 2.3) does not load that; gptqmodel does"
EXPERTS = f"{_WRONG} where it calls experts as the source does"
_LAYOUTS = {1: "gptq", 2: "gptq_v2"}


@dataclass(frozen=True, slots=True)
class GptqLayout:
    """Versions 1 and 2 of it, `desc_act` false.

        bits of a word    31-28  27-24  ...  7-4  3-0
        qweight[r, c]     in 8r+7   ...     8r+1   8r     of output c      (4 bits)
        qzeros[g, r]      out 8r+7  ...     8r+1   8r     of group g

    Args:
        version: 1 stores zero points minus 1 and is symmetric; 2 stores them as they are.

    >>> codes = torch.arange(8, dtype=torch.uint8).repeat(8, 1)  # each of 8 outputs: 0, 1, ... 7
    >>> scale, point = torch.ones(8, 1), torch.full((8, 1), 8, dtype=torch.uint8)
    >>> weight = QuantizedTensor(codes, scale, point, QuantScheme(4))
    >>> for layout in (GptqLayout(1), GptqLayout(2)):
    ...     tensors = layout.write("X.weight", weight)
    ...     print(*(f"{tensors[k][0, 0].item() % 2**32:#x}" for k in ("X.qweight", "X.qzeros")))
    0x76543210 0x77777777
    0x76543210 0x88888888
    """

    version: Literal[1, 2] = 1

    @property
    def name(self) -> str:
        """As in `--format`."""
        return "gptq" if self.version == 1 else "gptq-v2"

    @property
    def quant_method(self) -> str:
        """As in config.json, of both versions."""
        return "gptq"

    def reads(self, config: dict[str, Any]) -> bool:
        """By `checkpoint_format`; what is neither version goes to the first, which refuses it."""
        second = _layout_of(config) == _LAYOUTS[2]
        return config.get("quant_method") == self.quant_method and second == (self.version == 2)

    def scales(self, dtype: torch.dtype) -> ScaleRange:
        """Those that are float16 too."""
        return float16_scales(dtype)

    def refuses(self, placement: Placement, scheme: QuantScheme) -> str | None:
        """Rounded inputs, stacked weights, sides that fill no words; version 1 also zero points."""
        reason = refuses_placement(placement, scheme)
        if reason is not None:
            return reason
        if self.version == 1 and not scheme.symmetric:
            return "version 1 cannot hold a zero point of 0; accepted are symmetric weights, or gptq-v2"
        step = 32 // gcd(32, scheme.bits)
        for side, size in zip(("out", "in"), placement.shape or (), strict=False):
            if size % step:
                return f"{side} is {size}; accepted in {scheme.bits} bits are multiples of {step}"
        return None

    def alike(self, name: str, placement: Placement) -> tuple[str, Hashable] | None:
        """Every weight has a scheme of its own."""
        return None

    def held(self, weight: QuantizedTensor) -> QuantizedTensor:
        """With scales in float16."""
        weight = weight.per_row()
        return replace(weight, scale=as_float16(weight.scale))

    def write(self, name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """`X.weight` -> `X.qweight`, `X.qzeros`, `X.scales`, `X.g_idx`."""
        weight, base = weight.per_row(), base_of(name)
        bits, scheme = weight.scheme.bits, weight.scheme
        reason = self.refuses(Placement(base, scheme, shape=weight.shape), scheme)
        if weight.outliers is not None:
            reason = "columns in 16 bits have no layout in it"
        if weight.order is not None:
            reason = "groups that are not of neighbouring columns are not written"
        if reason is not None:
            raise InputError(f"{name}: {self.name}: {reason}")
        points = weight.zero_point.t().contiguous()
        if self.version == 1:
            points = points - 1
        return {
            f"{base}.qweight": packing.pack(weight.codes, bits).t().contiguous(),
            f"{base}.qzeros": packing.pack(points, bits),
            f"{base}.scales": self.held(weight).scale.t().contiguous(),
            f"{base}.g_idx": _groups_of(weight.shape[1], scheme),
        }

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """The inverse of `write`; scales as stored, granularity "tensor" as "channel"."""
        packed, points, scale = stored_parts(name, tensors)
        rows, columns = _shape_of(name, tuple(packed.shape), scheme.bits)
        order = self._check(name, tensors, scheme, (rows, columns))
        codes = packing.unpack(packed.t(), scheme.bits, columns)
        return QuantizedTensor(
            codes if order is None else codes[:, order],
            scale.t().contiguous(),
            self._points(name, packing.unpack(points, scheme.bits, rows), scheme),
            on_disk(scheme),
            order=order,
        )

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> Integers:
        """By the compressed-tensors library: its packing is the same, along the other axis."""
        if self._check(name, tensors, scheme, shape) is not None:
            raise InputError(f"{name}: its columns are not in the order that is written")
        packed, points, scale = stored_parts(name, tensors)
        rows, columns = shape
        codes = unpack_elsewhere(packed, scheme.bits, (columns, rows), 0)
        zeros = unpack_elsewhere(points, scheme.bits, (len(scale), rows), 1)
        return Integers(
            codes.t().contiguous(), scale.t().contiguous(), self._points(name, zeros, scheme)
        )

    def tensors(self, name: str) -> Names:
        """`g_idx` is written, and may be missing: old writers have none."""
        *needed, groups = (base_of(name) + end for end in _ENDS)
        return Names(tuple(needed), (groups,))

    def shape(self, config: dict[str, Any], name: str, stored: Stored) -> tuple[int, ...]:
        """As many rows of codes as there are in the words of a column."""
        base = base_of(name)
        scheme = self.scheme_of(config, name, base)
        if scheme is None:
            raise InputError(f"{name} is quantized, but config.json gives no scheme")
        return _shape_of(name, stored.tensors[f"{base}.qweight"].shape, scheme.bits)

    def written_bytes(self, rows: int, columns: int, scheme: QuantScheme, itemsize: int) -> int:
        """Codes, zero points, scales and the group of each column."""
        groups = scheme.groups(columns)
        words = rows * packing.packed_columns(columns, scheme.bits)
        words += groups * packing.packed_columns(rows, scheme.bits)
        return 4 * words + 2 * groups * rows + 4 * columns

    def headers(
        self, name: str, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> Headers:
        """Of those four."""
        (rows, columns), base = shape, base_of(name)
        groups, bits = scheme.groups(columns), scheme.bits
        return {
            f"{base}.qweight": (torch.int32, (packing.packed_columns(columns, bits), rows)),
            f"{base}.qzeros": (torch.int32, (groups, packing.packed_columns(rows, bits))),
            f"{base}.scales": (torch.float16, (groups, rows)),
            f"{base}.g_idx": (torch.int32, (columns,)),
        }

    def config(self, placements: Mapping[str, Placement], floats: list[str]) -> dict[str, Any]:
        """The commonest scheme for all, and a rule for each module that has another or none."""
        schemes = Counter(on_disk(p.scheme) for p in placements.values())
        heads = {p.module for p in placements.values() if not is_inside(p.module)}
        if len(heads) > 1:
            raise InputError(
                f"{self.name}: its clients look for codes in the blocks and in the head, not in "
                f"{' and '.join(sorted(heads))}; accepted is to leave them in float"
            )
        usual = schemes.most_common(1)[0][0]
        names = _names_by_scheme(placements)
        left = set(floats).difference(*names.values())
        rules = float_rules({n for n in left if heads or is_inside(n) or "." in n}, names.values())
        for scheme in schemes:
            if scheme != usual:
                others = left.union(*(names[other] for other in names if other != scheme))
                settings = _settings(scheme)
                rules |= {f"+:^{p}$": settings for p in patterns(names[scheme], others)}
        kinds = _kinds(placements, left)
        return {
            "quant_method": self.quant_method,
            **_settings(usual),
            "desc_act": False,
            "checkpoint_format": _LAYOUTS[self.version],
            "lm_head": bool(heads),
            "pack_dtype": "int32",
            **({"dynamic": rules} if rules else {}),
            **({"modules_in_block_to_quantize": [kinds]} if kinds else {}),
            "meta": {"quantizer": [f"fewbits:{version_of('fewbits')}"]},
        }

    def remarks(self, placements: Mapping[str, Placement]) -> list[str]:
        """What of it only some clients load."""
        values = placements.values()
        found = {
            f"several schemes: {_REFUSED}": len({on_disk(p.scheme) for p in values}) > 1,
            f"weights stored (in, out): {_REFUSED}": any(p.transposed for p in values),
            f"a head that is quantized: {_WRONG}": any(not is_inside(p.module) for p in values),
            f"experts: {EXPERTS}": any(p.expert for p in values),
            f"other matrices in float in one block than in the next: {_WRONG}": _blocks_differ(
                placements
            ),
        }
        return [remark for remark, here in found.items() if here]

    def scheme_of(self, config: dict[str, Any], name: str, module: str) -> QuantScheme | None:
        """By the first rule of `dynamic` that matches, as GPTQModel does; heads as `lm_head` says."""
        _check_config(config)
        rules = setting(config, ("dynamic",), dict[str, dict[str, Any]], {})
        for pattern, values in rules.items():
            if _matches(pattern, (module, name.removesuffix(".weight"))):
                return None if pattern.startswith("-:") else _scheme(config | values)
        if not is_inside(module) and not setting(config, ("lm_head",), bool, False):
            return None
        return _scheme(config)

    def quantized_names(self, config: dict[str, Any], tensors: Iterable[str]) -> set[str]:
        """By the tensors that stand for `X.weight`."""
        _check_config(config)
        return names_by_tensors(tensors, _ENDS)

    def _check(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        scheme: QuantScheme,
        shape: tuple[int, int],
    ) -> Tensor | None:
        """Whether the tensors have the shapes of a weight (out, in); the order of its columns if any."""
        (rows, columns), bits = shape, scheme.bits
        groups = groups_in(name, columns, scheme)
        check_shapes(
            name,
            stored_parts(name, tensors),
            ((columns * bits / 32, rows), (groups, rows * bits / 32), (groups, rows)),
        )
        index = tensors.get(f"{base_of(name)}.g_idx")
        if index is None:
            return None
        if tuple(index.shape) != (columns,):
            raise InputError(f"{name}: g_idx is {tuple(index.shape)}; accepted is {(columns,)}")
        try:
            return order_of(index, scheme.group_size or columns)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _points(self, name: str, stored: Tensor, scheme: QuantScheme) -> Tensor:
        """Zero points (out, groups) from what is stored of them, (groups, out)."""
        if self.version == 1:
            if bool((stored == scheme.max_code).any()):
                raise InputError(
                    f"{name}: its qzeros hold {scheme.max_code}, a zero point of {scheme.max_code + 1}; "
                    f"accepted are zero points up to {scheme.max_code}"
                )
            stored = stored + 1
        return zero_points(name, stored.t().contiguous(), scheme)


def order_of(g_idx: Tensor, group_size: int) -> Tensor | None:
    """The order of columns in which a group's stand side by side, as they were when it was quantized.

    Args:
        g_idx: (in,) whole numbers, the group of each column.
        group_size: columns in a group.

    Returns:
        (in,) int64: `codes[:, order]` has group i // group_size in column i; None if codes have that.

    Raises:
        InputError: a group has more or fewer columns.

    >>> order_of(torch.tensor([1, 0, 1, 0]), 2)
    tensor([1, 3, 0, 2])
    """
    wanted = torch.arange(len(g_idx)) // group_size
    if torch.equal(g_idx.long(), wanted):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order].long(), wanted):
        raise InputError(
            f"g_idx is no order of columns; accepted are {group_size} of them in each group"
        )
    return order


# -- what AWQ's layout has in common with it -----------------------------------------------------------


def refuses_placement(placement: Placement, scheme: QuantScheme) -> str | None:
    """Why neither of the two layouts can hold a weight; None if they may."""
    if placement.embedding:
        return FLOAT_EMBEDDINGS
    if scheme.two_level:
        return TWO_LEVELS
    if scheme.trellis:
        return TRELLIS
    if scheme.inputs is not None:
        return "inputs in 8 bits, and columns in 16 bits, have no layout in it"
    if placement.stacked:
        return "experts that are fused in one tensor on disk have no layout in it"
    return None


def base_of(name: str) -> str:
    """`X` of `X.weight`.

    Raises:
        InputError: another name, for which the layout has no tensors.
    """
    base = name.removesuffix(".weight")
    if base == name:
        raise InputError(f"{name} has no layout in it; accepted are names that end in .weight")
    return base


def names_by_tensors(tensors: Iterable[str], ends: Iterable[str]) -> set[str]:
    """The weights that the tensors stand for. `X.scales` beside an `X.weight` is something else."""
    present, found = set(tensors), set()
    for end in ends:
        for name in present:
            base = name.removesuffix(end)
            if base != name and (end != ".scales" or f"{base}.weight" not in present):
                found.add(f"{base}.weight")
    return found


def stored_parts(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Words of codes, words of zero points, and scales.

    Raises:
        InputError: one is missing, or has another dtype than its kind has.
    """
    base = base_of(name)
    try:
        codes, points, scale = (tensors[base + end] for end in _ENDS[:3])
    except KeyError as missing:
        raise InputError(f"{name}: the checkpoint has no tensor {missing}") from None
    for end, tensor in ((".qweight", codes), (".qzeros", points)):
        if tensor.dtype != torch.int32:
            raise InputError(f"{base}{end} is {tensor.dtype}; accepted is torch.int32")
    if not scale.is_floating_point():
        raise InputError(f"{base}.scales is {scale.dtype}; accepted are floats")
    return codes, points, scale


def check_shapes(
    name: str, parts: tuple[Tensor, Tensor, Tensor], expected: tuple[tuple[float, float], ...]
) -> None:
    """Whether codes, zero points and scales have these shapes; a fraction is none.

    Raises:
        InputError: names the first that has not.
    """
    for end, tensor, shape in zip(_ENDS, parts, expected, strict=False):
        if tuple(tensor.shape) != shape:
            wanted = tuple(int(side) if side == int(side) else side for side in shape)
            raise InputError(
                f"{base_of(name)}{end} is {tuple(tensor.shape)}; accepted in this scheme is {wanted}"
            )


def groups_in(name: str, columns: int, scheme: QuantScheme) -> int:
    """Groups of a row.

    Raises:
        InputError: the group size does not divide the columns.
    """
    try:
        return scheme.groups(columns)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def zero_points(name: str, stored: Tensor, scheme: QuantScheme) -> Tensor:
    """The same; of a symmetric scheme all must be at mid-range.

    Raises:
        InputError: they are not.
    """
    if scheme.symmetric and bool((stored != scheme.middle).any()):
        raise InputError(
            f"{name}: config.json says symmetric, but not all of its qzeros are {scheme.middle}"
        )
    return stored


def setting(config: Mapping[str, Any], keys: tuple[str, ...], kind: Any, default: Any = None) -> Any:
    """The value of the first key that has one, and that it is of its kind.

    Raises:
        InputError: it is of another.
    """
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    value = config.get(key)
    value = default if value is None else value
    try:
        check_types(value, kind, f"quantization_config.{key}")
    except ValueError as error:
        raise InputError(str(error)) from None
    return value


def grouped(bits: int, size: int, symmetric: bool) -> QuantScheme:
    """The scheme of a group size as these configurations have it: -1 for whole rows."""
    if size == -1:
        return QuantScheme(bits, "channel", None, symmetric)
    return QuantScheme(bits, "group", size, symmetric)


def is_inside(module: str) -> bool:
    """Whether a module stands in a numbered list, as blocks do.

    >>> is_inside("model.layers.0.mlp.up_proj"), is_inside("lm_head")
    (True, False)
    """
    return any(part.isdigit() for part in module.split("."))


def float_rules(floats: set[str], quantized: Iterable[set[str]]) -> dict[str, dict[str, Any]]:
    """Rules of `dynamic` that leave modules in float."""
    return {f"-:^{p}$": {} for p in patterns(floats, set().union(*quantized))}


def patterns(members: set[str], others: set[str]) -> list[str]:
    r"""Members with their numbers as `\d+`, where that catches no other module; else one by one.

    >>> patterns({"h.0.fc", "h.1.fc", "h.0.up"}, {"h.1.up"})
    ['h\\.0\\.up', 'h\\.\\d+\\.fc']
    """
    taken = {_general(other) for other in others}
    return sorted({re.escape(m) if (g := _general(m)) in taken else g for m in members})


def _general(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


# -- its own ------------------------------------------------------------------------------------------


def _groups_of(columns: int, scheme: QuantScheme) -> Tensor:
    size = scheme.group_size or columns
    return torch.arange(columns, dtype=torch.int32) // size


def _shape_of(name: str, words: tuple[int, ...], bits: int) -> tuple[int, int]:
    """(out, in) of a weight whose words of codes have a shape."""
    if len(words) != 2 or words[0] * 32 % bits:
        raise InputError(f"{name}: words {words} do not hold a matrix of {bits} bits")
    return words[1], words[0] * 32 // bits


def _settings(scheme: QuantScheme) -> dict[str, Any]:
    size = -1 if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.bits, "group_size": size, "sym": scheme.symmetric}


def _scheme(config: dict[str, Any]) -> QuantScheme:
    bits, size = setting(config, ("bits",), int), setting(config, ("group_size",), int)
    return grouped(bits, size, setting(config, ("sym",), bool, True))


def _layout_of(config: dict[str, Any]) -> Any:
    """What it says of its version; AutoGPTQ's first configurations do not say."""
    value = next((config[k] for k in ("checkpoint_format", "format") if config.get(k) is not None), None)
    return value.lower() if isinstance(value, str) else "gptq" if value is None else value


def _check_config(config: dict[str, Any]) -> None:
    """Refuse what would be read wrongly, or not at all."""
    layout = "marlin" if config.get("is_marlin_format") else _layout_of(config)
    if layout not in _LAYOUTS.values():
        raise InputError(
            f"GPTQ in checkpoint_format {shown(layout)} is not read; accepted are 'gptq' and 'gptq_v2'"
        )
    rules = setting(config, ("dynamic",), dict[str, dict[str, Any]], {})
    for place in (config, *rules.values()):
        if place.get("pack_dtype") not in (None, "int32"):
            raise InputError(
                f"GPTQ with pack_dtype {shown(place['pack_dtype'])} is not read; accepted is 'int32'"
            )
    for key in ("rotation", "activation"):  # what else is done to inputs
        if config.get(key) is not None:
            raise InputError(f"GPTQ with {key} {shown(config[key])} is not read; accepted is none")


def _matches(pattern: str, names: tuple[str, ...]) -> bool:
    text = pattern[2:] if pattern.startswith(("-:", "+:")) else pattern
    try:
        return any(re.match(text, name) for name in names)
    except re.error as error:
        raise InputError(
            f"quantization_config.dynamic: {shown(pattern)} is no pattern: {error}"
        ) from None


def _names_by_scheme(placements: Mapping[str, Placement]) -> dict[QuantScheme, set[str]]:
    """The names of modules, in the model and in the source, that have a scheme, and no other one too."""
    names: dict[QuantScheme, set[str]] = defaultdict(set)
    for source, placement in placements.items():
        names[on_disk(placement.scheme)] |= {source.removesuffix(".weight"), placement.module}
    times = Counter(name for members in names.values() for name in members)
    return {scheme: {n for n in members if times[n] == 1} for scheme, members in names.items()}


def _in_block(name: str) -> tuple[str, str, str] | None:
    """The name of a list, a number in it, and what is below that; None outside of lists."""
    parts = name.removesuffix(".weight").split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), part, ".".join(parts[i + 1 :])
    return None


def _kinds(placements: Mapping[str, Placement], floats: set[str]) -> list[str]:
    """What is quantized in each block, for optimum; empty if that is all, or cannot be said so."""
    if any(placement.expert for placement in placements.values()):
        return []
    names = {*placements, *(placement.module for placement in placements.values())}
    places = [place for name in names if (place := _in_block(name)) is not None]
    lists, kinds = {place[0] for place in places}, {place[2] for place in places}
    inside = [p[2] for name in floats if (p := _in_block(name)) is not None and p[0] in lists]
    if not inside or any(name.endswith(kind) for name in inside for kind in kinds):
        return []
    return sorted(kinds)


def _blocks_differ(placements: Mapping[str, Placement]) -> bool:
    """Whether not all blocks have the same matrices quantized."""
    blocks: dict[tuple[str, str], set[str]] = defaultdict(set)
    for placement in placements.values():
        place = _in_block(placement.module)
        if place is not None:
            blocks[place[:2]].add(place[2])
    return len({frozenset(kinds) for kinds in blocks.values()}) > 1
