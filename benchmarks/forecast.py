"""What `fewbits plan` predicts over what `fewbits quantize` then takes: seconds and peak memory.

Models: the reference model on its own training text, and a random Llama in the shape of 1B models. Each
prediction and each run has a process of its own. With --large also: headers alone of large models, where
the command must answer in 5 seconds and 500 MB. On a busy machine --cpu compares processor seconds.

Run:  python benchmarks/forecast.py [--models reference 1b] [--methods rtn gptq] [--blocks 4] [--large]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from memory import VOCABULARY, make_checkpoint

METHODS = ("rtn", "int8", "llm-int8", "gptq", "awq", "awq+gptq")
WITHIN = 0.3  # of time and of memory, as the issue asks
ANSWER_S, ANSWER_BYTES = 5.0, 500 * 10**6  # for headers alone, as the issue asks
ROOT = Path(__file__).parent.parent
LARGE = {
    "llama-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}),
    "llama-70b": ("llama", {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}),
    "mixtral-8x7b": ("mixtral", {}),
    "qwen3-235b": ("qwen3_moe", {"hidden_size": 4096, "head_dim": 128, "moe_intermediate_size": 1536,
                                 "num_hidden_layers": 94, "num_attention_heads": 64,
                                 "num_key_value_heads": 4, "num_experts": 128}),
    "deepseek-671b": ("deepseek_v3", {}),
    "llama-405b": ("llama", {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
                             "num_attention_heads": 128, "num_key_value_heads": 8,
                             "vocab_size": 128256}),
    "mixture-1t": ("deepseek_v3", {"n_routed_experts": 384, "num_attention_heads": 64,
                                   "vocab_size": 163840, "n_group": 1, "topk_group": 1,
                                   "first_k_dense_replace": 1}),
}  # fmt: skip
SHARD_BYTES = 5 * 10**9  # as such models are cut on the hub


def make_headers(folder: Path, model_type: str, changes: dict[str, Any]) -> None:
    """A checkpoint of which only headers exist, with the names that transformers saves."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.for_model(model_type, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    config.save_pretrained(folder)
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        size = 2 * tensor.numel()
        if shards[-1] and end + size > SHARD_BYTES:
            shards.append({})
            end = 0
        entry = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        shards[-1][name] = entry
        end += size
    places = {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        text = json.dumps(entries).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        places |= dict.fromkeys(entries, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def predict(model: Path, calibration: dict[str, Any], cpu: bool) -> dict[str, Any]:
    """In this process, which should be a new one."""
    import fewbits.cost
    from fewbits.outlook import look_ahead

    if cpu:
        fewbits.cost.clock = time.process_time
    found = look_ahead(model, **calibration).forecast
    short = {"int8 w8-channel": "int8"}
    rows = {short.get(r.name, r.method): r.cost for r in reversed(found.rows) if r.cost is not None}
    costs = {
        name: {"elapsed_s": c.elapsed_s, "peak_bytes": c.peak_bytes, "parts_s": c.parts_s}
        for name, c in rows.items()
    }
    return {"costs": costs, "rates": found.rates}


def run(model: Path, out: Path, method: str, calibration: dict[str, Any], cpu: bool) -> dict[str, Any]:
    """In this process, which should be a new one."""
    import fewbits
    from fewbits.scheme import InputScheme, QuantScheme

    given = {} if method in ("rtn", "int8") else {k: v for k, v in calibration.items() if k != "length"}
    if given and "calibration" not in given:  # token ids
        shape = (given.pop("samples"), calibration["length"])
        generator = torch.Generator().manual_seed(0)
        given = {"calibration": torch.randint(VOCABULARY, shape, generator=generator)}
    elif given:
        given["length"] = calibration["length"]
    inputs = InputScheme(static=True)
    schemes = {"int8": QuantScheme(8), "llm-int8": QuantScheme(8, inputs=inputs)}
    scheme = schemes.get(method, QuantScheme(4, "group", 128))
    began = time.process_time()
    result = fewbits.quantize(
        model, out, method="rtn" if method == "int8" else method, scheme=scheme, **given
    )
    took = time.process_time() - began if cpu else result.run["elapsed_s"]
    return {"elapsed_s": took, "peak_bytes": result.run["memory_bytes"]["peak"]}


def call(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *(["--cpu"] if args.cpu else []), *more]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, model: Path, calibration: dict[str, Any], args: argparse.Namespace) -> list[Any]:
    """Ratios of predicted to measured, of each method."""
    given = json.dumps(calibration)
    predicted = call(args, "--inside", "predict", str(model), given)
    results = []
    for method in args.methods:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            measured = call(args, "--inside", "run", str(model), given, method, f"{folder}/out")
        cost = predicted["costs"][method]
        result = {"model": name, "method": method, "predicted": cost, "measured": measured}
        result["time_ratio"] = cost["elapsed_s"] / measured["elapsed_s"]
        result["memory_ratio"] = cost["peak_bytes"] / measured["peak_bytes"]
        print(
            f"{name:10} {method:9} time {cost['elapsed_s']:7.1f} s / {measured['elapsed_s']:7.1f} s = "
            f"{result['time_ratio']:.2f}   memory {cost['peak_bytes'] / 1e6:6.0f} MB / "
            f"{measured['peak_bytes'] / 1e6:6.0f} MB = {result['memory_ratio']:.2f}",
            flush=True,
        )
        if args.parts:
            print("   ", {part: round(s, 2) for part, s in cost["parts_s"].items()})
        results.append(result)
    if args.parts:
        print({rate: float(f"{value:.3g}") for rate, value in predicted["rates"].items()})
    return results


# A process counts the memory of the one that it was forked from: so a small one starts it.
_LAUNCHER = """
import json, resource, subprocess, sys, time
began = time.monotonic()
status = subprocess.run(sys.argv[2:], stdout=open(sys.argv[1], "w")).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"status": status, "elapsed_s": time.monotonic() - began,
                  "cpu_s": used.ru_utime + used.ru_stime, "peak_bytes": 1024 * used.ru_maxrss}))
"""


def launch(command: list[str], out: Path) -> dict[str, Any]:
    """Exit status, seconds and largest memory of a command, whose stdout goes to a file; Linux."""
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, str(out), *command]
    done = subprocess.run(launcher, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def answer(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """How long `fewbits plan` takes for headers alone, and its largest memory."""
    model_type, changes = LARGE[name]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_headers(Path(folder), model_type, changes)
        command = [sys.executable, "-m", "fewbits", "plan", folder, "--memory", "80GB"]
        found = {"model": name} | launch(command, Path(folder) / "out")
    assert found["status"] == 0, name
    print(
        f"{name:14} {found['elapsed_s']:5.1f} s ({found['cpu_s']:.1f} s of processor)  "
        f"{found['peak_bytes'] / 1e6:.0f} MB"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["reference", "1b"], choices=["reference", "1b"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--blocks", type=int, default=4, help="of the 1B shape")
    parser.add_argument("--samples", type=int, default=16, help="of 512 tokens, for the 1B shape")
    parser.add_argument("--large", action="store_true", help="headers alone of large models too")
    parser.add_argument("--cpu", action="store_true", help="compare processor seconds")
    parser.add_argument("--parts", action="store_true", help="print what the predictions consist of")
    parser.add_argument("--folder", help="where models are made; the system's own by default")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        what, model, given, *more = args.inside
        calibration = json.loads(given)
        if what == "predict":
            print(json.dumps(predict(Path(model), calibration, args.cpu)))
        else:
            print(json.dumps(run(Path(model), Path(more[1]), more[0], calibration, args.cpu)))
        return
    results, answers = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if "reference" in args.models:
            text = f"{folder}/train.jsonl"
            command = [sys.executable, str(ROOT / "reference" / "corpus.py"), "train", text]
            subprocess.run(command, check=True, stdout=subprocess.PIPE)
            given = {"calibration": text, "samples": 128, "length": 256}
            results += compare("reference", ROOT / "reference" / "model", given, args)
        if "1b" in args.models:
            make_checkpoint(Path(folder) / "1b", args.blocks)
            given = {"samples": args.samples, "length": 512}
            results += compare("1b", Path(folder) / "1b", given, args)
        answers = [answer(name, args) for name in LARGE] if args.large else []
    if args.json:
        facts = {"command": " ".join(sys.argv), "torch": torch.__version__}
        args.json.write_text(
            json.dumps(facts | {"results": results, "answers": answers}, indent=1) + "\n"
        )
    for result in results:
        assert abs(result["time_ratio"] - 1) <= WITHIN, result
        assert abs(result["memory_ratio"] - 1) <= WITHIN, result
    for found in answers:
        elapsed = found["cpu_s"] if args.cpu else found["elapsed_s"]
        assert elapsed < ANSWER_S, found
        assert found["peak_bytes"] < ANSWER_BYTES, found


if __name__ == "__main__":
    main()
