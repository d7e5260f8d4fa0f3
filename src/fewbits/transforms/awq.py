"""AWQ: give the columns that see large inputs a finer grid, by scaling them up before rounding.

Lin et al. 2023, arXiv 2306.00978, section 3.2. The scales s = mean|x|^a / mean|w|^(1-a) are those of the
authors' code, with its normalization of w by group left out: so, channels that were made larger by
any factor, and their columns smaller, get that factor back, and outliers of that kind change nothing.
1 / s goes into the norm or the linear that makes x (`wiring.ScalePair`). The exponent a is searched,
and the outcome judged, by the output of the whole block; the paper's clipping is a matter of rounding
(`methods.weighted_rtn`).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from fewbits.affine import dequantize, quantize
from fewbits.errors import InputError
from fewbits.linear import float_weight, set_float_weight
from fewbits.methods.grid import search_qparams
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note
from fewbits.wiring import ScalePair, Wiring, scale_readers, scale_source

# Relative change of a block's output that a fold may make in float32: what `wiring` accepts.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class AWQ:
    """Activation-aware scaling.

    Args:
        points: exponents tried, evenly spaced from 0 to 1; the authors' code tries 20.
    """

    points: int = 11

    def __post_init__(self) -> None:
        if self.points < 2:
            raise InputError(f"points is {self.points}; accepted are numbers from 2")

    @torch.no_grad()
    def __call__(
        self,
        block: nn.Module,
        wiring: Wiring,
        schemes: dict[str, QuantScheme],
        search: Callable[[], Tensor],
        held_out: Callable[[], Tensor],
        dtype: torch.dtype,
    ) -> list[Note]:
        """Fold scales into the block, pair by pair; see `Transform`."""
        with _means(block, wiring) as means:
            wanted = search()
        wanted_held_out = held_out()
        notes = []
        for place, alike in groupby(wiring.pairs, key=_place):
            pairs = [pair for pair in alike if set(pair.readers) & schemes.keys()]
            pairs = [pair for pair in pairs if means.seen(pair.readers)]
            if pairs:
                trial = _Trial(block, pairs, schemes, means, dtype)
                notes.append(
                    Note(
                        "fact", place, trial.fold(self.points, search, wanted, held_out, wanted_held_out)
                    )
                )
        return notes


def _place(pair: ScalePair) -> str:
    """What the pairs of all experts of a mixture have in common; they share an exponent."""
    source, reader = (re.sub(r"\.\d+$", ".*", path) for path in (pair.source, pair.readers[0]))
    return f"{source} -> {reader}"


@dataclass(slots=True)
class _Means:
    """Mean |x| over all tokens for every reader that was called."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def seen(self, readers: tuple[str, ...]) -> bool:
        return any(reader in self.sums for reader in readers)

    def of(self, readers: tuple[str, ...]) -> Tensor:
        """Of the tensor that these readers read; of experts, over the tokens routed to any."""
        called = [reader for reader in readers if reader in self.sums]
        return sum(self.sums[r] for r in called) / sum(self.tokens[r] for r in called)  # type: ignore[return-value]


