"""Triton kernels for GPUs: 2, 3, 4 and 8 bits, products in the dtype of the inputs, sums in float32.

A weight is read once, as 32-bit words of codes. A row is cut into chunks
of 32 words; with n fields to a word (4 of 8 bits, 8 of 4, 10 of 3, 16 of 2), field i of word j of a
chunk is its column 32 * i + j. So the 32 columns of one field are neighbours among the inputs, and
belong to one group. 3-bit codes take 3.2 bits so.

Three kernels: for one row of inputs, which only multiplies and adds; for some rows, on tensor cores;
and one that unpacks. Where there are many rows it pays to unpack the matrix and multiply it by PyTorch.
"""

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels.reference import Kernel, no_product
from fewbits.tensor import QuantizedTensor

WORDS = 32  # of a chunk
FIELDS = {2: 16, 3: 10, 4: 8, 8: 4}  # codes in a word, by their bits
MANY_ROWS = 256  # from here on the matrix is unpacked first; measured on an H200
_TWO_23 = 0x4B000000  # its bits in float32
_ROWS = 128  # of a program that unpacks
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of a kernel works on.

    Args:
        rows: of the weight.
        chunks: that are read at a time, by the kernel for one row.
        inputs: rows of them, by the kernel for some.
        parts: that the columns are cut into, each summed by a program of its own.
        warps: of a program.
    """

    rows: int
    chunks: int = 1
    inputs: int = 1
    parts: int = 1
    warps: int = 4


class Triton(Kernel):
    """Products by Triton."""

    words: Tensor  # (out, chunks * 32) int32
    scale: Tensor  # (groups, out)
    zero: Tensor | None  # alike: uint8 zero points, unless all are `point`
    offset: Tensor | None  # alike: float32, of two levels of scales
    adds_bias = True

    @classmethod
    def refuses(cls, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """No GPU or no Triton, another dtype, rounded inputs, or groups of no multiple of 32."""
        reason = no_product(weight, device, "cuda")
        if reason is not None:
            return reason
        if find_spec("triton") is None:  # it comes with PyTorch for GPUs
            return "needs triton, which is not installed"
        if dtype not in _DTYPES:
            return f"multiplies up to float32, not {dtype}"
        group = weight.scheme.group_size
        if group is not None and group % WORDS:
            return f"needs groups of a multiple of {WORDS} columns, not {group}"
        return None

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight, dtype, device)
        weight = weight.per_row()
        scheme, offset = weight.scheme, weight.offset
        self.bits = scheme.bits
        self.group = scheme.group_size or weight.shape[1] + -weight.shape[1] % WORDS
        self.point = scheme.middle if scheme.symmetric else 0
        parts = {
            "scale": weight.scale,
            "zero": None if scheme.symmetric or offset is not None else weight.zero_point,
            "offset": offset,
        }
        self.register_buffer("words", pack_words(weight.codes.to(device), self.bits))
        for name, part in parts.items():
            self.register_buffer(name, None if part is None else part.t().contiguous().to(device))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias`, in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > MANY_ROWS:
            return F.linear(x, self.weight(x.dtype), bias)
        fused = bias if bias is not None and bias.dtype == x.dtype else None
        call = torch.ops.fewbits.triton_linear if torch.compiler.is_compiling() else multiply
        arguments = (self.words, self.scale, self.zero, self.offset, self.bits, self.group, self.point)
        y: Tensor = call(rows.contiguous(), fused, *arguments)
        y = y.view(*x.shape[:-1], self.shape[0])
        return y if bias is None or fused is not None else y + bias

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in), each value rounded once."""
        if _truncates(dtype):
            return self.weight(torch.float32).to(dtype)
        out, columns = self.shape
        weight = torch.empty(out, columns, dtype=dtype, device=self.words.device)
        grid = (math.ceil(out / _ROWS), self.words.shape[1] // WORDS)
        _programs().unpack[grid](
            self.words, self.scale, self.zero, self.offset, weight, out, columns,
            **_constants(self.bits, self.group, self.point, self.zero, self.offset), ROWS=_ROWS,
        )  # fmt: skip
        return weight

    def rows(self, which: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of it, (n, in), each value rounded once."""
        columns = self.shape[1]
        group = torch.arange(columns, device=which.device) // self.group
        codes = unpack_words(self.words[which], self.bits)[:, :columns].float()
        points = self.point if self.zero is None else self.zero[:, which].t()[:, group]
        weight: Tensor = (codes - points) * self.scale[:, which].t()[:, group].float()
        if self.offset is not None:
            weight = weight - self.offset[:, which].t()[:, group]
        return weight.to(dtype)

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in) and zero points (out, groups), uint8, and scales, as they were given.

        Offsets of two levels are not told from zero points.
        """
        codes = unpack_words(self.words, self.bits)[:, : self.shape[1]].to(torch.uint8)
        scale = self.scale.t().contiguous()
        if self.zero is None:
            return codes, scale, torch.full_like(scale, self.point, dtype=torch.uint8)
        return codes, scale, self.zero.t().contiguous()


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes (out, in) in 32-bit words (out, chunks * 32): see the layout above."""
    fields = FIELDS[bits]
    codes = F.pad(codes, (0, -codes.shape[1] % (WORDS * fields)))
    chunks = codes.view(len(codes), -1, fields, WORDS)
    words = torch.zeros(len(codes), chunks.shape[1], WORDS, dtype=torch.int64, device=codes.device)
    for i in range(fields):
        words |= chunks[:, :, i].long() << i * bits
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).flatten(1)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes, int32, (out, chunks * fields * 32)."""
    chunks = words.view(len(words), -1, 1, WORDS)
    places = torch.arange(0, bits * FIELDS[bits], bits, dtype=torch.int32, device=words.device)
    codes: Tensor = chunks >> places[:, None] & (2**bits - 1)
    return codes.flatten(1)


def choose_tile(rows: int, out: int, chunks: int) -> Tile:
    """For a product of so many rows of inputs with a weight of so many rows and chunks of columns."""
    if rows == 1:
        return Tile(rows=16, chunks=min(4, 2 ** int(math.log2(chunks))))
    inputs = max(16, min(64, 2 ** math.ceil(math.log2(rows))))
    programs = math.ceil(out / 64) * math.ceil(rows / inputs)
    parts = max(1, min(chunks // 2, 512 // programs))
    return Tile(rows=64, inputs=inputs, parts=parts)


def multiply(
    x: Tensor,
    bias: Tensor | None,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group: int,
    point: int,
    tile: Tile | None = None,
) -> Tensor:
    """`x @ W.T + bias`.

    Args:
        x: (rows, in), contiguous.
        bias: (out,), in the dtype of x.
        words, scale, zero, offset, bits, group, point: as a `Triton` has them.
        tile: what a program works on; chosen by default.

    Returns:
        (rows, out), in the dtype of x.
    """
    rows, columns = x.shape
    out, chunks = len(words), words.shape[1] // WORDS
    if not rows:
        return x.new_empty(0, out)
    if _truncates(x.dtype):
        own = None if bias is None else bias.float()
        return multiply(x.float(), own, words, scale.float(), zero, offset, bits, group, point, tile).to(
            x.dtype
        )
    tile = tile or choose_tile(rows, out, chunks)
    parts = math.ceil(chunks / math.ceil(chunks / tile.parts)) if rows > 1 else 1
    # Parts are summed in one order, so that a product is the same each time.
    shape, dtype = ((rows, out), x.dtype) if parts == 1 else ((parts, rows, out), torch.float32)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    own = bias if parts == 1 else None
    constants = _constants(bits, group, point, zero, offset) | {"BIAS": own is not None}
    weight = (words, scale, zero, offset, own, y, out, columns)
    if rows == 1:
        _programs().one_row[(math.ceil(out / tile.rows),)](
            x, *weight, _TWO_23, **constants, ROWS=tile.rows, CHUNKS=tile.chunks, num_warps=tile.warps
        )
        return y
    grid = (math.ceil(out / tile.rows), math.ceil(rows / tile.inputs), parts)
    _programs().some_rows[grid](
        x, *weight, rows, math.ceil(chunks / parts), **constants,
        ROWS=tile.rows, INPUTS=tile.inputs, num_warps=tile.warps,
    )  # fmt: skip
    if parts == 1:
        return y
    total = y.sum(0)
    return (total if bias is None else total + bias).to(x.dtype)


def _constants(
    bits: int, group: int, point: int, zero: Tensor | None, offset: Tensor | None
) -> dict[str, Any]:
    fields = FIELDS[bits]
    # Fields that share their scale wherever in a row their chunk lies.
    together = math.gcd(group // WORDS, fields)
    return {
        "GROUP": group, "BITS": bits, "FIELDS": fields, "TOGETHER": together,
        "ZERO": zero is not None, "POINT": point, "OFFSET": offset is not None,
    }  # fmt: skip


def _programs() -> Any:
    """Imported when they are first run: Triton takes its time."""
    from fewbits.kernels.gpu import code

    return code


def _truncates(dtype: torch.dtype) -> bool:
    """Whether Triton's interpreter runs, which knows bfloat16 by its bits only, and cuts them off."""
    return os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.bfloat16


# What `torch.compile` sees of a product: one operation.
_OPS = torch.library.Library("fewbits", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPS.define(  # type: ignore[no-untyped-call]
    "triton_linear(Tensor x, Tensor? bias, Tensor words, Tensor scale, Tensor? zero, Tensor? offset, "
    "int bits, int group, int point) -> Tensor"
)


def _like_multiply(x: Tensor, _bias: Tensor | None, words: Tensor, *_others: Any) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[0])


_OPS.impl("triton_linear", multiply, "CUDA")  # type: ignore[no-untyped-call]
_OPS.impl("triton_linear", _like_multiply, "Meta")  # type: ignore[no-untyped-call]
