"""What every method would make of a model: bytes of weights by component, cache, and what fits.

From config and headers alone. Nothing is looked up by the name of an architecture: a matrix belongs to
attention if the module around it takes a cache, and the cache is the one that the model itself fills
when it is run without weights.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.checkpoint import Checkpoint, TensorInfo, hash_json
from fewbits.errors import InputError, first_line
from fewbits.formats import Format, GgufLayout, Placement
from fewbits.plan import Plan, Survey, rescheme
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.sizes import weight_file_bytes
from fewbits.structure import (
    Matrix,
    cache_of,
    find_blocks,
    is_conv1d,
    is_experts,
    quiet_transformers,
    skeleton,
    text_config,
)
from fewbits.tensor import Note
from fewbits.wiring import signature

FLOAT = "float"
CALIBRATED = ("gptq", "awq", "awq+gptq", "weighted-rtn")
COMPONENTS = ("embeddings", "attention", "mlp", "experts", "head", "other")
_GROUP = 128  # columns in a group, as `quantize` has it by default
_SMALLER = (128, 64, 32)  # groups that are tried where one does not fit
# Of the interpreter and its libraries while a model runs. Rough; not tuned.
_LIBRARIES = 400 * 10**6
_ACTIVATION_COPIES = 8  # of the widest hidden state of a prefill that are alive at a time. Not tuned.
_PREFILL = 2048  # tokens run at a time, at most; clients cut long prompts so. Not tuned.


@dataclass(frozen=True, slots=True)
class Cost:
    """Of quantizing on this machine.

    Args:
        elapsed_s: from the start of `quantize` to its result, as `run.json` says it.
        peak_bytes: anonymous memory at its highest, Python and its libraries included.
        parts_s: seconds by what they are spent on; they add up to `elapsed_s`.
        received_bytes: what comes from other ranks, at the one that receives most.
    """

    elapsed_s: float
    peak_bytes: int
    parts_s: dict[str, float]
    received_bytes: int = 0


@dataclass(slots=True)
class Row:
    """One method.

    Args:
        name: like "gptq w4-g128"; "float" for the model as it is.
        method: as `--method` takes it; None for float.
        scheme: label of its scheme; None for float.
        weight_bytes: of all weight files, headers included.
        bits_per_weight: over whole files.
        components: bytes of tensors by component.
        needed_bytes: weights, cache and overhead together, when the result is run.
        fits: whether that is within the memory asked about; None where none was.
        refused: why the method cannot be used on this model.
        cost: of making it; None for float, or where it was not asked for.
    """

    name: str
    method: str | None
    scheme: str | None
    weight_bytes: int
    bits_per_weight: float
    components: dict[str, int]
    needed_bytes: int = 0
    fits: bool | None = None
    refused: str | None = None
    cost: Cost | None = None


@dataclass(slots=True)
class Forecast:
    """What can be said of a model before the work.

    Args:
        config_sha256: of its config, as the ledger has it.
        parameters: elements of floating-point tensors.
        quantized: what the source is quantized with already; None if it is in float.
        context, batch: tokens of a sequence, and sequences, that the cache is for.
        kv_cache_bytes: of that; None where it is not known.
        overhead_bytes: activations and libraries: rough.
        memory_bytes: that the model shall fit in; None if nobody asked.
        rows: float first, then from larger to smaller.
        best: name of the first row, in the order of what loses least, that fits.
        rates: what the probe measured; empty where it was skipped.
    """

    name: str
    config_sha256: str
    parameters: int
    quantized: str | None
    device: str
    context: int
    batch: int
    kv_cache_bytes: int | None
    overhead_bytes: int
    memory_bytes: int | None
    rows: list[Row]
    best: str | None = None
    rates: dict[str, float] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def row(self, name: str | None) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"notes": [str(note) for note in self.notes]}


@dataclass(frozen=True, slots=True)
class Choice:
    """A method and scheme that a row is made for."""

    method: str
    scheme: QuantScheme

    @property
    def name(self) -> str:
        """As in the table."""
        short = "int8" if self.method == "rtn" and self.scheme == QuantScheme(8) else self.method
        return f"{short} {self.scheme.label}"


# What loses least comes first: 8 bits before 4, and at the same bits what was best in LOG.md.
def choices(
    group_size: int | None = _GROUP, symmetric: bool = True, bits: tuple[int, ...] = (4, 3)
) -> list[Choice]:
    """The methods of the table; groups of None are whole channels.

    >>> [choice.name for choice in choices(bits=(4,))][:3]
    ['int8 w8-channel', 'llm-int8 w8-channel-a8-token-t6-static', 'awq+gptq w4-g128']
    """
    static = InputScheme(static=True)
    found = [
        Choice("rtn", QuantScheme(8, symmetric=symmetric)),
        Choice("llm-int8", QuantScheme(8, inputs=static)),
    ]
    for width in bits:
        granularity = "channel" if group_size is None else "group"
        scheme = QuantScheme(width, granularity, group_size, symmetric)  # type: ignore[arg-type]
        found += [Choice(method, scheme) for method in ("awq+gptq", "gptq", "awq", "rtn")]
    return found


def fitting_group(seen: Survey) -> int | None:
    """The default group size, or the largest smaller one that divides all columns; None: channels."""
    columns = {m.rows_columns[1] for m in seen.matrices.values() if not m.head and m.kind != "embedding"}
    return next((size for size in _SMALLER if all(n % size == 0 for n in columns)), None)


# -- components --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tensors:
    """Tensors of a checkpoint that are alike: their component, shape, and what becomes of them.

    Args:
        scheme: that was fixed for them, whatever the row's is.
        rounded: whether they become codes at all.
        count: of matrices in one tensor.
        shape: (out, in) of a matrix to be rounded; the whole shape of what is copied.
    """

    component: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rounded: bool
    scheme: QuantScheme | None
    count: int
    block: bool

    @property
    def source_bytes(self) -> int:
        """Of one."""
        return self.count * torch.Size(self.shape).numel() * self.dtype.itemsize


def cache_modules(model: nn.Module) -> set[str]:
    """Paths of the modules inside of blocks that keep a cache: attention, and what stands for it."""
    prefix = find_blocks(model) + "."
    blocks = {prefix + name for name, _ in model.get_submodule(prefix[:-1]).named_children()}
    taking: dict[type, bool] = {}
    found = set()
    for path, module in model.named_modules():
        if path.startswith(prefix) and path not in blocks:
            kind = type(module)
            if kind not in taking:
                names = inspect.signature(kind.forward).parameters
                taking[kind] = any("past" in name or "cache" in name for name in names)
            if taking[kind]:
                found.add(path)
    return found


def group_tensors(
    plan: Plan, seen: Survey, chosen: QuantScheme
) -> tuple[Counter[Tensors], Counter[str]]:
    """All tensors by kind with their numbers, and the letters of their names by "rounded" and "copied".

    Args:
        plan: of a recipe whose scheme is `chosen`; other schemes in it are those of overrides.
        seen: the model.
        chosen: the very object.
    """
    caching = cache_modules(seen.model)
    owners: dict[str, bool] = {}

    def caches(module: str) -> bool:
        if module not in owners:
            parts = module.split(".")
            owners[module] = any(".".join(parts[:i]) in caching for i in range(1, len(parts) + 1))
        return owners[module]

    embedding = seen.model.get_input_embeddings()  # type: ignore[operator]
    embeddings = {n for n, m in seen.model.named_modules() if m is embedding}
    groups, letters = Counter[Tensors](), Counter[str]()
    kinds: dict[Any, Tensors] = {}

    def kind_of(
        name: str, info: TensorInfo, matrix: Matrix | None, placement: Placement | None
    ) -> Tensors:
        if matrix is not None and (matrix.head or matrix.block is not None):
            component = "head" if matrix.head else "experts" if matrix.kind == "expert" else "mlp"
            component = "attention" if component == "mlp" and caches(matrix.module) else component
        else:
            target = seen.targets.get(name)
            module = "" if target is None else target.parameter.rpartition(".")[0]
            module = module if matrix is None else matrix.module
            component = "embeddings" if module in embeddings else "other"
        scheme = None if placement is None or placement.scheme is chosen else placement.scheme
        rounded = placement is not None
        shape = matrix.rows_columns if matrix is not None and rounded else info.shape
        count = matrix.shape[0] if matrix is not None and matrix.stacked and rounded else 1
        inside = plan.blocks.get(name) is not None
        if name in plan.origins:  # made beside its origin, which is copied: no bytes of the source
            component = "head"
        return Tensors(component, shape, info.dtype, rounded, scheme, count, inside)

    numbers = Counter[Any]()
    made = (name for name in plan.origins if name not in plan.checkpoint.tensors)
    for name in chain(plan.checkpoint.tensors, made):
        info, matrix, placement = plan.info(name), plan.matrices.get(name), plan.placements.get(name)
        alike: Any = name  # experts of a module, of one shape, are of one kind
        if matrix is not None and matrix.kind == "expert":
            inside = (matrix.block, plan.blocks.get(name))
            alike = (matrix.module, inside, matrix.shape, matrix.transposed, info.dtype, id(placement))
        if alike not in kinds:
            kinds[alike] = kind_of(name, info, matrix, placement)
        numbers[alike] += 1
        letters["rounded" if placement is not None else "copied"] += len(name)
    for alike, number in numbers.items():
        groups[kinds[alike]] += number
    return groups, letters


def tensor_bytes(kind: Tensors, scheme: QuantScheme, layout: Format) -> int:
    """On disk, of one tensor of a kind."""
    if not kind.rounded:
        return kind.source_bytes
    rows, columns = kind.shape
    own = kind.scheme or scheme
    return kind.count * layout.written_bytes(rows, columns, own, kind.dtype.itemsize)


def _entry_bytes(shape: tuple[int, ...], dtype: str, digits: int) -> int:
    """Of one entry in a safetensors header, without the name: quotes, dtype, shape, offsets."""
    numbers = sum(len(str(n)) + 1 for n in shape) - (1 if shape else 0)
    return len('"":{"dtype":"","shape":[],"data_offsets":[,]},') + len(dtype) + numbers + 2 * digits


def _endings(layout: Format, scheme: QuantScheme) -> list[str]:
    """What `X.weight` becomes on disk, after the X."""
    every = [name.removeprefix("X.") for name in layout.tensors("X.weight").every]
    if "weight_shape" not in every:  # nothing of it depends on the scheme
        return every
    points = [] if scheme.symmetric else ["weight_zero_point"]
    return ["weight_packed", "weight_scale", "weight_shape", *points]


def header_bytes(
    groups: Counter[Tensors], letters: Counter[str], scheme: QuantScheme, layout: Format, total: int
) -> int:
    """Of all headers in safetensors files, to within some digits of shapes and offsets."""
    digits, size = len(str(total)), 8 + len('{"__metadata__":{"format":"pt"}}')
    for kind, count in groups.items():
        if not kind.rounded:
            size += count * _entry_bytes(kind.shape, "BF16", digits)
            continue
        own, (rows, columns) = kind.scheme or scheme, kind.shape
        stack = (kind.count,) if kind.count > 1 else ()
        shapes = {"weight_shape": (*stack, 2), "g_idx": (columns,)}
        for number, ending in enumerate(_endings(layout, own)):
            shape = (*stack, rows, own.groups(columns) if number else columns)
            entry = _entry_bytes(shapes.get(ending, shape), "BF16", digits)
            size += count * (len(ending) - len("weight") + entry)
    return size + letters["copied"] + len(_endings(layout, scheme)) * letters["rounded"]


def _misfit(groups: Counter[Tensors], scheme: QuantScheme) -> str | None:
    """Why a scheme cannot be used: columns that its groups do not divide."""
    if scheme.group_size is None:
        return None
    size = scheme.group_size
    wrong = {k.shape[1]: 0 for k in groups if k.rounded and k.scheme is None and k.shape[1] % size}
    for kind, count in groups.items():
        if kind.rounded and kind.scheme is None and kind.shape[1] in wrong:
            wrong[kind.shape[1]] += count
    if not wrong:
        return None
    columns = next(iter(wrong))
    return f"groups of {size} do not divide the {columns} columns of {sum(wrong.values())} weights"


# -- the cache ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Observed:
    """What a run without weights shows.

    Args:
        cache_elements: values that the model keeps for one sequence; None where it does not tell.
        why: it does not.
        readers: module of each linear of the blocks -> number of the input that it reads.
    """

    cache_elements: int | None = None
    why: str = ""
    readers: dict[str, int] = field(default_factory=dict)


def observe(model: nn.Module, context: int) -> Observed:
    """Run the model on the meta device, where nothing is computed, and see what it keeps of a sequence.

    Its experts, whose order of work depends on values, are passed over. Of blocks that are alike one is
    run; where a model does not run with one block, all of them are.
    """
    with suppress(Exception):  # models fail in as many ways as there are architectures
        return _observe_kinds(model, context)
    found = Observed()
    for attention in (None, "eager"):
        try:
            with _watched(model, found):
                if attention is not None:
                    model.set_attn_implementation(attention)  # type: ignore[operator]
                kept = _kept_elements(model, context)
        except Exception as error:
            found.why = first_line(error)
            continue
        if kept:
            found.cache_elements = kept
            return found
        found.why = "it keeps none that is understood"
    return found


def _observe_kinds(model: nn.Module, context: int) -> Observed:
    """One block of each kind stands for all; what is kept without any block is counted once."""
    path = find_blocks(model)
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    kinds: dict[Any, list[int]] = {}
    for number, block in enumerate(blocks):
        kinds.setdefault(_kind(block), []).append(number)
    parent, _, name = path.rpartition(".")
    readers: dict[str, int] = {}
    try:
        setattr(model.get_submodule(parent), name, nn.ModuleList())
        total = shared = _kept_elements(model, context)
        for numbers in kinds.values():
            setattr(model.get_submodule(parent), name, nn.ModuleList([blocks[numbers[0]]]))
            one = Observed()
            with _watched(model, one):
                total += len(numbers) * (_kept_elements(model, context) - shared)
            for reader, given in one.readers.items():
                inside = reader.removeprefix(f"{path}.0.")
                readers |= {f"{path}.{number}.{inside}": given for number in numbers}
    finally:
        setattr(model.get_submodule(parent), name, blocks)
    if not total:
        raise ValueError("it keeps nothing that is understood")
    return Observed(total, readers=readers)


def _kind(block: nn.Module) -> Any:
    """What blocks that keep alike have in common: modules, shapes, settings; not their number."""
    settings = [
        (path, name, value)
        for path, module in block.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str) and name not in ("layer_idx", "training")
    ]
    return signature(block), tuple(settings)


def _kept_elements(model: nn.Module, context: int) -> int:
    """Values that stay of a sequence in the model's cache; 0 where there is none that is understood."""
    ids = torch.zeros(1, context, dtype=torch.int64, device="meta")
    with _without_values(model), quiet_transformers(), torch.no_grad():
        output = model(ids, use_cache=True)
    kept = {
        id(t): t.numel() for t in _tensors(cache_of(output), 0) if t.is_floating_point() and t.ndim > 1
    }
    return sum(kept.values())


