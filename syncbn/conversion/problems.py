"""Why a layer cannot be converted: as it is now, to that class, or at all; and why a model cannot be folded."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..nn.converted import can_become
from ..private import is_compiled
from .patches import UNDO, patch_of
from .swap import original_class, original_of
from .third_party import WRAPPERS, is_quantized_class, wrapper_of


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


def of_folding(model: nn.Module) -> dict[str, str]:
    """Say by module why ``model`` cannot be folded as it is."""
    problems: dict[str, str] = {}
    for name, module in model.named_modules():
        problem = _of_kind(module)
        is_training = module.training and (module is model or isinstance(module, _BatchNorm))
        if problem is not None:
            problems[name] = problem
        elif is_training and "" not in problems:
            problems[name] = "in training mode; call model.eval() first"
    return problems


def _of_kind(module: nn.Module) -> str | None:
    wrapper = wrapper_of(module)
    if wrapper is not None:
        attribute, call = WRAPPERS[wrapper]
        return f"wrapped by {call}; fold {'before' if attribute is None else f'what is inside, its {attribute}'}"
    if is_compiled(module):
        return "compiled; fold before"
    if isinstance(module, LazyModuleMixin):
        return "a lazy layer that does not know its shape yet; run one batch first"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted or traced; fold before"
    if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return "on the meta device; load its values first"
    return "quantized; fold before, in floating point" if is_quantized_class(type(module)) else None


def by_reason(problems: dict[str, str]) -> list[str]:
    """Write one line for each reason, with the names of the modules it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in problems.items():
        names.setdefault(reason, []).append(name or "(the model itself)")
    return [f"  {', '.join(group)}: {reason}" for reason, group in names.items()]
