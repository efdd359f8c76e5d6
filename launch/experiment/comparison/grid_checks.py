"""Find mistakes in the settings of a comparison before anything runs."""

from collections.abc import Collection, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiment.comparison import selection_checks
from experiment.comparison.cell import Cell
from experiment.comparison.overrides import GROUPS
from experiment.evaluate import check_modes

AXES = ("arms", "per_rank_batch_sizes", "world_sizes", "group_sizes", "seeds")
OTHERS = ("engine", "isolate", "node_size", "evaluate", "select_lr", "planned", "margin", "jobs", "output_dir")
ENGINES = ("simulate", "torchrun")
ISOLATE = ("accumulate", "linear", "sqrt", "none")


def check_settings(config: DictConfig) -> None:
    """Refuse settings that no grid can have.

    Raises:
        ValueError: which, and what was expected.
    """
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
    if not selection_checks.is_positive(config.margin):
        raise ValueError(f"expected margin to be a fraction of error, above 0, got {config.margin!r}")


def check_arms(config: DictConfig, norms: Collection[str]) -> None:
    """Refuse names of arms that do not exist, in what is chosen and in what is tested.

    Raises:
        ValueError: which, and what was expected.
    """
    selection_checks.check(config, norms)
    planned = OmegaConf.to_container(config)["planned"]  # type: ignore[index,call-overload]
    pairs = planned if isinstance(planned, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(arm in norms for arm in pair) for pair in pairs):
        raise ValueError(
            f"expected planned to be a list of pairs of arms, such as [[bn, syncbn]], got {planned!r}; the arms are "
            f"{', '.join(sorted(norms))}"
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


def problems(config: DictConfig, cell: Cell) -> Iterator[str]:
    """Say why a cell cannot be run."""
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
