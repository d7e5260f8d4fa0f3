"""The kernels that run the native library: inputs as exact as their dtype, or in 8 bits where asked for.

Inputs are taken as integers of 16 bits times a power of two that 128 of them share, and as two of those
in float32; sums of integers are exact, and what is scaled is summed in float32. Products are therefore
the same bits on every processor, for any number of rows and threads. With `NativeInt8`, 128 inputs, or
32 where that is a group, are divided by their absmax / 127 and rounded: half the work.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits import trellis
from fewbits.kernels.reference import Kernel, no_product
from fewbits.native import operators
from fewbits.native.library import (
    COLUMNS,
    INPUTS_8,
    INPUTS_16,
    INPUTS_32,
    MIDDLE,
    OFFSET,
    ROWS,
    TRELLIS,
    ZERO_POINT,
    Library,
    Weight,
    describe,
    library,
    padded,
    why_absent,
)
from fewbits.tensor import QuantizedTensor

_INPUTS = {torch.bfloat16: INPUTS_16, torch.float16: INPUTS_16, torch.float32: INPUTS_32}


class Native(Kernel):
    """`fewbits_linear` on inputs as exact as the dtype."""

    codes: Tensor  # (bytes,) uint8
    scales: Tensor  # (blocks of 32 rows, groups, 32)
    zeros: Tensor | None  # alike: int8 distances from the middle, or float32
    adds_bias = True

    @classmethod
    def refuses(cls, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """Another device or dtype, rounded inputs, odd groups or zero points, or no library."""
        reason = no_product(weight, device, "cpu", trellis=True)
        if reason is not None:
            return reason
        if dtype not in _INPUTS:
            return f"multiplies up to float32, not {dtype}"
        group = weight.scheme.group_size
        if group is not None and group % COLUMNS:
            return f"needs groups of a multiple of {COLUMNS} columns, not {group}"
        most = 2**weight.scheme.bits  # one more than the largest code: GPTQ's files can hold it
        if most < 256 and weight.offset is None and bool((weight.zero_point > most).any()):
            return f"takes zero points up to {most}, not {int(weight.zero_point.max())}"
        found = library()
        if found is None:
            return f"is a library that {why_absent()}"
        return "has no vector code for this processor" if found.isa == "portable" else None

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight, dtype, device)
        self.inputs = _INPUTS[dtype]
        weight = weight.per_row()
        columns = weight.shape[1]
        self.bits = weight.scheme.bits
        self.group = weight.scheme.group_size or padded(columns, COLUMNS)
        self.zero_type, zeros = _zeros(weight)
        self.register_buffer(
            "codes", _library().pack(weight.codes.contiguous(), self.bits, padded(columns, self.group))
        )
        self.register_buffer("scales", _in_blocks(weight.scale))
        self.register_buffer("zeros", None if zeros is None else _in_blocks(zeros))
        self._describe()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias`, each value rounded once, to the dtype of x."""
        if bias is not None and bias.dtype != x.dtype:
            return self.forward(x) + bias
        y: Tensor = operators.linear(x, operators.NOTHING if bias is None else bias, *self._arguments)
        return y

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in), each value rounded once."""
        weight: Tensor = operators.weight(*self._arguments[:-1], dtype)
        return weight

    def rows(self, which: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of it, (n, in), each value rounded once."""
        block, row = which // ROWS, which % ROWS
        scale = self.scales[block, :, row].float()[..., None]
        parts = self._levels_of_rows(which).view(*scale.shape[:2], -1)
        if self.zeros is not None:
            zeros = self.zeros[block, :, row].float()[..., None]
            parts = parts * scale - zeros if self.zero_type == OFFSET else (parts - zeros) * scale
        else:
            parts = parts * scale
        weight: Tensor = parts.flatten(1)[:, : self.shape[1]].to(dtype)
        return weight

    def _levels_of_rows(self, which: Tensor) -> Tensor:
        """What is scaled, zero points aside, (n, columns) in float32."""
        blocks, bits = self.codes.view(len(self.scales), -1), self.bits
        if self.zero_type == TRELLIS:
            before = trellis.before(which, bits)
            codes = [_codes_of_rows(blocks, row // ROWS, row % ROWS, bits) for row in before]
            return trellis.look_up(codes, bits).float()
        levels: Tensor = _codes_of_rows(blocks, which // ROWS, which % ROWS, bits).float()
        return levels.sub_(2 ** (bits - 1))

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in) and zero points (out, groups), uint8, and scales, as they were given.

        Offsets of two levels are not told from zero points.
        """
        out, middle = self.shape[0], 2 ** (self.bits - 1)
        ones = torch.ones_like(self.scales)
        levels = describe(self.shape, self.bits, self.group, self.codes, ones)
        codes = self._library.unpack(levels, torch.float32) + middle
        scale = _out_of_blocks(self.scales, out)
        zero = torch.zeros_like(scale) if self.zeros is None else _out_of_blocks(self.zeros, out)
        point = 0 if self.zero_type == TRELLIS else middle
        return codes.to(torch.uint8), scale, (zero.to(torch.int16) + point).to(torch.uint8)

    def _describe(self) -> None:
        self._library = _library()
        self._weight: Weight = _described(
            self.shape, self.bits, self.group, self.codes, self.scales, self.zero_type, self.zeros
        )
        self._arguments = (*operators.arguments(self._weight), self.inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As every module; the library is then told where the buffers have gone."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.codes.device.type == "cpu":
            self._describe()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As every module; buffers may be others now."""
        super()._load_from_state_dict(*args, **kwargs)
        self._describe()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_weight", "_arguments", "_library")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._describe()


class NativeInt8(Native):
    """`fewbits_linear` on inputs rounded to 8 bits, for weights of fewer bits."""

    @classmethod
    def refuses(cls, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """As `Native`; and weights of 8 bits: rounding inputs would cost more than rounding them did."""
        if weight.scheme.bits == 8:
            return "loses more by 8 bits of inputs than 8 bits of weights lose"
        return super().refuses(weight, dtype, device)

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight, dtype, device)
        self.inputs = INPUTS_8
        self._describe()


def _described(
    shape: tuple[int, int],
    bits: int,
    group: int,
    codes: Tensor,
    scales: Tensor,
    zero_type: int,
    zeros: Tensor | None,
) -> Weight:
    """As `describe`, with the table of a trellis."""
    table = trellis.table(bits) if zero_type == TRELLIS else None
    return describe(shape, bits, group, codes, scales, zero_type, zeros, table)


def _library() -> Library:
    found = library()
    if found is None or not operators.available():
        raise RuntimeError(f"the native library {why_absent()}")
    return found


def _codes_of_rows(codes: Tensor, block: Tensor, row: Tensor, bits: int) -> Tensor:
    """Some rows (n, columns) of codes (blocks, bytes) in the layout that pack.cpp explains.

    Args:
        block, row: (n,), which block of 32 rows, and which of those.
    """
    tile, lane = row // 16, row % 16
    chunks = codes.view(len(codes), -1, 192 if bits == 3 else 128)
    found = chunks[..., :128].view(*chunks.shape[:2], 2, 16, 4)[block, :, tile, lane]  # (n, chunks, 4)
    if bits == 8:
        return found.flatten(1)
    width = 4 if bits == 4 else 2
    quads = [found >> shift & 2**width - 1 for shift in range(0, 8, width)]
    result = torch.stack(quads, 2)  # (n, chunks, quads, 4)
    if bits == 3:
        high = chunks[..., 128:].view(*chunks.shape[:2], 2, 4, 8)[
            block, :, tile
        ]  # (n, chunks, quads, 8)
        which = (lane // 2)[:, None, None, None].expand(*high.shape[:3], 1)
        shift = (lane % 2 * 4)[:, None] + torch.arange(4, device=lane.device)
        result = result | (high.gather(3, which) >> shift[:, None, None].to(torch.uint8) & 1) << 2
    return result.flatten(1)


def _zeros(weight: QuantizedTensor) -> tuple[int, Tensor | None]:
    """What is taken off a code beyond the middle of its grid: nothing, an integer, or a float.

    Nothing is taken off what a trellis says.
    """
    if weight.scheme.trellis:
        return TRELLIS, None
    distance = weight.zero_point.to(torch.int16) - weight.scheme.middle
    if weight.offset is not None:
        return OFFSET, weight.scale.float() * distance + weight.offset.float()
    if weight.scheme.symmetric:
        return MIDDLE, None
    return ZERO_POINT, distance.to(torch.int8)


def _in_blocks(values: Tensor) -> Tensor:
    """(out, groups) -> (blocks, groups, 32), padded with zeros."""
    values = F.pad(values, (0, 0, 0, -values.shape[0] % ROWS))
    return values.reshape(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def _out_of_blocks(values: Tensor, rows: int) -> Tensor:
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:rows].contiguous()
