"""The ledger, `fewbits.json`: what became of every source tensor, and what every file must hold.

Hashes of codes, scales and zero points are taken before packing, so that whoever reads the files back
through a decoder of their own can prove that the integers are those that were chosen.
"""

import math
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fewbits.checkpoint import (
    LEDGER,
    Checkpoint,
    TensorInfo,
    Written,
    hash_file,
    hash_json,
    hash_tensors,
    model_name,
    read_json,
)
from fewbits.errors import InputError
from fewbits.tensor import Levels, Note, QuantizedTensor
from fewbits.untrusted import check_types, counts, shown

Outcome = Literal["quantized", "copied", "folded", "converted", "dequantized", "dropped"]


@dataclass(frozen=True, slots=True)
class Codes:
    """Of a quantized weight: its scheme, how many matrices it holds, and sha256 of their parts."""

    scheme: str
    matrices: int
    shape: tuple[int, ...]  # (out, in), experts in front where they are stacked
    codes: str
    scale: str
    zero_point: str
    outliers: str | None = None  # columns and their weights

    @classmethod
    def of(cls, weights: list[QuantizedTensor], stacked: bool) -> Self:
        """Hash the parts of one weight, or of a stack of experts."""
        kept = [w.outliers for w in weights if w.outliers is not None]
        return cls(
            weights[0].scheme.label,
            len(weights),
            (len(weights), *weights[0].shape) if stacked else weights[0].shape,
            hash_tensors([w.codes for w in weights]),
            hash_tensors([w.scale for w in weights]),
            hash_tensors([t for w in weights for t in points(w.zero_point, w.levels)]),
            hash_tensors([t for o in kept for t in (o.columns, o.weight)]) if kept else None,
        )


def points(zero_point: Tensor, levels: Levels | None) -> list[Tensor]:
    """What is hashed as zero points: with two levels of scales also what those are made of."""
    return [zero_point] if levels is None else [zero_point, levels.steps, levels.counts]


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of one source tensor.

    An entry with an `origin` is not a source tensor: it was made from the one of that name (a head
    quantized apart from the embeddings it was tied to; a weight of which the source held codes, whose
    tensors are "converted"; "dequantized" is one of which they are written as floats).
    """

    outcome: Outcome
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    sha256: str
    written: list[Written]
    quantized: Codes | None = None
    reason: str | None = None
    origin: str | None = None

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Of the weight: where its source held codes, `shape` is that of their words."""
        if self.outcome == "dequantized":
            return self.written[0].shape
        if self.quantized is None or "float" in self.dtype:
            return self.shape
        return self.quantized.shape

    @property
    def part_of_another(self) -> bool:
        """Its values are in what was written for another entry, or nowhere."""
        return self.outcome in ("converted", "dropped")

    @classmethod
    def of(
        cls,
        info: TensorInfo,
        sha256: str,
        written: list[Written],
        quantized: Codes | None,
        folded: bool = False,
        **more: Any,
    ) -> Self:
        """An entry for a source tensor with the given header."""
        dtype = str(info.dtype).removeprefix("torch.")
        outcome: Outcome = "quantized" if quantized is not None else "folded" if folded else "copied"
        size = info.size_bytes
        return cls(outcome, dtype, info.shape, size, sha256, written, quantized, **more)


@dataclass(slots=True)
class Ledger:
    """Everything that `fewbits.json` says; see the module.

    `calibration` is what the statistics were collected on, `blocks` how each block came out, `made_with`
    what the last bits of sums depend on; all are empty where nothing was calibrated.
    """

    version: str
    request: dict[str, Any]
    source: dict[str, Any]
    tensors: dict[str, Entry] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    made_with: dict[str, Any] = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, int]:
        """Sums over the entries; the files must add up to them."""
        own = [e for e in self.tensors.values() if e.origin is None]
        linears = [e for e in self.tensors.values() if e.quantized is not None]
        return {
            "source_tensors": len(own),
            "quantized": sum(e.outcome == "quantized" for e in own),
            "copied": sum(e.outcome == "copied" for e in own),
            "folded": sum(e.outcome == "folded" for e in own),
            "converted": sum(e.outcome == "converted" for e in own),
            "dequantized": sum(e.outcome == "dequantized" for e in own),
            "dropped": sum(e.outcome == "dropped" for e in own),
            "source_bytes": sum(e.size_bytes for e in own),
            "written_bytes": sum(w.size_bytes for e in self.tensors.values() for w in e.written),
            "quantized_source_bytes": sum(e.size_bytes for e in linears),
            "quantized_written_bytes": sum(w.size_bytes for e in linears for w in e.written),
        }

    @property
    def scheme(self) -> str:
        """What all matrices have that nothing else was said of; or how many schemes were chosen."""
        labels = [label for label in self.request.get("allocation", {}) if label != "float"]
        return f"{len(labels)} schemes" if len(labels) > 1 else "".join(labels) or self.request["scheme"]

    @property
    def parameters(self) -> int:
        """Elements of all weights of the source, whatever it held them in."""
        entries = [e for e in self.tensors.values() if not e.part_of_another]
        made = [e for e in entries if e.quantized is not None or e.outcome == "dequantized"]
        codes = [e for e in made if "float" not in e.dtype]
        floats = [e for e in entries if "float" in e.dtype and e.origin is None]
        return sum(math.prod(entry.matrix_shape) for entry in codes + floats)

    def to_json(self) -> dict[str, Any]:
        """Ready to be written; holds a hash of itself."""
        value = {
            "fewbits": self.version,
            "request": self.request,
            "source": self.source,
            "made_with": self.made_with,
            "totals": self.totals,
            "calibration": self.calibration,
            "blocks": self.blocks,
            "notes": [asdict(note) for note in self.notes],
            "tensors": {name: asdict(entry) for name, entry in self.tensors.items()},
            "files": self.files,
        }
        return value | {"sha256": hash_json(plain(value))}


