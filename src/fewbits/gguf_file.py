"""GGUF files: llama.cpp's container, written from a checkpoint's tensors and read as one.

    unsupported(config)                               why a model cannot be written; None if it can
    write_gguf(path, folder, config, tensors, read)   one file of tensors called as the source does
    open_gguf(path)                                   a Checkpoint: the same names, dtypes and values

`tensors` are those that `formats.gguf` and a source in float give: `X.weight_blocks` (out, bytes of a
row), whose type stands in `config["quantization_config"]`, and floats. What the container wants
otherwise is done here and undone when it is read: other names, rows of rotary heads in another order,
matrices the other way round, the experts of a block in one tensor, norms and biases in float32. Which
model wants what stands in formats/gguf_models.toml, and nowhere else. Written files say the dtypes of
their source under keys of our own, which clients do not look at, so that reading gives back what was
written, bit for bit.

    "GGUF", version, counts of both    keys: name, type, value    tensors: name, shape, type, offset
    values

Of files that others wrote, blocks that hold our integers are given as they are, all else as floats. No
number in a file is trusted: each is compared with the size of the file before anything is made of it.
"""

import json
import logging
import mmap
import re
import struct
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.checkpoint import CONFIG, Checkpoint, TensorInfo, check_config, dtype_of, read_json, values
from fewbits.disk import append
from fewbits.errors import InputError, first_line
from fewbits.formats.gguf import BLOCKS, VERSION, GgufLayout
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note
from fewbits.untrusted import MAX_VALUES, check_file, check_types, shown

GGUF = "model.gguf"
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KINDS = {dtype: kind for kind, dtype in _FLOATS.items()}
_END = "_blocks"
_DTYPES, _PREFIX = "fewbits.dtypes", "fewbits.prefix"  # keys of our own
_ROPE = "rope_freqs.weight"
_SLICE = 2**22  # values converted at a time; not tuned
_MAX_ENTRIES, _MAX_TENSORS = 2**16, 2**18  # of a header; real ones have some dozens, some thousands
_MAX_KEPT = 2**20  # characters of a string that is kept; chat templates have some thousands
_MAX_NAME = 1000
_SINGLE = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


# -- what each model wants --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Model:
    """As gguf_models.toml explains them."""

    architecture: str
    blocks: str
    outside: list[str]
    inside: list[str]
    optional: str = ""
    heads: dict[str, str] = field(default_factory=dict)
    experts: dict[str, str] = field(default_factory=dict)
    transposed: list[str] = field(default_factory=list)
    single: list[str] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    requires: dict[str, Any] = field(default_factory=dict)
    ignores: list[str] = field(default_factory=list)


@cache
def _data() -> dict[str, Any]:
    text = files("fewbits.formats").joinpath("gguf_models.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def _models() -> dict[str, _Model]:
    return {name: _Model(**entry) for name, entry in _data()["models"].items()}


def unsupported(config: dict[str, Any]) -> str | None:
    """Why a model cannot be written as GGUF; None if it can.

    Args:
        config: of config.json.
    """
    kind = config.get("model_type")
    if kind not in _models():
        reason = _data()["refused"].get(kind, "what llama.cpp wants of it is not known here")
        return f"model_type {shown(kind)}: {reason}; accepted are {', '.join(_models())}"
    try:
        settings = _settings(config)
    except InputError as error:
        return str(error)
    for key, value in _models()[kind].requires.items():
        if key in settings and settings[key] != value:
            return f"{key} is {shown(settings[key])}; llama.cpp computes {shown(value)} only"
    try:
        _rope(settings)
    except InputError as error:
        return str(error)
    return None


def ignored(config: dict[str, Any]) -> list[str]:
    """Settings of a model that llama.cpp does not honour, one line each."""
    settings = _settings(config)
    return [
        f"{key} is {shown(settings[key])} in config.json, which llama.cpp does not honour"
        for key in _models()[config["model_type"]].ignores
        if settings.get(key) is not None
    ]


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with what it leaves out, as transformers fills it in."""
    from transformers import AutoConfig

    plain = {
        key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")
    }
    check_config(Path(CONFIG), plain)
    try:
        settings: dict[str, Any] = AutoConfig.for_model(**plain).to_dict()
        hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
        if settings.get("head_dim") is None and hidden is not None and heads is not None:
            settings["head_dim"] = hidden // heads
        if "n_inner" in settings and settings["n_inner"] is None:
            settings["n_inner"] = 4 * settings["n_embd"]
        settings["rope_theta"] = (settings.get("rope_parameters") or {}).get("rope_theta")
    except Exception as error:  # configs fail in as many ways as there are architectures
        raise InputError(f"config.json is not understood by transformers: {first_line(error)}") from None
    return settings


def _rope(settings: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Keys of the rotary embedding, and factors of its frequencies where those are not of one kind."""
    rope = settings.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}, None
    known = {"rope_type", "type", "rope_theta", "factor"}
    more = {
        "linear": set[str](),
        "yarn": {"original_max_position_embeddings"},
        "llama3": {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    }
    other = {key for key in rope if rope[key] is not None} - known - more.get(kind, set())
    if kind not in more or other:
        what = f"rope_type {shown(kind)}" + "".join(f" with {key}" for key in sorted(other))
        raise InputError(f"{what} is not written; accepted are default, linear, yarn and llama3")
    try:
        if kind == "llama3":
            return {}, _factors(rope, settings["head_dim"])
        keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            original = int(rope["original_max_position_embeddings"])
            keys["rope.scaling.original_context_length"] = original
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"rope_parameters of type {kind} lack {first_line(error)}") from None
    return keys, None


