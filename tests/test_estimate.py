"""Whether stated errors are true: intervals of 1.96 of them must hold the truth in 95 % of trials.

Each trial is a data set with known truth, drawn as evaluations are: windows of unequal length whose
tokens depend on each other. Token values are exp(0.92 z): deviation over mean and skew (1.2 and 5)
are those of the reference model's KL at 4 bits (1.16 and 4.4, `fewbits evaluate` on its held-out text,
2026-11-25); a tenth of the variance of z is its window's, against 0.03 there.

Why 67 windows, those of the demo, suffice: the skew of a mean of n windows falls as 1 / sqrt(n), and
that of a normal interval's coverage as 1 / n. With 1,000 trials a coverage of 95 % is itself known to
0.7 points (binomial), so that the band of 3 is more than four of those.
"""

import math

import pytest
import torch
from scipy.stats import norm, t

from fewbits.estimate import (
    Estimate,
    exp_estimate,
    mean_estimate,
    percentile_estimate,
    ratio_estimate,
    within_noise,
)

WINDOWS, TRIALS = 67, 1000
SHORTEST, LONGEST = 10, 60
SIGMA, SHARED = 0.92, 0.1  # of z: deviation, and the share of variance that a window's tokens share


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def draw(generator, windows=WINDOWS):
    """z of every token (windows, LONGEST), standard normal, and which of them exist."""
    level, own = normal(windows, 1, generator=generator), normal(windows, LONGEST, generator=generator)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (windows, 1), generator=generator)
    return math.sqrt(SHARED) * level + math.sqrt(1 - SHARED) * own, torch.arange(LONGEST) < lengths


def sums(values, there):
    return (values * there).sum(-1), there.sum(-1).double()


def coverage(estimates, truth, errors=1.96):
    return sum(abs(e.value - truth) <= errors * e.error for e in estimates) / len(estimates)


def assert_covers(estimates, truth, errors=1.96):
    assert abs(coverage(estimates, truth, errors) - 0.95) <= 0.03


def test_means_over_tokens_of_unequal_windows_cover_the_truth(generator):
    found = []
    for _ in range(TRIALS):
        z, there = draw(generator)
        found.append(ratio_estimate(*sums((SIGMA * z).exp(), there)))
    assert_covers(found, math.exp(SIGMA**2 / 2))


def test_errors_over_tokens_as_if_independent_would_not_cover_the_truth(generator):
    """The band can fail: the usual formula for independent tokens does."""
    found = []
    for _ in range(TRIALS):
        z, there = draw(generator)
        found.append(mean_estimate((SIGMA * z).exp()[there]))
    assert coverage(found, math.exp(SIGMA**2 / 2)) < 0.9


def test_means_of_windows_whose_length_goes_with_their_value_cover_the_truth(generator):
    """A ratio over windows, not a mean of their means: long windows are the easy ones here."""
    found = []
    for _ in range(TRIALS):
        z, there = draw(generator)
        lengths = there.sum(-1, keepdim=True)
        found.append(ratio_estimate(*sums(z + 30 / lengths, there)))
    lengths = torch.arange(SHORTEST, LONGEST + 1).double()
    assert_covers(found, float((lengths * 30 / lengths).sum() / lengths.sum()))


def test_shares_of_questions_cover_the_truth(generator):
    """1,000 questions of a task, independent, 70 % answered rightly."""
    found = []
    for _ in range(TRIALS):
        found.append(mean_estimate((torch.rand(1000, generator=generator) < 0.7).double()))
    assert_covers(found, 0.7)


def test_means_of_few_very_skewed_units_do_not_cover_the_truth(generator):
    """The limit: units as skewed as single tokens are, not windows that average over them."""
    found = [mean_estimate((SIGMA * normal(WINDOWS, generator=generator)).exp()) for _ in range(TRIALS)]
    assert coverage(found, math.exp(SIGMA**2 / 2)) < 0.92


def test_five_rounds_of_timing_need_the_quantile_of_student(generator):
    """`compare_speed` takes five: 1.96 errors hold the truth in 88 % of trials, 2.78 in 95 %."""
    rounds = 5
    found = [mean_estimate(1.5 + 0.1 * normal(rounds, generator=generator)) for _ in range(2 * TRIALS)]
    assert_covers(found, 1.5, float(t.ppf(0.975, rounds - 1)))
    few = float(2 * t.cdf(1.96, rounds - 1) - 1)
    assert coverage(found, 1.5) == pytest.approx(few, abs=0.03)


