"""The models that benchmarks quantize, and their text: what calibrates and what judges never overlap."""

import functools
import hashlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "reference"))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from corpus import documents
from twin import write_twin

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared/data"  # beside the repository on some machines
STORIES = SHARED / "text/tinystories_valid.txt"
END_OF_STORY = "<|endoftext|>"


@dataclass(frozen=True)
class Sample:
    """A model and what is used with it.

    Args:
        group: the group size that its widths allow; None for whole rows.
        text: which text it was trained on.
        twin: not the model itself but its outlier twin.
    """

    name: str
    source: Path
    group: int | None
    text: str
    twin: bool = False


MODELS = {
    sample.name: sample
    for sample in (
        Sample("reference", ROOT / "reference/model", 128, "python"),
        Sample("twin", ROOT / "reference/model", 128, "python", twin=True),
        Sample("babyllama105", SHARED / "models/babyllama105", 32, "stories"),
        Sample("stories260K", SHARED / "models/stories260K", None, "stories"),
    )
}


def prepare(sample: Sample, work: Path) -> Path:
    """Its checkpoint in bfloat16, as large models come: then every tool stores scales of 16 bits."""
    folder = work / "models" / sample.name
    if not (folder / "model.safetensors").exists():
        shutil.rmtree(folder, ignore_errors=True)
        if sample.twin:
            write_twin(sample.source, folder)
        else:
            _write_bfloat16(sample.source, folder)
    return folder


def _write_bfloat16(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = AutoConfig.from_pretrained(source)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    tensors = load_file(source / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})


def texts(sample: Sample, split: str) -> list[str]:
    """Documents to calibrate with ("train") or to judge by ("heldout")."""
    if sample.text == "python":
        return [text for _, text in documents(split)]
    stories = [s.strip() for s in STORIES.read_text(encoding="utf-8").split(END_OF_STORY) if s.strip()]
    middle = len(stories) // 2
    return stories[:middle] if split == "train" else stories[middle:]


@functools.cache
def token_stream(folder: Path, sample: Sample, split: str) -> tuple[Tensor, int]:
    """All documents of a split as one row of token ids, BOS before each; and BOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos: int = tokenizer.bos_token_id
    rows = tokenizer(texts(sample, split), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([i for row in rows for i in (bos, *row)]), bos


def calibration_ids(folder: Path, sample: Sample, count: int, length: int, seed: int) -> Tensor:
    """Random windows, (count, length), each begun with BOS as at evaluation."""
    ids, bos = token_stream(folder, sample, "train")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length, (count,), generator=generator).tolist()
    windows = torch.stack([ids[start : start + length] for start in starts])
    windows[:, 0] = bos
    return windows


def heldout_ids(folder: Path, sample: Sample, count: int, length: int) -> Tensor:
    """At most `count` windows, evenly spread over the held-out text, each begun with BOS."""
    ids, bos = token_stream(folder, sample, "heldout")
    pieces = ids[: len(ids) // length * length].view(-1, length)
    places = torch.linspace(0, len(pieces) - 1, min(count, len(pieces))).round().long()
    windows = pieces[places]
    windows[:, 0] = bos
    return windows


def write_ids(ids: Tensor, path: Path) -> None:
    """As `rivals/job.py` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"ids": ids.contiguous()}, path)


def hash_ids(ids: Tensor) -> str:
    """Short, of the ids and their arrangement."""
    return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()[:16]
