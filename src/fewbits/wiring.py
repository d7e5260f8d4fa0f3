"""What feeds what inside one decoder block, found by running it: no architecture is named here.

Modules that read one tensor form an `InputGroup`. A `ScalePair` says which norm or linear makes that
tensor, so that its channels can be divided by any positive vector while the readers' columns are
multiplied by it. That the block then computes the same is tried, not deduced.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fewbits.errors import InputError
from fewbits.linear import ExpertLinears
from fewbits.structure import is_conv1d, is_experts, is_linear

Form = Literal["weight", "one_plus_weight", "linear"]

# A pair holds if scaling both sides moves the block's output by at most this share of what scaling the
# readers alone does. Measured 2026-11-24 on all of tests/models.py, the reference model, two small
# Llamas, shapes of width 2048, also with residual streams 1000 times larger: pairs that hold stay below
# 1.5e-5, all others are above 0.17. (The output itself is no yardstick: beside such a stream, what the
# block adds was 1e-5 of it, and every pair would seem to hold.)
_TOLERANCE = 1e-3
# Only outputs up to this many times the largest effect are compared: others are rounded too coarsely.
_BURIED = 100
# Also tried with values this much larger: a clipped path is linear until the clip is reached.
_LARGE = 100
# A fused source has at most this many equal parts: q, k, v and a gate. Not tuned.
_MAX_PARTS = 4


@dataclass(frozen=True, slots=True)
class Rows:
    """Every `step`-th row from `start` on, `count` of them."""

    start: int
    step: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """These rows, as a view."""
        return tensor[self.start : self.start + self.step * self.count : self.step]


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Modules that read one tensor.

    Args:
        linears: the quantizable ones by path inside the block, in call order.
        readers: those, and all others that multiply the tensor by a `weight` (out, in): routers.
    """

    linears: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ScalePair:
    """Divide the source's channels by s, multiply the readers' columns by it: nothing else changes.

    Args:
        source: path of a norm or a linear inside the block.
        form: how a norm applies its weight (as it is, or one plus it), or that it is a linear.
        rows: which of the source's output channels the readers read, in their order.
        readers: of one `InputGroup`.
    """

    source: str
    form: Form
    rows: Rows
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wiring:
    """The groups and pairs of one block, in call order.

    Args:
        groups: each linear that was called is in exactly one.
        pairs: at most one for the readers of a group.
        unseen: linears that were never called, although something may use their weight.
    """

    groups: tuple[InputGroup, ...]
    pairs: tuple[ScalePair, ...]
    unseen: tuple[str, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """From what `dataclasses.asdict` and JSON made of one."""
        groups = [InputGroup(tuple(g["linears"]), tuple(g["readers"])) for g in value["groups"]]
        pairs = [
            ScalePair(p["source"], p["form"], Rows(**p["rows"]), tuple(p["readers"]))
            for p in value["pairs"]
        ]
        return cls(tuple(groups), tuple(pairs), tuple(value["unseen"]))


@torch.no_grad()
def find_wiring(block: nn.Module, run: Callable[[], Tensor], with_pairs: bool = True) -> Wiring:
    """Run a block and find its input groups and scale pairs.

    Args:
        block: in float32 and evaluation mode, its experts split. Afterwards it is, bit for bit, what it
            was, also if `run` raises. Weights are copied while they are tried: at most those of one
            group, of a mixture only those of experts that a token was routed to.
        run: runs the block on the same few rows of tokens each time; returns its hidden states. What
            else leaves the block (values that later blocks read) is seen only if it is joined to them.
        with_pairs: find the pairs too, which takes most of the runs.

    Raises:
        InputError: the block does not compute in float32.
    """
    trace = _trace(block, run)
    if trace.output.dtype != torch.float32:
        raise InputError(f"a block is probed in float32, and this one computes in {trace.output.dtype}")
    groups = _find_groups(block, trace)
    pairs: list[ScalePair] = []
    for _, alike in groupby(groups if with_pairs else [], key=lambda group: _kind(block, group)):
        pairs += _find_pairs(block, trace, list(alike))
    seen = {name for group in groups for name in group.linears}
    unseen = [n for n, m in block.named_modules() if _is_quantizable(m) and n not in seen]
    return Wiring(tuple(groups), tuple(pairs), tuple(unseen))


def signature(block: nn.Module) -> Hashable:
    """What blocks with the same wiring have in common: modules, their types, shapes and dtypes."""
    return tuple(
        (name, f"{type(module).__module__}.{type(module).__qualname__}", *_shapes(module))
        for name, module in block.named_modules()
    )


def _shapes(module: nn.Module) -> Iterator[Hashable]:
    for name, parameter in module.named_parameters(recurse=False):
        yield name, tuple(parameter.shape), parameter.dtype


# -- scaling ---------------------------------------------------------------------------------------


@torch.no_grad()
def scale_source(block: nn.Module, pair: ScalePair, s: Tensor) -> None:
    """Divide the channels that the pair's readers read by s (channels,), in place."""
    source = block.get_submodule(pair.source)
    weight = _weight(source)
    assert weight is not None
    rows = pair.rows.of(weight.t() if is_conv1d(source) else weight)
    if pair.form == "one_plus_weight":
        rows.copy_((1 + rows) / s - 1)
    else:
        rows.div_(s if pair.form == "weight" else s[:, None])
    bias = _bias(block, pair.source)
    if bias is not None:
        pair.rows.of(bias).div_(s)


@torch.no_grad()
def scale_readers(block: nn.Module, pair: ScalePair, s: Tensor) -> None:
    """Multiply the readers' columns by s (channels,), in place."""
    for reader in pair.readers:
        module = block.get_submodule(reader)
        weight = _weight(module)
        assert weight is not None
        weight.mul_(s[:, None] if is_conv1d(module) else s)


def _weight(module: nn.Module) -> Tensor | None:
    """Its own `weight`, of a norm or a matrix; not a property that makes one."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.ndim in (1, 2) else None


def _bias(block: nn.Module, path: str) -> Tensor | None:
    """The bias of a module; of an expert, its row of the one that the experts module keeps."""
    expert = _expert(block, path)
    if expert is None:
        return block.get_submodule(path)._parameters.get("bias")
    mixture, name, number = expert
    bias = block.get_submodule(mixture)._parameters.get(f"{name}_bias")
    return None if bias is None else bias[number]


def _expert(block: nn.Module, path: str) -> tuple[str, str, int] | None:
    """Of an expert's linear: path of the mixture, name of the projection, number of the expert."""
    owner, _, number = path.rpartition(".")
    if not isinstance(block.get_submodule(owner), ExpertLinears):
        return None
    mixture, _, name = owner.rpartition(".")
    return mixture, name, int(number)


def _is_quantizable(module: nn.Module) -> bool:
    return is_linear(module) or is_conv1d(module)


def _out_in(module: nn.Module) -> tuple[int, int] | None:
    """Shape of the matrix that it multiplies by; None for a norm."""
    weight = _weight(module)
    if weight is None or weight.ndim != 2:
        return None
    rows, columns = weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


# -- input groups ----------------------------------------------------------------------------------

_Read = tuple[Hashable, ...]  # a tensor that was read; last, how many features it has


@dataclass(frozen=True, slots=True)
class _Trace:
    """What happened when the block was run.

    Args:
        run: runs it again.
        reads: what each module with a weight read, once per call, by path in call order. An expert
            stands where its mixture was called, whether or not a token was routed to it.
        called: paths of those that were called.
        output: hidden states.
    """

    run: Callable[[], Tensor]
    reads: dict[str, list[_Read]]
    called: set[str]
    output: Tensor


def _trace(block: nn.Module, run: Callable[[], Tensor]) -> _Trace:
    reads: dict[str, list[_Read]] = defaultdict(list)
    called: set[str] = set()
    alive: list[Tensor] = []  # every input is kept, so that no address is used twice

    def watch(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            called.add(path)
            x = next(iter([*args, *kwargs.values()]), None)
            if not isinstance(x, Tensor) or x.ndim == 0:
                return
            alive.append(x)
            # Views of one tensor in other shapes are the same, if they have the same features.
            read = (x.data_ptr(), x.numel(), x._version, x.shape[-1])
            if is_experts(module):
                _record_experts(reads, path, module, read)
            elif _expert(block, path) is None:
                reads[path].append(read)

        return record

    handles = [
        module.register_forward_pre_hook(watch(path), with_kwargs=True)
        for path, module in block.named_modules()
        if is_experts(module) or _weight(module) is not None
    ]
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    return _Trace(run, dict(reads), called, output)


def _record_experts(reads: dict[str, list[_Read]], path: str, mixture: nn.Module, read: _Read) -> None:
    """All first projections read the mixture's input, each second one a tensor of its own."""
    for name, linears in mixture.named_children():
        if isinstance(linears, ExpertLinears):
            for number, linear in enumerate(linears):
                expert = f"{path}.{name}.{number}"
                own = (expert, linear.in_features)
                reads[expert].append(own if name == "down_proj" else read)


def _find_groups(block: nn.Module, trace: _Trace) -> list[InputGroup]:
    """What read the same tensor, or the same tensors one after the other."""
    together: dict[tuple[_Read, ...], list[str]] = defaultdict(list)
    for path, reads in trace.reads.items():
        shape = _out_in(block.get_submodule(path))
        if shape is not None and all(read[-1] == shape[1] for read in reads):
            together[tuple(reads)].append(path)
    groups = []
    for readers in together.values():
        linears = [path for path in readers if _is_quantizable(block.get_submodule(path))]
        if linears:
            groups.append(InputGroup(tuple(linears), tuple(readers)))
    return groups


# -- scale pairs -----------------------------------------------------------------------------------


def _kind(block: nn.Module, group: InputGroup) -> Hashable:
    """The same for the second projections of one mixture, which are tried together; else its own."""
    expert = _expert(block, group.readers[0])
    return expert[:2] if expert is not None and expert[1] == "down_proj" else group.readers[0]


def _find_pairs(block: nn.Module, trace: _Trace, groups: list[InputGroup]) -> list[ScalePair]:
    """One pair for each of these groups, all of the same form; or none."""
    candidates = _candidates(block, trace, groups)
    if not candidates:
        return []
    s = torch.rand(candidates[0][0].rows.count, generator=torch.Generator().manual_seed(0)) + 0.5
    s = s.to(trace.output.device)
    effect = _change(block, trace, candidates[0], s, sources=False).max()
    compared = trace.output.abs() <= _BURIED * effect
    if not (0 < effect < torch.inf and compared.any()):  # nothing can be told
        return []
    for pairs in candidates:
        changes = (_change(block, trace, pairs, tried) for tried in (s, s / _LARGE))
        if all(change[compared].max() <= _TOLERANCE * effect for change in changes):
            return pairs
    return []


def _change(
    block: nn.Module, trace: _Trace, pairs: list[ScalePair], s: Tensor, sources: bool = True
) -> Tensor:
    """How far the output moves when the readers, and the sources too, are scaled."""
    called = [
        replace(pair, readers=tuple(path for path in pair.readers if path in trace.called))
        for pair in pairs
        if pair.source in trace.called
    ]
    with _on_copies(block, called):
        for pair in called:
            scale_readers(block, pair, s)
            if sources:
                scale_source(block, pair, s)
        return (trace.run() - trace.output).abs()


@contextmanager
def _on_copies(block: nn.Module, pairs: list[ScalePair]) -> Iterator[None]:
    """Let the parameters that these pairs touch be copies for a while."""
    paths = {path for pair in pairs for path in (pair.source, *pair.readers)}
    mixtures = {expert[0] for path in paths if (expert := _expert(block, path)) is not None}
    modules = [block.get_submodule(path) for path in paths | mixtures]
    originals = {p: p.data for module in modules for p in module.parameters(recurse=False)}
    try:
        for parameter, data in originals.items():
            parameter.data = data.clone()
        yield
    finally:
        for parameter, data in originals.items():
            parameter.data = data


def _candidates(block: nn.Module, trace: _Trace, groups: list[InputGroup]) -> list[list[ScalePair]]:
    """What may have made the tensors that these groups read, a pair for each group, the likeliest first.

    Norms come before linears: they stay in float, so that scaling one changes no weight that is rounded.
    """
    shape = _out_in(block.get_submodule(groups[0].readers[0]))
    assert shape is not None
    sources = [_sources(block, trace, group.readers[0]) for group in groups]
    candidates = [
        [ScalePair(path, form, rows, group.readers) for path, group in zip(alike, groups, strict=True)]
        for alike in zip(*sources, strict=True)
        for form, rows in _forms(block.get_submodule(alike[0]), shape[1])
    ]
    return sorted(candidates, key=lambda pairs: pairs[0].form == "linear")


def _sources(block: nn.Module, trace: _Trace, reader: str) -> list[str]:
    """What was called before, the latest first; for an expert's second projection only its first."""
    expert = _expert(block, reader)
    if expert is not None and expert[1] == "down_proj":
        children = block.get_submodule(expert[0]).named_children()
        firsts = [n for n, m in children if isinstance(m, ExpertLinears) and n != "down_proj"]
        return [f"{expert[0]}.{name}.{expert[2]}" for name in firsts]
    before = takewhile(lambda path: path != reader, trace.reads)
    return [path for path in before if _expert(block, path) is None][::-1]


def _forms(module: nn.Module, width: int) -> Iterator[tuple[Form, Rows]]:
    """How channels of this module may be the `width` features of a tensor."""
    weight = _weight(module)
    if weight is not None and weight.ndim == 1 and len(weight) == width:
        yield "weight", Rows(0, 1, width)
        yield "one_plus_weight", Rows(0, 1, width)
    shape = _out_in(module)
    if shape is None or not _is_quantizable(module):
        return
    parts, rest = divmod(shape[0], width)
    if rest == 0 and parts <= _MAX_PARTS:
        for part in reversed(range(parts)):  # the last is the likeliest: q, k, v; gate, up
            yield "linear", Rows(part * width, 1, width)
        if parts == 2:  # interleaved
            yield "linear", Rows(1, 2, width)
            yield "linear", Rows(0, 2, width)
