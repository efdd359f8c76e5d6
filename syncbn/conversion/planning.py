"""Walk over a model, and decide what becomes of every layer that has statistics of batches."""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from ..nn.frozen import FrozenStatistics
from ..private import is_compiled
from . import replaced
from .classes import sync_class_of
from .companions import PlanRow
from .norms import fixup, weights
from .norms.activations import take_activations
from .norms.synchronized import warn_of_no_warmup
from .original import original_of
from .rules import CHANGES, Action, Decision, Target, decide, is_family
from .third_party import advice, is_frozen_layer, keeps_statistics, wrapper_of

# Of norms that change more than the layer: add companions to the decisions about a model, or refuse, or warn.
ADD_COMPANIONS: dict[str, Callable[[nn.Module, list[tuple[nn.Module, Decision]], Target], None]] = {
    "brn": warn_of_no_warmup,
    "fixup": fixup.add_companions,
    "frn": take_activations,
    "evonorm_s0": take_activations,
    "evonorm_b0": take_activations,
    "gn_ws": weights.add_standardization,
    "wn": weights.add_weight_norm,
}

_ORDER = "The order is: convert, then compile, shard or wrap, then make the optimizer."


def decide_all(
    module: nn.Module, target: Target, include: Iterable[str], exclude: Iterable[str]
) -> list[tuple[nn.Module, Decision]]:
    """Decide about each layer once, in the order of `named_modules`."""
    filters = _patterns("include", include), _patterns("exclude", exclude)
    inside = _inside_unknown(module)
    taken = {layer for _, layer in replaced.find(module)}
    decisions = []
    for names, layer in _walk(module):
        decision = _decide(module, names, layer, target, *filters)
        if decision is None:
            continue
        if layer in inside and original_of(layer) is None and decision.row.reason != "already":
            reason = f"it belongs to {inside[layer]}, which stays as it is."
            decision = Decision(decision.row._replace(to=None, reason=reason))
        if layer in taken:
            decision.row = decision.row._replace(reason=f"{decision.row.reason}; {replaced.REASON}")
        decisions.append((layer, decision))
    if target.norm in ADD_COMPANIONS:
        ADD_COMPANIONS[target.norm](module, decisions, target)
    _refuse_parts(decisions)
    return decisions


def _refuse_parts(decisions: list[tuple[nn.Module, Decision]]) -> None:
    """Refuse to change some of the layers inside a companion and not the others: it is undone as a whole."""
    changing = {layer: decision for layer, decision in decisions if decision.action in CHANGES}
    originals = [(layer, original) for layer, _ in decisions if (original := original_of(layer)) is not None]
    for layer, norm, companion in [(layer, o.norm, companion) for layer, o in originals for companion in o.companions]:
        inside = [m for m in companion.module.modules() if (o := original_of(m)) is not None and o.norm == norm]
        whole = {layer, *inside}
        mine = [changing[m] for m in whole if m in changing]
        for decision in mine if len(mine) < len(whole) else []:
            reason = f"{companion.row.name} ({companion.row.to}) changes as a whole, with all norms inside of it."
            decision.action, decision.row = Action.REFUSE, decision.row._replace(to=None, reason=reason)


def _walk(module: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """Yield every module once, with all the names it has."""
    names: dict[nn.Module, list[str]] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        names.setdefault(layer, []).append(name)
    return ((aliases, layer) for layer, aliases in names.items())


def _inside_unknown(module: nn.Module) -> dict[nn.Module, str]:
    """Return what belongs to BatchNorms of unknown classes, whose forward uses it as they please, and to which."""
    inside: dict[nn.Module, str] = {}
    for name, layer in module.named_modules():
        is_written = is_family(layer) and original_of(layer) is None
        if is_written and sync_class_of(type(layer), is_frozen_layer(layer)) is None:
            label = f"{name or 'the module itself'} ({type(layer).__name__})"
            inside.update({part: label for part in layer.modules() if part is not layer and part not in inside})
    return inside


def _decide(
    root: nn.Module, names: list[str], layer: nn.Module, target: Target, include: list[str], exclude: list[str]
) -> Decision | None:
    """Plan one module; None if it has no statistics of batches."""
    row = PlanRow(names[0], type(layer).__name__, None, "")
    wrapper = "torch.compile" if is_compiled(layer) else wrapper_of(layer)
    if wrapper is not None:
        decision = decide(names[0], layer, target) if is_family(layer) else None
        if decision is not None and decision.row.reason == "already":
            return decision
        reason = f"already wrapped by {wrapper}: {advice(root, wrapper)}. {_ORDER}"
        action = Action.REFUSE_WRAPPER if decision is None else Action.REFUSE
        return Decision(row._replace(reason=reason), action)
    is_foreign = not is_family(layer)
    if is_foreign and (isinstance(layer, FrozenStatistics) or not keeps_statistics(layer)):
        return None
    excluding = next((p for p in exclude for n in names if fnmatchcase(n, p)), None)
    if excluding is not None:
        return Decision(row._replace(reason=f"excluded by {excluding!r}"))
    if include and not any(fnmatchcase(n, p) for n in names for p in include):
        return Decision(row._replace(reason="not in include"))
    return _foreign(row, layer, target) if is_foreign else decide(names[0], layer, target)


def _foreign(row: PlanRow, layer: nn.Module, target: Target) -> Decision:
    """Leave a module alone that keeps statistics and is no BatchNorm; what is inside is planned by itself."""
    reason = (
        f"{type(layer).__name__} keeps running statistics and is no subclass of torch's BatchNorm, so syncbn cannot "
        "convert it: they stay those of each rank, unless it synchronizes them itself."
    )
    return Decision(row._replace(reason=reason), Action.WARN if target.norm == "syncbn" else Action.KEEP)


def _patterns(argument: str, patterns: Iterable[str]) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(
            f"{argument}: expected a list of patterns, got the string {patterns!r}; write [{patterns!r}]."
        )
    return list(patterns)
