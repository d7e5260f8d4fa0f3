"""GGUF files: llama.cpp's container, written from a checkpoint's tensors and read as one.

    unsupported(config)                               why a model cannot be written; None if it can
    write_gguf(path, folder, config, tensors, read)   one file of tensors called as the source does
    gguf_bytes(folder, config, tensors)               how large that would be
    open_gguf(path)                                   a Checkpoint: the same names, dtypes and values

`tensors` are those that `formats.gguf` and a source in float give: `X.weight_blocks` (out, bytes of a
row), whose type stands in `config["quantization_config"]`, and floats. What the container wants
otherwise is done here and undone when it is read: other names, rows of rotary heads in another order,
matrices the other way round, the experts of a block in one tensor, norms and biases in float32. Which
model wants what stands in formats/gguf_models.toml, and nowhere else. Written files say the dtypes of
their source under keys of our own, which clients do not look at, so that reading gives back what was
written, bit for bit.

Of files that others wrote, blocks that hold our integers are given as they are, those of Q4_K
(`formats.gguf_k`) with their two levels of scales among them; all else as floats.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.checkpoint import (
    CONFIG,
    Checkpoint,
    TensorInfo,
    carried_files,
    check_config,
    read_json,
    values,
)
from fewbits.disk import append
from fewbits.errors import InputError, first_line
from fewbits.formats.gguf import BLOCK, BLOCKS, VERSION, GgufLayout
from fewbits.gguf_header import OWN, Header, block_sizes, product, read_header
from fewbits.gguf_models import (
    END,
    FLOATS,
    KINDS,
    Place,
    Stored,
    arrange,
    filled_in,
    from_disk,
    ignored,
    keys_of,
    left_out,
    models,
    places_of,
    rotary,
    table,
    to_disk,
    unsupported,
)
from fewbits.gguf_tokenizer import add_tokenizer
from fewbits.tensor import Note
from fewbits.untrusted import check_file, check_types, shown

__all__ = ["GGUF", "GgufCheckpoint", "gguf_bytes", "ignored", "open_gguf", "unsupported", "write_gguf"]

GGUF = "model.gguf"
# Keys of our own: tensors made float32, what they were, and what the source's names leave out.
_WIDENED, _DTYPES, _PREFIX = f"{OWN}widened", f"{OWN}dtypes", f"{OWN}prefix"
# Keys in which a file may differ from a config.json beside it: they decide no value.
_FREE = "context_length", "vocab_size"
_ROPE = "rope_freqs.weight"
_TRIED = 2**12  # blocks of Q4_1 that are looked at, before the others are taken to be alike; not tuned
_SLICE = 2**22  # values converted at a time; not tuned


# -- writing ----------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    folder: Path,
    config: dict[str, Any],
    tensors: Sequence[TensorInfo],
    read: Callable[[str], Tensor],
) -> list[Note]:
    """Write a file, one tensor after the other, forced to the disk. The same input gives the same bytes.

    Args:
        path: of the file.
        folder: with the tokenizer.
        config: of config.json; its quantization_config is what `GgufLayout.config` gave, or absent.
        tensors: names, dtypes and shapes, in their order.
        read: a tensor by its name.

    Returns:
        What was left out, and what a client computes otherwise.

    Raises:
        InputError: `unsupported`; a tensor that has no place; a tokenizer that cannot be read.
        OSError: of the disk.
    """
    stored, writer, extra, notes = _plan(path.name, folder, config, tensors)

    def source(name: str) -> Tensor:
        return extra if extra is not None and name == _ROPE else read(name)

    append(path, chain([_header(writer)], _pieces(stored, source, writer.data_alignment)), fresh=True)
    return notes


def gguf_bytes(folder: Path, config: dict[str, Any], tensors: Sequence[TensorInfo]) -> int:
    """Of the file that `write_gguf` would write.

    Raises:
        InputError: as that.
    """
    stored, writer, _, _ = _plan(GGUF, folder, config, tensors)
    alignment: int = writer.data_alignment
    return len(_header(writer)) + sum(t.size_bytes + -t.size_bytes % alignment for t in stored)


def _plan(
    name: str, folder: Path, config: dict[str, Any], tensors: Sequence[TensorInfo]
) -> tuple[list[Stored], Any, Tensor | None, list[Note]]:
    """The tensors of a file, the library's writer with its header, factors that are added, and notes."""
    reason = unsupported(config)
    if reason is not None:
        raise InputError(f"gguf: {reason}")
    stored, left = arrange(config, tensors)
    notes = [Note("skip", each, "GGUF has no place for it: llama.cpp computes it") for each in left]
    notes += [Note("fact", name, what) for what in ignored(config)]
    settings = filled_in(config)
    extra = rotary(settings)[1]
    if extra is not None:
        place = Place("rope_freqs")
        rope = Stored(_ROPE, "F32", tuple(extra.shape), (_ROPE,), torch.float32, place)
        stored.append(rope)
    writer, more = _describe(folder, config, settings, stored, [info.name for info in tensors])
    return stored, writer, extra, notes + more


