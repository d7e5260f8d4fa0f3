"""Processes that die, and disks that fail, at a chosen call to the system.

`watch` puts itself before every call of `os` that changes what lies in a folder, counts them, and does
at one of them what a `Fault` says. It stays: call it in a process of its own, which `Child` makes.
"""

import errno
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 180  # after which a child counts as hanging
FAILING = ("open", "write", "fsync", "replace", "mkdir", "posix_fallocate")  # on a disk that is full
Say = Callable[[Any], None]  # keeps what it is given, which JSON can hold, whatever happens next
_BY_PATH = ("mkdir", "unlink", "rmdir", "replace", "rename")
_BY_HANDLE = ("write", "fsync", "posix_fallocate", "ftruncate")
_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Fault:
    """What happens at which call, counted from 0.

    Args:
        how: "kill" before the call; "half": kill after half of it, where it has halves; "power": kill,
            and lose what was not forced to the disk; "fail": that call fails; "full": those behind it
            that need room too; "stop": the process stands still until it is woken; "fill": `filler`
            takes all room of the disk; "stutter": each write takes half.
        error: errno of "fail" and "full".
        seed: for what "power" loses.
        filler: a file to be made.
    """

    call: int
    how: str
    error: int = errno.ENOSPC
    seed: int = 0
    filler: str = ""


