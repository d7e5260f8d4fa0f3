"""One run of `quantize`, hurt in one way, then started again: what must hold.

Every case is a function of a `Bench` that returns the list of what is wrong. All of them quantize in
forks of this process, which has imported everything, made the models and used one thread only.
"""

import contextlib
import errno
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from faults import Child, Ended, Fault, watch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fewbits
from fewbits import QuantScheme, quantize
from fewbits.blockwise import Limits
from fewbits.checkpoint import carried_files
from fewbits.journal import Journal, discard
from fewbits.ranks import join
from fewbits.scheme import InputScheme
from fewbits.stream import TOKENS
from models import VOCABULARY, tiny_checkpoint
from ranks import fork_ranks, hurt

_RANKS_LIMIT_S = 20.0  # without a sign of life
SHARD = 60_000  # bytes of a weight file: several of them, and an index
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "mixtral": {"num_hidden_layers": 3},
    "qwen3_moe": {"num_hidden_layers": 2},
}


Say = Callable[[Any], None]


@dataclass(frozen=True)
class Job:
    """A run of one method on one model."""

    method: str
    model: str

    @property
    def name(self) -> str:
        """For the names of cases."""
        return f"{self.method}:{self.model}"

    def options(self) -> dict[str, Any]:
        """Of `quantize`."""
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCABULARY, (6, 24), generator=draw)
        return {
            "method": self.method,
            "scheme": None if self.method == "llm-int8" else QuantScheme(4, "group", 32),
            "calibration": None if self.method == "rtn" else ids,
            "max_shard_bytes": SHARD,
        }

    def run(self, source: Path, out: Path, say: Say, **changes: Any) -> dict[str, Any]:
        """Say which blocks it begins; return from how many steps it went on, and if OUT was there."""

        def progress(what: str, done: int, total: int) -> None:
            if what.startswith("blocks") and done < total:
                say({"block": done})

        result = quantize(source, out, progress=progress, **self.options() | changes)
        return {"resumed": result.run.get("resumed_steps"), "reused": result.reused}


@dataclass(frozen=True)
class Bare(Job):
    """The journal alone: fast, so that every call of it can be hurt."""

    def run(self, source: Path, out: Path, say: Say, **changes: Any) -> dict[str, Any]:
        """Five steps of three tensors each, with states between them."""
        if changes.get("restart"):
            discard(out)
        if out.exists():
            discard(out)
            return {"resumed": 0, "reused": True}
        ids = torch.arange(40).view(4, 10)
        with Journal(out) as journal:
            journal.begin({"bits": 4}, lambda: {"tokens": 7}, ids, 100_000)
            assert journal.choices == {"tokens": 7}
            assert torch.equal(ids, journal.calibration())
            for step in range(len(journal.steps), 5):
                say({"block": step})
                states = journal.states()
                assert (states is None) == (step == 0)
                seed = 0 if states is None else int(states.sum())
                for i in range(3):
                    draw = torch.Generator().manual_seed(seed + i)
                    journal.add(f"{step}.{i}", torch.randn(200, 2 + i, generator=draw))
                if step < 4:
                    room = journal.new_states(3000)
                    room.copy_((torch.arange(3000) * (step + seed + 3)) % 251)
                journal.commit_step({"step": step, "seed": seed, "error": 1e-09}, states=step < 4)
            journal.write_shards(10_000)
            journal.write_json("steps.json", {"steps": journal.steps})
            journal.carry_over(source, carried_files(source))
            journal.commit()
            return {"resumed": journal.resumed, "reused": False}


@dataclass(frozen=True)
class Forgetful(Bare):
    """A journal that forces nothing to the disk."""

    def run(self, source: Path, out: Path, say: Say, **changes: Any) -> dict[str, Any]:
        """The same, without fsync."""
        os.fsync = lambda _: None
        return super().run(source, out, say, **changes)


JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Bare("journal", "llama"),
        Job("gptq", "llama"),
        Job("gptq", "mixtral"),
        Job("awq", "llama"),
        Job("awq+gptq", "qwen3_moe"),
        Job("weighted-rtn", "llama"),
        Job("llm-int8", "llama"),
        Job("rtn", "mixtral"),
    )
}


