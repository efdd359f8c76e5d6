"""One run of launch/train.py in a comparison: a cell of the grid, or a candidate that rates are chosen from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Norms whose result for one image does not depend on the others of its batch; "wn" unless with mean_only.
BATCH_FREE = frozenset(("gn", "gn_ws", "ln", "in", "none", "frozen", "fixup", "wn", "frn", "evonorm_s0"))
CONVERTER = "syncbn.lightning.NormConverter"


@dataclass(frozen=True)
class Cell:
    """One run: its coordinates in the grid, and its overrides of launch/train.py."""

    arm: str
    per_rank_batch_size: int
    world_size: int
    group_size: int | str | None
    seed: int
    accumulate: int
    overrides: tuple[str, ...]
    norm: dict[str, Any] = field(default_factory=dict, compare=False)  # what the arm's file says
    once_per_seed: bool = False  # the arm's result does not depend on the per-rank batch
    candidate: str | None = None  # of a run that is made to choose settings: what it tries
    selection: dict[str, Any] | None = field(default=None, compare=False)  # how the settings of a cell were chosen

    @property
    def label(self) -> str:
        """Name the curve that this cell belongs to."""
        if self.candidate is not None:
            return f"{self.arm} with {self.candidate}"
        return self.arm if self.group_size is None else f"{self.arm}, groups of {self.group_size}"

    @property
    def id(self) -> str:
        """Name the cell in the results, and its folder."""
        if self.candidate is not None:
            tried = self.candidate.replace(", ", "-").replace(" ", "").replace("/", "_")
            return f"select-{self.arm}-w{self.world_size}-{tried}-s{self.seed}"
        group = "" if self.group_size is None else f"-g{self.group_size}"
        batch = "" if self.once_per_seed else f"-p{self.per_rank_batch_size}"
        return f"{self.arm}{group}-w{self.world_size}{batch}-s{self.seed}"

    def coordinates(self) -> dict[str, Any]:
        """Return the coordinates, named as in a row of the results."""
        names = ("arm", "label", "per_rank_batch_size", "world_size", "group_size", "seed", "accumulate", "norm")
        others = ("once_per_seed", "candidate", "selection")
        return {"cell": self.id, **{name: getattr(self, name) for name in (*names, *others)}}


def is_batch_free(norm: Mapping[str, Any]) -> bool:
    """Whether no arm of this file lets images of one batch change each other; unknown norms may."""
    if norm.get("_target_") != CONVERTER or norm.get("norm") not in BATCH_FREE:
        return False
    return not (norm.get("mean_only") or norm.get("include") or norm.get("exclude"))  # other layers stay BatchNorm
