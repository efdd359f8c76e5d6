"""Decide what one layer of the BatchNorm family becomes, before anything is touched."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from . import norms
from .batchnorm import SyncBatchNorm, SyncBatchNormAct
from .collectives import GroupSpec
from .swap import Original, as_written, frozen_to_sync, original_class, original_of, to_other, to_sync, turn_back

_PLAIN: dict[type, type[SyncBatchNorm]] = dict.fromkeys(
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm), SyncBatchNorm
)
_REGISTERED: dict[type, type[SyncBatchNorm]] = {}
_FUSED = {"timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"}  # timm need not be installed
_STOPPED = norms.key("bn", {})
_FROZEN = {"FrozenBatchNorm2d": SyncBatchNorm, "FrozenBatchNormAct2d": SyncBatchNormAct}  # of any package


class PlanRow(NamedTuple):
    """What conversion does to one layer: ``to`` is None where the layer stays as it is, ``reason`` says why."""

    name: str
    from_: str
    to: str | None
    reason: str


@dataclass
class Step:
    """One row of the plan, and how to carry it out."""

    row: PlanRow
    turn: Callable[[], None] | None = None  # None: nothing to do
    is_error: bool = False
    is_wrapper: bool = False  # an error only if there is anything to convert below
    is_unknown: bool = False


@dataclass
class Target:
    """What layers shall become: `convert`'s arguments but for the filters."""

    norm: norms.Norm
    spec: GroupSpec | None = None
    include_frozen: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def register(batchnorm_class: type[_BatchNorm], sync_class: type[SyncBatchNorm] = SyncBatchNorm) -> None:
    """Tell conversion what a BatchNorm subclass becomes.

    Args:
        batchnorm_class: The exact class to convert.
        sync_class: A subclass of SyncBatchNorm that does what ``batchnorm_class`` does beside normalizing; the plain
            layer, if it does nothing else.

    Raises:
        ValueError: If ``sync_class`` is not a subclass of SyncBatchNorm.
    """
    if not issubclass(sync_class, SyncBatchNorm):
        raise ValueError(f"register: expected a subclass of syncbn.SyncBatchNorm, got {sync_class.__name__}.")
    _REGISTERED[batchnorm_class] = sync_class


def is_family(layer: nn.Module) -> bool:
    """Whether ``layer`` is a BatchNorm of any kind, or was one before a conversion."""
    return isinstance(layer, _BatchNorm) or original_of(layer) is not None or type(layer).__name__ in _FROZEN


def decide(name: str, layer: nn.Module, target: Target) -> Step:
    """Decide what becomes of ``layer``, one of the family."""
    row = PlanRow(name, type(layer).__name__, None, "")
    cls, original = original_class(layer), original_of(layer)
    synchronizes = isinstance(layer, SyncBatchNorm) and (original is None or original.norm is None)
    if synchronizes and target.norm == "syncbn" and target.spec in (None, layer._group_spec):
        return Step(row._replace(to=row.from_, reason="already"))
    problem = _problem(layer)
    if problem is not None:
        return Step(row._replace(reason=problem), is_error=True)
    sync_class = _sync_class(cls)
    if sync_class is None:
        reason = (
            f"{cls.__name__} is a BatchNorm subclass that syncbn does not know. If it only normalizes, call "
            f"syncbn.register({cls.__name__}); if it does more, syncbn.register({cls.__name__}, YourSubclass), "
            "with a subclass of syncbn.SyncBatchNorm that does the same."
        )
        return Step(row._replace(reason=reason), is_unknown=True)
    is_wanted = target.norm in ("syncbn", "bn") and (original is not None or target.include_frozen)
    if cls.__name__ in _FROZEN and not is_wanted:
        reason = "frozen statistics need no synchronization; norm 'syncbn' with include_frozen=True converts it."
        return Step(row._replace(reason=reason))
    if target.norm == "syncbn":
        return _synchronize(row, layer, sync_class, target)
    return (_stop_synchronizing if target.norm == "bn" else _replace)(row, layer, sync_class, target)


