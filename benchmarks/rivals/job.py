"""One quantization by one tool: what is asked of it, and what is told about it, the same for every tool.

Runs in each tool's own environment: imports nothing of fewbits. A script reads a `Job`, quantizes,
saves in the tool's own format, loads that again with the tool's own loader, and hands the weights over
as ordinary float32. So every result is judged by the same code on the same tokens, and a check shows
that the float32 model is what the tool itself would have run.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

CHECKED_SAMPLES = 8  # of the calibration ids, for the comparison with the tool's own forward pass
HEAD = "lm_head.weight"
WEIGHTS = (".safetensors", ".gguf", ".pt")  # files of weights; beside them lie config and tokenizer


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Args:
        model: folder of the float checkpoint.
        out: folder to be made; holds `packed`, the tool's own files, and `dense`, their float32 values.
        bits: of a code, or on average for tools that mix.
        group: input columns that share a scale; None for whole rows.
        ids: calibration tokens, (samples, length).
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
    ids: Tensor
    bits_per_weight: float | None
    format: str | None
    embeddings: bool
    statistics: Path | None

    @property
    def packed(self) -> Path:
        """The tool's own files."""
        return self.out / "packed"

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        """The calibration ids as tokenized datasets have them."""
        return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in self.ids.tolist()]


def read_job(methods: tuple[str, ...]) -> Job:
    """From the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--bits", type=number, default=4)
    parser.add_argument("--group", type=int, help="columns that share a scale; left out: whole rows")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--ids", type=Path, required=True, help="safetensors file with `ids`")
    parser.add_argument("--bits-per-weight", type=float, help="of the whole file, at most")
    parser.add_argument("--format")
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--statistics", type=Path, help="folder that fewbits makes, or finds again")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    ids = load_file(args.ids)["ids"]
    return Job(
        args.model, args.out, args.method, args.bits, args.group, not args.asymmetric, ids,
        args.bits_per_weight, args.format, args.embeddings, args.statistics,
    )  # fmt: skip


def number(text: str) -> float:
    """An integer where it is written as one: most tools take no other bits."""
    return int(text) if text.isdecimal() else float(text)


@dataclass
class Clock:
    """Seconds per phase, of the wall and of all cores."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        wall, cpu = time.perf_counter(), cpu_s()
        yield
        self.wall[name] = time.perf_counter() - wall
        self.cpu[name] = cpu_s() - cpu


def cpu_s() -> float:
    """Of this process and the children that have ended."""
    return sum(os.times()[:4])


@dataclass
class Storage:
    """Bits that the quantized matrices take: codes, scales, zero points."""

    bits: float = 0
    weights: int = 0

    def add(self, job: Job, weights: int, scale: Tensor, bits: float | None = None) -> None:
        """A matrix of so many weights; zero points that are constant are not counted, stored or not.

        `bits` of a code, where not all have those that were asked for.
        """
        bits = job.bits if bits is None else bits
        zero_point = 0 if job.symmetric else bits
        self.bits += weights * bits + scale.numel() * (8 * scale.dtype.itemsize + zero_point)
        self.weights += weights

    @property
    def per_weight(self) -> float:
        """The effective bits by which results of different tools are matched."""
        return self.bits / self.weights


def compressed_tensors_storage(job: Job, state: dict[str, Tensor]) -> Storage:
    """Of `packed`, written in compressed-tensors' layout; `state` has the shapes."""
    storage = Storage()
    for name, tensor in load_tensors(job.packed).items():
        if name.endswith(".weight_scale"):
            storage.add(job, state[name.removesuffix("_scale")].numel(), tensor)
    return storage


@torch.no_grad()
def check_logits(job: Job, model: nn.Module) -> Tensor:
    """A quantized model's, on a few of the calibration samples."""
    return model(job.ids[:CHECKED_SAMPLES], use_cache=False).logits


def report(
    job: Job,
    clock: Clock,
    storage: Storage,
    own_logits: Tensor,
    state: dict[str, Tensor],
    packages: tuple[str, ...],
    more: dict[str, object] | None = None,
) -> None:
    """Write the dense model, compare it with the tool's own forward pass, print one line of JSON.

    Args:
        own_logits: `check_logits` of the model that the tool itself would run.
        state: the weights of `packed` in float32, by the names of the source.
        packages: whose versions matter.
        more: to be told beside.
    """
    dense = write_dense(job, state)
    own, ours = (F.log_softmax(x.double(), -1) for x in (own_logits, check_logits(job, dense)))
    files = [path for path in job.packed.rglob("*") if path.is_file()]
    result = {
        "effective_bits": storage.per_weight,
        "own_forward_kl": float((own.exp() * (own - ours)).sum(-1).mean()),
        "wall_s": clock.wall,
        "cpu_s": clock.cpu,
        "process_cpu_s": cpu_s(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "packed_bytes": sum(path.stat().st_size for path in files),
        "weight_bytes": sum(path.stat().st_size for path in files if path.suffix in WEIGHTS),
        "parameters": sum(tensor.numel() for tensor in load_tensors(job.model).values()),
        "threads": torch.get_num_threads(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", *packages)},
    }
    print("RESULT " + json.dumps(result | (more or {})), flush=True)


def write_dense(job: Job, state: dict[str, Tensor]) -> nn.Module:
    """The model in float32, written to `dense` and returned.

    What the tool left alone, apart from a cast to its own dtype, is taken from the source: a cast
    of norms and embeddings is no part of the method.
    """
    tensors = load_tensors(job.model)
    for name, source in tensors.items():
        made = state.get(name)
        if made is not None and not torch.equal(made, source.to(made.dtype)):
            tensors[name] = made
    folder = job.out / "dense"
    folder.mkdir()
    config = AutoConfig.from_pretrained(job.model)
    config.dtype = torch.float32
    if HEAD in state and HEAD not in tensors:  # it was tied, and was given codes of its own
        tensors[HEAD] = state[HEAD]
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    floats = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(floats, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
