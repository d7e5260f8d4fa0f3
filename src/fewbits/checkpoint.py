"""Checkpoint folders: what is in one, without reading its weights.

Headers of safetensors are parsed here, and strictly, because everything that can be said about a model
before the hours are spent is in them. Tensors stay memory-mapped: reading one costs page cache, not
memory of our own.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewbits.errors import InputError, first_line
from fewbits.tensor import Note
from fewbits.untrusted import MAX_JSON, check_file, counts, parse_json, read_bytes, shown

CONFIG, LEDGER, RUN = "config.json", "fewbits.json", "run.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# What a client needs beside weights and config. Model cards describe the source, so they stay behind.
_CARRIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_OTHER_CONFIGS = ("quantize_config.json", "quant_config.json")  # of quantized sources: no longer true
_CARRIED_FOLDERS = ("additional_chat_templates",)

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
_MAX_LEDGER = 2**27  # bytes; 671 billion parameters take about 6 * 10**7, 1400 for each tensor
_MAX_INDEX = 2**26  # bytes: 600,000 tensors
_MAX_DIMS = 64  # of a tensor: what torch holds
_MAX_NAME = 1000  # characters of a tensor's name; not tuned
# What config.json may count: no more blocks than there are tensors, nothing wider than all values
# together, and never more than the second number. Below the first it does not matter: some configs
# name blocks and widths that are not there. Not tuned.
_BLOCKS = re.compile(r"layers|n_layer$|num_layer$|_blocks$"), 128, 2048
_WIDTHS = re.compile(r"size|dim|heads|experts|rank"), 2**20, 2**28
MAX_SHARD_BYTES = 2**32  # of a weight file, as other tools cut them; not tuned
_SPARSE = 2**20  # bytes; file systems may keep smaller files without a block of their own; not tuned


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str

    @property
    def size_bytes(self) -> int:
        """Of its values."""
        return self.count * self.dtype.itemsize

    @property
    def count(self) -> int:
        """Of its elements."""
        return math.prod(self.shape)


@dataclass(slots=True)
class Checkpoint:
    """A folder of weights, with its headers read and its tensors not.

    `tensors` maps names to headers, `file_bytes` weight files to their sizes, `header_bytes` the part
    of each that is not tensor values (0 for torch files, whose container is not accounted for).
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    file_bytes: dict[str, int]
    header_bytes: dict[str, int]
    notes: list[Note] = field(default_factory=list)
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """A tensor, memory-mapped where the file allows it. Do not modify.

        Raises:
            InputError: the file cannot be read.
        """
        info = self.tensors[name]
        path = self.folder / info.file
        if info.file not in self._open:
            self._open[info.file] = (
                _open_torch(path, self.notes) if path.suffix == ".bin" else _open_safetensors(path)
            )
        source = self._open[info.file]
        try:
            tensor: Tensor = source[name] if isinstance(source, dict) else source.get_tensor(name)
        except (SafetensorError, RuntimeError, KeyError, OSError) as error:
            raise InputError(f"{path}: {name} cannot be read: {first_line(error)}") from None
        if isinstance(source, dict) and tensor.untyped_storage().nbytes() != tensor.nbytes:
            return tensor.clone()  # torch files may hold views of each other; safetensors may not
        return tensor

    def carried(self) -> list[str]:
        """Names of the files beside that go along unchanged; see `carried_files`."""
        return carried_files(self.folder)

    def close(self) -> None:
        """Drop the mappings; they are made again when needed."""
        self._open.clear()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its values: what the model computes in, unless told otherwise."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.count
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def resolve(model: str | Path) -> Path:
    """A local folder or GGUF file, or the local snapshot of a hub id, downloaded if needed.

    Raises:
        InputError: neither exists.
    """
    path = Path(model)
    if str(model) and path.is_dir():
        return path
    if path.exists() and path.suffix == ".gguf":
        return path
    if path.exists():
        raise InputError(
            f"{model} is a file; accepted are a folder, a .gguf file and a hub id like owner/name"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
        raise InputError(f"{model}: no such folder; accepted are a folder and a hub id like owner/name")
    return _download(str(model))


def model_name(model: str | Path) -> str:
    """Of a folder or a file its own name, never a path of this machine; a hub id as it is."""
    return Path(model).resolve().name if Path(model).exists() else str(model)


def _download(repository: str) -> Path:
    """The hub's newest snapshot; without a network the cached one, if it is whole."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # model_info asks once; other calls retry for half a minute where there is no network
        files = [sibling.rfilename for sibling in HfApi().model_info(repository).siblings or []]
        weights = [f for f in files if re.fullmatch(r"model[^/]*\.safetensors", f)]
        weights = weights or [f for f in files if re.fullmatch(r"pytorch_model[^/]*\.bin", f)]
        return Path(snapshot_download(repository, allow_patterns=[*_CARRIED, *weights]))
    except Exception as error:  # the client raises many kinds; each means that we have no model
        with contextlib.suppress(Exception):
            cached = Path(snapshot_download(repository, local_files_only=True))
            wanted = _weight_files(cached)
            if wanted and all((cached / file).is_file() for file in wanted):
                return cached
        reason = first_line(error)
        raise InputError(
            f"{repository}: no such folder, and the hub did not give it ({reason}); "
            "accepted are a folder and a hub id like owner/name"
        ) from error


def open_headers(model: str | Path) -> Checkpoint:
    """Config and headers of a folder or a hub id; of the second no weights are downloaded.

    The checkpoint can be planned with, not read from. A note says where values are missing.

    Raises:
        InputError: as `resolve` and `open_checkpoint`, or a repository without safetensors.
    """
    if Path(model).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
        return open_checkpoint(resolve(model), headers_only=True)
    return _remote_headers(str(model))


def _remote_headers(repository: str) -> Checkpoint:
    """By requests for ranges of bytes; without a network from the cached snapshot, if there is one."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        found = HfApi().get_safetensors_metadata(repository)
        config = read_json(Path(hf_hub_download(repository, CONFIG)))
    except Exception as error:  # the client raises many kinds; each means that we have no headers
        with contextlib.suppress(Exception):
            cached = Path(snapshot_download(repository, local_files_only=True))
            return open_checkpoint(cached, headers_only=True)
        raise InputError(
            f"{repository}: no such folder, and the hub gave no headers of safetensors "
            f"({first_line(error)}); accepted are a folder and a hub id like owner/name"
        ) from error
    checkpoint = Checkpoint(Path(repository), config, {}, {}, {})
    for file, part in found.files_metadata.items():
        unknown = sorted({t.dtype for t in part.tensors.values()} - _DTYPES.keys())
        if unknown:
            accepted = ", ".join(_DTYPES)
            raise InputError(f"{repository}: {file} holds {unknown[0]}; accepted are {accepted}")
        infos = [
            TensorInfo(name, _DTYPES[t.dtype], tuple(t.shape), file) for name, t in part.tensors.items()
        ]
        checkpoint.tensors |= {info.name: info for info in infos}
        values = sum(info.size_bytes for info in infos)
        checkpoint.header_bytes[file] = len(encode_header(infos))  # as we would write it
        checkpoint.file_bytes[file] = checkpoint.header_bytes[file] + values
    checkpoint.notes.append(Note("fact", repository, "headers only, from the hub; no weights were read"))
    return checkpoint


def open_checkpoint(folder: Path, headers_only: bool = False) -> Checkpoint:
    """Read config and headers, in a moment even for the largest models.

    Args:
        folder: of the checkpoint.
        headers_only: files that end behind their header are accepted too, with a note; their tensors
            cannot be read, and `file_bytes` says how large they would be.

    Raises:
        InputError: no config, no weights, a missing shard, a corrupt header; names the file.
    """
    gguf = [folder] if folder.is_file() else [] if has_weights(folder) else [*folder.glob("*.gguf")]
    if gguf:
        raise InputError(
            f"{gguf[0]} is GGUF, to be loaded or converted; accepted here are safetensors and torch"
            " files"
        )
    config = read_json(folder / CONFIG)
    _check_quantization(folder / CONFIG, config.get("quantization_config"))
    files = _weight_files(folder)
    if not files:
        raise InputError(
            f"{folder} has no weights; accepted are {SAFETENSORS} or {TORCH}, whole or sharded "
            "with an index"
        )
    checkpoint = Checkpoint(folder, config, {}, {}, {})
    bare: list[str] = []
    for file in files:
        path = folder / file
        if not os.path.lexists(path):
            raise InputError(f"{path} is missing; the index lists it")
        size = check_file(path, folder)
        if path.suffix == ".bin":
            infos, header = _torch_infos(path, checkpoint)
        else:
            infos, header = read_header(path, headers_only)
            whole = header + sum(info.size_bytes for info in infos)
            bare += [file] if headers_only and _values_missing(path, whole) else []
            size = whole if headers_only else size
        for info in infos:
            if info.name in checkpoint.tensors:
                other = checkpoint.tensors[info.name].file
                raise InputError(f"{path}: tensor {info.name} is also in {other}")
            checkpoint.tensors[info.name] = info
        checkpoint.file_bytes[file] = size
        checkpoint.header_bytes[file] = header
    if bare:
        more = f" and {len(bare) - 1} more" if len(bare) > 1 else ""
        what = "headers only: the values of the weights are not here, only what was said of them"
        checkpoint.notes.append(Note("fact", bare[0] + more, what))
    _check_index(folder, checkpoint)
    values = sum(info.count for info in checkpoint.tensors.values())
    check_config(folder / CONFIG, config, len(checkpoint.tensors), values)
    return checkpoint


def _check_quantization(path: Path, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{path}: quantization_config is {shown(value)}; accepted is an object")


def check_config(path: Path, value: Any, tensors: int = 2**63, values: int = 2**63) -> None:
    """Refuse a config that counts more blocks or wider ones than there can be, before they are built.

    Args:
        path: of the config, for the message.
        value: the config, or a part of it.
        tensors, values: how many of each the checkpoint holds; without them the absolute limits stand.

    Raises:
        InputError: a number of blocks or a width, told by its name, is beyond the limit.
    """
    limits = [
        (_BLOCKS[0], 0, min(max(tensors, _BLOCKS[1]), _BLOCKS[2])),
        (_WIDTHS[0], -_WIDTHS[1], min(max(values, _WIDTHS[1]), _WIDTHS[2])),  # -1 says: all of them
    ]
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        pending += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        for key, number in item.items() if isinstance(item, dict) else ():
            limit = next(((low, high) for name, low, high in limits if name.search(key)), None)
            if limit is None or not isinstance(number, int | float):
                continue
            if not limit[0] <= number <= limit[1]:
                raise InputError(
                    f"{path}: {shown(key)} is {shown(number)}; accepted is at most {limit[1]}, by what "
                    "the weight files hold"
                )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in which no key stands twice.

    Raises:
        InputError: missing, unreadable, a link out of its folder, not such an object, or too large.
    """
    most = {LEDGER: _MAX_LEDGER, SAFETENSORS_INDEX: _MAX_INDEX, TORCH_INDEX: _MAX_INDEX}
    if not os.path.lexists(path):
        raise InputError(f"{path.parent} has no {path.name}")
    try:
        value = parse_json(read_bytes(path, most.get(path.name, MAX_JSON), path.parent).decode())
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; accepted is a JSON object")
    return value


def has_weights(folder: Path) -> bool:
    """Whether there are weights of a kind that `open_checkpoint` reads, or what says so."""
    names = (SAFETENSORS, SAFETENSORS_INDEX, TORCH, TORCH_INDEX)
    return any(os.path.lexists(folder / name) for name in names)


def _weight_files(folder: Path) -> list[str]:
    # The whole file before the shards, as transformers does where a folder holds both.
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (TORCH, TORCH_INDEX)):
        if os.path.lexists(folder / single):  # a link to nothing is not passed over
            return [single]
        if os.path.lexists(folder / index):
            return _indexed_files(folder / index)
    return []


def _indexed_files(index: Path) -> list[str]:
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{index} has no weight_map")
    suffix = ".bin" if index.name == TORCH_INDEX else ".safetensors"
    files = []
    for file in dict.fromkeys(item if isinstance(item, str) else None for item in weights.values()):
        if file is None or not file.isprintable() or Path(file).name != file or "\\" in file:
            raise InputError(f"{index}: {shown(file)} is not the name of a file beside it")
        if not file.endswith(suffix):
            raise InputError(f"{index} lists {shown(file)}; accepted are names that end in {suffix}")
        files.append(file)
    return sorted(files)


def _check_index(folder: Path, checkpoint: Checkpoint) -> None:
    first = next(iter(checkpoint.file_bytes))
    path = folder / (TORCH_INDEX if first.endswith(".bin") else SAFETENSORS_INDEX)
    if first in (SAFETENSORS, TORCH) or not path.is_file():
        return
    for name, file in read_json(path)["weight_map"].items():
        if name not in checkpoint.tensors or checkpoint.tensors[name].file != file:
            name = name if name.isprintable() and len(name) <= _MAX_NAME else shown(name)
            raise InputError(f"{folder / file} does not hold tensor {name}, which the index lists")


def _values_missing(path: Path, whole: int) -> bool:
    """Whether a file was cut behind its header, or is sparse: a hole where its values should be."""
    status = path.stat()
    blocks = getattr(status, "st_blocks", None)  # of 512 bytes, wherever there is the field
    if blocks is None or whole < _SPARSE:
        return status.st_size < whole
    return status.st_size < whole or 512 * blocks < whole // 2


def read_header(path: Path, headers_only: bool = False) -> tuple[list[TensorInfo], int]:
    """Tensors of a safetensors file, and how many of its bytes are header.

    Layout: 8 bytes N, N bytes of JSON, then the values; offsets count from the values' start. With
    `headers_only` the file may end before they do.

    Raises:
        InputError: no such file, or a header that is not wholly as it should be; names the tensor.
    """
    size = check_file(path, path.parent)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(
                    f"{path} is truncated or corrupt: its header does not fit in {size} bytes"
                )
            if length > MAX_JSON:
                raise InputError(f"{path} has a header of {length} bytes; accepted are {MAX_JSON}")
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        # An entry has three brackets in 50 bytes or more. Empty objects would take 20 times their bytes.
        if raw.count(b"{") + raw.count(b"[") > len(raw) // 8 + 8:
            raise ValueError("it holds more objects and lists than any tensors need")
        header = parse_json(raw.decode())
        if not isinstance(header, dict):
            raise ValueError(f"it is a {type(header).__name__}")
        _check_metadata(header.pop("__metadata__", {}))
        shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # experts have few: one object for each
        entries = [_header_entry(name, entry, path.name, shapes) for name, entry in header.items()]
    except ValueError as error:
        raise InputError(f"{path} has a corrupt header: {error}") from None
    spans = sorted((begin, end) for _, begin, end in entries)
    starts, ends = [0, *(end for _, end in spans)], [*(begin for begin, _ in spans), size - 8 - length]
    if headers_only:
        ends[-1] = max(ends[-1], starts[-1])
    if starts != ends:
        raise InputError(f"{path} is truncated or corrupt: {_misplaced(entries, size - 8 - length)}")
    return [info for info, _, _ in entries], 8 + length


def _check_metadata(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"__metadata__ is {shown(value)}; accepted is an object of strings")


def _header_entry(
    name: str, entry: Any, file: str, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> tuple[TensorInfo, int, int]:
    """A tensor, and where its values begin and end."""
    _check_name(name)
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is {shown(entry)}; accepted is an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {shown(dtype)}; accepted are {', '.join(_DTYPES)}")
    if not counts(shape) or len(shape) > _MAX_DIMS:
        raise ValueError(
            f"{name} has shape {shown(shape)}; accepted are at most {_MAX_DIMS} numbers from 0"
        )
    if not counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has offsets {shown(offsets)}; accepted are two numbers from 0")
    dims = tuple(shape)
    shape = shapes.get(dims)
    if shape is None and not _overflows(dims):
        shape = shapes[dims] = dims
    info = TensorInfo(name, _DTYPES[dtype], dims if shape is None else shape, file)
    begin, end = offsets
    if shape is None or end - begin != info.size_bytes:
        raise ValueError(f"{name} does not fit its offsets")
    return info, begin, end


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
        raise ValueError(
            f"{shown(name)} is no name of a tensor; accepted are up to {_MAX_NAME} printable characters"
        )


def _overflows(shape: tuple[int, ...]) -> bool:
    """Whether libraries that count in 64 bits cannot hold it; a zero may hide it from its size."""
    product = 1
    for n in shape:
        product *= max(n, 1)
        if product >= 2**63:
            return True
    return False


def _misplaced(entries: list[tuple[TensorInfo, int, int]], size: int) -> str:
    """Which tensor breaks that values stand one after the other and fill the file."""
    place = 0
    for info, begin, end in sorted(entries, key=lambda entry: entry[1:]):
        if begin != place:
            what = "overlaps another" if begin < place else "leaves a gap before it"
            return f"its tensors do not fill it: {info.name} {what}, at {begin} instead of {place}"
        place = end
    return f"its tensors do not fill its {size} bytes, but {place}"


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _open_torch(path: Path, notes: list[Note]) -> dict[str, Tensor]:
    """Tensors of a torch file, unpickled with `weights_only`: no code of the file is run."""
    check_file(path, path.parent)
    _check_zip(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of old protocols, which are read or refused
            try:
                state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # files of torch before 1.6 cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
                what = "an old torch file: read into memory as a whole"
                notes.append(Note("fallback", path.name, what))
    except Exception as error:  # a corrupt or hostile pickle can raise almost anything
        reason = first_line(error)
        raise InputError(f"{path} cannot be read as tensors: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError(f"{path} does not hold a plain dictionary of tensors")
    for name, tensor in state.items():
        try:
            _check_name(name)
            _check_values(name, tensor)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
    return state


def _check_zip(path: Path) -> None:
    """Torch stores its members as they are: together they are no larger than the file."""
    try:
        if not zipfile.is_zipfile(path):
            return  # torch before 1.6
        with zipfile.ZipFile(path) as members:
            infos = members.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise InputError(f"{path} cannot be read as tensors: {first_line(error)}") from None
    packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
    total = sum(info.file_size for info in infos)
    if packed or total > path.stat().st_size:
        what = f"{shown(packed[0])} is compressed" if packed else f"its members claim {total} bytes"
        raise InputError(f"{path} is no file of torch: {what}; accepted are members stored as they are")


def _check_values(name: str, tensor: Tensor) -> None:
    """Plain values in memory, no more of them than are stored."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or str(tensor.dtype).removeprefix("torch.") not in _BY_NAME:
        raise ValueError(
            f"{name} is {tensor.layout} {tensor.dtype} on {tensor.device}; accepted are plain"
        )
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.itemsize > stored:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, but only {stored} bytes are stored for it")


def _torch_infos(path: Path, checkpoint: Checkpoint) -> tuple[list[TensorInfo], int]:
    state = checkpoint._open[path.name] = _open_torch(path, checkpoint.notes)
    infos = [TensorInfo(name, t.dtype, tuple(t.shape), path.name) for name, t in state.items()]
    return infos, 0


def carried_files(folder: Path) -> list[str]:
    """Names of the files that go along unchanged: tokenizer, generation config, chat templates.

    Raises:
        InputError: one is a link out of the folder.
    """
    taken = {CONFIG, LEDGER, RUN, SAFETENSORS_INDEX, TORCH_INDEX, *_OTHER_CONFIGS}
    files = [path for pattern in _CARRIED for path in folder.glob(pattern)]
    files += [path for name in _CARRIED_FOLDERS for path in (folder / name).glob("*")]
    names = {path.relative_to(folder).as_posix() for path in files if path.is_file()} - taken
    for name in names:
        check_file(folder / name, folder)
    return sorted(names)


# -- hashes ------------------------------------------------------------------------------------


def hash_tensor(tensor: Tensor) -> str:
    """sha256 of the values, in row-major order."""
    return hash_tensors([tensor])


def hash_tensors(tensors: list[Tensor]) -> str:
    """sha256 of the values of several tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(values(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def values(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    flat = tensor.reshape(-1)
    if len(flat) == 1:  # one value is contiguous with any stride, which a view of bytes does not take
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: dict[str, Any]) -> str:
    """sha256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor that was written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    sha256: str


def encode_json(value: dict[str, Any]) -> bytes:
    """As all our JSON files are written."""
    return (json.dumps(value, indent=1) + "\n").encode()


def dtype_of(name: str) -> torch.dtype:
    """The dtype that a ledger names, like "bfloat16"."""
    return _BY_NAME[name]


def encode_header(infos: list[TensorInfo]) -> bytes:
    """Of a safetensors file that holds these tensors one after the other."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        offsets = [end, end := end + info.size_bytes]
        entry = {"dtype": names[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        entries[info.name] = entry
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