def _synchronize(row: PlanRow, layer: nn.Module, sync_class: type[SyncBatchNorm], target: Target) -> Step:
    original = original_of(layer)
    row = row._replace(to=sync_class.__name__, reason="synchronizes")
    if isinstance(layer, SyncBatchNorm) and original is not None and original.norm is None:
        return Step(row._replace(reason="another group"), lambda: setattr(layer, "process_group", target.spec))
    written = GroupSpec(layer.__dict__.get("process_group"))  # nn.SyncBatchNorm's

    def turn() -> None:
        turn_back(layer)
        if isinstance(layer, SyncBatchNorm) and target.spec is None:
            return
        change = to_sync if isinstance(layer, _BatchNorm) else frozen_to_sync
        change(layer, sync_class, target.spec or written)

    return Step(row, turn)


def _stop_synchronizing(row: PlanRow, layer: nn.Module, sync_class: type[SyncBatchNorm], target: Target) -> Step:
    """Make the layer as it was written; one that was written to synchronize gets groups of one."""
    cls, original = original_class(layer), original_of(layer)
    synchronizes = issubclass(cls, SyncBatchNorm | nn.SyncBatchNorm)
    row = row._replace(to=sync_class.__name__ if synchronizes else cls.__name__)
    if original.norm == _STOPPED if original is not None else not synchronizes:
        return Step(row._replace(reason="already"))

    def turn() -> None:
        turn_back(layer)
        if synchronizes:
            to_sync(layer, sync_class, GroupSpec(1), _STOPPED)

    return Step(row._replace(reason="in groups of one" if synchronizes else "as written"), turn)


def _replace(row: PlanRow, layer: nn.Module, sync_class: type[SyncBatchNorm], target: Target) -> Step:
    cls, original = original_class(layer), original_of(layer)
    if sync_class not in (SyncBatchNorm, SyncBatchNormAct):
        reason = f"{cls.__name__} does more than normalize; only its synchronized class is registered."
        return Step(row._replace(reason=reason), is_unknown=True)
    key = norms.key(target.norm, target.options)
    if original is not None and original.norm == key:
        return Step(row._replace(to=row.from_, reason="already"))
    try:
        new = norms.make(target.norm, as_written(layer), target.options)
    except (ValueError, TypeError) as error:
        return Step(row._replace(reason=str(error) or repr(error)), is_error=True)

    def turn() -> None:
        turn_back(layer)
        to_other(layer, new, key, activate=sync_class is SyncBatchNormAct)

    return Step(row._replace(to=type(new).__name__, reason="replaced"), turn)


def _problem(layer: nn.Module) -> str | None:
    """Say why a chosen layer cannot be converted as it is now."""
    original: Original | None = original_of(layer)
    if isinstance(layer, LazyModuleMixin):
        return "a lazy layer does not know its channels yet: run one batch first, then convert."
    if is_parametrized(layer):
        return "a parametrized layer: remove_parametrizations first, or leave it out with exclude."
    if original is not None and type(layer) is not original.turned_into:
        return f"its class was changed to {type(layer).__name__} after it was converted: undo that first."
    if "forward" in layer.__dict__:
        return (
            "its forward was set on the instance (as accelerate does) and would go on unsynchronized: convert before."
        )
    return None


def _sync_class(cls: type[nn.Module]) -> type[SyncBatchNorm] | None:
    if issubclass(cls, SyncBatchNorm):
        return cls
    if f"{cls.__module__}.{cls.__qualname__}" in _FUSED:
        return SyncBatchNormAct
    frozen = None if issubclass(cls, _BatchNorm) else _FROZEN.get(cls.__name__)
    return _REGISTERED.get(cls) or _PLAIN.get(cls) or frozen
