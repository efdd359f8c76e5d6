"""Look into one training forward: what reaches every BatchNorm, and which biases are redundant.

The forward runs on a deep copy, so that whatever it writes (statistics, modes, attributes) is thrown away with it, and
no layer of the copy communicates. Cost: the weights once more, and the activations of one forward without gradients.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ..conversion import third_party
from ..folding.readers import LAYERS, Output, Readers, copy_of, run
from ..nn.ghost import GhostBatchNorm


class ImageMoments(NamedTuple):
    """One input of a BatchNorm: values per channel of an image; mean and biased variance, ``(num_images, C)``."""

    count: int  # type: ignore[assignment]  # a field here, not tuple.count
    mean: Tensor
    var: Tensor


class Observation(NamedTuple):
    """What a forward showed: the inputs of each layer that uses batch statistics, and redundant biases with sizes.

    An input whose rows are no multiple of the images is None.
    """

    inputs: dict[str, list[ImageMoments | None]]
    redundant_biases: dict[str, int]


def unwrap(model: nn.Module) -> nn.Module:
    """Take ``model`` out of DDP, DataParallel and torch.compile.

    Raises:
        ValueError: If there is such a wrapper further down, or a sharded or lazy module.
    """
    model = third_party.unwrap(model)
    for name, module in model.named_modules():
        wrapper = third_party.wrapper_of(module)
        if wrapper is not None:
            raise ValueError(f"audit: got {wrapper} at {name or 'the top'!r}; audit the model before it is wrapped.")
        if isinstance(module, LazyModuleMixin):
            raise ValueError(f"audit: the lazy layer {name!r} does not know its shape yet; run one batch first.")
    return model


def observe(model: nn.Module, images: Tensor) -> Observation:
    """Run one training forward on a copy of ``model``; torch's random state is restored. Collectives: none.

    Args:
        model: A model out of its wrappers.
        images: The input; dimension 0 counts images.
    """
    num_images = len(images)
    if num_images == 1:  # twice the image changes nothing of its own values, and no BatchNorm refuses it
        images = torch.cat([images, images])
    twin, readers = copy_of(model).train(), Readers()
    inputs: dict[str, list[ImageMoments | None]] = {}
    for name, layer in twin.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            _make_local(layer)
            record = partial(_record, inputs.setdefault(name, []), readers, num_images, len(images))
            layer.register_forward_pre_hook(record, with_kwargs=True)
        elif isinstance(layer, LAYERS) and layer._parameters.get("bias") is not None:
            layer.register_forward_hook(readers.watch)
    with readers:
        kept = run(twin, (images,))
    biases = _redundant_biases(twin, readers.outputs)
    del kept  # not before: what the model returns is read by somebody
    return Observation(inputs, biases)


def _redundant_biases(model: nn.Module, outputs: list[Output]) -> dict[str, int]:
    """List biases, and sizes: those whose every output was read by batch normalization alone, and kept by nobody.

    BatchNorm subtracts the mean, so a bias added just before it changes nothing; in other channels than it, it does.
    """
    biases: dict[int, bool] = {}
    for seen in outputs:
        is_subtracted = bool(seen.reads) and all(read.by_batch for read in seen.reads)
        is_unneeded = is_subtracted and seen.has_channels and seen.ref() is None
        biases[id(seen.layer.bias)] = is_unneeded and biases.get(id(seen.layer.bias), True)
    return {name: p.numel() for name, p in model.named_parameters() if biases.get(id(p), False)}


def _make_local(layer: _BatchNorm) -> None:
    """Make ``layer`` normalize its own batch, on this rank alone and as a whole.

    Layers that synchronize (ours, torch's, others') do so in training mode only; in eval mode without running
    statistics they use those of their batch.
    """
    if third_party.is_sync_class(type(layer)):
        layer.training = False
        layer.running_mean = layer.running_var = None
    if isinstance(layer, GhostBatchNorm):
        layer.num_splits = 1


def _record(
    inputs: list[ImageMoments | None],
    readers: Readers,
    num_images: int,
    num_run: int,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Add the moments of the layer's input to ``inputs``; a forward pre-hook."""
    x: Tensor = args[0] if args else kwargs["input"]
    readers.is_looking = False
    is_by_image = x.dim() > 1 and x.numel() > 0 and len(x) % num_run == 0
    inputs.append(_image_moments(x, num_run, num_images) if is_by_image else None)
    readers.is_looking = True


def _image_moments(x: Tensor, num_run: int, num_images: int) -> ImageMoments:
    """Compute the moments of the first ``num_images`` of the ``num_run`` images in ``x``, ``(rows, C, *)``."""
    values = x.reshape(num_run, len(x) // num_run, x.shape[1], -1)[:num_images]
    if x.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    var, mean = torch.var_mean(values, (1, 3), correction=0)
    return ImageMoments(values.shape[1] * values.shape[3], mean.double(), var.double())