def _factors(rope: dict[str, Any], head: int) -> Tensor:
    """What each frequency of a head is divided by: fast ones by 1, slow ones by `factor`."""
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequency = rope["rope_theta"] ** -(torch.arange(0, head, 2, dtype=torch.float32) / head)
    turns = context * frequency / (2 * torch.pi)
    share: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    result: Tensor = 1 / ((1 - share) / factor + share)
    return result


# -- from names to tensors of the container ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module's tensors go.

    Args:
        target: name in the container, without ".weight" or ".bias".
        heads: in which its rows are reordered; 0: they are not.
        stack: which expert it is, of how many; None: it is none.
        transposed, single, looked_up: as gguf_models.toml has them.
    """

    target: str
    heads: int = 0
    stack: tuple[int, int] | None = None
    transposed: bool = False
    single: bool = False
    looked_up: bool = False


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of the container.

    Args:
        name: there.
        kind: as ggml calls it, like "Q4_0".
        shape: of its values, the longest stride first: (experts, out, in), (out, in), (n,).
        sources: names of the tensors that it is made of; several are stacked.
        dtype: of those.
        place: what was done to them.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    dtype: torch.dtype
    place: _Place

    @property
    def row_bytes(self) -> int:
        """Of one row of its values."""
        columns, size = _sizes()[self.kind]
        return self.shape[-1] // columns * size

    @property
    def size_bytes(self) -> int:
        """Of all."""
        return self.row_bytes * _product(self.shape[:-1])


@cache
def _sizes() -> dict[str, tuple[int, int]]:
    """Of each type: values of a block, and its bytes."""
    import gguf

    return {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}


def _product(numbers: Iterable[int]) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result


def _places(kind: str, settings: dict[str, Any]) -> dict[str, _Place]:
    """Of every module that a model may have, by its full name."""
    import gguf

    model = _models()[kind]
    names = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    blocks = settings[next(key for key in _data()["keys"]["block_count"] if key in settings)]
    mapping = gguf.get_tensor_name_map(names[model.architecture], blocks)
    experts = next((settings[k] for k in _data()["keys"]["expert_count"] if settings.get(k)), 0)
    places = {}

    def add(module: str, short: str) -> None:
        target = mapping.get_name(module)
        if target is not None:
            places[module] = _Place(
                target,
                heads=settings[model.heads[short]] if short in model.heads else 0,
                transposed=short in model.transposed,
                single=short in model.single,
                looked_up=short in model.looked_up,
            )

    for module in model.outside:
        add(module, module)
    for block in range(blocks):
        for module in model.inside:
            add(f"{model.blocks}.{block}.{module}", module)
        for module, target in model.experts.items():
            for expert in range(experts):
                full = f"{model.blocks}.{block}.{module.format(expert)}"
                places[full] = _Place(f"blk.{block}.{target}", stack=(expert, experts))
    return places


def _arrange(config: dict[str, Any], tensors: Sequence[TensorInfo]) -> tuple[list[_Stored], list[str]]:
    """The tensors of the container, in order, and the names of those that it computes itself."""
    kind = config["model_type"]
    model, places = _models()[kind], _places(kind, _settings(config))
    labels = (config.get("quantization_config") or {}).get("weights", {})
    prefix = _prefix(model, [info.name for info in tensors])
    found: dict[str, list[tuple[int, TensorInfo, str, _Place]]] = {}
    left = []
    for info in tensors:
        module, _, end = info.name.rpartition(".")
        place = places.get(prefix + module)
        if place is None or end not in ("weight", "bias", "weight" + _END):
            if not info.name.endswith(tuple(model.buffers)):
                raise InputError(f"tensor {info.name} has no place in GGUF's {model.architecture}")
            left.append(info.name)
            continue
        label = labels.get(info.name.removesuffix(_END)) if end.endswith(_END) else None
        if label is None and end.endswith(_END):
            raise InputError(f"tensor {info.name} has no scheme in quantization_config")
        target = f"{place.target}.{end.removesuffix(_END)}"
        entry = (place.stack[0] if place.stack else 0, info, _kind(info, label, place), place)
        found.setdefault(target, []).append(entry)
    return [_stored(target, parts) for target, parts in found.items()], left


def _prefix(model: _Model, names: list[str]) -> str:
    """What a checkpoint leaves out of its names."""
    bare = model.blocks.removeprefix(model.optional)
    inside = any(name.startswith(f"{bare}.") for name in names)
    return model.optional if model.optional and inside else ""


def _kind(info: TensorInfo, label: str | None, place: _Place) -> str:
    if label is not None:
        block = next((block for block in BLOCKS if block.label == label), None)
        if block is None:
            raise InputError(f"tensor {info.name} is {shown(label)}; accepted are blocks of GGUF")
        return block.kind
    if info.dtype not in _KINDS:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _KINDS)
        raise InputError(f"tensor {info.name} is {info.dtype}; GGUF takes {accepted}")
    return "F32" if len(info.shape) < 2 or place.single else _KINDS[info.dtype]


def _stored(target: str, parts: list[tuple[int, TensorInfo, str, _Place]]) -> _Stored:
    parts.sort(key=lambda part: part[0])
    _, info, kind, place = parts[0]
    experts = 1 if place.stack is None else place.stack[1]
    if [part[0] for part in parts] != list(range(experts)):
        raise InputError(f"{target} is made of {experts} tensors, and {len(parts)} are there")
    if len({(part[1].shape, part[1].dtype, part[2]) for part in parts}) > 1:
        raise InputError(f"{target} is made of tensors of one type and shape, and {info.name} differs")
    shape = info.shape
    columns, size = _sizes()[kind]
    if info.name.endswith(_END):
        shape = (shape[0], shape[1] // size * columns)
    elif place.transposed and len(shape) == 2:
        shape = shape[::-1]
    if place.heads and shape[0] % (2 * place.heads):
        raise InputError(f"{info.name} has {shape[0]} rows, which are no {place.heads} heads")
    if place.stack is not None:
        shape = (experts, *shape)
    return _Stored(target, kind, shape, tuple(part[1].name for part in parts), info.dtype, place)


def _reorder(tensor: Tensor, heads: int, back: bool = False) -> Tensor:
    """Rows of each head: the two halves become pairs of neighbours, or back."""
    if not heads:
        return tensor
    half = tensor.shape[0] // heads // 2
    parts = (heads, half, 2) if back else (heads, 2, half)
    return tensor.reshape(*parts, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _to_disk(stored: _Stored, tensor: Tensor) -> Tensor:
    """One source tensor as it stands in the container."""
    tensor = tensor.detach().cpu()
    if stored.kind in _FLOATS:
        if stored.place.transposed and tensor.ndim == 2:
            tensor = tensor.t()
        tensor = tensor.to(_FLOATS[stored.kind])
    return _reorder(tensor, stored.place.heads).contiguous()


def _from_disk(stored: _Stored, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_to_disk`."""
    tensor = _reorder(tensor, stored.place.heads, back=True)
    if tensor.dtype == torch.uint8:
        return tensor
    tensor = tensor.to(dtype)
    return tensor.t() if stored.place.transposed and tensor.ndim == 2 else tensor


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
    reason = unsupported(config)
    if reason is not None:
        raise InputError(f"gguf: {reason}")
    stored, left = _arrange(config, tensors)
    notes = [Note("skip", name, "GGUF has no place for it: llama.cpp computes it") for name in left]
    notes += [Note("fact", path.name, what) for what in ignored(config)]
    settings = _settings(config)
    extra = _rope(settings)[1]
    if extra is not None:
        place = _Place("rope_freqs")
        rope = _Stored(_ROPE, "F32", tuple(extra.shape), (_ROPE,), torch.float32, place)
        stored.append(rope)
    writer, more = _describe(folder, config, settings, stored, [info.name for info in tensors])

    def source(name: str) -> Tensor:
        return extra if extra is not None and name == _ROPE else read(name)

    append(path, chain([_header(writer)], _pieces(stored, source, writer.data_alignment)), fresh=True)
    return notes + more


