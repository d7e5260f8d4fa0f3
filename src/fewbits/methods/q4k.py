"""Q4_K's own rounding: 4 bits in groups of 32, scales of 6 bits, and what 256 columns share of those.

In a part of 32 columns `w = d * s * q - dmin * m`, with s and m from 0 to 63, and d and dmin in float16
for a block of eight parts. How they are found: each part's best scale and least value from a row of
candidate ranges, each followed by a least-squares fit; then, for given d and dmin, the best of nine
neighbouring pairs of (s, m) of each part; then d and dmin by least squares over the block; the last two
a few times, keeping the best. Errors are weighted by what the inputs of a column have in them, if that
is given.

Beside llama.cpp's quantizer (llama-cpp-python 0.3.36) the error is 0.97 to 0.99 times as large on random
weights and 0.98 on the reference model's; with importance 0.94 to 0.99, and 0.96 (2026-11-26).
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fewbits.errors import InputError
from fewbits.scheme import LEVELS, QuantScheme
from fewbits.tensor import Levels, Note, QuantizedTensor, is_finite, quantize_tensor

_PART = 32
_PARTS = LEVELS // _PART
_MOST, _LEVELS = 63, 15
_SLICE = 2**20  # weights rounded at a time; not tuned
# Widths of the range that a part is first rounded on, in steps: 15 is from its least to its largest
# value. Below that it clips. Not tuned beyond random normal weights, 2026-11-26.
_WIDTHS = tuple(15 + 0.3 * i for i in range(-3, 13))
_ROUNDS = 4  # of neighbours and least squares; the fifth gains less than 1e-4 of the error


@dataclass(frozen=True, slots=True)
class Q4K:
    """Rounds to two levels of scales; to a scheme with one level, as `RTN`.

    Args:
        rounds: how often neighbours are tried, and d and dmin fitted.
        weighted: squared errors of a column count by the mean of its squared inputs, from calibration;
            else all alike.

    >>> weight = torch.linspace(-1, 1, 256)[None]
    >>> rounded, _ = Q4K()(weight, QuantScheme.parse("w4-g32-asym-k"), {})
    >>> bool((rounded.dequantize() - weight).abs().max() <= 1 / 30)  # half a step of 1 / 15
    True
    """

    rounds: int = _ROUNDS
    weighted: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian of the inputs, of which the diagonal is used, if it is weighted."""
        return frozenset({"hessian"} if self.weighted else ())

    def __call__(
        self,
        weight: Tensor,
        scheme: QuantScheme,
        stats: dict[str, Tensor],
        scale_dtype: torch.dtype | None = None,
    ) -> tuple[QuantizedTensor, list[Note]]:
        """Codes for `weight` (out, in); scales are in float32, which holds them exactly.

        Args:
            weight: in a multiple of 256 columns.
            stats: "hessian", the mean of x.T @ x, (in, in), if it is weighted.

        Raises:
            InputError: the shape does not fit, or values are not finite or beyond float16.
        """
        if not scheme.two_level:
            return quantize_tensor(weight, scheme, scale_dtype), []
        columns = weight.shape[1]
        counts = stats["hessian"].diagonal().float() if self.weighted else torch.ones(columns)
        if bool(torch.isfinite(counts).all()):
            return self._round(weight.detach(), scheme, counts), []
        note = Note("fallback", "", "the Hessian is not finite: all columns count alike")
        return self._round(weight.detach(), scheme, torch.ones(columns)), [note]

    def _round(self, weight: Tensor, scheme: QuantScheme, counts: Tensor) -> QuantizedTensor:
        rows, columns = weight.shape
        scheme.groups(columns)  # may refuse
        if not is_finite(weight):
            raise InputError("the weight contains NaN or infinity; accepted are finite weights")
        # A column that no input has still gets its nearest code: it may not go anywhere.
        counts = counts + counts.mean() * 1e-6 + torch.finfo(torch.float32).tiny
        counts = (counts / counts.mean()).reshape(-1, _PARTS, _PART)
        step = max(1, _SLICE // columns)
        parts = [
            self._blocks(weight[i : i + step].float().reshape(-1, _PARTS, _PART), counts)
            for i in range(0, rows, step)
        ]
        codes, counted, steps = (torch.cat(some) for some in zip(*parts, strict=True))
        levels = Levels(steps.reshape(rows, -1, 2), counted.reshape(rows, -1, 2))
        scale = levels.scale
        points = torch.zeros(scale.shape, dtype=torch.uint8)
        return QuantizedTensor(codes.reshape(rows, columns), scale, points, scheme, levels=levels)

    def _blocks(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, 8, 32) weights -> their codes, (n, 8, 2) s and m, and (n, 2) d and dmin."""
        counts = counts.repeat(len(x) // len(counts), 1, 1)
        scale, least = _fit_parts(x, counts)
        d, dmin = (_halves(v.amax(1) / _MOST) for v in (scale, least))
        best = _neighbours(x, counts, d, dmin, _near(scale, d), _near(least, dmin))
        for _ in range(self.rounds):
            d, dmin = _fit_blocks(x, counts, best)
            found = _neighbours(x, counts, d, dmin, _near(scale, d), _near(least, dmin))
            again = _neighbours(x, counts, d, dmin, best.s, best.m)
            best = best.or_better(found).or_better(again)
        steps = torch.stack([best.d, best.dmin], -1).to(torch.float16)
        return best.q.to(torch.uint8), torch.stack([best.s, best.m], -1).to(torch.uint8), steps


@dataclass(slots=True)
class _Rounded:
    """n blocks: d, dmin (n,); s, m (n, 8); q (n, 8, 32), all float32; error (n,)."""

    d: Tensor
    dmin: Tensor
    s: Tensor
    m: Tensor
    q: Tensor
    error: Tensor

    def or_better(self, other: "_Rounded") -> "_Rounded":
        """Block by block the one with the smaller error."""
        better = other.error < self.error
        fields = ("d", "dmin", "s", "m", "q", "error")
        chosen = {}
        for name in fields:
            mine, its = getattr(self, name), getattr(other, name)
            chosen[name] = torch.where(better.reshape(-1, *[1] * (mine.ndim - 1)), its, mine)
        return _Rounded(**chosen)


def _fit_parts(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and least value (n, 8) of each part, not yet on any grid; the least is given from 0."""
    low, high = x.amin(2).clamp(max=0), x.amax(2)
    span = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    best = torch.full_like(low, torch.inf)
    scale, least = torch.zeros_like(low), torch.zeros_like(low)
    for width in _WIDTHS:
        step = span / width
        q = ((x - low[..., None]) / step[..., None]).round_().clamp_(0, _LEVELS)
        s, m = _least_squares(x, counts, q)
        error = (counts * (s[..., None] * q - m[..., None] - x).square()).sum(2)
        better = (error < best) & (s > 0)
        best = torch.where(better, error, best)
        scale, least = torch.where(better, s, scale), torch.where(better, m, least)
    return scale, least


def _least_squares(x: Tensor, counts: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """What minimizes `counts * (s * q - m - x)**2` over the last axis, with m from 0."""
    n, nq, nqq = counts.sum(2), (counts * q).sum(2), (counts * q * q).sum(2)
    nx, nqx = (counts * x).sum(2), (counts * q * x).sum(2)
    det = n * nqq - nq * nq
    s, m = (n * nqx - nq * nx) / det, (nq * nqx - nqq * nx) / det
    alone = nqx / nqq
    use = (det > 0) & (m >= 0)
    return torch.where(use, s, alone).nan_to_num(0), torch.where(use, m, 0)


def _fit_blocks(x: Tensor, counts: Tensor, now: _Rounded) -> tuple[Tensor, Tensor]:
    """d and dmin (n,) by least squares over each block, in float16; as they were if there is no fit."""
    a, b = now.s[..., None] * now.q, now.m[..., None].expand_as(now.q)
    aa, ab, bb = ((counts * u * v).sum((1, 2)) for u, v in ((a, a), (a, b), (b, b)))
    ax, bx = ((counts * u * x).sum((1, 2)) for u in (a, b))
    det = aa * bb - ab * ab
    d, dmin = (bb * ax - ab * bx) / det, (ab * ax - aa * bx) / det
    alone = ax / aa
    both = (det > 1e-6 * aa * bb) & (dmin >= 0) & (d > 0)
    d = torch.where(both, d, torch.where((bb == 0) & (alone > 0), alone, now.d))
    dmin = torch.where(both, dmin, now.dmin)
    d, dmin = (torch.where(v.isfinite(), v, 0) for v in (d, dmin))
    return _halves(d), _halves(dmin)


def _neighbours(x: Tensor, counts: Tensor, d: Tensor, dmin: Tensor, s: Tensor, m: Tensor) -> _Rounded:
    """For given d and dmin the best codes, part by part: with s and m, or one more or less of each."""
    best = torch.full_like(s, torch.inf)
    chosen_s, chosen_m = s, m
    codes = torch.zeros_like(x)
    for more_s, more_m in product((0, -1, 1), repeat=2):
        one, other = (s + more_s).clamp(0, _MOST), (m + more_m).clamp(0, _MOST)
        scale, least = (d[:, None] * one)[..., None], (dmin[:, None] * other)[..., None]
        q = ((x + least) / scale).nan_to_num(0, _LEVELS, 0).round_().clamp_(0, _LEVELS)
        error = (counts * (scale * q - least - x).square()).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        chosen_s, chosen_m = torch.where(better, one, chosen_s), torch.where(better, other, chosen_m)
        codes = torch.where(better[..., None], q, codes)
    return _Rounded(d, dmin, chosen_s, chosen_m, codes, best.sum(1))


def _near(values: Tensor, step: Tensor) -> Tensor:
    """The nearest multiples of the steps, from 0 to 63."""
    return (values / step[:, None]).nan_to_num(0, 0, 0).round().clamp(0, _MOST)


def _halves(values: Tensor) -> Tensor:
    """What float16 makes of them, in float32."""
    halves = values.to(torch.float16)
    if not bool(torch.isfinite(halves).all()):
        raise InputError("a weight's scale is beyond float16, which Q4_K has for it")
    return halves.float()