def describe_source(model: str | Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Which checkpoint it was: never a path of this machine."""
    sizes = {
        name: {"size_bytes": size, "header_bytes": checkpoint.header_bytes[name]}
        for name, size in checkpoint.file_bytes.items()
    }
    carried = {name: hash_file(checkpoint.folder / name) for name in checkpoint.carried()}
    return {
        "name": model_name(model),
        "config_sha256": hash_json(checkpoint.config),
        "files": sizes,
        "carried": carried,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of sums depend on."""
    gpu = {} if device.type == "cpu" else {"device": torch.cuda.get_device_name(device)}
    return gpu | {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "size_bytes": path.stat().st_size,
            "sha256": hash_file(path),
        }
        for path in files
    }


def comparable(asked: dict[str, Any]) -> dict[str, Any]:
    """Without where the source lay, and on which machine a finished result was made."""
    source = {k: v for k, v in asked["source"].items() if k != "name"}
    libraries = {k: v for k, v in asked["made_with"].items() if k in ("torch", "transformers")}
    return asked | {"source": source, "made_with": libraries}


def plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_ledger(folder: Path) -> Ledger:
    """The ledger of a checkpoint.

    Raises:
        InputError: there is none, it is not a ledger, or it was changed after it was written.
    """
    value = read_json(folder / LEDGER)
    stated = value.pop("sha256", None)
    if stated != hash_json(value):
        raise InputError(f"{folder / LEDGER} was changed: its own hash does not match")
    try:
        tensors = {name: read_entry(entry) for name, entry in value["tensors"].items()}
        notes = [Note(**note) for note in value["notes"]]
        ledger = Ledger(
            value["fewbits"], value["request"], value["source"], tensors, notes, value["files"],
            value["calibration"], value["blocks"], value["made_with"],
        )  # fmt: skip
        check_types(ledger, Ledger, "it")
        _check_values(ledger)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{folder / LEDGER} is not a ledger of this version: {error}") from None
    return ledger


def _check_values(ledger: Ledger) -> None:
    """Refuse what the types allow and no run writes; above all paths out of the folder."""
    for key in ("format", "method", "scheme"):
        check_types(ledger.request.get(key, ""), str, f"request.{key}")
    check_types(ledger.source.get("files", {}), dict[str, dict[str, int]], "source.files")
    for stated in ledger.source.get("files", {}).values():
        _check_counts(stated["size_bytes"], stated["header_bytes"])
    for name, stated in ledger.files.items():
        if not name.isprintable() or "\\" in name or {"", ".", ".."} & {*name.split("/")}:
            raise ValueError(f"{shown(name)} is no file inside of its folder")
        check_types(stated["sha256"], str, f"sha256 of {name}")
        _check_counts(stated["size_bytes"])
    for entry in ledger.tensors.values():
        _check_counts(*entry.shape, entry.size_bytes)
        for written in entry.written:
            _check_counts(*written.shape, written.size_bytes)
        if entry.quantized is not None:
            _check_counts(*entry.quantized.shape, entry.quantized.matrices)


def _check_counts(*numbers: int) -> None:
    if not counts(list(numbers)):
        raise ValueError(f"{shown(numbers)} are not all numbers from 0")


def read_entry(value: dict[str, Any]) -> Entry:
    """An entry from its JSON."""
    written = [Written(**w | {"shape": tuple(w["shape"])}) for w in value["written"]]
    codes = value["quantized"]
    codes = None if codes is None else Codes(**codes | {"shape": tuple(codes["shape"])})
    return Entry(**value | {"shape": tuple(value["shape"]), "written": written, "quantized": codes})