@contextmanager
def _means(block: nn.Module, wiring: Wiring) -> Iterator[_Means]:
    means = _Means()

    def watch(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).abs()
            means.sums[path] = means.sums.get(path, 0) + x.sum(0)
            means.tokens[path] = means.tokens.get(path, 0) + len(x)

        return record

    readers = {reader for pair in wiring.pairs for reader in pair.readers}
    handles = [block.get_submodule(r).register_forward_pre_hook(watch(r)) for r in readers]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _Trial:
    """Some pairs of a block that are searched, judged and folded together."""

    block: nn.Module
    pairs: list[ScalePair]
    schemes: dict[str, QuantScheme]
    means: _Means
    dtype: torch.dtype

    def fold(
        self,
        points: int,
        search: Callable[[], Tensor],
        wanted: Tensor,
        held_out: Callable[[], Tensor],
        wanted_held_out: Tensor,
    ) -> str:
        """Fold the best scales if they help on the held-out samples; what came of it, in words."""
        none = [torch.ones(pair.rows.count) for pair in self.pairs]
        found = {
            exponent: self._error(self._scales(exponent), search, wanted)
            for exponent in torch.linspace(0, 1, points).tolist()
        }
        best = min(found, key=lambda exponent: found[exponent])
        scales = self._scales(best)
        before = self._error(none, held_out, wanted_held_out)
        after = self._error(scales, held_out, wanted_held_out)
        change = f"held-out error {before:.3g} -> {after:.3g}"
        if not after < before:
            return f"not folded: exponent {best:.2g}, {change}"
        with self._undoable(sources=True) as undo:
            for pair, s in zip(self.pairs, scales, strict=True):
                scale_readers(self.block, pair, _fold_source(self.block, pair, s, self.dtype))
            moved = _relative(held_out(), wanted_held_out)
            limit = max(_TOLERANCE, 2 * torch.finfo(self.dtype).eps)
            if not moved <= limit:
                undo()
                return f"not folded: the float block would change by {moved:.3g}, over {limit:.3g}"
        return f"folded with exponent {best:.2g}, {change}; the float block changed by {moved:.2g}"

    def _scales(self, exponent: float) -> list[Tensor]:
        return [self._scale(pair, exponent) for pair in self.pairs]

    def _scale(self, pair: ScalePair, exponent: float) -> Tensor:
        x = (
            self.means.of(pair.readers)
            if self.means.seen(pair.readers)
            else torch.zeros(pair.rows.count)
        )
        rounded = [reader for reader in pair.readers if reader in self.schemes]
        weights = [float_weight(self.block.get_submodule(reader)) for reader in rounded]
        w = torch.stack([weight.abs().sum(0) for weight in weights]).sum(0)
        log = exponent * x.double().log2() - (1 - exponent) * w.double().log2()
        usable = torch.isfinite(log)
        if not bool(usable.any()):
            return torch.ones(pair.rows.count)
        # Around 1, by a power of two: so a factor common to all channels changes no mantissa.
        log = torch.where(usable, log - log[usable].mean().round(), 0.0)
        exact = len(rounded) < len(pair.readers)  # the others stay in float: no bit of theirs is lost
        return torch.exp2(log.round() if exact else log).float()

    def _error(self, scales: list[Tensor], run: Callable[[], Tensor], wanted: Tensor) -> float:
        """Mean squared error of the block's output with its readers scaled, rounded, scaled back."""
        with self._undoable() as undo:
            for pair, s in zip(self.pairs, scales, strict=True):
                importance = (self.means.of(pair.readers) / s).square()
                for reader in self.schemes.keys() & set(pair.readers):
                    module, scheme = self.block.get_submodule(reader), self.schemes[reader]
                    weight = float_weight(module) * s
                    scale, zero_point = search_qparams(weight, scheme, importance, self.dtype)
                    codes = quantize(weight, scale, zero_point, scheme)
                    rounded = dequantize(codes, scale, zero_point, scheme)
                    set_float_weight(module, rounded.div_(s))
            error = float((run() - wanted).square().mean())
            undo()
        return error

    @contextmanager
    def _undoable(self, sources: bool = False) -> Iterator[Callable[[], None]]:
        """Put aside the parameters that these pairs touch, with a way to have them back."""
        paths = [reader for pair in self.pairs for reader in pair.readers]
        paths += [pair.source for pair in self.pairs] if sources else []
        paths += [path.rsplit(".", 2)[0] for path in paths if path.count(".") > 1] if sources else []
        modules = [self.block.get_submodule(path) for path in dict.fromkeys(paths)]
        saved = [(p, p.data) for module in modules for p in module.parameters(recurse=False)]
        if sources:
            for parameter, data in saved:
                parameter.data = data.clone()

        def undo() -> None:
            for parameter, data in saved:
                parameter.data = data

        try:
            yield undo
        except BaseException:
            undo()
            raise


def _fold_source(block: nn.Module, pair: ScalePair, s: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide the source by s, as its dtype on disk can hold it; the s that this really is."""
    source = block.get_submodule(pair.source)
    if pair.form == "linear":  # rounded later, or so large that rounding its rows averages out
        scale_source(block, pair, s)
        return s
    own = pair.rows.of(source.weight.data)  # type: ignore[arg-type]
    one = 1.0 if pair.form == "one_plus_weight" else 0.0
    before = one + own
    after = one + ((before / s) - one).to(dtype).float()
    usable = (before != 0) & (after != 0) & torch.isfinite(after)
    exact = torch.where(usable, before / after, torch.ones_like(s))
    scale_source(block, pair, exact)
    own.copy_(own.to(dtype))
    return exact


def _relative(result: Tensor, wanted: Tensor) -> float:
    return float((result - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
