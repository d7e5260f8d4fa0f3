"""How a product is cut into programs of `code.py`, and how those are started."""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.errors import InputError
from fewbits.kernels.gpu.words import HALF, WORDS, chunk_columns

# As Triton sees it when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_LEAST_ROOM = 48 * 2**10  # bytes of shared memory that every GPU has
_VALUES = 1024  # of a program that adds parts
_HERE = nullcontext()


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


@dataclass(frozen=True, slots=True)
class Strip:
    """What one program works on where there is one row of inputs: all columns of some rows.

    Args:
        rows: of the weight.
        chunks: of columns at a time; a thread has four words of each row.
        warps: of a program.
    """

    rows: int = 4
    chunks: int = 8
    warps: int = 2


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


def choose_strip(out: int, chunks: int, together: int) -> Strip | None:
    """For a product of one row of inputs; None where tensor cores were faster.

    As measured on an H200: that is where every field has a scale of its own, and beyond 2^27 weights of
    4 bits. With zero points it takes 4 % longer than tensor cores, and is one program instead of two.

    Args:
        out: rows of the weight.
        chunks: of columns.
        together: fields that share a scale.
    """
    if together == 1 or out * chunks > 2**19:
        return None
    warps = 1 if chunks <= 4 else 4 if out <= 2048 and chunks >= 16 else 2
    return Strip(4, 4 * warps, warps)


class Call(NamedTuple):
    """All that is to be known of a product but where its tensors are.

    Args:
        rows, columns: of the inputs.
        words: their shape.
        bits, group, point: as a `Triton` has them.
        dtype: of x.
        others: the dtypes of scale, zero, offset and bias; None where there is none.
        device: where they all are.
        tile: what a program works on; chosen if None.
    """

    rows: int
    columns: int
    words: tuple[int, ...]
    bits: int
    group: int
    point: int
    dtype: torch.dtype
    others: tuple[torch.dtype | None, ...]
    device: torch.device
    tile: Tile | None