def test_99th_percentiles_cover_the_truth(generator):
    """67 windows of 35 tokens on average have 23 above it; those of the demo, 500 long, have 335."""
    found = []
    for _ in range(TRIALS):
        z, there = draw(generator)
        values = (SIGMA * z).exp()
        found.append(percentile_estimate([v[i] for v, i in zip(values, there, strict=True)], 0.99))
    assert_covers(found, math.exp(SIGMA * norm.ppf(0.99)))


def test_medians_cover_the_truth(generator):
    found = []
    for _ in range(TRIALS):
        z, there = draw(generator)
        found.append(percentile_estimate([v[i] for v, i in zip(z, there, strict=True)], 0.5))
    assert_covers(found, 0.0)


def test_perplexities_cover_the_truth(generator):
    found = []
    for _ in range(TRIALS):
        z, there = draw(generator)
        found.append(exp_estimate(ratio_estimate(*sums(2.8 + z, there))))
    assert_covers(found, math.exp(2.8))


@pytest.mark.parametrize("share", [0.12, 0.04])
def test_flips_and_agreement_cover_the_truth(generator, share):
    """Shares of tokens; at 4 bits about 12 % disagree and 4 % flip, 94 of 2,345 tokens here."""
    found = []
    for _ in range(TRIALS):
        z, there = draw(generator)
        found.append(ratio_estimate(*sums((z > norm.ppf(1 - share)).double(), there)))
    assert_covers(found, share)


def test_shares_of_very_few_tokens_do_not_cover_the_truth(generator):
    """The limit: of two expected flips often none is seen, and 0 ± 0 says more than is known."""
    share, found = 2 / (WINDOWS * (SHORTEST + LONGEST) / 2), []
    for _ in range(TRIALS):
        z, there = draw(generator)
        found.append(ratio_estimate(*sums((z > norm.ppf(1 - share)).double(), there)))
    assert coverage(found, share) < 0.92


def test_a_difference_paired_by_window_is_known_better_than_two_means(generator):
    z, there = draw(generator)
    other = z + 0.1 * normal(*z.shape, generator=generator)
    counts = there.sum(-1).double()
    first, second = ((x * there).sum(-1) for x in (z, other))
    paired = ratio_estimate(first - second, counts)
    alone = [ratio_estimate(each, counts) for each in (first, second)]
    assert paired.value == pytest.approx(alone[0].value - alone[1].value)
    # Variances: 1 each within and between windows; of the difference 0.01. A tenth, at least.
    assert paired.error < 0.2 * math.hypot(alone[0].error, alone[1].error)


@pytest.mark.parametrize(
    ("difference", "noise"),
    [
        (Estimate(0.3, 0.2), True),
        (Estimate(-0.3, 0.2), True),
        (Estimate(0.5, 0.2), False),
        (Estimate(-0.5, 0.2), False),
        (Estimate(5.0, None), True),  # a single window
        (Estimate(0.0, 0.0), True),  # two models that answer the same
        (Estimate(math.nan, 0.2), True),
        (Estimate(math.nan, math.nan), True),
    ],
)
def test_noise_is_what_two_errors_reach(difference, noise):
    assert within_noise(difference) is noise


def test_a_single_window_has_no_error():
    assert ratio_estimate(torch.tensor([3.0]), torch.tensor([2.0])) == Estimate(1.5, None)
    assert percentile_estimate([torch.tensor([1.0, 2.0])], 0.99) == Estimate(2.0, None)
    assert exp_estimate(Estimate(0.0, None)) == Estimate(1.0, None)


def test_windows_that_are_alike_have_no_error():
    windows = [torch.tensor([1.0, 2.0, 3.0])] * 4
    assert percentile_estimate(windows, 0.99) == Estimate(3.0, 0.0)
    assert ratio_estimate(torch.ones(4), torch.full((4,), 3.0)).error == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("quantile", [0.0, 0.01, 0.25, 0.5, 0.99, 1.0])
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(generator, quantile):
    windows = [normal(n, generator=generator) for n in (3, 11, 40, 47)]
    every = torch.cat(windows)
    shares = [(float((every <= v).double().mean()), float(v)) for v in every]
    expected = min(v for share, v in shares if share >= quantile - 1e-12)
    assert percentile_estimate(windows, quantile).value == expected


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (Estimate(12.3456, 0.0234), "12.346 ± 0.023"),
        (Estimate(0.00123, 0.000045), "0.001230 ± 0.000045"),
        (Estimate(99.0, 12.0), "99 ± 12"),
        (Estimate(5.0, None), "5"),
        (Estimate(5.0, 0.0), "5"),
        (Estimate(math.nan, math.nan), "nan"),
        (Estimate(math.inf, math.inf), "inf"),
    ],
)
def test_errors_are_shown_with_two_digits(estimate, shown):
    assert str(estimate) == shown
