"""Segmentation: deeplabv3's image pooling leaves one value per channel and rank at one image per rank."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

segmentation = pytest.importorskip(
    "torchvision.models.segmentation", reason="torchvision does not import beside this torch"
)


def deeplab(name="deeplabv3_mobilenet_v3_large"):
    torch.manual_seed(0)
    model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model.double()


def images(size, side=48):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, side, side, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (size, side, side), generator=generator)


def loss_of(outputs, labels):
    return F.cross_entropy(outputs["out"], labels) + 0.5 * F.cross_entropy(outputs["aux"], labels)


def step(rank, world_size, name, sizes):
    model = DistributedDataParallel(syncbn.convert(deeplab(name)))
    x, labels = (part.split(sizes)[rank] for part in images(sum(sizes)))
    outputs = model(x)
    (loss_of(outputs, labels) * len(x) * world_size / sum(sizes)).backward()
    return outputs["out"].detach(), {n: p.grad for n, p in model.module.named_parameters()}, model.module.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("deeplabv3_mobilenet_v3_large", [1, 1]),
        ("deeplabv3_mobilenet_v3_large", [1, 2, 1]),
        ("deeplabv3_resnet50", [1, 1]),
    ],
    ids=str,
)
def test_deeplabv3_at_one_image_per_rank(run, name, sizes):
    model = deeplab(name)
    x, labels = images(sum(sizes))
    outputs = model(x)
    loss_of(outputs, labels).backward()
    results = run(step, len(sizes), name, sizes, timeout=120)
    close(torch.cat([out for out, _, _ in results]), outputs["out"])
    for _, gradients, state in results:
        close(gradients, {n: p.grad for n, p in model.named_parameters()})
        close(state, model.state_dict())


def pooling_branch():
    """The branch of ASPP that pools the image to 1 × 1."""
    torch.manual_seed(0)
    return segmentation.deeplabv3.ASPPPooling(4, 3).double()


def pool(rank, world_size, sizes):
    branch = syncbn.convert(pooling_branch())
    x = images(sum(sizes))[0].repeat(1, 2, 1, 1)[:, :4].split(sizes)[rank].requires_grad_()
    y = branch(x)
    (y**3).sum().backward()
    return y.detach(), x.grad, [p.grad for p in branch.parameters()], branch.state_dict()


@pytest.mark.parametrize("sizes", [[1, 1], [1, 2, 1]], ids=str)
def test_the_pooling_branch_alone(run, sizes):
    branch = pooling_branch()
    x = images(sum(sizes))[0].repeat(1, 2, 1, 1)[:, :4].requires_grad_()
    y = branch(x)
    (y**3).sum().backward()
    results = run(pool, len(sizes), sizes)
    close(torch.cat([result[0] for result in results]), y)
    close(torch.cat([result[1] for result in results]), x.grad)
    close([sum(parts) for parts in zip(*(r[2] for r in results), strict=True)], [p.grad for p in branch.parameters()])
    for result in results:
        close(result[3], branch.state_dict())


def one_image_in_all(rank, world_size):
    """With groups of one rank, each has one value per channel, as a single process with one image."""
    branch = syncbn.convert(pooling_branch(), process_group=1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        branch(torch.ones(1, 4, 8, 8, dtype=torch.float64))


def test_one_image_in_the_whole_group_is_refused(run):
    run(one_image_in_all, 2)


def close(actual, expected):
    """float64; two values per channel make 1 / std as large as 300, twice in a row."""
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)
