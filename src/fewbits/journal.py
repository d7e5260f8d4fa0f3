"""The work of one run, kept on the disk as it goes, so that whatever ends the process costs one step.

Beside OUT stands `.OUT.partial` until OUT is whole:

    lock              held by the process that works on it
    request.json      what was asked for, of which source, with which libraries; other runs are refused
    calibration       token ids
    step-00003        values of the tensors of a step, one after the other
    step-00003.json   their names and hashes, the hash of the record before, and what the ledger says
    states-00003      hidden states that the next step begins with
    step-00003.4f2a-1, states-00003.4f2a-1   the same of another rank of the process 4f2a that made them
    result/           the checkpoint, made from all steps; renamed to OUT when it is verified

A record is renamed to its name after everything it speaks of is on the disk: what has one is finished.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fewbits.checkpoint import (
    MAX_SHARD_BYTES,
    SAFETENSORS_INDEX,
    TensorInfo,
    Written,
    dtype_of,
    encode_header,
    encode_json,
    hash_file,
    hash_json,
    hash_tensor,
    read_json,
    values,
)
from fewbits.disk import (
    NOTHING,
    Lock,
    append,
    disk_errors,
    free_bytes,
    reserve,
    sync,
    uninterrupted,
    write,
    write_whole,
)
from fewbits.errors import InputError, ResourceError, VerificationError

HEAD, CALIBRATION, RESULT = "request.json", "calibration", "result"
_COPIED = 2**20  # bytes at a time; not tuned
_KEPT = "what is finished is kept, and the same command goes on from there"
_SPARE = 2**20  # bytes that small files may take; rough


class Sheet:
    """The tensors of a step that one rank writes, and the states that it leaves for the next one.

    Args:
        out: the folder to be, for messages.
        path: of the file of tensors.
        states: of the file of states.
    """

    def __init__(self, out: Path, path: Path, states: Path, then: str = NOTHING) -> None:
        self.out, self.path, self.states, self.then = out, path, states, then
        self.written: list[Written] = []
        self._handle = -1

    def add(self, name: str, tensor: Tensor) -> Written:
        """Write one tensor of the step, at once: nothing is kept in memory."""
        tensor = tensor.detach().cpu().contiguous()
        with disk_errors(self.out, self.then):
            if self._handle < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                self._handle = os.open(self.path, flags, 0o666)
            write(self._handle, values(tensor))
        dtype = str(tensor.dtype).removeprefix("torch.")
        written = Written(name, dtype, tuple(tensor.shape), tensor.nbytes, hash_tensor(tensor))
        self.written.append(written)
        return written

    def new_states(self, size: int) -> Tensor:
        """Bytes in a file of the step, mapped: its pages are not this process's own memory."""
        with disk_errors(self.out, self.then):
            if self.states.exists():  # still mapped, perhaps: of a step that never committed its states
                os.unlink(self.states)
            reserve(self.states, size)
            return map_bytes(self.states, size, shared=True)

    def force(self) -> None:
        """Bring the tensors to the disk; a step may have none."""
        if self._handle < 0:
            append(self.path, [], fresh=True)
        else:
            os.fsync(self._handle)
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


@dataclass(frozen=True, slots=True)
class Others:
    """What another rank than 0 has forced to the disk for a step.

    Args:
        step: name of its file of tensors.
        states: name and hash of its file of states; None: it left none.
    """

    step: str
    states: dict[str, Any] | None


