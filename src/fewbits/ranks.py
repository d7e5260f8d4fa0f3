"""Processes that do one run together, joined by torch.distributed; what becomes of all if one is lost.

Rank 0 leads. The others are told what to do, and everything that decides reaches all of them in one
order. One process alone is a group of one: the same code runs, and nothing is sent.

    torchrun --nproc-per-node 2 -m fewbits quantize MODEL OUT --method gptq --calibration text.jsonl

A rank writes a sign of life into the store of the group: how many exchanges it has finished, whether it
waits for another, what its main thread has computed. Whoever sees none for `limit_s` names that rank,
and ends: a call that waits for a machine that is gone cannot be ended otherwise. The work is kept by the
journal, as after a kill.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fewbits.errors import FewbitsError, InputError, ResourceError, one_line

LIMIT_S = 300.0  # without a sign of life, a rank is lost. Longer than a disk is seen to sleep; not tuned
_BEATS = 10  # signs of life within the limit
_LONGEST_BEAT_S, _LOOK_S = 2.0, 0.1
_NOTICE_S = 2.0  # of the limit, where it is long: to notice a loss, to say it, and to end
_ASKED_S = 0.5  # for an answer of the store, where one may do without; not tuned
_SETTLE_S = 3.0  # after a signal or a broken connection: until it is known who was lost; not tuned
_FOREVER = timedelta(days=30)  # of the library: waiting long is no fault while others compute
_ALIGN = 64  # bytes; of tensors that are sent in one piece
KEPT = "what is finished is kept, and the same command goes on from there, with any number of ranks"


class RankError(ResourceError):
    """Another rank is lost, or has stopped.

    `code` is the exit code; `quiet` where the rank that failed has said why.
    """

    def __init__(self, message: str, code: int = 1, quiet: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.quiet = code, quiet


class Ranks:
    """A group of one process; see `join` for more.

    `rank` is the number of this process, `count` how many there are, `received_bytes` what came from
    others, and `waited_s` how long this one waited for them.
    """

    rank, count, received_bytes, waited_s = 0, 1, 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the group together, or tell the others why."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which talks, and keeps the journal."""
        return self.rank == 0

    def tell(self, value: Any = None, source: int = 0) -> Any:
        """The value (JSON) that one rank has, at every rank."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The values (JSON) that the ranks have, in their order, at every rank."""
        return [value]

    def send(self, tensor: Tensor, to: int) -> None:
        """Give a tensor to another rank, which calls `receive`."""
        raise AssertionError("alone")

    def receive(self, into: Tensor, source: int) -> None:
        """Take a tensor of this shape and dtype from another rank."""
        raise AssertionError("alone")

    def share(self, count: int, make: Callable[[int], Tensor]) -> list[Tensor]:
        """Tensors that the ranks make in turn, at every rank."""
        return [make(i) for i in range(count)]

    def exchange(self, value: Any, tensors: list[Tensor]) -> list[tuple[Any, list[Tensor]]]:
        """What every rank has: a value (JSON) and tensors; at every rank. One's own are not copied."""
        return [(value, tensors)]

    def tell_tensor(self, tensor: Tensor | None, source: int = 0) -> Tensor:
        """The tensor that one rank has, at every rank."""
        assert tensor is not None
        return tensor

    def largest(self, tensors: list[Tensor]) -> None:
        """Of each element the largest of all ranks, in place."""

    def quit(self, error: RankError) -> None:
        """End this process, where another rank is lost."""
        raise error


ALONE = Ranks()


def share_out(costs: list[float], count: int) -> list[int]:
    """Which rank does each of some things: the dearest first, each to the rank that has least to do.

    >>> share_out([1.0, 5.0, 2.0, 2.0], 2)
    [1, 0, 1, 1]
    """
    loads, found = [0.0] * count, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[i] = min(range(count), key=lambda rank: (loads[rank], rank))
        loads[found[i]] += costs[i]
    return found


