"""Convert at the end of ``configure_model``: two hooks of one LightningModule that replace its own for one call.

Lightning calls the callbacks' ``setup``, then the module's, then its ``configure_model``. The converter hangs a hook
on the module's ``setup``, and only that hook hangs one on ``configure_model``: callbacks that ask in their ``setup``
whether the project overrides ``configure_model``, as WeightAveraging does, get the project's answer.

The hooks are functions of the module level, bound to the module: unlike closures they act on the right module after
deepcopy, and pickle. Their names are what Lightning looks up. What they wait to do is kept outside of the module, so
that copies have no part in it.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..conversion.convert import convert
from ..conversion.norms.registry import Norm
from .namespaces import LightningModule, Trainer


@dataclass
class _Waiting:
    """What waits for the end of one module's ``configure_model``."""

    trainer: Trainer
    conversions: list[tuple[Norm, dict[str, Any]]] = field(default_factory=list)
    own_hooks: dict[str, Any] = field(default_factory=dict)  # that the user has set on the instance


_waiting: WeakKeyDictionary[nn.Module, _Waiting] = WeakKeyDictionary()


def wait(trainer: Trainer, module: LightningModule, norm: Norm, options: dict[str, Any]) -> None:
    """Convert ``module``, and the averages of it in other callbacks, as soon as its ``configure_model`` has run."""
    if module in _waiting and _waiting[module].trainer is not trainer:
        forget(module)
    _waiting.setdefault(module, _Waiting(trainer)).conversions.append((norm, options))
    _hang(module, setup)


def forget(module: LightningModule) -> None:
    """Take the hooks off that have not run."""
    for hook in (setup, configure_model):
        _take_off(module, hook)
    _waiting.pop(module, None)


def setup(self: LightningModule, *args: Any, **kwargs: Any) -> None:
    """Set up as the LightningModule does, which all callbacks have done by now."""
    _take_off(self, setup)
    self.setup(*args, **kwargs)
    if self in _waiting:
        _hang(self, configure_model)


def configure_model(self: LightningModule) -> None:
    """Build the model as the LightningModule does, then convert it."""
    _take_off(self, configure_model)
    waiting = _waiting.pop(self, None)
    self.configure_model()
    if waiting is None:  # a copy
        return
    averages = list(_averages(waiting.trainer, self))
    for norm, options in waiting.conversions:
        convert(self, norm, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model has given them
            for average in averages:
                convert(average, norm, **options)


def _hang(module: nn.Module, hook: Callable[..., None]) -> None:
    own = module.__dict__.get(hook.__name__)
    if getattr(own, "__func__", None) is hook:
        return
    if own is not None:
        _waiting[module].own_hooks[hook.__name__] = own
    module.__dict__[hook.__name__] = MethodType(hook, module)


def _take_off(module: nn.Module, hook: Callable[..., None]) -> None:
    if getattr(module.__dict__.get(hook.__name__), "__func__", None) is hook:
        del module.__dict__[hook.__name__]
        if module in _waiting:
            module.__dict__.update(_waiting[module].own_hooks)


def _averages(trainer: Trainer, module: LightningModule) -> Iterator[nn.Module]:
    """Yield the averages that callbacks keep of the module or a part of it; their layers are named as the module's."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for attribute, value in vars(callback).items():
            average = value.module if isinstance(value, AveragedModel) else value
            if not isinstance(average, nn.Module) or (average is value and attribute != "_average_model"):
                continue
            _take_off(average, setup)
            name = next((name for name, part in module.named_modules() if _is_copy(average, part)), None)
            if name is not None:
                yield _nested(average, name)


def _is_copy(average: nn.Module, part: nn.Module) -> bool:
    """Ask whether ``average`` is built as ``part`` is."""
    if type(average) is not type(part) or average is part:
        return False
    return [name for name, _ in average.named_modules()] == [name for name, _ in part.named_modules()]


def _nested(module: nn.Module, name: str) -> nn.Module:
    """Put a module below empty ones, so that its layers have the names of those of the part ``name``."""
    for key in reversed(name.split(".") if name else []):
        outer = nn.Module()
        outer.add_module(key, module)
        module = outer
    return module
