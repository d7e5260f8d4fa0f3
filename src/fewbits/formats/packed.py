"""The four tensors that both formats of this room share.

    NAME + suffix     int32 (out, ceil(in * bits / 32))   codes, packed along in (see fewbits.packing)
    NAME_scale        float (out, groups)
    NAME_zero_point   int32 (ceil(out * bits / 32), groups)   packed along *out*; asymmetric only
    NAME_shape        int64 (2,)                          out, in

Granularity "tensor" is written as "channel" with the scale repeated: one scale for a whole tensor is
something few clients read. Experts fused on disk have one more axis in front of each.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbits import packing
from fewbits.errors import InputError
from fewbits.scheme import QuantScheme
from fewbits.tensor import QuantizedTensor


def write_packed(name: str, suffix: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one weight, by their names on disk."""
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
    return tensors


def read_packed(
    name: str, suffix: str, tensors: Mapping[str, Tensor], scheme: QuantScheme
) -> QuantizedTensor:
    """The inverse of `write_packed`; granularity "tensor" comes back as "channel".

    Raises:
        InputError: a tensor is missing, or its shape does not belong to the scheme.
    """
    try:
        packed, scale = tensors[name + suffix], tensors[f"{name}_scale"]
        rows, columns = (int(n) for n in tensors[f"{name}_shape"])
        points = None if scheme.symmetric else tensors[f"{name}_zero_point"]
    except KeyError as missing:
        raise InputError(f"{name}: the checkpoint has no tensor {missing}") from None
    if tuple(packed.shape) != (rows, packing.packed_columns(columns, scheme.bits)):
        raise InputError(
            f"{name}: {tuple(packed.shape)} words do not hold {rows} x {columns} codes of "
            f"{scheme.bits} bits"
        )
    if points is None:
        zero_point = torch.full(scale.shape, scheme.middle, dtype=torch.uint8)
    else:
        zero_point = packing.unpack(points.t(), scheme.bits, rows).t().contiguous()
    codes = packing.unpack(packed, scheme.bits, columns)
    return QuantizedTensor(codes, scale, zero_point, on_disk(scheme))


def packed_bytes(rows: int, columns: int, scheme: QuantScheme, itemsize: int) -> int:
    """What `write_packed` writes for one weight whose scale has values of `itemsize` bytes."""
    groups = scheme.groups(columns)
    words = rows * packing.packed_columns(columns, scheme.bits)
    points = 0 if scheme.symmetric else packing.packed_columns(rows, scheme.bits) * groups
    return 4 * (words + points) + rows * groups * itemsize + 2 * 8


def on_disk(scheme: QuantScheme) -> QuantScheme:
    """The scheme as the files show it: "tensor" has become "channel"."""
    if scheme.granularity != "tensor":
        return scheme
    return QuantScheme(scheme.bits, "channel", None, scheme.symmetric)
