"""Exchange the BatchNorm layers of a model, and give them back: plan(), convert() and revert() over one walk.

The order for a training script is: build the model, convert, then compile, shard or wrap, then make the optimizer.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from . import norms
from .batchnorm import SyncBatchNorm, SyncBatchNormAct
from .collectives import GroupSpec, ProcessGroupLike, make_declared_groups
from .turning import frozen_to_sync, original_class, to_batchnorm, to_other, to_sync, turn_back

M = TypeVar("M", bound=nn.Module)

_ORDER = "The order is: convert, then compile, shard or wrap, then make the optimizer."
_WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "OptimizedModule",
}
_PLAIN: dict[type, type[SyncBatchNorm]] = dict.fromkeys(
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm), SyncBatchNorm
)
_REGISTERED: dict[type, type[SyncBatchNorm]] = {}
_BY_NAME = {  # of packages that need not be installed
    "timm.layers.norm_act.BatchNormAct2d": SyncBatchNormAct,
    "timm.layers.norm_act.SyncBatchNormAct": SyncBatchNormAct,
    "syncbn.batchnorm.SyncBatchNormAct": SyncBatchNormAct,
}
_FROZEN = {"FrozenBatchNorm2d": SyncBatchNorm, "FrozenBatchNormAct2d": SyncBatchNormAct}


class PlanRow(NamedTuple):
    """What conversion does to one layer: ``to`` is None where the layer stays as it is, ``reason`` says why."""

    name: str
    from_: str
    to: str | None
    reason: str


@dataclass
class _Step:
    row: PlanRow
    layer: nn.Module
    turn: Callable[[], None] | None = None
    is_error: bool = False
    is_unknown: bool = False


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


def convert(
    module: M,
    norm: str = "syncbn",
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
        norm: "syncbn" to synchronize, "bn" to stop synchronizing, or a norm of ``syncbn.norms.REGISTRY`` ("gn").
        process_group: Ranks that share statistics, as in SyncBatchNorm; None keeps what a layer has.
        include: Patterns (as in fnmatch) of layer names to convert; all, if empty.
        exclude: Patterns of layer names to leave alone.
        include_frozen: Whether FrozenBatchNorm2d layers are converted too; their weight and bias become parameters.
        **norm_kwargs: The norm's own words, such as ``num_groups`` of "gn".

    Returns:
        ``module`` itself.

    Raises:
        ValueError: Before anything is touched: an unknown norm, unusable ``norm_kwargs`` or ``process_group``; a lazy
            or parametrized layer; a model already wrapped, sharded or compiled.
    """
    steps = _steps(module, norm, process_group, include, exclude, include_frozen, norm_kwargs)
    errors = [f"  {step.row.name or '(the module itself)'}: {step.row.reason}" for step in steps if step.is_error]
    if errors:
        raise ValueError("\n".join([f"syncbn.convert: nothing was converted to {norm!r}.", *errors]))
    for step in steps:
        if step.is_unknown:
            warnings.warn(f"syncbn.convert left {step.row.name} alone: {step.row.reason}", stacklevel=2)
        if step.turn is not None:
            step.turn()
    if norm != "bn" and not any(step.row.to for step in steps):
        warnings.warn(
            f"syncbn.convert found no layer to convert to {norm!r}; syncbn.plan(model) lists why.",
            stacklevel=2,
        )
    make_declared_groups()
    return module


