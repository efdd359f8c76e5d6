"""The cells of a comparison: arms x batch sizes x world sizes x group sizes x seeds, checked before any runs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiment.comparison import grid_checks
from experiment.comparison.cell import Cell, is_batch_free
from experiment.comparison.overrides import GROUPS, value_text
from experiment.comparison.selection import ArmSelection

Norm = dict[str, Any]


def make_cells(config: DictConfig, shared: Sequence[str]) -> list[Cell]:
    """Lay out the grid, the seeds one after another, so that early results already show all lines.

    An arm whose norm does not use the batch runs once per seed and world size, if the SGD batch is the same at every
    per-rank batch size.

    Raises:
        ValueError: an empty axis, an unknown arm, engine or setting; a batch that accumulation cannot reach; groups
            that do not divide the ranks. All of them are listed.
    """
    grid_checks.check_settings(config)
    norms = {arm: _norm(arm, shared) for arm in config.arms}
    grid_checks.check_arms(config, norm_files(shared))
    cells, problems = list[Cell](), list[str]()
    axes = (config.seeds, config.world_sizes, config.per_rank_batch_sizes, norms)
    for seed, world_size, per_rank, arm in itertools.product(*axes):
        synchronizes = norms[arm].get("norm") == "syncbn"
        for group_size in config.group_sizes if synchronizes else [None]:
            cells.append(_cell(config, shared, norms[arm], arm, per_rank, world_size, group_size, seed))
            problems += grid_checks.problems(config, cells[-1])
    if problems:
        raise ValueError("\n  ".join(["the grid has cells that cannot be run:", *dict.fromkeys(problems)]))
    return list({cell.id: cell for cell in cells}.values())  # of an arm that runs once, at the last batch size


def make_selections(config: DictConfig, shared: Sequence[str]) -> list[ArmSelection]:
    """Prepare the choice of every arm's learning rate; none without `select_lr`.

    Raises:
        ValueError: the batch of the selection cannot be accumulated.
    """
    select = config.select_lr
    if select is None:
        return []
    point = (select.per_rank_batch_size, config.world_sizes[0], None, select.seed)
    cells = [_cell(config, shared, _norm(arm, shared), arm, *point) for arm in dict.fromkeys(config.arms)]
    problems = [problem for cell in cells for problem in grid_checks.problems(config, cell)]
    if problems:
        raise ValueError("\n  ".join(["select_lr.per_rank_batch_size cannot be run:", *dict.fromkeys(problems)]))
    return [ArmSelection(select, config.task.lr, config.evaluate[0], cell) for cell in cells]


def with_choice(cell: Cell, choice: Mapping[str, Any]) -> Cell:
    """Give a cell the learning rate and options that were chosen for its arm."""
    options = choice["options"]
    overrides = [f"task.lr={choice['lr']:g}", *(f"++norm.{k}={value_text(v)}" for k, v in options.items())]
    return replace(
        cell,
        overrides=(*cell.overrides, *overrides),
        selection=dict(choice),
    )


def base_config(config: DictConfig, shared: Sequence[str]) -> dict[str, Any]:
    """Give what all cells have in common; results can be joined only if it is the same."""
    train = OmegaConf.to_container(compose("train", [*shared]), resolve=True)
    assert isinstance(train, dict)
    common = {str(group): train[group] for group in GROUPS if group != "logger"}
    common["data"].pop("cache_dir", None)  # where the same images lie
    settings = ("engine", "isolate", "node_size", "evaluate", "select_lr", "planned", "margin")
    return {**common, **{name: OmegaConf.to_container(config)[name] for name in settings}}  # type: ignore[index,call-overload]


def norm_files(shared: Sequence[str]) -> list[str]:
    """List the arms there are: the files of conf/norm, and of the user's own folders."""
    return GlobalHydra.instance().config_loader().get_group_options("norm", overrides=[*shared])


def _norm(arm: str, shared: Sequence[str]) -> Norm:
    """Read the file of an arm."""
    choices = norm_files(shared)
    if arm not in choices:
        raise ValueError(f"unknown arm {arm!r}: expected files of conf/norm, which are {', '.join(sorted(choices))}")
    norm = OmegaConf.to_container(compose("train", [*shared, f"+norm={arm}"]).norm)
    assert isinstance(norm, dict)
    return {str(key): value for key, value in norm.items()}


def _cell(
    config: DictConfig,
    shared: Sequence[str],
    norm: Norm,
    arm: str,
    per_rank: int,
    world_size: int,
    group_size: int | str | None,
    seed: int,
) -> Cell:
    accumulates = config.isolate == "accumulate"
    accumulate = config.data.global_batch_size // (per_rank * world_size) if accumulates else 1
    point = (arm, per_rank, world_size, group_size, seed, accumulate)
    norm = norm if group_size is None else {**norm, "process_group": group_size}
    choices = [] if config.select_lr is None else config.select_lr.options.get(arm, [])
    once = accumulates and all(is_batch_free({**norm, **choice}) for choice in [{}, *choices])
    return Cell(*point, tuple(_overrides(config, shared, *point)), norm, once_per_seed=once)


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
