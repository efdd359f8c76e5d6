"""The networks of the experiments, written with BatchNorm and converted to the arm's norm."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from experiment.training.models.classifiers import ResNet8

BATCH = 32  # images of one SGD step
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
NUM_CLASSES = 10


class NoisyBatchNorm(nn.BatchNorm2d):
    """Shift and scale the output of BatchNorm at random, anew in every step: y * scale + shift.

    Per channel and step, shift is drawn from (-1/2, 1/2) and scale from (1, 5/4), and both vary by up to 1/10 from
    image to image. Eval mode takes their means, 0 and 9/8. After Santurkar et al. 2018, section 2.1 and appendix A.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, and put a shift back in."""
        y: Tensor = super().forward(input)
        if not self.training:
            return 1.125 * y
        per_step, per_image = torch.rand(2, 1, y.shape[1], 1, 1), torch.rand(2, *y.shape[:2], 1, 1)
        shift, scale = per_step - 0.5 + 0.2 * (per_image - 0.5)
        z: Tensor = y * (1.125 + scale / 4) + shift
        return z


def with_norm(net: nn.Module, arm: str) -> nn.Module:
    """Convert the BatchNorm layers to those of an arm: bn, none, ln, gn, noisy_bn, or ghost_4 for batches of 4."""
    name, _, number = arm.partition("_")
    special: dict[str, Callable[..., nn.Module]] = {
        "noisy": NoisyBatchNorm,
        "ghost": partial(syncbn.GhostBatchNorm, num_splits=BATCH // int(number if name == "ghost" else 1)),
    }
    options: dict[str, Any] = {"num_groups": 8} if arm == "gn" else {}
    return syncbn.convert(net, special.get(name, arm), **options)


def mlp(
    arm: str,
    activation: str = "relu",
    depth: int = 5,
    width: int = 64,
    dropout: float = 0.0,
    scale: float = 1.0,
) -> nn.Module:
    """Build hidden layers of linear, norm, activation (and dropout), and a linear classifier of 64 pixels.

    Weights start as He's for ReLU and as Glorot's for the others, times `scale`; of the classifier as torch's.
    """
    layers: list[nn.Module] = []
    for index in range(depth):
        linear = nn.Linear(64 if index == 0 else width, width, bias=False)
        if activation == "relu":
            nn.init.kaiming_normal_(linear.weight)
        else:
            nn.init.xavier_normal_(linear.weight)
        linear.weight.data.mul_(scale)
        layers += [linear, nn.BatchNorm1d(width), ACTIVATIONS[activation]()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return with_norm(nn.Sequential(*layers, nn.Linear(width, NUM_CLASSES)), arm)


class Residual(nn.Module):
    """Add `linear(activation(norm(x)))` to x."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        linear = nn.Linear(width, width, bias=False)
        nn.init.kaiming_normal_(linear.weight)
        self.branch = nn.Sequential(nn.BatchNorm1d(width), ACTIVATIONS[activation](), linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C)` to `(N, C)`."""
        y: Tensor = x + self.branch(x)
        return y


def residual_mlp(arm: str, activation: str, depth: int, width: int) -> nn.Module:
    """Build a linear layer, `depth` residual blocks with the norm in front (He et al. 2016), and a classifier."""
    first, blocks = nn.Linear(64, width, bias=False), [Residual(width, activation) for _ in range(depth)]
    return with_norm(nn.Sequential(first, *blocks, nn.BatchNorm1d(width), nn.Linear(width, NUM_CLASSES)), arm)


def resnet(arm: str) -> nn.Module:
    """Build the small ResNet of setting R; its convolutions start as He's, so that it also learns without norm."""
    net = ResNet8(NUM_CLASSES)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return with_norm(net, arm).to(memory_format=torch.channels_last)