def plan(
    module: nn.Module,
    norm: str = "syncbn",
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
    return [s.row for s in _steps(module, norm, process_group, include, exclude, include_frozen, norm_kwargs)]


def revert(module: M, *, as_batchnorm: bool = False) -> M:
    """Give back what the user wrote: the classes, statistics and attributes from before `convert`, in place.

    Args:
        module: A model, or a bare layer.
        as_batchnorm: Whether layers that were written as ``syncbn.SyncBatchNorm`` become nn.BatchNorm too: of the
            dimensions of the last input, 2d if there was none.

    Returns:
        ``module`` itself.
    """
    for layer in module.modules():
        _turn_back(layer)
        if as_batchnorm and type(layer) is SyncBatchNorm:
            to_batchnorm(layer)
    return module


def _steps(
    module: nn.Module,
    norm: str,
    process_group: ProcessGroupLike,
    include: Iterable[str],
    exclude: Iterable[str],
    include_frozen: bool,
    norm_kwargs: dict[str, Any],
) -> list[_Step]:
    known = ["bn", "syncbn", *sorted(norms.REGISTRY)]
    if norm not in known:
        raise ValueError(f"unknown norm {norm!r}: expected one of {', '.join(known)}.")
    if norm in ("bn", "syncbn") and norm_kwargs:
        raise ValueError(f"norm {norm!r} takes no {', '.join(norm_kwargs)}.")
    if norm in norms.REGISTRY:
        norms.check_options(norm, norm_kwargs)
    if norm != "syncbn" and process_group is not None:
        raise ValueError(f"process_group belongs to norm 'syncbn', not to {norm!r}.")
    make = _Maker(norm, None if process_group is None else GroupSpec(process_group), include_frozen, norm_kwargs)
    filters = _patterns("include", include), _patterns("exclude", exclude)
    return [step for names, layer in _walk(module) if (step := _step(names, layer, make, *filters)) is not None]


def _walk(module: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """Yield every module once, with all the names it has."""
    names: dict[nn.Module, list[str]] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        names.setdefault(layer, []).append(name)
    return ((aliases, layer) for layer, aliases in names.items())


def _step(names: list[str], layer: nn.Module, make: "_Maker", include: list[str], exclude: list[str]) -> _Step | None:
    """Decide what happens to one module; None if it is no layer of the BatchNorm family."""
    name, cls = names[0], type(layer)
    wrapper = next((base.__name__ for base in cls.__mro__ if base.__name__ in _WRAPPERS), None)
    if layer._compiled_call_impl is not None:
        wrapper = "torch.compile"
    if wrapper is not None:
        reason = f"already wrapped by {wrapper}: convert the module before. {_ORDER}"
        return _Step(PlanRow(name, cls.__name__, None, reason), layer, is_error=True)
    if not (isinstance(layer, _BatchNorm) or "_syncbn_original" in layer.__dict__ or cls.__name__ in _FROZEN):
        return None
    chosen = not include or any(fnmatchcase(n, p) for n in names for p in include)
    excluding = next((p for p in exclude for n in names if fnmatchcase(n, p)), None)
    if excluding is not None or not chosen:
        reason = "not in include" if excluding is None else f"excluded by {excluding!r}"
        return _Step(PlanRow(name, cls.__name__, None, reason), layer)
    problem = _problem(layer)
    if problem is not None:
        return _Step(PlanRow(name, cls.__name__, None, problem), layer, is_error=True)
    return make.step(name, layer)


def _problem(layer: nn.Module) -> str | None:
    """Say why a chosen layer cannot be converted as it is now."""
    if isinstance(layer, LazyModuleMixin):
        return "a lazy layer does not know its channels yet: run one batch first, then convert."
    if is_parametrized(layer):
        return "a parametrized layer: remove_parametrizations first, or leave it out with exclude."
    if "forward" in layer.__dict__:
        return (
            "its forward was set on the instance (as accelerate does) and would go on unsynchronized: convert before."
        )
    return None


@dataclass
class _Maker:
    """Decides for one layer of the BatchNorm family what it becomes."""

    norm: str
    spec: GroupSpec | None
    include_frozen: bool
    options: dict[str, Any]

    def step(self, name: str, layer: nn.Module) -> _Step:
        cls, now = original_class(layer), type(layer).__name__
        sync_class = _sync_class(cls)
        if sync_class is None:
            reason = (
                f"{cls.__name__} is a BatchNorm subclass that syncbn does not know. If it only normalizes, call "
                f"syncbn.register({cls.__name__}); if it does more, syncbn.register({cls.__name__}, YourSubclass"
                "OfSyncBatchNorm)."
            )
            return _Step(PlanRow(name, now, None, reason), layer, is_unknown=True)
        if cls.__name__ in _FROZEN and not (self.include_frozen and self.norm == "syncbn"):
            reason = "frozen statistics need no synchronization; norm 'syncbn' with include_frozen=True converts it."
            return _Step(PlanRow(name, now, None, reason), layer)
        if self.norm == "syncbn":
            return self._sync(name, layer, sync_class)
        return self._plain(name, layer, sync_class) if self.norm == "bn" else self._other(name, layer, sync_class)

    def _sync(self, name: str, layer: nn.Module, sync_class: type[SyncBatchNorm]) -> _Step:
        row = PlanRow(name, type(layer).__name__, sync_class.__name__, "synchronizes")
        if isinstance(layer, SyncBatchNorm) and self.spec in (None, layer._group_spec):
            return _Step(row._replace(reason="already"), layer)

        def turn() -> None:
            if isinstance(layer, SyncBatchNorm) and "_syncbn_original" in layer.__dict__:
                layer._group_spec = self.spec or layer._group_spec
                return
            _turn_back(layer)
            if isinstance(layer, SyncBatchNorm) and self.spec is None:
                return
            spec = self.spec or GroupSpec(layer.__dict__.get("process_group"))
            (to_sync if isinstance(layer, _BatchNorm) else frozen_to_sync)(layer, sync_class, spec)

        return _Step(row, layer, turn)

    def _plain(self, name: str, layer: nn.Module, sync_class: type[SyncBatchNorm]) -> _Step:
        """Stop synchronizing: as written, and in groups of one if it was written to synchronize."""
        cls = original_class(layer)
        synchronizes = issubclass(cls, SyncBatchNorm | nn.SyncBatchNorm)

        def turn() -> None:
            _turn_back(layer)
            if synchronizes:
                to_sync(layer, sync_class, GroupSpec(1))

        to = sync_class.__name__ if synchronizes else cls.__name__
        is_done = type(layer) is cls and not synchronizes
        reason = "already" if is_done else "in groups of one" if synchronizes else "as written"
        return _Step(PlanRow(name, type(layer).__name__, to, reason), layer, None if is_done else turn)

    def _other(self, name: str, layer: nn.Module, sync_class: type[SyncBatchNorm]) -> _Step:
        row, cls = PlanRow(name, type(layer).__name__, None, ""), original_class(layer)
        if cls not in _PLAIN and sync_class is not SyncBatchNormAct and sync_class is not SyncBatchNorm:
            reason = f"{cls.__name__} does more than normalize; only its synchronized class is registered."
            return _Step(row._replace(reason=reason), layer, is_unknown=True)
        original = layer.__dict__.get("_syncbn_original")
        if original is not None and original.norm == (self.norm, self.options):
            return _Step(row._replace(to=type(layer).__name__, reason="already"), layer)
        try:
            new = norms.make(self.norm, layer, self.options)
        except ValueError as error:
            return _Step(row._replace(reason=str(error)), layer, is_error=True)

        def turn() -> None:
            _turn_back(layer)
            to_other(layer, new, (self.norm, self.options))
            if sync_class is SyncBatchNormAct:
                layer.register_forward_hook(_activate, prepend=True)

        return _Step(row._replace(to=type(new).__name__, reason="replaced"), layer, turn)


def _sync_class(cls: type[nn.Module]) -> type[SyncBatchNorm] | None:
    if issubclass(cls, SyncBatchNorm):
        return cls
    by_name = _BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
    frozen = None if issubclass(cls, _BatchNorm) else _FROZEN.get(cls.__name__)
    return _REGISTERED.get(cls) or _PLAIN.get(cls) or by_name or frozen


def _turn_back(layer: nn.Module) -> None:
    if "_syncbn_original" not in layer.__dict__:
        return
    for key, hook in list(layer._forward_hooks.items()):
        if hook is _activate:
            del layer._forward_hooks[key]
    turn_back(layer)


def _activate(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Do what a fused layer does after normalizing; a forward hook of what takes its place."""
    y: Tensor = layer.act(layer.drop(output))  # type: ignore[operator]
    return y


def _patterns(word: str, patterns: Iterable[str]) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(f"{word}: expected a list of patterns, got the string {patterns!r}; write [{patterns!r}].")
    return list(patterns)