def map_bytes(path: Path, size: int, shared: bool = False) -> Tensor:
    """A file as bytes, mapped; what is written to it reaches the file only if it is shared."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), shared=shared, size=size, dtype=torch.uint8)


class Journal:
    """Makes a checkpoint step by step, and moves it to its place when it is whole.

    Use as a context. Left by an exception it keeps the finished steps for the next run of the same
    command; without any, or if the input was at fault, it removes everything that this process made.
    Steps of earlier processes stay, whatever happens.

    Args:
        out: the folder to be; must not exist.

    `steps` are the values given to `commit_step`, in order; of an earlier process too after `begin`.

    Raises:
        InputError: `out` exists, its parent cannot be made, or another process works on it.
        ResourceError: the disk is full or cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = partial_folder(out)
        self.result = self.folder / RESULT
        self.steps: list[dict[str, Any]] = []
        self.resumed = 0  # steps of earlier processes
        self.stale: str | None = None  # who left them
        self.choices: dict[str, Any] = {}
        self.shard_names: list[str] = []
        self._places: dict[str, tuple[Written, Path, int]] = {}  # with its file, and where it begins
        self._names: set[str] = set()
        self._last = ""  # hash of the last record
        self._states: list[dict[str, Any]] = []  # of the last record, one of each rank
        self._files: set[str] = set()  # of tensors, of all records
        self._sheet = self._new_sheet()
        self._ours = True  # to be removed if it is of no use
        self._found = False  # steps of earlier processes, read or not
        self.keep = False  # whatever the number of steps

    def __enter__(self) -> Self:
        self._refuse_finished()
        self._lock = Lock(self.folder / "lock", str(self.out))
        self._ours = not (self.folder / HEAD).exists()
        try:
            with disk_errors(self.out, NOTHING if self._ours else _KEPT):
                self.out.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(_trash(self.out), ignore_errors=True)
                self._take()
            self._ours = not (self.folder / HEAD).exists()
            self._refuse_finished()  # by the process that had the lock before us
        except (InputError, ResourceError):
            self._leave()
            raise
        self.stale = self._lock.stale
        self._found = bool(self._records())
        return self

    def _refuse_finished(self) -> None:
        if os.path.lexists(self.out):  # a dangling link too
            raise InputError(f"{self.out} exists; accepted is a folder that does not exist yet")

    def _take(self) -> None:
        while not self._lock.held:
            self.folder.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # who had it was done, and removed the folder
                self._lock.acquire()

    def _leave(self) -> None:
        """What was made to no end."""
        if self._ours and self._lock.held:
            remove_at_once(self.folder, self.out)
        elif self._ours:
            with contextlib.suppress(OSError):  # it is not empty: another process works there
                os.rmdir(self.folder)
        self._lock.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sheet.close()
        # Steps that were found stay, read or not: a run may be left while it reads them, and an input
        # that is at fault now was not when they were made.
        kept = self.keep and (self.folder / HEAD).exists()
        useless = isinstance(error, InputError) or not (self.steps or kept)
        if kind is not None and self._ours and useless and not self._found:
            remove_at_once(self.folder, self.out)
        self._lock.release()

    # -- beginning ---------------------------------------------------------------------------------

    @property
    def earlier(self) -> dict[str, Any] | None:
        """What an earlier process began here with; None if there was none."""
        return _read_record(self.folder / HEAD) if (self.folder / HEAD).is_file() else None

    def calibration(self) -> Tensor | None:
        """The token ids (samples, length) of an earlier process; None if there are none."""
        head, path = self.earlier, self.folder / CALIBRATION
        if head is None or head.get("ids") is None:
            return None
        if not path.is_file() or hash_file(path) != head["ids"]["sha256"]:
            raise _damaged(path)
        ids = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.int64)
        return ids.view(head["ids"]["shape"])

    def begin(
        self,
        request: dict[str, Any],
        choose: Callable[[], dict[str, Any]] = dict,
        ids: Tensor | None = None,
        needed_bytes: int = 0,
    ) -> None:
        """Start, or go on: prove that what is there is what was written.

        Args:
            request: all that decides what comes out; another than the earlier process had is refused.
            choose: called where no process has chosen before; `self.choices` has what counts.
            ids: token ids, to be kept.
            needed_bytes: of disk, for all there is to do.

        Raises:
            InputError: the work that is there is another's: the differences are named.
            VerificationError: a file is not what was written.
            ResourceError: the disk has too little room.
        """
        request = _plain(request)
        earlier = self.earlier
        if earlier is not None:
            found = differences(earlier["request"], request)
            if found:
                raise InputError(
                    f"{self.folder} holds another unfinished run: {', '.join(found)}; accepted are the "
                    "same run, and --restart to throw away what is there"
                )
            self.calibration()
            self._ours = True
            self.choices, self._last = earlier["choices"], earlier["sha256"]
            with disk_errors(self.out, _KEPT):
                self._replay()
            self._sheet = self._new_sheet()
        _check_room(self.out, needed_bytes - _size(self.folder))
        if earlier is None:
            with disk_errors(self.out):
                self._clean()
            self.choices = _plain(choose())
            self._write_head(request, ids)

    def _write_head(self, request: dict[str, Any], ids: Tensor | None) -> None:
        head: dict[str, Any] = {"request": request, "choices": self.choices, "ids": None}
        with disk_errors(self.out):
            if ids is not None:
                path = self.folder / CALIBRATION
                write_whole(path, [values(ids)])
                head["ids"] = {"shape": list(ids.shape), "sha256": hash_file(path)}
            self._last = hash_json(head)
            write_whole(self.folder / HEAD, [encode_json(head | {"sha256": self._last})])

    def _replay(self) -> None:
        """Read the records of an earlier process, and compare the files with them."""
        while (path := self._path(len(self.steps), ".json")).is_file():
            record = _read_record(path)
            if record["previous"] != self._last:
                raise _damaged(path)
            written = [Written(**w | {"shape": tuple(w["shape"])}) for w in record["written"]]
            files, ranks = record["files"], record["ranks"] or [0] * len(written)
            for rank, name in enumerate(files):
                own = [w for w, other in zip(written, ranks, strict=True) if other == rank]
                self._check_values(self.folder / name, own)
            self._states, self._last = record["states"], record["sha256"]
            self._accept(record["value"], written, files, ranks)
        if len(self._records()) > len(self.steps):  # there are some behind one that is missing
            raise _damaged(path)
        for kept in self._states:
            path = self.folder / kept["file"]
            if not path.is_file() or hash_file(path) != kept["sha256"]:
                raise _damaged(path)
        self.resumed = len(self.steps)
        self._clean()

    def _records(self) -> list[Path]:
        return list(self.folder.glob("step-*.json"))

    def _check_values(self, path: Path, written: list[Written]) -> None:
        size = path.stat().st_size if path.is_file() else -1
        if size != sum(w.size_bytes for w in written):
            raise _damaged(path)
        start = 0
        for tensor in written:
            digest = hashlib.sha256()
            for piece in _pieces(path, start, tensor.size_bytes):
                digest.update(piece)
            if digest.hexdigest() != tensor.sha256:
                raise _damaged(path)
            start += tensor.size_bytes

    def _clean(self) -> None:
        """Remove what no record speaks of."""
        done = range(len(self.steps))
        known = {HEAD, CALIBRATION, "lock"} | self._files
        known |= {self._path(i, ".json").name for i in done}
        known |= {kept["file"] for kept in self._states}
        for path in self.folder.iterdir():
            if path.name not in known:
                shutil.rmtree(path) if path.is_dir() else os.unlink(path)

    # -- steps -------------------------------------------------------------------------------------

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.folder / f"step-{step:05}{suffix}"

    def add(self, name: str, tensor: Tensor) -> Written:
        """Write one tensor of the step, at once: nothing is kept in memory."""
        if name in self._names:
            raise InputError(f"two tensors would be written as {name}")
        self._names.add(name)
        self._sheet.then = self._then
        return self._sheet.add(name, tensor)

    def _new_sheet(self) -> Sheet:
        return Sheet(self.out, self._path(len(self.steps)), self.folder / "states.new", self._then)

    @property
    def _then(self) -> str:
        return _KEPT if self.steps else NOTHING

    def new_states(self, size: int) -> Tensor:
        """Bytes in a file of the step, mapped: its pages are not this process's own memory."""
        self._sheet.then = self._then
        return self._sheet.new_states(size)

    def states(self) -> Tensor | None:
        """The bytes that the last step left for the next one; None if it left none. Do not modify."""
        found = self.all_states()
        return found[0] if found else None

    def all_states(self) -> list[Tensor]:
        """The same of every rank that worked on the last step. Do not modify."""
        return [self.map_states(name) for name in self.states_files]

    @property
    def states_files(self) -> list[str]:
        """Names of the files that the last step left, one of each rank that worked on it."""
        return [kept["file"] for kept in self._states]

    def map_states(self, name: str) -> Tensor:
        """What one of these files holds."""
        path = self.folder / name
        return map_bytes(path, path.stat().st_size)

    def commit_step(
        self,
        value: dict[str, Any],
        states: bool = False,
        others: Sequence[Others] = (),
        written: Sequence[tuple[int, Written]] | None = None,
    ) -> None:
        """The step is finished: its tensors, what is to be known of it, and states if it made any.

        Args:
            value: to be known.
            states: whether there are some.
            others: what other ranks have forced to the disk, in their order.
            written: all tensors in the order of the step, with the rank that wrote each; those of this
                process by default.
        """
        with uninterrupted(), disk_errors(self.out, self._then):
            step, before, own = len(self.steps), self._states, self._sheet
            own.force()
            kept = [other.states for other in others if other.states is not None]
            self._states = [self._keep_states(step), *kept] if states else []
            tensors = own.written if written is None else [w for _, w in written]
            ranks = [] if written is None else [rank for rank, _ in written]
            files = [own.path.name, *(other.step for other in others)]
            record: dict[str, Any] = {
                "step": step,
                "previous": self._last,
                "written": [_to_json(w) for w in tensors],
                "files": files,
                "ranks": ranks,
                "states": self._states,
                "value": _plain(value),
            }
            record["sha256"] = self._last = hash_json(record)
            write_whole(self._path(step, ".json"), [encode_json(record)])
            self._accept(record["value"], tensors, files, ranks or [0] * len(tensors))
            self._sheet = self._new_sheet()
            for old in before:
                os.unlink(self.folder / old["file"])

    def _accept(
        self, value: dict[str, Any], written: list[Written], files: list[str], ranks: list[int]
    ) -> None:
        starts = [0] * len(files)
        for tensor, rank in zip(written, ranks, strict=True):
            if tensor.name in self._places:
                raise InputError(f"two tensors would be written as {tensor.name}")
            self._places[tensor.name] = tensor, self.folder / files[rank], starts[rank]
            starts[rank] += tensor.size_bytes
        self.steps.append(value)
        self._names |= {w.name for w in written}
        self._files |= set(files)

    def _keep_states(self, step: int) -> dict[str, Any]:
        new, path = self.folder / "states.new", self.folder / f"states-{step:05}"
        kept = force_states(new) | {"file": path.name}
        os.replace(new, path)
        return kept

    # -- what finished steps hold ------------------------------------------------------------------

    @property
    def written(self) -> list[Written]:
        """Tensors of all finished steps, in their order."""
        return [written for written, _, _ in self._places.values()]

    def read(self, name: str) -> Tensor:
        """A tensor of a finished step, in memory."""
        written, path, start = self._places[name]
        raw, dtype = bytearray(written.size_bytes), dtype_of(written.dtype)
        with path.open("rb") as file:
            file.seek(start)
            file.readinto(raw)
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.view(written.shape)

    # -- the checkpoint ----------------------------------------------------------------------------

    def write_shards(
        self,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        stem: str = "model",
        keep: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """Make weight files of all steps, in their order, and an index if there are several.

        Args:
            max_shard_bytes: tensors go to a shard until it would be larger.
            stem: that the names of files begin with; only of a "model" an index is written.
            keep: which tensors, by name.
        """
        with disk_errors(self.out, _KEPT):
            self._new_result()
            written = [written for written in self.written if keep(written.name)]
            infos = [TensorInfo(w.name, dtype_of(w.dtype), w.shape, "") for w in written]
            shards = list(cut(infos, max_shard_bytes))
            names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
            self.shard_names = [f"{stem}.safetensors"] if len(shards) == 1 else names
            for name, shard in zip(self.shard_names, shards, strict=True):
                self._write_shard(self.result / name, ordered(shard))
        if len(shards) > 1 and stem == "model":
            pairs = zip(self.shard_names, shards, strict=True)
            where = {info.name: name for name, shard in pairs for info in shard}
            total = sum(info.size_bytes for info in infos)
            self.write_json(SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": where})

    def write_container(
        self, name: str, write: Callable[[Path, list[Written], Callable[[str], Tensor]], None]
    ) -> None:
        """Let another make one weight file of all steps.

        Args:
            name: of the file.
            write: called with its path, what was added, and what gives a tensor by its name.
        """
        with disk_errors(self.out, _KEPT):
            self._new_result()
            write(self.result / name, self.written, self.read)
            sync(self.result / name)

    def _new_result(self) -> None:
        if self.result.exists():  # of an earlier process, which stopped in the middle
            shutil.rmtree(self.result)
        self.result.mkdir()

    def _write_shard(self, path: Path, shard: list[TensorInfo]) -> None:
        found = (self._places[info.name] for info in shard)
        parts = (_pieces(where, start, w.size_bytes) for w, where, start in found)
        append(path, chain([encode_header(shard)], *parts), fresh=True)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """A JSON file of the checkpoint."""
        with disk_errors(self.out, _KEPT):
            append(self.result / name, [encode_json(value)], fresh=True)

    def carry_over(self, source: Path, names: list[str]) -> None:
        """Copy what clients need beside weights: tokenizer, generation config, chat template."""
        with disk_errors(self.out, _KEPT):
            for name in names:
                (self.result / name).parent.mkdir(exist_ok=True)
                append(self.result / name, [(source / name).read_bytes()], fresh=True)

    def commit(self) -> None:
        """Move the checkpoint to its place, and forget how it came about."""
        with uninterrupted(), disk_errors(self.out, _KEPT):
            for folder in [self.result, *(path for path in self.result.rglob("*") if path.is_dir())]:
                sync(folder)
            os.replace(self.result, self.out)
            sync(self.out.parent)
            remove_at_once(self.folder, self.out)


def force_states(path: Path) -> dict[str, Any]:
    """Bring states to the disk; the name and the hash of their file."""
    sync(path)
    return {"file": path.name, "sha256": hash_file(path)}


def cut(tensors: Iterable[TensorInfo], max_shard_bytes: int) -> Iterator[list[TensorInfo]]:
    """The tensors of each weight file: they go to one until it would be larger."""
    shard: list[TensorInfo] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.size_bytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.size_bytes
    if shard:
        yield shard


def ordered(shard: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Tensors as they stand in a weight file: wide dtypes first, so that every one is aligned."""
    return sorted(shard, key=lambda info: (-info.dtype.itemsize, info.name))


def partial_folder(out: Path) -> Path:
    """Where the unfinished work for OUT lies."""
    return out.parent / f".{out.name}.partial"


def discard(out: Path) -> None:
    """Remove unfinished work for OUT, if nobody is working on it.

    Raises:
        InputError: another process is.
    """
    folder = partial_folder(out)
    with disk_errors(out, "what was there may be there still"):
        shutil.rmtree(_trash(out), ignore_errors=True)
        if not folder.is_dir():
            return
        lock = Lock(folder / "lock", str(out))
        try:
            lock.acquire()
        except FileNotFoundError:
            return  # who worked on it was done, and removed it
        remove_at_once(folder, out)
        lock.release()


def throw_away(out: Path) -> None:
    """A finished result of ours, and unfinished work for one."""
    discard(out)
    if out.exists():
        with disk_errors(out, "what was there is there still"):
            remove_at_once(out, out)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What is not the same in two JSON objects, each named by its keys.

    >>> differences({"a": {"bits": 4}, "b": 1}, {"a": {"bits": 3}, "b": 1})
    ['a.bits was 4 and is 3 now']
    """
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} was {_short(old)} and is {_short(new)} now")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _trash(out: Path) -> Path:
    return out.parent / f".{out.name}.trash"


def remove_at_once(folder: Path, out: Path) -> None:
    """Remove a folder, at once for whoever looks: half of one would be taken for work, or a result.

    Args:
        folder: OUT, or the unfinished work for it.
        out: beside it lies what is being removed.
    """
    trash = _trash(out)
    shutil.rmtree(trash, ignore_errors=True)
    try:
        os.replace(folder, trash)
    except OSError:  # a disk may have no room for a name
        trash = folder
        with contextlib.suppress(OSError):
            os.unlink(folder / HEAD)  # first: without it there is nothing to go on with
    shutil.rmtree(trash, ignore_errors=True)


def _check_room(out: Path, needed: int) -> None:
    free = free_bytes(out.parent)
    if needed > 0 and needed + _SPARE > free:
        raise ResourceError(
            f"{out}: the run takes about {(needed + _SPARE) / 1e9:.3f} GB of disk on the way, and "
            f"{free / 1e9:.3f} GB are free; accepted is a disk with more room"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _damaged(path: Path) -> VerificationError:
    return VerificationError(
        f"{path} was changed since it was written, or is missing: the run cannot go on from it; "
        "accepted is --restart, which throws it away"
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path)
    except InputError:
        raise _damaged(path) from None
    stated = record.pop("sha256", None)
    whole = record | {"sha256": stated}
    if stated != hash_json(record) or path.read_bytes() != encode_json(whole):
        raise _damaged(path)
    return whole


def _to_json(written: Written) -> dict[str, Any]:
    return {name: getattr(written, name) for name in Written.__slots__} | {"shape": list(written.shape)}


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, so that what is compared is the same in both processes."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


def _pieces(path: Path, start: int, count: int) -> Iterator[bytes]:
    """So many bytes of a file, some at a time."""
    with path.open("rb") as file:
        file.seek(start)
        while count:
            piece = file.read(min(count, _COPIED))
            count -= len(piece)
            yield piece
