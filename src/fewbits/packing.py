"""Integers of 2 to 8 bits, packed without gaps into int32 words, the lowest bits first.

    element      0    1    2    3    4    5    6    7    8 ...
    bits       0-3  4-7 8-11  ...                 28-31 | 0-3 of the next word      (4 bits)

Element i occupies the bits i*b to i*b+b-1 of its row; 3-bit elements may lie across two words. This is
the packing of compressed-tensors `weight_packed` and, transposed, of GPTQ's `qweight`.

>>> pack(torch.tensor([[1, 2, 3, 15, 0, 0, 0, 8]], dtype=torch.uint8), 4).item() == 0x8000F321 - 2**32
True
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Eight elements of b bits fill exactly b bytes, so they are assembled in one 64-bit integer. Byte
# views assume a little-endian machine, as do safetensors and every client of these formats.
_UNIT = 8


def packed_columns(columns: int, bits: int) -> int:
    """How many int32 words hold one row."""
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 codes below 2**bits -> (rows, packed_columns) int32."""
    rows, columns = codes.shape
    words = packed_columns(columns, bits)
    units = -(-words * 4 // bits)  # whole units that cover the words
    codes = F.pad(codes, (0, max(0, units * _UNIT - columns))).view(rows, units, _UNIT)
    assembled = torch.zeros(rows, units, dtype=torch.int64, device=codes.device)
    for i in range(_UNIT):
        assembled |= codes[..., i].to(torch.int64) << (bits * i)
    stream = assembled.view(torch.uint8).view(rows, units, 8)[..., :bits].reshape(rows, -1)
    return stream[:, : words * 4].clone(memory_format=torch.contiguous_format).view(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """(rows, packed_columns) int32 -> (rows, columns) uint8 codes; the inverse of `pack`."""
    rows, words = packed.shape
    units = -(-words * 4 // bits)
    stream = F.pad(
        packed.clone(memory_format=torch.contiguous_format).view(torch.uint8),
        (0, units * bits - words * 4),
    )
    assembled = F.pad(stream.view(rows, units, bits), (0, 8 - bits)).view(torch.int64)
    codes = torch.empty(rows, units, _UNIT, dtype=torch.uint8, device=packed.device)
    for i in range(_UNIT):
        codes[..., i] = ((assembled[..., 0] >> (bits * i)) & (2**bits - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns]
