"""Find the norms that can be folded into the layer before them, from one forward pass; and why others cannot."""

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from ..conversion.classes import sync_class_of
from ..conversion.frozen import eps_of
from ..conversion.patches import patch_of
from ..conversion.swap import PLAIN
from ..conversion.third_party import activates, is_frozen_layer, keeps_statistics
from ..nn.batchnorm import SyncBatchNorm
from ..nn.converted import can_become
from ..nn.frozen import FrozenStatistics
from ..nn.ghost import GhostBatchNorm
from ..nn.renorm import BatchRenorm
from .linear import is_linear, is_of_torch
from .readers import LAYERS, Output, Readers, copy_of_arguments, run

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Found(NamedTuple):
    """What one forward pass showed: names of norms, with that of the layer before or with the reason why not."""

    pairs: dict[str, str]
    stays: dict[str, str]
    output: Any


def find(model: nn.Module, args: tuple[Any, ...]) -> Found:
    """Run ``model``, which is thrown away, once, and pair every norm that alone reads the one output of a layer."""
    readers, hooked = Readers(), {m for m in model.modules() if any(getattr(m, name, None) for name in _HOOKS)}
    norms = {name: module for name, module in model.named_modules() if _is_norm(module)}
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    inputs: dict[nn.Module, tuple[Any, ...]] = {}  # of layers that may compute anything

    def keep(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inputs[layer] = copy_of_arguments(args)

    handles = [layer.register_forward_hook(readers.watch) for layer in layers]
    handles += [m.register_forward_hook(keep) for m in layers if not is_of_torch(m)]
    for norm in norms.values():
        handles.append(norm.register_forward_pre_hook(readers.enter, with_kwargs=True))
        handles.append(norm.register_forward_hook(readers.leave))
    with readers:
        output = run(model, args)
    for handle in handles:
        handle.remove()
    judge = _Judge(model, readers, hooked, inputs)
    pairs, stays = {}, {}
    for name, norm in norms.items():
        reason = judge.of_norm(norm) or judge.of_pair(norm)
        if reason is None:
            pairs[name] = judge.names[judge.output_into(norm).layer]
        else:
            stays[name] = reason
    return Found(pairs, stays, output)


class _Judge:
    """Say what is in the way of folding a norm, or of folding into a layer; None if nothing is."""

    def __init__(self, model: nn.Module, readers: Readers, hooked: set[nn.Module], inputs: dict[Any, Any]) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.readers, self.hooked, self.inputs = readers, hooked, inputs
        self.num_owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())

    def output_into(self, norm: nn.Module) -> Output:
        """Return the output that ``norm`` has read."""
        output = self.readers.inputs[norm][0]
        assert output is not None
        return output

    def of_norm(self, norm: nn.Module) -> str | None:
        inputs = self.readers.inputs.get(norm, [])
        if not _only_normalizes(norm):
            return _why_not(type(norm))
        if norm._buffers.get("running_mean") is None:
            return "it has no running statistics (track_running_stats=False)"
        if not inputs:
            return "the example did not reach it"
        if len(inputs) > 1:
            return f"it is called {len(inputs)} times"
        if inputs[0] is None:
            return "its input is not the very output of a convolution or linear layer"
        return self._of_module(norm, "it")

    def of_pair(self, norm: nn.Module) -> str | None:
        output = self.output_into(norm)
        layer, name = output.layer, self.names[output.layer]
        num_calls = sum(other.layer is layer for other in self.readers.outputs)
        if num_calls > 1:
            return f"{name} is called {num_calls} times"
        if not output.has_channels:
            return f"it normalizes dimension 1 of the output of {name}, whose channels are in another"
        if output.ref() is not None or any(read.norm is not norm for read in output.reads):
            return f"the output of {name} is used elsewhere too"
        if any(self.num_owners[id(p)] > 1 for p in layer.parameters(recurse=False)):
            return f"{name} shares its weight or bias with another layer"
        reason = self._of_module(layer, name)
        if reason is None and layer._parameters.get("weight") is None:
            return f"{name} has no weight of its own"
        if reason is None and layer in self.inputs and not is_linear(layer, norm, self.inputs[layer]):
            return f"{name} ({type(layer).__name__}) is not linear in its weight and bias"
        return reason

    def _of_module(self, module: nn.Module, name: str) -> str | None:
        given = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if is_parametrized(module):
            return f"{name} is parametrized: call remove_parametrizations first"
        if module in self.hooked:
            return f"{name} has hooks, which would see other values, or change them: remove them first"
        if patch_of(module, type(module), type(module)) is not None:
            return f"the forward of {name} was set on the instance: undo that first"
        if any(type(t) not in (Tensor, nn.Parameter) for t in given):
            return f"{name} has no plain tensors: fold before it is sharded or quantized"
        if any(self.readers.num_reads[id(t)] > 1 for t in given):
            return f"{name} is read elsewhere too (its weight or another tensor of it)"
        return None


def _is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is of a kind that may be folded: a BatchNorm, or what keeps statistics as one does."""
    return isinstance(module, _BatchNorm | FrozenStatistics) or is_frozen_layer(module) or keeps_statistics(module)


def _why_not(cls: type[nn.Module]) -> str:
    """Say why norms of ``cls`` are not folded; `register` helps with classes that derive from torch's alone."""
    name = cls.__name__
    if issubclass(cls, _InstanceNorm):
        return f"{name} is an instance norm; only batch norms are folded"
    if issubclass(cls, _BatchNorm) and not issubclass(cls, SyncBatchNorm):
        return f"{name} may do more than normalize; if it does not, call syncbn.register({name})"
    return f"{name} is not folded, as it may do more than one multiply-add per channel"


def _only_normalizes(norm: nn.Module) -> bool:
    """Whether ``norm``, in eval mode, is one multiply-add per channel, but for what a fused layer does after it."""
    cls, is_frozen = type(norm), is_frozen_layer(norm)
    if not can_become(cls, nn.Identity) or (is_frozen and eps_of(norm) is None):
        return False
    is_known = cls in (FrozenStatistics, GhostBatchNorm, BatchRenorm) or sync_class_of(cls, is_frozen) in PLAIN
    return is_known or activates(cls)
