"""convert(): a quantized checkpoint in another format, its integers as they are."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain
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
from fewbits.formats import FORMATS, Format, GgufLayout, Placement, ScaleRange
from fewbits.formats.packed import on_disk
from fewbits.journal import Journal
from fewbits.ledger import Codes, Entry, plain
from fewbits.load import config_dtype, open_model, quantization_of, quantized_matrices, read_matrix
from fewbits.memory import watch_memory
from fewbits.methods import RTN, round_held
from fewbits.pipeline import Quantized, check_out, describe_source, finish, reuse, throw_away
from fewbits.plan import Plan, make_plan, survey
from fewbits.recipe import Recipe
from fewbits.scheme import BITS, QuantScheme
from fewbits.steps import Steps
from fewbits.structure import Matrix, skeleton
from fewbits.tensor import Note, QuantizedTensor
from fewbits.verify import Progress


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: str,
    requantize: bool = False,
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
        max_shard_bytes: of a weight file.
        restart: throw away what `out` and the unfinished work beside it hold.
        progress: called with (what, done, total).

    Raises:
        InputError: nothing was written: the source is in float, or the format cannot hold it.
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
    plan = make_plan(survey(view), recipe, format)
    with watch_memory() as memory:
        if restart:
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
        quantized: the matrices of which it holds codes, by the names their floats had.
        schemes: of those.
    """

    stored: Checkpoint = field(kw_only=True)
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
        if isinstance(_layout(self.stored), GgufLayout):
            size = scheme.group_size
            found = [w.coarsest() if size is None else w.coarsest().regrouped(size) for w in found]
        return [replace(weight, scheme=scheme) for weight in found]

    def parts(self, name: str) -> list[str]:
        """The tensors on disk that a quantized weight is made of."""
        layout = _layout(self.stored)
        return [part for part in chain(*layout.tensors(name)) if part in self.stored.tensors]

    def close(self) -> None:
        """Drop the mappings."""
        self.stored.close()


def open_quantized(folder: Path) -> Dequantized:
    """See a quantized checkpoint as one in float, from its headers.

    Raises:
        InputError: it is in float, or its quantization is not read.
    """
    stored = open_model(folder)
    if quantization_of(stored) is None:
        raise InputError(f"{folder} is in float; accepted are quantized checkpoints")
    network = skeleton(stored.config)
    matrices = quantized_matrices(stored, network)
    layout = _layout(stored)
    codes = {part for name in matrices for part in chain(*layout.tensors(name))}
    tensors = {name: info for name, info in stored.tensors.items() if name not in codes}
    dtype = config_dtype(network) or stored.dtype
    for name, matrix in matrices.items():
        file = stored.tensors[layout.tensors(name).needed[0]].file
        rows, columns = matrix.rows_columns
        last = (columns, rows) if matrix.transposed else (rows, columns)
        tensors[name] = TensorInfo(name, dtype, (*matrix.shape[:-2], *last), file)
    config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
    return Dequantized(
        stored.folder, config, tensors, stored.file_bytes, stored.header_bytes, stored.notes,
        stored=stored, quantized=matrices, schemes=_schemes(stored, matrices),
    )  # fmt: skip


def _layout(stored: Checkpoint) -> Format:
    found = quantization_of(stored)
    assert found is not None
    return found[0]


def _schemes(stored: Checkpoint, matrices: dict[str, Matrix]) -> dict[str, QuantScheme]:
    """As config.json says; symmetric where every zero point of the model is in the middle.

    GGUF repeats the scales of larger groups: then the largest that all weights are made of count.
    """
    found = quantization_of(stored)
    assert found is not None
    layout, quantization = found
    schemes: dict[str, QuantScheme] = {}
    for name, matrix in matrices.items():
        scheme = layout.scheme_of(quantization, name, matrix.module)
        if scheme is None:
            raise InputError(f"{stored.folder}: {name} is quantized, but config.json gives no scheme")
        schemes[name] = scheme
    if any(not scheme.symmetric for scheme in schemes.values()) and _all_in_middle(stored, matrices):
        schemes = {name: replace(scheme, symmetric=True) for name, scheme in schemes.items()}
    return _unrepeated(stored, matrices, schemes) if isinstance(layout, GgufLayout) else schemes


def _unrepeated(
    stored: Checkpoint, matrices: dict[str, Matrix], schemes: dict[str, QuantScheme]
) -> dict[str, QuantScheme]:
    sizes: dict[int, set[int | None]] = defaultdict(set)  # by bits
    for name, matrix in matrices.items():
        for weight in read_matrix(stored, matrix):
            sizes[schemes[name].bits].add(weight.coarsest().scheme.group_size)
    found = {}
    for name, scheme in schemes.items():
        own, columns = sizes[scheme.bits], matrices[name].rows_columns[1]
        size = None if own == {None} else math.gcd(*(n or columns for n in own))
        found[name] = (
            replace(scheme, granularity="channel", group_size=None)
            if size is None
            else replace(scheme, group_size=size)
        )
    return found


