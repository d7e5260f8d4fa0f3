"""bitsandbytes on the CPU: LLM.int8() as transformers loads it, and its linear by itself.

Started by ../llm_int8.py, which also imports it, to time our linears by the same code and on the same
inputs; only the functions that run in its own environment import bitsandbytes.

  run_bitsandbytes.py logits MODEL IDS OUT    the logits of every window of IDS
  run_bitsandbytes.py product OUT             one product in float32
  run_bitsandbytes.py serve                   times what each line of standard input asks for
"""

import argparse
import importlib.metadata
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

THRESHOLD = 6.0  # the default of transformers, and of the paper
OUTLIERS = 0.01  # of the input columns
ROTATED_BYTES = 2**27  # of 8-bit weights: more than any cache holds
REPEATS = 5


# -- the same for every tool -----------------------------------------------------------------------


def make_linears(rows: int, columns: int) -> list[nn.Linear]:
    """As many as are larger than any cache together, in bfloat16."""
    torch.manual_seed(0)
    copies = math.ceil(ROTATED_BYTES / (rows * columns))
    return [nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16) for _ in range(copies)]


def make_inputs(tokens: int, columns: int) -> Tensor:
    """Normal but for 1 % of the columns, whose every value lies beyond the threshold; bfloat16."""
    generator = torch.Generator().manual_seed(1)
    outlying = torch.randperm(columns, generator=generator)[: round(OUTLIERS * columns)]
    x = torch.randn(tokens, columns, generator=generator).clamp(-4, 4)
    x[:, outlying] += torch.where(x[:, outlying] < 0, -20.0, 20.0)
    return x.bfloat16()


def make_exact() -> tuple[nn.Linear, Tensor]:
    """A linear and inputs in float32, of values that float16 holds: bitsandbytes casts both to it."""
    torch.manual_seed(0)
    return nn.Linear(512, 256, bias=False).half().float(), make_inputs(64, 512).float()


@torch.no_grad()
def median_s(call: Callable[[nn.Module], object], modules: list[nn.Module]) -> float:
    """Seconds per call, the median over rounds through all modules; the first round warms up."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        for module in modules:
            call(module)
        times.append((time.perf_counter() - began) / len(modules))
    return statistics.median(times[1:])


# -- bitsandbytes ----------------------------------------------------------------------------------


def silence() -> None:
    """It warns at every product that inputs are cast to float16: that would be timed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def convert(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    rows, columns = linear.weight.shape
    made = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=THRESHOLD)
    made.load_state_dict(linear.state_dict())
    # In training it would multiply the dequantized weight, no integers. `.to` a device quantizes.
    return made.to("cpu").eval()


def versions() -> dict[str, str]:
    packages = ("bitsandbytes", "torch", "transformers")
    return {package: importlib.metadata.version(package) for package in packages}


def answer(result: dict[str, object]) -> None:
    print("RESULT " + json.dumps(result), flush=True)


@torch.no_grad()
def write_logits(args: argparse.Namespace) -> None:
    """Quantized by transformers' own call, as its users do."""
    from bitsandbytes.nn import Linear8bitLt
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=THRESHOLD)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=config, device_map="cpu", dtype=getattr(torch, args.dtype)
    ).eval()
    silence()
    windows = load_file(args.ids)["ids"].split(args.batch)
    logits = torch.cat([model(ids, use_cache=False).logits for ids in windows])
    save_file({"logits": logits.contiguous()}, args.out)
    linears = (module for module in model.modules() if isinstance(module, Linear8bitLt))
    codes = [module.state.CB for module in linears]  # what the products were made of
    matrices = sum(code is not None and code.dtype == torch.int8 for code in codes)
    answer({"matrices": matrices, "versions": versions()})


@torch.no_grad()
def write_product(out: Path) -> None:
    silence()
    linear, x = make_exact()
    save_file({"product": convert(linear)(x)}, out)
    answer({"versions": versions()})


def serve() -> None:
    """A line of JSON in, a line out: seconds of one product of `tokens` x `columns` by `rows`."""
    silence()
    shape, modules = None, []
    for line in sys.stdin:
        asked = json.loads(line)
        if shape != (asked["rows"], asked["columns"]):
            shape = (asked["rows"], asked["columns"])
            modules = []  # free before the next are made
            modules = [convert(linear) for linear in make_linears(*shape)]
        x = make_inputs(asked["tokens"], asked["columns"])
        seconds = median_s(lambda module, x=x: module(x), modules)
        answer({"seconds": seconds, "threads": torch.get_num_threads()})


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve")
    commands.add_parser("product").add_argument("out", type=Path)
    logits = commands.add_parser("logits")
    logits.add_argument("model", type=Path)
    logits.add_argument("ids", type=Path, help="safetensors file with `ids`, (windows, length)")
    logits.add_argument("out", type=Path, help="safetensors file with `logits`")
    logits.add_argument("--dtype", required=True)
    logits.add_argument("--batch", type=int, required=True, help="windows in a call")
    args = parser.parse_args()
    if args.command == "serve":
        serve()
    elif args.command == "product":
        write_product(args.out)
    else:
        write_logits(args)


if __name__ == "__main__":
    main()
