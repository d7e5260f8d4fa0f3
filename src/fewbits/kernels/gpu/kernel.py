"""Triton kernels for GPUs: 2, 3, 4 and 8 bits, products in the dtype of the inputs, sums in float32.

A weight is read once, as words of codes (`words.py`). Codes are multiplied as integers, which every
dtype holds, and scaled afterwards. Where there are many rows of inputs it pays to unpack the matrix, and
multiply it by PyTorch.
"""

import math
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import InputError
from fewbits.kernels.gpu.launch import INTERPRETED, Call, Tile, on, plan, programs
from fewbits.kernels.gpu.words import HALF, WORDS, chunk_columns, pack_words, unpack_words
from fewbits.kernels.reference import Kernel, no_product
from fewbits.tensor import QuantizedTensor

MANY_ROWS = 128  # beyond them the matrix is unpacked first; measured on an H200
_ROWS = 16  # of a program that unpacks; 128 took up to 16 % longer on an H200
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
        whole = weight.shape[1] + -weight.shape[1] % chunk_columns(self.bits)
        self.group = scheme.group_size or whole
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
        """`x @ W.T + bias`, in the dtype of x.

        Raises:
            InputError: x has other columns than the weight.
        """
        if x.shape[-1] != self.shape[1]:  # the program would read past the end
            raise InputError(f"inputs have {x.shape[-1]} columns; accepted are {self.shape[1]}")
        if x.numel() > MANY_ROWS * x.shape[-1]:
            return F.linear(x, self.weight(x.dtype), bias)
        fused = bias if bias is not None and bias.dtype == x.dtype else None
        call: Any = torch.ops.fewbits.triton_linear if torch.compiler.is_compiling() else multiply
        own = self._buffers  # a module looks for its attributes in three places
        parts = (own["words"], own["scale"], own["zero"], own["offset"])
        y: Tensor = call(x.contiguous(), fused, *parts, self.bits, self.group, self.point)
        return y if bias is None or fused is not None else y + bias

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in), each value rounded once."""
        if _truncates(dtype):
            return self.weight(torch.float32).to(dtype)
        out, columns = self.shape
        weight = torch.empty(out, columns, dtype=dtype, device=self.words.device)
        grid = (math.ceil(out / _ROWS), self.words.shape[1] // WORDS)
        with on(weight.device):
            programs().unpack[grid](
                self.words, self.scale, self.zero, self.offset, weight, out, columns,
                GROUP=self.group, BITS=self.bits, HALF=HALF[self.bits], ZERO=self.zero is not None,
                POINT=self.point, OFFSET=self.offset is not None, ROWS=_ROWS,
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
        x: (..., in), contiguous.
        bias: (out,), in the dtype of x.
        words, scale, zero, offset, bits, group, point: as a `Triton` has them.
        tile: what a program works on; chosen by default.

    Returns:
        (..., out), in the dtype of x.

    Raises:
        InputError: x has other columns than the weight.
    """
    shape, out, device = x.shape, words.shape[0], x.device
    columns, whole = shape[-1], (*shape[:-1], out)
    rows = x.numel() // columns if columns else 0
    if not rows:
        return x.new_empty(whole)
    if _truncates(x.dtype):
        exact = None if bias is None else bias.float()
        y = multiply(x.float(), exact, words, scale.float(), zero, offset, bits, group, point, tile)
        return y.to(x.dtype)
    others = tuple([None if part is None else part.dtype for part in (scale, zero, offset, bias)])
    found = plan(Call(rows, columns, words.shape, bits, group, point, x.dtype, others, device, tile))
    with on(device):
        y = x.new_empty(whole)
        if not found.tensor_cores:
            found.product(x, words, scale, zero, bias, y)
        elif found.adding is None:
            found.product(x, words, scale, zero, bias, y, offset)
        else:
            # Parts are added in one order, so that a product is the same each time.
            parts = torch.empty(found.parts, rows, out, dtype=torch.float32, device=device)
            found.product(x, words, scale, zero, bias, parts, offset)
            found.adding(parts, bias, y)
    return y


def _truncates(dtype: torch.dtype) -> bool:
    """Whether Triton's interpreter runs, which knows bfloat16 by its bits only, and cuts them off."""
    return INTERPRETED and dtype == torch.bfloat16


# What `torch.compile` sees of a product: one operation.
_OPS = torch.library.Library("fewbits", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPS.define(  # type: ignore[no-untyped-call]
    "triton_linear(Tensor x, Tensor? bias, Tensor words, Tensor scale, Tensor? zero, Tensor? offset, "
    "int bits, int group, int point) -> Tensor"
)


def _like_multiply(x: Tensor, _bias: Tensor | None, words: Tensor, *_others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


_OPS.impl("triton_linear", multiply, "CUDA")  # type: ignore[no-untyped-call]
_OPS.impl("triton_linear", _like_multiply, "Meta")  # type: ignore[no-untyped-call]
