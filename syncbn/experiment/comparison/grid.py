"""The cells of a comparison: arms x batch sizes x world sizes x group sizes x seeds, checked before any runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from syncbn.experiment.evaluate import check_modes

AXES = ("arms", "per_rank_batch_sizes", "world_sizes", "group_sizes", "seeds")
ENGINES = ("simulate", "torchrun")
ISOLATE = ("accumulate", "linear", "sqrt", "none")
GROUPS = ("data", "model", "task", "trainer", "logger")  # whose overrides go to every cell


@dataclass(frozen=True)
class Cell:
    """Hold one run of launch/train.py: its place in the grid, and the overrides that make it."""

    arm: str
    per_rank_batch_size: int
    world_size: int
    group_size: int | str | None
    seed: int
    accumulate: int
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name the line of the picture this cell lies on."""
        return self.arm if self.group_size is None else f"{self.arm}, groups of {self.group_size}"

    @property
    def id(self) -> str:
        """Name the cell in the results, and its folder."""
        group = "" if self.group_size is None else f"-g{self.group_size}"
        return f"{self.arm}{group}-w{self.world_size}-p{self.per_rank_batch_size}-s{self.seed}"

    def place(self) -> dict[str, Any]:
        """Give the coordinates, as a row of the results has them."""
        names = ("arm", "label", "per_rank_batch_size", "world_size", "group_size", "seed", "accumulate")
        return {"cell": self.id, **{name: getattr(self, name) for name in names}}


def shared_overrides(overrides: Sequence[str]) -> list[str]:
    """Pick the overrides of the command line that every cell gets: those of the groups of launch/train.py."""
    return [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0].split("@")[0] in GROUPS]


def make_cells(config: DictConfig, shared: Sequence[str]) -> list[Cell]:
    """Lay out the grid, the seeds one after another, so that early results already show all lines.

    Raises:
        ValueError: an empty axis, an unknown arm, engine or setting; a batch that accumulation cannot reach; groups
            that do not divide the ranks. All of them are listed.
    """
    _check_settings(config)
    arms = {arm: _arm(arm, shared) for arm in config.arms}
    cells, problems = [], []
    axes = (config.seeds, config.world_sizes, config.per_rank_batch_sizes, arms)
    for seed, world_size, per_rank, arm in itertools.product(*axes):
        for group_size in config.group_sizes if arms[arm] is not None else [None]:
            problem = _group_problem(arm, arms[arm] if group_size is None else group_size, world_size)
            accumulate, rest = divmod(config.data.global_batch_size, per_rank * world_size)
            if config.isolate != "accumulate":
                accumulate, rest = 1, 0
            if rest or not accumulate:
                problem = _batch_problem(config.data.global_batch_size, per_rank, world_size)
            if problem is not None:
                problems.append(problem)
                continue
            place = (arm, per_rank, world_size, group_size, seed, accumulate)
            cells.append(Cell(*place, tuple(_overrides(config, shared, *place))))
    if problems:
        raise ValueError("\n  ".join(["the grid has cells that cannot be run:", *dict.fromkeys(problems)]))
    return list({cell.id: cell for cell in cells}.values())


def base_config(config: DictConfig, shared: Sequence[str]) -> dict[str, Any]:
    """Give what all cells have in common; results can be joined only if it is the same."""
    train = OmegaConf.to_container(compose("train", [*shared]), resolve=True)
    assert isinstance(train, dict)
    common = {str(group): train[group] for group in GROUPS if group != "logger"}
    common["data"].pop("cache_dir", None)  # where the same images lie
    settings = ("engine", "isolate", "node_size", "evaluate")
    return {**common, **{name: OmegaConf.to_container(config)[name] for name in settings}}  # type: ignore[index,call-overload]


def _check_settings(config: DictConfig) -> None:
    for axis in AXES:
        values = config[axis]
        if not OmegaConf.is_list(values) or not len(values):
            raise ValueError(f"the grid is empty: expected {axis} to be a list of at least one value, got {values!r}")
    for name, choices in (("engine", ENGINES), ("isolate", ISOLATE)):
        if config[name] not in choices:
            raise ValueError(f"expected {name} to be one of {', '.join(choices)}, got {config[name]!r}")
    for axis in ("per_rank_batch_sizes", "world_sizes", "seeds"):
        wrong = [v for v in config[axis] if isinstance(v, bool) or not isinstance(v, int) or v < (axis != "seeds")]
        if wrong:
            raise ValueError(f"expected whole numbers in {axis}, at least {int(axis != 'seeds')}, got {wrong}")
    check_modes(config.evaluate)
    if config.data.per_rank_batch_size is not None or config.data.accumulate != 1:
        raise ValueError(
            "data.per_rank_batch_size and data.accumulate belong to the cells: set per_rank_batch_sizes=[...], and "
            "data.global_batch_size for the images of one step"
        )


def _arm(arm: str, shared: Sequence[str]) -> Any:
    """Return the group of an arm that synchronizes ("world" for all ranks), None for the others."""
    choices = GlobalHydra.instance().config_loader().get_group_options("norm")
    if arm not in choices:
        raise ValueError(f"unknown arm {arm!r}: expected files of conf/norm, which are {', '.join(sorted(choices))}")
    norm = compose("train", [*shared, f"+norm={arm}"]).norm
    return (norm.get("process_group") or "world") if norm.get("norm") == "syncbn" else None


def _group_problem(arm: str, group: Any, world_size: int) -> str | None:
    if not isinstance(group, int) or world_size % group == 0:
        return None
    choices = [n for n in range(1, world_size + 1) if world_size % n == 0]
    return f"{arm}: groups of {group} ranks do not divide world size {world_size}; choose one of {choices}"


def _batch_problem(global_batch_size: int, per_rank: int, world_size: int) -> str:
    reachable = [n for n in range(1, global_batch_size + 1) if global_batch_size % (n * world_size) == 0]
    hint = f"per-rank batches that can: {reachable}" if reachable else "no per-rank batch can"
    return (
        f"{per_rank} images x {world_size} ranks cannot be accumulated to data.global_batch_size={global_batch_size}; "
        f"{hint} (or isolate=linear, sqrt or none, which do not accumulate)"
    )


def _overrides(
    config: DictConfig,
    shared: Sequence[str],
    arm: str,
    per_rank: int,
    world_size: int,
    group_size: int | str | None,
    seed: int,
    accumulate: int,
) -> Iterator[str]:
    yield from shared
    yield f"+norm={arm}"
    if group_size is not None:
        yield f"norm.process_group={group_size}"
    yield f"seed={seed}"
    yield f"data.per_rank_batch_size={per_rank}"
    yield f"data.accumulate={accumulate}"
    if config.isolate != "accumulate":
        yield f"task.lr_rule={'constant' if config.isolate == 'none' else config.isolate}"
    yield f"evaluate=[{','.join(config.evaluate)}]"
    if config.engine == "simulate":
        yield f"simulate={world_size}"
        if config.node_size is not None:
            yield f"node_size={config.node_size}"
