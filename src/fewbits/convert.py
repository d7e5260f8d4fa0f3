"""convert(): a quantized checkpoint in another format, its integers as they are."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint import (
    MAX_SHARD_BYTES,
    Checkpoint,
    TensorInfo,
    Written,
    hash_tensor,
    resolve,
)
from fewbits.errors import InputError
from fewbits.formats import FORMATS, Format, GgufLayout, Reader, ScaleRange
from fewbits.formats.layout import FLOAT_EMBEDDINGS
from fewbits.formats.packed import on_disk
from fewbits.gguf_file import GgufCheckpoint
from fewbits.journal import Journal, throw_away
from fewbits.ledger import Codes, Entry, describe_source, plain
from fewbits.load import config_dtype, open_model, quantization_of, quantized_matrices, read_matrix
from fewbits.memory import watch_memory
from fewbits.methods import RTN, round_held
from fewbits.pipeline import Quantized, check_out, finish, reuse
from fewbits.plan import Plan, make_plan, placement_of, survey
from fewbits.recipe import Recipe
from fewbits.scheme import BITS, QuantScheme
from fewbits.steps import Page, Steps
from fewbits.structure import Matrix, skeleton
from fewbits.tensor import Note, QuantizedTensor
from fewbits.verify import Progress

_SIZES = (128, 64, 32)  # of groups, that clients' kernels take
_Part = tuple[str, Hashable] | None  # what is to be alike, and in what it is


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: str,
    requantize: bool = False,
    clients: tuple[str, ...] = (),
    tensor_parallel: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    restart: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Write a quantized checkpoint, of fewbits or of another tool, in another format.

    All codes, scales and zero points are the source's, bit for bit; what cannot be held is refused.

    Args:
        source: folder of a quantized checkpoint, a GGUF file, or a hub id.
        out: folder to be made, as in `fewbits.quantize`.
        format: one of `FORMATS`.
        requantize: round what the format cannot hold to what it can; notes say with which loss.
        clients, tensor_parallel: that must be able to load the result, as in `fewbits.quantize`.
        max_shard_bytes: of a weight file.
        restart: throw away what `out` and the unfinished work beside it hold.
        progress: called with (what, done, total).

    Raises:
        InputError: nothing was written: the source is in float, or the format cannot hold it, or a
            client that was named would not load it.
        ResourceError, VerificationError: as `fewbits.quantize`.
    """
    began = time.monotonic()
    out = Path(out)
    folder = resolve(source)
    check_out(out, folder)
    if format not in FORMATS:
        raise InputError(f"format {format!r} is unknown; accepted are {', '.join(FORMATS)}")
    view = open_quantized(folder)
    recipe = _recipe(view, FORMATS[format], requantize)
    plan = make_plan(survey(view), recipe, format, clients, tensor_parallel)
    plan.notes += _notes_of(view)
    with watch_memory() as memory:
        if restart:
            if not requantize:
                _check_exact(plan, view)
            throw_away(out)
        asked = {
            "fewbits": version("fewbits"),
            "request": {
                "method": "convert",
                "format": format,
                "requantize": requantize,
                "scheme": ", ".join(sorted({scheme.label for scheme in view.schemes.values()})),
            },
            "source": plain(describe_source(source, view.stored)),
            "made_with": {},
        }
        if out.exists():
            return reuse(out, asked, plan, progress)
        with Journal(out) as journal:
            steps = _Conversion(plan, recipe, None, asked, journal, None, progress)
            return finish(steps, began, memory, max_shard_bytes)


# -- a quantized checkpoint as one in float ----------------------------------------------------------


