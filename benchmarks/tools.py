"""The tools that benchmarks compare, each in its own environment, and what stands beside a figure."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src/fewbits"
RESULT = "RESULT "  # begins the line in which a script says its result
ENVIRONMENTS = os.environ.get("FEWBITS_RIVALS", "build/rivals")


@dataclass(frozen=True)
class Tool:
    """A quantizer, its methods, and the package whose version counts."""

    name: str
    package: str
    methods: tuple[str, ...]


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("fewbits", "fewbits", ("rtn", "gptq", "awq", "awq+gptq")),
        Tool("gptqmodel", "gptqmodel", ("gptq", "awq")),
        Tool("llmcompressor", "llmcompressor", ("gptq", "awq", "awq+gptq")),
        Tool("autoround", "auto-round", ("autoround", "autoscheme")),
        Tool("hqq", "hqq", ("hqq",)),
        Tool("llamacpp", "llama-cpp-python", ("k_m",)),
    )
}
# Beside these, the others write other grids, or take ten times as long.
USUAL = ("fewbits", "gptqmodel", "llmcompressor")

BITSANDBYTES = Tool("bitsandbytes", "bitsandbytes", ("llm-int8",))  # `llm_int8.py` alone runs it


@dataclass(frozen=True)
class Task:
    """One quantization; see `rivals/job.py`, which reads it.

    Args:
        bits: of a code, or on average for tools that mix.
        bits_per_weight: of the whole file, at most, instead of bits and group.
        format: of the files, for tools that write several; None: their own choice.
        embeddings: quantize them too.
        statistics: folder in which fewbits measures the model, and finds that again.
    """

    model: Path
    out: Path
    method: str
    bits: float
    group: int | None
    symmetric: bool
    ids: Path
    bits_per_weight: float | None = None
    format: str | None = None
    embeddings: bool = False
    statistics: Path | None = None

    @property
    def arguments(self) -> list[str]:
        """For the command line of a tool's script."""
        group = [] if self.group is None else ["--group", str(self.group)]
        grid = [] if self.symmetric else ["--asymmetric"]
        size = [] if self.bits_per_weight is None else ["--bits-per-weight", repr(self.bits_per_weight)]
        form = [] if self.format is None else ["--format", self.format]
        kept = [] if self.statistics is None else ["--statistics", str(self.statistics.resolve())]
        more = [*form, *(["--embeddings"] if self.embeddings else []), *kept]
        paths = [str(path.resolve()) for path in (self.model, self.out)]
        options = ["--method", self.method, "--bits", str(self.bits), "--ids", str(self.ids.resolve())]
        return [*paths, *options, *group, *grid, *size, *more]


class ToolError(Exception):
    """A tool stopped, or its environment is not there."""


def version(tool: Tool, environments: Path) -> str:
    """Of a rival its version; of fewbits a hash of its source, committed or not."""
    if tool.name == "fewbits":
        sources = sorted(SOURCE.rglob("*.py"))
        content = b"".join(path.name.encode() + path.read_bytes() for path in sources)
        return hashlib.sha256(content).hexdigest()[:16]
    folders = [str(path) for path in environments.glob(f"{tool.name}/lib/python*/site-packages")]
    for distribution in Distribution.discover(name=tool.package, path=folders):
        return distribution.version
    raise ToolError(
        f"{tool.package} is not installed in {environments / tool.name}; "
        "accepted is a folder made by benchmarks/rivals/setup.sh"
    )


def run(tool: Tool, task: Task, environments: Path, threads: int) -> dict[str, Any]:
    """Quantize with one tool in a process of its own; what it says about it."""
    task.out.parent.mkdir(parents=True, exist_ok=True)
    return run_script(tool, task.arguments, environments, threads, cwd=task.out.parent)


def run_script(
    tool: Tool, arguments: list[str], environments: Path, threads: int, cwd: Path
) -> dict[str, Any]:
    """Run a tool's script with these arguments, in a folder where it may leave logs; its result.

    Raises:
        ToolError: it stopped, or said nothing.
    """
    done = subprocess.run(
        [*script(tool, environments), *arguments],
        cwd=cwd, env=environment(threads), capture_output=True, text=True, check=False,
    )  # fmt: skip
    results = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not results:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ToolError(f"{tool.name} stopped: {lines[-1]}")
    return json.loads(results[-1].removeprefix(RESULT))


def script(tool: Tool, environments: Path) -> list[str]:
    """The command that runs a tool's script in the tool's environment."""
    rival = environments.absolute() / tool.name / "bin/python"
    python = sys.executable if tool.name == "fewbits" else rival
    return [str(python), str((HERE / "rivals" / f"run_{tool.name}.py").resolve())]


def environment(threads: int) -> dict[str, str]:
    """Of every tool's process."""
    settings = {
        "OMP_NUM_THREADS": threads,
        "GPTQMODEL_CPU_WORKERS": threads,  # its default stops on machines with two cores
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": 1,
        "TOKENIZERS_PARALLELISM": "false",
    }
    return os.environ | {key: str(value) for key, value in settings.items()}


def provenance(command: str) -> dict[str, Any]:
    """What stands beside a figure: command, commit, machine, versions; no path."""
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run(
        [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "command": command,
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
