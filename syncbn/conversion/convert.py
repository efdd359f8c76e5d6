"""Exchange the BatchNorm layers of a model, and give them back: plan(), convert() and revert() over one walk.

The order for a training script is: build the model, convert, then compile, shard or wrap, then make the optimizer.
"""

import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from ..distributed.groups import GroupSpec, ProcessGroupLike
from ..distributed.subgroups import make_groups
from ..memory.save import stop_saving
from ..nn.batchnorm import SyncBatchNorm, name_layers
from . import patches, replaced
from .companions import PlanRow
from .norms import registry
from .norms.registry import Norm
from .original import original_class, original_of
from .planning import decide_all
from .rules import CHANGES, Action, Decision, Target, apply
from .swap import PLAIN, restore, swap_to_batchnorm

M = TypeVar("M", bound=nn.Module)


def convert(
    module: M,
    norm: Norm = "syncbn",
    *,
    process_group: ProcessGroupLike = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    include_frozen: bool = False,
    **norm_kwargs: Any,
) -> M:
    """Exchange the BatchNorm layers of ``module`` in place: the same module and parameter objects, another norm.

    Converting twice changes nothing more, and `revert` undoes it. Collectives: where torch.distributed is initialized,
    the groups of an int or "node" are made here, so every rank must convert the same model.

    Args:
        module: A model, or a bare layer.
        norm: "syncbn" to synchronize, "bn" to stop synchronizing; "gn", "ln" or "in" for group, layer or instance
            normalization; "frozen" for the statistics the layer has, never moving; "none" for weight and bias alone;
            others, see docs/norms.md ("brn", "sn", "gn_ws", "wn", "fixup", "frn", "evonorm_s0", "evonorm_b0");
            or a norm of your own: a class or function, called as ``norm(num_features, **norm_kwargs)``, that makes
            an nn.Module. Parameters and buffers of one name and shape in both stay the layer's; eps is its own.
        process_group: Ranks that share statistics, as in SyncBatchNorm; None keeps what a layer has.
        include: Patterns (as in fnmatch) of layer names to convert; all, if empty.
        exclude: Patterns of layer names to leave alone.
        include_frozen: Whether FrozenBatchNorm2d layers are converted too; their weight and bias become parameters.
        **norm_kwargs: The norm's own keyword arguments, such as ``num_groups`` of "gn" (32).

    Returns:
        ``module`` itself.

    Raises:
        ValueError: Before anything is touched: an unknown norm, unusable ``norm_kwargs`` or ``process_group``; a lazy
            or parametrized layer; "frozen" for a layer without running statistics; what your own norm raises (also a
            TypeError); a model already wrapped, sharded or compiled, unless nothing is left to convert.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> model = convert(torch.nn.Sequential(torch.nn.BatchNorm2d(4)), partial(torch.nn.GroupNorm, 2))
        >>> type(model[0]).__name__, type(revert(model)[0]).__name__
        ('GroupNorm', 'BatchNorm2d')
    """
    target = _target(norm, process_group, include_frozen, norm_kwargs)
    decisions = decide_all(module, target, include, exclude)
    name, actions = registry.name_of(norm), {decision.action for _, decision in decisions}
    if actions & (CHANGES | {Action.REFUSE}):  # else nothing is left to do
        refused = [d.row for _, d in decisions if d.action in (Action.REFUSE, Action.REFUSE_WRAPPER)]
        if refused:
            errors = [f"  {row.name or '(the module itself)'}: {row.reason}" for row in refused]
            raise ValueError("\n".join([f"syncbn.convert: nothing was converted to {name!r}.", *errors]))
    if target.spec is not None:
        make_groups([target.spec])
    for layer, decision in decisions:
        apply(decision, layer, target)
    name_layers(module)
    replaced.watch(module)
    make_groups(layer.group_spec for layer in module.modules() if isinstance(layer, SyncBatchNorm))
    _warn(module, name, [decision for _, decision in decisions])
    return module


