"""Checkpoints that other tools made by themselves: what fewbits.load has to read.

    python tests/interop/make_golden.py             into build/interop/golden
    python tests/interop/make_golden.py --small     some smaller ones into tests/interop/golden

gptqmodel quantizes a tiny random llama; llama.cpp the reference model: its K-blocks need rows of 256.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import environments
import numpy as np

HERE = Path(__file__).parent
TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_hidden_layers": 2, "head_dim": 64, "max_position_embeddings": 128,
    "tie_word_embeddings": True, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUP_SIZE, SAMPLES = 32, (32, 64)


@dataclass(frozen=True)
class Golden:
    """A checkpoint: the environment of its tool, and the kind that the tool was asked for."""

    environment: str
    kind: str
    tiny: bool = True


GOLDEN = {
    "gptq": Golden("gptqmodel", "gptq"),
    "gptq, asymmetric": Golden("gptqmodel", "gptq-asymmetric"),
    "gptq, act order": Golden("gptqmodel", "gptq-desc-act"),
    "gptq-v2, asymmetric": Golden("gptqmodel", "gptq-v2"),
    "gptq, 3 bits": Golden("gptqmodel", "gptq-3bit"),
    "gptq, 8 bits": Golden("gptqmodel", "gptq-8bit"),
    "awq": Golden("gptqmodel", "awq"),
    "Q4_0": Golden("llama-cpp", "Q4_0", tiny=False),
    "Q8_0": Golden("llama-cpp", "Q8_0", tiny=False),
    "Q4_1": Golden("llama-cpp", "Q4_1", tiny=False),
    "Q4_K_M": Golden("llama-cpp", "Q4_K_M", tiny=False),
}


def source_of(name: str, work: Path) -> Path:
    """The float model that a golden checkpoint was made from."""
    return work / "models" / "golden" if GOLDEN[name].tiny else checkpoints.REFERENCE


def path(name: str, work: Path) -> Path:
    """Where it lies."""
    return work / "golden" / GOLDEN[name].kind


def prepare(name: str, work: Path) -> None:
    """Make its tool and its source."""
    environments.build(GOLDEN[name].environment, work / GOLDEN[name].environment)
    checkpoints.write("golden", "llama", TINY, work / "models")


def make(name: str, work: Path) -> str:
    """Make one, unless it is there; why its tool did not."""
    golden, folder = GOLDEN[name], path(name, work)
    marker = folder.with_suffix(".made")
    recipe = json.dumps([environments.RECIPES[golden.environment], golden.kind, TINY])
    if marker.exists() and marker.read_text() == recipe:
        return ""
    prepare(name, work)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    samples = folder.with_suffix(".npy")
    np.save(samples, np.random.default_rng(1).integers(TINY["vocab_size"], size=SAMPLES))
    more = [str(samples), golden.kind, str(GROUP_SIZE)] if golden.tiny else [golden.kind]
    script = HERE / ("golden_gptqmodel.py" if golden.tiny else "golden_llamacpp.py")
    python = work / golden.environment / "bin" / "python"
    with folder.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            [str(python), str(script), str(source_of(name, work)), str(folder), *more],
            check=False, stdout=log, stderr=log, env=os.environ | environments.QUIET,
        )  # fmt: skip
    if done.returncode:
        return f"its tool fails, see {folder.with_suffix('.log').relative_to(checkpoints.ROOT)}"
    marker.write_text(recipe)
    return ""


SMALL = TINY | {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}


def make_small(work: Path) -> None:
    """Files of a few kilobytes, and the logits that the tool that wrote them gives for 16 tokens."""
    checkpoints.write("small", "llama", SMALL, work / "models")
    tokens = np.random.default_rng(2).integers(SMALL["vocab_size"], size=(1, 16))
    for kind in ("gptq-asymmetric", "gptq-desc-act", "awq", "Q4_0"):
        environment = "llama-cpp" if kind == "Q4_0" else "gptqmodel"
        environments.build(environment, work / environment)
        out, target = work / "small" / kind, HERE / "golden" / kind
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(exist_ok=True)
        samples = out.with_suffix(".npy")
        np.save(samples, np.random.default_rng(1).integers(SMALL["vocab_size"], size=SAMPLES))
        more = [kind] if kind == "Q4_0" else [str(samples), kind, str(GROUP_SIZE)]
        script = "golden_llamacpp.py" if kind == "Q4_0" else "golden_gptqmodel.py"
        python = str(work / environment / "bin" / "python")
        command = [python, str(HERE / script), str(work / "models" / "small"), str(out), *more]
        subprocess.run(command, check=True, env=os.environ | environments.QUIET)
        np.save(out.parent / "tokens.npy", tokens)
        np.save(out.parent / "prompt.npy", tokens[0, :4])
        job = {"checkpoint": str(out), "result": str(out), "vocabulary": SMALL["vocab_size"]}
        job |= {"dtype": "float16", "backend": "awq_torch" if kind == "awq" else "gptq_torch"}
        (out.parent / "jobs.json").write_text(json.dumps([job]))
        script = "client_llamacpp.py" if kind == "Q4_0" else "client_gptqmodel.py"
        command = [python, str(HERE / script), str(out.parent)]
        subprocess.run(command, check=True, env=os.environ | environments.QUIET)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in ("model.safetensors", "model.gguf"):
            if (out / name).exists():
                shutil.copy(out / name, target / name)
        config = json.loads((out / "config.json").read_text())
        meta = config.get("quantization_config", {}).get("meta", {})
        meta.pop("offload_to_disk_path", None)  # of the machine that it was made on
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        np.savez_compressed(
            target / "answer.npz", tokens=tokens, logits=np.load(out.with_suffix(".npz"))["logits"]
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["--small"]:
        make_small(checkpoints.ROOT / "build" / "interop")
        sys.exit()
    for chosen in sys.argv[1:] or GOLDEN:
        print(chosen, make(chosen, checkpoints.ROOT / "build" / "interop") or "is there")
