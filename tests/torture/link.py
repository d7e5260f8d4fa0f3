"""Two ranks in two network namespaces, joined by a link that is cut in the middle of a block.

Both must stop within the limit, each with one line that names the other; the same command with the link
whole again ends in the bytes of a single process. Needs root and `ip` (iproute2).

Run:  python tests/torture/link.py
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from models import VOCABULARY, tiny_checkpoint

SPACES = ("fewbits-0", "fewbits-1")
LINKS, ADDRESSES = ("fewbits-v0", "fewbits-v1"), ("10.213.77.1", "10.213.77.2")
SLACK_S = 10.0  # beyond the limit: to notice, to say it, to end a process on a busy machine
_RUN = """
import fewbits
import sys, torch
torch.set_num_threads(1)
from fewbits.errors import FewbitsError
from fewbits.ranks import join
folder, out, limit, samples, length, vocabulary = sys.argv[1:]
draw = torch.Generator().manual_seed(1)
ids = torch.randint(3, int(vocabulary), (int(samples), int(length)), generator=draw)
with join(float(limit)) as ranks:
    fewbits.quantize(folder, out, method="gptq", scheme=fewbits.QuantScheme(4, "group", 32),
                     calibration=ids, ranks=ranks)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def link() -> Iterator[None]:
    """Two namespaces and what joins them."""
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
    try:
        for space in SPACES:
            ip("netns", "add", space)
        ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1])
        for space, name, address in zip(SPACES, LINKS, ADDRESSES, strict=True):
            ip("link", "set", name, "netns", space)
            ip("-n", space, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", space, "link", "set", name, "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def start(arguments: list[str], rank: int, work: Path, port: int) -> subprocess.Popen[str]:
    """A rank in its namespace."""
    own = {
        "RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": LINKS[rank], "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    command = ["ip", "netns", "exec", SPACES[rank], sys.executable, "-c", _RUN, *arguments]
    said = (work / f"said-{rank}").open("w")
    environment = os.environ | {key: str(value) for key, value in own.items()}
    return subprocess.Popen(command, stderr=said, env=environment, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def check(work: Path, limit: float) -> list[str]:
    """What is wrong."""
    model, alone, out = work / "model", work / "alone", work / "out"
    tiny_checkpoint(model, "llama", num_hidden_layers=6)
    # Large enough that the link can be cut within a block.
    rest = [str(limit), "200", "64", str(VOCABULARY)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", _RUN, model, alone, *rest], check=True, env=environment)
    problems = []
    with link():
        ranks = [start([str(model), str(out), *rest], rank, work, 29611) for rank in (0, 1)]
        partial = work / ".out.partial"
        until = time.monotonic() + 120
        while not (partial / "step-00002.json").exists():  # of block 1: block 2 is under way
            if time.monotonic() > until or any(rank.poll() is not None for rank in ranks):
                return ["the run did not begin: " + (work / "said-0").read_text()]
            time.sleep(0.02)
        ip("-n", SPACES[1], "link", "set", LINKS[1], "down")
        began = time.monotonic()
        for number, rank in enumerate(ranks):
            try:
                code = rank.wait(limit + SLACK_S - (time.monotonic() - began))
            except subprocess.TimeoutExpired:
                problems.append(f"rank {number} did not stop within {limit + SLACK_S:g} s")
                rank.kill()
                continue
            seconds = time.monotonic() - began
            if seconds > limit >= 10:
                problems.append(f"rank {number} stopped {seconds:.1f} s after the cut")
            lines = (work / f"said-{number}").read_text().splitlines()
            print(f"rank {number} stopped {seconds:.1f} s after the cut, exit code {code}: {lines}")
            if code != 1 or len(lines) != 1 or f"rank {1 - number} on" not in lines[0]:
                problems.append(f"rank {number} ended with {code} and said {lines}")
        if out.exists():
            return [*problems, "the run was over before the link was cut"]
        steps = len(list(partial.glob("step-*.json")))
        ip("-n", SPACES[1], "link", "set", LINKS[1], "up")
        ranks = [start([str(model), str(out), *rest], rank, work, 29612) for rank in (0, 1)]
        codes = [rank.wait(300) for rank in ranks]
    if codes != [0, 0]:
        return [*problems, f"the rerun ended with {codes}: {(work / 'said-0').read_text()}"]
    print(f"went on after {steps} of 7 steps")
    return problems + (["other bytes"] if contents(out) != contents(alone) else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=10.0, help="seconds without a sign of life")
    options = parser.parse_args()
    if shutil.which("ip") is None or os.geteuid() != 0:
        print("skipped: needs root and `ip` of iproute2")
        return 0
    with tempfile.TemporaryDirectory(prefix="link-") as folder:
        problems = check(Path(folder), options.limit)
    print("\n".join(problems) or "byte-identical")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