def _pieces(
    stored: list[_Stored], read: Callable[[str], Tensor], alignment: int
) -> Iterator[bytes | memoryview]:
    for tensor in stored:
        size = 0
        for name in tensor.sources:
            part = _to_disk(tensor, read(name))
            size += part.nbytes
            yield values(part)
        if size != tensor.size_bytes:
            raise InputError(f"{tensor.sources[0]} gave {size} bytes instead of {tensor.size_bytes}")
        yield bytes(-size % alignment)


def _header(writer: Any) -> bytes:
    """All that comes before the values, by the gguf library."""
    import io

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
    stored: list[_Stored],
    names: list[str],
) -> tuple[Any, list[Note]]:
    """The library's writer with all keys and headers, and no values."""
    import gguf

    kind = config["model_type"]
    model = _models()[kind]
    writer = gguf.GGUFWriter(None, model.architecture)
    writer.add_type("model")
    fields = dict(_rope(settings)[0])
    for key, options in _data()["keys"].items():
        value = next((settings[name] for name in options if settings.get(name) is not None), None)
        if value is not None:
            fields[key] = float(value) if "epsilon" in key or "freq" in key else int(value)
    for key, value in fields.items():
        kinds: dict[type, Any] = {
            str: writer.add_string, float: writer.add_float32, int: writer.add_uint32,
        }  # fmt: skip
        kinds[type(value)](f"{model.architecture}.{key}", value)
    sizes: Counter[str] = Counter()
    for tensor in stored:
        sizes[tensor.kind] += _product(tensor.shape)
    common = sizes.most_common(1)[0][0]
    whole = "ALL_F32" if common == "F32" else f"MOSTLY_{common}"
    writer.add_file_type(int(gguf.LlamaFileType[whole]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_array(_DTYPES, [str(tensor.dtype).removeprefix("torch.") for tensor in stored])
    if _prefix(model, names):
        writer.add_string(_PREFIX, model.optional)
    notes = _add_tokenizer(writer, folder, settings["vocab_size"])
    for tensor in stored:
        bytes_shape = (*tensor.shape[:-1], tensor.row_bytes)
        raw = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, bytes_shape, np.dtype(np.uint8), tensor.size_bytes, raw)
    return writer, notes


# -- the tokenizer ----------------------------------------------------------------------------------


def _add_tokenizer(writer: Any, folder: Path, size: int) -> list[Note]:
    """Tokens, merges and special tokens; without them clients take and give numbers of tokens."""
    path = folder / "tokenizer.json"
    reason: str | None = "there is no tokenizer.json"
    if path.is_file():
        tokenizer = read_json(path)
        try:
            reason = _add_vocabulary(writer, tokenizer, size)
            if reason is None:
                _add_special(writer, folder)
        except InputError:
            raise
        except Exception as error:  # of a stranger's JSON, whatever is in it
            raise InputError(f"{path} is not understood: {first_line(error)}") from None
    if reason is None:
        return []
    writer.add_tokenizer_model("no_vocab")
    what = f"without a vocabulary: {reason}; its clients take and give numbers of tokens"
    return [Note("skip", path.name, what)]


def _add_vocabulary(writer: Any, tokenizer: dict[str, Any], size: int) -> str | None:
    """Tokens and merges; or why llama.cpp would not split text as this tokenizer does."""
    model, added = tokenizer["model"], tokenizer.get("added_tokens", [])
    if model.get("type") != "BPE":
        return f"tokenizers of type {shown(model.get('type'))} are not written"
    splits = _splits(tokenizer.get("pre_tokenizer"))
    by_bytes = bool(model.get("byte_fallback"))
    if not by_bytes:
        known = _data()["tokenizers"].items()
        ignores = bool(model.get("ignore_merges"))
        pre = next(
            (n for n, t in known if t["splits"] == splits and t["ignore_merges"] == ignores), None
        )
        if pre is None:
            return f"its way to split text, {shown(splits)}, is not among those of llama.cpp known here"
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
    else:
        space = _prefix_space(tokenizer)
        if space is None:
            return "its way to write spaces is not known here"
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(space)
    tokens = {number: text for text, number in model["vocab"].items()}
    types = {number: _token_type(text, by_bytes) for number, text in tokens.items()}
    if model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = 2
    for token in added:
        tokens[token["id"]] = token["content"]
        if types.get(token["id"]) != 2:
            types[token["id"]] = 3 if token.get("special") else 4
    if min(tokens) < 0 or max(tokens) >= size:
        raise InputError(
            f"tokenizer.json has token {max(tokens)}, but config.json a vocabulary of {size}"
        )
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    if by_bytes:
        writer.add_token_scores(_scores(model, tokens, size))
    writer.add_token_types([types.get(i, 5) for i in range(size)])
    return None


def _token_type(text: str, by_bytes: bool) -> int:
    """1 for text, 6 for a byte."""
    return 6 if by_bytes and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text) else 1


