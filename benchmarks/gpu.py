"""The Triton kernels on a GPU against their limit, how fast its memory can be read, and against
PyTorch's bfloat16 and its own int4 kernel on the same matrices.

Weights rotate over more memory than the cache holds, as in a model; calls are captured in a graph, so
that Python's time is not measured. All figures are of one run. `--model` decodes with a random model of
Llama-8B's shape, as `generate()` does it, and with its compiled static cache.

Run:  python benchmarks/gpu.py [--model] [--tune] [--json OUT]
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels import Triton
from fewbits.kernels.gpu import MANY_ROWS, Tile, multiply
from fewbits.scheme import QuantScheme
from fewbits.tensor import QuantizedTensor, quantize_tensor

GPU = torch.device("cuda")
SHAPES = ((4096, 4096), (14336, 4096), (8192, 28672))
SCHEMES = ("w4-g128", "w4-g128-asym", "w4-g32", "w8-channel", "w3-g128", "w2-g128")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
CACHES = 300e6  # bytes of weights that are gone through; the largest cache seen has 60 MB
ROUNDS = 5


def seconds(call: Callable[[int], object], copies: int) -> float:
    """Of one call, replayed from a graph that goes through all copies; the median of rounds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(copies):
            call(i)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    graph.replay()
    taken = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            graph.replay()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 3e3 / copies)
    return statistics.median(taken)


