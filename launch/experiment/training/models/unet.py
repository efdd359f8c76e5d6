"""A small U-Net for segmentation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DoubleConv(nn.Sequential):
    """Apply two 3x3 convolutions, each with its norm and relu, to `(N, in_channels, H, W)`."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """Segment at four resolutions: three steps down, three steps up, each joined with what the way down saw there.

    At width 8 it has 15 norm layers and 123 k parameters (Ronneberger et al. 2015, Figure 1, with one level fewer,
    a norm after every convolution but the last, padding, and nearest-neighbour scaling on the way up). The head first
    widens: with fewer channels than classes in front of the logits, some seeds do not tell the classes apart.

    Args:
        num_classes: Channels of the output.
        in_channels: Channels of the images.
        width: Channels at full resolution; they double with each step down.
        head_width: Channels in front of the logits; 0 for `width`, without a layer between.

    Raises:
        ValueError: height or width of the images does not divide by 8.
    """

    def __init__(self, num_classes: int = 11, in_channels: int = 3, width: int = 8, head_width: int = 32) -> None:
        super().__init__()
        self.down1 = DoubleConv(in_channels, width)
        self.down2 = DoubleConv(width, 2 * width)
        self.down3 = DoubleConv(2 * width, 4 * width)
        self.bottom = DoubleConv(4 * width, 8 * width)
        self.up3 = DoubleConv(12 * width, 4 * width)
        self.up2 = DoubleConv(6 * width, 2 * width)
        self.up1 = DoubleConv(3 * width, width)
        wide = (nn.Conv2d(width, head_width, 1, bias=False), nn.BatchNorm2d(head_width), nn.ReLU())
        head = nn.Conv2d(head_width or width, num_classes, 1)
        self.head = nn.Sequential(*wide, head) if head_width else head

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(N, in_channels, H, W)` to logits `(N, num_classes, H, W)`."""
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(
                f"UNet reads images whose sides divide by 8, got {x.shape[2]} x {x.shape[3]}: scale or pad"
            )
        full = self.down1(x)  # (N, width, H, W)
        half = self.down2(F.max_pool2d(full, 2))  # (N, 2 width, H / 2, W / 2)
        quarter = self.down3(F.max_pool2d(half, 2))  # (N, 4 width, H / 4, W / 4)
        y = self.bottom(F.max_pool2d(quarter, 2))  # (N, 8 width, H / 8, W / 8)
        y = self.up3(_join(y, quarter))
        y = self.up2(_join(y, half))
        y = self.up1(_join(y, full))
        logits: Tensor = self.head(y)
        return logits


def _join(low: Tensor, high: Tensor) -> Tensor:
    """Scale `low` to twice its sides and lay it before the channels of `high`."""
    return torch.cat([F.interpolate(low, scale_factor=2), high], dim=1)
