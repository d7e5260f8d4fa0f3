"""compressed-tensors: the format of vLLM and llm-compressor, read by transformers. Two layouts of it.

`pack-quantized`, of weights whose inputs are not rounded:

    X.weight_packed        codes + nothing: they are stored unsigned, q + 2**(bits-1), as ours are
    X.weight_scale         in the model's dtype
    X.weight_zero_point    likewise unsigned
    X.weight_shape

`int-quantized`, of weights whose inputs are rounded too, to 8 bits, by token and in each call:

    X.weight               int8 (out, in): q, so our code - 128
    X.weight_scale         (out, 1)

    config.json  "quantization_config": {"quant_method": "compressed-tensors",
      "config_groups": {"group_0": {"format": "pack-quantized", "targets": ["Linear"], "weights": {
         "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128}}},
      "ignore": ["lm_head"]}

Every group carries its own `format`; where they differ that of the whole is "mixed-precision".
Weight-only INT8 is pack-quantized with 8 bits: as `int-quantized` transformers loads it with weights
missing. A dequantized weight is `(q - zero_point) * scale`.

Other tools wrote, and versions before these wrote, what is read here as well: one scale for a whole
tensor, zero points as int8, weights of any bits as int8 ("naive-quantized"), 3-bit codes ten to a word,
and X.weight_g_idx (`actorder` "group"): the group of each column, the columns themselves as they come.
"""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fewbits import packing
from fewbits.errors import InputError
from fewbits.formats.gptq import order_of, setting
from fewbits.formats.layout import (
    FLOAT_EMBEDDINGS,
    TRELLIS,
    TWO_LEVELS,
    Headers,
    Integers,
    Names,
    ScaleRange,
    Stored,
)
from fewbits.formats.packed import (
    decode_packed,
    find,
    on_disk,
    packed_bytes,
    packed_headers,
    rows_columns,
    write_packed,
)
from fewbits.formats.placement import Placement
from fewbits.scheme import Granularity, InputScheme, QuantScheme
from fewbits.tensor import QuantizedTensor
from fewbits.untrusted import shown

