"""Make the rows of the table: counts, measured errors and notes of one normalization layer each."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..conversion.third_party import is_frozen_layer
from ..distributed.groups import GroupSpec
from ..distributed.subgroups import check_size
from ..nn.batchnorm import SyncBatchNorm
from ..nn.evonorm_b0 import EvoNormB0
from ..nn.frozen import FrozenStatistics
from .probe import ImageMoments

_Sync = SyncBatchNorm | nn.SyncBatchNorm
# A variance below this part of the mean square is the rounding noise of a constant: float32 has 1e-7, squared 1e-14.
_CONSTANT = 1e-12


class AuditRow(NamedTuple):
    """One normalization layer; None where a number does not apply or could not be measured.

    ``count`` and ``group_count`` are values per channel, on one rank and over its group; ``error`` is the relative
    error of the batch variance on one rank, ``bound`` is ``sqrt(2 / count)``, ``group_error`` the error over the
    group: ``error / sqrt(ranks)`` if ``is_estimate``.
    """

    name: str
    kind: str
    num_features: int
    count: int | None = None  # type: ignore[assignment]  # a field here, not tuple.count
    group_count: int | None = None
    error: float | None = None
    bound: float | None = None
    group_error: float | None = None
    is_estimate: bool = False
    note: str = ""


def num_features(layer: nn.Module) -> int:
    """Count the channels of a normalization layer; 0 for any other module."""
    if isinstance(layer, EvoNormB0) and layer.v is None:
        return 0  # weight and bias alone
    if isinstance(layer, _BatchNorm | _InstanceNorm):
        return layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return math.prod(layer.normalized_shape)
    if _is_always_frozen(layer):
        statistics: Any = layer.running_mean
        return len(statistics)
    return 0


def group_size(layer: nn.Module, world_size: int) -> int:
    """Count the ranks that share the statistics of ``layer``, or would if it were synchronized.

    Raises:
        ValueError: If they do not fill the world.
    """
    if not isinstance(layer, _Sync):
        return world_size
    spec = layer.group_spec if isinstance(layer, SyncBatchNorm) else GroupSpec(layer.process_group)
    if spec.ranks is not None:
        return len(spec.ranks)
    if isinstance(spec.value, int):
        check_size(spec.value, world_size)
        return min(spec.value, world_size)
    return world_size if spec.value is None or isinstance(spec.value, str) else spec.value.size()


def make_row(
    name: str, layer: nn.Module, inputs: list[ImageMoments | None] | None, size: int, num_ranks: int
) -> AuditRow:
    """Make the row of a layer.

    Args:
        name: The layer's name in the model.
        layer: The layer.
        inputs: What it read in each call; None if it does not use batch statistics.
        size: Images per rank.
        num_ranks: Ranks in its group.
    """
    row = AuditRow(name or "(the model)", type(layer).__name__, num_features(layer))
    if inputs is None:
        is_frozen = isinstance(layer, _BatchNorm) or _is_always_frozen(layer)
        return row._replace(note="frozen" if is_frozen else "")
    calls = [call for call in inputs if call is not None]
    if not inputs or len(calls) < len(inputs):
        why = "not measured: the rows of its input are no multiple of the images"
        return row._replace(note=why if inputs else "not called in this forward")
    count = min(call.count for call in calls) * size
    error, group_error = relative_error(calls, size), relative_error(calls, size * num_ranks)
    is_estimate = error is not None and group_error is None
    if error is not None and group_error is None:
        group_error = error / math.sqrt(num_ranks)
    note = _note(layer, calls, size, count, count * num_ranks)
    bound = math.sqrt(2 / count) if count > 1 else None
    row = row._replace(count=count, group_count=count * num_ranks, error=error, bound=bound)
    return row._replace(group_error=group_error, is_estimate=is_estimate, note=note)


def relative_error(calls: list[ImageMoments], size: int) -> float | None:
    """Measure the relative error of the variance of ``size`` images, the root mean square over channels and calls.

    ``std(var of the parts) / mean(var of the parts)`` per channel, over the channels that vary within parts. None if
    there are fewer than two parts, or no such channel.
    """
    errors = []
    for call in calls:
        if len(call.mean) < 2 * size:
            return None
        part_var = _part_var(call, size)
        varies = _varies(part_var.mean(0), call)
        errors.append((part_var.std(0) / part_var.mean(0))[varies])
    error = torch.cat(errors)
    return error.square().mean().sqrt().item() if len(error) else None


def _part_var(call: ImageMoments, size: int) -> Tensor:
    """Compute the variance of each part, ``(num_parts, C)``: the mean within its images, and that between them."""
    num_parts = len(call.mean) // size
    mean, var = (m[: num_parts * size].view(num_parts, size, len(m[0])) for m in (call.mean, call.var))
    return var.mean(1) + mean.var(1, correction=0)


def _varies(var: Tensor, call: ImageMoments) -> Tensor:
    return var > _CONSTANT * (call.var + call.mean.square()).mean(0)


def _note(layer: nn.Module, calls: list[ImageMoments], size: int, count: int, group_count: int) -> str:
    """Say what is special: one value per channel, channels constant within a rank's images, several calls."""
    notes = []
    if group_count == 1:
        notes.append("cannot be normalized: 1 value per channel, over the group too")
    elif count == 1:
        cannot = "" if isinstance(layer, _Sync) else "cannot be normalized: "
        notes.append(f"{cannot}1 value per channel on one rank; over the group {group_count} values")
    else:
        num_constant = max(_num_constant_in_parts(call, size) for call in calls)
        if num_constant:
            notes.append(f"{num_constant} of {len(calls[0].mean[0])} channels are constant on every rank")
    if len(calls) > 1:
        notes.append(f"called {len(calls)} times")
    return "; ".join(notes)


def _num_constant_in_parts(call: ImageMoments, size: int) -> int:
    """Count the channels that vary over the batch, but on no rank: a plain BatchNorm erases them."""
    whole = _part_var(call, len(call.mean))[0]
    return int((_varies(whole, call) & ~_varies(_part_var(call, size).mean(0), call)).sum())


def _is_always_frozen(layer: nn.Module) -> bool:
    """Whether ``layer`` is a FrozenBatchNorm2d of any package, or what norm "frozen" makes."""
    return is_frozen_layer(layer) or isinstance(layer, FrozenStatistics)