def _scores(model: dict[str, Any], tokens: dict[int, str], size: int) -> list[float]:
    """Higher for tokens that are merged earlier: llama.cpp merges by them."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = len(ranks)
    return [-float(ranks.get(tokens.get(i, ""), last)) for i in range(size)]


def _splits(pre: dict[str, Any] | None) -> list[str]:
    """What a pre-tokenizer does, step by step, in the words of gguf_models.toml."""
    if pre is None:
        return []
    kind = pre["type"]
    if kind == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _splits(part)]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return ["ByteLevel, by its own pattern" if pre.get("use_regex", True) else "ByteLevel"]
    if kind == "Digits" and pre.get("individual_digits"):
        return ["Digits, one by one"]
    if kind == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return [str(pre["pattern"].get("Regex"))]
    return [json.dumps(pre, sort_keys=True)]


def _prefix_space(tokenizer: dict[str, Any]) -> bool | None:
    """Whether a space is put before a text; None where spaces become something else than "▁"."""
    normalizer, pre = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if pre is not None and pre.get("type") == "Metaspace" and normalizer is None:
        plain = pre.get("replacement") == "▁" and not pre.get("split", True)
        return pre.get("prepend_scheme") != "never" if plain else None
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    if pre is not None or replace not in steps or any(s not in (replace, prepend) for s in steps):
        return None
    return prepend in steps


def _add_special(writer: Any, folder: Path) -> None:
    """Merges, special tokens and the chat template, by the gguf library."""
    import gguf

    for name in ("tokenizer.json", "tokenizer_config.json", CONFIG, "generation_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)  # strictly, before the library does
    by_merges = "tokenizer.ggml.scores" not in writer.kv_data[0]
    logger = logging.getLogger(gguf.vocab.__name__)  # of pairs of texts, which nobody asks for
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        gguf.SpecialVocab(folder, load_merges=by_merges).add_to_gguf(writer, quiet=True)
    finally:
        logger.setLevel(level)


# -- reading: the header ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file says of itself: keys with their values, tensors, where their values begin."""

    keys: dict[str, Any]
    tensors: list[tuple[str, str, tuple[int, ...], int]]  # name, type, shape (rows first), offset
    start: int


