"""`save_memory`: hooks on a model's modules that watch its forward pass in training."""

import sys
import threading
import warnings
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import private
from .forward import Forward

M = TypeVar("M", bound=nn.Module)
_HANDLES = "_syncbn_memory_hooks"
_local = threading.local()  # forward: the forward pass that is watched in this thread
_told: set[str] = set()


def save_memory(model: M) -> M:
    """Keep less for backward: an activation of a normalized map is computed again instead of kept, in place.

    Of ``y = act(norm(x))`` and ``y = act(norm(x) + other)`` autograd keeps x for the normalization, and y for what
    reads it. With this, y is not kept, but computed again in backward from x, and from ``other`` if that is kept
    anyway, by the operators of the forward pass: gradients have the same bits. Recognized are BatchNorm layers of
    torch, timm and syncbn, in training and in eval mode, alone or followed by ReLU, ReLU6, LeakyReLU, SiLU, Hardswish
    or GELU, as module or function, in place or not. All else is kept as before.

    It costs a second normalization and activation of each such map, and no collectives: of a synchronized layer the
    sums are kept. Where hooks of torch are at work (activation checkpointing, ``save_on_cpu``), those decide; your own
    saved-tensor hooks get what is kept, when the forward pass ends. Under torch.compile, which recomputes by itself,
    and before torch 2.7 it does nothing, and says so once.

    Source: In-Place Activated BatchNorm (Rota Bulò, Porzi, Kontschieder 2018) has the aim, and inverts the activation
    instead, which takes one that can be inverted.

    Args:
        model: A model, before or after `convert` and DDP. `revert` undoes it.

    Returns:
        ``model`` itself. Copies and pickles of it save memory too.

    Raises:
        TypeError: If ``model`` is no nn.Module.
        RuntimeError: In backward, if a map that is needed was changed in place since the forward pass.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"syncbn.save_memory: expected a model (nn.Module), got {type(model).__name__}.")
    if not private.can_see_hooks:
        _tell(f"it needs torch 2.7, and this is {torch.__version__}")
        return model
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        warnings.warn(f"syncbn.save_memory found no BatchNorm layer in this {type(model).__name__}.", stacklevel=2)
    for module in model.modules():
        if _HANDLES not in module.__dict__ and not isinstance(module, torch.jit.ScriptModule):
            module.__dict__[_HANDLES] = (
                module.register_forward_pre_hook(_before, with_kwargs=True),
                module.register_forward_hook(_after, always_call=True),
            )
    return model


def stop_saving(model: nn.Module) -> None:
    """Undo `save_memory`."""
    for module in model.modules():
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()


def _before(module: nn.Module, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        _tell_in_graph()
        return
    forward = _current()
    if forward is None:
        _open(sys._getframe(1))
    elif _is_on_top(forward):
        forward.look_at(args)
        if kwargs:
            forward.look_at(kwargs)


def _after(module: nn.Module, args: Any, output: Any) -> None:
    forward = None if torch.compiler.is_compiling() else _current()
    if forward is None:
        return
    if forward.frame is sys._getframe(1):
        _close(forward)
    elif _is_on_top(forward):
        forward.read_layer(module, output)
        forward.read_activation(module, output)
        forward.look_at(output)


def _current() -> Forward | None:
    """Return the forward pass that is watched in this thread; one that was ended by an error is closed."""
    forward: Forward | None = getattr(_local, "forward", None)
    if forward is not None and not forward.is_running():
        _close(forward)
        return None
    return forward


def _open(frame: FrameType) -> None:
    """Watch the call in ``frame``, unless nothing is saved in it, or torch's own hooks decide what is."""
    if not torch.is_grad_enabled() or private.dual_level() >= 0 or private.are_transforms_active():
        return
    hooks = private.top_saved_tensors_hooks(True)
    if private.is_traced() or (hooks and str(getattr(hooks[0], "__module__", "")).startswith("torch.")):
        return
    forward = Forward(frame, hooks)
    try:
        forward.hooks.__enter__()
    except RuntimeError:  # torch.autograd.graph.disable_saved_tensors_hooks
        return
    _local.forward = forward


def _close(forward: Forward) -> None:
    _local.forward = None
    if _is_on_top(forward):
        forward.hooks.__exit__()
    forward.close()


def _is_on_top(forward: Forward) -> bool:
    """Whether autograd saves through this forward pass now, and not through a checkpoint within it."""
    hooks = private.top_saved_tensors_hooks(True)
    return bool(hooks) and hooks[0] is forward.hooks.pack_hook


def _tell(why: str) -> None:
    if why not in _told:
        _told.add(why)
        warnings.warn(f"syncbn.save_memory does nothing here: {why}.", stacklevel=3)


@private.constant_in_graph
def _tell_in_graph() -> None:
    _tell("torch.compile recomputes by itself what costs little")
