"""Triton kernels for GPUs: 2, 3, 4 and 8 bits, products in the dtype of the inputs, sums in float32.

A weight is read once, as 32-bit words of codes. A row is cut into chunks of 32 words; each half of a
word has n fields, from its lowest bits on (2 of 8 bits, 4 of 4, 5 of 3, 8 of 2), and field i of the
lower half of word j of a chunk is its column 32 * i + j, of the upper half its column 32 * (n + i) + j.
So the 32 columns of one field are neighbours among the inputs, and belong to one group. 3-bit codes take
3.2 bits.

Codes are multiplied as integers, which every dtype holds, and scaled afterwards. Where there are many
rows of inputs it pays to unpack the matrix, and multiply it by PyTorch.
"""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import InputError
from fewbits.kernels.reference import Kernel, no_product
from fewbits.tensor import QuantizedTensor

WORDS = 32  # of a chunk
HALF = {2: 8, 3: 5, 4: 4, 8: 2}  # codes in half a word, by their bits
MANY_ROWS = 128  # beyond them the matrix is unpacked first; measured on an H200
_ROWS = 16  # of a program that unpacks; 128 took up to 16 % longer on an H200
_LEAST_ROOM = 48 * 2**10  # bytes of shared memory that every GPU has
_VALUES = 1024  # of a program that adds parts
_HERE = nullcontext()
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program works on.

    Args:
        rows: of the weight.
        inputs: rows of them.
        parts: that the columns are cut into, each summed by a program of its own.
        warps: of a program.
        stages: chunks that are on their way to it at a time.
    """

    rows: int = 64
    inputs: int = 16
    parts: int = 1
    warps: int = 4
    stages: int = 3


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
        parts = (self.words, self.scale, self.zero, self.offset)
        kind = (self.bits, self.group, self.point, self.zero is not None, self.offset is not None)
        grid = (math.ceil(out / _ROWS), self.words.shape[1] // WORDS)
        with _on(weight.device):
            _programs().unpack[grid](*parts, weight, out, columns, **_constants(*kind), ROWS=_ROWS)
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
    half = HALF[bits]
    codes = F.pad(codes, (0, -codes.shape[1] % (2 * half * WORDS)))
    chunks = codes.view(len(codes), -1, 2, half, WORDS)
    words = torch.zeros(len(codes), chunks.shape[1], WORDS, dtype=torch.int64, device=codes.device)
    for upper, i in product(range(2), range(half)):
        words |= chunks[:, :, upper, i].long() << 16 * upper + i * bits
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).flatten(1)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes, int32, (out, chunks * fields * 32)."""
    chunks = words.view(len(words), -1, 1, WORDS)
    places = [16 * upper + i * bits for upper in range(2) for i in range(HALF[bits])]
    shifts = torch.tensor(places, dtype=torch.int32, device=words.device)
    codes: Tensor = chunks >> shifts[:, None] & (2**bits - 1)
    return codes.flatten(1)


