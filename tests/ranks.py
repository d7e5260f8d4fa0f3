"""Ranks on this machine: forks of a process that has imported everything, which quantize together.

As a program it reads rounds of jobs as JSON and does them, one round after the other, the groups of a
round at a time. It never had a second thread, so that its forks may have some.

    {"count": 3, "out": "a", "method": "gptq", "model": "llama", "kill": [1, 4]}

`kill` is a rank and the exchange before which it is killed, `stop` the same of one that only stands
still, `limit` the seconds without a sign of life; `stats` is a folder of statistics of the llama. With
`evaluate`, a reference, a model is compared with that.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tqdm

from fewbits import QuantScheme, evaluate, measure, quantize
from fewbits.calibration import Calibration
from fewbits.errors import FewbitsError
from fewbits.ranks import _Joined, join
from models import VOCABULARY, tiny_checkpoint

SHARD = 60_000  # bytes of a weight file: several of them, and an index
LIMIT_S = 30.0
_WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 3}),
    "mixtral": ("mixtral", {}),
    "wide": ("llama", _WIDE),  # whose Hessians and codes are more than what is said of them
}


def free_port() -> int:
    """Of this host."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def ids(samples: int = 11) -> torch.Tensor:
    """Calibration: more samples than parts, and parts of one and two samples."""
    return torch.randint(3, VOCABULARY, (samples, 24), generator=torch.Generator().manual_seed(1))


def quantize_job(job: dict[str, Any], work: Path, ranks: Any) -> None:
    """One run, by all ranks."""
    method = job["method"]
    quantize(
        work / job["model"],
        work / job["out"],
        method=method,
        scheme=None if method == "llm-int8" or "bits_per_weight" in job else QuantScheme(4, "group", 32),
        calibration=None if method == "rtn" or job.get("stats") else ids(job.get("samples", 11)),
        statistics=work / job["stats"] if job.get("stats") else None,
        # Blocks that learn begin with the codes of the embedding.
        embeddings="learned" in method,
        format="fewbits" if "learned" in method else None,
        max_shard_bytes=SHARD,
        bits_per_weight=job.get("bits_per_weight"),
        ranks=ranks,
    )


def run_rank(group: list[dict[str, Any]], work: Path) -> None:
    """The jobs of a group, which have equally many ranks; the last of them may be hurt."""
    fault = group[-1]
    with join(fault.get("limit", LIMIT_S)) as ranks:
        for job in group:
            for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
                if job.get(name, [None])[0] == ranks.rank:
                    hurt(job[name][1], number)
            if job.get("raise") == ranks.rank:
                raise OSError("the disk of this rank failed")
            if job.get("evaluate"):
                found = evaluate(
                    work / job["model"],
                    work / job["evaluate"],
                    text=Calibration(ids(400), "ids", 0),
                    length=job["length"],
                    ranks=ranks,
                )
                value = json.dumps(found.to_json(per_window=True))
                (work / f"{job['out']}-{ranks.rank}").write_text(value)
                continue
            before = ranks.received_bytes
            quantize_job(job, work, ranks)
            received = work / f"received-{job['out']}-{ranks.rank}"
            received.write_text(str(ranks.received_bytes - before))


def hurt(exchange: int, number: signal.Signals, later_s: float = 0.0) -> None:
    """Send a signal to this process at that exchange from now on, or so much later."""
    call, done = _Joined._call, [0]

    def counted(self: Any, *arguments: Any) -> None:
        if done[0] == exchange and later_s:
            timer = threading.Timer(later_s, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        elif done[0] == exchange:
            os.kill(os.getpid(), number)
        done[0] += 1
        call(self, *arguments)

    _Joined._call = counted  # type: ignore[method-assign]


def start_group(group: list[dict[str, Any]], work: Path, name: str) -> dict[int, int]:
    """Fork the ranks of a group; which rank each process is."""
    return fork_ranks(group[0]["count"], work / name, lambda: run_rank(group, work))


def fork_ranks(count: int, said_at: Path, run: Callable[[], None]) -> dict[int, int]:
    """Fork so many ranks; which rank each process is. What they say goes to files, beginning so."""
    port, found = free_port(), {}
    for rank in range(count):
        pid = os.fork()
        if pid:
            found[pid] = rank
            continue
        own = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in own.items()})
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        assert os.environ.get("TORCH_CPP_LOG_LEVEL") == "FATAL"  # as fewbits sets it for a rank
        said = os.open(f"{said_at}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(said, 2)
        code = 0
        try:
            run()
        except FewbitsError as error:
            os.write(2, f"refused: {error}\n".encode())
            code = error.exit_code
        except OSError:
            code = 1
        except BaseException:
            traceback.print_exc()
            code = 99
        os._exit(code)
    return found


def run_round(groups: list[list[dict[str, Any]]], work: Path, name: str) -> list[list[dict[str, Any]]]:
    """All groups at a time; of each rank its exit code, when it ended, and what it said."""
    began, running = time.monotonic(), {}
    for i, group in enumerate(groups):
        for pid, rank in start_group(group, work, f"{name}-{i}").items():
            running[pid] = i, rank
    ended: list[list[dict[str, Any]]] = [[{}] * group[0]["count"] for group in groups]
    left = {i: group[0]["count"] for i, group in enumerate(groups)}
    while running:
        pid, status = os.wait()
        i, rank = running.pop(pid)
        said = (work / f"{name}-{i}-{rank}").read_text()
        code = os.waitstatus_to_exitcode(status)
        ended[i][rank] = {"code": code, "seconds": time.monotonic() - began, "said": said}
        left[i] -= 1
        if left[i] == 1 and "stop" in groups[i][-1]:  # who stands still is left
            for other, (group, _) in running.items():
                if group == i:
                    os.kill(other, signal.SIGKILL)
    return ended


def main() -> None:
    """Make the models, then do the rounds; the outcomes go to a file."""
    work, rounds = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread of its own
    for name, (model_type, changes) in MODELS.items():
        tiny_checkpoint(work / name, model_type, **changes)
    if "stats" in sys.argv[2]:
        measure(work / "llama", work / "stats", calibration=ids())
    assert threading.active_count() == 1, threading.enumerate()
    outcomes = [run_round(groups, work, f"round-{i}") for i, groups in enumerate(rounds)]
    (work / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
