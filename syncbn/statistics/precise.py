"""Population statistics: what evaluation normalizes with, recomputed over many batches and all ranks.

The running statistics of training are a moving average over weights that have changed since, and in data-parallel
training with plain BatchNorm they are those of one rank. Wu & Johnson 2021 ("Rethinking Batch in BatchNorm"),
section 3, compare them with the statistics computed here.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..nn.batchnorm import SyncBatchNorm
from ..nn.renorm import BatchRenorm
from ..ops.reference import forward_reduce, moments
from ..plain.batch import local_sums
from ..plain.mask import check_mask, weights_of
from .buffers import layers_with_statistics, statistics_of, sum_over_ranks, write
from .freeze import MODE_WHEN_UNFROZEN

M = TypeVar("M", bound=nn.Module)
BEFORE_WARMUP = -(2**53)  # on the clock of a BatchRenorm: for as long as one runs, it normalizes as BatchNorm


def update_bn_stats(model: M, batches: Iterable[Any], *, forward: Callable[[M, Any], Any] | None = None) -> M:
    """Replace the running statistics of every BatchNorm layer by those of its input over ``batches`` and all ranks.

    The batches run in train mode without gradients, each layer normalizing with its own batch statistics. Then, with
    n input values per channel over all batches and ranks, ``running_mean = sum / n`` and
    ``running_var = (sqsum / n - mean**2) * n / (n - 1)``, the pooled variance: within plus between batches. Computed
    in float64; a layer called several times pools its calls, and one called with a mask its valid positions. For
    SyncBatchNorm the result depends on the global batches only, not on the number of ranks. Source: Wu & Johnson
    2021, section 3.

    Any subclass of ``_BatchNorm`` with running statistics takes part, if it is in train mode: a ``model`` in eval mode
    is put into train mode as a whole; of one in train mode, the parts in eval mode stay so. Frozen layers
    (`syncbn.freeze`) and layers that no batch reaches on any rank keep their statistics. All other buffers (such as
    ``num_batches_tracked``) and all modes are afterwards as before, also after an exception. Dropout is active, so
    the random state moves. Compiled modules run eagerly.

    Collectives: those of the model in training, for which all ranks must bring equally many batches (plain BatchNorm
    needs not), then one exchange over the world for all layers, of 2C + 1 numbers each: also with subgroups, so all
    ranks end with equal statistics.

    Args:
        model: The same model on every rank; one in DistributedDataParallel runs unwrapped.
        batches: This rank's batches, as in training, as many as shall count: a tensor is the input of the model, of a
            tuple or list the first item is; tensors are moved to the model's device.
        forward: Called as ``forward(model, batch)`` instead.

    Returns:
        ``model`` itself; with a warning, and without running a batch, if there is no layer to update.

    Raises:
        ValueError: For a lazy layer; if a batch is of another kind and ``forward`` is not given; for an input of
            other channels than the layer's; on every rank alike, if no rank has a batch.
    """
    found = layers_with_statistics(model)
    with _kept(model):
        if not model.training:
            model.train()
        layers = {name: layer for name, layer in found.items() if layer.training}
        for layer in layers.values():
            if isinstance(layer, BatchRenorm):
                layer.num_batches_tracked.fill_(BEFORE_WARMUP)
        sums = {name: _zeros(layer) for name, layer in layers.items()}
        num_batches = _measure(model, layers, sums, batches, forward or run_first) if layers else 0
    if not layers:
        warnings.warn("syncbn.update_bn_stats found no BatchNorm layer in train mode to update.", stacklevel=2)
        return model
    first = next(iter(sums.values()))
    *totals, num_batches_of_all = sum_over_ranks(
        "update_bn_stats", [*sums.values(), first.new_full((1,), num_batches)]
    )
    if num_batches_of_all == 0:
        raise ValueError("update_bn_stats: expected at least one batch on one of the ranks, got none on any.")
    for layer, total in zip(layers.values(), totals, strict=True):
        count, (mean, sqdev) = total[-1], moments(total)
        if count > 0:
            write(layer, mean, sqdev / (count - 1).clamp(min=1))
    return model


def run_first(model: nn.Module, batch: Any) -> Any:
    """Run ``model`` on a tensor, or on the first item of a tuple or list."""
    x = first_of(batch)
    if isinstance(x, Tensor):
        x = x.to(next(model.buffers()).device)  # there are running statistics
    return (model.module if isinstance(model, DistributedDataParallel) else model)(x)


def first_of(batch: Any) -> Any:
    """Return a tensor itself, of a tuple or list the first item; refuse any other batch."""
    if not isinstance(batch, Tensor | tuple | list) or (isinstance(batch, tuple | list) and not batch):
        raise ValueError(
            "update_bn_stats: expected every batch to be a tensor, or a tuple or list that begins with the input, got "
            f"{'nothing in a ' if batch == () or batch == [] else ''}{type(batch).__name__}; pass forward, called as "
            "forward(model, batch)."
        )
    return batch if isinstance(batch, Tensor) else batch[0]


def _measure(
    model: M,
    layers: dict[str, _BatchNorm],
    sums: dict[str, Tensor],
    batches: Iterable[Any],
    forward: Callable[[M, Any], Any],
) -> int:
    """Run the batches, add what each layer receives to its sums, and count the batches."""
    hooks = [
        layer.register_forward_pre_hook(partial(_add_input, name, sums[name]), with_kwargs=True)
        for name, layer in layers.items()
    ]
    num_batches = 0
    try:
        with torch.no_grad(), _eagerly():
            for batch in batches:
                forward(model, batch)
                num_batches += 1
    finally:
        for hook in hooks:
            hook.remove()
    return num_batches


def _add_input(name: str, sums: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x, num_features = args[0] if args else kwargs.get("input", next(iter(kwargs.values()))), len(sums) // 2
    if x.dim() < 2 or x.shape[1] != num_features:
        raise ValueError(
            f"update_bn_stats: expected an input (N, {num_features}, *) for the {type(layer).__name__} {name!r}, "
            f"got {tuple(x.shape)}; freeze or eval() the layer to leave it out."
        )
    mask = (args[1] if len(args) > 1 else kwargs.get("mask")) if isinstance(layer, SyncBatchNorm) else None
    if mask is not None:
        check_mask(mask, x)
    packed = forward_reduce(x) if mask is None else local_sums(x, weights_of(mask, x))[0]
    sums += packed.to(sums.device)


def _zeros(layer: _BatchNorm) -> Tensor:
    mean = statistics_of(layer)[0]
    return torch.zeros(2 * len(mean) + 1, dtype=torch.float64, device=mean.device)  # sum, sqsum, count


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Leave modes and buffers as they were, frozen layers' mode when unfrozen included."""
    modules = list(model.modules())
    names = ("training", MODE_WHEN_UNFROZEN)
    modes = [(module, name, getattr(module, name)) for module in modules for name in names if hasattr(module, name)]
    buffers = [
        (module, name, b, b.clone()) for module in modules for name, b in module._buffers.items() if b is not None
    ]
    try:
        yield
    finally:
        for module, name, mode in modes:
            setattr(module, name, mode)
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _eagerly() -> AbstractContextManager[Any]:
    """Let nothing run compiled: compiled code does not see new hooks."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