class _Cursor:
    """Reads numbers and strings one after the other, never past the end.

    Raises:
        ValueError: it would be.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place, self.size = data, 0, len(data)
        self.items = 0

    def number(self, form: str) -> Any:
        """One, as `struct` writes it."""
        size = struct.calcsize(form)
        self._check(size)
        (value,) = struct.unpack_from(form, self.data, self.place)
        self.place += size
        return value

    def skip_string(self) -> tuple[int, int]:
        """Where one begins and ends."""
        length = self.number("<Q")
        self._check(length)
        begin = self.place
        self.place += length
        return begin, self.place

    def string(self) -> str:
        """One in UTF-8."""
        begin, end = self.skip_string()
        if end - begin > _MAX_KEPT:
            raise ValueError(f"it has a string of {end - begin} bytes; accepted are {_MAX_KEPT}")
        return self.data[begin:end].decode()

    def value(self, kind: int, keep: bool) -> Any:
        """Of a key; strings in a list are kept if wanted."""
        if kind in _SINGLE:
            value = self.numbers(kind, 1)[0]
            return float(str(value)) if kind == _FLOAT32 else value.item()  # 1e-06, not 9.99999997e-07
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of type {kind}; accepted are 0 to 12")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SINGLE:
            return self.numbers(inner, count)
        if inner != _STRING:
            raise ValueError(f"it has a list of type {inner}; accepted are numbers and strings")
        self.items += count
        if self.items > MAX_VALUES:
            raise ValueError(f"it has lists of {self.items} strings; accepted are {MAX_VALUES}")
        self._check(8 * count)
        if keep:
            return [self.string() for _ in range(count)]
        for _ in range(count):
            self.skip_string()
        return None

    def numbers(self, kind: int, count: int) -> Any:
        """So many, as an array."""
        dtype = np.dtype(_SINGLE[kind])
        self._check(count * dtype.itemsize)
        found = np.frombuffer(self.data[self.place : self.place + count * dtype.itemsize], dtype)
        self.place += count * dtype.itemsize
        return found

    def _check(self, size: int) -> None:
        if size > self.size - self.place:
            raise ValueError(f"it ends before {size} bytes at {self.place}")


def _read_header(path: Path) -> _Header:
    """Of a file, every number of it compared with what the file can hold.

    Raises:
        InputError: no such file, or a header that is not wholly as it should be.
    """
    size = check_file(path)
    if size < 24:
        raise InputError(f"{path} is truncated or corrupt: it has {size} bytes")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # of UTF-8 too
        raise InputError(f"{path} has a corrupt header: {first_line(error)}") from None


def _parse(cursor: _Cursor) -> _Header:
    magic, version = cursor.number("4s"), cursor.number("<I")
    if magic != b"GGUF":
        raise ValueError(f"it begins with {magic!r}; accepted is b'GGUF'")
    if version not in (2, 3):
        raise ValueError(f"it is of version {version}; accepted are 2 and 3")
    tensors, entries = cursor.number("<Q"), cursor.number("<Q")
    if tensors > _MAX_TENSORS or entries > _MAX_ENTRIES:
        raise ValueError(f"it names {tensors} tensors and {entries} keys")
    keys: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in keys:
            raise ValueError(f"it names {shown(key)} twice")
        keys[key] = cursor.value(cursor.number("<I"), keep=key.startswith("fewbits."))
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= 2**16:
        raise ValueError(f"its alignment is {shown(alignment)}; accepted are multiples of 8")
    if keys.get("split.count", 1) not in (0, 1):
        raise ValueError("it is one part of several; accepted are whole files")
    found = [_parse_tensor(cursor) for _ in range(tensors)]
    start = cursor.place + -cursor.place % alignment
    _check_places(found, start, cursor.size, alignment)
    return _Header(keys, found, start)


def _parse_tensor(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    import gguf

    name = cursor.string()
    if not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
        raise ValueError(f"{shown(name)} is no name of a tensor")
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= 4:
        raise ValueError(f"{name} has {dimensions} dimensions; accepted are 1 to 4")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    try:
        kind = gguf.GGMLQuantizationType(number).name
        columns, _ = _sizes()[kind]
    except (ValueError, KeyError):
        raise ValueError(f"{name} is of type {number}, which ggml does not have") from None
    if not all(0 < n < 2**48 for n in shape) or shape[-1] % columns:
        raise ValueError(f"{name} is {shape}; accepted are rows of a multiple of {columns} values")
    return name, kind, shape, offset


def _check_places(
    found: list[tuple[str, str, tuple[int, ...], int]], start: int, size: int, alignment: int
) -> None:
    """Whether values lie in the file, one after the other, and no name stands twice."""
    names = Counter(name for name, *_ in found)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"it has tensor {twice} twice")
    place = 0
    for name, kind, shape, offset in sorted(found, key=lambda tensor: tensor[3]):
        columns, block = _sizes()[kind]
        length = _product(shape) // columns * block
        if offset % alignment or offset < place or start + offset + length > size:
            raise ValueError(f"the {length} bytes of {name} do not lie at {offset} of its values")
        place = offset + length


# -- reading: the checkpoint ------------------------------------------------------------------------


@dataclass(slots=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file as the checkpoint that it was made from; see `open_gguf`."""

    given: torch.dtype = torch.float16
    stored: dict[str, tuple[_Stored, int, int]] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """A tensor, memory-mapped where it stands in the file as it is. Do not modify.

        Raises:
            InputError: the file cannot be read.
        """
        stored, place, part = self.stored[name]
        info = self.tensors[name]
        blocks, size = info.name.endswith(_END), stored.size_bytes // len(stored.sources)
        begin = place + part * size
        data = self._mapped(info.file)[begin : begin + size]
        shape = stored.shape[1:] if stored.place.stack is not None else stored.shape
        if blocks:
            return _from_disk(stored, data.reshape(shape[0], -1), torch.uint8)
        if stored.kind in _FLOATS:
            kind = _FLOATS[stored.kind]
            data = data if data.storage_offset() % kind.itemsize == 0 else data.clone()
            return _from_disk(stored, data.view(kind).reshape(shape), info.dtype)
        rows = data.reshape(-1, stored.row_bytes)
        return _from_disk(stored, _as_floats(rows, stored.kind, info.dtype).reshape(shape), info.dtype)

    def _mapped(self, file: str) -> Tensor:
        if file not in self._open:
            path, size = self.folder / file, self.file_bytes[file]
            try:
                self._open[file] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            except RuntimeError as error:
                raise InputError(f"{path} cannot be read: {first_line(error)}") from None
        mapped: Tensor = self._open[file]
        return mapped