@dataclass(slots=True)
class Dequantized(Checkpoint):
    """A quantized checkpoint, seen as the one in float that its codes stand for.

    Args:
        stored: what is on disk.
        layout: of its codes.
        quantized: the matrices of which it holds codes, by the names their floats had.
        schemes: of those.
    """

    stored: Checkpoint = field(kw_only=True)
    layout: Reader = field(kw_only=True)
    quantized: dict[str, Matrix] = field(kw_only=True)
    schemes: dict[str, QuantScheme] = field(kw_only=True)

    def read(self, name: str) -> Tensor:
        """A tensor; what is quantized is multiplied out, in the dtype of the model."""
        if name not in self.quantized:
            return self.stored.read(name)
        matrix = self.quantized[name]
        pieces = [weight.dequantize(self.tensors[name].dtype) for weight in self.weights(name)]
        pieces = [piece.t() if matrix.transposed else piece for piece in pieces]
        return torch.stack(pieces) if matrix.stacked else pieces[0].contiguous()

    def weights(self, name: str) -> list[QuantizedTensor]:
        """The codes of a matrix, or of all in a stack, in the scheme that they are seen in."""
        scheme, found = self.schemes[name], read_matrix(self.stored, self.quantized[name])
        if isinstance(self.layout, GgufLayout):
            found = [weight.coarsest().regrouped(scheme.group_size) for weight in found]
        return [replace(weight, scheme=scheme) for weight in found]

    def parts(self, name: str) -> list[str]:
        """The tensors on disk that a quantized weight is made of."""
        return [part for part in self.layout.tensors(name).every if part in self.stored.tensors]

    def carried(self) -> list[str]:
        """Those of what is on disk."""
        return self.stored.carried()

    def close(self) -> None:
        """Drop the mappings."""
        self.stored.close()


def open_quantized(folder: Path) -> Dequantized:
    """See a quantized checkpoint as one in float, from its headers.

    Raises:
        InputError: it is in float, or its quantization is not read.
    """
    stored = open_model(folder)
    found = quantization_of(stored)
    if found is None:
        raise InputError(f"{folder} is in float; accepted are quantized checkpoints")
    layout, quantization = found
    network = skeleton(stored.config)
    matrices = {name: _as_in_the_model(m) for name, m in quantized_matrices(stored, network).items()}
    codes = {part for name in matrices for part in layout.tensors(name).every}
    tensors = {name: info for name, info in stored.tensors.items() if name not in codes}
    dtype = config_dtype(network) or stored.dtype
    for name, matrix in matrices.items():
        file = stored.tensors[layout.tensors(name).needed[0]].file
        tensors[name] = TensorInfo(name, dtype, matrix.shape, file)
    config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
    schemes: dict[str, QuantScheme] = {}
    for name, matrix in matrices.items():
        scheme = layout.scheme_of(quantization, name, matrix.module)
        if scheme is None:
            raise InputError(f"{folder}: {name} is quantized, but config.json gives no scheme")
        schemes[name] = scheme
    schemes = _seen(stored, layout, matrices, schemes)
    return Dequantized(
        stored.folder, config, tensors, stored.file_bytes, stored.header_bytes, stored.notes,
        stored=stored, layout=layout, quantized=matrices, schemes=schemes,
    )  # fmt: skip


def _as_in_the_model(matrix: Matrix) -> Matrix:
    """Codes are (out, in) whatever the source's orientation: here with the shape that its floats had."""
    *stack, rows, columns = matrix.shape
    return replace(matrix, shape=(*stack, columns, rows)) if matrix.transposed else matrix


def _seen(
    stored: Checkpoint,
    layout: Reader,
    matrices: dict[str, Matrix],
    schemes: dict[str, QuantScheme],
) -> dict[str, QuantScheme]:
    """The schemes as the values show them, where a format stores more than they need.

    Symmetric where every zero point of the model is in the middle. GGUF repeats the scales of larger
    groups: then the largest count that all weights of as many bits are made of.
    """
    repeats = isinstance(layout, GgufLayout)
    middle = any(not scheme.symmetric for scheme in schemes.values())
    sizes: dict[int, set[int]] = defaultdict(set)  # columns of a group, by bits
    whole: dict[int, bool] = defaultdict(lambda: True)  # are they all whole rows
    for name, matrix in matrices.items():
        if not (repeats or middle):
            return schemes
        for weight in read_matrix(stored, matrix):
            middle = middle and bool((weight.zero_point == weight.scheme.middle).all())
            size = weight.coarsest().scheme.group_size if repeats else None
            sizes[schemes[name].bits].add(size or weight.shape[1])
            whole[schemes[name].bits] &= size is None
    if middle:
        schemes = {name: replace(scheme, symmetric=True) for name, scheme in schemes.items()}
    if not repeats:
        return schemes
    return {
        name: replace(scheme, granularity="channel", group_size=None)
        if whole[scheme.bits]
        else replace(scheme, group_size=math.gcd(*sizes[scheme.bits]))
        for name, scheme in schemes.items()
    }


