"""Reads a written checkpoint back and compares it with its ledger, and with its source.

Integers are unpacked by other people's libraries, not by our own reader, and compared as integers:
dequantized floats would not do, bfloat16 merges neighbouring 8-bit codes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewbits.checkpoint import (
    CONFIG,
    LEDGER,
    RUN,
    Checkpoint,
    encode_json,
    hash_file,
    hash_json,
    hash_tensor,
    hash_tensors,
    read_header,
    read_json,
)
from fewbits.errors import InputError, VerificationError, first_line
from fewbits.formats import FORMATS, Format
from fewbits.formats.packed import on_disk
from fewbits.gguf_file import open_gguf
from fewbits.ledger import Codes, Entry, Ledger, points, read_ledger
from fewbits.load import open_model
from fewbits.scheme import QuantScheme
from fewbits.structure import find_head, find_matrices, skeleton
from fewbits.untrusted import check_file

_READ_BY_CLIENTS = (".safetensors", ".gguf", ".bin", ".json", ".jinja", ".model", ".tiktoken")

Progress = Callable[[str, int, int], None]  # what, how many done, of how many


@dataclass(slots=True)
class Verification:
    """What was compared, and every difference found."""

    tensors: int = 0
    codes: int = 0
    files: int = 0
    source_tensors: int = 0
    problems: list[str] = field(default_factory=list)

    def raise_if_failed(self, out: Path) -> None:
        """Raise if there are problems.

        Raises:
            VerificationError: names them all.
        """
        if self.problems:
            raise VerificationError(
                f"{out} failed verification ({len(self.problems)}): " + "; ".join(self.problems)
            )


def verify(
    out: str | Path, source: str | Path | None = None, progress: Progress | None = None
) -> Verification:
    """Compare every file, tensor and integer of a checkpoint with its ledger.

    Args:
        out: a checkpoint that fewbits wrote.
        source: the float checkpoint it was made from; compared too if given.

    Raises:
        InputError: `out` has no ledger.
        VerificationError: anything differs; all differences are named.
    """
    out, source = Path(out), None if source is None else Path(source)
    try:
        ledger = read_ledger(out)
    except InputError as error:
        if (out / LEDGER).is_file():
            raise VerificationError(f"{out} failed verification (1): {error}") from None
        raise
    result = Verification()
    problems = result.problems
    if encode_json(read_json(out / LEDGER)) != (out / LEDGER).read_bytes():  # 1E-9 is 1e-9 in JSON
        problems.append(f"{LEDGER} was written by something else")
    readable = _check_files(out, ledger, result)
    tensors = _open_tensors(out, readable, problems)
    _check_names(ledger, tensors, problems)
    _check_sums(out, ledger, readable, problems)
    total = len(ledger.tensors)
    for i, (name, entry) in enumerate(ledger.tensors.items()):
        _check_entry(name, entry, ledger, tensors, result)
        if progress is not None:
            progress("verify", i + 1, total)
    _check_config(out, ledger, problems)
    if source is not None:
        _check_source(source, ledger, result, progress)
    result.raise_if_failed(out)
    return result


class _Tensors:
    """Tensors of several files, read one at a time; `dtype_shape` has the headers."""

    def __init__(self) -> None:
        self.dtype_shape: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._files: dict[str, Any] = {}

    def add(self, path: Path) -> None:
        """Open one file."""
        if path.suffix == ".gguf":
            opened = open_gguf(path)
            for name, info in opened.tensors.items():
                self.dtype_shape[name] = (str(info.dtype).removeprefix("torch."), info.shape)
                self._files[name] = opened
            return
        infos, _ = read_header(path)
        handle = safe_open(path, framework="pt")
        for info in infos:
            self.dtype_shape[info.name] = (str(info.dtype).removeprefix("torch."), info.shape)
            self._files[info.name] = handle

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        tensor: Tensor = file.read(name) if isinstance(file, Checkpoint) else file.get_tensor(name)
        return tensor


def _check_files(out: Path, ledger: Ledger, result: Verification) -> list[str]:
    """Compare sizes and hashes; the weight files that exist."""
    found = []
    for name, stated in ledger.files.items():
        path = out / name
        if not path.is_file():
            result.problems.append(f"{name} is missing")
            continue
        try:
            size = check_file(path, out)
        except InputError as error:
            result.problems.append(str(error))
            continue
        result.files += 1
        if size != stated["size_bytes"]:
            result.problems.append(f"{name} has {size} bytes instead of {stated['size_bytes']}")
        elif hash_file(path) != stated["sha256"]:
            result.problems.append(f"{name} was changed")
        if name.endswith((".safetensors", ".gguf")):
            found.append(name)
    listed = set(ledger.files) | {LEDGER, RUN}
    for path in sorted(out.iterdir()):  # clients read such files, ours or not; cards are for people
        if path.suffix in _READ_BY_CLIENTS and path.name not in listed:
            result.problems.append(f"{path.name} is not in the ledger")
    return found


def _open_tensors(out: Path, files: list[str], problems: list[str]) -> _Tensors:
    tensors = _Tensors()
    for name in files:
        try:
            tensors.add(out / name)
        except (InputError, SafetensorError, OSError) as error:
            problems.append(str(error))
    return tensors


def _check_names(ledger: Ledger, tensors: _Tensors, problems: list[str]) -> None:
    expected = {w.name for entry in ledger.tensors.values() for w in entry.written}
    present = set(tensors.dtype_shape)
    problems += [f"tensor {name} is missing" for name in sorted(expected - present)]
    problems += [f"tensor {name} is not in the ledger" for name in sorted(present - expected)]


def _check_sums(out: Path, ledger: Ledger, files: list[str], problems: list[str]) -> None:
    """Bytes of tensors and headers must add up to the files, on both sides."""
    totals = ledger.totals
    headers = 0
    for name in files:
        if name.endswith(".gguf"):
            return  # a container that has floats in other dtypes; its hash is in the ledger
        try:
            headers += read_header(out / name)[1]
        except InputError:
            return  # reported already
    on_disk = sum((out / name).stat().st_size for name in files)
    if totals["written_bytes"] + headers != on_disk and not problems:
        problems.append(
            f"{totals['written_bytes']} bytes of tensors do not add up to the files' {on_disk}"
        )
    source = ledger.source.get("files", {}).values()
    stated = sum(f["size_bytes"] - f["header_bytes"] for f in source if f["header_bytes"])
    if all(f["header_bytes"] for f in source) and stated != totals["source_bytes"]:
        problems.append(f"the ledger accounts for {totals['source_bytes']} of {stated} source bytes")


def _check_entry(
    name: str, entry: Entry, ledger: Ledger, tensors: _Tensors, result: Verification
) -> None:
    before = len(result.problems)
    for written in entry.written:
        if written.name not in tensors.dtype_shape:
            continue  # reported already
        result.tensors += 1
        if tensors.dtype_shape[written.name] != (written.dtype, written.shape):
            result.problems.append(f"tensor {written.name} has another dtype or shape")
        elif hash_tensor(tensors[written.name]) != written.sha256:
            result.problems.append(f"tensor {written.name} has other values")
    if entry.outcome == "copied":
        same = [w for w in entry.written if (w.name, w.sha256) == (name, entry.sha256)]
        if len(same) != 1:
            result.problems.append(f"tensor {name} is not the source's, bit for bit")
    complete = all(written.name in tensors.dtype_shape for written in entry.written)
    if entry.quantized is not None and complete and len(result.problems) == before:
        result.codes += 1
        try:
            result.problems += _check_codes(name, entry.quantized, ledger, tensors)
        except Exception as error:  # tensors that are not what the ledger says fail in many ways
            result.problems.append(f"{name}: its integers cannot be read back: {first_line(error)}")


def _check_codes(name: str, stated: Codes, ledger: Ledger, tensors: _Tensors) -> list[str]:
    """Unpack by another library and compare with what was chosen."""
    scheme = QuantScheme.parse(stated.scheme)
    layout = FORMATS[ledger.request["format"]]
    present = [tensor for tensor in layout.tensors(name).every if tensor in tensors.dtype_shape]
    whole = {tensor: tensors[tensor] for tensor in present}
    stacked = len(stated.shape) == 3
    rows, columns = stated.shape[-2:]
    if stated.matrices != (stated.shape[0] if stacked else 1):
        return [f"{name}: the ledger says {stated.matrices} matrices of {stated.shape}"]
    parts: dict[str, list[Tensor]] = {"codes": [], "scale": [], "zero_point": []}
    for i in range(stated.matrices):
        piece = {tensor: values[i] for tensor, values in whole.items()} if stacked else whole
        found = layout.decode(name, piece, scheme, (rows, columns))
        scale, zero_point = _once(found.scale, scheme), _once(found.zero_point, scheme)
        if scale is None or zero_point is None:
            return [f"{name}: its one scale is not the same in every row"]
        parts["codes"].append(found.codes)
        parts["scale"].append(scale)
        parts["zero_point"] += points(zero_point, found.levels)
    hashes: dict[str, str | None] = {part: hash_tensors(values) for part, values in parts.items()}
    hashes["outliers"] = _hash_outliers(name, tensors)
    return [
        f"{name}: the {part} read back are not those that were chosen"
        for part, value in hashes.items()
        if value != getattr(stated, part)
    ]


def _hash_outliers(name: str, tensors: _Tensors) -> str | None:
    """Of columns and weights that are kept in 16 bit, matrix after matrix; None if there are none."""
    names = (f"{name}_outlier_columns", f"{name}_outliers")
    if not all(n in tensors.dtype_shape for n in names):
        return None
    columns, weights = (tensors[n] for n in names)
    if columns.ndim == 1:
        columns, weights = columns[None], weights[None]
    pairs = zip(columns.long(), weights, strict=True)
    return hash_tensors([tensor for pair in pairs for tensor in pair])


def _once(values: Tensor, scheme: QuantScheme) -> Tensor | None:
    """Undo the repetition of a whole tensor's scale; None if the rows differ."""
    if scheme.granularity != "tensor":
        return values
    return values[:1] if bool((values == values[:1]).all()) else None


