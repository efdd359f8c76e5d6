"""Decide what one layer of the BatchNorm family becomes, before anything is touched; and do it."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed.groups import GroupSpec
from ..nn.activated import SyncBatchNormAct
from ..nn.batchnorm import SyncBatchNorm
from . import frozen, patches, problems, swap
from .classes import converted_class, sync_class_of
from .companions import Companion, PlanRow
from .norms import registry
from .original import original_class, original_of
from .third_party import FROZEN_BUFFERS, is_frozen_layer

_ISOLATED = registry.key("bn", {})  # of a layer that was written to synchronize, in groups of one


class Action(Enum):
    """What conversion does to a layer."""

    KEEP = auto()
    WARN = auto()  # keep a class that is not known, and say so
    REFUSE = auto()  # raise an error, and touch nothing
    REFUSE_WRAPPER = auto()  # the same, if there is anything to convert below
    SET_GROUP = auto()
    SYNCHRONIZE = auto()
    ISOLATE = auto()  # groups of one
    RESTORE = auto()  # what the user wrote
    REPLACE = auto()  # another norm


CHANGES = {Action.SET_GROUP, Action.SYNCHRONIZE, Action.ISOLATE, Action.RESTORE, Action.REPLACE}


@dataclass
class Decision:
    """One row of the plan, and what is to be done; the rest where the action needs it."""

    row: PlanRow
    action: Action = Action.KEEP
    becomes: type[nn.Module] = SyncBatchNorm
    new: nn.Module | None = None
    companions: list[Companion] = field(default_factory=list)
    spec: GroupSpec = field(default_factory=lambda: GroupSpec(None))  # that the layer has, or was written with


@dataclass
class Target:
    """What layers shall become: `convert`'s arguments but for the filters."""

    norm: registry.Norm
    spec: GroupSpec | None = None
    include_frozen: bool = False
    norm_kwargs: dict[str, Any] = field(default_factory=dict)


def is_family(layer: nn.Module) -> bool:
    """Whether ``layer`` is a BatchNorm of any kind, or was one before a conversion."""
    return isinstance(layer, _BatchNorm) or original_of(layer) is not None or is_frozen_layer(layer)


def decide(name: str, layer: nn.Module, target: Target) -> Decision:
    """Decide what becomes of ``layer``, one of the family."""
    decision = _decide(PlanRow(name, type(layer).__name__, None, ""), layer, target)
    problem = problems.of_change(layer, decision.becomes) if decision.action in CHANGES - {Action.SET_GROUP} else None
    return decision if problem is None else Decision(decision.row._replace(to=None, reason=problem), Action.REFUSE)


def _decide(row: PlanRow, layer: nn.Module, target: Target) -> Decision:
    cls, original = original_class(layer), original_of(layer)
    synchronizes = isinstance(layer, SyncBatchNorm) and (original is None or original.norm is None)
    if synchronizes and target.norm == "syncbn" and target.spec in (None, layer.group_spec):
        return Decision(row._replace(to=row.from_, reason="already"))
    problem = problems.of_layer(layer)
    if problem is not None:
        return Decision(row._replace(reason=problem), Action.REFUSE)
    is_frozen = is_frozen_layer(layer) if original is None else original.frozen is not None
    sync_class = sync_class_of(cls, is_frozen)
    if sync_class is None:
        return Decision(row._replace(reason=problems.of_class(cls)), Action.WARN)
    is_wanted = target.norm in ("syncbn", "bn") and (original is not None or target.include_frozen)
    if is_frozen and not is_wanted:
        reason = "frozen statistics need no synchronization; norm 'syncbn' with include_frozen=True converts it."
        return Decision(row._replace(reason=reason))
    if target.norm == "syncbn":
        return _synchronize(row, layer, sync_class)
    if target.norm == "bn":
        return _stop_synchronizing(row, layer, sync_class)
    return _replace(row, layer, sync_class, target)


