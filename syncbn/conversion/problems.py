"""Why a layer cannot be converted: as it is now, to that class, or at all."""

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..nn.converted import can_become
from .original import original_class, original_of
from .patches import UNDO, patch_of


def of_layer(layer: nn.Module) -> str | None:
    """Say why a chosen layer cannot be converted as it is now."""
    original = original_of(layer)
    if isinstance(layer, LazyModuleMixin):
        return "a lazy layer does not know its channels yet: run one batch first, then convert."
    if is_parametrized(layer):
        return "a parametrized layer: remove_parametrizations first, or leave it out with exclude."
    if original is not None and type(layer) is not original.swapped_to:
        return f"its class was changed to {type(layer).__name__} after it was converted: undo that first."
    return None if original is None else next(filter(None, (c.problem() for c in original.companions)), None)


def of_change(layer: nn.Module, becomes: type[nn.Module]) -> str | None:
    """Say why ``layer`` cannot become a ``becomes``: for what was set on the instance, or for Python's reasons."""
    cls = original_class(layer)
    patch = patch_of(layer, becomes, cls)
    if patch is not None:
        return f"its {patch} was set on the instance and would stay as it is: convert before, or undo it ({UNDO})."
    if not can_become(cls, becomes):
        return f"an object of {cls.__name__} cannot become a {becomes.__name__} (as with __slots__): use exclude."
    return None


def of_class(cls: type[nn.Module]) -> str:
    """Say what to do for a class that is not known."""
    name = cls.__name__
    return (
        f"{name} is a BatchNorm subclass that syncbn does not know. If it only normalizes, call "
        f"syncbn.register({name}); if it does more, syncbn.register({name}, YourSubclass), with a subclass of "
        "syncbn.SyncBatchNorm that does the same."
    )
