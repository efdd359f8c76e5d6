"""Audit a model before any training: how well its normalization layers know their statistics at a batch per rank."""

from typing import Any

from torch import Tensor, nn

from .probe import observe, unwrap
from .report import Audit, advise
from .rows import AuditRow, group_size, make_row, num_features

__all__ = ["Audit", "AuditRow", "audit"]


def audit(model: nn.Module, batch: Any, per_rank_batch_size: int, world_size: int) -> Audit:
    """Tabulate how well the normalization layers of ``model`` know their statistics at a batch per rank.

    The whole batch goes once through a copy of the model in training mode. A layer's input is cut into disjoint parts
    of ``per_rank_batch_size`` images, in order, and the error of its batch variance is
    ``std(var of the parts) / mean(var of the parts)`` per channel (unbiased std), then the root mean square over the
    channels that vary and over the layer's calls. n independent normal values have about ``sqrt(2 / n)``, the bound;
    pixels of one image are correlated, so the error is larger. The more parts, the surer it is (of k parts, at most
    ``sqrt(k)``). Over the group it is measured likewise if the batch holds two groups' images, else estimated as
    ``error / sqrt(ranks)``.

    The group of a plain BatchNorm is all ranks, as if it were synchronized; of a SyncBatchNorm its own ("node": all
    ranks). Each split of a GhostBatchNorm is taken for a rank. Of a layer called several times, the smallest count is
    shown. The bias of a convolution or linear layer is redundant if its output is read by a BatchNorm with batch
    statistics and by nothing else. Norms that are no subclass of torch's are not seen.

    Nothing is changed, torch's random state included. Collectives: none, so one rank alone may call it. Memory: the
    weights once more, the activations of the batch without gradients, two float64 numbers per image and channel.

    Args:
        model: A model, or one in DDP.
        batch: Images (dimension 0), or a tuple or list that begins with them, on the model's device.
        per_rank_batch_size: Images per rank in training.
        world_size: Ranks in training.

    Raises:
        ValueError: If a size is not a whole number of at least 1, or a layer's process group does not divide the
            world size; if ``batch`` is something else or holds less than one rank's images; for a lazy layer, and
            for a wrapper within the model. What the model's forward raises goes through.

    Source: the variance of the sample variance of n independent normal values is ``2 var ** 2 / (n - 1)``.

    Examples:
        >>> import torch, syncbn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = syncbn.audit(model, torch.randn(64, 3, 6, 6), per_rank_batch_size=2, world_size=8)
        >>> report.rows[0].count, report.rows[0].group_count, report.redundant_biases
        (32, 256, ['0.bias'])
        >>> print(report.advice)  # doctest: +ELLIPSIS
        Plain BatchNorm suffices: ...
    """
    images = _check(batch, per_rank_batch_size, world_size)
    model = unwrap(model)
    norms = {name: layer for name, layer in model.named_modules() if num_features(layer)}
    sizes = {name: group_size(layer, world_size) for name, layer in norms.items()}
    inputs, biases = observe(model, images)
    rows = [make_row(name, layer, inputs.get(name), per_rank_batch_size, sizes[name]) for name, layer in norms.items()]
    summary = (
        f"{len(rows)} normalization layers; per_rank_batch_size {per_rank_batch_size}, world_size {world_size}; "
        f"measured on {len(images)} images, {len(images) // per_rank_batch_size} parts"
    )
    advice = advise(rows, per_rank_batch_size, len(images))
    return Audit(rows, list(biases), sum(biases.values()), advice, summary)


def _check(batch: Any, per_rank_batch_size: int, world_size: int) -> Tensor:
    for word, size in (("per_rank_batch_size", per_rank_batch_size), ("world_size", world_size)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"audit: expected {word} to be a whole number of at least 1, got {size!r}.")
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or images.dim() == 0:
        got = type(batch).__name__ if images is batch else f"{type(batch).__name__} of {type(images).__name__}"
        raise ValueError(
            f"audit: expected batch to be a tensor of images, or a tuple or list that begins with one, got {got}."
        )
    if len(images) < per_rank_batch_size:
        raise ValueError(
            f"audit: expected at least the {per_rank_batch_size} images of one rank, got {len(images)}; "
            f"give {2 * per_rank_batch_size} or more, so that there are parts to compare."
        )
    return images
