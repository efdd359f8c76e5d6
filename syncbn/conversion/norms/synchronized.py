"""Norms with a process group, made from a BatchNorm layer."""

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...nn.affine import ChannelBias, check_flag, tensor_of
from ...nn.evonorm_b0 import EvoNormB0
from ...nn.mean_only import MeanOnlyBatchNorm
from ...nn.renorm import NO_WARMUP, BatchRenorm
from ...nn.switchable import SwitchableNorm

if TYPE_CHECKING:
    from ..rules import Decision, Target


def batch_renorm(
    layer: _BatchNorm,
    r_max: float = 3.0,
    d_max: float = 5.0,
    warmup_steps: int = 5_000,
    r_ramp_steps: int = 35_000,
    d_ramp_steps: int = 20_000,
    momentum: float | None = None,
    process_group: Any = None,
) -> BatchRenorm:
    """Make a BatchRenorm; a ``momentum`` of None is the layer's own."""
    words: dict[str, Any] = {"warmup_steps": warmup_steps, "r_ramp_steps": r_ramp_steps, "d_ramp_steps": d_ramp_steps}
    momentum = layer.momentum if momentum is None else momentum
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once for a model: see `warn_of_no_warmup`
        return BatchRenorm(**_like(layer, process_group, momentum), r_max=r_max, d_max=d_max, **words)


def switchable_norm(layer: _BatchNorm, process_group: Any = None) -> SwitchableNorm:
    """Make a SwitchableNorm."""
    return SwitchableNorm(**_like(layer, process_group, layer.momentum))


def evonorm_b0(layer: _BatchNorm, eps: float = 1e-3, process_group: Any = None) -> EvoNormB0:
    """Make an EvoNormB0."""
    return EvoNormB0(layer, eps, _group_of(layer, process_group))


def weightnorm(layer: _BatchNorm, mean_only: bool = False, process_group: Any = None) -> nn.Module:
    """Make what is left of a BatchNorm when the weight of the layer before it has the scale: a bias per channel.

    Args:
        layer: The BatchNorm.
        mean_only: Whether to subtract the mean of the batch too, see `MeanOnlyBatchNorm`.
        process_group: Ranks that share the mean.

    Raises:
        ValueError: If ``process_group`` is given and nothing is to be shared.
    """
    check_flag(mean_only, "mean_only")
    if mean_only:
        return MeanOnlyBatchNorm(layer, _group_of(layer, process_group))
    if process_group is not None:
        raise ValueError("process_group belongs to mean_only=True: without it nothing is exchanged")
    return ChannelBias(layer)


def warn_of_no_warmup(root: nn.Module, decisions: "list[tuple[nn.Module, Decision]]", target: "Target") -> None:
    """Warn once of layers that become a BatchRenorm without a warm-up."""
    made = [decision.new for _, decision in decisions]
    if any(isinstance(new, BatchRenorm) and new.warmup_steps == 0 for new in made):
        warnings.warn(NO_WARMUP, stacklevel=4)  # at the caller of plan or convert


def _group_of(layer: _BatchNorm, given: Any) -> Any:
    """Return the process group that is given, or else that of ``layer``."""
    return getattr(layer, "group_spec", getattr(layer, "process_group", None)) if given is None else given


def _like(layer: _BatchNorm, process_group: Any, momentum: float | None) -> dict[str, Any]:
    """Return the constructor's arguments of a layer like ``layer``, in its process group if none is given."""
    like = tensor_of(layer)
    return {
        "num_features": layer.num_features,
        "eps": layer.eps,
        "momentum": momentum,
        "affine": layer.affine,
        "bias": layer._parameters.get("bias") is not None,
        "track_running_stats": layer.running_mean is not None,
        "process_group": _group_of(layer, process_group),
        "device": like.device,
        "dtype": like.dtype,
    }