@contextmanager
def _watched(model: nn.Module, found: Observed) -> Iterator[None]:
    """Note which tensor each linear of the blocks is given; tensors live on, so that ids stay theirs."""
    prefix, inputs = find_blocks(model) + ".", dict[int, Tensor]()

    def watch(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                inputs[id(args[0])] = args[0]
                found.readers[path] = id(args[0])

        return record

    linears = [
        (path, module)
        for path, module in model.named_modules()
        if path.startswith(prefix) and (isinstance(module, nn.Linear) or is_conv1d(module))
    ]
    handles = [module.register_forward_pre_hook(watch(path)) for path, module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    """Those inside of a cache: it holds layers, which hold tensors or lists of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, depth + 1)
    elif hasattr(value, "__dict__") and depth < 4:
        yield from _tensors(vars(value), depth + 1)


@contextmanager
def _without_values(model: nn.Module) -> Iterator[None]:
    experts = [module for module in model.modules() if is_experts(module)]
    config: Any = model.config
    padding = config.pad_token_id
    for module in experts:
        module.forward = _same
    config.pad_token_id = None  # some models look for it among the tokens, which have no values here
    try:
        yield
    finally:
        config.pad_token_id = padding
        for module in experts:
            del module.forward


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


# -- the forecast ------------------------------------------------------------------------------------


def forecast(
    plan: Plan,
    seen: Survey,
    chosen: QuantScheme,
    wanted: list[Choice],
    *,
    name: str,
    memory_bytes: int | None = None,
    device: str = "cpu",
    batch: int = 1,
    context: int | None = None,
    format_name: str | None = None,
    cost: Callable[[Choice, Counter[Tensors], Observed, Format], Cost] | None = None,
) -> Forecast:
    """Sizes, cache, what fits, and what it costs, for float and each choice.

    Args:
        plan: of a recipe whose scheme is `chosen`; its overrides and head hold for every row.
        seen: the model.
        chosen: the very object that the recipe has.
        wanted: methods, from the one that loses least.
        name: of the model.
        memory_bytes: that the result shall run in.
        device: where it shall run.
        batch, context: sequences and tokens of each; 1, and the model's context up to 8,192.
        format_name: that all are written in; None: each as `quantize` writes it by default.
        cost: of making one; None: not asked for.

    Raises:
        InputError: a batch, a context or a memory that is no size.
    """
    context, notes = _context(seen.model, batch, context)
    groups, letters = group_tensors(plan, seen, chosen)
    checkpoint = plan.checkpoint
    itemsize = checkpoint.dtype.itemsize
    observed = observe(seen.model, context)
    notes += _cache_notes(observed)
    overhead = _overhead(seen.model, groups, batch, context, itemsize)
    whole = sum(checkpoint.file_bytes.values())
    source = dict.fromkeys(COMPONENTS, 0)
    for kind, count in groups.items():
        source[kind.component] += count * kind.source_bytes
    for made in plan.origins:
        source["head"] -= plan.info(made).size_bytes
    parameters = plan.parameters
    rows = [Row(FLOAT, None, None, whole, 8 * whole / parameters, source)]
    files: dict[QuantScheme, _Files] = {}
    for choice in wanted:
        if choice.scheme not in files:
            files[choice.scheme] = _files(plan, chosen, choice.scheme, format_name, groups, letters)
        rows.append(_row(choice, parameters, files[choice.scheme]))
    made_8 = [choice for choice, row in zip(wanted, rows[1:], strict=True) if row.refused is None]
    if any(choice.method == "llm-int8" and choice.scheme.inputs is not None for choice in made_8):
        what = "columns that calibration keeps in 16 bit come on top; how many headers cannot tell"
        notes.append(Note("fact", "llm-int8", what))
    result = Forecast(
        name, hash_json(checkpoint.config), parameters, None, device, context, batch,
        _cache_bytes(observed, batch, itemsize), overhead, memory_bytes, rows, notes=notes,
    )  # fmt: skip
    if cost is not None:
        for choice, row in zip(wanted, rows[1:], strict=True):
            layout = files[choice.scheme].layout
            row.cost = None if layout is None else cost(choice, groups, observed, layout)
    fit(result)
    return result


def forecast_quantized(
    checkpoint: Checkpoint,
    *,
    name: str,
    memory_bytes: int | None = None,
    device: str = "cpu",
    batch: int = 1,
    context: int | None = None,
) -> Forecast:
    """Sizes and cache of a model that is quantized already, as it is.

    Raises:
        InputError: a batch, a context or a memory that is no size; or an unknown architecture.
    """
    quantization = checkpoint.config["quantization_config"]
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    model = skeleton(checkpoint.config)
    context, notes = _context(model, batch, context)
    observed = observe(model, context)
    notes += _cache_notes(observed)
    parameters = sum(p.numel() for p in model.parameters())
    whole = sum(checkpoint.file_bytes.values())
    by_dtype = Counter[str]()
    for info in checkpoint.tensors.values():
        by_dtype[str(info.dtype).removeprefix("torch.")] += info.size_bytes
    row = Row("as it is", None, None, whole, 8 * whole / parameters, dict(by_dtype))
    overhead = _overhead(model, Counter(), batch, context, 2)
    result = Forecast(
        name, hash_json(checkpoint.config), parameters, str(method), device, context, batch,
        _cache_bytes(observed, batch, 2),  # activations are in 16 bit
        overhead, memory_bytes, [row], notes=notes,
    )  # fmt: skip
    fit(result)
    return result


def _cache_bytes(observed: Observed, batch: int, itemsize: int) -> int | None:
    elements = observed.cache_elements
    return None if elements is None else batch * elements * itemsize


def _cache_notes(observed: Observed) -> list[Note]:
    if observed.cache_elements is not None:
        return []
    return [Note("skip", "KV cache", f"not known, and left out of what fits: {observed.why}")]


@dataclass(frozen=True, slots=True)
class _Files:
    """Of one scheme: what it is written in, and bytes of tensors and of whole files; or why not."""

    layout: Format | None
    refused: str | None = None
    components: dict[str, int] = field(default_factory=dict)
    size_bytes: int = 0


def _files(
    plan: Plan,
    chosen: QuantScheme,
    scheme: QuantScheme,
    format_name: str | None,
    groups: Counter[Tensors],
    letters: Counter[str],
) -> _Files:
    refused = _misfit(groups, scheme)
    if refused is not None:
        return _Files(None, refused)
    try:
        other = rescheme(plan, chosen, scheme, format_name)
    except InputError as error:
        return _Files(None, str(error))
    components = dict.fromkeys(COMPONENTS, 0)
    for kind, count in groups.items():
        components[kind.component] += count * tensor_bytes(kind, scheme, other.format)
    if isinstance(other.format, GgufLayout):
        size = weight_file_bytes(other)
    else:
        size = sum(components.values())
        size += header_bytes(groups, letters, scheme, other.format, size)
    return _Files(other.format, None, components, size)


def _row(choice: Choice, parameters: int, files: _Files) -> Row:
    label, size = choice.scheme.label, files.size_bytes
    components = dict(files.components)
    return Row(
        choice.name, choice.method, label, size, 8 * size / parameters, components,
        refused=files.refused,
    )  # fmt: skip


def fit(result: Forecast) -> None:
    """Say of each row whether it fits, and which is the best that does: rows stand in that order."""
    for row in result.rows:
        row.needed_bytes = row.weight_bytes + (result.kv_cache_bytes or 0) + result.overhead_bytes
        if result.memory_bytes is not None and row.refused is None:
            row.fits = row.needed_bytes <= result.memory_bytes
    result.best = next((row.name for row in result.rows if row.fits), None)


def _context(model: nn.Module, batch: int, context: int | None) -> tuple[int, list[Note]]:
    most = getattr(text_config(model), "max_position_embeddings", None)
    if batch < 1:
        raise InputError(f"--batch is {batch}; accepted are numbers from 1")
    if context is None:
        return min(most or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT), []
    if context < 1:
        raise InputError(f"--context is {context}; accepted are numbers from 1")
    if most is not None and context > most:
        raise InputError(f"--context is {context}; accepted are at most the model's own, {most}")
    return context, []


_DEFAULT_CONTEXT = 8192  # tokens that the cache is stated for where nobody says; not tuned


def _overhead(
    model: nn.Module, groups: Counter[Tensors], batch: int, context: int, itemsize: int
) -> int:
    """Activations of one prefill and the logits of its last token, and the libraries: rough."""
    hidden, vocabulary = int(text_config(model).hidden_size), int(text_config(model).vocab_size)
    widest = max((max(k.shape) for k in groups if k.rounded and k.block), default=4 * hidden)
    tokens = batch * min(context, _PREFILL)
    return _LIBRARIES + _ACTIVATION_COPIES * tokens * widest * itemsize + 4 * batch * vocabulary