# -- what becomes of each weight ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given(Recipe):
    """The schemes are those of the source, or what replaces them."""

    given: Mapping[str, QuantScheme] = field(default_factory=dict)

    def assign(self, matrices: Iterable[Matrix]) -> dict[str, QuantScheme | None]:
        """By name."""
        return {matrix.source: self.given.get(matrix.source) for matrix in matrices}


def _recipe(view: Dequantized, target: Format, requantize: bool) -> Recipe:
    if not requantize:
        return _Given(given={n: s for n, s in view.schemes.items() if not _left_float(target, view, n)})
    nearest = {n: _nearest_scheme(target, m, view.schemes[n]) for n, m in view.quantized.items()}
    given = {name: scheme for name, scheme in nearest.items() if scheme is not None}

    def joined(matrix: Matrix, scheme: QuantScheme) -> _Part:
        return None if matrix.expert is None else (f"{matrix.module}.{matrix.parameter}", scheme)

    def written_alike(matrix: Matrix, scheme: QuantScheme) -> _Part:
        return target.alike(matrix.source, placement_of(matrix, scheme))

    for part_of in (joined, written_alike):  # what is one for the model, and what is for the format
        given |= _made_alike(target, view.quantized, given, part_of)
    return _Given(given=given)


def _left_float(target: Format, view: Dequantized, name: str) -> bool:
    """Embeddings have no place in most formats; theirs are multiplied out, and a note says so."""
    scheme = view.schemes[name]
    return target.refuses(placement_of(view.quantized[name], scheme), scheme) == FLOAT_EMBEDDINGS


def _nearest_scheme(target: Format, matrix: Matrix, scheme: QuantScheme) -> QuantScheme | None:
    """The scheme itself if the format holds it, else the first that loses little; None: float.

    Heads and embeddings become float where their codes have no place; of others the plan says why not.
    """
    if _holds(target, matrix, scheme):
        return scheme
    more = sorted(bits for bits in BITS if bits >= scheme.bits)
    fewer = sorted((bits for bits in BITS if bits < scheme.bits), reverse=True)
    for bits in more + fewer:
        for symmetric in (scheme.symmetric, not scheme.symmetric):
            for size in _sizes(scheme.group_size, whole_first=bits >= scheme.bits):
                other = QuantScheme(bits, "channel" if size is None else "group", size, symmetric)
                if _holds(target, matrix, other):
                    return other
    return None if matrix.head or matrix.kind == "embedding" else scheme


def _sizes(own: int | None, whole_first: bool) -> list[int | None]:
    """Of groups, the nearest first: its own, smaller, larger; whole rows, worst with fewer bits."""
    if own is None:
        return [None, *_SIZES] if whole_first else [*_SIZES, None]
    return [own, *sorted(_SIZES, key=lambda size: (size > own, abs(size - own))), None]


def _holds(target: Format, matrix: Matrix, scheme: QuantScheme) -> bool:
    fits = matrix.rows_columns[1] % (scheme.group_size or 1) == 0
    return fits and target.refuses(placement_of(matrix, scheme), scheme) is None