def ranks_of_environment() -> int:
    """How many ranks `torchrun` has started; 1 without it."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return 1
    return int(os.environ["WORLD_SIZE"])


def own_device(name: str) -> str:
    """Of the GPUs of a machine, on which each of its ranks has one, that of this rank."""
    return f"cuda:{_local_rank()}" if name == "cuda" and ranks_of_environment() > 1 else name


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(limit_s: float = LIMIT_S) -> Ranks:
    """Join the processes that `torchrun` has started; a process that is alone is a group of one.

    Args:
        limit_s: seconds without a sign of life within which a rank is lost, and all others have ended;
            below 10 s they end up to 2 s later.

    Raises:
        InputError: a limit that is none.
        RankError: some rank did not come within the limit.
    """
    if not 1 <= limit_s < float("inf"):
        raise InputError(f"the time limit of ranks is {limit_s} s; accepted are numbers from 1")
    return ALONE if ranks_of_environment() == 1 else _Joined(limit_s)


# -- several -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Life:
    """A sign of life.

    Args:
        beat: how many there were before.
        exchanges: that are finished.
        waits_for: a rank; None: it computes; -1: for any.
        computed_s: CPU time of the main thread.
        done: it has left, and all is well.
        process, machine, host: where it runs.
    """

    beat: int = 0
    exchanges: int = 0
    waits_for: int | None = None
    computed_s: float = 0.0
    done: bool = False
    process: int = 0
    machine: str = ""
    host: str = ""


@dataclass(slots=True)
class _Seen:
    """The last sign of life of a rank, and when it, and what its main thread had done, was new."""

    life: _Life = field(default_factory=_Life)
    beat_at: float = field(default_factory=time.monotonic)
    moved_at: float = field(default_factory=time.monotonic)

    def see(self, life: _Life) -> None:
        """A sign of life that may be the last one again."""
        now = time.monotonic()
        if life.beat != self.life.beat:
            self.beat_at = now
        before = self.life.exchanges, self.life.computed_s
        if (life.exchanges, life.computed_s) != before:
            self.moved_at = now
        self.life = life


class _Joined(Ranks):
    """One of several processes."""

    def __init__(self, limit_s: float) -> None:
        import torch.distributed as dist

        self.limit_s = limit_s
        self._silent_s = limit_s - _NOTICE_S if limit_s >= 5 * _NOTICE_S else limit_s
        self._pause_s = min(_LONGEST_BEAT_S, limit_s / _BEATS)  # between signs of life
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.received_bytes, self.waited_s = 0, 0.0
        self._dist: Any = dist
        self._life = _Life(process=os.getpid(), machine=_machine(), host=socket.gethostname())
        self._seen = [_Seen() for _ in range(self.count)]
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._reached_at = time.monotonic()
        self._broken: str | None = None  # the connection to the store
        self._failed: dict[str, Any] | None = None  # what the first that left has said
        self._stop = threading.Event()
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], list[BaseException | None], Any]]
        self._calls = queue.SimpleQueue()
        self._meet()
        for work in (self._exchange_forever, self._beat_forever, self._watch_forever):
            threading.Thread(target=work, daemon=True).start()

    def _meet(self) -> None:
        dist, limit = self._dist, timedelta(seconds=self.limit_s)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        try:
            # Two: a client waits for one answer at a time, and signs of life must not wait.
            store, own = self._open_store(self.rank == 0), self._open_store(False)
            self._store = dist.PrefixStore(f"fewbits/{attempt}", own)
            self._say_alive()
            self._await_all(limit)
            backend = "gloo"
            if torch.cuda.is_available():  # one for each rank of a machine
                backend = "cpu:gloo,cuda:nccl"
                torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"group/{attempt}", store),
                rank=self.rank,
                world_size=self.count,
                timeout=_FOREVER,
            )
        except RankError:
            raise
        except (RuntimeError, OSError, ValueError) as error:
            reason = one_line(str(error).splitlines()[0])
            raise RankError(f"rank {self.rank} cannot join the others: {reason}") from None

    def _open_store(self, is_master: bool) -> Any:
        """What torchrun keeps, or where it does not, rank 0."""
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=self.limit_s)
        return self._dist.TCPStore(
            *where, is_master=is_master and not kept, timeout=limit, wait_for_workers=False
        )

    def _await_all(self, limit: timedelta) -> None:
        keys = [f"alive/{rank}" for rank in range(self.count)]
        try:
            self._store.wait(keys, limit)
        except RuntimeError:
            missing = [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
            if missing:
                what = "rank" if len(missing) == 1 else "ranks"
                raise RankError(
                    f"{what} {', '.join(missing)} did not come within {self.limit_s:g} s"
                ) from None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._stop.set()
            self._life.done = True
            self._briefly(self._say_alive)  # whoever goes first is not lost
            self._briefly(self._part, self.limit_s)
            return
        if isinstance(error, RankError):
            return
        if isinstance(error, KeyboardInterrupt):  # torchrun's way to say that another rank is gone
            until = time.monotonic() + _SETTLE_S
            while time.monotonic() < until and self._failed is None:
                time.sleep(_LOOK_S)  # who is lost is said by the thread that watches
        self._stop.set()
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        told = isinstance(error, FewbitsError | OSError | MemoryError)
        what = str(error) if told else type(error).__name__
        self._publish({"rank": self.rank, "what": one_line(what), "code": code, "lost": False})
        self._linger()

    def _part(self) -> None:
        """The store is rank 0's: all go together."""
        self._dist.all_reduce(torch.zeros(1))
        self._dist.destroy_process_group()

    # -- exchanges -------------------------------------------------------------------------------------

    def _exchange_forever(self) -> None:
        """Calls of the library, in a thread of their own: signals reach the one that waits for them."""
        while True:
            call, result, done = self._calls.get()
            try:
                call()
            except BaseException as error:
                result.append(error)
            done.set()

    def _call(self, call: Callable[[], Any], peer: int = -1) -> None:
        result: list[BaseException | None] = []
        done = threading.Event()
        self._life.waits_for = peer
        began = time.monotonic()
        self._calls.put((call, result, done))
        while not done.wait(0.2):
            pass
        self.waited_s += time.monotonic() - began
        if result and isinstance(result[0], RuntimeError):  # of the library
            self._explain(peer, result[0])
        elif result and result[0] is not None:
            raise result[0]
        self._life.waits_for = None
        self._life.exchanges += 1

    def _explain(self, peer: int, error: RuntimeError) -> None:
        """A connection broke: wait until it is known who is lost, and who left because of it."""
        until = time.monotonic() + self.limit_s
        while time.monotonic() < until:
            time.sleep(_LOOK_S)
        named = f"rank {peer}" if peer >= 0 else "another rank"
        self.quit(RankError(f"the connection to {named} broke: {one_line(str(error))}; {KEPT}"))

    def tell(self, value: Any = None, source: int = 0) -> Any:
        """See `Ranks`."""
        own = self.rank == source
        data = _encode(value) if own else torch.empty(0, dtype=torch.uint8)
        return json.loads(bytes(self._tell_bytes(data, source).numpy()))

    def _tell_bytes(self, data: Tensor, source: int) -> Tensor:
        size = torch.tensor([data.numel()])
        self._call(lambda: self._dist.broadcast(size, source), source)
        if self.rank != source:
            data = torch.empty(int(size), dtype=torch.uint8)
        if data.numel():
            self._call(lambda: self._dist.broadcast(data, source), source)
        self.received_bytes += data.numel() if self.rank != source else 0
        return data

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks`."""
        return [self.tell(value, source) for source in range(self.count)]

    def send(self, tensor: Tensor, to: int) -> None:
        """See `Ranks`."""
        self._call(lambda: self._dist.send(tensor, to), to)

    def receive(self, into: Tensor, source: int) -> None:
        """See `Ranks`."""
        self._call(lambda: self._dist.recv(into, source), source)
        self.received_bytes += into.nbytes

    def share(self, count: int, make: Callable[[int], Tensor]) -> list[Tensor]:
        """See `Ranks`."""
        own = {i: make(i) for i in range(self.rank, count, self.count)}
        found = []
        for i in range(count):
            (got,) = self._pass_on(i % self.count, None, [own[i]] if i in own else [])[1]
            found.append(got)
        return found

    def exchange(self, value: Any, tensors: list[Tensor]) -> list[tuple[Any, list[Tensor]]]:
        """See `Ranks`."""
        return [self._pass_on(source, value, tensors) for source in range(self.count)]

    def tell_tensor(self, tensor: Tensor | None, source: int = 0) -> Tensor:
        """See `Ranks`."""
        return self._pass_on(source, None, [] if tensor is None else [tensor])[1][0]

    def _pass_on(self, source: int, value: Any, tensors: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """A value and tensors of one rank, these in one piece of memory."""
        own = self.rank == source
        shapes = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in tensors] if own else None
        value, shapes = self.tell((value, shapes), source)
        places, size = _places(shapes)
        if own:
            room = torch.zeros(size, dtype=torch.uint8)
            for tensor, (start, stop) in zip(tensors, places, strict=True):
                room[start:stop] = tensor.contiguous().view(-1).view(torch.uint8)
        else:
            room = torch.empty(0, dtype=torch.uint8)
        room = self._tell_bytes(room, source)
        if own:
            return value, tensors
        return value, [
            room[start:stop].view(getattr(torch, dtype)).view(shape)
            for (dtype, shape), (start, stop) in zip(shapes, places, strict=True)
        ]

    def largest(self, tensors: list[Tensor]) -> None:
        """See `Ranks`."""
        if not tensors:
            return
        flat = torch.cat([tensor.view(-1) for tensor in tensors])
        operation = self._dist.ReduceOp.MAX
        self._call(lambda: self._dist.all_reduce(flat, operation))
        self.received_bytes += flat.nbytes
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()

    # -- who is alive ----------------------------------------------------------------------------------

    def _say_alive(self) -> None:
        self._life.beat += 1
        with contextlib.suppress(OSError):
            self._life.computed_s = round(time.clock_gettime(self._clock), 2)
        self._store.set(f"alive/{self.rank}", json.dumps(asdict(self._life)))

    def _beat_forever(self) -> None:
        """Write a sign of life, and read those of the others."""
        while not self._stop.is_set():
            try:
                self._say_alive()
                self._read_lives()
            except Exception as error:
                self._broken = one_line(str(error).splitlines()[0])
                return
            self._reached_at = time.monotonic()
            self._stop.wait(self._pause_s)

    def _read_lives(self) -> None:
        """Signs of life of all, and what the first that left has said."""
        if self._store.check(["failed"]):
            self._failed = json.loads(self._store.get("failed"))
        keys = [f"alive/{rank}" for rank in range(self.count)]
        for seen, life in zip(self._seen, self._store.multi_get(keys), strict=True):
            seen.see(_Life(**json.loads(life)))

    def _watch_forever(self) -> None:
        """End this process when another has, or gives no sign of life."""
        while not self._stop.wait(_LOOK_S):
            error = self._find_lost()
            if error is not None:
                self.quit(error)

    def _find_lost(self) -> RankError | None:
        said = self._find_said()
        if said is not None:
            return said
        now = time.monotonic()
        for rank, seen in enumerate(self._seen):
            if rank != self.rank and self._is_gone(seen.life):
                time.sleep(2 * _LOOK_S)
                self._briefly(self._read_lives)  # what it said before it ended
                said = self._find_said()
                if said is not None or not seen.life.done:
                    return said or self._lost(rank, f"its process {seen.life.process} has ended")
        if self._broken is not None and now - self._reached_at > _SETTLE_S:
            return self._lost(0, f"the connection to its host broke ({self._broken})")
        if now - self._reached_at > self._silent_s:
            return self._lost(0, f"its host cannot be reached for {self._silent_s:g} s")
        looked = self._reached_at  # what came since nobody could tell
        for rank, seen in enumerate(self._seen):
            if rank != self.rank and not seen.life.done and looked - seen.beat_at > self._silent_s:
                return self._lost(rank, f"no sign of life for {self._silent_s:g} s")
        return self._find_stalled(looked)

    def _find_stalled(self, looked: float) -> RankError | None:
        """A rank that lives, and neither computes nor waits; or all wait."""
        still = [looked - seen.moved_at > self._silent_s for seen in self._seen]
        for rank, seen in enumerate(self._seen):
            busy = seen.life.waits_for is None and not seen.life.done
            if rank != self.rank and still[rank] and busy:
                return self._lost(rank, f"it has computed nothing for {self._silent_s:g} s")
        if all(still) and self._life.waits_for is not None:
            rank = self._life.waits_for
            rank = (self.rank + 1) % self.count if rank in (-1, self.rank) else rank
            return self._lost(rank, f"nothing has come from it for {self._silent_s:g} s")
        return None

    def _is_gone(self, life: _Life) -> bool:
        """Whether a process of this machine has ended."""
        if life.done or life.machine != self._life.machine or not life.process:
            return False
        try:
            stat = Path(f"/proc/{life.process}/stat").read_text()
        except OSError:
            return True
        return stat.rpartition(")")[2].split()[0] in "ZX"

    def _lost(self, rank: int, why: str) -> RankError:
        host = self._seen[rank].life.host
        where = f" on {host}" if host else ""
        what = f"rank {rank}{where} is lost: {why}; {KEPT}"
        self._publish({"rank": rank, "what": what, "code": 1, "lost": True})
        return RankError(what)

    def _find_said(self) -> RankError | None:
        """What another rank has said before it left."""
        failed = self._failed
        if failed is None:
            return None
        if failed["lost"]:
            return RankError(failed["what"])
        # Rank 0 talks: it has said why it stops. What others say is said again by rank 0 alone.
        quiet = failed["rank"] == 0 or not self.leads or failed["code"] == 130
        return RankError(f"rank {failed['rank']} has stopped: {failed['what']}", failed["code"], quiet)

    def _publish(self, failed: dict[str, Any]) -> None:
        """Say why one leaves, if nobody was first."""
        self._briefly(lambda: self._store.compare_set("failed", "", json.dumps(failed)))

    def _briefly(self, call: Callable[[], Any], seconds: float = _ASKED_S) -> None:
        """Ask the store or others, which may be gone, not longer than that."""

        def ask() -> None:
            with contextlib.suppress(Exception):
                call()

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)

    def quit(self, error: RankError) -> None:
        """See `Ranks`: one line, and the end, whatever the main thread is doing."""
        self._stop.set()
        if not error.quiet:
            with contextlib.suppress(Exception):
                clear = "\r\x1b[2K" if sys.stderr.isatty() else ""
                os.write(2, f"{clear}error: {error}\n".encode())
        self._linger()
        os._exit(error.exit_code)

    def _linger(self) -> None:
        """The store is rank 0's: others read there why it leaves."""
        if self.leads:
            time.sleep(self._pause_s + 2 * _LOOK_S)


def _machine() -> str:
    """What processes that see each other have in common."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _places(shapes: list[tuple[str, list[int]]]) -> tuple[list[tuple[int, int]], int]:
    """Where each tensor lies in one piece of memory, and how large that is."""
    places, start = [], 0
    for dtype, shape in shapes:
        stop = start + torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        places.append((start, stop))
        start = -(-stop // _ALIGN) * _ALIGN
    return places, start
