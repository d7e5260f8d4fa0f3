"""`make torture`: runs that are killed, and disks that fail, at hundreds of moments.

    python tests/torture/run.py [--few] [--only GLOB] [--seed N] [--json FILE] [--list]

Ends with one line of what was done, and exit code 1 if anything was wrong. A case that failed is run
again by `--only` and its name, with the seed that the last line tells.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import argparse
import errno
import fnmatch
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `models`

os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # read when torch is imported; fewbits sets it for ranks

import torch
import tqdm

torch.set_num_threads(1)  # a pool of threads does not live on in a fork
tqdm.tqdm.monitor_interval = 0  # nor does its thread

from cases import JOBS, Bench, Outcome  # noqa: E402
from faults import FAILING, Fault  # noqa: E402

import fewbits.cli  # noqa: E402

WORKERS = 2
# Kills of each job: at calls, and at times. 200 together.
KILLS = {
    "gptq:llama": (32, 14), "gptq:mixtral": (20, 10), "awq:llama": (20, 10),
    "awq+gptq:qwen3_moe": (20, 10), "weighted-rtn:llama": (16, 8), "llm-int8:llama": (16, 8),
    "rtn:mixtral": (12, 4),
}  # fmt: skip
FEW = {"gptq:llama": (11, 4), "gptq:mixtral": (7, 3)}
# One of three ranks, at an exchange and up to so many seconds later.
RANKS = {"gptq:llama": 14, "gptq:mixtral": 12, "awq+gptq:qwen3_moe": 12, "rtn:mixtral": 12}
_LATER_S = 0.15
HALVES = ("write", "posix_fallocate")
FULL = {"gptq:llama": 70, "awq+gptq:qwen3_moe": 60, "rtn:mixtral": 40}
Case = Callable[[], list[str]]


def main() -> int:
    """Run all cases, two at a time."""
    options = _arguments()
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        bench, few = Bench(work), ("journal:llama", *FEW)
        for name in options.jobs.split(",") if options.jobs else few if options.few else JOBS:
            bench.refer(JOBS[name])
        cases = dict(_few(bench, options.seed) if options.few else _all(bench, options.seed))
        cases = {name: case for name, case in cases.items() if fnmatch.fnmatchcase(name, options.only)}
        if options.list:
            print("\n".join(cases))
            return 0
        assert threading.active_count() == 1, threading.enumerate()
        outcomes = _run_all(bench, cases)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    _summarize(outcomes, time.monotonic() - began, options.seed)
    return int(any(outcome.problems for outcome in outcomes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", action="store_true", help="the part that is in the test run")
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of cases")
    parser.add_argument("--seed", type=int, default=0, help="of moments that are drawn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what became of each case")
    parser.add_argument("--list", action="store_true", help="only tell the names")
    parser.add_argument("--jobs", metavar="NAME,...", help="only these")
    return parser.parse_args()


# -- which cases -----------------------------------------------------------------------------------


def _all(bench: Bench, seed: int) -> Iterator[tuple[str, Case]]:
    jobs, every = bench.references, {"journal:llama": 10**6}
    yield from _powers(bench, every, seed)
    yield from _powers(bench, every, seed + 1000)
    yield from _fulls(bench, every)
    yield from _again(bench, every | {"gptq:llama": 20})
    yield from _bare(bench)
    yield from _locks(bench, ["journal:llama"], 20)
    yield from _kills(bench, KILLS, seed)
    yield from _ranks(bench, RANKS, seed)
    yield from _restarts(bench, {"gptq:llama": 14, "rtn:mixtral": 14})
    yield from _powers(bench, {"gptq:llama": 40, "rtn:mixtral": 20}, seed)
    yield from _fulls(bench, FULL)
    for name, count in _ran(bench, {"gptq:llama": 4, "rtn:mixtral": 4}):
        for call in _spread(range(len(jobs[name].calls)), count):
            yield f"tmpfs/{name}/{call}", partial(bench.really_full, JOBS[name], call)
    for name in jobs:
        yield f"stutter/{name}", partial(bench.stutters, JOBS[name])
        if name in ("gptq:llama", "awq+gptq:qwen3_moe", "llm-int8:llama", "rtn:mixtral"):
            yield f"changed/{name}", partial(bench.changed, JOBS[name], 3)
        if name != "journal:llama":
            yield f"finished/{name}", partial(bench.finished, JOBS[name], 3)
        if name not in ("journal:llama", "rtn:mixtral"):  # the others are about calibration too
            yield f"other/{name}", partial(bench.other, JOBS[name])
            yield f"divided/{name}", partial(bench.divided, JOBS[name])
    yield from _locks(bench, ["gptq:llama", "rtn:mixtral"], 6)
    yield from _signals(bench, ["gptq:llama", "awq:llama"], seed, 8, 2)


def _bare(bench: Bench) -> Iterator[tuple[str, Case]]:
    """The journal alone, at every call."""
    for name, _ in _ran(bench, {"journal:llama": 0}):
        for call, (what, _) in enumerate(bench.references[name].calls):
            for how in ("kill", "half") if what in HALVES else ("kill",):
                case = partial(bench.killed, JOBS[name], Fault(call, how), call % 3)
                yield f"bare/{call}/{what}/{how}/{call % 3}", case
        yield f"notices/{name}", partial(bench.notices, JOBS[name])
        yield f"changed/{name}", partial(bench.changed, JOBS[name], 10)
        for file in ("request.json", "step-00002.json"):
            yield f"every-bit/{name}/{file}", partial(bench.every_bit, JOBS[name], file)


def _few(bench: Bench, seed: int) -> Iterator[tuple[str, Case]]:
    yield "notices/journal:llama", partial(bench.notices, JOBS["journal:llama"])
    yield from _powers(bench, {"journal:llama": 10}, seed)
    yield from _kills(bench, FEW, seed, (0, 0, 0, 0, 0, 2))
    yield from _ranks(bench, {"gptq:llama": 3}, seed)
    yield from _restarts(bench, {"gptq:llama": 1})
    yield from _fulls(bench, {"gptq:llama": 10})
    yield "changed/gptq:llama", partial(bench.changed, JOBS["gptq:llama"], 0, False)
    yield "finished/gptq:llama", partial(bench.finished, JOBS["gptq:llama"], 0)
    yield "other/gptq:llama", partial(bench.other, JOBS["gptq:llama"])
    yield from _locks(bench, ["gptq:llama"], 1)
    yield from _signals(bench, ["gptq:llama"], seed, 2, 0)


def _kills(
    bench: Bench, counts: dict[str, tuple[int, int]], seed: int, again: tuple[int, ...] = (0, 0, 1, 0, 3)
) -> Iterator[tuple[str, Case]]:
    """At calls, evenly, some of them `again` on the way; and at times."""
    for name, (at_calls, at_times) in _ran(bench, counts):
        reference, draw = bench.references[name], random.Random(f"{seed} {name}")
        for i, call in enumerate(_spread(range(len(reference.calls)), at_calls)):
            what = reference.calls[call][0]
            how = "half" if what in HALVES and i % 2 else "kill"
            more = again[i % len(again)]
            case = partial(bench.killed, JOBS[name], Fault(call, how), more)
            yield f"kill/{name}/{call}/{what}/{how}/{more}", case
        for _ in range(at_times):
            seconds = draw.uniform(0, reference.seconds)
            yield f"time/{name}/{seconds:.4f}", partial(bench.killed_after, JOBS[name], seconds)


def _ranks(bench: Bench, counts: dict[str, int], seed: int) -> Iterator[tuple[str, Case]]:
    """One of three ranks is killed; then one to four go on."""
    for name, count in _ran(bench, counts):
        exchanges, draw = bench.exchanges(JOBS[name], 3), random.Random(f"{seed} {name} ranks")
        for i in range(count):
            later = draw.choice((0.0, draw.uniform(0, _LATER_S)))
            fault = draw.randrange(3), draw.randrange(exchanges * 9 // 10), later
            case = partial(bench.rank_killed, JOBS[name], 3, fault, 1 + i % 4)
            yield f"ranks/{name}/{fault[0]}/{fault[1]}/{later:.3f}/{1 + i % 4}", case


def _restarts(bench: Bench, counts: dict[str, int]) -> Iterator[tuple[str, Case]]:
    """Among the first calls, where things are thrown away."""
    for name, count in _ran(bench, counts):
        for call in _spread(range(30), count):
            for finished in (True, False):
                case = partial(bench.restarted, JOBS[name], call, finished)
                yield f"restart/{name}/{call}/{'finished' if finished else 'unfinished'}", case


def _powers(bench: Bench, counts: dict[str, int], seed: int) -> Iterator[tuple[str, Case]]:
    for name, count in _ran(bench, counts):
        for call in _spread(range(len(bench.references[name].calls)), count):
            case = partial(bench.killed, JOBS[name], Fault(call, "power", seed=seed + call))
            yield f"power/{name}/{call}/{seed + call}", case


def _fulls(bench: Bench, counts: dict[str, int]) -> Iterator[tuple[str, Case]]:
    for name, count in _ran(bench, counts):
        calls = bench.references[name].calls
        failing = [i for i, (what, _) in enumerate(calls) if what in FAILING]
        for i, call in enumerate(_spread(failing, count)):
            how = ("full", "fail")[i % 2]
            error = "EIO" if i % 5 == 4 else "ENOSPC"
            case = partial(bench.fails, JOBS[name], Fault(call, how, getattr(errno, error)))
            yield f"full/{name}/{call}/{calls[call][0]}/{how}/{error}", case


def _again(bench: Bench, counts: dict[str, int]) -> Iterator[tuple[str, Case]]:
    """On the way from what a killed run left: fewer calls than from the start."""
    for name, count in _ran(bench, counts):
        for call in _spread(range(len(bench.references[name].calls) * 2 // 3), count):
            case = partial(bench.fails_again, JOBS[name], Fault(call, ("full", "fail")[call % 2]))
            yield f"full-again/{name}/{call}", case


def _locks(bench: Bench, names: list[str], count: int) -> Iterator[tuple[str, Case]]:
    for name in [name for name in names if name in bench.references]:
        calls = bench.references[name].calls
        held = next(
            i for i, (what, path) in enumerate(calls) if (what, Path(path).name) == ("write", "lock")
        )
        moved = max(i for i, (what, _) in enumerate(calls) if what == "replace")  # to the trash
        for call in _spread(range(held + 1, moved), count):
            yield f"lock/{name}/{call}", partial(bench.locked, JOBS[name], call)
        for call in range(held + 2 if count > 1 else 1):
            yield f"overtaken/{name}/{call}", partial(bench.overtaken, JOBS[name], call)
        for count_at_once in range(2, 2 + count):
            yield f"at-once/{name}/{count_at_once}", partial(bench.at_once, JOBS[name], count_at_once)


def _signals(
    bench: Bench, names: list[str], seed: int, forks: int, fresh: int
) -> Iterator[tuple[str, Case]]:
    for name in [name for name in names if name in bench.references]:
        draw = random.Random(f"{seed} {name}")
        for i in range(forks + fresh):
            number = (signal.SIGINT, signal.SIGTERM)[i % 2]
            # Python itself takes some of the time of a process that is not forked.
            part = draw.uniform(0.1, 1) if i < forks else draw.uniform(0.8, 1)
            case = partial(bench.signalled, JOBS[name], number, part, i >= forks)
            yield f"{number.name}/{name}/{'fork' if i < forks else 'fresh'}/{part:.3f}", case


def _ran(bench: Bench, counts: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, count) for name, count in counts.items() if name in bench.references]


def _spread(items: range | list[int], count: int) -> list[int]:
    """As many of the items, evenly."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


