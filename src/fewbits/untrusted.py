"""Files that strangers made: which of them may be opened, and JSON that is read strictly.

Nothing here knows what a file means. It keeps reading inside the folder that was named, inside bounded
memory and time, and away from what is no file at all (a pipe would never end).
"""

import json
import stat
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

from fewbits.errors import InputError

# Of one JSON file. Parsing hostile JSON takes up to 30 times its size; measured 2026-11-26.
MAX_VALUES = 2**22  # of one text; a ledger has 45 for each tensor; each takes a microsecond, and memory
MAX_JSON = 2**25  # bytes; config.json has some thousand, the index of 671 billion parameters 9 million
_SHOWN = 100  # characters of a name, in messages
_LINKS = "blobs", "snapshots"  # folders of a repository in the hub's cache: files, and links to them


def shown(name: Any) -> str:
    r"""A name from a file as messages show it: in quotes, escaped, not too long.

    >>> shown("a\n\x1b[31m")
    "'a\\n\\x1b[31m'"
    """
    text = repr(name[: 2 * _SHOWN] if isinstance(name, str) else name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def check_file(path: Path, folder: Path | None = None) -> int:
    """Whether a file may be opened; its size in bytes.

    Args:
        path: of the file.
        folder: that it must lie in, links resolved; None: anywhere, as a user who names a file may.
            Links of the hub's cache, from `models--*/snapshots/*` into `models--*/blobs`, are accepted.

    Raises:
        InputError: not there, no plain file, or a link out of the folder.
    """
    try:
        status, place = path.stat(), path.resolve(strict=True)
        root = place.parent if folder is None else folder.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links; a NUL in the name
        if path.is_symlink():
            raise InputError(f"{path} is a link to nothing") from None
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no plain file"
        raise InputError(f"{path} is {kind}; accepted is a file")
    if not place.is_relative_to(root) and not _in_cache(place, root):
        raise InputError(f"{path} is a link out of its folder; accepted are links inside of {folder}")
    return status.st_size


def _in_cache(place: Path, root: Path) -> bool:
    """Whether a file lies in the blobs of the repository that the folder is a snapshot of."""
    blobs, snapshots = _LINKS
    for parent in (root, *root.parents):
        if parent.parent.name == snapshots:
            repository = parent.parent.parent
            return repository.name.startswith("models--") and place.is_relative_to(repository / blobs)
    return False


def read_bytes(path: Path, most: int, folder: Path | None = None) -> bytes:
    """All of a file.

    Raises:
        InputError: as `check_file`, not readable, or larger than `most` bytes.
    """
    size = check_file(path, folder)
    if size > most:
        raise InputError(f"{path} has {size} bytes; accepted are at most {most}")
    try:
        with path.open("rb") as file:
            return file.read(most + 1)[:most]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(text: str | bytes) -> Any:
    """JSON in which no object names a key twice.

    Raises:
        ValueError: it is none, nests too deeply, holds too much, or names a key twice.
    """
    comma, brace, bracket = (b",", b"{", b"[") if isinstance(text, bytes) else (",", "{", "[")
    values = text.count(comma) + text.count(brace) + text.count(bracket)  # type: ignore[arg-type]
    if values > MAX_VALUES:
        raise ValueError(f"it holds {values} values; accepted are {MAX_VALUES}")
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it names {shown(twice)} twice")
    return found


def counts(value: Any, most: int = 2**63 - 1) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers from 0, as shapes and offsets are.

    >>> counts([0, 3]), counts([True]), counts([2.0]), counts([-1]), counts("3"), counts([2**63])
    (True, False, False, False, False, False)
    """
    return isinstance(value, list | tuple) and all(type(n) is int and 0 <= n <= most for n in value)


def check_types(value: Any, kind: Any, where: str) -> None:
    """Whether a value from a file is what its annotation says, down to the last field.

    Raises:
        ValueError: says where it is not.

    >>> check_types({"a": (1, 2.5)}, dict[str, tuple[float, ...]], "it")
    >>> check_types({"a": (1, True)}, dict[str, tuple[float, ...]], "it")
    Traceback (most recent call last):
    ValueError: it.a.1 is True; accepted is float
    """
    found = _mismatch(value, kind)
    if found is not None:
        steps, wrong, accepted = found
        name = getattr(accepted, "__name__", None) if isinstance(accepted, type) else str(accepted)
        raise ValueError(f"{'.'.join([where, *reversed(steps)])} is {shown(wrong)}; accepted is {name}")


def _mismatch(value: Any, kind: Any) -> tuple[list[str], Any, Any] | None:
    """The steps to what does not fit (innermost first), what it is, and what would be accepted."""
    origin = get_origin(kind)
    if kind is Any:
        return None
    if origin in (Union, UnionType):
        found = [_mismatch(value, option) for option in get_args(kind)]
        # The deepest: of `Row | None` what is wrong with the row, not that it is no None.
        deepest = max(found, key=lambda one: len(one[0]) if one is not None else 0)
        return None if None in found else deepest if deepest and deepest[0] else ([], value, kind)
    if origin is Literal:
        fits = isinstance(value, str) and value in get_args(kind)
    elif kind in (None, type(None)):
        fits = value is None
    elif kind in (int, float):
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
    else:
        fits = isinstance(value, origin or kind)
    if not fits:
        return [], value, kind
    items: Any = ()
    if is_dataclass(kind):
        items = ((name, getattr(value, name), hint) for name, hint in _hints(kind))  # type: ignore[arg-type]
    elif origin in (list, tuple):
        items = ((str(i), item, get_args(kind)[0]) for i, item in enumerate(value))
    elif origin is dict:
        items = ((str(key), item, get_args(kind)[1]) for key, item in value.items())
    for step, item, hint in items:
        found_in = _mismatch(item, hint)
        if found_in is not None:
            found_in[0].append(step[:_SHOWN])
            return found_in
    return None


@cache
def _hints(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in fields(kind))
