"""Classes of other packages that conversion and audit know: by name, so that none of them need be installed."""

from torch import nn

# Normalize, then drop and activate.
ACTIVATING = {"timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"}

# Part of the names of classes whose statistics, weight and bias never move, as buffers (torchvision, detectron2, timm;
# DetrFrozenBatchNorm2d and its like in transformers); and of those that drop and activate too.
FROZEN, FROZEN_ACTIVATING = "FrozenBatchNorm", "FrozenBatchNormAct"

# Wrappers of a model, and the attribute that holds it; None for those that are not taken off.
WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": None,
    "FSDPModule": None,
}


def activates(cls: type[nn.Module]) -> bool:
    """Whether a layer of ``cls`` drops and activates after it has normalized."""
    return f"{cls.__module__}.{cls.__qualname__}" in ACTIVATING or FROZEN_ACTIVATING in cls.__name__


def is_frozen_class(cls: type[nn.Module]) -> bool:
    """Whether ``cls`` is a FrozenBatchNorm2d of any package."""
    return FROZEN in cls.__name__


def is_frozen_layer(layer: nn.Module) -> bool:
    """Whether ``layer`` is of such a class, and has statistics."""
    return is_frozen_class(type(layer)) and layer._buffers.get("running_mean") is not None


def is_sync_name(name: str) -> bool:
    """Whether a layer of a class of this name synchronizes in training, as ours, torch's and others' say."""
    return "Sync" in name


def is_sync_class(cls: type[nn.Module]) -> bool:
    """Whether a layer of ``cls`` synchronizes in training, see `is_sync_name`."""
    return any(is_sync_name(base.__name__) for base in cls.__mro__)


def wrapper_of(module: nn.Module) -> str | None:
    """Return the name of the wrapper that ``module`` is; None for any other module."""
    return next((base.__name__ for base in type(module).__mro__ if base.__name__ in WRAPPERS), None)


def unwrap(model: nn.Module) -> nn.Module:
    """Take ``model`` out of DDP, DataParallel and torch.compile."""
    while (attribute := WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, attribute)
    return model