@dataclass
class _Unforced:
    """What a disk may not hold yet: contents of files, and names, in order."""

    contents: dict[str, None] = field(default_factory=dict)
    names: list[tuple[str, str, str, bool]] = field(default_factory=list)  # call, from, to, was there

    def see(self, name: str, path: str, to: str) -> None:
        """A call that is about to be made."""
        if name in ("write", "posix_fallocate", "ftruncate"):
            self.contents[path] = None
        elif name == "fsync":
            self.contents.pop(path, None)
            self.names = [n for n in self.names if os.path.dirname(n[2]) != path]
        else:
            if name == "replace" and path in self.contents:
                self.contents[to] = self.contents.pop(path)
            if name == "open" and os.path.lexists(path):
                return
            self.names.append((name, path, to, os.path.lexists(to)))

    def lose(self, seed: int) -> None:
        """As after a loss of power: contents are gone, and some of the last names."""
        draw = random.Random(seed)
        for path in self.contents:
            if os.path.isfile(path):
                os.truncate(path, draw.choice((0, os.path.getsize(path) // 2)))
        for name, path, to, was_there in reversed(self.names[draw.randint(0, len(self.names)) :]):
            if name == "open" and os.path.isfile(path):
                os.remove(path)
            elif name == "replace" and not was_there and os.path.lexists(to):
                os.rename(to, path)
            elif name != "open":
                break  # what was removed cannot be brought back


def watch(folder: Path, fault: Fault | None, calls: list[tuple[str, str]]) -> None:
    """Count calls that change what lies below a folder into `calls`, as (name, path); do as told."""
    real: dict[str, Callable[..., Any]] = {
        name: getattr(os, name)
        for name in (*_BY_PATH, *_BY_HANDLE, "open", "close")
        if hasattr(os, name)
    }
    paths: dict[int, str] = {}  # of open handles
    unforced = _Unforced()
    root = os.path.abspath(folder)

    def full(path: Any, options: dict[str, Any], key: str = "dir_fd") -> str:
        within = options.get(key)
        where = paths.get(within, "/") if within is not None else ""
        return os.path.abspath(os.path.join(where, os.fsdecode(path)))

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LIMIT_S)

    def before(name: str, path: str, to: str = "", half: Callable[[], Any] | None = None) -> None:
        if not path.startswith(root):
            return
        number = len(calls)
        calls.append((name, os.path.relpath(to or path, root)))
        if fault is not None and number >= fault.call:
            at = number == fault.call
            if at and fault.how == "power":
                names = dict(real)
                for key, function in names.items():
                    setattr(os, key, function)
                unforced.lose(fault.seed)
                die()
            if at and fault.how in ("kill", "half"):
                if half is not None and fault.how == "half":
                    half()
                die()
            if at and fault.how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if at and fault.how == "fill":
                _fill(fault.filler)
            if name in FAILING and (fault.how == "full" or (at and fault.how == "fail")):
                raise OSError(fault.error, os.strerror(fault.error), path)
        unforced.see(name, path, to or path)

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        where = full(path, options)
        if flags & _CHANGES:
            before("open", where)
        handle: int = real["open"](path, flags, *args, **options)
        paths[handle] = where
        return handle

    def closed(handle: int) -> None:
        paths.pop(handle, None)
        real["close"](handle)

    def by_path(name: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if name in ("replace", "rename"):
                to = full(args[0], options, "dst_dir_fd")
                before("replace", full(path, options, "src_dir_fd"), to)
            else:
                before(name, full(path, options))
            return real[name](path, *args, **options)

        return call

    def by_handle(name: str) -> Callable[..., Any]:
        def half(handle: int, args: tuple[Any, ...]) -> None:
            if name == "write":
                real["write"](handle, args[0][: len(args[0]) // 2])
            elif name == "posix_fallocate":
                real["posix_fallocate"](handle, 0, max(1, args[1] // 2))

        def call(handle: int, *args: Any) -> Any:
            if handle in paths:
                before(name, paths[handle], half=lambda: half(handle, args))
            if name == "write" and fault is not None and fault.how == "stutter":
                return real["write"](handle, args[0][: (len(args[0]) + 1) // 2])
            return real[name](handle, *args)

        return call

    for name in _BY_PATH:
        setattr(os, name, by_path(name))
    for name in _BY_HANDLE:
        if name in real:
            setattr(os, name, by_handle(name))
    os.open, os.close = opened, closed  # type: ignore[assignment]


def _fill(path: str) -> None:
    with open(path, "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


@dataclass
class Ended:
    """How a child ended: what it returned, the error it was left by, or neither if it was killed.

    Args:
        said: lines that it gave `say`, however it ended.
    """

    value: Any = None
    error: dict[str, Any] | None = None
    killed: bool = False
    hangs: bool = False
    said: list[Any] = field(default_factory=list)

    @property
    def short(self) -> str:
        """For a message."""
        if self.error is not None:
            return f"{self.error['type']}: {self.error['text']}\n{self.error['trace']}"
        return "hangs" if self.hangs else "was killed" if self.killed else f"returned {self.value}"


class Child:
    """A fork of this process that runs a function.

    Args:
        function: gets a `say`; what it returns JSON can hold.
        report: a file of its own.
    """

    def __init__(self, function: Callable[[Say], Any], report: Path) -> None:
        self.report = report
        report.unlink(missing_ok=True)
        self.pid = os.fork()
        self.status: int | None = None
        if self.pid == 0:
            self._run(function)

    def _run(self, function: Callable[[Say], Any]) -> None:
        leave = os._exit
        with self.report.open("ab", buffering=0) as file:

            def say(kind: str, value: Any) -> None:
                file.write((json.dumps([kind, value]) + "\n").encode())

            try:
                say("value", function(lambda value: say("said", value)))
            except BaseException as error:
                say("error", _describe(error))
        leave(0)

    def wait(self, limit: float = LIMIT_S, stopped: bool = False) -> bool:
        """Until it has ended, or, if asked for, stands still; False if it runs still."""
        end = time.monotonic() + limit
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | (os.WUNTRACED if stopped else 0))
            if pid and os.WIFSTOPPED(status):
                return True
            if pid:
                self.status = status
            elif time.monotonic() > end:
                return False
            else:
                time.sleep(0.002)
        return True

    def signal(self, number: int) -> None:
        """If it has not ended."""
        if self.status is None:
            os.kill(self.pid, number)

    def end(self, limit: float = LIMIT_S) -> Ended:
        """Wait for it, and read what it left."""
        hangs = not self.wait(limit)
        if hangs:
            self.signal(signal.SIGKILL)
            self.wait()
        assert self.status is not None
        ended = Ended(killed=os.WIFSIGNALED(self.status), hangs=hangs)
        for line in self.report.read_text().splitlines() if self.report.exists() else []:
            kind, value = json.loads(line)
            if kind == "said":
                ended.said.append(value)
            else:
                setattr(ended, kind, value)
        self.report.unlink(missing_ok=True)
        return ended


def _describe(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "text": str(error),
        "exit_code": getattr(error, "exit_code", None),
        "errno": getattr(error, "errno", None),
        "trace": "".join(traceback.format_exception(error)[-12:]),
    }