def apply(decision: Decision, layer: nn.Module, target: Target) -> None:
    """Do to ``layer`` what was decided."""
    if decision.action is Action.SET_GROUP:
        layer.process_group = target.spec  # type: ignore[assignment]
    if decision.action not in CHANGES - {Action.SET_GROUP}:
        return
    patches.drop_copies(layer, original_class(layer))
    swap.restore(layer)
    if decision.action is Action.SYNCHRONIZE:
        spec = target.spec or decision.spec
        if isinstance(layer, SyncBatchNorm) and layer.group_spec == spec:
            return
        to_sync = swap.swap_to_sync if isinstance(layer, _BatchNorm) else swap.swap_frozen_to_sync
        to_sync(layer, decision.becomes, spec)  # type: ignore[arg-type]
    elif decision.action is Action.ISOLATE:
        swap.swap_to_sync(layer, decision.becomes, GroupSpec(1), _ISOLATED)  # type: ignore[arg-type]
    elif decision.action is Action.REPLACE:
        assert decision.new is not None
        key = registry.key(target.norm, target.norm_kwargs)
        swap.swap_to_other(layer, decision.new, key, activate=sync_class_of(original_class(layer)) is SyncBatchNormAct)
        swap.change_companions(layer, decision.companions)


def _synchronize(row: PlanRow, layer: nn.Module, sync_class: type[SyncBatchNorm]) -> Decision:
    cls, original = original_class(layer), original_of(layer)
    becomes, why_alone = converted_class(cls, sync_class)
    alone = "" if why_alone is None else f", as a {becomes.__name__} that is no {cls.__name__}: {why_alone}"
    row = row._replace(to=becomes.__name__, reason=f"synchronizes{alone}")
    if isinstance(layer, SyncBatchNorm) and original is not None and original.norm is None:
        return Decision(row._replace(reason="another group"), Action.SET_GROUP)
    if original is None and not isinstance(layer, _BatchNorm):
        missing = [name for name in FROZEN_BUFFERS if layer._buffers.get(name) is None]
        if missing:
            return Decision(row._replace(to=None, reason=f"without the buffers {', '.join(missing)}"), Action.REFUSE)
        if frozen.eps_of(layer) is None:
            reason = f"{cls.__name__} does more than normalize with its buffers; include_frozen cannot convert it."
            return Decision(row._replace(to=None, reason=reason), Action.WARN)
    kept = layer.__dict__ | ({} if original is None else original.attributes)
    group = kept.get("process_group")
    written = group if isinstance(group, GroupSpec) else GroupSpec(group)
    return Decision(row, Action.SYNCHRONIZE, becomes, spec=_spec_of(layer) or written)


def _spec_of(layer: nn.Module) -> GroupSpec | None:
    """Return the group that a layer has; of one in groups of one that which it was written with."""
    original = original_of(layer)
    kept = original.sync_state if original is not None and original.norm == _ISOLATED else layer.__dict__
    return kept.get("group_spec")


def _stop_synchronizing(row: PlanRow, layer: nn.Module, sync_class: type[SyncBatchNorm]) -> Decision:
    """Make the layer as it was written; one that was written to synchronize gets groups of one."""
    cls, original = original_class(layer), original_of(layer)
    was_written_to = issubclass(cls, SyncBatchNorm | nn.SyncBatchNorm)
    row = row._replace(to=sync_class.__name__ if was_written_to else cls.__name__)
    is_plain = original is None and not was_written_to
    is_isolated = original is not None and original.norm == _ISOLATED
    if is_plain or is_isolated:
        return Decision(row._replace(reason="already"))
    if was_written_to:
        return Decision(row._replace(reason="in groups of one"), Action.ISOLATE, sync_class)
    return Decision(row._replace(reason="as written"), Action.RESTORE, cls)


def _replace(row: PlanRow, layer: nn.Module, sync_class: type[SyncBatchNorm], target: Target) -> Decision:
    cls, original = original_class(layer), original_of(layer)
    if sync_class not in (*swap.PLAIN, SyncBatchNormAct):
        reason = f"{cls.__name__} does more than normalize; only its synchronized class is registered."
        return Decision(row._replace(reason=reason), Action.WARN)
    spec, options = _spec_of(layer), target.norm_kwargs
    is_same = original is not None and original.norm == registry.key(target.norm, options)
    if is_same and target.spec in (None, spec):
        return Decision(row._replace(to=row.from_, reason="already"))
    twin = swap.original_twin(layer)
    if spec is not None:
        twin.__dict__["group_spec"] = spec  # which a norm that synchronizes takes, if none is given
    if target.spec is not None:
        options = options | {"process_group": target.spec}
    try:
        new = registry.make(target.norm, twin, options)
    except (ValueError, TypeError) as error:
        return Decision(row._replace(reason=str(error) or repr(error)), Action.REFUSE)
    return Decision(row._replace(to=type(new).__name__, reason="replaced"), Action.REPLACE, type(new), new)
