"""The models: shapes, sizes, names."""

import pytest
import torch
from torch import nn

from experiment.training.models import classifiers


@pytest.mark.parametrize(("width", "num_classes", "in_channels", "side"), [(16, 10, 3, 28), (8, 3, 1, 8)])
def test_resnet8(width, num_classes, in_channels, side):
    net = classifiers.ResNet8(num_classes, in_channels, width)
    assert net(torch.randn(2, in_channels, side, side)).shape == (2, num_classes)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in net.modules()) == 9


def test_resnet8_has_78_thousand_parameters():
    assert sum(p.numel() for p in classifiers.ResNet8().parameters()) == 78_042


@pytest.mark.parametrize("depth", [8, 14, 20, 56])
def test_deeper_nets_of_the_same_blocks(depth):
    net = classifiers.CifarResNet(7, width=4, depth=depth)
    blocks = [layer for layer in net if isinstance(layer, classifiers.Block)]
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    assert [block.conv1.out_channels for block in blocks] == [c for c in (4, 8, 16) for _ in range(depth // 6)]
    assert sum(block.conv1.stride == (2, 2) for block in blocks) == 2
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in net.modules()) == depth + 2  # shortcuts
    if depth == 8:
        assert net.state_dict().keys() == classifiers.ResNet8(7, width=4).state_dict().keys()


@pytest.mark.parametrize("depth", [2, 18, 52])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth to be 6 n \\+ 2, .* got {depth}"):
        classifiers.CifarResNet(depth=depth)


def test_a_block_adds_its_shortcut():
    block = classifiers.Block(4, 4, stride=1)
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x.relu())


def test_torchvision_by_name():
    net = classifiers.torchvision("resnet18", num_classes=7)
    assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(ValueError, match=r"'resnet81': torchvision has \d+ classifiers; close names: .*resnet18"):
        classifiers.torchvision("resnet81")
    with pytest.raises(ValueError, match="some names"):
        classifiers.torchvision("!")
    with pytest.raises(ValueError, match="read 3 channels, this data has 1"):
        classifiers.torchvision("resnet18", in_channels=1)


def test_torchvision_models_without_their_auxiliary_heads():
    net = classifiers.torchvision("googlenet", num_classes=7)
    assert isinstance(net.train()(torch.randn(2, 3, 64, 64)), torch.Tensor)


def test_timm_by_name():
    net = classifiers.timm("regnety_002", num_classes=7, in_channels=1)
    assert net.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    with pytest.raises(ValueError, match="close names: efficientnet_b"):
        classifiers.timm("efficientnet_b")
    for name in ("hf-hub:someone/something", "resnet18.a1_in1k"):  # these would be looked up elsewhere
        with pytest.raises(ValueError, match="unknown"):
            classifiers.timm(name)


def test_a_model_unfit_for_the_images_is_found_before_training():
    net = classifiers.ResNet8()
    classifiers.check_reads(net, torch.randn(2, 3, 28, 28), 10)
    assert net.training
    assert net[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"cannot read images of shape \(1, 28, 28\)"):
        classifiers.check_reads(net, torch.randn(2, 1, 28, 28), 10)
    with pytest.raises(ValueError, match=r"output to be \(2, 5\), got \(2, 10\)"):
        classifiers.check_reads(net, torch.randn(2, 3, 28, 28), 5)
    with pytest.raises(ValueError, match=r"output to be \(2, 10, 28, 28\), got \(2, 10\)"):
        classifiers.check_reads(net, torch.randn(2, 3, 28, 28), 10, per_pixel=True)
    assert net.training
