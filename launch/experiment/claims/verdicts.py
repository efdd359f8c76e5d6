"""The rules by which an interval becomes a verdict; they know nothing of the numbers beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from experiment.comparison.statistics import Interval

SHOWN, REFUTED, OPEN, HALF = "shown", "refuted here", "open", "half true"


@dataclass(frozen=True)
class Rule:
    """Say where the 95 % interval of a quantity must lie.

    `above`: the claim says that the quantity is larger than `threshold`. It is shown if the whole interval is larger,
    and refuted here if the whole interval is smaller: an effect on the other side, or one within the margin.
    `within`: the claim says that the quantity lies between `-threshold` and `threshold`. It is shown if the whole
    interval does, and refuted here if the whole interval lies outside, on one side.
    """

    kind: Literal["above", "within"]
    threshold: float
    unit: str

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
        if self.kind == "above":
            return f"shown if the interval is wholly above {limit}, refuted here if wholly below, else open"
        return f"shown if the interval is wholly within ±{limit}, refuted here if wholly outside, else open"


def whole(verdicts: Sequence[str]) -> str:
    """Join the verdicts of a sentence's parts.

    All shown, or all refuted here: that. Some shown and some refuted here: half true. Otherwise open.
    """
    decided = set(verdicts) - {OPEN}
    if len(decided) > 1:
        return HALF
    return OPEN if OPEN in verdicts or not decided else decided.pop()
