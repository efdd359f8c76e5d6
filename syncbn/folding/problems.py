"""Why a model cannot be folded."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ..conversion.third_party import WRAPPERS, is_quantized_class, wrapper_of
from ..private import is_compiled


def problems_of(model: nn.Module) -> dict[str, str]:
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
