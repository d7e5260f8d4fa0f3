"""Models as llama.cpp has them: names, and what is done to each tensor on the way into a file and back.

What each architecture wants stands in formats/gguf_models.toml; names of tensors are the gguf library's.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint import CONFIG, TensorInfo, check_config
from fewbits.errors import InputError, first_line
from fewbits.formats.gguf import BLOCKS
from fewbits.gguf_header import MAX_TENSORS, block_sizes, product
from fewbits.untrusted import shown

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = {dtype: kind for kind, dtype in FLOATS.items()}
END = "_blocks"
_BY_LABEL = {block.label: block.kind for block in BLOCKS}  # the types that are written
_REALS = "epsilon", "freq", "softcapping"  # parts of keys that are float32, not uint32


@dataclass(frozen=True, slots=True)
class Model:
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
    as_floats: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    requires: dict[str, Any] = field(default_factory=dict)
    unset: list[str] = field(default_factory=list)
    full_every: int = 1
    scale: str | None = None
    by_width: list[int] = field(default_factory=list)
    plus_one: list[str] = field(default_factory=list)
    keys: dict[str, list[str]] = field(default_factory=dict)
    ignores: list[str] = field(default_factory=list)
    misread: str | None = None


@cache
def table() -> dict[str, Any]:
    """All of gguf_models.toml."""
    text = files("fewbits.formats").joinpath("gguf_models.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def models() -> dict[str, Model]:
    """By the model_type of config.json."""
    return {name: Model(**entry) for name, entry in table()["models"].items()}


def unsupported(config: dict[str, Any]) -> str | None:
    """Why a model cannot be written as GGUF; None if it can.

    Args:
        config: of config.json.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in models():
        reason = table()["refused"].get(str(kind), "what llama.cpp wants of it is not known here")
        return f"model_type {shown(kind)}: {reason}; accepted are {', '.join(models())}"
    try:
        settings = filled_in(config)
    except InputError as error:
        return str(error)
    try:
        rotary(settings)
        return _differs(models()[kind], settings)
    except InputError as error:
        return str(error)


def _differs(model: Model, settings: dict[str, Any]) -> str | None:
    """The first setting with which llama.cpp would compute something else."""
    for key, value in model.requires.items():
        if key in settings and settings[key] != value:
            return f"{key} is {shown(settings[key])}; llama.cpp computes {shown(value)} only"
    for key in model.unset:
        if settings.get(key):
            return f"{key} is {shown(settings[key])}; llama.cpp does nothing about it"
    blocks, every = _count(settings, "block_count"), model.full_every
    if every > 1:
        full = [kind == "full_attention" for kind in settings.get("layer_types") or []]
        if full != [i % every == every - 1 for i in range(blocks)]:
            return f"layer_types: llama.cpp has one block in {every} in full attention, the last of them"
    if model.scale is not None:
        wide = blocks in model.by_width
        width = settings["hidden_size"] // settings["num_attention_heads"]
        wanted = width if wide else settings["head_dim"]
        if settings[model.scale] != wanted:
            return f"{model.scale} is {shown(settings[model.scale])}; llama.cpp takes {wanted}"
    return None


def ignored(config: dict[str, Any]) -> list[str]:
    """What a client makes of a model otherwise, one line each: settings not honoured, files misread."""
    settings, model = filled_in(config), models()[config["model_type"]]
    found = [
        f"{key} is {shown(settings[key])} in config.json, which llama.cpp does not honour"
        for key in model.ignores
        if settings.get(key) is not None
    ]
    return found + ([] if model.misread is None else [model.misread])


def filled_in(config: dict[str, Any]) -> dict[str, Any]:
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
        rope = settings.get("rope_parameters") or {}
        if "full_attention" in rope:  # one for each kind of block
            windows = rope.get("sliding_attention") or {}
            if windows.get("rope_type", "default") != "default":
                raise InputError(f"rope_type {shown(windows['rope_type'])} of windows is not written")
            settings["rope_theta_of_windows"] = windows.get("rope_theta")
            settings["rope_parameters"] = rope = rope["full_attention"]
        settings["rope_theta"] = rope.get("rope_theta")
    except InputError:
        raise
    except Exception as error:  # configs fail in as many ways as there are architectures
        raise InputError(f"config.json is not understood by transformers: {first_line(error)}") from None
    return settings


