"""One linear of 4096 x 4096: time and memory of each kernel against PyTorch's bfloat16, in one run.

LLM.int8() also against `torch._int_mm` on the codes alone: what rounding, scaling and outliers cost.

Weights rotate over more memory than any cache holds, as in a model. Ratios are asserted, times are
only shown: `make bench`, with nothing else running.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits import QuantizedLinear, QuantScheme
from fewbits.methods import LLMInt8
from fewbits.speed import tensor_bytes

WIDTH, COPIES, REPEATS = 4096, 8, 5
ROWS = (1, 4, 16, 512)
SCHEMES = ("w8-channel", "w4-g128", "w4-g128-asym", "w3-g128")
INT8 = ("w8-channel-a8-token", "w8-channel-a8-token-t6", "w8-channel-a8-token-t6-static")
INT8_ROWS, OUTLIERS = (1, 16, 512), 40  # the paper (section 3.2) finds at most 7 up to 13B


def median_s(call: Callable[[Any], object], modules: Sequence[Any]) -> float:
    """Seconds per call, the median over rounds through all modules (or operands)."""
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


@torch.no_grad()
def measure_int8(threads: int) -> dict[str, dict[str, float]]:
    """For LLM.int8(): the time of bf16, and of `_int_mm`, over its own at each number of rows."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    floats = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(COPIES)]
    absmax = torch.full((WIDTH,), 4.0)
    absmax[torch.randperm(WIDTH)[:OUTLIERS]] = 60
    results = {}
    for label in INT8:
        scheme = QuantScheme.parse(label)
        method = LLMInt8(scheme.inputs is not None and scheme.inputs.static)
        packed = [
            QuantizedLinear(method(linear.weight, scheme, {"absmax": absmax})[0]) for linear in floats
        ]
        codes = [linear.get_buffer("kernel.codes").t() for linear in packed]
        result = {"bytes": tensor_bytes(packed[0]) / tensor_bytes(floats[0])}
        for rows in INT8_ROWS:
            x = ((2 * torch.rand(rows, WIDTH) - 1) * absmax).bfloat16()
            integers = torch.randint(-127, 128, (rows, WIDTH), dtype=torch.int8)
            slow, bare = [], []
            for _ in range(3):  # alternate, so that a slow moment hits all three
                own = median_s(lambda module, x=x: module(x), packed)
                slow.append(median_s(lambda module, x=x: module(x), floats) / own)
                bare.append(median_s(lambda b, a=integers: torch._int_mm(a, b), codes) / own)
            result[f"speed at {rows} rows"] = statistics.median(slow)
            result[f"over _int_mm at {rows} rows"] = statistics.median(bare)
        results[label] = result
        print(label, {key: round(value, 3) for key, value in result.items()}, flush=True)
    return results


def check(results: dict[str, dict[str, float]]) -> None:
    """The ratios that must hold on any machine whose memory is slower than its arithmetic."""
    assert results["w8-channel"]["bytes"] <= 0.52
    assert results["w4-g128"]["bytes"] <= 0.27
    assert results["w4-g128"]["speed at 1 rows"] > results["w8-channel"]["speed at 1 rows"] > 0.8
    assert results["w4-g128"]["speed at 1 rows"] > 2
    for label in INT8:
        assert results[label]["bytes"] <= 0.53
        dynamic = "-t" in label and not label.endswith("static")
        # Columns found in each call are gathered from the codes: too slow at 16 rows, as `plan` says.
        fast = [rows for rows in INT8_ROWS if not (dynamic and rows == 16)]
        assert all(results[label][f"speed at {rows} rows"] >= 1 for rows in fast)
        assert results[label]["over _int_mm at 512 rows"] >= 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    results = measure(args.threads) | measure_int8(args.threads)
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