def _pieces(
    stored: list[Stored], read: Callable[[str], Tensor], alignment: int
) -> Iterator[bytes | memoryview]:
    for tensor in stored:
        size = 0
        for name in tensor.sources:
            part = to_disk(tensor, read(name))
            size += part.nbytes
            yield values(part)
        if size != tensor.size_bytes:
            raise InputError(f"{tensor.sources[0]} gave {size} bytes instead of {tensor.size_bytes}")
        yield bytes(-size % alignment)


def _header(writer: Any) -> bytes:
    """All that comes before the values, by the gguf library."""
    from gguf.gguf_writer import WriterState

    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue() + bytes(-buffer.tell() % writer.data_alignment)


def _describe(
    folder: Path,
    config: dict[str, Any],
    settings: dict[str, Any],
    stored: list[Stored],
    names: list[str],
) -> tuple[Any, list[Note]]:
    """The library's writer with all keys and headers, and no values."""
    import gguf

    kind = config["model_type"]
    model = models()[kind]
    writer = gguf.GGUFWriter(None, model.architecture)
    writer.add_type("model")
    for key, value in keys_of(settings, model).items():
        kinds: dict[type, Any] = {
            str: writer.add_string, float: writer.add_float32, int: writer.add_uint32,
        }  # fmt: skip
        kinds[type(value)](f"{model.architecture}.{key}", value)
    sizes: Counter[str] = Counter()
    for tensor in stored:
        sizes[tensor.kind] += product(tensor.shape)
    common = sizes.most_common(1)[0][0]
    whole = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S"}.get(common, f"MOSTLY_{common}")
    writer.add_file_type(int(gguf.LlamaFileType[whole]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    widened = [t for t in stored if t.kind == "F32" and t.dtype != torch.float32]
    writer.add_array(_WIDENED, [tensor.name for tensor in widened])
    writer.add_array(_DTYPES, [str(tensor.dtype).removeprefix("torch.") for tensor in widened])
    if left_out(model, names):
        writer.add_string(_PREFIX, model.optional)
    notes = add_tokenizer(writer, folder, _vocabulary(settings, stored))
    for tensor in stored:
        bytes_shape = (*tensor.shape[:-1], tensor.row_bytes)
        raw = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, bytes_shape, np.dtype(np.uint8), tensor.size_bytes, raw)
    return writer, notes


def _vocabulary(settings: dict[str, Any], stored: list[Stored]) -> int:
    """How many tokens the embedding has, which must be what config.json says."""
    rows = next((tensor.shape[0] for tensor in stored if tensor.name == "token_embd.weight"), 0)
    if rows != settings["vocab_size"]:
        raise InputError(
            f"the embedding has {rows} rows; accepted is the vocab_size of config.json, "
            f"{shown(settings['vocab_size'])}"
        )
    return rows


# -- reading ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file as the checkpoint that it was made from; see `open_gguf`."""

    given: torch.dtype = torch.float16
    stored: dict[str, tuple[Stored, int, int]] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """A tensor, memory-mapped where it stands in the file as it is. Do not modify.

        Raises:
            InputError: the file cannot be read.
        """
        stored, place, part = self.stored[name]
        info = self.tensors[name]
        blocks, size = info.name.endswith(END), stored.size_bytes // len(stored.sources)
        data = self._mapped(info.file, place + part * size, size)
        shape = stored.shape[1:] if stored.place.stack is not None else stored.shape
        if blocks:
            return from_disk(stored, data.reshape(shape[0], -1), torch.uint8)
        if stored.kind in FLOATS:
            kind = FLOATS[stored.kind]
            data = data if data.data_ptr() % kind.itemsize == 0 else data.clone()
            return from_disk(stored, data.view(kind).reshape(shape), info.dtype)
        rows = data.reshape(-1, stored.row_bytes)
        return from_disk(stored, _as_floats(rows, stored.kind, info.dtype).reshape(shape), info.dtype)

    def carried(self) -> list[str]:
        """Those of a model's folder; what lies about beside a file alone may be anything."""
        return carried_files(self.folder) if (self.folder / CONFIG).is_file() else []

    def give(self, dtype: torch.dtype) -> None:
        """In which dtype floats are given that were made from blocks: the config's, if nobody says."""
        for name, (stored, _, _) in self.stored.items():
            info = self.tensors[name]
            if stored.kind not in FLOATS and info.dtype == self.given:
                self.tensors[name] = replace(info, dtype=dtype)
        self.given = dtype

    def _mapped(self, file: str, begin: int, size: int) -> Tensor:
        """Some bytes of a file, in a storage of their own: what keeps them keeps no others."""
        path = self.folder / file
        try:
            return torch.from_numpy(np.memmap(path, np.uint8, "c", begin, (size,)))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {first_line(error)}") from None


def _as_floats(rows: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows of blocks of any type as values, by the gguf library, some rows at a time."""
    import gguf

    columns, size = block_sizes()[kind]
    width = rows.shape[1] // size * columns
    result = torch.empty(rows.shape[0], width, dtype=dtype)
    step = max(1, _SLICE // width)
    number = gguf.GGMLQuantizationType[kind]
    for i in range(0, rows.shape[0], step):
        try:
            found = gguf.quants.dequantize(rows[i : i + step].numpy(), number)
        except NotImplementedError:
            raise InputError(f"blocks of type {kind} are not read") from None
        result[i : i + step] = torch.from_numpy(found)
    return result


def open_gguf(path: Path) -> GgufCheckpoint:
    """Read config and headers of a file.

    The config is that of a config.json beside it, else what the file's keys say. Matrices in Q8_0, Q4_0,
    Q4_1 and Q4_K are `X.weight_blocks`, and `quantization_config` names their schemes; what is in
    another type, or no matrix, is given as floats, and a note says how many of which.

    Raises:
        InputError: a header that is not as it should be, an architecture or a tensor that is not known.
    """
    header = read_header(path)
    folder = path.parent
    config, kind = _config(path, header)
    count = sum(product(shape) for _, _, shape, _ in header.tensors)
    check_config(folder / CONFIG, config, len(header.tensors), count)
    settings = filled_in(config)
    given = _given_dtype(config, header)
    checkpoint = GgufCheckpoint(folder, config, {}, {}, {}, [], {}, given)
    checkpoint.file_bytes[path.name] = check_file(path)
    checkpoint.header_bytes[path.name] = 0  # its sizes do not add up: floats are kept in other dtypes
    sources = _sources(kind, settings, header)
    widened = _widened(path, header)
    labels: dict[str, str] = {}
    floats: Counter[str] = Counter()
    for name, form, shape, offset in header.tensors:
        if name == _ROPE:
            continue
        if name not in sources:
            raise InputError(f"{path}: tensor {shown(name)} has no place in a model of type {kind}")
        names, place = sources[name]
        label = _label(path, name, form, place, header.start + offset, shape)
        if label is None and form not in FLOATS:
            floats[form] += 1
        dtype = FLOATS.get(form, given) if label is None else torch.uint8
        dtype = widened.get(name, dtype) if form == "F32" else dtype
        if label is not None:
            labels |= dict.fromkeys(names, label)
            names = tuple(source + END for source in names)
        stored = Stored(name, form, shape, names, dtype, place)
        _check_shape(path, stored)
        for part, source in enumerate(names):
            found = _shape_of(stored, label is not None)
            checkpoint.tensors[source] = TensorInfo(source, dtype, found, path.name)
            checkpoint.stored[source] = stored, header.start + offset, part
    config.pop("quantization_config", None)
    if labels:
        layout = {"quant_method": GgufLayout().name, "version": VERSION, "weights": labels}
        config["quantization_config"] = layout
    if floats:
        kinds = ", ".join(f"{n} of {form}" for form, n in sorted(floats.items()))
        what = f"tensors given as {given}, because no integers of ours are in them: {kinds}"
        checkpoint.notes.append(Note("fallback", path.name, what))
    return checkpoint


def _config(path: Path, header: Header) -> tuple[dict[str, Any], str]:
    """The model's config, and its type."""
    architecture = header.keys.get("general.architecture")
    here = [name for name, model in models().items() if model.architecture == architecture]
    if not here:
        known = dict.fromkeys(model.architecture for model in models().values())
        raise InputError(
            f"{path} is of architecture {shown(architecture)}; accepted are {', '.join(known)}"
        )
    if (path.parent / CONFIG).is_file():
        config = read_json(path.parent / CONFIG)
        if config.get("model_type") not in here:
            raise InputError(
                f"{path} is of architecture {shown(architecture)}, but {CONFIG} beside it of model_type "
                f"{shown(config.get('model_type'))}"
            )
        _check_beside(path, header, config)
    else:
        config = _made_config(path, header, here)
    return config, config["model_type"]


def _check_beside(path: Path, header: Header, config: dict[str, Any]) -> None:
    """A config.json beside a file may be another model's: what both speak of must be the same."""
    where = path.parent / CONFIG
    reason = unsupported(config)
    if reason is not None:
        raise InputError(f"{where} is not of {path.name}: {reason}")
    model, settings = models()[config["model_type"]], filled_in(config)
    try:
        wanted, factors = keys_of(settings, model), rotary(settings)[1]
    except InputError:
        raise
    except Exception as error:  # of a stranger's config anything can be of another type
        raise InputError(f"{where} is not understood: {first_line(error)}") from None
    found = {key: header.keys.get(f"{model.architecture}.{key}") for key in wanted}
    scaling = header.keys.get(f"{model.architecture}.rope.scaling.type", "none")
    found["rope.scaling.type"] = scaling
    wanted.setdefault("rope.scaling.type", "none")
    has_factors = any(name == _ROPE for name, *_ in header.tensors)
    found[_ROPE], wanted[_ROPE] = has_factors, factors is not None
    for key, value in wanted.items():
        other = found[key]
        if key in _FREE or other is None:
            continue
        real = isinstance(value, float) and isinstance(other, int | float)  # float32 in the file
        if not (math.isclose(value, other, rel_tol=1e-6) if real else value == other):
            raise InputError(
                f"{where} is not of {path.name}: {key} is {shown(value)}, and {shown(other)} in the file"
            )


def _made_config(path: Path, header: Header, kinds: list[str]) -> dict[str, Any]:
    """From the file's own keys."""
    from transformers import AutoConfig

    keys = {
        key.partition(".")[2]: value
        for key, value in header.keys.items()
        if key.startswith(header.keys["general.architecture"] + ".")
    }
    mixture = bool(keys.get("expert_count"))
    fitting = [kind for kind in kinds if bool(models()[kind].experts) == mixture]
    if not fitting:
        raise InputError(
            f"{path} has {shown(keys.get('expert_count'))} experts, which is not understood"
        )
    names = {name for name, *_ in header.tensors}
    if _ROPE in names or "rope.scaling.type" in keys:
        raise InputError(
            f"{path} stretches its rotary embedding; accepted is one with a {CONFIG} beside"
        )
    kind = fitting[0]
    if models()[kind].full_every > 1:
        raise InputError(f"{path} has two rotary embeddings; accepted is one with a {CONFIG} beside")
    config: dict[str, Any] = {"model_type": kind, **models()[kind].requires}
    usual = AutoConfig.for_model(kind).to_dict()
    for key, options in table()["keys"].items():
        field_name = next((name for name in options if name in (*usual, "rope_theta", "head_dim")), None)
        if key in keys and field_name is not None:
            if type(keys[key]) not in (int, float):
                raise InputError(f"{path}: {key} is {shown(keys[key])}; accepted is a number")
            config[field_name] = keys[key]
    if "rope_theta" in config:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    config["vocab_size"] = next((s[0] for n, _, s, _ in header.tensors if n == "token_embd.weight"), 0)
    config["tie_word_embeddings"] = "output.weight" not in names
    for ours in ("bos", "eos"):
        token = header.keys.get(f"tokenizer.ggml.{ours}_token_id")
        config[f"{ours}_token_id"] = token if type(token) is int else None
    config["dtype"] = str(_given_dtype({}, header)).removeprefix("torch.")
    for switch, bias in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up")):
        if switch in usual:
            config[switch] = f"blk.0.{bias}.bias" in names
    return config


def _widened(path: Path, header: Header) -> dict[str, torch.dtype]:
    """What was made float32, and what it was; by keys that anyone may have written."""
    names, dtypes = header.keys.get(_WIDENED, []), header.keys.get(_DTYPES, [])
    prefix = header.keys.get(_PREFIX, "")
    try:
        check_types(names, list[str], _WIDENED)
        check_types(dtypes, list[str], _DTYPES)
        if prefix not in {model.optional for model in models().values()}:
            raise ValueError(f"{_PREFIX} is {shown(prefix)}")
        narrow = {str(dtype).removeprefix("torch."): dtype for dtype in KINDS}
        unknown = next((name for name in dtypes if name not in narrow), None)
        if unknown is not None or len(names) != len(dtypes):
            raise ValueError(f"{_DTYPES} has {len(dtypes)} for {len(names)} tensors, {shown(unknown)}")
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} has a corrupt header: {first_line(error)}") from None
    return {name: narrow[dtype] for name, dtype in zip(names, dtypes, strict=True)}


def _given_dtype(config: dict[str, Any], header: Header) -> torch.dtype:
    """Of what is dequantized: the config's, else that of most floats, else float16."""
    named = config.get("dtype") or config.get("torch_dtype")
    found = getattr(torch, named, None) if isinstance(named, str) else None
    if found in KINDS:
        assert isinstance(found, torch.dtype)
        return found
    sizes: Counter[str] = Counter()
    for _, form, shape, _ in header.tensors:
        if form in ("F16", "BF16"):
            sizes[form] += product(shape)
    return FLOATS[sizes.most_common(1)[0][0]] if sizes else torch.float16


def _sources(
    kind: str, settings: dict[str, Any], header: Header
) -> dict[str, tuple[tuple[str, ...], Place]]:
    """Names of the container -> the tensors of the checkpoint that stand there, and their place."""
    prefix = header.keys.get(_PREFIX, "")
    found: dict[str, tuple[tuple[str, ...], Place]] = {}
    for module, place in places_of(kind, settings).items():
        for end in (".weight", ".bias"):
            source = module.removeprefix(prefix) + end
            names, _ = found.get(place.target + end, ((), place))
            found[place.target + end] = (*names, source), place
    return found


def _label(
    path: Path,
    name: str,
    form: str,
    place: Place,
    begin: int,
    shape: tuple[int, ...],
) -> str | None:
    """The scheme of blocks that hold our integers and belong to a matrix; None: floats are given.

    Of Q4_1, where others may have any m, the first blocks are looked at: a later one that is no zero
    point is refused when it is read.
    """
    block = next((block for block in BLOCKS if block.kind == form), None)
    if block is None or place.as_floats or len(shape) < 2 or not name.endswith(".weight"):
        return None
    if form != "Q4_1":
        return block.label
    count = min(product(shape) // BLOCK, _TRIED)
    with path.open("rb") as file:
        file.seek(begin)
        data = bytearray(file.read(count * block.size_bytes))
    try:
        block.read(torch.frombuffer(data, dtype=torch.uint8).reshape(count, -1))
    except InputError:
        return None
    return block.label


def _shape_of(stored: Stored, blocks: bool) -> tuple[int, ...]:
    """Of each of its sources."""
    shape = stored.shape[1:] if stored.place.stack is not None else stored.shape
    if blocks:
        return shape[0], stored.row_bytes
    return shape[::-1] if stored.place.transposed and len(shape) == 2 else shape


def _check_shape(path: Path, stored: Stored) -> None:
    """Whether it can be taken apart as its model says."""
    dimensions, place = len(stored.shape), stored.place
    if place.stack is not None:
        fits = dimensions == 3 and stored.shape[0] == place.stack[1]
    else:
        fits = dimensions <= 2
    fits = fits and not (place.heads and stored.shape[0] % (2 * place.heads))
    if not fits:
        raise InputError(
            f"{path}: tensor {stored.name} is {stored.shape}, which its model does not have"
        )
