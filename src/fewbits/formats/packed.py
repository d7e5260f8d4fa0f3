"""The tensors that compressed-tensors and our own format share.

    NAME + suffix     int32 (out, ceil(in * bits / 32))   codes, packed along in (see fewbits.packing)
    NAME_scale        float (out, groups)
    NAME_zero_point   int32 (ceil(out * bits / 32), groups)   packed along *out*; asymmetric only
    NAME_shape        int64 (2,)                          out, in

    NAME_outlier_columns   int32 (n,)       columns that are not on the grid, ascending; if any
    NAME_outliers          float (out, n)   their weights

Granularity "tensor" is written as "channel" with the scale repeated: one scale for a whole tensor is
something few clients read. Experts fused on disk have one more axis in front of each.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbits import packing
from fewbits.errors import InputError
from fewbits.formats.layout import TWO_LEVELS, Headers, Integers, Names, Stored
from fewbits.scheme import QuantScheme
from fewbits.tensor import Outliers, QuantizedTensor
from fewbits.untrusted import shown


def write_packed(name: str, suffix: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one weight, by their names on disk.

    Raises:
        InputError: its columns are in an order of their own, or it has two levels of scales.
    """
    if weight.levels is not None:
        raise InputError(f"{name}: {TWO_LEVELS}")
    if weight.order is not None:
        raise InputError(f"{name}: groups that are not of neighbouring columns have no layout here")
    weight = weight.per_row()
    bits = weight.scheme.bits
    tensors = {
        name + suffix: packing.pack(weight.codes, bits),
        f"{name}_scale": weight.scale,
        f"{name}_shape": torch.tensor(weight.shape),
    }
    if not weight.scheme.symmetric:
        packed = packing.pack(weight.zero_point.t().contiguous(), bits)
        tensors[f"{name}_zero_point"] = packed.t().contiguous()
    if weight.outliers is not None:
        tensors[f"{name}_outlier_columns"] = weight.outliers.columns.to(torch.int32)
        tensors[f"{name}_outliers"] = weight.outliers.weight
    return tensors


def read_packed(
    name: str, suffix: str, tensors: Mapping[str, Tensor], scheme: QuantScheme
) -> QuantizedTensor:
    """The inverse of `write_packed`; granularity "tensor" comes back as "channel".

    Raises:
        InputError: a tensor is missing, or its shape does not belong to the scheme.
    """
    codes = read_codes(name, suffix, tensors, scheme.bits)
    rows, columns = codes.shape
    scale = find(name, "_scale", tensors)
    if scheme.symmetric:
        zero_point = torch.full(scale.shape, scheme.middle, dtype=torch.uint8)
    else:
        points = find(name, "_zero_point", tensors)
        zero_point = packing.unpack(points.t(), scheme.bits, rows).t().contiguous()
    outliers = _read_outliers(name, tensors, columns)
    return QuantizedTensor(codes, scale, zero_point, on_disk(scheme), outliers)