def keys_of(settings: dict[str, Any], model: Model) -> dict[str, Any]:
    """What the container says of a model, by its keys without the architecture: float, int or str."""
    found = dict(rotary(settings)[0])
    for key, options in (table()["keys"] | model.keys).items():
        value = next((settings[name] for name in options if settings.get(name) is not None), None)
        if value is not None:
            found[key] = float(value) if any(part in key for part in _REALS) else int(value)
    return found


def rotary(settings: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
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
class Place:
    """Where a module's tensors go.

    Args:
        target: name in the container, without ".weight" or ".bias".
        heads: in which its rows are reordered; 0: they are not.
        stack: which expert it is, of how many; None: it is none.
        transposed, single, as_floats, plus_one: as gguf_models.toml has them.
    """

    target: str
    heads: int = 0
    stack: tuple[int, int] | None = None
    transposed: bool = False
    single: bool = False
    as_floats: bool = False
    plus_one: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
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
    place: Place

    @property
    def row_bytes(self) -> int:
        """Of one row of its values."""
        columns, size = block_sizes()[self.kind]
        return self.shape[-1] // columns * size

    @property
    def size_bytes(self) -> int:
        """Of all."""
        return self.row_bytes * product(self.shape[:-1])


def places_of(kind: str, settings: dict[str, Any]) -> dict[str, Place]:
    """Of every module that a model may have, by its full name."""
    import gguf

    model = models()[kind]
    names = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    blocks, experts = (_count(settings, key) for key in ("block_count", "expert_count"))
    if blocks * max(len(model.inside), experts * len(model.experts)) > MAX_TENSORS:
        raise InputError(f"config.json asks for {blocks} blocks of {experts} experts")
    mapping = gguf.get_tensor_name_map(names[model.architecture], blocks)
    places = {}

    def add(module: str, short: str) -> None:
        target = mapping.get_name(module)
        if target is not None:
            places[module] = Place(
                target,
                heads=_whole(settings, model.heads[short]) if short in model.heads else 0,
                transposed=short in model.transposed,
                single=short in model.single,
                as_floats=short in model.as_floats,
                plus_one=short in model.plus_one,
            )

    for module in model.outside:
        add(module, module)
    for block in range(blocks):
        for module in model.inside:
            add(f"{model.blocks}.{block}.{module}", module)
        for module, target in model.experts.items():
            for expert in range(experts):
                full = f"{model.blocks}.{block}.{module.format(expert)}"
                places[full] = Place(f"blk.{block}.{target}", stack=(expert, experts))
    return places


def _count(settings: dict[str, Any], key: str) -> int:
    """What a key of the container counts; 0 where the model has none."""
    names = [name for name in table()["keys"][key] if settings.get(name) is not None]
    return _whole(settings, names[0]) if names else 0


def _whole(settings: dict[str, Any], name: str) -> int:
    value = settings.get(name)
    if type(value) is not int or value < 1:
        raise InputError(f"config.json: {name} is {shown(value)}; accepted are numbers from 1")
    return value


def arrange(config: dict[str, Any], tensors: Sequence[TensorInfo]) -> tuple[list[Stored], list[str]]:
    """The tensors of the container, in order, and the names of those that it computes itself."""
    kind = config["model_type"]
    model, places = models()[kind], places_of(kind, filled_in(config))
    labels = (config.get("quantization_config") or {}).get("weights", {})
    prefix = left_out(model, [info.name for info in tensors])
    found: dict[str, list[tuple[int, TensorInfo, str, Place]]] = {}
    left = []
    for info in tensors:
        module, _, end = info.name.rpartition(".")
        place = places.get(prefix + module)
        if place is None or end not in ("weight", "bias", "weight" + END):
            if not info.name.endswith(tuple(model.buffers)):
                raise InputError(f"tensor {info.name} has no place in GGUF's {model.architecture}")
            left.append(info.name)
            continue
        label = labels.get(info.name.removesuffix(END)) if end.endswith(END) else None
        if label is None and end.endswith(END):
            raise InputError(f"tensor {info.name} has no scheme in quantization_config")
        target = f"{place.target}.{end.removesuffix(END)}"
        entry = (place.stack[0] if place.stack else 0, info, _kind(info, label, place), place)
        found.setdefault(target, []).append(entry)
    return [_stored(target, parts) for target, parts in found.items()], left


def left_out(model: Model, names: list[str]) -> str:
    """What a checkpoint leaves out of its names."""
    bare = model.blocks.removeprefix(model.optional)
    inside = any(name.startswith(f"{bare}.") for name in names)
    return model.optional if model.optional and inside else ""


def _kind(info: TensorInfo, label: str | None, place: Place) -> str:
    if label is not None:
        if label not in _BY_LABEL:
            accepted = ", ".join(_BY_LABEL)
            raise InputError(f"tensor {info.name} is {shown(label)}; accepted are {accepted}")
        return _BY_LABEL[label]
    if info.dtype not in KINDS:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in KINDS)
        raise InputError(f"tensor {info.name} is {info.dtype}; GGUF takes {accepted}")
    return "F32" if len(info.shape) < 2 or place.single else KINDS[info.dtype]


