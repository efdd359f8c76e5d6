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

Row = Mapping[str, Any]
SETTINGS = ("lr_factors", "seed", "per_rank_batch_size", "max_epochs", "widen", "options")


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


def check(config: DictConfig) -> None:
    """Refuse settings by which nothing can be chosen.

    Raises:
        ValueError: what is wrong, and what was expected.
    """
    select = config.select_lr
    if select is None:
        return
    if not OmegaConf.is_dict(select) or set(select) != set(SETTINGS):
        raise ValueError(f"expected select_lr to be null, or to have {', '.join(SETTINGS)}, got {select!r}")
    factors = select.lr_factors
    if not OmegaConf.is_list(factors) or len(set(factors)) < 2 or not all(map(_is_positive, factors)):
        raise ValueError(f"expected select_lr.lr_factors to be two or more, each above 0, got {factors!r}")
    lr = config.task.get("lr")
    if not _is_positive(lr):
        raise ValueError(f"expected task.lr to be a learning rate, which select_lr varies, got {lr!r}")
    for name, least in (("seed", 0), ("per_rank_batch_size", 1), ("max_epochs", 1), ("widen", 0)):
        value = select[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"expected select_lr.{name} to be a whole number of at least {least}, got {value!r}")
    if select.seed in config.seeds:
        raise ValueError(
            f"select_lr.seed={select.seed} is one of seeds={list(config.seeds)}: choose by a seed that the grid does "
            "not report"
        )
    for arm, options in select.options.items():
        if not OmegaConf.is_list(options) or not options or not all(OmegaConf.is_dict(option) for option in options):
            raise ValueError(f"expected select_lr.options.{arm} to be a list of settings of its norm, got {options!r}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


class ArmSelection:
    """What one arm has tried, and what it tries next.

    Args:
        settings: `select_lr` of the comparison.
        lr: Of the task, to which the factors apply.
        like: A run of the arm with the seed and batch of the selection; candidates differ in rate and options.
    """

    def __init__(self, settings: DictConfig, lr: float, like: Cell) -> None:
        self.settings, self.like = settings, like
        self.grid = sorted({_rounded(factor * lr) for factor in settings.lr_factors})
        self.options = [
            tuple((str(name), value) for name, value in option.items())
            for option in settings.options.get(like.arm, [{}])
        ]

    def cell(self, candidate: Candidate) -> Cell:
        """Make the run of a candidate."""
        shared = [o for o in self.like.overrides if not o.startswith(("evaluate=", "trainer.max_epochs="))]
        own = ["eval_split=val", "evaluate=[rank0]", f"trainer.max_epochs={self.settings.max_epochs}"]
        return replace(self.like, overrides=(*shared, *own, *candidate.overrides), candidate=candidate.text)

    def next(self, rows: Mapping[str, Row]) -> list[Cell]:
        """Give the candidates that come next: first the grid, then one rate more where the best is at its edge."""
        first = [Candidate(rate, options) for options in self.options for rate in self.grid]
        if missing := [c for c in map(self.cell, first) if c.id not in rows]:
            return missing
        if (best := self.best(rows)) is None:
            return []
        rates = self._rates(rows, best.options)
        if not self._is_at_edge(rows, best) or len(rates) - len(self.grid) >= self.settings.widen:
            return []
        return [self.cell(replace(best, rate=(self._below if best.rate == rates[0] else self._above)(best.rate)))]

    def best(self, rows: Mapping[str, Row]) -> Candidate | None:
        """Give the candidate of the least validation error, of equal ones the least loss; None if all failed."""
        scores = {candidate: _score(rows[cell.id]) for candidate, cell in self._known(rows)}
        best = min(scores, key=lambda candidate: (*scores[candidate], candidate.rate))
        return None if math.isinf(scores[best][0]) else best

    def rows(self, rows: Mapping[str, Row]) -> list[Row]:
        """Give the rows of the candidates."""
        return [rows[cell.id] for _, cell in self._known(rows) if cell.id in rows]

    def choice(self, rows: Mapping[str, Row]) -> dict[str, Any] | None:
        """Say what was chosen and how, as each row of the results repeats it; None if all candidates failed."""
        if (best := self.best(rows)) is None:
            return None
        settings = ("seed", "per_rank_batch_size", "max_epochs")
        return {
            "lr": best.rate,
            "options": dict(best.options),
            "val_error": _score(rows[self.cell(best).id])[0],
            "rates": self._rates(rows, best.options),
            "at_edge": self._is_at_edge(rows, best),
            **{name: self.settings[name] for name in settings},
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
        return _rounded(rate * self.grid[0] / self.grid[1])

    def _above(self, rate: float) -> float:
        return _rounded(rate * self.grid[-1] / self.grid[-2])

    def _is_at_edge(self, rows: Mapping[str, Row], best: Candidate) -> bool:
        rates = self._rates(rows, best.options)
        return best.rate in (rates[0], rates[-1])


def _score(row: Row) -> tuple[float, float]:
    if row["status"] != "done":
        return math.inf, math.inf
    evaluation = row["evaluations"]["rank0"]
    error, loss = (evaluation.get(name) for name in ("val_error", "val_loss"))
    return math.inf if error is None else error, math.inf if loss is None else loss
