"""A whole model, token by token: ours against transformers' bfloat16, and against llama.cpp on the same
weights in its own file: it reads the very GGUF file that ours does, so its head and its embedding are in
bfloat16 too, and both read as many bytes for a token.

The model is random, in the shape of 1B models, or `--model`'s, for which nothing is asserted. Runs
alternate, each in a process of its own; asserted are medians of ratios. Nothing else may run on the
machine. llama.cpp is asked in an environment that has llama-cpp-python (`make interop` builds one), and
torchao's 4 bits in one that has torchao; without them those columns stay empty. Most processors have no
AMX: `--without-amx` measures them on one that has, PyTorch's side too (llama.cpp as it was built).

Run:  python benchmarks/decode.py --folder DIR [--model MODEL] [--without-amx] [--float32]
          [--python PYTHON] [--torchao PYTHON]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPT, NEW, ROUNDS = 512, 24, 3
REPEATS = 4  # in a process, after one that warms it up; the first few are slower still
# Bits, group, and the scheme of the head (in bfloat16 if None); those without a Q are in our own format.
SCHEMES = {
    "Q4_0": (4, 32, None),
    "Q8_0": (8, 32, None),
    "w4-g128": (4, 128, None),
    "w4-g128-head8": (4, 128, "w8-channel"),
    "w4-g128-head4": (4, 128, "w4-g128"),
}
# Ours over the other's: tokens per second of decoding and of the prompt.
LEAST = {
    ("Q4_0", "llama.cpp"): (0.95, 1.2),
    ("Q8_0", "llama.cpp"): (1.0, 1.2),
    ("Q4_0", "bfloat16"): (4.5, 0.9),
    ("w4-g128", "bfloat16"): (4.5, 1.1),
    ("w4-g128-head8", "bfloat16"): (4.5, 1.1),
    ("w4-g128-head4", "bfloat16"): (4.5, 1.1),
}

OURS = """
import json, os, sys, torch
from fewbits.load import load
from fewbits.native import library
from fewbits.speed import measure_speed
if "ONEDNN_MAX_CPU_ISA" in os.environ:  # --without-amx
    assert library().use("avx512"), "no AVX-512"
torch.set_num_threads(int(sys.argv[5]))
model = load(sys.argv[1], int8_inputs=sys.argv[2] == "8", compiled=sys.argv[7] == "compiled")
speed = measure_speed(model, int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[6]))
print(json.dumps([speed.decode, speed.prefill]))
"""
FLOAT = """
import json, sys, torch, transformers
from fewbits.speed import measure_speed
torch.set_num_threads(int(sys.argv[5]))
dtype = torch.float32 if sys.argv[2] == "32" else torch.bfloat16
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()
speed = measure_speed(model, int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[6]))
print(json.dumps([speed.decode, speed.prefill]))
"""
THEIRS = """
import json, statistics, sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1024, n_batch=512, n_threads=int(sys.argv[5]),
              n_threads_batch=int(sys.argv[5]), verbose=False)
def time_of(ids):
    began = time.perf_counter()
    model.eval(ids)
    return time.perf_counter() - began
prompt = [7919 * i % model.n_vocab() for i in range(int(sys.argv[3]))]
for _ in range(int(sys.argv[6])):
    model.reset()
    prefill = len(prompt) / time_of(prompt)
    decode = 1 / statistics.median(time_of([17 + i]) for i in range(int(sys.argv[4])))
print(json.dumps([decode, prefill]))
"""
TORCHAO = """
import inspect, json, statistics, sys, time, torch, transformers
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_
torch.set_num_threads(int(sys.argv[5]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
head = model.get_output_embeddings()
kept = None if sys.argv[2] == "4" else head
takes = lambda module, name: type(module) is torch.nn.Linear and module is not kept
quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=128), takes)
prompt = torch.arange(int(sys.argv[3]))[None] * 7919 % model.config.vocab_size
name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
def time_of(ids, cache):
    began = time.perf_counter()
    found = model(ids, use_cache=True, **{name: cache})
    return time.perf_counter() - began, found
