"""Headers of GGUF files, read strictly: no number in one is trusted before it is compared with the file.

    "GGUF", version, count of tensors, count of keys
    keys      name, type, value; a list has the type of its items, their count, and the items
    tensors   name, dimensions, shape (columns first), type, offset of its values
    values    each at its offset from here, aligned

Strings are a count of bytes and UTF-8; all numbers are little-endian. Lists of strings are counted and
not kept, but for those under keys of our own: vocabularies are large, and not needed here.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.errors import InputError, first_line
from fewbits.untrusted import MAX_VALUES, check_file, shown

MAX_TENSORS = 2**18  # of a file; large models have some thousands
_MAX_ENTRIES = 2**16  # keys; there are some dozens
_MAX_KEPT = 2**20  # bytes of a string that is kept; chat templates have some thousands
_MAX_NAME = 1000
_SINGLE = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
OWN = "fewbits."  # what our keys begin with


@cache
def block_sizes() -> dict[str, tuple[int, int]]:
    """Of each type: values of a block, and its bytes."""
    import gguf

    return {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}


def product(numbers: Iterable[int]) -> int:
    """Of none: 1."""
    result = 1
    for n in numbers:
        result *= n
    return result


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: keys with their values, tensors, where their values begin."""

    keys: dict[str, Any]
    tensors: list[tuple[str, str, tuple[int, ...], int]]  # name, type, shape (rows first), offset
    start: int


class _Cursor:
    """Reads numbers and strings one after the other, never past the end.

    Raises:
        ValueError: it would be.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place, self.size = data, 0, len(data)
        self.items = 0

    def number(self, form: str) -> Any:
        """One, as `struct` writes it."""
        size = struct.calcsize(form)
        self._check(size)
        (value,) = struct.unpack_from(form, self.data, self.place)
        self.place += size
        return value

    def skip_string(self) -> tuple[int, int]:
        """Where one begins and ends."""
        length = self.number("<Q")
        self._check(length)
        begin = self.place
        self.place += length
        return begin, self.place

    def string(self) -> str:
        """One in UTF-8."""
        begin, end = self.skip_string()
        if end - begin > _MAX_KEPT:
            raise ValueError(f"it has a string of {end - begin} bytes; accepted are {_MAX_KEPT}")
        return self.data[begin:end].decode()

    def value(self, kind: int, keep: bool) -> Any:
        """Of a key; strings in a list are kept if wanted."""
        if kind in _SINGLE:
            value = self.numbers(kind, 1)[0]
            return float(str(value)) if kind == _FLOAT32 else value.item()  # 1e-06, not 9.99999997e-07
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of type {kind}; accepted are 0 to 12")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SINGLE:
            return self.numbers(inner, count)
        if inner != _STRING:
            raise ValueError(f"it has a list of type {inner}; accepted are numbers and strings")
        self.items += count
        if self.items > MAX_VALUES:
            raise ValueError(f"it has lists of {self.items} strings; accepted are {MAX_VALUES}")
        self._check(8 * count)
        if keep:
            return [self.string() for _ in range(count)]
        for _ in range(count):
            self.skip_string()
        return None

    def numbers(self, kind: int, count: int) -> Any:
        """So many, as an array."""
        dtype = np.dtype(_SINGLE[kind])
        self._check(count * dtype.itemsize)
        found = np.frombuffer(self.data[self.place : self.place + count * dtype.itemsize], dtype)
        self.place += count * dtype.itemsize
        return found

    def _check(self, size: int) -> None:
        if size > self.size - self.place:
            raise ValueError(f"it ends before {size} bytes at {self.place}")


def read_header(path: Path) -> Header:
    """Of a file, every number of it compared with what the file can hold.

    Raises:
        InputError: no such file, or a header that is not wholly as it should be.
    """
    size = check_file(path)
    if size < 24:
        raise InputError(f"{path} is truncated or corrupt: it has {size} bytes")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # of UTF-8 too
        raise InputError(f"{path} has a corrupt header: {first_line(error)}") from None


def _parse(cursor: _Cursor) -> Header:
    magic, version = cursor.number("4s"), cursor.number("<I")
    if magic != b"GGUF":
        raise ValueError(f"it begins with {magic!r}; accepted is b'GGUF'")
    if version not in (2, 3):
        raise ValueError(f"it is of version {version}; accepted are 2 and 3")
    tensors, entries = cursor.number("<Q"), cursor.number("<Q")
    if tensors > MAX_TENSORS or entries > _MAX_ENTRIES:
        raise ValueError(f"it names {tensors} tensors and {entries} keys")
    keys: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in keys:
            raise ValueError(f"it names {shown(key)} twice")
        keys[key] = cursor.value(cursor.number("<I"), keep=key.startswith(OWN))
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= 2**16:
        raise ValueError(f"its alignment is {shown(alignment)}; accepted are multiples of 8")
    if keys.get("split.count", 1) not in (0, 1):
        raise ValueError("it is one part of several; accepted are whole files")
    found = [_parse_tensor(cursor) for _ in range(tensors)]
    start = cursor.place + -cursor.place % alignment
    _check_places(found, start, cursor.size, alignment)
    return Header(keys, found, start)


def _parse_tensor(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    import gguf

    name = cursor.string()
    if not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
        raise ValueError(f"{shown(name)} is no name of a tensor")
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= 4:
        raise ValueError(f"{name} has {dimensions} dimensions; accepted are 1 to 4")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    try:
        kind = gguf.GGMLQuantizationType(number).name
        columns, _ = block_sizes()[kind]
    except (ValueError, KeyError):
        raise ValueError(f"{name} is of type {number}, which ggml does not have") from None
    if not all(0 < n < 2**48 for n in shape) or shape[-1] % columns:
        raise ValueError(f"{name} is {shape}; accepted are rows of a multiple of {columns} values")
    return name, kind, shape, offset


def _check_places(
    found: list[tuple[str, str, tuple[int, ...], int]], start: int, size: int, alignment: int
) -> None:
    """Whether values lie in the file, one after the other, and no name stands twice."""
    names = Counter(name for name, *_ in found)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"it has tensor {twice} twice")
    place = 0
    for name, kind, shape, offset in sorted(found, key=lambda tensor: tensor[3]):
        columns, block = block_sizes()[kind]
        length = product(shape) // columns * block
        if offset % alignment or offset < place or start + offset + length > size:
            raise ValueError(f"the {length} bytes of {name} do not lie at {offset} of its values")
        place = offset + length