# -- running them ----------------------------------------------------------------------------------


def _run_all(bench: Bench, cases: dict[str, Case]) -> list[Outcome]:
    """Two at a time, each in a fork of its own."""
    waiting, running, outcomes = list(cases.items()), {}, []
    while waiting or running:
        while waiting and len(running) < WORKERS:
            name, case = waiting.pop(0)
            report = bench.work / f"outcome-{len(waiting)}"
            running[_fork(bench, name, case, report)] = (name, report)
        pid, _ = os.wait()
        name, report = running.pop(pid)
        try:
            outcome = Outcome(**json.loads(report.read_text()))
        except (OSError, ValueError) as error:
            outcome = Outcome(name, [f"the case itself died: {error}"])
        outcomes.append(outcome)
        for problem in outcome.problems:
            print(f"{name}: {problem}", flush=True)
    return outcomes


def _fork(bench: Bench, name: str, case: Case, report: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    outcome = bench.outcome = Outcome(name)
    began = time.monotonic()
    try:
        outcome.problems = case()
    except BaseException:
        outcome.problems = [traceback.format_exc()]
    outcome.seconds = time.monotonic() - began
    report.write_text(json.dumps(asdict(outcome)))
    os._exit(0)


def _summarize(outcomes: list[Outcome], seconds: float, seed: int) -> None:
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.case.split("/")[0], []).append(outcome)
    parts = [f"{kind} {sum(not o.problems for o in own)}/{len(own)}" for kind, own in kinds.items()]
    killed = [outcome for outcome in outcomes if outcome.case.startswith(("kill/", "time/"))]
    good = sum(not outcome.problems for outcome in killed)
    kills, repeated = sum(o.kills for o in killed), max((o.repeated for o in outcomes), default=0)
    print(
        f"killed at {len(killed)} moments ({kills} kills with those on the way), "
        f"{good} byte-identical, blocks repeated at most {repeated}, {seconds:.0f} s, "
        f"seed {seed}; {', '.join(parts)}"
        f"; of three ranks one killed {sum(o.kills for o in kinds.get('ranks', []))} times"
        f"; fewer tokens at a time give other bytes: {sum(o.differs for o in kinds.get('divided', []))}"
    )


if __name__ == "__main__":
    assert fewbits.cli  # imported before the forks
    sys.exit(main())
