"""A random Llama in the shape of 7B models is quantized with --max-memory 5GB, watched from outside.

Its 13.5 GB of bfloat16 weights are made by this script, with the reference model's tokenizer. Anonymous
memory of the whole process, as the system counts it, must stay below the budget at all times. On a
machine that is not Linux nobody tells.

Run:  python benchmarks/seven_billion.py [--methods rtn gptq] [--max-memory 5GB] [--folder DIR]
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
WIDTH, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 32000
SAMPLES, LENGTH = 8, 512
LOOK_S = 0.02  # between two looks at the process


def make_model(folder: Path, blocks: int) -> None:
    """One shard for a block, and one for what stands outside, so that little is in memory."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INTERMEDIATE, num_hidden_layers=blocks,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )  # fmt: skip
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "reference" / "model" / name, folder / name)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    places = {}
    for number in range(blocks + 1):
        file = f"model-{number + 1:05}-of-{blocks + 1:05}.safetensors"
        if number == blocks:
            tensors = {
                "model.embed_tokens.weight": draw(VOCABULARY, WIDTH),
                "model.norm.weight": torch.ones(WIDTH, dtype=torch.bfloat16),
                "lm_head.weight": draw(VOCABULARY, WIDTH),
            }
        else:
            prefix = f"model.layers.{number}."
            tensors = {f"{prefix}self_attn.{n}_proj.weight": draw(WIDTH, WIDTH) for n in "qkvo"}
            for name in ("gate", "up"):
                tensors[f"{prefix}mlp.{name}_proj.weight"] = draw(INTERMEDIATE, WIDTH)
            tensors[f"{prefix}mlp.down_proj.weight"] = draw(WIDTH, INTERMEDIATE)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def watch(command: list[str]) -> tuple[int, float, int, float]:
    """Exit status, seconds, most anonymous memory, and when that was."""
    began, peak, when = time.monotonic(), 0, 0.0
    process = subprocess.Popen(command, stdout=sys.stderr)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        if found is not None and 1024 * int(found[1]) > peak:
            peak, when = 1024 * int(found[1]), time.monotonic() - began
        time.sleep(LOOK_S)
    return process.returncode, time.monotonic() - began, peak, when


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--max-memory", default="5GB")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="the model stays there and is used again")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        model, text = folder / f"model-{args.blocks}", folder / "text.jsonl"
        if not (model / "model.safetensors.index.json").is_file():
            make_model(model, args.blocks)
        subprocess.run([sys.executable, ROOT / "reference" / "corpus.py", "train", text], check=True)
        most = float(args.max_memory.removesuffix("GB")) * 1e9
        results = []
        for method in args.methods:
            out = folder / f"out-{method}"
            command = [sys.executable, "-m", "fewbits", "quantize", str(model), str(out), "--restart"]
            command += ["--method", method, "--max-memory", args.max_memory]
            if method not in ("rtn", "int8"):
                command += ["--calibration", str(text), "--samples", str(SAMPLES)]
                command += ["--seq-len", str(LENGTH)]
            status, elapsed, peak, when = watch(command)
            results.append({"method": method, "status": status, "elapsed_s": round(elapsed, 1)})
            results[-1] |= {"peak_bytes": peak, "peak_at_s": round(when, 1), "of_budget": peak / most}
            print(json.dumps(results[-1]), flush=True)
            shutil.rmtree(out, ignore_errors=True)
    if args.json:
        facts = {"command": " ".join(sys.argv[1:]), "torch": torch.__version__, "results": results}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    assert all(r["status"] == 0 and r["peak_bytes"] < most for r in results)


if __name__ == "__main__":
    main()