def _made_alike(
    target: Format,
    matrices: dict[str, Matrix],
    given: dict[str, QuantScheme],
    part_of: Callable[[Matrix, QuantScheme], _Part],
) -> dict[str, QuantScheme]:
    """New schemes of the weights of a part that are not as the rest: what most of its values have."""
    parts: dict[str, dict[Hashable, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, scheme in given.items():
        part = part_of(matrices[name], scheme)
        if part is not None:
            parts[part[0]][part[1]].append(name)
    changed: dict[str, QuantScheme] = {}
    for key, kinds in parts.items():
        kind_of = {name: kind for kind, names in kinds.items() for name in names}
        chosen = (
            None if len(kinds) == 1 else _one_scheme(target, [(matrices[n], given[n]) for n in kind_of])
        )
        if chosen is not None:  # else the format says why it refuses them
            changed |= {
                name: chosen
                for name, kind in kind_of.items()
                if part_of(matrices[name], chosen) != (key, kind)
            }
    return changed


def _one_scheme(target: Format, weights: list[tuple[Matrix, QuantScheme]]) -> QuantScheme | None:
    """The commonest by values that the format holds for all, or one with other groups; None: no such."""
    values: Counter[QuantScheme] = Counter()
    for matrix, scheme in weights:
        values[scheme] += math.prod(matrix.shape)
    for scheme, _ in values.most_common():
        if not scheme.two_level:  # nothing rounds anew to those
            for size in _sizes(scheme.group_size, whole_first=True):
                kind = "channel" if size is None else "group"
                other = QuantScheme(scheme.bits, kind, size, scheme.symmetric)  # type: ignore[arg-type]
                other = scheme if size == scheme.group_size else other
                if all(_holds(target, matrix, other) for matrix, _ in weights):
                    return other
    return None


class _Conversion(Steps):
    """Takes codes as they are, and rounds only what it must."""

    def __init__(self, plan: Plan, *more: Any) -> None:
        super().__init__(plan, *more)
        assert isinstance(plan.checkpoint, Dequantized)
        self.stored = plan.checkpoint.stored

    def _page(self) -> Page:
        return _Converted(self)


class _Converted(Page):
    """What is written of the codes of a step."""

    def __init__(self, steps: _Conversion) -> None:
        plan = steps.plan
        super().__init__(plan, steps.recipe, False, None, steps.device, steps.journal.add)
        assert isinstance(plan.checkpoint, Dequantized)
        self.view, self.stored = plan.checkpoint, plan.checkpoint.stored
        self.requantize = steps.ledger.request["requantize"]

    def _round(self, name: str, notes: list[Note]) -> list[QuantizedTensor] | None:
        if name not in self.plan.placements:
            notes += self._multiplied_out(name)
            return None
        scheme, done = self.plan.placements[name].scheme, []
        scales = self.plan.format.scales(self.plan.info(name).dtype)
        for weight in self.view.weights(name):
            exact = _exact(weight, scheme, scales.stored)
            if exact is None and not self.requantize:
                raise _inexact(self.plan, name, weight, scales)
            done.append(_rounded(name, weight, scheme, scales, notes) if exact is None else exact)
        return done

    def _multiplied_out(self, name: str) -> list[Note]:
        """A note of what that loses; none of what was in float before."""
        if name not in self.view.quantized:
            return []
        exact = torch.cat([weight.dequantize(torch.float32) for weight in self.view.weights(name)])
        error, dtype = _error(self.view.read(name), exact), self.plan.info(name).dtype
        what = (
            f"dequantized to {dtype}, since {self.plan.format.name} has no place for its codes: squared "
            f"error {error:.3g} of the squared weights"
        )
        return [Note("fallback", name, what)]

    def _enter(self, name: str, written: list[Written], codes: Codes | None, folded: bool) -> None:
        """The weight as made from its first tensor, all of them as converted."""
        stored = self.stored
        if name not in self.view.quantized:
            super()._enter(name, written, codes, folded)
            return
        parts = self.view.parts(name)
        codes_in = (part for part in parts if not stored.tensors[part].dtype.is_floating_point)
        first = name if name in parts else next(codes_in)
        info, sha256 = stored.tensors[first], hash_tensor(stored.read(first))
        origin = None if first == name else first
        made = Entry.of(info, sha256, written, codes, origin=origin)
        self.entries[name][name] = made if codes is not None else replace(made, outcome="dequantized")
        for part in parts:
            if part != name:
                entry = Entry.of(stored.tensors[part], hash_tensor(stored.read(part)), [], None)
                reason = f"its values are in what is written for {name}"
                self.entries[name][part] = replace(entry, outcome="converted", reason=reason)


def _notes_of(view: Dequantized) -> list[Note]:
    """What a result of this source will lack."""
    if view.carried() or not isinstance(view.stored, GgufCheckpoint):
        return []
    what = "not written: the source is a file alone, and has its tokenizer inside"
    return [Note("skip", "tokenizer", what)]


def _check_exact(plan: Plan, view: Dequantized) -> None:
    """Refuse before anything is thrown away what the format cannot hold exactly."""
    for name, placement in plan.placements.items():
        scales = plan.format.scales(plan.info(name).dtype)
        for weight in view.weights(name):
            if _exact(weight, placement.scheme, scales.stored) is None:
                raise _inexact(plan, name, weight, scales)


def _exact(weight: QuantizedTensor, scheme: QuantScheme, dtype: torch.dtype) -> QuantizedTensor | None:
    """The same with its scales in `dtype`; None if that, or the scheme, would round it."""
    if weight.order is not None or on_disk(weight.scheme) != on_disk(scheme):
        return None
    if weight.levels is not None:  # their scales have a dtype of their own
        return weight
    scale = weight.scale.to(dtype)
    same = torch.equal(scale.to(torch.float64), weight.scale.to(torch.float64))
    return replace(weight, scale=scale) if same else None


def _inexact(plan: Plan, name: str, weight: QuantizedTensor, scales: ScaleRange) -> InputError:
    why = f"not every scale is a number of {scales.stored}"
    if weight.order is not None:
        why = f"its groups are not of neighbouring columns, as {plan.format.name} wants them"
    return InputError(f"{plan.place(name)}: {why}; accepted is --requantize, which rounds it anew")


def _rounded(
    name: str, weight: QuantizedTensor, scheme: QuantScheme, scales: ScaleRange, notes: list[Note]
) -> QuantizedTensor:
    """On a grid that the format holds: with the same codes if those fit, and a note of the loss."""
    exact = weight.dequantize(torch.float32)
    rounded, more = _same_codes(weight, scheme, scales.stored), list[Note]()
    if rounded is None:
        rounded, more = round_held(RTN(), exact, scheme.dynamic, {}, scales.dtype, scales.least)
    error = _error(rounded.dequantize(torch.float32), exact)
    what = (
        f"requantized from {weight.scheme.label} to {rounded.scheme.label}: squared error "
        f"{error:.3g} of the squared weights"
    )
    notes += [replace(note, where=name) for note in more] + [Note("fallback", name, what)]
    return rounded


def _error(found: Tensor, exact: Tensor) -> float:
    """Squared, as a part of the squared weights."""
    return float((found.float() - exact).square().sum() / exact.square().sum())


def _same_codes(
    weight: QuantizedTensor, scheme: QuantScheme, dtype: torch.dtype
) -> QuantizedTensor | None:
    """The weight in a scheme with the same grid, its scales rounded to `dtype`; None if there is none.

    A scheme may have dropped that inputs are rounded too, which is no matter of the weight.
    """
    weight = weight.per_row()
    own, wanted = (on_disk(replace(s, inputs=None)) for s in (weight.scheme, scheme))
    plain = weight.order is None and weight.outliers is None and weight.levels is None
    scale = weight.scale.to(dtype)
    if not plain or own != wanted or not bool((torch.isfinite(scale) & (scale != 0)).all()):
        return None
    return replace(weight, scale=scale, scheme=on_disk(scheme))