def choose_tile(rows: int, out: int, chunks: int, input_bytes: int, room: int) -> Tile:
    """For a product of some rows of inputs with a weight.

    As measured on an H200: enough programs to fill it, and not so many parts that adding them costs.

    Args:
        rows: of inputs.
        out: rows of the weight.
        chunks: of columns.
        input_bytes: of one row of inputs along a chunk.
        room: bytes of shared memory that a program may have, for what is on its way to it.
    """
    inputs = max(8, min(128, 2 ** math.ceil(math.log2(rows))))
    while True:
        own, warps = (64, 4) if inputs <= 32 else (128, 8)
        stages = room // (own * WORDS * 4 + inputs * input_bytes)
        if stages >= 2 or inputs == 8:
            break
        inputs //= 2
    programs = math.ceil(out / own) * math.ceil(rows / inputs)
    parts = max(1, min(chunks // 4, (1024 if warps == 4 else 128) // programs))
    return Tile(own, inputs, parts, warps, max(1, min(3, stages)))


def choose_strip(out: int, chunks: int, together: int) -> tuple[int, int, int] | None:
    """For one row of inputs: rows of the weight for a program, chunks of columns at a time, and warps.

    As measured on an H200: a thread has four words of each row, and two warps are best where there are
    rows enough. None where each field has a scale of its own: tensor cores were faster.

    Args:
        out: rows of the weight.
        chunks: of columns.
        together: fields that share a scale.
    """
    if together == 1:
        return None
    warps = 1 if chunks <= 4 else 4 if out <= 2048 and chunks >= 16 else 2
    return 4, 4 * warps, warps


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
    """
    shape, out = x.shape, words.shape[0]
    columns, result = shape[-1], (*shape[:-1], out)
    rows = x.numel() // columns
    if not rows:
        return x.new_empty(result)
    if _truncates(x.dtype):
        own = None if bias is None else bias.float()
        return multiply(x.float(), own, words, scale.float(), zero, offset, bits, group, point, tile).to(
            x.dtype
        )
    weight = (words.shape, bits, group, point, zero is not None, offset is not None, bias is not None)
    parts, product, adding = _launches(rows, columns, weight, (x.dtype, scale.dtype), x.device, tile)
    with _on(x.device):
        y = x.new_empty(result)
        if adding is None:
            product(x, words, scale, zero, offset, bias, y)
        else:
            # Parts are added in one order, so that a product is the same each time.
            some = torch.empty(parts, rows, out, dtype=torch.float32, device=x.device)
            product(x, words, scale, zero, offset, bias, some)
            adding(some, bias, y)
    return y


class _Launch:
    """A program of `code.py` and all its arguments but the tensors, which come first.

    Triton looks at every argument of every call, which takes longer than the product of a few rows. What
    it has compiled is right as long as tensors have the same dtypes and begin at multiples of 16 bytes,
    so that is started as it is from the second time on.

    Args:
        name: of the program.
        grid: of programs.
        named: the other arguments.
        options: of Triton.
    """

    def __init__(
        self, name: str, grid: tuple[int, int, int], named: dict[str, Any], **options: int
    ) -> None:
        self.program, self.grid, self.named = getattr(_programs(), name), grid, named | options
        self.rest = tuple(named[name] for name in self.program.arg_names if name in named)
        self.start: Callable[..., object] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Start it on the current stream."""
        places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned = not any(place % 16 for place in places if place)
        if aligned and self.start is not None:
            self.start(*places, *self.rest)  # of a tensor Triton asks the driver where it is
            return
        compiled = self.program[self.grid](*tensors, **self.named)
        if aligned and compiled is not None and _starts_compiled():  # Triton's interpreter gives None
            self.start = compiled[self.grid]


@cache
def _launches(
    rows: int,
    columns: int,
    weight: tuple[tuple[int, int], int, int, int, bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    tile: Tile | None,
) -> tuple[int, _Launch, _Launch | None]:
    """The parts that columns are cut into, the program that multiplies, and the one that adds parts.

    Args:
        rows, columns: of the inputs.
        weight: the shape of its words, bits, group, point, and whether there are zero points, offsets
            and a bias.
        dtypes: of inputs and scales.
        device: where it all is.
        tile: what a program works on; chosen if None.
    """
    (out, words), bits, group, point, zero, offset, bias = weight
    chunks = words // WORDS
    # Fields that share their scale wherever in a row their chunk lies.
    together = math.gcd(group // WORDS, HALF[bits])
    named: dict[str, Any] = {
        "out": out, "columns": columns, **_constants(bits, group, point, zero, offset),
        "TOGETHER": together,
    }  # fmt: skip
    full = columns == chunks * 2 * HALF[bits] * WORDS
    strip = choose_strip(out, chunks, together) if rows == 1 and tile is None else None
    if strip is not None:
        own, some, warps = strip
        named |= {"BIAS": bias, "EVEN": full and chunks % some == 0, "LOGIC": _logic(), "ROWS": own}
        grid = (math.ceil(out / own), 1, 1)
        return 1, _Launch("multiply_one", grid, named | {"CHUNKS": some}, num_warps=warps), None
    input_bytes = 2 * HALF[bits] * WORDS * dtypes[0].itemsize
    tile = tile or choose_tile(rows, out, chunks, input_bytes, _room(device))
    length = math.ceil(chunks / tile.parts)
    parts = math.ceil(chunks / length)
    named |= {
        "rows": rows, "length": length, "BIAS": parts == 1 and bias, "EVEN": full,
        "ASM": _assembly(bits, dtypes[0], point), "ROWS": tile.rows, "INPUTS": tile.inputs,
    }  # fmt: skip
    grid = (math.ceil(out / tile.rows), math.ceil(rows / tile.inputs), parts)
    product = _Launch("multiply", grid, named, num_warps=tile.warps, num_stages=tile.stages)
    if parts == 1:
        return parts, product, None
    named = {"values": rows * out, "out": out, "PARTS": parts, "BIAS": bias, "VALUES": _VALUES}
    return parts, product, _Launch("add_parts", (math.ceil(rows * out / _VALUES), 1, 1), named)


def _constants(bits: int, group: int, point: int, zero: bool, offset: bool) -> dict[str, Any]:
    return {
        "GROUP": group, "BITS": bits, "HALF": HALF[bits], "ZERO": zero, "POINT": point, "OFFSET": offset,
    }  # fmt: skip


@cache
def _assembly(bits: int, dtype: torch.dtype, point: int) -> str | None:
    """PTX that makes two 16-bit numbers of the lowest codes of both halves of a word; None: without.

    The bits of a code are put under the exponent of a number from which on 16-bit floats count by ones:
    128 in bfloat16, 1024 in float16. That number and the zero point are then taken off.
    """
    if bits == 8 or dtype == torch.float32 or _interpreted() or torch.version.hip is not None:
        return None
    beyond, exponent, one = (128, 0x4300, 0x3F80) if dtype == torch.bfloat16 else (1024, 0x6400, 0x3C00)
    less = torch.tensor(-float(beyond + point), dtype=dtype)
    twice = [
        f"0x{2 * f'{n & 0xFFFF:04X}'}" for n in (2**bits - 1, exponent, one, int(less.view(torch.int16)))
    ]
    mask, magic, times, minus = twice
    name = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    return (
        f"{{ .reg .b32 t, o, m; mov.b32 o, {times}; mov.b32 m, {minus}; "
        f"lop3.b32 t, $2, {mask}, {magic}, 0xEA; fma.rn.{name} t, t, o, m; mov.b32 {{$0, $1}}, t; }}"
    )


def _logic() -> str | None:
    """PTX that puts the bits of a code under an exponent, with one instruction; None: without."""
    if _interpreted() or torch.version.hip is not None:
        return None
    return "lop3.b32 $0, $1, $2, $3, 0xEA;"


@cache
def _room(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return _LEAST_ROOM
    known = torch.cuda.get_device_properties(device)
    return int(getattr(known, "shared_memory_per_block_optin", _LEAST_ROOM))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton starts programs on the current device, whatever tensors it is given."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@cache
def _starts_compiled() -> bool:
    """Whether what Triton has compiled is started with all arguments, constants too: from 3.3 on."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


def _programs() -> Any:
    """Imported when they are first run: Triton takes its time."""
    from fewbits.kernels.gpu import code

    return code


@cache
def _interpreted() -> bool:
    """As Triton sees it when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _truncates(dtype: torch.dtype) -> bool:
    """Whether Triton's interpreter runs, which knows bfloat16 by its bits only, and cuts them off."""
    return dtype == torch.bfloat16 and _interpreted()


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
