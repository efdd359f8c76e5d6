"""Classifiers: a small ResNet, and any torchvision or timm classifier by name, without pretrained weights."""

import difflib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import syncbn


class Block(nn.Module):
    """Add two 3x3 convolutions to a shortcut: `relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))`.

    Where the shape changes, the shortcut is a 1x1 convolution with its own norm.
    """

    activation_behind: ClassVar = {"norm1": "act1"}  # which norms that contain an activation take the place of

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, channels, H / stride, W / stride)`."""
        y = self.act1(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


syncbn.register_block(Block, convs=("conv1", "conv2"), norms=("norm1", "norm2"), shortcut="shortcut")


class CifarResNet(nn.Sequential):
    """Stack one convolution, n blocks each of width, 2 width and 4 width, mean pooling and one linear layer.

    He et al. 2016, section 4.2, with 1x1 shortcuts.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        width: Channels of the first blocks.
        depth: 6 n + 2.

    Raises:
        ValueError: another depth.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 16, depth: int = 20) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"expected model.depth to be 6 n + 2, as 8, 20, 32, 44 or 56, got {depth}")
        channels = [width, *(width << stage for stage in range(3) for _ in range(depth // 6))]
        super().__init__(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *(Block(now, then, stride=1 if now == then else 2) for now, then in pairwise(channels)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels[-1], num_classes),
        )


class ResNet8(CifarResNet):
    """Depth 8: at width 16 it has 9 norm layers and 78 k parameters."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__(num_classes, in_channels, width, depth=8)


def torchvision(arch: str, num_classes: int = 10, in_channels: int = 3, **kwargs: Any) -> nn.Module:
    """Build a torchvision classifier by name, without weights.

    Raises:
        ValueError: an unknown name, or images that do not have 3 channels.
    """
    import torchvision.models as zoo

    _check_arch(arch, zoo.list_models(module=zoo), "torchvision")
    if in_channels != 3:
        raise ValueError(
            f"torchvision models read 3 channels, this data has {in_channels}: take model=timm or model=resnet8"
        )
    if arch in ("googlenet", "inception_v3"):  # their auxiliary heads would return a tuple
        kwargs = {"aux_logits": False, "init_weights": True, **kwargs}
    model: nn.Module = zoo.get_model(arch, weights=None, num_classes=num_classes, **kwargs)
    return model


def timm(arch: str, num_classes: int = 10, in_channels: int = 3, **kwargs: Any) -> nn.Module:
    """Build a timm model by name, without weights.

    Raises:
        ValueError: an unknown name.
    """
    import timm as zoo

    _check_arch(arch, zoo.list_models(), "timm")
    model: nn.Module = zoo.create_model(
        arch, pretrained=False, num_classes=num_classes, in_chans=in_channels, **kwargs
    )
    return model


def _check_arch(arch: str, names: Sequence[str], library: str) -> None:
    if arch in names:
        return
    close = difflib.get_close_matches(arch, names, n=5, cutoff=0.5)
    hint = f"close names: {', '.join(close)}" if close else f"some names: {', '.join(sorted(names)[:5])}"
    raise ValueError(f"unknown model.arch={arch!r}: {library} has {len(names)} classifiers; {hint}")


@torch.no_grad()
def check_reads(net: nn.Module, images: Tensor, num_classes: int, *, per_pixel: bool = False) -> None:
    """Try one batch in eval mode, so that a model unfit for the images fails before training, on every rank alike.

    Args:
        net: The model; its training mode is restored.
        images: `(N, C, H, W)`.
        num_classes: The classes the output must have.
        per_pixel: Whether it must have them for every pixel.

    Raises:
        ValueError: the model refuses the images, or its output is not `(N, num_classes)`; per pixel,
            `(N, num_classes, H, W)`.
    """
    training, shape = net.training, tuple(images.shape[1:])
    expected = (len(images), num_classes, *(images.shape[2:] if per_pixel else ()))
    try:
        output = net.eval()(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"the model cannot read images of shape {shape}: {error}") from error
    finally:
        net.train(training)
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if got != expected:
        raise ValueError(f"expected the model's output to be {expected}, got {got}")
