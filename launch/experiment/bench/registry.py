"""The parts of a benchmark: for each, the function that measures and the one that makes its tables."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from experiment.bench import collectives, contenders, layer, memory, save_memory, training_step
from experiment.bench.scaling import measure, tables
from experiment.bench.tables import Table

Row = dict[str, Any]


class Part(NamedTuple):
    """``measure`` returns rows that JSON can hold; ``tabulate`` lays them out."""

    measure: Callable[[DictConfig], list[Row]]
    tabulate: Callable[[Sequence[Row]], list[Table]]


PARTS = {
    "layer": Part(layer.measure, layer.tabulate),
    "step": Part(training_step.measure, training_step.tabulate),
    "collectives": Part(collectives.measure, collectives.tabulate),
    "memory": Part(memory.measure, memory.tabulate),
    "save_memory": Part(save_memory.measure, save_memory.tabulate),
    "scale": Part(measure.measure, tables.tabulate),
}


def check(config: DictConfig) -> None:
    """Refuse what cannot run, before anything is measured.

    Raises:
        ValueError: For an unknown part or contender, with the choices; for a GPU that is not there.
    """
    unknown = [name for name in config.parts if name not in PARTS]
    if unknown:
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    for part in config.parts:
        for key in ("contenders", "step_contenders"):
            contenders.check(config[part].get(key, ()), may_be_compiled=part in ("layer", "step"))
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: expected a GPU, found none; use device=cpu")
