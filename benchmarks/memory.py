"""Memory that calibrated quantization takes: a random Llama in the shape of 1B models, block by block.

Peak anonymous memory must stay below Python and its libraries + one block in float32 + calibration
states + 4 times the largest Hessian, and must not grow with the number of blocks. Only sums of bytes are
compared, so other work on the machine does no harm.

Run:  python benchmarks/memory.py [--blocks 4 16] [--samples 16] [--length 512] [--method gptq]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

WIDTH, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 32000
GROWTH = 1.1  # of the peak beyond the libraries, from the smallest model to the largest; not tuned


def make_checkpoint(folder: Path, blocks: int) -> None:
    """Random bfloat16 weights, as transformers saves them."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INTERMEDIATE, num_hidden_layers=blocks,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def run(model: Path, out: Path, method: str, samples: int, length: int) -> dict[str, int]:
    """Quantize in this process, which should be a new one."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # libraries are part of what is there before

    import fewbits

    ids = torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(0))
    result = fewbits.quantize(model, out, method=method, calibration=ids)
    return result.run["memory_bytes"] | {"elapsed_s": result.run["elapsed_s"]}


def measure(blocks: int, args: argparse.Namespace) -> dict[str, float]:
    """A process for the model, and one for quantizing it."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        call = [sys.executable, __file__, "--inside", folder, "--method", args.method]
        call += ["--samples", str(args.samples), "--length", str(args.length)]
        subprocess.run([*call, "--make", str(blocks)], check=True, stdout=subprocess.PIPE)
        done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    block = 4 * (2 * WIDTH**2 + 2 * WIDTH**2 * KV_HEADS // HEADS + 3 * WIDTH * INTERMEDIATE)
    states = 2 * args.samples * args.length * WIDTH
    limit = block + states + 4 * 4 * INTERMEDIATE**2
    return {
        "blocks": blocks,
        "before": found["before"],
        "taken": found["peak"] - found["before"],
        "limit": limit,
        "elapsed_s": found["elapsed_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--folder", help="where models are made; the system's own by default")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_checkpoint(args.inside / "model", args.make)
        return
    if args.inside:
        found = run(args.inside / "model", args.inside / "out", args.method, args.samples, args.length)
        print(json.dumps(found))
        return
    results = [measure(blocks, args) for blocks in args.blocks]
    for result in results:
        print({key: round(value / 2**20) if value > 2**20 else value for key, value in result.items()})
    if args.json:
        facts = {"command": " ".join(sys.argv), "torch": torch.__version__, "results": results}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    assert all(result["taken"] <= result["limit"] for result in results)
    assert results[-1]["taken"] <= GROWTH * results[0]["taken"]


if __name__ == "__main__":
    main()