def _stored(target: str, parts: list[tuple[int, TensorInfo, str, Place]]) -> Stored:
    parts.sort(key=lambda part: part[0])
    _, info, kind, place = parts[0]
    experts = 1 if place.stack is None else place.stack[1]
    if [part[0] for part in parts] != list(range(experts)):
        raise InputError(f"{target} is made of {experts} tensors, and {len(parts)} are there")
    if len({(part[1].shape, part[1].dtype, part[2]) for part in parts}) > 1:
        raise InputError(f"{target} is made of tensors of one type and shape, and {info.name} differs")
    shape = info.shape
    columns, size = block_sizes()[kind]
    if info.name.endswith(END):
        shape = (shape[0], shape[1] // size * columns)
    elif place.transposed and len(shape) == 2:
        shape = shape[::-1]
    if place.heads and shape[0] % (2 * place.heads):
        raise InputError(f"{info.name} has {shape[0]} rows, which are no {place.heads} heads")
    if place.stack is not None:
        shape = (experts, *shape)
    return Stored(target, kind, shape, tuple(part[1].name for part in parts), info.dtype, place)


def _reorder(tensor: Tensor, heads: int, back: bool = False) -> Tensor:
    """Rows of each head: the two halves become pairs of neighbours, or back."""
    if not heads:
        return tensor
    half = tensor.shape[0] // heads // 2
    parts = (heads, half, 2) if back else (heads, 2, half)
    return tensor.reshape(*parts, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def to_disk(stored: Stored, tensor: Tensor) -> Tensor:
    """One source tensor as it stands in the container."""
    tensor = tensor.detach().cpu()
    if stored.kind in FLOATS:
        if stored.place.transposed and tensor.ndim == 2:
            tensor = tensor.t()
        exact, tensor = tensor, tensor.to(FLOATS[stored.kind])
        if stored.place.plus_one:
            tensor = tensor + 1
            if not torch.equal(from_disk(stored, tensor, exact.dtype), exact):
                raise InputError(
                    f"{stored.sources[0]} has values that are lost beside the 1 that GGUF adds to them"
                )
    return _reorder(tensor, stored.place.heads).contiguous()


def from_disk(stored: Stored, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_disk`."""
    tensor = _reorder(tensor, stored.place.heads, back=True)
    if tensor.dtype == torch.uint8:
        return tensor
    tensor = (tensor - 1 if stored.place.plus_one else tensor).to(dtype)
    return tensor.t() if stored.place.transposed and tensor.ndim == 2 else tensor
