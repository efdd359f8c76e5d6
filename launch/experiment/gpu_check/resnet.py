"""A ResNet-50 (He et al. 2016, table 1; stride in the 3×3 convolution), since torchvision may not be installed."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EXPANSION = 4
_NUM_BLOCKS = (3, 4, 6, 3)
_NUM_CLASSES = 1000


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with BatchNorm, and a shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = _EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x), inplace=True)


class ResNet50(nn.Module):
    """53 convolutions with BatchNorm, and a classifier.

    Args:
        width: Channels of the first convolution; 64 is the ResNet-50.
        is_backbone: Whether the result is the last feature map, as a detector uses it.
    """

    def __init__(self, width: int = 64, is_backbone: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        channels = width
        for stage, num in enumerate(_NUM_BLOCKS):
            for i in range(num):
                blocks.append(Bottleneck(channels, width * 2**stage, 2 if i == 0 and stage > 0 else 1))
                channels = _EXPANSION * width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.classifier = None if is_backbone else nn.Linear(channels, _NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, 1000)`` logits, or the feature map ``(N, 2048, H / 32, W / 32)``."""
        features = cast(Tensor, self.blocks(self.stem(x)))
        if self.classifier is None:
            return features
        return cast(Tensor, self.classifier(torch.flatten(F.adaptive_avg_pool2d(features, 1), 1)))
