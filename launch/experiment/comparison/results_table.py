"""The rows of a results file, looked up by arm, ranks, batch and seed.

A row of an arm that runs once per seed, since its norm does not use the batch, stands at every batch size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from experiment.comparison.statistics import Interval, Paired, mean_interval, paired
from experiment.evaluate import MODES

Row = Mapping[str, Any]
Seeds = dict[Any, float]
# The order of the arms; then the user's.
ARMS = (
    *("bn", "syncbn_2", "syncbn_4", "syncbn_node", "syncbn", "frozen_from_precise", "brn", "sn"),
    *("gn", "gn_ws", "ln", "in", "wn", "wn_mean_only", "fixup", "frozen", "none"),
)
REFERENCE = "syncbn"
FIRST = ("bn", REFERENCE, "gn")  # look the same in every report


@dataclass(frozen=True)
class Difference:
    """One line of paired differences: `label` at `batch` against `against`."""

    label: str
    world_size: int
    batch: int
    against: str
    interval: Interval
    p: float | None = None
    corrected: float | None = None  # of a comparison that was stated beforehand

    def with_corrected(self, p: float | None) -> "Difference":
        """The same line with its corrected p value."""
        return replace(self, corrected=p)


@dataclass
class ResultsTable:
    """Done and failed cells in an order of their own, so that the order of the rows changes nothing.

    `candidates` are the runs that learning rates were chosen by: validation errors, in no figure of the cells.

    A cell that comes twice counts once, its last row; of cells that differ in nothing but their names the last counts.
    """

    done: list[Row]
    failed: list[Row]
    candidates: list[Row] = field(default_factory=list)
    num_replaced: int = 0
    _seeds: dict[tuple[str, int, int], dict[Any, Row]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "ResultsTable":
        """Sort the rows."""
        every = sorted({str(row.get("cell")): row for row in rows}.values(), key=_order)
        cells = [row for row in every if row.get("candidate") is None]
        results = cls([r for r in cells if r["status"] == "done"], [r for r in cells if r["status"] != "done"])
        results.candidates = [row for row in every if row.get("candidate") is not None]
        for row in results.done:
            for batch in results._batches_of(row):
                seeds = results._seeds.setdefault((row["label"], row["world_size"], batch), {})
                results.num_replaced += row["seed"] in seeds
                seeds[row["seed"]] = row
        return results

    def _batches_of(self, row: Row) -> list[int]:
        own = {row["per_rank_batch_size"]}
        if not row.get("once_per_seed"):
            return list(own)
        others = [r for r in self.done if r["world_size"] == row["world_size"] and not r.get("once_per_seed")]
        return sorted({other["per_rank_batch_size"] for other in others} or own)

    @property
    def once_per_seed(self) -> list[str]:
        """The arms whose results do not depend on the batch of a rank."""
        return list(dict.fromkeys(row["label"] for row in self.done if row.get("once_per_seed")))

    @property
    def labels(self) -> list[str]:
        """The arms, as the tables name them."""
        return list(dict.fromkeys(row["label"] for row in self.done))

    @property
    def indices(self) -> dict[str, int]:
        """Number the arms, for colour and marker."""
        others = [label for label in self.labels if label not in FIRST]
        return {label: index for index, label in enumerate([*FIRST, *others]) if label in self.labels}

    @property
    def world_sizes(self) -> list[int]:
        """All world sizes, rising."""
        return sorted({row["world_size"] for row in self.done})

    @property
    def seeds(self) -> list[Any]:
        """All seeds, rising."""
        return sorted({row["seed"] for row in self.done})

    @property
    def modes(self) -> list[str]:
        """The evaluation modes that any cell has."""
        found = dict.fromkeys(mode for row in self.done for mode in row.get("evaluations") or {})
        return [mode for mode in MODES if mode in found] + sorted(found.keys() - set(MODES))

    @property
    def mode(self) -> str:
        """The mode of curve and tests: what DDP keeps, if it was evaluated."""
        return next(iter(self.modes), MODES[0])

    def batches(self, world_size: int, label: str | None = None) -> list[int]:
        """The per-rank batch sizes at a world size, rising; of one arm, or of all."""
        keys = [key for key in self._seeds if key[1] == world_size and label in (None, key[0])]
        return sorted({batch for _, _, batch in keys})

    def cells(self, label: str, world_size: int, batch: int) -> list[Row]:
        """The rows of one point of the curve, one per seed."""
        return list(self._seeds.get((label, world_size, batch), {}).values())

    def values(self, label: str, world_size: int, batch: int, mode: str, name: str = "test_error") -> Seeds:
        """One number per seed; what was not evaluated or is no number is left out."""
        rows = self.cells(label, world_size, batch)
        found = {row["seed"]: ((row.get("evaluations") or {}).get(mode) or {}).get(name) for row in rows}
        return {seed: float(value) for seed, value in found.items() if is_number(value)}

    def mean(self, label: str, world_size: int, batch: int, mode: str, name: str = "test_error") -> Interval | None:
        """The mean over seeds; None without any value."""
        values = self.values(label, world_size, batch, mode, name)
        return mean_interval(list(values.values())) if values else None

    def difference(self, key: tuple[str, int, int], against: str) -> Difference | None:
        """An arm at a world size and batch against another there; None without a common seed."""
        return _difference(self, key, (against, *key[1:]), against)

    def differences(self, planned: Sequence[Difference] = ()) -> list[Difference]:
        """Every arm against syncbn at equal ranks and batch, without the planned ones: exploratory."""
        known = [(line.label, line.world_size, line.batch, line.against) for line in planned]
        found = [
            self.difference((label, world_size, batch), REFERENCE)
            for world_size in self.world_sizes
            for batch in self.batches(world_size)
            for label in self.labels
            if label != REFERENCE and (label, world_size, batch, REFERENCE) not in known
        ]
        return [line for line in found if line is not None]

    def changes(self, label: str, world_size: int) -> list[Difference]:
        """An arm at its smaller batches against itself at its largest; none if the batch does not enter."""
        batches = self.batches(world_size, label) if label not in self.once_per_seed else []
        found = [
            _difference(self, (label, world_size, batch), (label, world_size, batches[-1]), str(batches[-1]))
            for batch in batches[:-1]
        ]
        return [line for line in found if line is not None]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a stored value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _difference(
    results: ResultsTable, key: tuple[str, int, int], reference: tuple[str, int, int], against: str
) -> Difference | None:
    values, others = results.values(*key, results.mode), results.values(*reference, results.mode)
    found: Paired | None = paired(values, others)
    return None if found is None else Difference(*key, against, found.interval, found.p)


def _order(row: Row) -> tuple[Any, ...]:
    arm = str(row.get("arm"))
    index = ARMS.index(arm) if arm in ARMS else len(ARMS)
    numbers = [row.get(name) or 0 for name in ("world_size", "per_rank_batch_size", "seed")]
    group = row.get("group_size")
    return index, arm, group is None, str(group).zfill(9), str(row.get("label")), *numbers, str(row.get("cell"))
