"""Learned rounding: which way to round, and how much to clip, found for a whole block by gradients.

Cheng et al. 2023 (SignRound), arXiv 2309.05516: each weight w of a group with step s gets an offset v,
each group a factor a of its step, and both follow the sign of their gradients through

    code = clamp(round(w / (a s) + v) + zero point),    weight = a s (code - zero point)

where rounding counts as the identity. Beyond the paper, each measured in LOG.md: the search starts from
the codes of another method; errors of the block's output may be weighed by what they cost in the end;
and what is kept is judged on samples that nothing was learned from, the first codes among them. Codes of
a trellis stay: a step of one would be one of several weights; their scales are learned alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewbits import trellis
from fewbits.affine import parts_of
from fewbits.errors import InputError
from fewbits.tensor import QuantizedTensor

_INSIDE = 0.2  # of a step: how far inside of its code a weight begins that another method put there
_LEAST_FACTOR, _MOST_FACTOR = 0.5, 1.2  # of a group's step; not tuned
_JUDGED = 10  # times, at most, that held-out samples are asked; not tuned
# Half way, times the error at first, with which the search ends. Errors grow at first, as many weights
# turn at once: where something came of it to 1.2 times, elsewhere to 1.6 and more (babyllama105,
# 2026-11-26).
_HOPELESS = 1.4


@dataclass(slots=True)
class Rounding:
    """A matrix whose rounding is learned: of this class the scales, where codes are those of a trellis.

    Args:
        weight: (out, in), in float.
        first: the codes to begin with; neither outliers, nor an order, nor two levels of scales.
        least: of the scales that the format holds.
        factors: (out, groups), of the scales.
    """

    weight: Tensor
    first: QuantizedTensor
    least: float
    factors: Tensor
    _best: QuantizedTensor = field(repr=False)

    @classmethod
    def of(cls, weight: Tensor, first: QuantizedTensor, least: float = 0.0) -> "Rounding":
        """Nothing is learned yet: the codes are those given.

        Args:
            weight: (out, in), which is written to.
            first: its codes.
            least: of the scales that the format holds.
        """
        factors = torch.ones(first.scale.shape, dtype=weight.dtype, device=weight.device)
        if first.scheme.trellis:
            return Rounding(weight, first, least, factors, first)
        offsets = torch.zeros_like(parts_of(weight, first.scheme))
        rounding = _Codes(weight, first, least, factors, first, offsets)
        rounding.move_inside()
        return rounding

    @property
    def scale(self) -> Tensor:
        """(out, groups), as the disk holds it."""
        first = self.first.scale
        scale = (first.to(self.factors.dtype) * self.factors).to(first.dtype)
        usable = torch.isfinite(scale) & (scale >= self.least) & (scale > 0)
        return torch.where(usable, scale, first)

    def weights(self) -> Tensor:
        """What the codes stand for, (out, in)."""
        values = self._values()
        return (values * self.scale.to(values.dtype)[..., None]).reshape(self.weight.shape)

    def quantized(self) -> QuantizedTensor:
        """The codes."""
        return replace(self.first, scale=self.scale)

    def step(self, gradient: Tensor, rate: float) -> None:
        """Go against the signs of the gradient of `weights()`, (out, in), each factor by `rate`."""
        values = self._values()
        parts = parts_of(gradient.to(values.dtype), self.first.scheme)
        self._step_factors((parts * values).sum(-1), rate)

    def keep(self) -> None:
        """What there is now is the best so far."""
        self._best = self.quantized()

    @property
    def best(self) -> QuantizedTensor:
        """The last that was kept; at first what it began with."""
        return self._best

    def _values(self) -> Tensor:
        """The multiples of the scale that weights are rounded to, (out, groups, columns)."""
        codes = trellis.values(self.first.codes, self.first.scheme.bits)
        return parts_of(codes, self.first.scheme).to(self.weight.dtype)

    def _step_factors(self, of_scale: Tensor, rate: float) -> None:
        of_factors = of_scale * self.first.scale.to(of_scale.dtype)
        self.factors.sub_(of_factors.sign_(), alpha=rate).clamp_(_LEAST_FACTOR, _MOST_FACTOR)


@dataclass(slots=True)
class _Codes(Rounding):
    """Codes that stand for themselves are learned as well.

    Args:
        weight: where another method left what is nearest, moved inside of the code.
        offsets: (out, groups, columns), added before rounding, in steps: at most half of one.
    """

    offsets: Tensor

    def move_inside(self) -> None:
        """Put weights where what is nearest are the codes that are given."""
        first, weight = self.first, self.weight
        scale, steps, nearest = self._place()
        given = parts_of(first.codes, first.scheme) - first.zero_point.to(weight.dtype)[..., None]
        far = given - steps
        moved = (given - far.sign() * (0.5 - _INSIDE)) * scale
        parts = torch.where(nearest == given, parts_of(weight, first.scheme), moved)
        weight.copy_(parts.reshape(weight.shape))

    def quantized(self) -> QuantizedTensor:
        """The codes."""
        _, _, rounded = self._place()
        codes = (rounded + self.first.zero_point.to(rounded.dtype)[..., None]).to(torch.uint8)
        return replace(self.first, codes=codes.reshape(self.weight.shape), scale=self.scale)

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of offsets and scales, from that of `weights()`, (out, in)."""
        scale, steps, rounded = self._place()
        inside = (steps + self.offsets).round_() == rounded  # what is clipped does not move
        parts = parts_of(gradient.to(scale.dtype), self.first.scheme)
        of_scale = (parts * torch.where(inside, rounded - steps, rounded)).sum(-1)
        return parts * scale * inside, of_scale

    def step(self, gradient: Tensor, rate: float) -> None:
        """Go against the signs, each offset and each factor by `rate`."""
        of_offsets, of_scale = self.gradients(gradient)
        self.offsets.sub_(of_offsets.sign_(), alpha=rate)
        self.offsets.clamp_(-0.5, 0.5)
        self._step_factors(of_scale, rate)

    def _place(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, w / scale, and the multiple of the scale that it is rounded to."""
        scale = self.scale.to(self.weight.dtype)[..., None]
        points = self.first.zero_point.to(scale.dtype)[..., None]
        steps = parts_of(self.weight, self.first.scheme) / scale
        rounded = (steps + self.offsets).round_()
        low, high = -points, self.first.scheme.max_code - points
        return scale, steps, torch.minimum(torch.maximum(rounded, low), high)

    def _values(self) -> Tensor:
        return self._place()[2]


@dataclass(frozen=True, slots=True)
class Learned:
    """Options of learned rounding.

    Args:
        steps: at most.
        rate: by which offsets and factors move at first, falling to 0; 1 / steps by default.
    """

    steps: int = 100
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; accepted are numbers from 1")

    def __call__(
        self,
        roundings: dict[str, Rounding],
        put: Callable[[str, Tensor], None],
        gradients: Callable[[int], dict[str, Tensor]],
        error: Callable[[], float],
    ) -> tuple[float, float, int]:
        """Learn, and leave in each rounding the best that was found.

        Args:
            roundings: by name.
            put: gives the block a weight (out, in) in place of its own.
            gradients: of the squared error of the block as it stands by the weights of each name, on the
                samples of a step of this number; a name that is missing did not matter to it.
            error: of the block as it stands, on samples held out.

        Returns:
            the error held out, before and at best, and the step of the best: 0 is what it began with.
        """
        rate = self.rate or 1 / self.steps
        every = max(1, self.steps // _JUDGED)
        self._put(roundings, put)
        first = best = error()
        found = 0
        for step in range(self.steps):
            for name, gradient in gradients(step).items():
                roundings[name].step(gradient, rate * (1 - step / self.steps))
            self._put(roundings, put)
            if (step + 1) % every == 0 or step == self.steps - 1:
                now = error()
                if now < best:
                    best, found = now, step + 1
                    for rounding in roundings.values():
                        rounding.keep()
                elif found == 0 and 2 * (step + 1) >= self.steps and now > _HOPELESS * first:
                    break
        return first, best, found

    def _put(self, roundings: dict[str, Rounding], put: Callable[[str, Tensor], None]) -> None:
        for name, rounding in roundings.items():
            put(name, rounding.weights())
