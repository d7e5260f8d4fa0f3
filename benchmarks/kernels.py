"""The native kernels against their limit: how fast memory can be read, measured beside them; and against
PyTorch's bfloat16 where there are several rows.

Weights rotate over more memory than any cache holds, as in a model, and few rows are multiplied as a
step of `generate()` does it: with threads that stay awake from one product to the next. Asserted are
ratios of this run, each the median of several taken in turn. Nothing else may run on the machine. Most
processors have no AMX: `--without-amx` measures them on one that has, PyTorch's side too.

Run:  python benchmarks/kernels.py [--threads 2] [--without-amx] [--json OUT] [--plot OUT.svg]
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewbits.kernels import Native, NativeInt8
from fewbits.native import library, summary, why_absent
from fewbits.scheme import QuantScheme
from fewbits.tensor import quantize_tensor

SHAPES = ((4096, 4096), (2048, 8192))
SCHEMES = (
    "w4-g128", "w4-g128-asym", "w4-g32", "w8-channel", "w3-g128", "w2-g128",
    "w4-g128-trellis", "w3-g128-trellis", "w2-g128-trellis",
)  # fmt: skip
ROWS = (2, 4, 8, 16, 32, 64, 512)
KERNELS = {"16-bit inputs": Native, "int8 inputs": NativeInt8}
FEW_ROWS = 8  # of a step that is run together
CACHES = 600e6  # bytes of weights that are gone through; the largest cache seen has 480 MB
ROUNDS = 5
# Shares of the streaming read at one row, and times as fast as bfloat16 at more (with int8 inputs; the
# second number with 16-bit ones).
LEAST_SHARE = {
    "w4-g128": (0.9, 0.8),
    "w8-channel": (0, 0.9),
    "w3-g128": (0.7, 0.7),
    "w2-g128": (0.7, 0.7),
    "w4-g128-trellis": (0.85, 0.7),
}
LEAST_SPEED = {
    2: (4, 4),
    4: (4, 4),
    8: (3, 0),
    16: (2, 0),
    32: (1.2, 0),
    64: (1.2, 0.9),
    512: (1.2, 0.9),
}


def seconds(call: Callable[[int], object], times: int) -> float:
    """The median of one call."""
    taken = []
    for i in range(times):
        began = time.perf_counter()
        call(i)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def seconds_of_ours(kernels: list[Native], x: Tensor, times: int) -> float:
    """Of one product, as `QuantizedLinear` asks for it, in a step where there are few rows."""
    found = library()
    assert found is not None

    def measured() -> float:
        return seconds(lambda i: kernels[i % len(kernels)].forward(x), times)

    return found.together(measured) if len(x) <= FEW_ROWS else measured()


def copies(kernel: Native) -> list[Native]:
    """As many as fill more than a cache."""
    size = sum(buffer.nbytes for buffer in kernel.buffers())
    return [copy.deepcopy(kernel) for _ in range(max(2, int(CACHES / size)))]


def share_of_stream(kernels: list[Native], x: Tensor, memory: Tensor) -> tuple[float, float]:
    """Bytes a second over those of the read that was timed just before, and bytes a second."""
    found, size = library(), sum(buffer.nbytes for buffer in kernels[0].buffers())
    assert found is not None
    shares, rates = [], []
    for _ in range(ROUNDS):
        stream = memory.nbytes / seconds(lambda _: found.stream(memory), 2)
        rate = size / seconds_of_ours(kernels, x, 3 * len(kernels))
        shares.append(rate / stream)
        rates.append(rate)
    return statistics.median(shares), statistics.median(rates)


def times_as_fast(kernels: list[Native], floats: list[Tensor], x: Tensor) -> float:
    """As `F.linear` in bfloat16 on the same inputs."""
    repeats = 5 if len(x) > 64 else 20
    ratios = []
    for _ in range(ROUNDS):
        slow = seconds(lambda i: torch.nn.functional.linear(x, floats[i % len(floats)]), repeats)
        ratios.append(slow / seconds_of_ours(kernels, x, repeats))
    return statistics.median(ratios)


@torch.no_grad()
def measure() -> list[dict[str, object]]:
    """A row for each shape, scheme and kernel."""
    torch.manual_seed(0)
    memory = torch.ones(512 * 2**20, dtype=torch.uint8)
    found: list[dict[str, object]] = []
    for shape in SHAPES:
        floats = [torch.randn(shape, dtype=torch.bfloat16)]
        floats += [floats[0].clone() for _ in range(int(CACHES / floats[0].nbytes))]
        for label in SCHEMES:
            weight = quantize_tensor(floats[0], QuantScheme.parse(label))
            for name, kernel_class in KERNELS.items():
                if kernel_class.refuses(weight, torch.bfloat16, torch.device("cpu")):
                    continue
                kernels = copies(kernel_class(weight, torch.bfloat16, torch.device("cpu")))
                one = torch.randn(1, shape[1], dtype=torch.bfloat16)
                share, rate = share_of_stream(kernels, one, memory)
                row: dict[str, object] = {
                    "shape": f"{shape[0]} x {shape[1]}", "scheme": label, "kernel": name,
                    "threads": torch.get_num_threads(), "share of the streaming read": round(share, 3),
                    "GB/s": round(rate / 1e9, 1),
                }  # fmt: skip
                if label.startswith("w4") and shape == SHAPES[0]:
                    for rows in ROWS:
                        x = torch.randn(rows, shape[1], dtype=torch.bfloat16)
                        row[f"{rows} rows"] = round(times_as_fast(kernels, floats, x), 2)
                found.append(row)
                print(row, flush=True)
    return found


def failures(found: list[dict[str, object]]) -> list[str]:
    """What is below its limit."""
    failed = []
    for row in found:
        which = 0 if row["kernel"] == "int8 inputs" else 1
        label = str(row["scheme"])
        least = LEAST_SHARE.get(label, (0, 0))[which]
        if float(str(row["share of the streaming read"])) < least:
            failed.append(f"{row}: share below {least}")
        for rows, limits in LEAST_SPEED.items() if label == "w4-g128" else ():
            if f"{rows} rows" in row and float(str(row[f"{rows} rows"])) < limits[which]:
                failed.append(f"{row}: {rows} rows below {limits[which]}")
    return failed


def plot(found: list[dict[str, object]], to: Path) -> None:
    """Shares of the read at one row, and how many times as fast as bfloat16 more rows are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (roof, rows) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    first = [row for row in found if row["shape"] == found[0]["shape"]]
    labels = list(dict.fromkeys(str(row["scheme"]) for row in first))
    for i, name in enumerate(KERNELS):
        own = {str(row["scheme"]): row for row in first if row["kernel"] == name}
        at = [labels.index(label) + 0.4 * i - 0.2 for label in own]
        shares = [float(str(row["share of the streaming read"])) for row in own.values()]
        bars = roof.bar(at, shares, 0.4, label=name)
        roof.bar_label(bars, [f"{row['GB/s']}" for row in own.values()], fontsize=7)
        many = [(n, float(str(own["w4-g128"][f"{n} rows"]))) for n in ROWS]
        rows.plot(*zip(*many, strict=True), marker="o", label=f"w4-g128, {name}")
    roof.axhline(1, color="black", linewidth=0.8)
    roof.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    roof.set_title(f"One row, {found[0]['shape']}: share of the streaming read (GB/s)")
    rows.plot(
        *zip(*((n, limit[0]) for n, limit in LEAST_SPEED.items()), strict=True), "k:", label="aim (int8)"
    )
    rows.axhline(1, color="black", linewidth=0.8)
    rows.set_xscale("log", base=2)
    rows.set_xticks(ROWS, [str(n) for n in ROWS])
    rows.set_xlabel("rows of inputs")
    rows.set_title("Times as fast as PyTorch in bfloat16")
    for axes in (roof, rows):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.savefig(to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without-amx", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    own = library()
    if own is None:
        sys.exit(f"the native library {why_absent()}")
    if args.without_amx:
        os.environ["ONEDNN_MAX_CPU_ISA"] = (
            "AVX512_CORE_BF16"  # which PyTorch asks when it first multiplies
        )
        if not own.use("avx512"):
            sys.exit("this processor has no AVX-512")
    print(f"native library: {summary()}; {args.threads} threads; torch {torch.__version__}")
    found = measure()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.plot:
        plot(found, args.plot)
    sys.exit("\n".join(failures(found)) or None)


if __name__ == "__main__":
    main()
