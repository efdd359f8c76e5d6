"""Exchange the BatchNorm layers of a model, and give them back: plan(), convert() and revert() over one walk.

The order for a training script is: build the model, convert, then compile, shard or wrap, then make the optimizer.
"""

import warnings
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from ..distributed.groups import GroupSpec, ProcessGroupLike
from ..distributed.subgroups import make_groups
from ..nn.batchnorm import SyncBatchNorm, name_layers
from ..private import is_compiled
from . import norms
from .norms import Norm
from .rules import CHANGES, Action, Decision, PlanRow, Target, apply, decide, is_family
from .swap import original_of, restore, swap_to_batchnorm
from .third_party import wrapper_of

M = TypeVar("M", bound=nn.Module)

_ORDER = (
    "The order is: convert, then compile, shard or wrap, then make the optimizer (in a LightningModule that compiles "
    "itself: call syncbn.convert before it does, in configure_model)."
)


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
    decisions = _decide_all(module, target, include, exclude)
    name, actions = norms.name_of(norm), {decision.action for _, decision in decisions}
    if actions & (CHANGES | {Action.REFUSE}):  # else nothing is left to do
        refused = [d.row for _, d in decisions if d.action in (Action.REFUSE, Action.REFUSE_WRAPPER)]
        if refused:
            errors = [f"  {row.name or '(the module itself)'}: {row.reason}" for row in refused]
            raise ValueError("\n".join([f"syncbn.convert: nothing was converted to {name!r}.", *errors]))
    if target.spec is not None:
        make_groups([target.spec])
    for layer, decision in decisions:
        if decision.action is Action.WARN:
            warnings.warn(f"syncbn.convert left {decision.row.name} alone: {decision.row.reason}", stacklevel=2)
        apply(decision, layer, target)
    if norm != "bn" and not any(decision.row.to for _, decision in decisions):
        warnings.warn(
            f"syncbn.convert found no layer to convert to {name!r}; syncbn.plan(model) lists why.",
            stacklevel=2,
        )
    name_layers(module)
    make_groups(layer.group_spec for layer in module.modules() if isinstance(layer, SyncBatchNorm))
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
    return [decision.row for _, decision in _decide_all(module, target, include, exclude)]


def revert(module: M, *, as_batchnorm: bool = False) -> M:
    """Give back what the user wrote: the classes, statistics and attributes from before `convert`, in place.

    Args:
        module: A model, or a bare layer.
        as_batchnorm: Whether layers that were written as ``syncbn.SyncBatchNorm`` become nn.BatchNorm too: of the
            dimensions of the last input, 2d if there was none.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: If a converted layer has been parametrized or sharded since; before anything is touched.
    """
    layers = [(name, layer, original_of(layer)) for name, layer in module.named_modules()]
    changed = [name for name, layer, original in layers if original and type(layer) is not original.swapped_to]
    if changed:
        raise ValueError(
            f"syncbn.revert: the class of {', '.join(changed)} was changed after conversion (parametrized or "
            "sharded); undo that first. Nothing was reverted."
        )
    for _, layer, _ in layers:
        restore(layer)
        if as_batchnorm and type(layer) is SyncBatchNorm:
            swap_to_batchnorm(layer)
    return module


def _target(norm: Norm, process_group: ProcessGroupLike, include_frozen: bool, norm_kwargs: dict[str, Any]) -> Target:
    norms.check(norm, norm_kwargs)
    if norm != "syncbn" and process_group is not None:
        raise ValueError(f"process_group belongs to norm 'syncbn', not to {norms.name_of(norm)!r}.")
    return Target(norm, None if process_group is None else GroupSpec(process_group), include_frozen, norm_kwargs)


def _decide_all(
    module: nn.Module, target: Target, include: Iterable[str], exclude: Iterable[str]
) -> list[tuple[nn.Module, Decision]]:
    filters = _patterns("include", include), _patterns("exclude", exclude)
    decisions = ((layer, _decide(names, layer, target, *filters)) for names, layer in _walk(module))
    return [(layer, decision) for layer, decision in decisions if decision is not None]


def _walk(module: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """Yield every module once, with all the names it has."""
    names: dict[nn.Module, list[str]] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        names.setdefault(layer, []).append(name)
    return ((aliases, layer) for layer, aliases in names.items())


def _decide(
    names: list[str], layer: nn.Module, target: Target, include: list[str], exclude: list[str]
) -> Decision | None:
    """Plan one module; None if it is no layer of the BatchNorm family."""
    row = PlanRow(names[0], type(layer).__name__, None, "")
    wrapper = "torch.compile" if is_compiled(layer) else wrapper_of(layer)
    if wrapper is not None:
        decision = decide(names[0], layer, target) if is_family(layer) else None
        if decision is not None and decision.row.reason == "already":
            return decision
        reason = f"already wrapped by {wrapper}: convert the module before. {_ORDER}"
        action = Action.REFUSE_WRAPPER if decision is None else Action.REFUSE
        return Decision(row._replace(reason=reason), action)
    if not is_family(layer):
        return None
    excluding = next((p for p in exclude for n in names if fnmatchcase(n, p)), None)
    if excluding is not None:
        return Decision(row._replace(reason=f"excluded by {excluding!r}"))
    if include and not any(fnmatchcase(n, p) for n in names for p in include):
        return Decision(row._replace(reason="not in include"))
    return decide(names[0], layer, target)


def _patterns(argument: str, patterns: Iterable[str]) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(
            f"{argument}: expected a list of patterns, got the string {patterns!r}; write [{patterns!r}]."
        )
    return list(patterns)
