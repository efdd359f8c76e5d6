"""The U-Net: shapes, sizes, norms."""

import pytest
import torch
from torch import nn

import syncbn
from experiment.training.models import classifiers
from experiment.training.models.unet import UNet


@pytest.mark.parametrize(("width", "num_classes", "in_channels", "sides"), [(8, 11, 3, (32, 32)), (4, 2, 1, (8, 24))])
def test_every_pixel_has_logits(width, num_classes, in_channels, sides):
    net = UNet(num_classes, in_channels, width)
    images = torch.randn(2, in_channels, *sides)
    assert net(images).shape == (2, num_classes, *sides)
    classifiers.check_reads(net, images, num_classes, per_pixel=True)


def test_sides_that_do_not_halve_three_times_are_refused():
    with pytest.raises(
        ValueError, match=r"shape \(3, 28, 32\): UNet reads images whose sides divide by 8, got 28 x 32"
    ):
        classifiers.check_reads(UNet(), torch.randn(2, 3, 28, 32), 11, per_pixel=True)
    with pytest.raises(ValueError, match=r"output to be \(2, 11\), got \(2, 11, 32, 32\)"):
        classifiers.check_reads(UNet(), torch.randn(2, 3, 32, 32), 11)


def test_every_convolution_but_the_last_has_a_norm_and_no_bias():
    net = UNet()
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.bias is None for layer in convolutions] == [True] * 15 + [False]
    assert sum(p.numel() for p in net.parameters()) == 123_139
    converted = syncbn.convert(net)
    assert sum(isinstance(layer, syncbn.SyncBatchNorm) for layer in converted.modules()) == 15


def test_both_ways_meet_at_every_resolution():
    """The output hangs on the coarsest map and on each of the three that are joined to it."""
    net, x = UNet(width=4).eval(), torch.randn(1, 3, 16, 16)
    seen = []
    for layer in (net.down1, net.down2, net.down3, net.bottom):
        layer.register_forward_hook(lambda layer, inputs, y: y.retain_grad() or seen.append(y))
    net(x).square().sum().backward()
    assert [tuple(y.shape[1:]) for y in seen] == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (32, 2, 2)]
    assert all(y.grad.abs().amax((0, 2, 3)).count_nonzero() for y in seen)
