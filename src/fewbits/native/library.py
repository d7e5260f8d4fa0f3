"""The library of native kernels, opened by ctypes: where it is, and if there is none, why.

It lies beside this file; in an editable install, in the folder of the same name in site-packages. It is
missing where fewbits was installed without a C++ compiler. `FEWBITS_NATIVE=0` turns it off.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fewbits.errors import InputError

INTERFACE = 16  # FEWBITS_INTERFACE of the fewbits.h that this file mirrors
ISAS = ("portable", "neon", "avx2", "avx512", "amx")
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
MIDDLE, ZERO_POINT, OFFSET, TABLE, TRELLIS = range(5)
INPUTS_16, INPUTS_8, INPUTS_32 = range(3)
_ZEROS = {ZERO_POINT: torch.int8, OFFSET: torch.float32}
_TABLES = {TABLE: (torch.float32, 16), TRELLIS: (torch.int8, 256)}
ROWS, COLUMNS = 32, 32  # of a block; what a group is a multiple of
_SWITCH = "FEWBITS_NATIVE"
# Functions of PyTorch's C interface, in the order of `fewbits_torch`.
_OF_TORCH = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_empty_strided",
    "aoti_torch_copy_",
    "aoti_torch_delete_tensor_object",
    "torch_get_num_threads",
    "aoti_torch_library_init_impl",
    "torch_library_impl",
)
_FILE = "_fewbits.dll" if sys.platform == "win32" else "_fewbits.so"


_WORK = ctypes.CFUNCTYPE(None, c_void_p)
T = TypeVar("T")


class Weight(ctypes.Structure):
    """`fewbits_weight`. `tensors` are those that it points into, `address` is its own."""

    _fields_: ClassVar[Any] = [
        ("out", c_int64),
        ("in_", c_int64),
        ("columns", c_int64),
        ("bits", c_int32),
        ("group", c_int32),
        ("scale_type", c_int32),
        ("zero_type", c_int32),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("table", c_void_p),
    ]
    out: int
    in_: int
    columns: int
    bits: int
    group: int
    zero_type: int
    tensors: tuple[Tensor | None, ...]
    address: int


class Grids(ctypes.Structure):
    """`fewbits_grids`."""

    _fields_: ClassVar[Any] = [
        *((name, c_int64) for name in ("rows", "columns", "stride", "groups", "tried")),
        *((name, c_void_p) for name in ("weights", "costs", "steps", "points")),
        ("range", c_float),
        ("errors", c_void_p),
    ]


class Columns(ctypes.Structure):
    """`fewbits_columns`."""

    _fields_: ClassVar[Any] = [
        ("columns", c_int64),
        ("rows", c_int64),
        ("weights", c_void_p),
        ("errors", c_void_p),
        ("shares", c_void_p),
        ("steps", c_void_p),
        ("inverse", c_void_p),
        ("low", c_void_p),
        ("groups", c_void_p),
        ("costs", c_void_p),
        ("losses", c_void_p),
        ("range", c_float),
        ("upper", c_int32),
    ]


class Attention(ctypes.Structure):
    """`fewbits_attention`."""

    _fields_: ClassVar[Any] = [
        ("batch", c_int64),
        ("heads", c_int64),
        ("groups", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("width", c_int64),
        ("value_width", c_int64),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_strides", c_int64 * 3),
        ("k_strides", c_int64 * 3),
        ("v_strides", c_int64 * 3),
        ("result", c_void_p),
        ("scaling", c_float),
        ("causal", c_int32),
    ]


class Few(ctypes.Structure):
    """`fewbits_few`."""

    _fields_: ClassVar[Any] = [
        ("batch", c_int64),
        ("heads", c_int64),
        ("groups", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("width", c_int64),
        ("value_width", c_int64),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("mask", c_void_p),
        ("q_strides", c_int64 * 3),
        ("k_strides", c_int64 * 3),
        ("v_strides", c_int64 * 3),
        ("mask_strides", c_int64 * 3),
        ("result", c_void_p),
        ("scaling", c_float),
        ("type", c_int32),
    ]


def padded(size: int, unit: int) -> int:
    """The next multiple of a unit."""
    return size + -size % unit


def describe(
    shape: tuple[int, int],
    bits: int,
    group: int,
    codes: Tensor,
    scales: Tensor,
    zero_type: int = MIDDLE,
    zeros: Tensor | None = None,
    table: Tensor | None = None,
) -> Weight:
    """A weight as the library reads it.

    Args:
        shape: (out, in).
        bits: of a code: 2, 3, 4 or 8.
        group: columns that share a scale, a multiple of 32. Columns are padded to whole groups.
        codes: what `Library.pack` gave for as many columns.
        scales: (blocks of 32 rows, groups, 32), in bfloat16, float16 or float32.
        zero_type: what is taken off a code: MIDDLE, ... TRELLIS of fewbits.h.
        zeros: as `scales`, in int8 for ZERO_POINT, in float32 for OFFSET, else None.
        table: (16,) float32 for TABLE, (256,) int8 for TRELLIS, else None.

    Raises:
        ValueError: a tensor has another dtype, size or device, or is not contiguous.
    """
    out, inputs = shape
    columns, blocks = padded(inputs, group), padded(out, ROWS) // ROWS
    count = blocks * (columns // group) * ROWS
    if scales.dtype not in TYPES:
        raise ValueError(f"scales are {scales.dtype}; bfloat16, float16 or float32 would be read")
    _check("codes", codes, torch.uint8, blocks * columns * ROWS * bits // 8)
    _check("scales", scales, scales.dtype, count)
    _check("zeros", zeros, _ZEROS.get(zero_type), count)
    _check("table", table, *_TABLES.get(zero_type, (None, 0)))
    tensors = (codes, scales, zeros, table)
    places = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    weight = Weight(out, inputs, columns, bits, group, TYPES[scales.dtype], zero_type, *places)
    weight.tensors, weight.address = tensors, ctypes.addressof(weight)
    return weight


class Library:
    """The functions of fewbits.h, for tensors on the CPU.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it was built from other sources than these.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(path))
        self._parallel = torch_parallel()
        try:
            built = self._c.fewbits_interface()
        except AttributeError:
            built = None
        if built != INTERFACE:
            raise ValueError(f"{path} has interface {built}, not {INTERFACE}: install fewbits again")
        for name, result, arguments in (
            ("isa", c_int, ()),
            ("use", c_int, (c_int,)),
            ("packed_bytes", c_int64, (c_int64, c_int64, c_int)),
            ("pack", c_int, (c_void_p, c_int64, c_int64, c_int64, c_int, c_void_p)),
            ("unpack", c_int, (POINTER(Weight), c_int, c_void_p)),
            (
                "linear",
                c_int,
                (
                    *(c_void_p, c_void_p, c_int64, c_int64, c_int),
                    *(c_void_p, c_void_p, c_int, c_int, c_void_p),
                ),
            ),
            (
                "find_chains",
                c_int,
                (*(c_void_p,) * 3, c_int64, c_int, c_void_p, c_int, c_void_p),
            ),
            ("round_columns", c_int, (POINTER(Columns), c_int, c_void_p)),
            ("grid_errors", c_int, (POINTER(Grids), c_int, c_void_p)),
            ("has_bf16", c_int, ()),
            (
                "gram",
                c_int,
                (c_void_p, c_int64, c_int64, c_int64, POINTER(c_void_p), c_int64, c_int, c_void_p),
            ),
            ("attend", c_int, (POINTER(Attention), c_int, c_void_p)),
            (
                "float_linear",
                c_int,
                (
                    *(c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int),
                    *(c_void_p, c_void_p, c_int, c_void_p),
                ),
            ),
            ("attend_few", c_int, (POINTER(Few), c_int, c_void_p)),
            ("operators", c_int, (POINTER(c_void_p), c_void_p)),
            ("together", c_int, (_WORK, c_void_p, c_int, c_void_p)),
            ("stream", c_uint64, (c_void_p, c_int64, c_int, c_void_p)),
        ):
            function = getattr(self._c, f"fewbits_{name}")
            function.restype, function.argtypes = result, arguments

    @property
    def isa(self) -> str:
        """The instruction set that is used: the best that this machine runs, or the one asked for."""
        return ISAS[self._c.fewbits_isa()]

    def use(self, isa: str | None) -> bool:
        """Use another instruction set, in all threads; None for the best. False where it cannot run."""
        return int(self._c.fewbits_use(-1 if isa is None else ISAS.index(isa))) == 0

    @property
    def threads(self) -> str:
        """Whose threads work: "torch's" or "its own"."""
        return "its own" if self._parallel is None else "torch's"

    def serve_torch(self) -> bool:
        """Let PyTorch call the operators of operators.cpp, which must be defined; once in a process.

        Returns:
            Whether it does: PyTorch before 2.10 cannot.
        """
        path = next((path for path in _torch_libraries() if path.is_file()), None)
        try:
            torch_library = ctypes.CDLL(str(path))
            functions = [ctypes.cast(getattr(torch_library, name), c_void_p) for name in _OF_TORCH]
        except (OSError, AttributeError):
            return False
        places = (c_void_p * len(functions))(*functions)
        return int(self._c.fewbits_operators(places, self._parallel)) == 0

    def pack(self, codes: Tensor, bits: int, columns: int) -> Tensor:
        """Codes (out, in), uint8, in the layout that is streamed, padded to `columns`: (bytes,)."""
        out, inputs = codes.shape
        _check("codes", codes, torch.uint8, out * inputs)
        packed = torch.empty(self._c.fewbits_packed_bytes(out, columns, bits), dtype=torch.uint8)
        error = self._c.fewbits_pack(codes.data_ptr(), out, inputs, columns, bits, packed.data_ptr())
        _raise(error, f"packing {out} x {inputs} codes of {bits} bits in {columns} columns")
        return packed

    def unpack(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, (out, in), each rounded once to `dtype`."""
        result = torch.empty(weight.out, weight.in_, dtype=dtype)
        error = self._c.fewbits_unpack(ctypes.byref(weight), TYPES[dtype], result.data_ptr())
        _raise(error, f"unpacking {weight.out} x {weight.in_} codes of {weight.bits} bits")
        return result

    def linear(
        self,
        weight: Weight,
        x: Tensor,
        bias: Tensor | None = None,
        inputs: int = INPUTS_16,
        threads: int | None = None,
    ) -> Tensor:
        """`x @ W.T + bias`, (..., in) -> (..., out) in the dtype of x, rounded once.

        Where a large matrix has just been read, all that Python does is slow: its code and data have
        gone from the cache. So little is done here.

        Args:
            weight: see `describe`.
            x: the rows of a matrix may lie apart, their values may not.
            bias: (out,) in the dtype of x.
            inputs: INPUTS_16, INPUTS_8 or INPUTS_32 of fewbits.h: how exactly x is taken.
            threads: as many as torch uses, if None.
        """
        x, rows, stride = self._rows(x, weight)
        if bias is not None:
            _check("bias", bias, x.dtype, weight.out)
        y = torch.empty((*x.shape[:-1], weight.out), dtype=x.dtype)
        error = self._c.fewbits_linear(
            weight.address,
            x.data_ptr(),
            rows,
            stride,
            TYPES[x.dtype],
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            inputs,
            torch.get_num_threads() if threads is None else threads,
            self._parallel,
        )
        if error:
            _raise(error, f"{rows} rows of {x.dtype} times {weight.out} x {weight.in_} weights")
        return y

    @staticmethod
    def _rows(x: Tensor, weight: Weight) -> tuple[Tensor, int, int]:
        """x as the library reads it, how many rows it has, and how far they are apart."""
        shape = x.shape
        if shape[-1] != weight.in_ or x.dtype not in TYPES or not x.is_cpu:
            raise ValueError(f"x is {shape[-1]} columns of {x.dtype} on {x.device}; W has {weight.in_}")
        if not x.is_contiguous():
            if len(shape) == 2 and x.stride(1) == 1:
                return x, shape[0], x.stride(0)
            x = x.contiguous()
        return x, shape[:-1].numel(), shape[-1]

    def find_chains(self, x: Tensor, scale: Tensor, bits: int, table: Tensor) -> Tensor:
        """Codes (chains, 32) of a trellis, uint8: see `fewbits.trellis`.

        Args:
            x, scale: (chains, 32) float32.
            table: (256,) of any dtype.
        """
        for name, tensor in (("x", x), ("scale", scale)):
            _check(name, tensor, torch.float32, x.numel())
        entries = table.float().contiguous()
        _check("table", entries, torch.float32, 256)
        codes = torch.empty(x.shape, dtype=torch.uint8)
        error = self._c.fewbits_find_chains(
            x.data_ptr(),
            scale.data_ptr(),
            entries.data_ptr(),
            len(x),
            bits,
            codes.data_ptr(),
            torch.get_num_threads(),
            self._parallel,
        )
        _raise(error, f"{len(x)} chains of {bits} bits")
        return codes

    def round_columns(
        self,
        weights: Tensor,
        errors: Tensor,
        shares: Tensor,
        grid: tuple[Tensor, Tensor, Tensor],
        most: int,
        groups: Tensor,
        upper: bool = False,
        costs: Tensor | None = None,
        threads: int | None = None,
    ) -> Tensor | None:
        """Round columns one after the other, each to the place nearest to where the others leave it.

        Args:
            weights: (columns, rows) float32, not rounded.
            errors: (columns, rows), what rounding has left of the weights; replaced.
            shares: of the error of the first column, what the second takes up: in squares of 64 x 64,
                filled up, (n, n, 64, 64).
            grid: steps, their inverse and the least integers: (groups, rows) each.
            most: how far the largest integer is from the least.
            groups: (columns,) int64, of each column its row in the grid.
            upper: columns take up the errors of those before them alone, not of all others.
            costs: (columns,), of the squared distance of a column from that place.
            threads: as many as torch uses, if None. The bits do not depend on them.

        Returns:
            (rows,), the sum of these costs; None without them.
        """
        columns, rows = weights.shape
        for name, tensor in (("weights", weights), ("errors", errors)):
            _check(name, tensor, torch.float32, columns * rows)
        for tensor in grid:
            _check("the grid", tensor, torch.float32, len(grid[0]) * rows)
        _check("shares", shares, torch.float32, padded(columns, 64) ** 2)
        _check("groups", groups, torch.int64, columns)
        if columns and not 0 <= int(groups.min()) <= int(groups.max()) < len(grid[0]):
            raise ValueError(f"a group is none of {len(grid[0])}")
        _check("costs", costs, None if costs is None else torch.float32, columns)
        losses = None if costs is None else torch.empty(rows)
        tensors = (weights, errors, shares, *grid, groups, costs, losses)
        places = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        given = Columns(columns, rows, *places, most, upper)
        threads = torch.get_num_threads() if threads is None else threads
        error = self._c.fewbits_round_columns(ctypes.byref(given), threads, self._parallel)
        _raise(error, f"{columns} columns of {rows} rows, {most + 1} integers each")
        return losses

    def grid_errors(
        self,
        weight: Tensor,
        steps: Tensor,
        points: Tensor,
        most: int,
        costs: Tensor,
        threads: int | None = None,
    ) -> Tensor:
        """What rounding a weight to several grids costs: (grids, rows, groups).

        Args:
            weight: (rows, columns) float32; its rows may lie apart.
            steps: (grids, rows, groups) float32; groups are equally many columns.
            points: the zero points, (rows, groups) float32.
            most: the largest code.
            costs: (columns,) float32, of a squared error.
            threads: as many as torch uses, if None. The bits do not depend on them.
        """
        tried, rows, groups = steps.shape
        columns = weight.shape[1]
        if weight.dtype != torch.float32 or weight.device.type != "cpu" or len(weight) != rows:
            raise ValueError(f"{tuple(weight.shape)} {weight.dtype} is no float32 of {rows} rows")
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        _check("steps", steps, torch.float32, tried * rows * groups)
        _check("points", points, torch.float32, rows * groups)
        _check("costs", costs, torch.float32, columns)
        errors = torch.empty_like(steps)
        places = (tensor.data_ptr() for tensor in (weight, costs, steps, points))
        stride = weight.stride(0)
        given = Grids(rows, columns, stride, groups, tried, *places, most, errors.data_ptr())
        threads = torch.get_num_threads() if threads is None else threads
        error = self._c.fewbits_grid_errors(ctypes.byref(given), threads, self._parallel)
        _raise(error, f"{rows} x {columns} weights in {groups} groups, {most + 1} codes")
        return errors

    @property
    def has_bf16(self) -> bool:
        """Whether `gram` and `attend` can be called: the processor has products of bfloat16."""
        return bool(self._c.fewbits_has_bf16())

    def gram(self, x: Tensor, panels: list[Tensor], threads: int | None = None) -> None:
        """Add `x.T @ x` to its lower panels.

        Args:
            x: (rows, columns) bfloat16; its rows may lie apart.
            panels: float32; each has so many columns, a multiple of 64 but for the last, of the rows
                from its first column on.
            threads: as many as torch uses, if None. The bits do not depend on them.
        """
        rows, columns = x.shape
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            raise ValueError(f"x is {x.dtype} on {x.device}; torch.bfloat16 on the CPU would be read")
        if x.stride(1) != 1 and columns > 1:
            x = x.contiguous()
        width = panels[0].shape[1]
        for i, panel in enumerate(panels):
            left = columns - i * width
            _check(f"panel {i}", panel, torch.float32, left * min(width, left))
        if len(panels) != -(-columns // width):
            raise ValueError(f"{len(panels)} panels of {width} are not those of {columns} columns")
        unit = width if len(panels) > 1 else padded(width, 64)
        places = (c_void_p * len(panels))(*(panel.data_ptr() for panel in panels))
        threads = torch.get_num_threads() if threads is None else threads
        error = self._c.fewbits_gram(
            x.data_ptr(), rows, columns, x.stride(0), places, unit, threads, self._parallel
        )
        _raise(error, f"{rows} x {columns} inputs of {x.dtype}, panels of {width}")

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        causal: bool,
        threads: int | None = None,
    ) -> Tensor:
        """softmax(scaling * Q K.T) V: (batch, queries, heads, width of values), bfloat16.

        Args:
            query: (batch, heads, queries, width) bfloat16.
            key, value: (batch, groups, keys, width): each is shared by heads / groups neighbours.
            scaling: of scores.
            causal: a query sees keys up to its own number; there are as many queries as keys.
            threads: as many as torch uses, if None. The bits do not depend on them.
        """
        parts = [t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)]
        for t in parts:
            if t.dtype != torch.bfloat16 or t.device.type != "cpu" or t.ndim != 4:
                raise ValueError(f"{tuple(t.shape)} {t.dtype} on {t.device} is no bfloat16 on the CPU")
        batch, heads, queries, width = query.shape
        _, groups, keys, value_width = value.shape
        if key.shape != (batch, groups, keys, width) or len(value) != batch:
            shapes = [tuple(t.shape) for t in parts]
            raise ValueError(f"queries, keys and values do not fit: {shapes}")
        result = torch.empty(batch, queries, heads, value_width, dtype=torch.bfloat16)
        strides = ((c_int64 * 3)(*t.stride()[:3]) for t in parts)
        given = Attention(
            batch, heads, groups, queries, keys, width, value_width, *(t.data_ptr() for t in parts),
            *strides, result.data_ptr(), scaling, causal,
        )  # fmt: skip
        threads = torch.get_num_threads() if threads is None else threads
        error = self._c.fewbits_attend(ctypes.byref(given), threads, self._parallel)
        _raise(error, f"{queries} queries of {heads} heads to {keys} keys of {groups}")
        return result

    def float_linear(
        self, weight: Tensor, x: Tensor, bias: Tensor | None = None, threads: int | None = None
    ) -> Tensor:
        """`x @ W.T + bias`, (rows, in) -> (rows, out), summed in float32 and rounded once; for few rows.

        Args:
            weight: (out, in), in bfloat16.
            x, bias, threads: see `linear`; in bfloat16.
        """
        rows, columns = x.shape
        out = weight.shape[0]
        _check("weight", weight, torch.bfloat16, out * columns)
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            raise ValueError(f"x is {x.dtype} on {x.device}; bfloat16 on the CPU would be read")
        if bias is not None:
            _check("bias", bias, x.dtype, out)
        if x.stride(1) != 1 and columns > 1:
            x = x.contiguous()
        y = torch.empty(rows, out, dtype=x.dtype)
        error = self._c.fewbits_float_linear(
            weight.data_ptr(),
            out,
            columns,
            x.data_ptr(),
            rows,
            x.stride(0),
            TYPES[x.dtype],
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads() if threads is None else threads,
            self._parallel,
        )
        _raise(error, f"{rows} rows of {x.dtype} times {out} x {columns} floats")
        return y

    def attend_few(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        threads: int | None = None,
    ) -> Tensor:
        """softmax(scaling * Q K.T) V in float32, rounded once; for few queries.

        Args:
            query: (batch, heads, queries, width), in bfloat16 or float32.
            key, value: (batch, groups, keys, width), in the same dtype; each is shared by heads / groups
                neighbours. Their last dimension lies together.
            mask: (batch, heads, queries, keys), bool, True where a query sees a key; or None.
            scaling: of scores.
            threads: as many as torch uses, if None.

        Returns:
            (batch, queries, heads, width of values). A query that sees no key gets zeros.
        """
        batch, heads, queries, width = query.shape
        groups, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
        result = torch.empty(batch, queries, heads, value_width, dtype=query.dtype)
        parts = (query, key, value)
        strides = [(c_int64 * 3)(*t.stride()[:3]) for t in parts]
        seen = (None, (0, 0, 0)) if mask is None else (mask.data_ptr(), mask.stride()[:3])
        described = Few(
            batch, heads, groups, queries, keys, width, value_width, *(t.data_ptr() for t in parts),
            seen[0], *strides, (c_int64 * 3)(*seen[1]), result.data_ptr(), scaling, TYPES[query.dtype],
        )  # fmt: skip
        threads = torch.get_num_threads() if threads is None else threads
        error = self._c.fewbits_attend_few(ctypes.byref(described), threads, self._parallel)
        _raise(error, f"attention of {queries} queries of {query.dtype} to {keys} keys")
        return result

    def together(self, function: Callable[[], T]) -> T:
        """Call it, with torch's other threads awake for what it asks of this library in this thread.

        They read the beginning of what the next product reads, if all is as in the call before.
        PyTorch's own operations run in one thread there.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def work(_: int | None) -> None:
            try:
                results.append(function())
            except BaseException as error:  # it comes out below
                errors.append(error)

        self._c.fewbits_together(_WORK(work), None, torch.get_num_threads(), self._parallel)
        if errors:
            raise errors.pop()  # whose traceback would else hold itself
        if not results:
            raise KeyboardInterrupt  # before `work` had begun
        return results[0]

    def stream(self, data: Tensor, threads: int | None = None) -> int:
        """Read a tensor once, and return the xor of its words: as fast as memory can be read."""
        _check("data", data, data.dtype, data.numel())
        threads = torch.get_num_threads() if threads is None else threads
        return int(self._c.fewbits_stream(data.data_ptr(), data.nbytes, threads, self._parallel))


def library() -> Library | None:
    """The library, opened once; None where there is none, or where FEWBITS_NATIVE is 0.

    Raises:
        InputError: FEWBITS_NATIVE is neither 0 nor 1.
    """
    found = _switched_off() or _open()
    return found if isinstance(found, Library) else None


def why_absent() -> str | None:
    """Why `library` gives None; None if it does not."""
    found = _switched_off() or _open()
    return None if isinstance(found, Library) else found


def summary() -> str:
    """What the library runs on this machine, or why there is none; in a few words.

    Raises:
        InputError: see `library`.
    """
    found = library()
    if found is None:
        return f"none: it {why_absent()}"
    return f"{found.isa}, {found.threads} threads"


def _switched_off() -> str | None:
    value = os.environ.get(_SWITCH, "1")
    if value not in ("0", "1"):
        raise InputError(f"{_SWITCH} is {value!r}; 0 (off) and 1 (on) are accepted")
    return f"is turned off by {_SWITCH}=0" if value == "0" else None


@cache
def _open() -> Library | str:
    # In an editable install the package has two folders; one among the sources is a developer's own.
    package = sys.modules["fewbits.native"].__path__
    folders = [Path(__file__).parent, *(Path(folder) for folder in package)]
    path = next((folder / _FILE for folder in folders if (folder / _FILE).is_file()), None)
    if path is None:
        return "was not compiled when fewbits was installed (`pip install -v` says why)"
    try:
        return Library(path)
    except (OSError, ValueError) as error:
        return f"cannot be used: {error}"


def _torch_libraries() -> list[Path]:
    """Where PyTorch's own library may be."""
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    return [Path(torch.__file__).parent / "lib" / name for name in names]


def torch_parallel() -> int | None:
    """The address of the very `GOMP_parallel` that torch calls, whose threads exist and are warm.

    Found as the dynamic linker finds it for torch: first among what the whole process sees (a library
    that was preloaded), then among what torch's library needs. None where torch needs none.
    """
    if sys.platform != "linux":
        return None
    own = _address(_torch_libraries()[0])
    return own and (_address(None) or own)


def _address(path: Path | None) -> int | None:
    try:
        opened = ctypes.CDLL(None if path is None else str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return ctypes.cast(opened.GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None


def _check(name: str, tensor: Tensor | None, dtype: torch.dtype | None, count: int) -> None:
    if tensor is None and dtype is None:
        return
    if tensor is None or dtype is None:
        raise ValueError(f"{name} {'are missing' if tensor is None else 'have no use'} for this weight")
    right = tensor.dtype == dtype and tensor.numel() == count and tensor.is_contiguous()
    if not right or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} are {tensor.numel()} of {tensor.dtype} on {tensor.device}; "
            f"{count} of {dtype} in one piece on the CPU would be read"
        )


def _raise(error: int, what: str) -> None:
    if error == 2:
        raise MemoryError(f"no memory for {what}")
    if error:
        raise ValueError(f"the native library does not take {what}")
