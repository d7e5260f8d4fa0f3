"""A measured value and its standard error; how both come from sums over sampled units.

Units (windows of text, questions, rounds of a timing) are drawn independently; what lies inside of one
is not independent. Hence ratio estimators over units (Cochran, Sampling Techniques, 1977, eq. 6.13).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RESAMPLES = 200  # for the error of a percentile; not tuned


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error; None from a single window."""

    value: float
    error: float | None

    def __str__(self) -> str:
        if self.error is None or not self.error > 0:
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
    """A quantile over tokens, its error by drawing windows again (bootstrap, Efron 1979)."""
    value, n = _quantile(windows, quantile), len(windows)
    if n < 2:
        return Estimate(value, None)
    generator = torch.Generator().manual_seed(0)
    draws = [
        _quantile([windows[i] for i in torch.randint(n, (n,), generator=generator)], quantile)
        for _ in range(_RESAMPLES)
    ]
    return Estimate(value, float(torch.tensor(draws).std()))


def _quantile(windows: list[Tensor], quantile: float) -> float:
    values = torch.cat(windows)
    rank = min(len(values), math.ceil(quantile * len(values)))
    return float(values.kthvalue(max(1, rank)).values)


def exp_estimate(estimate: Estimate) -> Estimate:
    """The exponential of an estimate; its error by the delta method."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf
    return Estimate(value, None if estimate.error is None else value * estimate.error)


def mean_estimate(values: Tensor) -> Estimate:
    """The mean of independent values, and its standard error."""
    return ratio_estimate(values.double(), torch.ones(len(values), dtype=torch.float64))


def within_noise(difference: Estimate) -> bool:
    """Whether a difference is less than two of its standard errors, so that its sign is not known.

    >>> [within_noise(Estimate(*pair)) for pair in ((0.3, 0.2), (-0.5, 0.2), (1, None))]
    [True, False, True]
    """
    return difference.error is None or abs(difference.value) < 2 * difference.error
