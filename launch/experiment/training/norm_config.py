"""The norm of a run, from one file of conf/norm: what the model's BatchNorm layers are converted to."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import syncbn
from experiment.training.instantiate import instantiate
from experiment.training.sharding import BatchPlan
from syncbn.distributed.subgroups import check_size
from syncbn.lightning import NormConverter


def make_converter(norm: DictConfig | None, num_forwards: int | None = None) -> L.Callback | None:
    """Make the callback that converts the model; None leaves it as written.

    `_target_` names a callback (`syncbn.lightning.NormConverter` in the files of conf/norm, or a subclass of it), or a
    norm of the user's own: a class or function that makes a module from `num_features` and the file's other keys.
    Keys that end in `_steps` may be fractions of `num_forwards`, see `count_forwards`.

    Raises:
        ValueError: fractions of a number that is not known.
    """
    if norm is None:
        return None
    norm = _whole_steps(norm, num_forwards)
    target = get_object(norm["_target_"])
    if isinstance(target, type) and issubclass(target, L.Callback):
        callback: L.Callback = instantiate(norm)
        return callback
    kwargs: dict[str, Any] = {k: v for k, v in OmegaConf.to_object(norm).items() if k != "_target_"}  # type: ignore[union-attr,misc]
    return NormConverter(partial(target, **kwargs) if kwargs else target)


def count_forwards(trainer: DictConfig, num_images: int, plan: BatchPlan) -> int | None:
    """Count the training forwards of one rank in the run that is planned; None if it is not limited.

    Accumulated batches are forwards of their own, also where ranks are simulated.
    """
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    limits = [steps] if steps is not None and steps >= 0 else []
    if epochs is not None and epochs >= 0:
        limits.append(epochs * (num_images // plan.global_batch_size))
    return min(limits) * plan.accumulate if limits else None


def _whole_steps(norm: DictConfig, num_forwards: int | None) -> DictConfig:
    parts = {k: v for k, v in norm.items() if str(k).endswith("_steps") and isinstance(v, float) and 0 < v < 1}
    if not parts:
        return norm
    if num_forwards is None:
        wanted = "whole numbers, or trainer.max_epochs or trainer.max_steps to take parts of"
        raise ValueError(f"norm: expected {wanted}, got {parts}")
    whole = {key: max(1, round(part * num_forwards)) for key, part in parts.items()}
    return cast(DictConfig, OmegaConf.merge(norm, whole))


def apply(converter: L.Callback | None, model: nn.Module, world_size: int) -> None:
    """Convert `model` now, as the callback would later, so that errors appear before training.

    Raises:
        ValueError: as `syncbn.convert`; groups that do not divide `world_size`; a callback that is no NormConverter.
    """
    if converter is None:
        return
    if not isinstance(converter, NormConverter):
        raise ValueError(f"only a NormConverter can be applied ahead, got {type(converter).__name__}")
    size = converter.options["process_group"]
    if isinstance(size, int) and not isinstance(size, bool):
        check_size(size, world_size)
    syncbn.convert(model, converter.norm, **converter.options)


def initialize(converter: L.Callback | None, net: nn.Module, images: Callable[[], Tensor]) -> None:
    """Initialize what conversion made and only images can: the normalized weights of "wn", the same on all ranks."""
    if isinstance(converter, NormConverter) and converter.norm == "wn":
        syncbn.initialize_weight_norm(net, images())


def arm_of(norm: DictConfig | None) -> str:
    """Name the arm in a run's results: its file in conf/norm, where Hydra ran this program with one; else the norm."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return str(choices.get("norm") or name_of(norm))


def name_of(norm: DictConfig | None) -> str:
    """Name the norm, as a checkpoint records it."""
    if norm is None:
        return "as written"
    return str(norm.norm) if isinstance(norm.get("norm"), str) else str(norm["_target_"]).rpartition(".")[2]
