"""Choose learning rates on validation images, and plan which runs a claim still wants."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean

from experiment.claims import training
from experiment.claims.claim import Claim
from experiment.claims.runs import Row, Run, Setting

SEEDS = (1000, 1001, 1002, 1003, 1004)  # of the runs that choose; no result comes from them
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # all rates there are
MAX_WIDER = 3  # times that a grid grows by one rate


@dataclass
class Choice:
    """Hold the rates tried for one setting, with their validation errors, and the best of them once all are known.

    The error is the mean over five seeds: with few, a rate can be chosen with which half of all seeds diverge. Of
    equal errors, a rate within the grid is better than one at its edge, and then the smaller.
    """

    setting: Setting
    errors: dict[float, float | None] = field(default_factory=dict)  # None: failed
    missing: list[Run] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """The chosen rate; None until all runs have ended, and where all failed."""
        found = [(error, rate in self.edges, rate) for rate, error in self.errors.items() if error is not None]
        return None if self.missing or not found else min(found)[2]

    @property
    def edges(self) -> tuple[float, float]:
        """The smallest and largest rate tried."""
        return min(self.errors), max(self.errors)

    @property
    def has_learned(self) -> bool:
        """Whether the network learned at the chosen rate."""
        error = None if self.rate is None else self.errors[self.rate]
        return error is not None and error <= training.LEARNS

    @property
    def is_at_edge(self) -> bool:
        """Whether a better rate may lie outside."""
        return self.rate in self.edges


def choose(claim: Claim, setting: Setting, rows: Mapping[str, Row]) -> Choice:
    """Choose the rate of a setting; the grid grows where the best lies at its edge."""
    start = claim.rates(setting) if callable(claim.rates) else claim.rates
    choice = _tried(claim, setting, start, rows)
    for _ in range(MAX_WIDER):
        if choice.rate is None or not choice.is_at_edge:
            break
        wider = _wider(choice)
        if wider is None:
            break
        choice = _tried(claim, setting, sorted([*choice.errors, wider]), rows)
    return choice


def _wider(choice: Choice) -> float | None:
    """Give the next rate beyond the edge at which the best lies."""
    assert choice.rate is not None
    index = LADDER.index(choice.rate) + (1 if choice.rate == choice.edges[1] else -1)
    return LADDER[index] if 0 <= index < len(LADDER) else None


def _tried(claim: Claim, setting: Setting, rates: Sequence[float], rows: Mapping[str, Row]) -> Choice:
    choice = Choice(setting)
    for rate in rates:
        runs = [Run(claim.tuned_by or claim.name, setting, seed, "choose", rate) for seed in SEEDS]
        errors = [rows[run.id]["numbers"].get("validate_error") for run in runs if run.id in rows]
        choice.missing += [run for run in runs if run.id not in rows]
        choice.errors[rate] = None if None in errors or len(errors) < len(SEEDS) else fmean(errors)
    return choice


def choices(claim: Claim, rows: Mapping[str, Row]) -> list[Choice]:
    """Choose all rates that a claim needs."""
    if not claim.rates:
        return []
    found: list[Setting] = []
    for setting in map(claim.tuned_as, claim.settings):
        if setting not in found:
            found.append(setting)
    return [choose(claim, setting, rows) for setting in found]


def wanted(claim: Claim, seeds: Sequence[int], rows: Mapping[str, Row]) -> list[Run]:
    """List the runs that can be started without a row so far; none, once the claim is complete."""
    chosen = choices(claim, rows)
    runs = list(chain.from_iterable(choice.missing for choice in chosen))
    return runs + [run for run in reports(claim, seeds, chosen) if run.id not in rows]


def reports(claim: Claim, seeds: Sequence[int], chosen: Sequence[Choice]) -> list[Run]:
    """List the runs that report, of the settings whose rate is chosen."""
    runs = []
    for setting in claim.settings:
        rate = None
        if claim.rates:
            tuned = claim.tuned_as(setting)
            rate = next(choice.rate for choice in chosen if choice.setting == tuned)
            if rate is None:
                continue
        runs += [Run(claim.name, setting, seed, "report", rate) for seed in seeds]
    return runs