def _as_floats(rows: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows of blocks of any type as values, by the gguf library, some rows at a time."""
    import gguf

    columns, size = _sizes()[kind]
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

    The config is that of a config.json beside it, else what the file's keys say. Matrices in Q8_0, Q4_0
    and Q4_1 are `X.weight_blocks`, and `quantization_config` names their schemes; what is in another
    type, or no matrix, is given as floats, and a note says how many of which.

    Raises:
        InputError: a header that is not as it should be, an architecture or a tensor that is not known.
    """
    header = _read_header(path)
    folder = path.parent
    config, kind = _config(path, header)
    count = sum(_product(shape) for _, _, shape, _ in header.tensors)
    check_config(folder / CONFIG, config, len(header.tensors), count)
    settings = _settings(config)
    given = _given_dtype(config, header)
    checkpoint = GgufCheckpoint(folder, config, {}, {}, {}, [], {}, given)
    checkpoint.file_bytes[path.name] = check_file(path)
    checkpoint.header_bytes[path.name] = 0  # its sizes do not add up: floats are kept in other dtypes
    sources = _sources(kind, settings, header)
    ours = header.keys.get(_DTYPES)
    labels: dict[str, str] = {}
    floats: Counter[str] = Counter()
    for number, (name, form, shape, offset) in enumerate(header.tensors):
        if name == _ROPE:
            continue
        if name not in sources:
            raise InputError(f"{path}: tensor {shown(name)} has no place in a model of type {kind}")
        names, place = sources[name]
        label = _label(path, name, form, place, header.start + offset, shape, ours is not None)
        if label is None and form not in _FLOATS:
            floats[form] += 1
        dtype = _FLOATS.get(form, given) if label is None else torch.uint8
        if ours is not None and label is None:
            dtype = ours[number]
        if label is not None:
            labels |= dict.fromkeys(names, label)
            names = tuple(source + _END for source in names)
        stored = _Stored(name, form, shape, names, dtype, place)
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


def _config(path: Path, header: _Header) -> tuple[dict[str, Any], str]:
    """The model's config, and its type."""
    architecture = header.keys.get("general.architecture")
    here = [name for name, model in _models().items() if model.architecture == architecture]
    if not here:
        known = dict.fromkeys(model.architecture for model in _models().values())
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
    else:
        config = _made_config(path, header, here)
    _check_ours(path, header)
    return config, config["model_type"]


def _made_config(path: Path, header: _Header, kinds: list[str]) -> dict[str, Any]:
    """From the file's own keys."""
    from transformers import AutoConfig

    keys = {
        key.partition(".")[2]: value
        for key, value in header.keys.items()
        if key.startswith(header.keys["general.architecture"] + ".")
    }
    mixture = bool(keys.get("expert_count"))
    fitting = [kind for kind in kinds if bool(_models()[kind].experts) == mixture]
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
    config: dict[str, Any] = {"model_type": kind}
    usual = AutoConfig.for_model(kind).to_dict()
    for key, options in _data()["keys"].items():
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
    if "attention_bias" in usual:
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    return config


def _check_ours(path: Path, header: _Header) -> None:
    """The keys that we write, in a file that anyone may have written: dtypes become such."""
    dtypes, prefix = header.keys.get(_DTYPES), header.keys.get(_PREFIX, "")
    optional = {model.optional for model in _models().values()}
    try:
        check_types(prefix, str, _PREFIX)
        if prefix not in optional:
            raise ValueError(f"{_PREFIX} is {shown(prefix)}")
        if dtypes is None:
            return
        check_types(dtypes, list[str], _DTYPES)
        if len(dtypes) != len(header.tensors):
            raise ValueError(f"{_DTYPES} are {len(dtypes)}, for {len(header.tensors)} tensors")
        found = [dtype_of(name) for name in dtypes]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} has a corrupt header: {first_line(error)}") from None
    header.keys[_DTYPES] = found


