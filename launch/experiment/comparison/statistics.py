"""Statistics over seeds: means with confidence intervals, paired tests, and their correction for multiplicity."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
SAME = 1e-6  # errors come from float32 scores: two that differ by less are one number


@dataclass(frozen=True)
class Interval:
    """The mean of `n` values, within `mean ± half` with 95 % confidence; `half` is None for one value."""

    mean: float
    half: float | None
    n: int

    @property
    def lower(self) -> float | None:
        """`mean - half`."""
        return None if self.half is None else self.mean - self.half

    @property
    def upper(self) -> float | None:
        """`mean + half`."""
        return None if self.half is None else self.mean + self.half


@dataclass(frozen=True)
class Paired:
    """The mean difference of pairs with its interval, and the p value of its test, None for one pair."""

    interval: Interval
    p: float | None


def mean_interval(values: Sequence[float]) -> Interval:
    """Give the mean and its 95 % confidence interval by Student's t.

    `half = t(0.975, n - 1) * s / sqrt(n)`, `s` the standard deviation by n - 1: right for independent values of a
    normal distribution, and as wide as few seeds deserve, since t is 12.7 for two and 4.3 for three.
    """
    n = len(values)
    if n == 0:
        raise ValueError("expected one value or more, got none")
    if n == 1:
        return Interval(float(values[0]), None, 1)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(float(np.mean(values)), half, n)


def paired(values: Mapping[Hashable, float], reference: Mapping[Hashable, float]) -> Paired | None:
    """Compare the values with the reference over the seeds both have; None if there is no such seed.

    The mean of `values[seed] - reference[seed]`, its interval, and the two-sided p value of the paired t test. Where
    all differences are the same number that test has no spread to judge by: p is 1 if they are zero, else that of the
    sign test, `2 / 2**n`.
    """
    seeds = [seed for seed in values if seed in reference]
    if not seeds:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    interval = mean_interval(differences)
    if interval.half is None:
        return Paired(interval, None)
    if max(differences) - min(differences) < SAME:
        if abs(interval.mean) < SAME:
            return Paired(Interval(0.0, 0.0, interval.n), 1.0)
        return Paired(Interval(interval.mean, 0.0, interval.n), 2.0 ** (1 - interval.n))
    t = interval.mean / (float(np.std(differences, ddof=1)) / math.sqrt(interval.n))
    return Paired(interval, float(2 * stats.t.sf(abs(t), interval.n - 1)))


def seeds_to_settle(found: Interval, significance: float, margin: float, power: float = 0.8) -> int | None:
    """Tell how many seeds would settle a paired difference, if its mean and spread are those found.

    The least n at which, with this probability, the two-sided t test shows the difference, or the 95 % interval lies
    within plus or minus `margin`; None beyond 10 000, or without a spread to judge by.
    """
    if found.half is None or found.half == 0:
        return None
    deviation = found.half * math.sqrt(found.n) / float(stats.t.ppf((1 + CONFIDENCE) / 2, found.n - 1))
    n = np.unique(np.geomspace(2, 10_000, 500).astype(int))
    probability = np.maximum(_shown(found.mean, deviation, n, significance), _within(found.mean, deviation, n, margin))
    settled = probability >= power
    return int(n[settled][0]) if settled.any() else None


def _spreads(n: NDArray[np.int_]) -> NDArray[np.float64]:
    """Give 200 quantiles of the standard deviation that n seeds find, over the true one: a row each."""
    levels = (np.arange(200) + 0.5) / 200
    return np.asarray(np.sqrt(stats.chi2.ppf(levels[:, None], n - 1) / (n - 1)))


def _shown(mean: float, deviation: float, n: NDArray[np.int_], significance: float) -> NDArray[np.float64]:
    """Give the probability that the t test over n seeds shows the difference; `nct` of scipy is at times NaN."""
    shift = abs(mean) / deviation * np.sqrt(n)
    limit = stats.t.ppf(1 - significance / 2, n - 1) * _spreads(n)
    return np.asarray((stats.norm.sf(limit - shift) + stats.norm.cdf(-limit - shift)).mean(0))


def _within(mean: float, deviation: float, n: NDArray[np.int_], margin: float) -> NDArray[np.float64]:
    """Give the probability that the interval over n seeds lies within the margin."""
    spread = deviation * _spreads(n)
    room = margin - stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * spread / np.sqrt(n)  # for the mean
    error = deviation / np.sqrt(n)
    inside = stats.norm.cdf((room - mean) / error) - stats.norm.cdf((-room - mean) / error)
    return np.asarray(np.where(room > 0, inside, 0.0).mean(0))


def holm(p_values: Sequence[float | None], num_stated: int = 0) -> list[float | None]:
    """Correct p values for their number, by Holm's step-down; None stays None.

    With the values in rising order, m of them or `num_stated` if that is more, `corrected(i) = max over j <= i of
    min(1, (m - j) * p(j))`, j from 0: to call those below 0.05 real is wrong anywhere in the table with a chance of at
    most 5 % (Holm 1979).
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    num_tests = max(num_stated, len(order))
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (num_tests - rank) * p))
        corrected[index] = largest
    return corrected