_OPTION = "plain transformers loads them with CompressedTensorsConfig(dequantize=True) only"
_PACKED, _INT8, _MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_READ = (_PACKED, _INT8, "naive-quantized", _MIXED)  # the last of a whole: its groups say more
_ENDS = ("_packed", "_scale", "_zero_point", "_shape", "_g_idx")


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """`pack-quantized`, and `int-quantized` where inputs are rounded.

    >>> codes, scale = torch.tensor([[1, 128, 255]], dtype=torch.uint8), torch.ones(1, 1)
    >>> point = torch.full((1, 1), 128, dtype=torch.uint8)
    >>> for scheme in (QuantScheme(8), QuantScheme(8, inputs=InputScheme("token", threshold=0))):
    ...     tensors = CompressedTensors().write("X.weight", QuantizedTensor(codes, scale, point, scheme))
    ...     print({name: t.tolist() for name, t in tensors.items() if name != "X.weight_scale"})
    {'X.weight_packed': [[16744449]], 'X.weight_shape': [1, 3]}
    {'X.weight': [[-127, 0, 127]]}
    """

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
        """Outlier columns, transposed or stacked weights: there is no layout; and asymmetric experts."""
        if placement.embedding:
            return FLOAT_EMBEDDINGS
        if scheme.two_level:
            return TWO_LEVELS
        if scheme.trellis:
            return TRELLIS
        if scheme.inputs is not None and scheme.inputs.threshold:
            return "columns in 16 beside 8 bits have no layout in pack-quantized or int-quantized"
        if scheme.inputs is not None and scheme.inputs.granularity != "token":
            return "its clients round inputs by token, not with one scale for a whole call"
        if placement.stacked:
            return "experts that are fused in one tensor on disk have no layout in it"
        if placement.transposed:
            return "weights stored (in, out) have no layout in it"
        if placement.expert and not scheme.symmetric:
            return "its clients do not load asymmetric experts"
        return None

    def alike(self, name: str, placement: Placement) -> tuple[str, Hashable] | None:
        """All experts have one scheme."""
        return ("experts", on_disk(placement.scheme)) if placement.expert else None

    def held(self, weight: QuantizedTensor) -> QuantizedTensor:
        """Itself."""
        return weight

    def write(self, name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """`X.weight` -> `X.weight_packed`, `X.weight_scale`, ..., or int8 `X.weight` and its scale."""
        if weight.outliers is not None:
            raise InputError(f"{name}: columns in 16 bits have no layout here")
        if weight.scheme.inputs is None:
            return write_packed(name, "_packed", weight)
        if weight.order is not None:
            raise InputError(f"{name}: columns in another order have no layout here")
        signed = (weight.codes.to(torch.int16) - weight.scheme.middle).to(torch.int8)
        return {name: signed, f"{name}_scale": weight.per_row().scale}

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """The inverse of `write`; and of what else is written by others, see above."""
        codes = _codes(name, tensors, scheme.bits)
        rows, columns = codes.shape
        grid = rows, scheme.groups(columns)
        scale = find(name, "_scale", tensors)
        if not scale.is_floating_point() or scale.dtype.itemsize < 2:
            raise InputError(f"{name}_scale is {scale.dtype}; accepted are floats of 16 bits or more")
        order = _order(name, tensors, scheme, columns)
        return QuantizedTensor(
            codes if order is None else codes[:, order],
            _spread(f"{name}_scale", scale, grid),
            _points(name, tensors, scheme, grid),
            on_disk(scheme),
            order=order,
        )

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> Integers:
        """By the compressed-tensors library."""
        if f"{name}_packed" in tensors:
            return decode_packed(name, "_packed", tensors, scheme, shape)
        return _decode_int8(name, tensors, scheme, shape)

    def tensors(self, name: str) -> Names:
        """Scales, and the codes of one layout or of the other."""
        return Names((f"{name}_scale",), (f"{name}_packed", name, *(name + end for end in _ENDS[2:])))

    def shape(self, config: dict[str, Any], name: str, stored: Stored) -> tuple[int, ...]:
        """As stored beside the codes, or that of the codes."""
        names = (f"{name}_packed", name)
        codes = [found for found in names if found in stored.tensors]
        if len(codes) != 1:
            how = "both are" if codes else "none is"
            raise InputError(
                f"{name} is quantized, and its codes are {names[0]} or {names[1]}; {how} there"
            )
        group = _group(config, {name.removesuffix(".weight")})
        weights = None if group is None else _args(group, "weights")
        by_group = weights is not None and weights.actorder in ("group", "dynamic", True)
        if by_group and f"{name}_g_idx" not in stored.tensors:
            raise InputError(f"{name} has actorder 'group', but {name}_g_idx is missing")
        if codes == [name]:
            shape = stored.tensors[name].shape
            if len(shape) != 2:
                raise InputError(f"{name} is {shape}; accepted is a matrix of int8")
            return shape
        return rows_columns(name, {f"{name}_shape": _small(f"{name}_shape", stored)})

    def written_bytes(self, rows: int, columns: int, scheme: QuantScheme, itemsize: int) -> int:
        """Codes and scales; of packed ones zero points and the shape too."""
        if scheme.inputs is None:
            return packed_bytes(rows, columns, scheme, itemsize)
        return rows * (columns + itemsize)

    def headers(
        self, name: str, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> Headers:
        """Of one layout or of the other."""
        if scheme.inputs is None:
            return packed_headers(name, "_packed", shape, scheme, dtype)
        return {name: (torch.int8, shape), f"{name}_scale": (dtype, (shape[0], 1))}

    def config(self, placements: Mapping[str, Placement], floats: list[str]) -> dict[str, Any]:
        """One config group per scheme; with several, their modules are named by pattern."""
        # Clients match the names of their own modules, which may differ from those of the source.
        modules: dict[QuantScheme, set[str]] = defaultdict(set)
        for source, placement in placements.items():
            modules[on_disk(placement.scheme)] |= {source.removesuffix(".weight"), placement.module}
        if len({self.alike(name, p) for name, p in placements.items() if p.expert}) > 1:
            raise InputError(
                "compressed-tensors: its clients load all experts in one scheme; use --format fewbits"
            )
        groups = {}
        for i, (scheme, members) in enumerate(modules.items()):
            others = {m for other in modules if other != scheme for m in modules[other]}
            targets = ["Linear"] if len(modules) == 1 else _patterns(members, others)
            groups[f"group_{i}"] = {
                "format": _layout_of(scheme),
                "targets": targets,
                "weights": _weights(scheme),
                "input_activations": _inputs(scheme),
                "output_activations": None,
            }
        layouts = {_layout_of(scheme) for scheme in modules}
        return {
            "quant_method": self.name,
            "format": layouts.pop() if len(layouts) == 1 else _MIXED,
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
        if any(placement.own_forward and placement.scheme.inputs is None for placement in values):
            remarks.append(f"linears of a class of their own: {_OPTION}")
        if any(placement.expert and placement.scheme.inputs is not None for placement in values):
            remarks.append("experts with inputs in 8 bits: plain transformers does not load them")
        return remarks

    def quantized_names(self, config: dict[str, Any], tensors: Iterable[str]) -> set[str]:
        """By the tensors that stand for `X.weight`, or beside it: an `X.weight` alone is a float.

        Raises:
            InputError: more than linears is quantized.
        """
        for key, what in _BEYOND.items():
            if config.get(key):
                raise InputError(f"quantization_config.{key}: {what} is not read; accepted is null")
        return {
            base
            for name in tensors
            for suffix in _ENDS
            if (base := name.removesuffix(suffix)) != name and base.endswith(".weight")
        }

    def scheme_of(self, config: dict[str, Any], name: str, module: str) -> QuantScheme | None:
        """By exact name first, then by pattern, then by the class "Linear", as its clients do."""
        names = {module, name.removesuffix(".weight")}
        if any(_match(target, names) is not None for target in _targets(config, "ignore")):
            return None
        group = _group(config, names)
        return None if group is None else _scheme(group, config)


# -- tensors ---------------------------------------------------------------------------------------


def _codes(name: str, tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """(out, in) uint8, from whichever tensor holds them."""
    if name not in tensors:
        packed = find(name, "_packed", tensors)
        return _unpack(name, packed, bits, rows_columns(name, tensors))
    signed = tensors[name]
    if f"{name}_packed" in tensors or signed.dtype != torch.int8 or signed.ndim != 2:
        raise InputError(
            f"{name} is {signed.dtype} with {signed.ndim} axes; accepted are a matrix of int8, or "
            f"{name}_packed in its place"
        )
    return _unsigned(name, signed, bits)


def _unpack(name: str, packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Packed along the second axis without gaps; until May 2026 (0.18) only whole codes in each word.

    The number of words tells them apart, for 3 bits of any multiple of 32 and from 160 columns on.
    """
    (rows, columns), in_word = shape, 32 // bits
    words = packing.packed_columns(columns, bits)
    if packed.dtype != torch.int32 or tuple(packed.shape) not in (
        (rows, words),
        (rows, -(-columns // in_word)),
    ):
        raise InputError(
            f"{name}: {tuple(packed.shape)} words of {packed.dtype} do not hold {rows} x {columns} "
            f"codes of {bits} bits"
        )
    if packed.shape[1] == words:
        return packing.unpack(packed, bits, columns)
    codes = [((packed >> (bits * i)) & ((1 << bits) - 1)).to(torch.uint8) for i in range(in_word)]
    return torch.stack(codes, -1).flatten(1)[:, :columns].contiguous()


def _unsigned(name: str, signed: Tensor, bits: int) -> Tensor:
    """q -> q + 2**(bits-1), uint8."""
    middle = 1 << (bits - 1)
    values = signed.to(torch.int16)
    if values.numel() and not -middle <= int(values.min()) <= int(values.max()) < middle:
        raise InputError(f"{name} holds more than {bits} bits; accepted are -{middle} to {middle - 1}")
    return (values + middle).to(torch.uint8)


def _spread(name: str, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """(out, groups), of one value for all or one in each row too, where there is one group."""
    if values.numel() == 1 and grid[1] == 1:
        return values.reshape(1, 1).expand(grid).contiguous()
    if tuple(values.shape) in (grid, (grid[0],) if grid[1] == 1 else grid):
        return values.reshape(grid)
    raise InputError(f"{name} is {tuple(values.shape)}; accepted is {grid}")


def _points(
    name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, grid: tuple[int, int]
) -> Tensor:
    """(out, groups) uint8. int32 are packed, as int8 they are as they come, and signed."""
    middle = torch.full(grid, scheme.middle, dtype=torch.uint8)
    if scheme.symmetric and f"{name}_zero_point" not in tensors:
        return middle
    stored = find(name, "_zero_point", tensors)
    if stored.dtype == torch.int8:
        points = _spread(f"{name}_zero_point", _unsigned(name, stored, scheme.bits), grid)
    else:
        points = _unpack(f"{name}_zero_point", stored.t(), scheme.bits, (grid[1], grid[0])).t()
    if scheme.symmetric and not torch.equal(points, middle):
        raise InputError(f"{name}: its zero points are not 0, though config.json says symmetric")
    return points.contiguous()


def _order(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, columns: int) -> Tensor | None:
    """By the group of each column; of groups that were never set, which are -1, there is none."""
    groups = tensors.get(f"{name}_g_idx")
    if groups is None or scheme.group_size is None:
        return None
    if tuple(groups.shape) != (columns,) or groups.is_floating_point():
        raise InputError(f"{name}_g_idx is {tuple(groups.shape)}; accepted are {columns} whole numbers")
    if bool((groups == -1).all()):
        return None
    try:
        return order_of(groups, scheme.group_size)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _decode_int8(
    name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
) -> Integers:
    from compressed_tensors.compressors import IntQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scale = tensors[f"{name}_scale"]
    if tuple(tensors[name].shape) != shape or tuple(scale.shape) != (shape[0], 1):
        raise InputError(f"{name} is {tuple(tensors[name].shape)} instead of {shape}")
    kind: dict[str, Any] = {
        "targets": [],
        "weights": _weights(on_disk(scheme)),
        "input_activations": _inputs(scheme),
    }
    # It gives floats. In steps of 1 they are the integers.
    parts = {"weight": tensors[name], "weight_scale": torch.ones(scale.shape)}
    whole = IntQuantizationCompressor.decompress(parts, QuantizationScheme.model_validate(kind))
    codes = (whole["weight"] + scheme.middle).to(torch.uint8)
    return Integers(codes, scale, torch.full(scale.shape, scheme.middle, dtype=torch.uint8))


def _small(name: str, stored: Stored) -> Tensor:
    if name not in stored.tensors:
        raise InputError(f"the checkpoint has no tensor {name!r}")
    shape = stored.tensors[name].shape
    if shape != (2,):
        raise InputError(f"{name} is {shape}; accepted are two numbers")
    return stored.read(name)


# -- config.json -----------------------------------------------------------------------------------

_BEYOND = {
    "kv_cache_scheme": "a quantized cache",
    "transform_config": "a model whose activations are rotated",
    "sparsity_config": "a sparse layout",
    "moe_sparsity_config": "a mixture without some of its experts",
}


def _layout_of(scheme: QuantScheme) -> str:
    return _PACKED if scheme.inputs is None else _INT8


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


def _inputs(scheme: QuantScheme) -> dict[str, Any] | None:
    if scheme.inputs is None:
        return None
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": scheme.inputs.granularity,
        "group_size": None,
        "dynamic": True,
        "actorder": None,
        "observer": None,
    }


@dataclass(frozen=True, slots=True)
class _Args:
    """What such a configuration says of the weights or inputs of a module, with its defaults."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str | None = None
    dynamic: bool | str = False
    actorder: bool | str | None = None

    @property
    def shared(self) -> str:
        """What shares a scale; where only the size of a group is given it says so."""
        if self.strategy is not None:
            return self.strategy.lower()
        if self.group_size is None:
            return "tensor"
        return "channel" if self.group_size == -1 else "group"


def _args(group: Mapping[str, Any], key: str) -> _Args | None:
    found = setting(group, (key,), dict[str, Any], {})
    if group.get(key) is None:
        return None
    known = {field.name: found[field.name] for field in fields(_Args) if field.name in found}
    setting({key: _Args(**known)}, (key,), _Args)
    return _Args(**known)


def _group(config: Mapping[str, Any], names: set[str]) -> Mapping[str, Any] | None:
    """The group of the best target: an exact name, a pattern, the class; the first by the alphabet."""
    best: dict[str, tuple[int, Mapping[str, Any]]] = {}  # the last group that names a target has it
    for group in setting(config, ("config_groups",), dict[str, dict[str, Any]], {}).values():
        for target in _targets(group, "targets"):
            rank = _match(target, names)
            if rank is not None:
                best[target] = rank, group
    return min(best.items(), key=lambda item: (item[1][0], item[0]))[1][1] if best else None


def _scheme(group: Mapping[str, Any], config: Mapping[str, Any]) -> QuantScheme:
    layout = setting(group, ("format",), str) if group.get("format") else config.get("format")
    weights, inputs = _args(group, "weights"), _args(group, "input_activations")
    if weights is None or group.get("output_activations") is not None:
        raise InputError(
            "compressed-tensors group with output_activations, or without weights, is not read; "
            "accepted are weights and input_activations"
        )
    if layout not in (None, *_READ) or weights.type.lower() != "int" or weights.dynamic:
        raise InputError(
            f"compressed-tensors format {shown(layout)} of type {shown(weights.type)} is not read; "
            f"accepted are {', '.join(map(repr, _READ))} of type 'int'"
        )
    shared = weights.shared
    if shared not in ("group", "channel", "tensor"):
        raise InputError(
            f"compressed-tensors strategy {shown(shared)} is not read; "
            "accepted are group, channel and tensor"
        )
    granularity: Granularity = "group" if shared == "group" else "channel"
    size = weights.group_size if shared == "group" else None
    rounded = None if inputs is None else _input_scheme(inputs)
    return QuantScheme(weights.num_bits, granularity, size, weights.symmetric, rounded)


def _input_scheme(inputs: _Args) -> InputScheme:
    kind = (inputs.num_bits, inputs.type.lower(), inputs.symmetric, inputs.dynamic)
    shared = inputs.shared
    if kind != (8, "int", True, True) or shared not in ("token", "tensor"):
        raise InputError(
            f"compressed-tensors input_activations of {inputs.num_bits} bits of type "
            f"{shown(inputs.type)}, symmetric {inputs.symmetric}, dynamic {inputs.dynamic}, by "
            f"{shown(shared)} are not read; "
            "accepted are 8 bits of type 'int', symmetric, dynamic, by 'token' or 'tensor'"
        )
    return InputScheme("token" if shared == "token" else "tensor", threshold=0)


def _targets(owner: Mapping[str, Any], key: str) -> list[str]:
    found = owner.get(key)
    if isinstance(found, list) and all(isinstance(target, str) for target in found):
        return found  # thousands, asked for each of thousands of weights
    targets: list[str] = setting(owner, (key,), list[str], [])
    return targets


def _match(target: str, names: set[str]) -> int | None:
    if target in names:
        return 0
    if target.startswith("re:"):
        try:
            return 1 if any(re.match(target[3:], name) for name in names) else None
        except re.error as error:
            raise InputError(f"quantization_config: {shown(target)} is no pattern: {error}") from None
    # A class, which the library asks the module for. Those of linears with a forward of their own are
    # named after it, as FalconLinear.
    return 2 if target.isidentifier() and target.endswith("Linear") else None


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