def _given_dtype(config: dict[str, Any], header: _Header) -> torch.dtype:
    """Of what is dequantized: the config's, else that of most floats, else float16."""
    named = config.get("dtype") or config.get("torch_dtype")
    found = getattr(torch, named, None) if isinstance(named, str) else None
    if found in _KINDS:
        assert isinstance(found, torch.dtype)
        return found
    sizes: Counter[str] = Counter()
    for _, form, shape, _ in header.tensors:
        if form in ("F16", "BF16"):
            sizes[form] += _product(shape)
    return _FLOATS[sizes.most_common(1)[0][0]] if sizes else torch.float16


def _sources(
    kind: str, settings: dict[str, Any], header: _Header
) -> dict[str, tuple[tuple[str, ...], _Place]]:
    """Names of the container -> the tensors of the checkpoint that stand there, and their place."""
    prefix = header.keys.get(_PREFIX, "")
    found: dict[str, tuple[tuple[str, ...], _Place]] = {}
    for module, place in _places(kind, settings).items():
        for end in (".weight", ".bias"):
            source = module.removeprefix(prefix) + end
            names, _ = found.get(place.target + end, ((), place))
            found[place.target + end] = (*names, source), place
    return found


def _label(
    path: Path,
    name: str,
    form: str,
    place: _Place,
    begin: int,
    shape: tuple[int, ...],
    trusted: bool,
) -> str | None:
    """The scheme of blocks that hold our integers and belong to a matrix; None: floats are given."""
    block = next((block for block in BLOCKS if block.kind == form), None)
    if block is None or place.looked_up or len(shape) < 2 or not name.endswith(".weight"):
        return None
    if form != "Q4_1" or trusted:
        return block.label
    count = _product(shape) // 32
    with path.open("rb") as file:
        file.seek(begin)
        for start in range(0, count, _SLICE // 32):
            some = min(count - start, _SLICE // 32)
            data = bytearray(file.read(some * block.size_bytes))
            try:
                block.unpack(torch.frombuffer(data, dtype=torch.uint8).reshape(some, -1))
            except InputError:
                return None
    return block.label


def _shape_of(stored: _Stored, blocks: bool) -> tuple[int, ...]:
    """Of each of its sources."""
    shape = stored.shape[1:] if stored.place.stack is not None else stored.shape
    if blocks:
        return shape[0], stored.row_bytes
    return shape[::-1] if stored.place.transposed and len(shape) == 2 else shape


def _check_shape(path: Path, stored: _Stored) -> None:
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


def schemes(checkpoint: GgufCheckpoint) -> Mapping[str, QuantScheme]:
    """Of the weights in blocks, by name."""
    found = checkpoint.config.get("quantization_config", {}).get("weights", {})
    return {name: QuantScheme.parse(label) for name, label in found.items()}
