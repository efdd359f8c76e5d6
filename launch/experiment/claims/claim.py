"""What a claim consists of: the sentence, its parts with their rules, the settings, and how a run is measured."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from experiment.claims.runs import Numbers, Row, Run, Setting, Value
from experiment.claims.verdicts import Rule


class At:
    """Look up the numbers that the runs of one claim reported with one seed."""

    def __init__(self, rows: Iterable[Row], seed: int) -> None:
        self.rows = [row for row in rows if row["seed"] == seed and row["phase"] == "report"]

    def __call__(self, name: str, **setting: Value) -> float:
        """Give the one number of that setting.

        Raises:
            LookupError: there is no such run, or it has no such number.
        """
        found = [row["numbers"].get(name) for row in self._where(setting)]
        if len(found) != 1 or found[0] is None:
            raise LookupError(f"no {name} of {setting}")
        return float(found[0])

    def along(self, axis: str, name: str, **setting: Value) -> dict[float, float]:
        """Give the number at every value of one more setting."""
        values = [row["setting"][axis] for row in self._where(setting)]
        return {float(value): self(name, **setting, **{axis: value}) for value in sorted(values)}

    def _where(self, setting: Setting) -> list[Row]:
        return [row for row in self.rows if setting.items() <= row["setting"].items()]


@dataclass(frozen=True)
class Part:
    """One part of a sentence: what is measured once per seed, and the rule for its interval over the seeds."""

    label: str
    sentence: str
    quantity: str
    rule: Rule
    value: Callable[[At], float]


@dataclass(frozen=True)
class Plot:
    """One figure: a number against a setting, a line per value of another; without `x` one point per line.

    `lines` names the setting, or the two settings, that tell lines apart, and `where` keeps only some runs.
    """

    title: str
    y: str
    y_label: str
    lines: tuple[str, ...] = ("arm",)
    x: str | None = None
    x_label: str = ""
    where: Setting = field(default_factory=dict)
    log_x: bool = True
    log_y: bool = False
    percent: bool = False


@dataclass(frozen=True)
class Claim:
    """A sentence of a textbook and the experiment on it.

    With `rates`, every setting runs at its own best of them, chosen on validation images with a seed of its own;
    `tuned_as` says at which setting that is done, if not at itself, and `tuned_by` by runs of which other claim.
    """

    name: str
    sentence: str
    source: str
    literature: str
    setup: str
    parts: tuple[Part, ...]
    settings: tuple[Setting, ...]
    measure: Callable[[Run], Numbers]
    columns: dict[str, str]
    plots: tuple[Plot, ...]
    needs_all: bool = False  # one part that is refuted refutes the sentence
    remark: str = ""  # what was seen only afterwards, and decides nothing
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    rates: tuple[float, ...] | Callable[[Setting], tuple[float, ...]] = ()
    tuned_by: str | None = None
    tuned_as: Callable[[Setting], Setting] = lambda setting: setting
