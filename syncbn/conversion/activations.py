"""Norms that contain an activation, so that the one behind the layer is taken away: found here, and given back."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn.activated import SyncBatchNormAct
from ..nn.converted import can_become
from .classes import sync_class_of
from .companions import Companion, PlanRow
from .rules import Action, Decision, Target
from .swap import original_class, original_of

# Exact classes of what counts as an activation in a Sequential; in a fused layer it is what is called "act".
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
)

Places = dict[nn.Module, list[tuple[nn.Module, str]]]  # of each module: the parents, and its names in them


@dataclass
class TakenActivation(Companion):
    """An activation that is the identity, since the norm before it contains one."""

    cls: type[nn.Module]  # as the user wrote it

    def change(self) -> None:
        """Make it the identity, with its attributes and hooks."""
        self.module.__class__ = nn.Identity

    def undo(self) -> None:
        """Give it its class back."""
        self.module.__class__ = self.cls


def take_activations(root: nn.Module, decisions: list[tuple[nn.Module, Decision]], target: Target) -> None:
    """Let each new norm replace the activation directly behind it, or be without its own where none is known.

    Known is the activation of a fused layer, as timm's, and an activation module that follows the layer in an
    nn.Sequential, if the model has each of the two in that place alone. One with parameters stays.
    """
    names = {module: name for name, module in root.named_modules()}
    places: Places = {}
    for parent in names:
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    taken = {c.module: c.cls for m in names for c in _companions(m) if isinstance(c, TakenActivation)}
    classes = {module: taken.get(module, type(module)) for module in names}  # as written
    for layer, decision in decisions:
        if decision.action is not Action.REPLACE:
            continue
        new: Any = decision.new
        found = _behind(layer, places, classes)
        if found is None:
            new.remove_activation()
            decision.row = decision.row._replace(reason=f"{new.WITHOUT}: no activation module directly behind it")
            continue
        cls = classes[found]
        decision.row = decision.row._replace(reason=f"with {new.ACTIVATION}, in place of {cls.__name__}")
        row = PlanRow(names[found], cls.__name__, "Identity", f"contained in {decision.row.name or 'the norm'}")
        decision.companions.append(TakenActivation(row, found, cls))


def _behind(layer: nn.Module, places: Places, classes: dict[nn.Module, type[nn.Module]]) -> nn.Module | None:
    """Find the activation that runs directly behind ``layer``; None if none is known that can be taken."""
    fused = layer._modules.get("act") if sync_class_of(original_class(layer)) is SyncBatchNormAct else None
    is_fused = fused is not None and classes[fused] is not nn.Identity
    found = fused if is_fused else _next_in_sequence(layer, places)
    if found is None or not (is_fused or classes[found] in _ACTIVATIONS):
        return None
    is_simple = "forward" not in found.__dict__ and next(found.parameters(), None) is None
    return found if is_simple and len(places[found]) == 1 and can_become(classes[found], nn.Identity) else None


def _next_in_sequence(layer: nn.Module, places: Places) -> nn.Module | None:
    """Return what follows ``layer`` in an nn.Sequential, its only place."""
    if len(places.get(layer, ())) != 1:
        return None
    [(parent, name)] = places[layer]
    if type(parent).forward is not nn.Sequential.forward or "forward" in parent.__dict__:
        return None
    entries = list(parent._modules.items())
    index = next(i for i, (n, _) in enumerate(entries) if n == name)
    return entries[index + 1][1] if index + 1 < len(entries) else None


def _companions(layer: nn.Module) -> list[Companion]:
    original = original_of(layer)
    return [] if original is None else original.companions