def plan(
    module: nn.Module,
    norm: Norm = "syncbn",
    *,
    process_group: ProcessGroupLike = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    include_frozen: bool = False,
    **norm_kwargs: Any,
) -> list[PlanRow]:
    """List what `convert` would do with the same arguments, one row per layer; nothing is touched.

    Layers that would make `convert` raise are rows with the reason.
    """
    target = _target(norm, process_group, include_frozen, norm_kwargs)
    decisions = [decision for _, decision in decide_all(module, target, include, exclude)]
    return [row for decision in decisions for row in (decision.row, *(c.row for c in decision.companions))]


def revert(module: M, *, as_batchnorm: bool = False) -> M:
    """Give back what the user wrote: the classes, statistics and attributes from before `convert`, in place.

    Ends `save_memory` too.

    Args:
        module: A model, or a bare layer.
        as_batchnorm: Whether layers that were written as ``syncbn.SyncBatchNorm`` become nn.BatchNorm too: of the
            dimensions of the last input, 2d if there was none.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: If a converted layer has been parametrized or sharded since; before anything is touched.
    """
    layers = list(module.named_modules())
    refused = [problem for name, layer in layers if (problem := _why_not_back(name, layer, as_batchnorm)) is not None]
    if refused:
        raise ValueError("\n  ".join(["syncbn.revert: nothing was reverted.", *refused]))
    lost = [f"{path}, now a {type(layer).__name__}" for path, layer in replaced.find(module)]
    if lost:
        warnings.warn(
            f"syncbn.revert cannot give back {'; '.join(lost)}: {replaced.REASON}. {replaced.REMEDY}", stacklevel=2
        )
        replaced.clear(module)
    stop_saving(module)
    for _, layer in layers:
        is_written = as_batchnorm and original_class(layer) in PLAIN
        if original_of(layer) is not None or is_written:
            patches.drop_copies(layer, original_class(layer))
        restore(layer)
        if is_written:
            swap_to_batchnorm(layer)
    return module


def _why_not_back(name: str, layer: nn.Module, as_batchnorm: bool) -> str | None:
    """Say why `revert` cannot change a layer; None if it can, or has nothing to do."""
    original, cls = original_of(layer), original_class(layer)
    if original is not None and type(layer) is not original.swapped_to:
        return f"the class of {name} was changed after conversion (parametrized or sharded); undo that first."
    for problem in [] if original is None else filter(None, (c.problem() for c in original.companions)):
        return problem
    is_written = as_batchnorm and cls in PLAIN
    patch = patches.patch_of(layer, nn.BatchNorm2d if is_written else cls, cls) if original or is_written else None
    return None if patch is None else f"{patch} of {name} was set on the instance; undo that first ({patches.UNDO})."


def _warn(module: nn.Module, norm: str, decisions: list[Decision]) -> None:
    """Warn of layers that stay, once for each reason, and if none was converted."""
    left: dict[str, list[str]] = {}
    for decision in decisions:
        if decision.action is Action.WARN:
            left.setdefault(decision.row.reason, []).append(decision.row.name or "(the module itself)")
    for reason, names in left.items():
        warnings.warn(f"syncbn.convert left {', '.join(names)} alone: {reason}", stacklevel=3)
    if norm != "bn" and not any(decision.row.to for decision in decisions):
        why = "syncbn.plan(model) lists why" if decisions else f"this {type(module).__name__} has no BatchNorm layer"
        warnings.warn(f"syncbn.convert found no layer to convert to {norm!r}: {why}.", stacklevel=3)


def _target(norm: Norm, process_group: ProcessGroupLike, include_frozen: bool, norm_kwargs: dict[str, Any]) -> Target:
    registry.check(norm, norm_kwargs)
    if process_group is None:
        return Target(norm, None, include_frozen, norm_kwargs)
    if not registry.synchronizes(norm):
        choices = ", ".join(name for name in ("syncbn", *registry.REGISTRY) if registry.synchronizes(name))
        raise ValueError(
            f"process_group belongs to norms that synchronize ({choices}), not to {registry.name_of(norm)!r}."
        )
    return Target(norm, GroupSpec(process_group), include_frozen, norm_kwargs)
