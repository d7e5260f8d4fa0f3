"""The library as operators of PyTorch: what a step of a model calls, and `torch.compile` sees.

PyTorch calls the library itself where it has a stable C interface (2.10 and later): all that Python does
between two products is slow, for its code and data have gone from the cache while weights were read.
Before, Python functions do the same.
"""

import threading
from typing import Any

import torch
from torch import Tensor

from fewbits.native.library import Library, Weight, describe, library, why_absent

_WEIGHT = (
    "Tensor codes, Tensor scales, Tensor zeros, Tensor table, "
    "int out, int columns, int bits, int group, int zero_type"
)
_DEFINED = torch.library.Library("fewbits", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    f"native_linear(Tensor x, Tensor bias, {_WEIGHT}, int inputs) -> Tensor",
    f"native_weight({_WEIGHT}, ScalarType dtype) -> Tensor",
    "native_float_linear(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    "native_attend_few(Tensor query, Tensor key, Tensor value, Tensor mask, float scaling) -> Tensor",
    "native_attend(Tensor query, Tensor key, Tensor value, float scaling, bool causal) -> Tensor",
):
    _DEFINED.define(_schema)  # type: ignore[no-untyped-call]

NOTHING = torch.empty(0, dtype=torch.uint8)  # given where there is no such tensor
# As the functions of `Library` of these names, which say more of what they take.
linear = torch.ops.fewbits.native_linear.default
weight = torch.ops.fewbits.native_weight.default
float_linear = torch.ops.fewbits.native_float_linear.default
attend_few = torch.ops.fewbits.native_attend_few.default
attend = torch.ops.fewbits.native_attend.default


_bf16: list[bool] = []  # of the library that serves, once it does: whether `attend` may be called
_GIVING = threading.Lock()


def available() -> bool:
    """Whether there is a library; else none may be called. In a graph: whether it was used before."""
    if torch.compiler.is_compiling():
        return bool(_bf16)
    found = library()
    if found is not None and not _bf16:
        _give_functions(found)
    return found is not None


def has_bf16() -> bool:
    """Whether `attend` may be called: the processor has products of bfloat16."""
    return available() and _bf16[0]


def arguments(described: Weight) -> tuple[Any, ...]:
    """A weight as `linear` and `weight` take it."""
    tensors = (NOTHING if tensor is None else tensor for tensor in described.tensors)
    shape = (described.out, described.in_, described.bits, described.group, described.zero_type)
    return *tensors, *shape


def _give_functions(found: Library) -> None:
    """To the operators, once in a process."""
    with _GIVING:
        if _bf16:
            return
        functions = _IN_PYTHON if found.serve_torch() else _IN_PYTHON | _WITHOUT_TORCH
        for name, function in functions.items():
            _DEFINED.impl(f"native_{name}", function, "CPU")  # type: ignore[no-untyped-call]
        _bf16.append(found.has_bf16)


def _library() -> Library:
    found = library()
    if found is None:
        raise RuntimeError(f"the native library {why_absent()}")
    return found


def _given(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _described(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    table: Tensor,
    out: int,
    columns: int,
    bits: int,
    group: int,
    zero_type: int,
) -> Weight:
    return describe((out, columns), bits, group, codes, scales, zero_type, _given(zeros), _given(table))


def _linear(x: Tensor, bias: Tensor, *weight_and_inputs: Any) -> Tensor:
    *parts, inputs = weight_and_inputs
    return _library().linear(_described(*parts), x, _given(bias), inputs)


def _weight(*weight_and_dtype: Any) -> Tensor:
    *parts, dtype = weight_and_dtype
    return _library().unpack(_described(*parts), dtype)


def _float_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = _library().float_linear(weight, rows, _given(bias))
    return y.view(*x.shape[:-1], len(weight))


def _attend_few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    keys = key.shape[2]
    seen = mask[..., :keys].expand(*query.shape[:3], keys) if mask.numel() else None
    return _library().attend_few(query, key, value, seen, scaling)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Tensor:
    return _library().attend(query, key, value, scaling, causal)


_IN_PYTHON = {"weight": _weight, "attend": _attend}
_WITHOUT_TORCH = {"linear": _linear, "float_linear": _float_linear, "attend_few": _attend_few}


def _attended(query: Tensor, _key: Tensor, value: Tensor, *_others: Any) -> Tensor:
    batch, heads, queries = query.shape[:3]
    return query.new_empty(batch, queries, heads, value.shape[3])


# Shapes alone.
for _name, _function in {
    "linear": lambda x, *others: x.new_empty(*x.shape[:-1], others[5]),
    "weight": lambda codes, *others: codes.new_empty(others[3], others[4], dtype=others[8]),
    "float_linear": lambda x, weight, _bias: x.new_empty(*x.shape[:-1], len(weight)),
    "attend_few": _attended,
    "attend": _attended,
}.items():
    _DEFINED.impl(f"native_{_name}", _function, "Meta")  # type: ignore[no-untyped-call]
