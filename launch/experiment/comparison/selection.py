"""Choose each arm's learning rate before the grid is run, by the error on validation images.

Each arm tries every rate of a grid, with every one of its options (such as the number of groups of "gn"), on a seed of
its own. Where the best rate is the lowest or highest of its grid, the grid is continued. No test image is read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiment.comparison.cell import Cell
from experiment.comparison.overrides import value_text
from experiment.comparison.selection_checks import rounded

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One rate, with one choice of the arm's options."""

    rate: float
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """Name it in labels."""
        return ", ".join([f"lr {self.rate:g}", *(f"{name} {value}" for name, value in self.options)])

    @property
    def overrides(self) -> list[str]:
        """Its overrides of launch/train.py."""
        return [f"task.lr={self.rate:g}", *(f"++norm.{name}={value_text(value)}" for name, value in self.options)]


class ArmSelection:
    """What one arm has tried, and what it tries next.

    Args:
        settings: `select_lr` of the comparison.
        lr: Of the task, to which the factors apply.
        mode: Of the statistics that candidates are evaluated with, the first of the comparison.
        like: A run of the arm with the seed and batch of the selection; candidates differ in rate and options.
    """

    def __init__(self, settings: DictConfig, lr: float, mode: str, like: Cell) -> None:
        self.settings, self.mode, self.like = settings, mode, like
        self.grid = sorted({rounded(factor * lr) for factor in settings.lr_factors})
        options: Any = OmegaConf.to_container(settings.options)
        choices = [tuple(option.items()) for option in options.get(like.arm, [{}])]
        self.options = [choice for index, choice in enumerate(choices) if choice not in choices[:index]]

    def cell(self, candidate: Candidate) -> Cell:
        """Make the run of a candidate."""
        shared = [o for o in self.like.overrides if not o.startswith(("evaluate=", "trainer.max_epochs="))]
        own = ["eval_split=val", f"evaluate=[{self.mode}]", f"trainer.max_epochs={self.settings.max_epochs}"]
        return replace(self.like, overrides=(*shared, *own, *candidate.overrides), candidate=candidate.text)

    def known(self, rows: Mapping[str, Row]) -> list[Cell]:
        """Give the runs of the grid, and the further ones that have a row."""
        return [cell for _, cell in self._known(rows)]

    def next(self, rows: Mapping[str, Row]) -> list[Cell]:
        """Give the candidates that come next: first the grid, then one rate more where the best is at its edge."""
        first = [Candidate(rate, options) for options in self.options for rate in self.grid]
        if missing := [c for c in map(self.cell, first) if c.id not in rows]:
            return missing
        if (best := self.best(rows)) is None:
            return []
        if len(self._rates(rows, best.options)) - len(self.grid) >= self.settings.widen:
            return []
        scored = self._scored_rates(rows, best.options)
        further = [self._below(best.rate)] if best.rate == scored[0] else []
        further += [self._above(best.rate)] if best.rate == scored[-1] else []
        return [cell for rate in further if (cell := self.cell(replace(best, rate=rate))).id not in rows]

    def best(self, rows: Mapping[str, Row]) -> Candidate | None:
        """Give the candidate of the least validation error, of equal ones the least loss; None if all failed."""
        scores = {candidate: self._score(rows[cell.id]) for candidate, cell in self._known(rows)}
        best = min(scores, key=lambda candidate: (*scores[candidate], candidate.rate))
        return None if math.isinf(scores[best][0]) else best

    def rows(self, rows: Mapping[str, Row]) -> list[Row]:
        """Give the rows of the candidates."""
        return [rows[cell.id] for _, cell in self._known(rows) if cell.id in rows]

    def choice(self, rows: Mapping[str, Row]) -> dict[str, Any] | None:
        """Say what was chosen and how, as each row of the results repeats it; None if all candidates failed."""
        if (best := self.best(rows)) is None:
            return None
        scored = self._scored_rates(rows, best.options)
        errors = {candidate: self._score(rows[cell.id])[0] for candidate, cell in self._known(rows)}
        return {
            "lr": best.rate,
            "options": dict(best.options),
            "val_error": errors[best],
            "at_edge": best.rate in (scored[0], scored[-1]),
            "tried": {c.text: None if math.isinf(error) else error for c, error in errors.items()},
            "mode": self.mode,
            "world_size": self.like.world_size,
            **{name: self.settings[name] for name in ("seed", "per_rank_batch_size", "max_epochs")},
        }

    def _known(self, rows: Mapping[str, Row]) -> Iterator[tuple[Candidate, Cell]]:
        """Give the grid's candidates and the further ones that have a row."""
        for options in self.options:
            for rate in self._rates(rows, options):
                yield (candidate := Candidate(rate, options)), self.cell(candidate)

    def _rates(self, rows: Mapping[str, Row], options: tuple[tuple[str, Any], ...]) -> list[float]:
        """Give the grid of these options, with what it was continued by."""
        rates = list(self.grid)
        for _ in range(self.settings.widen):
            more = {self._below(rates[0]), self._above(rates[-1])}
            found = {rate for rate in more if self.cell(Candidate(rate, options)).id in rows}
            rates = sorted({*rates, *found})
        return rates

    def _below(self, rate: float) -> float:
        return rounded(rate * self.grid[0] / self.grid[1])

    def _above(self, rate: float) -> float:
        return rounded(rate * self.grid[-1] / self.grid[-2])

    def _scored_rates(self, rows: Mapping[str, Row], options: tuple[tuple[str, Any], ...]) -> list[float]:
        """Give those of the rates whose runs came to a number."""
        cells = {rate: self.cell(Candidate(rate, options)) for rate in self._rates(rows, options)}
        return [rate for rate, cell in cells.items() if math.isfinite(self._score(rows[cell.id])[0])]

    def _score(self, row: Row) -> tuple[float, float]:
        """Give validation error and loss, infinite where there is none."""
        found = ((row.get("evaluations") or {}).get(self.mode) or {}) if row["status"] == "done" else {}
        error, loss = (found.get(name) for name in ("val_error", "val_loss"))
        return math.inf if error is None else error, math.inf if loss is None else loss
