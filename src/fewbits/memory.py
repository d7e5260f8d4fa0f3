"""Memory of this process: what it takes, the most while it is watched, handing back what was freed."""

import ctypes
import gc
import os
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
_SAMPLED_S = 0.02  # seconds between two looks; not tuned


@dataclass(slots=True)
class Memory:
    """What this process took while it was watched.

    Args:
        before: bytes when it began: Python and its libraries.
        peak: the most that was seen.
        anonymous: whether pages of mapped files, which the system takes back when it needs them, are
            left out; only Linux tells.
    """

    before: int
    peak: int
    anonymous: bool


@contextmanager
def watch_memory() -> Iterator[Memory]:
    """Follow the memory of this process, by looking many times a second."""
    hand_back_memory()  # else what was freed before would hide what is taken now
    began = memory_bytes()
    memory, stop = Memory(began, began, STATUS.exists()), threading.Event()

    def look() -> None:
        while not stop.wait(_SAMPLED_S):
            memory.peak = max(memory.peak, memory_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        stop.set()
        thread.join()
        memory.peak = max(memory.peak, memory_bytes())


@contextmanager
def uncollected() -> Iterator[None]:
    """Without looks for objects that nobody uses, where many are made that stay."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def memory_bytes() -> int:
    """Anonymous memory of this process now; where the system does not tell, its largest size so far."""
    if STATUS.exists():
        return status_bytes("RssAnon")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def available_bytes() -> int:
    """What the machine could give this process now, at the cost of cached files."""
    info = Path("/proc/meminfo")
    if info.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.MULTILINE)
        if found is not None:
            return 1024 * int(found[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # half of all: a guess


def status_bytes(key: str) -> int:
    """What Linux says of this process: VmRSS, RssAnon, VmHWM.

    >>> 0 < status_bytes("VmRSS") <= status_bytes("VmHWM")
    True
    """
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def hand_back_memory() -> None:
    """Give the system what was freed: glibc keeps pieces up to 32 MB, 160 MB in all for a 1B shape."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # other C libraries have none
        trim(0)