def _all_in_middle(stored: Checkpoint, matrices: dict[str, Matrix]) -> bool:
    """Some formats store the zero points of symmetric weights too."""
    for matrix in matrices.values():
        for weight in read_matrix(stored, matrix):
            if bool((weight.zero_point != weight.scheme.middle).any()):
                return False
    return True


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
        return _Given(given=view.schemes)
    found: dict[Any, QuantScheme] = {}
    for name, matrix in view.quantized.items():
        key = (view.schemes[name], matrix.rows_columns, matrix.kind, matrix.stacked, matrix.transposed)
        if key not in found:
            found[key] = _nearest_scheme(target, matrix, view.schemes[name])
    given = {
        n: found[view.schemes[n], m.rows_columns, m.kind, m.stacked, m.transposed]
        for n, m in view.quantized.items()
    }
    return _Given(given=given)


def _nearest_scheme(target: Format, matrix: Matrix, scheme: QuantScheme) -> QuantScheme:
    """The scheme itself if the format holds it, else the first that loses little."""
    if scheme.two_level:
        if target.refuses(_placement(matrix, scheme), scheme) is None:
            return scheme
        scheme = replace(scheme, two_level=False)
    columns = matrix.rows_columns[1]
    sizes = [scheme.group_size, *(size for size in (128, 64, 32) if columns % size == 0), None]
    more = sorted(bits for bits in BITS if bits >= scheme.bits)
    fewer = sorted((bits for bits in BITS if bits < scheme.bits), reverse=True)
    for bits in more + fewer:
        for symmetric in (scheme.symmetric, not scheme.symmetric):
            for size in sizes:
                granularity = "channel" if size is None else "group"
                other = QuantScheme(bits, granularity, size, symmetric)  # type: ignore[arg-type]
                kept = scheme if other == on_disk(replace(scheme, inputs=None)) else other
                if target.refuses(_placement(matrix, kept), kept) is None:
                    return kept
    return scheme  # the plan says why not


def _placement(matrix: Matrix, scheme: QuantScheme) -> Placement:
    return Placement(
        matrix.module, scheme, matrix.kind == "expert", matrix.stacked, matrix.transposed,
        matrix.own_forward, matrix.rows_columns,
    )  # fmt: skip


class _Conversion(Steps):
    """Takes codes as they are, and rounds only what it must."""

    def __init__(self, plan: Plan, *more: Any) -> None:
        super().__init__(plan, *more)
        assert isinstance(plan.checkpoint, Dequantized)
        self.view = plan.checkpoint

    def _round(self, name: str, notes: list[Note]) -> list[QuantizedTensor] | None:
        if name not in self.plan.placements:
            return None
        target, scheme = self.plan.format, self.plan.placements[name].scheme
        scales = target.scales(self.plan.info(name).dtype)
        done = []
        for weight in self.view.weights(name):
            same = on_disk(weight.scheme) == on_disk(scheme)
            exact = _in_dtype(weight, scales.stored) if same else None
            if exact is not None and weight.order is None:
                done.append(exact)
                continue
            if not self.ledger.request["requantize"]:
                why = f"not every scale is a number of {scales.stored}"
                if weight.order is not None:
                    why = f"its groups are not of neighbouring columns, as {target.name} wants them"
                raise InputError(
                    f"{self.plan.place(name)}: {why}; accepted is --requantize, which rounds it anew"
                )
            done.append(_rounded(name, weight, scheme, scales, notes))
        return done

    def _enter(self, name: str, written: list[Written], codes: Codes | None, folded: bool) -> None:
        """The weight as made from its first tensor, all of them as converted."""
        view, stored = self.view, self.view.stored
        if codes is None:
            super()._enter(name, written, codes, folded)
            return
        parts = view.parts(name)
        first = name if name in parts else parts[0]
        info, sha256 = stored.tensors[first], hash_tensor(stored.read(first))
        origin = None if first == name else first
        self._entered[name] = Entry.of(info, sha256, written, codes, origin=origin)
        for part in parts:
            if part != name:
                entry = Entry.of(stored.tensors[part], hash_tensor(stored.read(part)), [], None)
                reason = f"its values are in what is written for {name}"
                self._entered[part] = replace(entry, outcome="converted", reason=reason)

    def _check_source(self) -> None:
        for name, entry in self.ledger.tensors.items():
            tensor = self.view.stored.read(entry.origin or name)
            if hash_tensor(tensor) != entry.sha256:
                raise InputError(
                    f"{self.view.folder} was changed since the run began: {name} has other values; "
                    "accepted are the same weights, or --restart"
                )


def _in_dtype(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor | None:
    """The same with its scales in `dtype`; None if that would round them. Two levels have their own."""
    if weight.levels is not None:
        return weight
    scale = weight.scale.to(dtype)
    same = torch.equal(scale.to(torch.float64), weight.scale.to(torch.float64))
    return replace(weight, scale=scale) if same else None


def _rounded(
    name: str, weight: QuantizedTensor, scheme: QuantScheme, scales: ScaleRange, notes: list[Note]
) -> QuantizedTensor:
    exact = weight.dequantize(torch.float32)
    rounded, more = round_held(RTN(), exact, scheme.dynamic, {}, scales.dtype, scales.least)
    error = (rounded.dequantize(torch.float32) - exact).square().sum() / exact.square().sum()
    what = (
        f"requantized from {weight.scheme.label} to {rounded.scheme.label}: squared error "
        f"{float(error):.3g} of the squared weights"
    )
    notes += [replace(note, where=name) for note in more] + [Note("fallback", name, what)]
    return rounded