with torch.inference_mode():
    for _ in range(int(sys.argv[6])):
        taken, found = time_of(prompt, None)
        prefill, steps = prompt.shape[1] / taken, []
        for _ in range(int(sys.argv[4])):
            taken, found = time_of(found.logits[:, -1:].argmax(-1), getattr(found, name))
            steps.append(taken)
print(json.dumps([1 / statistics.median(steps), prefill]))
"""


def make(folder: Path, model: Path, schemes: list[str]) -> None:
    """The random model, and what is made of it, unless they are there."""
    import fewbits
    from memory import make_checkpoint

    if not model.is_dir():
        make_checkpoint(model, 16)
    for name in schemes:
        bits, group, head = SCHEMES[name]
        out = folder / name
        if not out.is_dir():
            scheme = fewbits.QuantScheme(bits, "group", group)
            overrides = ()
            if head is not None:
                overrides = (("lm_head", fewbits.QuantScheme.parse(head)),)
            kind = "gguf" if "Q" in name else "fewbits"
            fewbits.quantize(model, out, scheme=scheme, overrides=overrides, format=kind)


def run(python: str, code: str, *arguments: object) -> tuple[float, float]:
    """Tokens per second of decoding, and of the prompt."""
    command = [python, "-c", code, *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    decode, prefill = json.loads(output.splitlines()[-1])
    return decode, prefill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--python", default=None, help="of an environment with llama-cpp-python")
    parser.add_argument("--torchao", default=None, help="of an environment with torchao")
    parser.add_argument(
        "--model", type=Path, default=None, help="a float model instead of the random one"
    )
    parser.add_argument("--float32", action="store_true", help="transformers in float32 too")
    parser.add_argument("--without-amx", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    args = parser.parse_args()
    if args.without_amx:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    model, rest = args.model or folder / "float", (args.prompt, NEW, args.threads, REPEATS)
    if args.model is not None:  # each has its own, or another's would be measured
        folder = folder / "-".join(args.model.resolve().parts[1:])
        if not model.is_dir():
            parser.error(f"--model {model}: no such folder")
    make(folder, model, args.schemes)
    failed = []
    for name in args.schemes:
        ours = (sys.executable, OURS, folder / name)
        who = {"16-bit inputs": (*ours, 16, *rest, "")}
        if name != "Q8_0":  # whose inputs stay in 16 bits
            who["int8 inputs"] = (*ours, 8, *rest, "")
        who["compiled, " + list(who)[-1]] = (*list(who.values())[-1][:-1], "compiled")
        fastest = list(who)[-1]
        who["bfloat16"] = (sys.executable, FLOAT, model, 16, *rest)
        if args.float32:
            who["float32"] = (sys.executable, FLOAT, model, 32, *rest)
        if args.torchao and name in ("w4-g128", "w4-g128-head4"):
            who["torchao"] = (args.torchao, TORCHAO, model, 4 if "head4" in name else 16, *rest)
        if args.python and "Q" in name:
            who["llama.cpp"] = (args.python, THEIRS, folder / name / "model.gguf", 0, *rest)
        taken: dict[str, list[tuple[float, float]]] = {each: [] for each in who}
        for _ in range(args.rounds):
            for each, command in who.items():
                taken[each].append(run(*command))
        for each, speeds in taken.items():
            decode, prefill = (statistics.median(values) for values in zip(*speeds, strict=True))
            print(f"{name}: {each}: decodes {decode:.1f} tokens/s, reads {prefill:.0f}", flush=True)
        for own in [each for each in who if each.endswith("inputs")]:
            for other in ("bfloat16", "float32", "torchao", "llama.cpp"):
                if other not in taken:
                    continue
                pairs = zip(taken[own], taken[other], strict=True)
                ratios = [(a[0] / b[0], a[1] / b[1]) for a, b in pairs]
                decode, prefill = (statistics.median(values) for values in zip(*ratios, strict=True))
                print(
                    f"{name}: {own} over {other}: {decode:.2f} in decoding, {prefill:.2f} in the prompt"
                )
                least = LEAST.get((name, other), (0, 0)) if args.model is None else (0, 0)
                if own == fastest and (decode < least[0] or prefill < least[1]):
                    failed.append(
                        f"{name}: {own} over {other}: {decode:.2f}, {prefill:.2f}, least {least}"
                    )
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