@triton.jit
def read_all(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    """The sum of a part: the fastest read that Triton makes."""
    start = tl.program_id(0).to(tl.int64) * ROWS * COLUMNS
    lane = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for i in tl.static_range(ROWS):
        total += tl.load(x + start + i * COLUMNS + lane)
    tl.store(y + tl.program_id(0), tl.sum(total, 0))


def read_rate() -> float:
    """Bytes a second of a streaming read."""
    memory = torch.ones(2**29, dtype=torch.int32, device=GPU)  # 2 GB
    count = memory.numel() // (8 * 4096)
    out = torch.empty(count, dtype=torch.int32, device=GPU)
    own = memory.nbytes / seconds(lambda _: read_all[(count,)](memory, out, ROWS=8, COLUMNS=4096), 1)
    return max(own, memory.nbytes / seconds(lambda _: memory.sum(), 1))


def weight_of(shape: tuple[int, int], label: str) -> QuantizedTensor:
    return quantize_tensor(
        torch.randn(shape, dtype=torch.bfloat16, device=GPU), QuantScheme.parse(label)
    )


def copies_of(kernel: Triton) -> list[list[Tensor | int | None]]:
    """What `multiply` takes, as often as it fills more than a cache."""
    parts = [kernel.words, kernel.scale, kernel.zero, kernel.offset]
    size = sum(part.nbytes for part in parts if part is not None)
    return [
        [*(None if p is None else p.clone() for p in parts), kernel.bits, kernel.group, kernel.point]
        for _ in range(max(2, math.ceil(CACHES / size)))
    ]


def torch_int4(weight: QuantizedTensor, copies: int) -> Callable[[Tensor], Callable[[int], Tensor]]:
    """PyTorch's own kernel on the same 4-bit codes."""
    codes = weight.codes.to(torch.int32)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scale = weight.scale.float()
    zero = scale * (8 - weight.zero_point.float())
    both = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()
    group = weight.shape[1] // weight.scale.shape[1]
    all_ = [packed.clone() for _ in range(copies)]
    return lambda x: lambda i: torch.ops.aten._weight_int4pack_mm(x, all_[i], group, both)


def measure(rows: tuple[int, ...]) -> list[dict[str, object]]:
    """A line for each shape, scheme and number of rows."""
    found: list[dict[str, object]] = []
    rate = read_rate()
    print(f"streaming read {rate / 1e12:.2f} TB/s", flush=True)
    for shape in SHAPES:
        count = max(2, math.ceil(CACHES / (2 * math.prod(shape))))
        floats = [torch.randn(shape, dtype=torch.bfloat16, device=GPU) for _ in range(count)]
        inputs = {n: torch.randn(n, shape[1], dtype=torch.bfloat16, device=GPU) for n in rows}
        slow = {n: seconds(lambda i, x=x, f=floats: F.linear(x, f[i]), count) for n, x in inputs.items()}
        for label in SCHEMES:
            weight = weight_of(shape, label)
            kernel = Triton(weight, torch.bfloat16, GPU)
            copies = copies_of(kernel)
            size = sum(t.nbytes for t in copies[0] if isinstance(t, Tensor))
            theirs = torch_int4(weight, len(copies)) if label.startswith("w4-g128") else None
            for n, x in inputs.items():
                if (n > 64 and label != "w4-g128") or (
                    n not in (1, 16) and label not in ("w4-g128", "w8-channel")
                ):
                    continue
                if n > MANY_ROWS:
                    taken = seconds(lambda _, x=x, k=kernel: k(x), 4)
                else:
                    taken = seconds(lambda i, x=x, c=copies: multiply(x, None, *c[i]), len(copies))
                line: dict[str, object] = {
                    "shape": f"{shape[0]} x {shape[1]}", "scheme": label, "rows": n,
                    "us": round(1e6 * taken, 2), "share of the read": round(size / taken / rate, 3),
                    "times bfloat16": round(slow[n] / taken, 2),
                    "bfloat16's share": round(2 * math.prod(shape) / slow[n] / rate, 3),
                }  # fmt: skip
                if theirs is not None:
                    line["times torch's int4"] = round(seconds(theirs(x), len(copies)) / taken, 2)
                found.append(line)
                print(line, flush=True)
    return found


def tune() -> list[dict[str, object]]:
    """The best tiles, to be chosen by `choose_tile`."""
    found: list[dict[str, object]] = []
    for shape, label in product(((4096, 4096), (14336, 4096)), ("w4-g128", "w8-channel")):
        kernel = Triton(weight_of(shape, label), torch.bfloat16, GPU)
        copies = copies_of(kernel)
        chunks = kernel.words.shape[1] // 32
        for n in (1, 16, 64, 256) if label == "w4-g128" else (1,):
            x = torch.randn(n, shape[1], dtype=torch.bfloat16, device=GPU)
            own = max(16, min(128, 2 ** math.ceil(math.log2(n))))
            tiles = [
                Tile(rows, i, p, w, s)
                for rows, w in ((64, 4), (128, 8))
                for i, p, s in product(
                    {own, max(16, own // 2)}, (1, 2, 4, 8), (2, 3, 4) if n == 1 else (3,)
                )
                if p <= chunks
            ]
            times = []
            for tile in tiles:
                call = lambda i, t=tile, x=x, c=copies: multiply(x, None, *c[i], tile=t)  # noqa: E731
                try:
                    times.append((seconds(call, len(copies)), tile))
                except Exception as error:  # a tile may want more than a processor has
                    print(tile, type(error).__name__, str(error).splitlines()[:1])
            chosen = seconds(lambda i, x=x, c=copies: multiply(x, None, *c[i]), len(copies))
            times.sort(key=lambda pair: pair[0])
            for taken, tile in times[:4]:
                line = {"shape": str(shape), "scheme": label, "rows": n, "us": round(1e6 * taken, 2)}
                found.append(line | {"tile": str(tile), "chosen": round(1e6 * chosen, 2)})
                print(found[-1], flush=True)
    return found


# -- whole models ------------------------------------------------------------------------------------


def decode(name: str, **shape: int) -> list[dict[str, object]]:
    """Tokens a second of a random model, float and quantized, one sequence."""
    import copy

    import transformers

    import fewbits

    config = transformers.LlamaConfig(vocab_size=32000, max_position_embeddings=2048, **shape)
    with GPU:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    # Copied before it has run: a copy keeps the compiled step of what it was copied from.
    quantized = copy.deepcopy(model)
    fewbits.quantize_(quantized, QuantScheme.parse("w4-g128"))
    found: list[dict[str, object]] = []
    for label, own in ((None, model), ("w4-g128", quantized)):
        line: dict[str, object] = {"model": name, "scheme": label or "bfloat16"}
        line["GB"] = round(sum(t.nbytes for t in own.state_dict().values()) / 1e9, 2)
        line["eager tokens/s"] = round(_rate(own, None), 1)
        found.append(line)
        print(line, flush=True)
        line["compiled tokens/s"] = round(_rate(own, "static"), 1)
        print(line, flush=True)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return found


@torch.no_grad()
def _rate(model: object, cache: str | None) -> float:
    """Tokens a second of `generate()`, from two lengths, so that the prompt does not count."""
    ids = torch.randint(0, 32000, (1, 32), device=GPU)
    times = {}
    for new in (16, 16, 144, 16, 144):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(  # type: ignore[attr-defined]
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, cache_implementation=cache,
            pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        times[new] = time.perf_counter() - began
    return 128 / (times[144] - times[16])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try tiles instead")
    parser.add_argument("--model", action="store_true", help="decode with whole models instead")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    name, version = torch.cuda.get_device_name(), torch.__version__
    print(f"{name}; torch {version}, triton {triton.__version__}", flush=True)
    if args.tune:
        found = tune()
    elif args.model:
        shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        found = decode("8B", **shape, num_attention_heads=32, num_key_value_heads=8)
    else:
        found = measure(tuple(args.rows))
    if args.json:
        args.json.write_text(json.dumps({"device": name, "torch": version, "found": found}, indent=1))


if __name__ == "__main__":
    main()
