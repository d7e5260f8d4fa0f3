"""Files that are whole or not there: written under another name, forced to the disk, then renamed.

All writing goes through the calls of `os` that are named here, so that tests can make each of them fail.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fewbits.errors import InputError, ResourceError

_MODE = 0o666  # less what the umask takes
NOTHING = "nothing was left behind"


@contextlib.contextmanager
def disk_errors(path: Path, then: str = NOTHING) -> Iterator[None]:
    """Turn a failing disk into one clear line; `then` says what became of what was written."""
    try:
        yield
    except ResourceError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else str(error)
        raise ResourceError(f"{path} could not be written: {reason}; {then}") from error


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """A file that holds these pieces, or, whatever happens, the one that was there before."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        append(temporary, pieces, fresh=True)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync(path.parent)


def append(path: Path, pieces: Iterable[bytes | memoryview], fresh: bool = False) -> None:
    """Write behind what a file holds, or, if `fresh`, a new file; forced to the disk."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if fresh else os.O_APPEND)
    handle = os.open(path, flags, _MODE)
    try:
        for piece in pieces:
            write(handle, piece)
        os.fsync(handle)
    finally:
        os.close(handle)


def write(handle: int, piece: bytes | memoryview) -> None:
    """All of a piece; the system may take it in parts."""
    view = memoryview(piece).cast("B")
    while view:
        view = view[os.write(handle, view) :]


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reserve(path: Path, size: int) -> None:
    """A new file of that size. A full disk fails now, not when a page of its map is touched."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, _MODE)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            os.ftruncate(handle, size)
    finally:
        os.close(handle)


def free_bytes(path: Path) -> int:
    """Of the file system that a path, or what there is of it, lies on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class Lock:
    """A file that one process holds at a time. The system lets go of it when that process ends.

    Args:
        path: of the file; its folder must be there.
        what: is being worked on, for the message.

    `stale` says who held it, if a process that is gone did and did not let go.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self.stale: str | None = None
        self._handle = -1

    @property
    def held(self) -> bool:
        """By this object."""
        return self._handle >= 0

    def acquire(self) -> None:
        """Take it.

        Raises:
            InputError: another process holds it: which, and since when.
        """
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, _MODE)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = _owner(handle)
                os.close(handle)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise InputError(
                    f"{self.what} is being made by {owner}; accepted is another folder, or to wait"
                ) from None
            if self._is_there(handle):
                break
            os.close(handle)  # its folder was moved away while we waited
        self._handle = handle
        self.stale = _owner(handle) if os.fstat(handle).st_size else None
        value = {"process": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        write(handle, json.dumps(value).encode())

    def _is_there(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Let go of it, and leave no owner behind."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = -1


def _owner(handle: int) -> str:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        value = json.loads(os.read(handle, 4096))
        minutes = max(0.0, time.time() - value["since"]) / 60
        return f"process {value['process']} on {value['host']}, for {minutes:.0f} minutes"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until what is inside is done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not delivered here
        return
    came: list[tuple[int, FrameType | None]] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {n: signal.getsignal(n) for n in numbers}
    for n in numbers:
        if before[n] is not None:  # one that was set outside of Python could not be put back
            signal.signal(n, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for n in numbers:
            if before[n] is not None:
                signal.signal(n, before[n])
    if came:
        number, frame = came[0]
        if callable(before[number]):
            before[number](number, frame)
        else:
            signal.raise_signal(number)
