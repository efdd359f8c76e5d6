"""The cells of a comparison: arms x batch sizes x world sizes x group sizes x seeds, checked before any runs."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiment.evaluate import check_modes

AXES = ("arms", "per_rank_batch_sizes", "world_sizes", "group_sizes", "seeds")
ENGINES = ("simulate", "torchrun")
ISOLATE = ("accumulate", "linear", "sqrt", "none")
GROUPS = ("data", "model", "task", "trainer", "logger")  # whose overrides go to every cell
OTHERS = ("engine", "isolate", "node_size", "evaluate", "jobs", "output_dir")


@dataclass(frozen=True)
class Cell:
    """One run of launch/train.py: its coordinates in the grid, and its overrides."""

    arm: str
    per_rank_batch_size: int
    world_size: int
    group_size: int | str | None
    seed: int
    accumulate: int
    overrides: tuple[str, ...]
    norm: dict[str, Any] = field(default_factory=dict, compare=False)  # what the arm's file says

    @property
    def label(self) -> str:
        """Name the curve that this cell belongs to."""
        return self.arm if self.group_size is None else f"{self.arm}, groups of {self.group_size}"

    @property
    def id(self) -> str:
        """Name the cell in the results, and its folder."""
        group = "" if self.group_size is None else f"-g{self.group_size}"
        return f"{self.arm}{group}-w{self.world_size}-p{self.per_rank_batch_size}-s{self.seed}"

    def coordinates(self) -> dict[str, Any]:
        """Return the coordinates, named as in a row of the results."""
        names = ("arm", "label", "per_rank_batch_size", "world_size", "group_size", "seed", "accumulate", "norm")
        return {"cell": self.id, **{name: getattr(self, name) for name in names}}


def shared_overrides(overrides: Sequence[str], folders: Sequence[str] = ()) -> list[str]:
    """Pick the overrides of the command line that every cell gets: those of the groups of launch/train.py.

    Args:
        overrides: Of the command line.
        folders: More folders with configurations, such as the user's own arms.
    """
    search = [f"hydra.searchpath=[{','.join(map(quoted, folders))}]"] if folders else []
    return search + [o for o in overrides if re.split("[=.@]", o.lstrip("+~"), maxsplit=1)[0] in GROUPS]


def quoted(text: str) -> str:
    """Quote a string for Hydra's grammar, where a backslash counts only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def make_cells(config: DictConfig, shared: Sequence[str]) -> list[Cell]:
    """Lay out the grid, the seeds one after another, so that early results already show all lines.

    Raises:
        ValueError: an empty axis, an unknown arm, engine or setting; a batch that accumulation cannot reach; groups
            that do not divide the ranks. All of them are listed.
    """
    _check_settings(config)
    norms = {arm: _norm(arm, shared) for arm in config.arms}
    cells, problems = list[Cell](), list[str]()
    axes = (config.seeds, config.world_sizes, config.per_rank_batch_sizes, norms)
    for seed, world_size, per_rank, arm in itertools.product(*axes):
        accumulate = 1 if config.isolate != "accumulate" else config.data.global_batch_size // (per_rank * world_size)
        synchronizes = norms[arm].get("norm") == "syncbn"
        for group_size in config.group_sizes if synchronizes else [None]:
            norm = norms[arm] if group_size is None else {**norms[arm], "process_group": group_size}
            point = (arm, per_rank, world_size, group_size, seed, accumulate)
            cells.append(Cell(*point, tuple(_overrides(config, shared, *point)), norm))
            problems += _problems(config, cells[-1])
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
    unknown = [str(name) for name in config if name not in (*AXES, *GROUPS, *OTHERS)]
    if unknown:
        raise ValueError(
            f"no setting of a comparison: {', '.join(unknown)}. Expected {', '.join((*AXES, *OTHERS))}, or one of "
            f"{', '.join(GROUPS)}; another norm is another file in conf/norm, and then in arms=[...]"
        )
    for axis in (*AXES, "evaluate"):
        values = config[axis]
        if not OmegaConf.is_list(values) or not len(values):
            raise ValueError(f"the grid is empty: expected {axis} to be a list of at least one value, got {values!r}")
    for name, choices in (("engine", ENGINES), ("isolate", ISOLATE)):
        if config[name] not in choices:
            raise ValueError(f"expected {name} to be one of {', '.join(choices)}, got {config[name]!r}")
    check_modes(config.evaluate)
    _check_numbers(config)
    if config.data.per_rank_batch_size is not None or config.data.accumulate != 1:
        raise ValueError(
            "data.per_rank_batch_size and data.accumulate belong to the cells: set per_rank_batch_sizes=[...], and "
            "data.global_batch_size for the images of one step"
        )


def _check_numbers(config: DictConfig) -> None:
    for axis in ("per_rank_batch_sizes", "world_sizes", "seeds"):
        least = 0 if axis == "seeds" else 1
        wrong = [value for value in config[axis] if not _is_whole(value, least)]
        if wrong:
            raise ValueError(f"expected whole numbers in {axis}, at least {least}, got {wrong}")
    wrong = [size for size in config.group_sizes if size not in (None, "node") and not _is_whole(size)]
    if wrong:
        raise ValueError(f"expected group_sizes to be numbers of ranks, node, or null for the arm's own, got {wrong}")
    if not _is_whole(config.data.global_batch_size):
        got = config.data.global_batch_size
        raise ValueError(f"expected data.global_batch_size to be a whole number of at least 1, got {got!r}")
    if config.node_size is not None and (config.engine != "simulate" or not _is_whole(config.node_size)):
        raise ValueError(
            "expected node_size to be a number of ranks, at least 1, and with engine=simulate alone: real ranks are "
            f"on the node they are on; got {config.node_size!r} with engine={config.engine}"
        )


def _is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _norm(arm: str, shared: Sequence[str]) -> dict[str, Any]:
    """Read the file of an arm."""
    choices = GlobalHydra.instance().config_loader().get_group_options("norm", overrides=[*shared])
    if arm not in choices:
        raise ValueError(f"unknown arm {arm!r}: expected files of conf/norm, which are {', '.join(sorted(choices))}")
    norm = OmegaConf.to_container(compose("train", [*shared, f"+norm={arm}"]).norm)
    assert isinstance(norm, dict)
    return {str(key): value for key, value in norm.items()}


def _problems(config: DictConfig, cell: Cell) -> Iterator[str]:
    group = cell.norm.get("process_group") if cell.norm.get("norm") == "syncbn" else None
    if group == "node":
        group = config.node_size
    if isinstance(group, int) and (not _is_whole(group) or cell.world_size % group):
        choices = [n for n in range(1, cell.world_size + 1) if cell.world_size % n == 0]
        yield f"{cell.arm}: groups of {group} do not divide {cell.world_size} ranks; choose one of {choices}"
    size, step = config.data.global_batch_size, cell.per_rank_batch_size * cell.world_size
    if config.isolate == "accumulate" and size % step:
        reachable = [n for n in range(1, size + 1) if size % (n * cell.world_size) == 0]
        hint = f"per-rank batches that can: {reachable}" if reachable else "no per-rank batch can"
        yield (
            f"{cell.per_rank_batch_size} images x {cell.world_size} ranks cannot be accumulated to "
            f"data.global_batch_size={size}; {hint} (or isolate=linear, sqrt or none, which do not accumulate)"
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
