"""The rules by which an interval becomes a verdict; they know nothing of the numbers beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from experiment.comparison.formatting import MINUS
from experiment.comparison.statistics import CONFIDENCE, SIGNIFICANCE, Interval, seeds_to_settle

SHOWN, REFUTED, OPEN, HALF = "shown", "refuted here", "open", "half true"


@dataclass(frozen=True)
class Rule:
    """Say where the 95 % interval of a quantity must lie.

    `above`: the claim says that the quantity is larger than `threshold`. It is shown if the whole interval is larger,
    and refuted here if the whole interval is smaller: an effect on the other side, or one within the margin.
    `within`: the claim says that the quantity lies between `-threshold` and `threshold`. It is shown if the whole
    interval does, and refuted here if the whole interval lies outside, on one side.

    A quantity that is known in steps only, such as a rate of a grid, has an interval of at least `resolution` on
    either side: half of a step. That is less than the threshold, so that no difference at all refutes.
    """

    kind: Literal["above", "within"]
    threshold: float
    unit: str
    resolution: float = 0.0

    def widen(self, interval: Interval) -> Interval:
        """Make an interval as wide as the resolution."""
        half = None if interval.half is None else max(interval.half, self.resolution)
        return Interval(interval.mean, half, interval.n)

    def p_value(self, interval: Interval | None) -> float | None:
        """Test whether the mean equals the threshold, or the nearer one of `within`: two-sided, by Student's t."""
        if interval is None or interval.half is None:
            return None
        distance = abs(self._from_threshold(interval))
        if interval.half == 0:
            return 2.0 ** (1 - interval.n) if distance else 1.0  # the sign test
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, interval.n - 1))
        return float(2 * stats.t.sf(distance * quantile / interval.half, interval.n - 1))

    def seeds_needed(self, interval: Interval | None) -> int | None:
        """Tell how many seeds would decide with a probability of 80 %, if mean and spread are those found."""
        if interval is None or interval.half is None:
            return None
        distance = self._from_threshold(interval)
        if abs(distance) <= self.resolution:
            return None
        return seeds_to_settle(Interval(distance, interval.half, interval.n), SIGNIFICANCE, margin=0.0)

    def _from_threshold(self, interval: Interval) -> float:
        mean = abs(interval.mean) if self.kind == "within" else interval.mean
        return mean - self.threshold

    def judge(self, interval: Interval | None) -> str:
        """Give the verdict; open without an interval."""
        if interval is None or interval.lower is None or interval.upper is None:
            return OPEN
        lower, upper, threshold = interval.lower, interval.upper, self.threshold
        if self.kind == "above":
            return SHOWN if lower > threshold else REFUTED if upper < threshold else OPEN
        if -threshold < lower and upper < threshold:
            return SHOWN
        return REFUTED if lower > threshold or upper < -threshold else OPEN

    def __str__(self) -> str:
        """State the rule."""
        limit = f"{self.threshold:g} {self.unit.removesuffix('s') if self.threshold == 1 else self.unit}"
        floor = f" (at least ±{self.resolution:g})" if self.resolution else ""
        where = ("wholly above", "wholly below") if self.kind == "above" else ("wholly within ±", "wholly outside")
        text = f"shown if the interval{floor} is {where[0]} {limit}, refuted here if {where[1]}, else open"
        return text.replace("± ", "±").replace("-", MINUS)


def whole(verdicts: Sequence[str], *, needs_all: bool = False) -> str:
    """Join the verdicts of a sentence's parts.

    All shown, or all refuted here: that. Some shown and some refuted here: half true, but refuted here if the sentence
    needs all of them. Otherwise open.
    """
    decided = set(verdicts) - {OPEN}
    if needs_all and REFUTED in decided:
        return REFUTED
    if len(decided) > 1:
        return HALF
    return OPEN if OPEN in verdicts or not decided else decided.pop()
