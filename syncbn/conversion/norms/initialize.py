"""Data-dependent initialization of weight normalization: the only part of it that looks at a batch."""

import sys
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...distributed.exchange import all_reduce, group_of
from ...distributed.groups import GroupSpec
from ...nn.affine import ChannelBias
from ...ops.reference import forward_reduce, moments
from ..original import original_of
from .parametrized import NormalizedWeight

M = TypeVar("M", bound=nn.Module)
_Pair = tuple[str, nn.Module]  # the name of a parametrized layer, and what its BatchNorm became


def initialize_weight_norm(model: M, batch: Any) -> M:
    """Give every layer that ``convert(model, "wn")`` normalized the scale and bias that this batch asks for.

    In one forward pass without gradients, layer by layer as they run: with t the output of the parametrized layer, and
    its mean and biased variance per channel over the batch on all ranks, ``g <- g / std`` and ``bias <- -mean / std``,
    so that the layer and its bias give mean 0 and variance 1; the pass goes on with that. Where the BatchNorm was not
    directly behind the layer, as in ``norm(x + conv(h))``, that holds for ``conv(h)`` and not for the sum. v takes the
    weight's value, ``|v| = g``, so that the direction learns at the rate of a weight: the gradient of a shorter v is
    larger. With ``mean_only`` the mean is subtracted anyway, and only g and v are set. A channel that does not vary
    keeps its g. A layer that runs twice is set by its first run. Modes of modules are used as they are; buffers and
    the random state are put back. Compiled modules run eagerly. Call it before the first step, on real data; a
    checkpoint that is loaded later overwrites it.

    Collectives: those of the model, then one exchange of 2C + 1 numbers over the world for each layer: all ranks get
    the same values, those of one process with the joined batch, for any split of it, also with empty ranks. Source:
    Salimans & Kingma 2016, arXiv 1602.07868, section 3.

    Args:
        model: Converted, the same on all ranks.
        batch: This rank's part of the batch; called as ``model(batch)``.

    Returns:
        ``model`` itself; with a warning if there is no such layer, or if one did not run.

    Raises:
        ValueError: On every rank alike, before anything is changed, if no rank has a value.
    """
    waiting = {
        companion.module: (companion.row.name, layer)
        for layer in model.modules()
        for companion in getattr(original_of(layer), "companions", ())
        if isinstance(companion, NormalizedWeight)
    }
    if not waiting:
        warnings.warn("syncbn.initialize_weight_norm found no layer of norm 'wn'.", stacklevel=2)
        return model
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    hook = partial(_initialize, waiting)
    hooks = [layer.register_forward_hook(hook, prepend=True, with_kwargs=True) for layer in waiting]
    eagerly = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with torch.no_grad(), torch.random.fork_rng(list(devices)), eagerly:
            model(batch)
    finally:
        for handle in hooks:
            handle.remove()
        for buffer, value in buffers:
            buffer.copy_(value)
    if waiting:
        names = ", ".join(name for name, _ in waiting.values())
        warnings.warn(f"syncbn.initialize_weight_norm left {names} as they were: they did not run.", stacklevel=2)
    return model


def _initialize(
    waiting: dict[nn.Module, _Pair], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """Set g and bias of a layer that runs for the first time, and run it again; a forward hook."""
    if layer not in waiting:
        return None
    name, norm = waiting.pop(layer)
    mean, std = _mean_std(output.movedim(-1, 1) if isinstance(layer, nn.Linear) else output, name)
    g, v = layer.parametrizations.weight.parameters()
    g.div_(std.view_as(g))
    v.copy_(layer.weight)
    if isinstance(norm, ChannelBias) and norm.bias is not None:
        own = 0 if layer.bias is None else layer.bias.double()
        norm.bias.copy_(-((mean - own) / std + own))
    again: Tensor = layer.forward(*args, **kwargs)
    return again


def _mean_std(t: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Compute mean and biased deviation per channel over all ranks, float64; 1 for a channel that does not vary."""
    summed = all_reduce(forward_reduce(t), group_of(GroupSpec(None), name), name, "initialization")
    if not summed[-1]:
        raise ValueError("initialize_weight_norm: expected a batch on at least one of the ranks, got none on any.")
    mean, sqdev = moments(summed)
    var, rounding = sqdev / summed[-1], 4 * torch.finfo(t.dtype).eps
    return mean, torch.where(var > rounding**2 * (var + mean.square()), var.sqrt(), 1)