@dataclass
class Reference:
    """What a run gives that nobody disturbs: its files, the calls it made, how long it took."""

    files: dict[str, bytes]
    calls: list[tuple[str, str]]
    seconds: float
    blocks: list[int]


@dataclass
class Outcome:
    """Of one case."""

    case: str
    problems: list[str] = field(default_factory=list)
    kills: int = 0
    repeated: int = 0  # blocks that were computed again after one kill, at most
    seconds: float = 0.0
    differs: bool = False  # whether fewer tokens at a time give other bytes


def contents(folder: Path, without: tuple[str, ...] = ("run.json",)) -> dict[str, bytes]:
    """Every file below a folder but those that hold times."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in without)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


class Bench:
    """Where cases run: models, what undisturbed runs gave, a folder for each case.

    Args:
        work: a folder of our own.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.sources = {name: work / "models" / name for name in MODELS}
        for name, changes in MODELS.items():
            tiny_checkpoint(self.sources[name], name, **changes)
            _add_tokenizer(self.sources[name])
        self.references: dict[str, Reference] = {}
        self.outcome = Outcome("")  # of the case that runs
        self._numbers = iter(range(10**9))

    # -- runs ------------------------------------------------------------------------------------------

    def start(
        self, job: Job, out: Path, fault: Fault | None = None, source: Path | None = None, **changes: Any
    ) -> Child:
        """Quantize in a fork. It says which blocks it begins, and returns what the run tells."""
        changed_by = changes.pop("before", None)

        def run(say: Say) -> dict[str, Any]:
            calls: list[tuple[str, str]] = []
            watch(out.parent, fault, calls)
            if changed_by is not None:
                changed_by()

            began = time.monotonic()
            value = job.run(source or self.sources[job.model], out, say, **changes)
            return value | {"calls": calls, "seconds": time.monotonic() - began}

        return Child(run, self.work / f"report-{os.getpid()}-{next(self._numbers)}")

    def run(self, job: Job, out: Path, fault: Fault | None = None, **changes: Any) -> Ended:
        """`start`, to its end."""
        return self.start(job, out, fault, **changes).end()

    def refer(self, job: Job) -> None:
        """Run it undisturbed."""
        with self.folder(f"reference-{job.name}") as folder:
            ended = self.run(job, folder / "out")
            if ended.value is None:
                raise SystemExit(f"{job.name} does not run: {ended.short}")
            assert not self.left(folder / "out"), self.left(folder / "out")
            self.references[job.name] = Reference(
                contents(folder / "out"),
                [tuple(call) for call in ended.value["calls"]],
                ended.value["seconds"],
                blocks_of(ended),
            )

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """An empty folder, removed afterwards."""
        folder = self.work / name.replace("/", "_").replace(":", "_")
        folder.mkdir()
        yield folder
        shutil.rmtree(folder)

    # -- what must hold --------------------------------------------------------------------------------

    def left(self, out: Path) -> list[str]:
        """What lies beside OUT that should not."""
        return sorted(p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}."))

    def steps(self, out: Path) -> int:
        """That have a record."""
        return len(list(partial(out).glob("step-*.json")))

    def same(self, job: Job, out: Path, without: tuple[str, ...] = ("run.json",)) -> list[str]:
        """Compare OUT with that of an undisturbed run."""
        return compare_files(self.references[job.name].files, contents(out, without)) + [
            f"{name} was left behind" for name in self.left(out)
        ]

    def go_on(
        self, job: Job, out: Path, before: Ended | None = None, restart: bool = False
    ) -> list[str]:
        """The same command again, to its end: it goes on where it was, and nothing differs.

        Args:
            before: the run that was ended, to see which blocks are computed again.
            restart: throw away what is there.
        """
        steps, finished = (0 if restart else self.steps(out)), out.exists()
        ended = self.run(job, out, **({"restart": True} if restart else {}))
        if ended.value is None:
            return [f"the run after {steps} steps did not end well: {ended.short}"]
        problems = self.same(job, out)
        if finished and not ended.value["reused"]:
            problems.append("OUT was there, and the run did not find it")
        if not finished and ended.value["resumed"] != steps:
            problems.append(f"went on from {ended.value['resumed']} steps where {steps} were there")
        if before is not None:
            problems += self.count_repeated(before, ended)
        return problems

    def count_repeated(self, before: Ended, after: Ended) -> list[str]:
        """Blocks that both runs began."""
        again = set(blocks_of(before)) & set(blocks_of(after))
        self.outcome.repeated = max(self.outcome.repeated, len(again))
        return [f"blocks {sorted(again)} were computed again"] if len(again) > 1 else []

    # -- killed ----------------------------------------------------------------------------------------

    def killed(self, job: Job, fault: Fault, more: int = 0) -> list[str]:
        """Killed at a call; `more` times again on the way; then to the end."""
        draw = random.Random(f"{fault}")
        count = len(self.references[job.name].calls)
        with self.folder(self.outcome.case) as folder:
            out = folder / "out"
            ended = self.run(job, out, fault)
            problems = self._was_killed(ended)
            for _ in range(more):
                steps = self.steps(out)
                again = Fault(draw.randrange(max(1, count // 2)), draw.choice(("kill", "half")))
                following = self.run(job, out, again)
                problems += self.count_repeated(ended, following)
                if following.error is not None or following.hangs:
                    problems.append(f"continued until {again}: {following.short}")
                self.outcome.kills += following.killed
                if not out.exists() and self.steps(out) < steps:
                    problems.append(f"{steps} steps were there, {self.steps(out)} after {again}")
                ended = following
            return problems + self.go_on(job, out, ended)

    def notices(self, job: Job) -> list[str]:
        """That these tests can fail: a journal without fsync must not come through losses of power."""
        forgetful = Forgetful(job.method, job.model)
        count = len(self.references[job.name].calls)
        for call in range(count // 4, count // 2):
            # Nothing of the last step was forced to the disk, so that its contents are gone.
            if self.killed(forgetful, Fault(call, "power", seed=call)):
                return []
        return ["a journal that forces nothing to the disk came through"]

    def killed_after(self, job: Job, seconds: float) -> list[str]:
        """Killed from outside."""
        with self.folder(self.outcome.case) as folder:
            child = self.start(job, folder / "out")
            child.wait(seconds)
            child.signal(signal.SIGKILL)
            ended = child.end()
            self.outcome.kills += 1  # also where it came a moment too late
            if ended.error is not None:
                return [ended.short]
            return self.go_on(job, folder / "out", ended)

    def _was_killed(self, ended: Ended) -> list[str]:
        self.outcome.kills += ended.killed
        return [] if ended.killed and not ended.hangs else [f"was not killed but {ended.short}"]

    def restarted(self, job: Job, call: int, finished: bool) -> list[str]:
        """Killed while `restart` throws away a finished result, or unfinished work, or begins again."""
        with self.folder(self.outcome.case) as folder:
            if finished:
                out = folder / "out"
                self.run(job, out)
            else:
                out = self.middle(job, folder)
            ended = self.run(job, out, Fault(call, "kill"), restart=True)
            self.outcome.kills += ended.killed
            if ended.error is not None or ended.hangs:
                return [ended.short]
            return self.go_on(job, out)

    # -- several ranks ---------------------------------------------------------------------------------

    def exchanges(self, job: Job, count: int) -> int:
        """How many a rank has in an undisturbed run of so many."""
        with self.folder(f"exchanges-{job.name}") as folder:
            codes = self._ranks(job, folder, count, count_into=folder / "count")
            assert set(codes) == {0}, codes
            return int((folder / "count").read_text())

    def rank_killed(self, job: Job, count: int, fault: tuple[int, int, float], after: int) -> list[str]:
        """Of so many ranks one is killed at an exchange, or a moment later; then so many go on.

        Args:
            job: what they do.
            count: how many ranks begin.
            fault: which rank, at which exchange, how many seconds later.
            after: how many ranks go on.
        """
        with self.folder(self.outcome.case) as folder:
            codes, problems = self._ranks(job, folder, count, fault), []
            victim = fault[0]
            self.outcome.kills += codes[victim] == -signal.SIGKILL
            if codes[victim] == -signal.SIGKILL:  # else it came too late
                for rank in range(count):
                    said = (folder / f"said-{rank}").read_text().splitlines()
                    lines = [line for line in said if line.startswith("error:")]
                    named = len(lines) == 1 and f"rank {victim} on" in lines[0]
                    if rank != victim and codes[rank] != 0 and not (codes[rank] == 1 and named):
                        problems.append(f"rank {rank} ended with {codes[rank]} and said {lines}")
            again = self._ranks(job, folder, after)
            if set(again) != {0}:
                said = (folder / "said-0").read_text()
                problems.append(f"the run after it ended with {again}: {said}")
            return problems + self.same(job, folder / "out")

    def _ranks(
        self,
        job: Job,
        folder: Path,
        count: int,
        fault: tuple[int, int, float] | None = None,
        count_into: Path | None = None,
    ) -> list[int]:
        """Run ranks to their end; their exit codes."""

        def run() -> None:
            with join(_RANKS_LIMIT_S) as ranks:
                if fault is not None and ranks.rank == fault[0]:
                    hurt(fault[1], signal.SIGKILL, fault[2])
                job.run(self.sources[job.model], folder / "out", lambda _: None, ranks=ranks)
                if count_into is not None and ranks.rank == count - 1:
                    count_into.write_text(str(ranks._life.exchanges))

        running, codes = fork_ranks(count, folder / "said", run), [0] * count
        while running:
            pid, status = os.wait()
            codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        return codes

    # -- full disks ------------------------------------------------------------------------------------

    def fails(self, job: Job, fault: Fault) -> list[str]:
        """A call fails: one clear line, the truth about what is kept, and the same command goes on."""
        with self.folder(self.outcome.case) as folder:
            out = folder / "out"
            ended = self.run(job, out, fault)
            if ended.value is not None:  # what failed was not needed: a folder that was there already
                return self.same(job, out)
            problems = self.check_full(ended, out, fault.error)
            return problems + self.go_on(job, out, ended)

    def fails_again(self, job: Job, fault: Fault) -> list[str]:
        """A call fails in a run that goes on with what another left: nothing of that is lost."""
        with self.folder(self.outcome.case) as folder:
            out = self.middle(job, folder)
            steps, ended = self.steps(out), self.run(job, out, fault)
            if ended.value is not None:
                return self.same(job, out)
            problems = self.check_full(ended, out, fault.error)
            if not out.exists() and self.steps(out) < steps:
                problems.append(f"{steps} steps were there, {self.steps(out)} are now")
            return problems + self.go_on(job, out, ended)

    def check_full(self, ended: Ended, out: Path, error: int = errno.ENOSPC) -> list[str]:
        """What a run says that has no room, against what is there."""
        if ended.error is None:
            return [f"no error, but {ended.short}"]
        text = ended.error["text"]
        problems = []
        if ended.error["type"] != "ResourceError" or ended.error["exit_code"] != 1:
            problems.append(f"not a ResourceError of exit code 1: {ended.short}")
        if "\n" in text or ("the disk is full" in text) != (error == errno.ENOSPC):
            problems.append(f"the message is {text!r}")
        if os.strerror(error) not in text and error != errno.ENOSPC:
            problems.append(f"the message does not name the error: {text!r}")
        if "nothing was left behind" in text and (out.exists() or self.left(out)):
            problems.append(f"says that nothing was left, but {out.exists()=} and {self.left(out)}")
        if "is kept" in text and not (out.exists() or self.left(out)):
            problems.append("says that what is finished is kept, but nothing is there")
        return problems

    def really_full(self, job: Job, call: int) -> list[str]:
        """A disk that something else fills at a call, until it is given room again."""
        with self.folder(self.outcome.case) as folder:
            disk = folder / "disk"
            disk.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
            if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
                print("skip: mounting a tmpfs is not permitted here", flush=True)
                return []
            try:
                filler = disk / "filler"
                ended = self.run(job, disk / "out", Fault(call, "fill", filler=str(filler)))
                problems = self.check_full(ended, disk / "out")
                filler.unlink(missing_ok=True)
                return problems + self.go_on(job, disk / "out", ended)
            finally:
                subprocess.run(["umount", str(disk)], check=True)

    def stutters(self, job: Job) -> list[str]:
        """A system that writes half of what it is given, each time."""
        with self.folder(self.outcome.case) as folder:
            ended = self.run(job, folder / "out", Fault(0, "stutter"))
            return self.same(job, folder / "out") if ended.value else [ended.short]

    # -- changed files -------------------------------------------------------------------------------

    def middle(self, job: Job, folder: Path) -> Path:
        """OUT of a run that was killed in its last step."""
        out = folder / "out"
        ended = self.run(job, out, Fault(self.last_step(job), "kill"))
        assert ended.killed, ended.short
        return out

    def last_step(self, job: Job) -> int:
        """The call that makes the file of the last step."""
        calls = self.references[job.name].calls
        made = [i for i, (name, path) in enumerate(calls) if name == "open" and _is_step(path)]
        return max(made)

    def changed(self, job: Job, parts: int, lost: bool = True) -> list[str]:
        """One bit of each file kept, at its ends and `parts` places between; or parts of it `lost`."""
        problems = []
        with self.folder(self.outcome.case) as folder:
            out = self.middle(job, folder)
            kept = {p.name for p in partial(out).iterdir()} - {"lock"}
            expected = {
                "request.json",
                f"step-{self.steps(out) - 1:05}",
                f"step-{self.steps(out) - 1:05}.json",
            }
            calibrated = {"calibration", f"states-{self.steps(out) - 1:05}"}
            expected |= set() if job.method == "rtn" else calibrated
            if not expected <= kept:
                problems.append(f"{sorted(expected - kept)} are not there, only {sorted(kept)}")
            for name in sorted(kept):
                size = (partial(out) / name).stat().st_size
                draw = random.Random(name)
                places = {0, size - 1, *(draw.randrange(size) for _ in range(parts))} if size else set()
                for i, place in enumerate(sorted(places)):
                    bit = draw.randrange(8)
                    restart = i == 0 and (lost or name == "request.json")
                    problems += self._changed(
                        job, out, name, _flip(place, bit), restart, f"{place}.{bit}"
                    )
                for what, change in (("cut", _cut), ("removed", Path.unlink)) if lost else ():
                    problems += self._changed(job, out, name, change, False, what)
            problems += self.go_on(job, out)
        return problems

    def _changed(
        self, job: Job, first: Path, name: str, change: Callable[[Path], None], restart: bool, what: str
    ) -> list[str]:
        with self.folder(f"{self.outcome.case}-changed") as folder:
            out = folder / "out"
            shutil.copytree(partial(first), partial(out))
            change(partial(out) / name)
            before = contents(partial(out), ("lock",))
            ended = self.run(job, out)
            problems = []
            if ended.error is None:
                # What no record speaks of any more may be made again; it must come out the same.
                if what != "removed" or self.same(job, out):
                    problems.append(f"not found: {ended.short}")
            else:
                text, kind = ended.error["text"], ended.error["type"]
                if kind != "VerificationError" or ended.error["exit_code"] != 3:
                    problems.append(f"not a VerificationError: {ended.short}")
                named = name in text or what == "removed"  # or a file that is nothing without it
                if "\n" in text or not named or "--restart" not in text:
                    problems.append(f"the message is {text!r}")
                if contents(partial(out), ("lock",)) != before:
                    problems.append("the files kept were touched")
                if restart:
                    problems += self.go_on(job, out, restart=True)
            return [f"{name} {what}: {problem}" for problem in problems]

    def every_bit(self, job: Job, name: str) -> list[str]:
        """Each bit of one small file that an unfinished run keeps."""
        with self.folder(self.outcome.case) as folder:
            out = self.middle(job, folder)
            path, source = partial(out) / name, self.sources[job.model]
            data = path.read_bytes()

            def look(say: Say) -> int:
                for place in range(len(data)):
                    for bit in range(8):
                        _flip(place, bit)(path)
                        try:
                            job.run(source, out, say)
                            say(f"{name} {place}.{bit}: not found")
                            return place
                        except fewbits.VerificationError:
                            path.write_bytes(data)
                return len(data)

            looked = Child(look, self.work / f"report-{os.getpid()}-look").end(600)
            if looked.value != len(data):
                return [looked.short, *looked.said]
            return [*looked.said, *self.go_on(job, out)]

    def finished(self, job: Job, parts: int) -> list[str]:
        """One bit of each file of OUT: `verify` finds it, and so does the same command."""
        with self.folder(self.outcome.case) as folder:
            out = folder / "out"
            ended = self.run(job, out)
            if ended.value is None:
                return [ended.short]

            def look(say: Say) -> int:
                found = 0
                for name, data in contents(out).items():
                    draw = random.Random(name)
                    places = {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(parts))}
                    for place in sorted(places):
                        bit = draw.randrange(8)
                        _flip(place, bit)(out / name)
                        for what, check in (("verify", _verify), ("quantize", self._again(job))):
                            problem = check(out, name)
                            found += not problem
                            if problem:
                                say(f"{what}: {name} {place}.{bit}: {problem}")
                        (out / name).write_bytes(data)
                return found

            looked = Child(look, self.work / f"report-{os.getpid()}-look").end(600)
            if not looked.value:
                return [looked.short, *looked.said]
            return [*looked.said, *self.go_on(job, out)]

    def _again(self, job: Job) -> Callable[[Path, str], str]:
        def check(out: Path, name: str) -> str:
            try:
                quantize(self.sources[job.model], out, **job.options())
            except fewbits.FewbitsError as error:
                return "" if name in str(error) or "ledger" in str(error) else f"said {error}"
            return "not found"

        return check

    # -- two at once -----------------------------------------------------------------------------------

    def locked(self, job: Job, call: int) -> list[str]:
        """A second run while the first works: refused. When it was killed: goes on."""
        with self.folder(self.outcome.case) as folder:
            out = folder / "out"
            first = self.start(job, out, Fault(call, "stop"))
            first.wait(stopped=True)
            problems = []
            for restart in (False, True):
                second = self.run(job, out, restart=restart)
                text = (second.error or {}).get("text", "")
                if (second.error or {}).get(
                    "type"
                ) != "InputError" or f"process {first.pid} " not in text:
                    problems.append(f"{restart=}: the second was not refused: {second.short}")
            first.signal(signal.SIGKILL)
            ended = first.end()
            return problems + self._was_killed(ended) + self.go_on(job, out, ended)

    def overtaken(self, job: Job, call: int) -> list[str]:
        """The second begins, stands still, and goes on when the first is done with all of it."""
        with self.folder(self.outcome.case) as folder:
            out = folder / "out"
            second = self.start(job, out, Fault(call, "stop"))
            second.wait(stopped=True)
            first = self.run(job, out)
            second.signal(signal.SIGCONT)
            ended = second.end()
            # Who has the lock works; the other one is refused, or finds the finished result.
            problems = []
            for run in (first, ended):
                refused = run.error is not None and run.error["type"] == "InputError"
                if run.value is None and not refused:
                    problems.append(run.short)
            if first.value is None and ended.value is None:
                problems.append(f"neither ended well: {first.short} {ended.short}")
            return problems + self.same(job, out)

    def at_once(self, job: Job, count: int) -> list[str]:
        """Several at the same time: one works."""
        with self.folder(self.outcome.case) as folder:
            out = folder / "out"
            runs = [child.end() for child in [self.start(job, out) for _ in range(count)]]
            well = [run for run in runs if run.value is not None]
            wrong = [run.short for run in runs if run.error and run.error["type"] != "InputError"]
            worked = [run for run in well if not run.value["reused"]]
            if len(worked) != 1:
                wrong.append(f"{len(worked)} of {count} did the work")
            return wrong + self.same(job, out)

    # -- another machine ---------------------------------------------------------------------------

    def divided(self, job: Job) -> list[str]:
        """Goes on where memory is short: samples are run as the first process chose."""
        length = job.options()["calibration"].shape[1]
        with self.folder(self.outcome.case) as folder:
            out, other, third = self.middle(job, folder), folder / "other", folder / "third"
            ended = self.run(job, out, before=lambda: _limit(Limits(length, 1)))
            if ended.value is None or not ended.value["resumed"]:
                return [f"did not go on: {ended.short}"]
            problems = self.same(job, out)
            # One Hessian at a time gives the same bytes; fewer tokens at a time may not.
            ended = self.run(job, other, before=lambda: _limit(Limits(TOKENS, 1)))
            problems += self.same(job, other) if ended.value else [ended.short]
            ended = self.run(job, third, before=lambda: _limit(Limits(length)))
            self.outcome.differs = bool(ended.value and self.same(job, third))
            return problems

    # -- signals ---------------------------------------------------------------------------------------

    def signalled(self, job: Job, number: int, seconds: float, fresh: bool = False) -> list[str]:
        """The command line, interrupted; in a fork of this process, or in a `fresh` one."""
        with self.folder(self.outcome.case) as folder:
            source, errors = self.sources[job.model], folder / "stderr"
            options = ["--method", job.method, "--group-size", "32", "--calibration", "self"]
            options += ["--samples", "6", "--seq-len", "24"]
            command = ["quantize", str(source), "OUT", *options]

            def run(out: Path) -> tuple[Child | None, subprocess.Popen[bytes] | None]:
                words = [str(out) if word == "OUT" else word for word in command]
                if fresh:
                    with errors.open("wb") as file:
                        program = [sys.executable, "-m", "fewbits", *words]
                        return None, subprocess.Popen(program, stdout=file, stderr=file)
                return Child(_command_line(words, errors), self.work / f"report-{os.getpid()}"), None

            def finish(child: Child | None, process: subprocess.Popen[bytes] | None) -> Any:
                return child.end().value if child is not None else process.wait(180)  # type: ignore[union-attr]

            whole, out = folder / "whole", folder / "out"
            began = time.monotonic()
            if (code := finish(*run(whole))) != 0:
                return [f"undisturbed: exit code {code}: {errors.read_text()}"]
            whole_s = time.monotonic() - began
            child, process = run(out)
            time.sleep(seconds * whole_s)
            if child is not None:
                child.signal(number)
            elif process is not None:
                process.send_signal(number)
            code, text = finish(child, process), errors.read_text()
            problems = []
            if out.exists() and code in (0, 130, -number, None):
                pass  # it came when all was done: Python's end, or that of a fork, has no line to say
            elif code != 130 or len(text.strip().splitlines()) != 1 or "same command" not in text:
                problems.append(f"exit code {code}: {text!r}")
            elif "nothing was left" in text and self.left(out):
                problems.append(f"says {text!r}, and {self.left(out)} is there")
            if (code := finish(*run(out))) != 0:
                return [*problems, f"afterwards: exit code {code}: {errors.read_text()}"]
            without = ("run.json", "report.html")
            problems += compare_files(contents(whole, without), contents(out, without))
            return problems + [f"{name} was left behind" for name in self.left(out)]

    # -- another run -----------------------------------------------------------------------------------

    def other(self, job: Job) -> list[str]:
        """Other arguments, source or libraries than the unfinished run had: refused, nothing lost."""
        with self.folder(self.outcome.case) as folder:
            out = self.middle(job, folder)
            before = contents(partial(out), ("lock",))
            problems = []
            for what, words, options in self._others(job, folder):
                ended = self.run(job, out, **options)
                text = (ended.error or {}).get("text", "")
                if (ended.error or {}).get("type") != "InputError":
                    problems.append(f"{what}: not refused: {ended.short}")
                    if not partial(out).exists():
                        return problems
                elif not all(word in text for word in (*words, "--restart")) or "\n" in text:
                    problems.append(f"{what}: the message is {text!r}; {words} should be in it")
                if contents(partial(out), ("lock",)) != before:
                    problems.append(f"{what}: files that were kept were touched")
            return problems + self.go_on(job, out)

    def _others(self, job: Job, folder: Path) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
        ids = job.options()["calibration"].clone()
        ids[0, 0] = 3 + (ids[0, 0] - 2) % (VOCABULARY - 3)
        yield "one token", ["calibration"], {"calibration": ids}
        yield "fewer samples", ["calibration"], {"calibration": ids[:-1]}
        yield "override", ["override"], {"overrides": (("*.layers.0.*", None),)}
        if job.method == "llm-int8":
            inputs = InputScheme(threshold=4.0, static=True)
            yield "threshold", ["scheme"], {"scheme": QuantScheme(8, inputs=inputs)}
        else:
            method = "gptq" if job.method == "weighted-rtn" else "weighted-rtn"
            yield "method", ["method"], {"method": method}
            yield "bits", ["scheme"], {"scheme": QuantScheme(3, "group", 32)}
            yield "format", ["format"], {"format": "fewbits"}
        other = self._other_source(job, folder, "config")
        yield "another config", ["source"], {"source": other}
        other = self._other_source(job, folder, "values")
        yield "other values", ["was changed"], {"source": other}
        for name in ("fewbits", "torch", "transformers"):
            yield f"another {name}", [name, "0.0.1"], {"before": lambda name=name: _pretend(name)}

    def _other_source(self, job: Job, folder: Path, what: str) -> Path:
        """A copy with another config, or one other value in its weights, of the same size."""
        parent = folder / what
        parent.mkdir()
        source = Path(shutil.copytree(self.sources[job.model], parent / job.model))
        if what == "config":
            path = source / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
        else:
            path = source / "model.safetensors"
            _flip(path.stat().st_size - 2, 0)(path)
        return source


def partial(out: Path) -> Path:
    """Where an unfinished run keeps what it has."""
    return out.parent / f".{out.name}.partial"


def blocks_of(ended: Ended) -> list[int]:
    """That a run began."""
    return [said["block"] for said in ended.said]


def compare_files(expected: dict[str, bytes], got: dict[str, bytes]) -> list[str]:
    """Names of files that differ."""
    names = sorted(expected.keys() | got.keys())
    return [f"{name} differs" for name in names if expected.get(name) != got.get(name)]


def _is_step(path: str) -> bool:
    return Path(path).name.startswith("step-") and "." not in Path(path).name


def _flip(place: int, bit: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 1 << bit
        path.write_bytes(data)

    return flip


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _verify(out: Path, name: str) -> str:
    try:
        fewbits.verify(out)
    except fewbits.VerificationError as error:
        return "" if name in str(error) else f"said {error}"
    return "not found"


def _limit(limits: Limits) -> None:
    """As where memory is short."""
    plan_memory = fewbits.steps.plan_memory

    def plan(*args: Any) -> Any:
        return replace(plan_memory(*args), limits=limits)

    fewbits.steps.plan_memory = plan


def _pretend(name: str) -> None:
    """Another version of a library, whoever asks."""
    real = importlib.metadata.version

    def version(asked: str) -> str:
        return "0.0.1" if asked == name else real(asked)

    importlib.metadata.version = version
    for module in list(sys.modules.values()):
        if getattr(module, "version", None) is real:
            module.version = version  # type: ignore[attr-defined]
    if name == "torch":
        torch.__version__ = type(torch.__version__)("0.0.1")
    if name == "transformers":
        transformers.__version__ = "0.0.1"


def _command_line(words: list[str], errors: Path) -> Callable[[Say], Any]:
    """`fewbits` with these arguments; its exit code."""

    def run(_: Callable[[Any], None]) -> Any:
        from fewbits.cli import app

        with errors.open("wb") as file:
            os.dup2(file.fileno(), 2)
            os.dup2(file.fileno(), 1)
        sys.argv = ["fewbits", *words]
        try:
            app()
        except SystemExit as left:
            return left.code or 0
        except KeyboardInterrupt:
            return "KeyboardInterrupt"
        return 0

    return run


def _add_tokenizer(folder: Path) -> None:
    """Of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 1]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.save_pretrained(folder)
