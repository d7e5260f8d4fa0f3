"""One linear of 4096 x 4096: time and memory of each kernel against PyTorch's bfloat16, in one run.

Weights rotate over more memory than any cache holds, as in a model. Ratios are asserted, times are
only shown: `make bench`, with nothing else running.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fewbits import QuantizedLinear, QuantScheme
from fewbits.speed import tensor_bytes

WIDTH, COPIES, REPEATS = 4096, 8, 5
ROWS = (1, 4, 16, 512)
SCHEMES = ("w8-channel", "w4-g128", "w4-g128-asym", "w3-g128")


def median_s(call: Callable[[nn.Module], object], modules: list[nn.Module]) -> float:
    """Seconds per call, the median over rounds through all modules."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        for module in modules:
            call(module)
        times.append((time.perf_counter() - began) / len(modules))
    return statistics.median(times[1:])


@torch.no_grad()
def measure(threads: int) -> dict[str, dict[str, float]]:
    """For every scheme: bytes over bf16's, and bf16's time over its own at each number of rows."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    floats = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(COPIES)]
    inputs = {rows: torch.randn(rows, WIDTH, dtype=torch.bfloat16) for rows in ROWS}
    results = {}
    for label in SCHEMES:
        scheme = QuantScheme.parse(label)
        packed = [QuantizedLinear.from_float(linear, scheme) for linear in floats]
        result = {"bytes": tensor_bytes(packed[0]) / tensor_bytes(floats[0])}
        for rows, x in inputs.items():
            ratios = []
            for _ in range(3):  # alternate, so that a slow moment hits both
                slow = median_s(lambda module, x=x: module(x), floats)
                ratios.append(slow / median_s(lambda module, x=x: module(x), packed))
            result[f"speed at {rows} rows"] = statistics.median(ratios)
        results[label] = result
        print(label, {key: round(value, 3) for key, value in result.items()}, flush=True)
    return results


def check(results: dict[str, dict[str, float]]) -> None:
    """The ratios that must hold on any machine whose memory is slower than its arithmetic."""
    assert results["w8-channel"]["bytes"] <= 0.52
    assert results["w4-g128"]["bytes"] <= 0.27
    assert results["w4-g128"]["speed at 1 rows"] > results["w8-channel"]["speed at 1 rows"] > 0.8
    assert results["w4-g128"]["speed at 1 rows"] > 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    results = measure(args.threads)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "command": f"python benchmarks/linears.py --threads {args.threads}",
        "commit": commit,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "ratios to bfloat16": results,
    }
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    check(results)


if __name__ == "__main__":
    main()
