"""Time to quantize: a model by us and by others on the same cores; a matrix against its arithmetic.

The model is a random Llama of 17 M parameters: time does not depend on what the weights are. The tools
take turns, each run in a process of its own, and medians are compared. Of the others the call that
quantizes is timed alone; ours also reads, writes and verifies in its time. Results are checked
nowhere here: that is `quality.py`.

Run, with nothing else running:  python benchmarks/quantize_speed.py --environments build/rivals
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import QuantScheme
from fewbits.methods import GPTQ
from fewbits.methods.grid import search_qparams
from samples import MODELS, write_ids
from tools import ENVIRONMENTS, TOOLS, Task, provenance, run

VOCABULARY, SAMPLES, LENGTH = 8192, 64, 512
BITS, GROUP = 4, 128
WIDTH, ROWS = 4096, 8192  # of the matrix, and of the inputs its Hessian is made from
MODEL_LIMIT = 0.5  # of the fastest rival's time
MATRIX_LIMIT = 3.0  # of the time that its arithmetic takes as plain products; as much again to search


# -- one model ---------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """Random weights in bfloat16, and the reference model's tokenizer: some tools ask for one."""
    shutil.rmtree(folder, ignore_errors=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=896, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS["reference"].source / name, folder / name)


def measure_model(method: str, tools: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to quantize, by tool: of every round, of the wall and of all cores."""
    model, ids = args.work / "model", args.work / "ids.safetensors"
    found: dict[str, Any] = {name: {"wall_s": [], "cpu_s": [], "peak_rss_bytes": []} for name in tools}
    for number in range(args.repeats):
        for name in tools:  # in turns, so that a slow moment hits all
            task = Task(model, args.work / name, method, BITS, GROUP, True, ids)
            facts = run(TOOLS[name], task, args.environments, args.threads)
            found[name]["wall_s"].append(facts["wall_s"]["quantize"])
            found[name]["cpu_s"].append(facts["cpu_s"]["quantize"])
            found[name]["peak_rss_bytes"].append(facts["peak_rss_bytes"])
            found[name]["versions"] = facts["versions"]
            seconds = facts["wall_s"]["quantize"]
            print(f"round {number + 1}, {method}, {name}: {seconds:.1f} s", file=sys.stderr)
            shutil.rmtree(args.work / name)
    return found


def ratio_to_fastest(found: dict[str, Any]) -> float:
    """Our median time over the least median time of the others."""
    medians = {name: statistics.median(times["wall_s"]) for name, times in found.items()}
    ours = medians.pop("fewbits")
    return ours / min(medians.values())


# -- one matrix --------------------------------------------------------------------------------------


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.no_grad()
def measure_matrix(repeats: int) -> dict[str, float]:
    """GPTQ on one matrix: seconds of its grid search, of the rest, and of the rest as plain products."""
    scheme = QuantScheme(BITS, "group", GROUP)
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-1, 1, WIDTH)  # so that columns differ in what they cost
    hessian = x.T @ x / ROWS
    square = weight.float()
    # A Cholesky factor takes n^3 / 3; correcting each column by the errors before it rows * n^2, once
    # for each grid that is tried, and by those of all others, once a sweep, twice that.
    passes = 1 + GPTQ().tries + 2 * GPTQ().sweeps
    operations = WIDTH**3 / 3 + passes * WIDTH**3
    calls: dict[str, Callable[[], object]] = {
        "product": lambda: square @ square,
        "search": lambda: search_qparams(weight, scheme, hessian.diagonal()),
        "method": lambda: GPTQ()(weight, scheme, {"hessian": hessian}),
    }
    times = {name: [seconds(call)] for name, call in calls.items()}
    for _ in range(repeats):  # in turns, so that a slow moment hits all
        for name, call in calls.items():
            times[name].append(seconds(call))
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "search_s": median["search"],
        "rest_s": median["method"] - median["search"],
        "arithmetic_s": operations * median["product"] / (2 * WIDTH**3),
    }


# -- the command line --------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rivals = ["gptqmodel", "llmcompressor"]
    parser.add_argument("--tools", nargs="+", choices=rivals, default=rivals)
    parser.add_argument("--methods", nargs="*", choices=("gptq", "awq"), default=["gptq", "awq"])
    parser.add_argument("--no-matrix", dest="matrix", action="store_false")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--environments", type=Path, default=Path(ENVIRONMENTS))
    parser.add_argument("--work", type=Path, default=Path("build/quantize-speed"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    command = f"python benchmarks/quantize_speed.py --repeats {args.repeats} --threads {args.threads}"
    facts = provenance(command)
    limits: list[tuple[str, float, float]] = []
    if args.matrix:
        facts["matrix"] = matrix = measure_matrix(args.repeats)
        for part in ("rest", "search"):
            ratio = matrix[f"{part}_s"] / matrix["arithmetic_s"]
            limits.append((f"GPTQ of a matrix, {part} over arithmetic", ratio, MATRIX_LIMIT))
    if args.methods:
        make_model(args.work / "model")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
        write_ids(ids, args.work / "ids.safetensors")
    for method in args.methods:
        facts[method] = found = measure_model(method, ["fewbits", *args.tools], args)
        limits.append((f"{method} of a model over the fastest", ratio_to_fastest(found), MODEL_LIMIT))
    facts["ratios"] = {what: value for what, value, _ in limits}
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    failed = [f"{what}: {value:.2f} (limit {limit})" for what, value, limit in limits if value > limit]
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
