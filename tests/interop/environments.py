"""The virtual environment of each client, with everything pinned that its answers depend on."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TORCH = ["torch==2.13.0", "numpy==2.2.6", "setuptools", "wheel"]  # numpy as gptqmodel asks for
HF = ["transformers==5.23.0", "safetensors==0.8.0", "tokenizers==0.23.3"]

# Calls of pip, one after the other: torch first, lest an open range fetches another.
RECIPES: dict[str, list[list[str]]] = {
    "llama-cpp": [["numpy==2.2.6"], ["llama-cpp-python==0.3.36", "gguf==0.19.0"]],
    "transformers-ct": [
        TORCH,
        [*HF, "compressed-tensors==0.20.0", "psutil==7.2.2", "gguf==0.19.0", "accelerate==1.15.0"],
    ],
    "transformers-ct-0.17": [TORCH, [*HF, "compressed-tensors==0.17.0", "psutil==7.2.2"]],
    "gptqmodel": [
        TORCH,
        ["torch==2.13.0", *HF, "accelerate==1.15.0", "optimum==2.3.0", "gptqmodel==7.6.0"],
    ],
}
# llama.cpp is compiled: for this CPU, and by two processes.
SETTINGS = {
    "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF",
    "CMAKE_BUILD_PARALLEL_LEVEL": "2",
}
QUIET = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip  # of every client


def build(name: str, folder: Path) -> None:
    """Make an environment, unless it is there as the recipe says. A marker is written last."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once build it once
        _build(name, folder)


def _build(name: str, folder: Path) -> None:
    recipe = json.dumps(RECIPES[name])
    marker = folder / "recipe.json"
    if marker.exists() and marker.read_text() == recipe:
        return
    began = time.monotonic()
    print(f"building {name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([os.environ.get("PYTHON", sys.executable), "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    for arguments in RECIPES[name]:
        subprocess.run([*pip, *arguments], check=True, env=os.environ | SETTINGS)
    marker.write_text(recipe)
    print(f"built {name} in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    for chosen in sys.argv[2:]:
        build(chosen, Path(sys.argv[1]) / chosen)
