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

# Byte views assume a little-endian machine, as do safetensors and every client of these formats.


def packed_columns(columns: int, bits: int) -> int:
    """How many int32 words hold one row."""
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 codes below 2**bits -> (rows, packed_columns) int32."""
    rows, columns = codes.shape
    words = packed_columns(columns, bits)
    count, size = _unit(bits)
    units = -(-words * 4 // size)  # whole units that cover the words
    codes = F.pad(codes, (0, max(0, units * count - columns))).view(rows, units, count)
    wide = torch.uint8 if size == 1 else torch.int64
    assembled = torch.zeros(rows, units, 1, dtype=wide, device=codes.device)
    for i in range(count):
        assembled[..., 0] |= codes[..., i].to(wide) << (bits * i)
    stream = assembled.view(torch.uint8)[..., :size].reshape(rows, -1)
    return stream[:, : words * 4].clone(memory_format=torch.contiguous_format).view(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """(rows, packed_columns) int32 -> (rows, columns) uint8 codes; the inverse of `pack`."""
    rows, words = packed.shape
    count, size = _unit(bits)
    units = -(-words * 4 // size)
    stream = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if size == 1:
        assembled = stream
    else:
        stream = F.pad(stream, (0, units * size - words * 4)).view(rows, units, size)
        assembled = F.pad(stream, (0, 8 - size)).view(torch.int64)[..., 0]
    codes = torch.empty(rows, units, count, dtype=torch.uint8, device=packed.device)
    for i in range(count):
        codes[..., i] = ((assembled >> (bits * i)) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns]


def _unit(bits: int) -> tuple[int, int]:
    """The smallest run of codes that fills whole bytes: how many codes, how many bytes."""
    return (8 // bits, 1) if 8 % bits == 0 else (8, bits)
