"""A measured value and its standard error; how both come from sums over sampled units.

Units (windows of text, questions, rounds of a timing) are drawn independently; what lies inside of one
is not independent. Hence ratio estimators over units (Cochran, Sampling Techniques, 1977, eq. 6.13).

Intervals of 1.96 errors hold the truth in 92 to 98 % of trials from about 67 units on, of values like
those of KL (`tests/test_estimate.py`). They hold it less often where units are fewer (of 5, take 2.78:
Student's t), where events are very few (of two expected flips none may be seen: 0 without an error), and
where units are alike, as windows of one document are: the error is that for other windows of the same
documents. For other documents it is larger: by documents in place of windows 1.5 times for perplexity,
1.3 for KL, 1.8 for agreement, 0.9 for the perplexity ratio (33 modules, the reference model at 4 bits,
2026-11-25).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_NORMAL_95 = 1.96  # standard errors to each side hold 95 % of a normal distribution


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error; None from a single window."""

    value: float
    error: float | None

    def __str__(self) -> str:
        if self.error is None or not 0 < self.error < math.inf:
            return f"{self.value:.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def ratio_estimate(sums: Tensor, counts: Tensor) -> Estimate:
    """The mean per token from sums and counts of tokens per window, and its standard error.

    >>> ratio_estimate(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    Estimate(value=2.0, error=1.0)
    """
    n, total = len(sums), counts.sum()
    mean = sums.sum() / total
    if n < 2:
        return Estimate(float(mean), None)
    variance = (sums - mean * counts).square().sum() * n / (n - 1)
    return Estimate(float(mean), float(variance.sqrt() / total))


def percentile_estimate(windows: list[Tensor], quantile: float) -> Estimate:
    """A quantile over tokens; its error from that of the share of tokens below it (Woodruff 1952).

    The share is a ratio over windows. The quantiles at the ends of its 95 % interval are those of the
    quantile's, whose half is 1.96 standard errors.

    >>> percentile_estimate([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], 0.5)
    Estimate(value=2.0, error=0.5102040816326531)
    """
    values = torch.cat(windows).sort().values

    def at(share: float) -> float:
        return float(values[min(len(values), max(1, math.ceil(share * len(values)))) - 1])

    value = at(quantile)
    below = torch.tensor([float((window <= value).sum()) for window in windows], dtype=torch.float64)
    counts = torch.tensor([len(window) for window in windows], dtype=torch.float64)
    share = ratio_estimate(below, counts)
    if share.error is None:
        return Estimate(value, None)
    half = _NORMAL_95 * share.error
    return Estimate(value, (at(quantile + half) - at(quantile - half)) / (2 * _NORMAL_95))


def exp_estimate(estimate: Estimate) -> Estimate:
    """The exponential of an estimate; its error by the delta method."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf
    return Estimate(value, None if estimate.error is None else value * estimate.error)


def mean_estimate(values: Tensor) -> Estimate:
    """The mean of independent values, and its standard error."""
    return ratio_estimate(values.double(), torch.ones(len(values), dtype=torch.float64))


def within_noise(difference: Estimate) -> bool:
    """Whether a difference is at most two of its standard errors, so that its sign is not known.

    >>> [within_noise(Estimate(*pair)) for pair in ((0.3, 0.2), (-0.5, 0.2), (1, None), (0, 0))]
    [True, False, True, True]
    """
    # Said by what is not larger: NaN is noise, too.
    return difference.error is None or not abs(difference.value) > 2 * difference.error