def read_codes(name: str, suffix: str, tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The integers of one weight: (out, in) uint8.

    Raises:
        InputError: as `read_packed`.
    """
    packed, (rows, columns) = find(name, suffix, tensors), rows_columns(name, tensors)
    words = packing.packed_columns(columns, bits)
    if packed.dtype != torch.int32 or tuple(packed.shape) != (rows, words):
        raise InputError(
            f"{name}: {tuple(packed.shape)} words of {packed.dtype} do not hold {rows} x {columns} "
            f"codes of {bits} bits"
        )
    return packing.unpack(packed, bits, columns)


def rows_columns(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(out, in) as stored beside the codes.

    Raises:
        InputError: they are not, or are no sizes.
    """
    shape = find(name, "_shape", tensors)
    if shape.numel() != 2 or shape.is_floating_point() or int(shape.min()) < 1:
        raise InputError(f"{name}_shape is {shown(shape.tolist())}; accepted are two numbers from 1")
    rows, columns = shape.flatten().tolist()
    return rows, columns


def find(name: str, suffix: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """One tensor of a weight.

    Raises:
        InputError: it is not there.
    """
    try:
        return tensors[name + suffix]
    except KeyError:
        raise InputError(f"{name}: the checkpoint has no tensor {name + suffix!r}") from None


def shape_packed(name: str, suffix: str, stored: Stored) -> tuple[int, ...]:
    """Of the weight; of a stack of experts with their axis in front."""
    stack = stored.tensors[name + suffix].shape[:-2]
    return (*stack, *stored.read(f"{name}_shape").reshape(-1, 2)[0].tolist())


def decode_packed(
    name: str, suffix: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
) -> Integers:
    """What `read_packed` gives, unpacked by the compressed-tensors library."""
    scale = tensors[f"{name}_scale"]
    rows, columns = tensors[f"{name}_shape"].tolist()
    if (rows, columns) != shape or scale.shape[0] != rows:
        raise InputError(f"{name}_shape says {(rows, columns)} instead of {shape}")
    codes = unpack_elsewhere(tensors[name + suffix], scheme.bits, shape, 1)
    points = torch.full(scale.shape, scheme.middle, dtype=torch.uint8)
    if not scheme.symmetric:
        points = unpack_elsewhere(tensors[f"{name}_zero_point"], scheme.bits, (rows, scale.shape[1]), 0)
    return Integers(codes, scale, points)


def unpack_elsewhere(packed: Tensor, bits: int, shape: tuple[int, int], axis: int) -> Tensor:
    """Unsigned integers from int32 words packed along `axis`, through the compressed-tensors library."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    signed: Tensor = unpack_from_int32(packed, bits, torch.Size(shape), packed_dim=axis)
    return (signed.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def names_packed(name: str, suffix: str) -> Names:
    """What `write_packed` may write."""
    more = ("_zero_point", "_outlier_columns", "_outliers")
    return Names((name + suffix, f"{name}_scale", f"{name}_shape"), tuple(name + end for end in more))


def _read_outliers(name: str, tensors: Mapping[str, Tensor], columns: int) -> Outliers | None:
    which, weight = tensors.get(f"{name}_outlier_columns"), tensors.get(f"{name}_outliers")
    if which is None and weight is None:
        return None
    if which is None or weight is None:
        raise InputError(f"{name}: of its outliers the checkpoint holds the weights or the columns only")
    which = which.long()
    inside = len(which) > 0 and int(which[0]) >= 0 and int(which[-1]) < columns
    if not inside or not bool((which.diff() > 0).all()):
        raise InputError(f"{name}: its outlier columns are not ascending numbers below {columns}")
    return Outliers(which, weight)


def packed_bytes(rows: int, columns: int, scheme: QuantScheme, itemsize: int) -> int:
    """What `write_packed` writes for one weight whose scale has values of `itemsize` bytes."""
    groups = scheme.groups(columns)
    words = rows * packing.packed_columns(columns, scheme.bits)
    points = 0 if scheme.symmetric else packing.packed_columns(rows, scheme.bits) * groups
    return 4 * (words + points) + rows * groups * itemsize + 2 * 8


def packed_headers(
    name: str, suffix: str, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
) -> Headers:
    """Of what `write_packed` writes for a weight (out, in) with scales in `dtype`."""
    (rows, columns), bits = shape, scheme.bits
    groups = scheme.groups(columns)
    found: Headers = {
        name + suffix: (torch.int32, (rows, packing.packed_columns(columns, bits))),
        f"{name}_scale": (dtype, (rows, groups)),
        f"{name}_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        found[f"{name}_zero_point"] = torch.int32, (packing.packed_columns(rows, bits), groups)
    return found


def on_disk(scheme: QuantScheme) -> QuantScheme:
    """The scheme as the files show it: "tensor" has become "channel"."""
    if scheme.granularity != "tensor":
        return scheme
    return replace(scheme, granularity="channel")
