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
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.affine import dequantize, quantize
from fewbits.errors import InputError
from fewbits.linear import float_weight, set_float_weight
from fewbits.methods.grid import search_qparams
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note
from fewbits.wiring import ScalePair, Wiring, scale_readers, scale_source

# Squared change of the float block's output by a fold, of the squared error of rounding it. The output
# itself is no yardstick: a large residual stream would hide everything. Not tuned.
_TOLERANCE = 0.01


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
    ) -> tuple[list[Note], dict[str, Tensor]]:
        """Fold scales into the block, pair by pair; see `Transform`."""
        with _means(block, wiring) as means:
            search_for = _Judge(search, search())
        judged_by = _Judge(held_out, held_out())
        notes: list[Note] = []
        folds: dict[str, Tensor] = {}
        for place, alike in groupby(wiring.pairs, key=_place):
            pairs = [p for p in alike if set(p.readers) & schemes.keys() and means.seen(p.readers)]
            if pairs:
                trial = _Trial(block, pairs, schemes, means, dtype)
                notes.append(Note("fact", place, trial.fold(self.points, search_for, judged_by)))
                folds |= trial.folds
        return notes, folds


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


@dataclass(frozen=True, slots=True)
class _Judge:
    """Runs the block on some samples, and knows what the float block made of them."""

    run: Callable[[], Tensor]
    wanted: Tensor

    def error(self) -> float:
        """Mean squared error of the block's output as it stands."""
        return float((self.run() - self.wanted).square().mean())


@dataclass(slots=True)
class _Trial:
    """Some pairs of a block that are searched, judged and folded together.

    `folds` says, of what was folded, by how much the columns of each reader were multiplied.
    """

    block: nn.Module
    pairs: list[ScalePair]
    schemes: dict[str, QuantScheme]
    means: _Means
    dtype: torch.dtype
    folds: dict[str, Tensor] = field(default_factory=dict)

    def fold(self, points: int, search: _Judge, held_out: _Judge) -> str:
        """Fold the best scales if they help on the held-out samples; what came of it, in words."""
        exponents = torch.linspace(0, 1, points).tolist()
        errors = [self._error(self._scales(exponent), search) for exponent in exponents]
        best = exponents[errors.index(min(errors))]
        scales = self._scales(best)
        before = self._error([torch.ones_like(s) for s in scales], held_out)
        after = self._error(scales, held_out)
        outcome = f"exponent {best:.2g}, held-out error {before:.3g} -> {after:.3g}"
        if not after < before:
            return f"not folded: {outcome}"
        originals = self._own_copies()
        folds: dict[str, Tensor] = {}
        for pair, s in zip(self.pairs, scales, strict=True):
            exact = _fold_source(self.block, pair, s, self.dtype)
            scale_readers(self.block, pair, exact)
            folds |= dict.fromkeys(pair.readers, exact)
        moved, limit = held_out.error(), _TOLERANCE * after
        if not moved <= limit:
            _put_back(originals)
            return (
                f"not folded: the float block would change by {moved:.3g}, over {limit:.3g}; {outcome}"
            )
        self.folds = folds
        return f"folded: {outcome}; that of the float block {moved:.2g}"

    def _scales(self, exponent: float) -> list[Tensor]:
        return [self._scale(pair, exponent) for pair in self.pairs]

    def _scale(self, pair: ScalePair, exponent: float) -> Tensor:
        x, readers = self.means.of(pair.readers), self._rounded(pair)
        weights = [float_weight(self.block.get_submodule(reader)) for reader in readers]
        w = torch.stack([weight.abs().sum(0) for weight in weights]).sum(0)
        log = exponent * x.double().log2() - (1 - exponent) * w.double().log2()
        usable = torch.isfinite(log)  # neither inputs nor weights that are all zero
        if not bool(usable.any()):
            return torch.ones_like(x)
        # Around 1, by a power of two: so a factor common to all channels changes no mantissa.
        log = torch.where(usable, log - log[usable].mean().round(), 0.0)
        exact = len(readers) < len(pair.readers)  # the others stay in float: no bit of theirs is lost
        return torch.exp2(log.round() if exact else log).float()

    def _rounded(self, pair: ScalePair) -> list[str]:
        return [reader for reader in pair.readers if reader in self.schemes]

    def _error(self, scales: list[Tensor], judge: _Judge) -> float:
        """Of the block's output with its readers scaled, rounded as they will be, and scaled back."""
        readers = [self.block.get_submodule(r) for pair in self.pairs for r in self._rounded(pair)]
        originals: list[tuple[Any, Tensor]] = [(m.weight, m.weight.data) for m in readers]  # type: ignore[misc]
        for pair, s in zip(self.pairs, scales, strict=True):
            importance = (self.means.of(pair.readers) / s).square()
            for reader in self._rounded(pair):
                module = self.block.get_submodule(reader)
                # Chains of a trellis take long to be found, and lose where plain codes do.
                scheme = replace(self.schemes[reader], trellis=False)
                weight = float_weight(module) * s
                scale, zero_point = search_qparams(weight, scheme, importance, self.dtype)
                codes = quantize(weight, scale, zero_point, scheme)
                set_float_weight(module, dequantize(codes, scale, zero_point, scheme).div_(s))
        error = judge.error()
        _put_back(originals)
        return error

    def _own_copies(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Let all parameters that a fold touches be copies; what they were."""
        paths = {path for pair in self.pairs for path in (pair.source, *pair.readers)}
        paths |= {path.rsplit(".", 2)[0] for path in paths if path.count(".") > 1}  # biases of experts
        modules = [self.block.get_submodule(path) for path in paths]
        originals = [(p, p.data) for module in modules for p in module.parameters(recurse=False)]
        for parameter, data in originals:
            parameter.data = data.clone()
        return originals


def _put_back(originals: list[tuple[Any, Tensor]]) -> None:
    for parameter, data in originals:
        parameter.data = data


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
