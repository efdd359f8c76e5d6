"""Classes of other packages that conversion and audit know: by name, so that none of them need be installed."""

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Normalize, then drop and activate.
ACTIVATING = {"timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"}
# Only normalize.
PLAIN = {"mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm", "mmengine.model.utils._BatchNormXd"}

# Part of the names of classes whose statistics, weight and bias never move, as buffers (torchvision, detectron2, timm;
# DetrFrozenBatchNorm2d and its like in transformers); and of those that drop and activate too.
FROZEN, FROZEN_ACTIVATING = "FrozenBatchNorm", "FrozenBatchNormAct"
FROZEN_BUFFERS = ("weight", "bias", "running_mean", "running_var")

# The activation that a module runs directly behind a norm, by the names of both in it.
_ACTIVATION_BEHIND = {
    "timm.models.resnet.ResNet": {"bn1": "act1"},
    "timm.models.resnet.BasicBlock": {"bn1": "act1"},
    "timm.models.resnet.Bottleneck": {"bn1": "act1", "bn2": "act2"},
}

# Buffers of modules that normalize with statistics of the batch, whatever their class.
_STATISTICS = {f"{kind}_{what}" for kind in ("running", "moving") for what in ("var", "variance", "std")}

# Converters that replace every BatchNorm, ours too, by torch's layer.
CONVERTERS = (
    "nn.SyncBatchNorm.convert_sync_batchnorm, Trainer(sync_batchnorm=True), timm's --sync-bn and "
    "convert_sync_batchnorm, Ignite's auto_model(sync_bn=True), mmengine's sync_bn"
)


class Wrapper(NamedTuple):
    """How a model is wrapped: the attribute that holds it, None if it is not taken off; and the call that does it."""

    attribute: str | None
    call: str


WRAPPERS = {
    "DataParallel": Wrapper("module", "DataParallel"),
    "DistributedDataParallel": Wrapper("module", "DistributedDataParallel"),
    "OptimizedModule": Wrapper("_orig_mod", "torch.compile"),
    "FullyShardedDataParallel": Wrapper(None, "FullyShardedDataParallel"),
    "FSDPModule": Wrapper(None, "fully_shard"),
    "DeepSpeedEngine": Wrapper("module", "deepspeed.initialize"),
}
FABRIC = Wrapper("module", "fabric.setup")  # nothing is refused on its account: inside there is one of the above
_LIGHTNING = (
    "use syncbn.lightning.NormConverter, or in a LightningModule that compiles or shards itself, call syncbn.convert "
    "before it does, in configure_model"
)


def activates(cls: type[nn.Module]) -> bool:
    """Whether a layer of ``cls`` drops and activates after it has normalized."""
    return f"{cls.__module__}.{cls.__qualname__}" in ACTIVATING or any(
        FROZEN_ACTIVATING in name for name in _names(cls)
    )


def activation_behind(cls: type[nn.Module], norm: str) -> str | None:
    """Return the name of the activation that exactly a ``cls`` runs directly behind its ``norm``, if that is known.

    A class of the user's own says so by an attribute ``activation_behind``, as in ``{"norm1": "act1"}``.
    """
    known = _ACTIVATION_BEHIND.get(f"{cls.__module__}.{cls.__qualname__}", {})
    return vars(cls).get("activation_behind", known).get(norm)  # type: ignore[no-any-return]


def only_normalizes(cls: type[nn.Module]) -> bool:
    """Whether ``cls`` is known to do what its base in torch does."""
    return f"{cls.__module__}.{cls.__qualname__}" in PLAIN


def unfrozen_activating() -> type[nn.Module] | None:
    """Return timm's class of fused layers that train, if timm is imported."""
    return getattr(sys.modules.get("timm.layers.norm_act"), "BatchNormAct2d", None)


def is_frozen_class(cls: type[nn.Module]) -> bool:
    """Whether ``cls`` is a FrozenBatchNorm2d of any package, or derives from one."""
    return any(FROZEN in name for name in _names(cls))


def is_frozen_layer(layer: nn.Module) -> bool:
    """Whether ``layer`` is of such a class, with statistics; or like one: four buffers ``(C,)`` and no parameters."""
    if isinstance(layer, _BatchNorm) or layer._buffers.get("running_mean") is None:
        return False
    if is_frozen_class(type(layer)):
        return True
    if "momentum" in layer.__dict__:  # they do move
        return False
    shapes = {tuple(b.shape) for name in FROZEN_BUFFERS if (b := layer._buffers.get(name)) is not None}
    has_all = all(layer._buffers.get(name) is not None for name in FROZEN_BUFFERS)
    return has_all and len(shapes) == 1 and len(*shapes) == 1 and next(layer.parameters(), None) is None


def keeps_statistics(layer: nn.Module) -> bool:
    """Whether ``layer`` has running statistics, and so may normalize with those of its batch."""
    return any(isinstance(layer._buffers.get(name), Tensor) for name in _STATISTICS)


def is_sync_name(name: str) -> bool:
    """Whether a layer of a class of this name synchronizes in training, as ours, torch's and others' say."""
    return "Sync" in name


def is_sync_class(cls: type[nn.Module]) -> bool:
    """Whether a layer of ``cls`` synchronizes in training, see `is_sync_name`."""
    return any(is_sync_name(name) for name in _names(cls))


def is_quantized_class(cls: type[nn.Module]) -> bool:
    """Whether ``cls`` is one of torch's layers of quantized models, or of those that train to be."""
    parts = cls.__module__.split(".")
    return parts[0] == "torch" and bool({"quantized", "qat"} & {*parts}) and cls.__name__ != "FloatFunctional"


def wrapper_of(module: nn.Module) -> str | None:
    """Return the name of the wrapper that ``module`` is; None for any other module."""
    return next((name for name in _names(type(module)) if name in WRAPPERS), None)


def advice(model: nn.Module, wrapper: str) -> str:
    """Say what to do about ``wrapper`` (or "torch.compile") in ``model``: by who put it there, as far as it shows."""
    classes = [type(module) for module in model.modules()]
    names = {name for cls in classes for name in _names(cls)}
    if "_FabricModule" in names:
        call = FABRIC.call
    elif any("_is_accelerate_prepared" in vars(module) for module in model.modules()):
        call = "accelerator.prepare"
    elif "LightningModule" in names:
        return _LIGHTNING
    elif any(cls.__module__.startswith("mmengine.") and wrapper in _names(cls) for cls in classes):
        call = "it wraps, in the Runner's wrap_model"
    else:
        call = WRAPPERS[wrapper].call if wrapper in WRAPPERS else wrapper
    return f"call syncbn.convert before {call}"


def unwrap(model: nn.Module) -> nn.Module:
    """Take ``model`` out of DDP and its subclasses, DataParallel, torch.compile, Fabric and DeepSpeed."""
    while (attribute := _attribute(model)) is not None:
        model = getattr(model, attribute)
    return model


def _attribute(model: Any) -> str | None:
    if "_FabricModule" in _names(type(model)):
        return FABRIC.attribute
    wrapper = wrapper_of(model)
    return None if wrapper is None else WRAPPERS[wrapper].attribute


def _names(cls: type[nn.Module]) -> list[str]:
    return [base.__name__ for base in cls.__mro__]