def _check_config(out: Path, ledger: Ledger, problems: list[str]) -> None:
    """What config.json tells a client about each weight must be what the ledger says."""
    try:
        config = open_model(out).config
        layout = FORMATS[ledger.request["format"]]
        quantization = config["quantization_config"]
        if not layout.reads(quantization):
            problems.append(f"{CONFIG} says quant_method {quantization['quant_method']!r}")
            return
        model = skeleton(config)
        entries = ledger.tensors.items()
        shapes = {name: entry.matrix_shape for name, entry in entries if not entry.part_of_another}
        matrices = find_matrices(model, shapes)[0]
        listed = layout.quantized_names(
            quantization, {w.name for _, entry in entries for w in entry.written}
        )
        modules = {
            name: m.module
            for name, m in matrices.items()
            # Most formats speak of linears only: they say nothing of an embedding in float.
            if m.kind != "embedding" or name in listed or ledger.tensors[name].quantized is not None
        }
        head = find_head(model)
        if head is not None and head not in modules.values():  # tied: it has no tensor of its own
            modules[f"{head}.weight"] = head
        for name, module in modules.items():
            entry = ledger.tensors.get(name)
            stated = None if entry is None or entry.quantized is None else entry.quantized.scheme
            told = _told(layout, quantization, name, module)
            expected = "float" if stated is None else on_disk(QuantScheme.parse(stated)).label
            if told != expected:
                problems.append(f"{CONFIG} says {told} of {name} instead of {expected}")
    except Exception as error:  # a config of a stranger can fail in any way
        problems.append(f"{CONFIG}: {type(error).__name__} {first_line(error)}")


def _told(layout: Format, quantization: dict[str, Any], name: str, module: str) -> str:
    scheme = layout.scheme_of(quantization, name, module)
    return "float" if scheme is None else scheme.label


def _check_source(source: Path, ledger: Ledger, result: Verification, progress: Progress | None) -> None:
    checkpoint = open_model(source)
    if hash_json(checkpoint.config) != ledger.source.get("config_sha256"):
        result.problems.append(f"the source's {CONFIG} is another than when it was read")
    entries = {name: e for name, e in ledger.tensors.items() if e.origin is None}
    for name in sorted(checkpoint.tensors.keys() ^ entries.keys()):
        where = "source" if name in entries else "ledger"
        result.problems.append(f"source tensor {name} is not in the {where}")
    for i, (name, entry) in enumerate(entries.items()):
        if name in checkpoint.tensors:
            result.source_tensors += 1
            if hash_tensor(checkpoint.read(name)) != entry.sha256:
                result.problems.append(f"source tensor {name} has other values than when it was read")
        if progress is not None:
            progress("compare with source", i + 1, len(entries))