class Launch:
    """A program and all its arguments but the tensors, which come first.

    Triton looks at every argument of every call, which takes longer than the product of a few rows. What
    it has compiled is right as long as the tensors have the same dtypes, are on the same device and
    begin at multiples of 16 bytes, so that is started as it is from the second time on.

    Args:
        program: a function of `code.py`.
        grid: of programs.
        named: its other arguments.
        device: where the tensors are.
        options: of Triton.
    """

    def __init__(
        self,
        program: Any,
        grid: tuple[int, int, int],
        named: dict[str, Any],
        device: torch.device,
        **options: int,
    ) -> None:
        self.program, self.grid, self.named, self.device = program, grid, named | options, device
        self.rest = tuple(named[each] for each in program.arg_names if each in named)
        self.start: Callable[..., object] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Start it on the current stream."""
        places = [None if tensor is None else self._place(tensor) for tensor in tensors]
        usual = all(place != _ELSEWHERE for place in places)
        if usual and self.start is not None:
            self.start(*places, *self.rest)  # of a tensor Triton asks the driver where it is
            return
        compiled = self.program[self.grid](*tensors, **self.named)
        if usual and compiled is not None and _starts_compiled():  # Triton's interpreter gives None
            self.start = compiled[self.grid]

    def _place(self, tensor: Tensor) -> int:
        place = tensor.data_ptr()
        return place if not place % 16 and tensor.device == self.device else _ELSEWHERE


_ELSEWHERE = -1


@dataclass(frozen=True, slots=True)
class Plan:
    """The programs of a product.

    Args:
        parts: that columns are cut into.
        product: takes x, words, scale, zero, bias, where the result or its parts go; with `tensor_cores`
            offset too.
        adding: takes parts, bias, where the result goes; None where there is one part.
        tensor_cores: whether it is for those.
    """

    parts: int
    product: Launch
    adding: Launch | None = None
    tensor_cores: bool = True


@cache
def plan(call: Call) -> Plan:
    """How a product is run.

    Raises:
        InputError: the words are not those of so many columns.
    """
    out, chunks, columns, bits = call.words[0], call.words[1] // WORDS, call.columns, call.bits
    if chunks != math.ceil(columns / chunk_columns(bits)):
        raise InputError(f"inputs of {columns} columns; accepted is what fills {chunks} chunks")
    # Fields that share their scale wherever in a row their chunk lies.
    together = math.gcd(call.group // WORDS, HALF[bits])
    _, zero, offset, bias = (other is not None for other in call.others)
    named: dict[str, Any] = {
        "out": out, "columns": columns, "GROUP": call.group, "BITS": bits, "HALF": HALF[bits],
        "ZERO": zero, "POINT": call.point, "TOGETHER": together,
    }  # fmt: skip
    full = columns == chunks * chunk_columns(bits)
    # A zero point that is taken off sums is too coarse for float32.
    rough = call.dtype == torch.float32 and zero
    one = call.rows == 1 and call.tile is None and not offset and not rough
    strip = choose_strip(out, chunks, together) if one else None
    if strip is None:
        return _on_tensor_cores(call, chunks, named | {"EVEN": full, "OFFSET": offset}, bias)
    named |= {
        "BIAS": bias, "EVEN": full and chunks % strip.chunks == 0, "LOGIC": _logic(),
        "ROWS": strip.rows, "CHUNKS": strip.chunks,
    }  # fmt: skip
    grid = (math.ceil(out / strip.rows), 1, 1)
    product = Launch(programs().multiply_one, grid, named, call.device, num_warps=strip.warps)
    return Plan(1, product, tensor_cores=False)


def _on_tensor_cores(call: Call, chunks: int, named: dict[str, Any], bias: bool) -> Plan:
    rows, out = call.rows, call.words[0]
    input_bytes = chunk_columns(call.bits) * call.dtype.itemsize
    tile = call.tile or choose_tile(rows, out, chunks, input_bytes, _room(call.device))
    length = math.ceil(chunks / tile.parts)
    parts = math.ceil(chunks / length)
    named |= {
        "rows": rows, "length": length, "BIAS": parts == 1 and bias, "ROWS": tile.rows,
        "INPUTS": tile.inputs, "ASM": _assembly(call.bits, call.dtype, call.point),
    }  # fmt: skip
    grid = (math.ceil(out / tile.rows), math.ceil(rows / tile.inputs), parts)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    product = Launch(programs().multiply, grid, named, call.device, **options)
    if parts == 1:
        return Plan(parts, product)
    values = rows * out
    rest = {"values": values, "out": out, "PARTS": parts, "BIAS": bias, "VALUES": _VALUES}
    grid = (math.ceil(values / _VALUES), 1, 1)
    return Plan(parts, product, Launch(programs().add_parts, grid, rest, call.device))


@cache
def _assembly(bits: int, dtype: torch.dtype, point: int) -> str | None:
    """PTX that makes two 16-bit numbers of the lowest codes of both halves of a word; None: without.

    The bits of a code are put under the exponent of a number from which on 16-bit floats count by ones:
    128 in bfloat16, 1024 in float16. That number and the zero point are then taken off.
    """
    if bits == 8 or dtype == torch.float32 or INTERPRETED or torch.version.hip is not None:
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
    return None if INTERPRETED or torch.version.hip is not None else "lop3.b32 $0, $1, $2, $3, 0xEA;"


@cache
def _room(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return _LEAST_ROOM
    known = torch.cuda.get_device_properties(device)
    return int(getattr(known, "shared_memory_per_block_optin", _LEAST_ROOM))


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton starts programs on the current device, whatever tensors it is given."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@cache
def _starts_compiled() -> bool:
    """Whether what Triton has compiled is started with all arguments, constants too: from 3.3 on."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


def programs() -> Any:
    """Imported when they are first run: Triton takes its time."""
    from fewbits.kernels.gpu import code

    return code
