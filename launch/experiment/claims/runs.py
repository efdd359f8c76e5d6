"""One run of an experiment: its setting, rate and seed, and whether it chooses the rate or reports."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

Value = str | int | float
Setting = dict[str, Value]
Numbers = dict[str, float]
Row = Mapping[str, Any]
Phase = Literal["choose", "report"]


@dataclass(frozen=True)
class Run:
    """Hold all that a run depends on.

    A run that chooses a learning rate reads validation images, one that reports may read test images.
    """

    claim: str
    setting: Setting
    seed: int
    phase: Phase = "report"
    rate: float | None = None

    @property
    def id(self) -> str:
        """Name the run in the results file."""
        return "/".join(
            [
                self.claim,
                self.phase,
                ",".join(f"{key}={value}" for key, value in self.setting.items()),
                *([] if self.rate is None else [f"rate={self.rate:g}"]),
                f"seed={self.seed}",
            ]
        )

    def __getitem__(self, name: str) -> Any:
        """Read one value of the setting."""
        return self.setting[name]


def grid(**values: tuple[Value, ...]) -> list[Setting]:
    """Combine all values: `grid(arm=("bn", "none"), depth=(5, 10))` gives four settings."""
    return [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]
