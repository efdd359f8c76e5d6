"""Detection: heads that run on every FPN level, RoI heads without a single RoI on some ranks, maps of any size."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

detection = pytest.importorskip("torchvision.models.detection", reason="torchvision does not import beside this torch")
fpn = pytest.importorskip(
    "torchvision.ops.feature_pyramid_network",
    reason="torchvision does not import beside this torch",
)

LEVELS = [16, 8, 4, 2, 1]


class PyramidAndHead(nn.Module):
    """torchvision's FPN and RetinaNet head, every BatchNorm of the head shared by the five levels."""

    def __init__(self):
        super().__init__()
        self.pyramid = fpn.FeaturePyramidNetwork([3] * 5, 4, norm_layer=nn.BatchNorm2d)
        self.head = detection.retinanet.RetinaNetHead(4, num_anchors=2, num_classes=3, norm_layer=nn.BatchNorm2d)

    def forward(self, levels):
        outputs = self.head(list(self.pyramid({str(i): x for i, x in enumerate(levels)}).values()))
        return torch.cat([outputs["cls_logits"], outputs["bbox_regression"]], dim=-1)


class Towers(PyramidAndHead):
    """The same without torchvision's last reshape, which refuses an empty batch."""

    def forward(self, levels):
        levels = self.pyramid({str(i): x for i, x in enumerate(levels)}).values()
        return torch.cat([self.head.classification_head.conv(x).flatten(1) for x in levels], dim=1)


class RoIHeads(nn.Module):
    """Box and mask heads of torchvision's FasterRCNN v2 and MaskRCNN v2, small."""

    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm2d
        self.box = detection.faster_rcnn.FastRCNNConvFCHead((4, 5, 5), [6, 6], [8], norm_layer=norm)
        self.box_predictor = detection.faster_rcnn.FastRCNNPredictor(8, 3)
        self.mask = detection.mask_rcnn.MaskRCNNHeads(4, (6, 6), 1, norm_layer=norm)

    def forward(self, rois):
        logits, boxes = self.box_predictor(self.box(rois))
        return torch.cat([logits, boxes, self.mask(rois).flatten(1)], dim=1)


def build(cls):
    torch.manual_seed(0)
    model = cls().double()
    for parameter in model.parameters():  # torchvision's are so small that every gradient is, too
        nn.init.normal_(parameter, std=0.3)
    return model


def draw(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def images(size):
    return [draw(size, 3, side, side, seed=side) for side in LEVELS]


def loss_of(y, whole):
    return (y**3).sum() / whole + (y.sigmoid() * y).sum() / whole


def pyramid_step(rank, world_size, cls, sizes):
    # Towers leaves half of the head unused
    model = DistributedDataParallel(syncbn.convert(build(cls)), find_unused_parameters=cls is Towers)
    y = model([x.split(sizes)[rank] for x in images(sum(sizes))])
    (loss_of(y, sum(sizes)) * world_size).backward()  # DDP averages over ranks
    return y.detach(), [p.grad for p in model.parameters()], model.module.state_dict()


@pytest.mark.parametrize(
    ("cls", "sizes"), [(PyramidAndHead, [3, 1]), (PyramidAndHead, [2, 1, 2]), (Towers, [1, 3, 0])]
)
def test_one_layer_on_five_levels_in_one_step(run, cls, sizes):
    model = build(cls)
    y = model(images(sum(sizes)))
    loss_of(y, sum(sizes)).backward()
    results = run(pyramid_step, len(sizes), cls, sizes)
    close(torch.cat([result[0] for result in results]), y)
    for _, gradients, state in results:
        close(gradients, [p.grad for p in model.parameters()])
        close(state, model.state_dict())
        assert state["head.classification_head.conv.0.1.num_batches_tracked"] == len(LEVELS)


def roi_step(rank, world_size, steps):
    model = DistributedDataParallel(syncbn.convert(build(RoIHeads)))
    ys, dxs = [], []
    for step, sizes in enumerate(steps):
        x = draw(sum(sizes), 4, 5, 5, seed=step).split(sizes)[rank].requires_grad_()
        y = model(x)
        (loss_of(y, 7) * world_size).backward()
        ys.append(y.detach())
        dxs.append(x.grad / world_size)
    return ys, dxs, [p.grad for p in model.parameters()], model.module.state_dict()


@pytest.mark.parametrize(
    "steps",
    [[[0, 7], [4, 3]], [[7, 0, 2], [0, 0, 7], [0, 0, 0]]],
    ids=["two ranks, one without", "three ranks, then all without"],
)
def test_roi_head_without_rois_on_some_ranks(run, steps):
    model = build(RoIHeads)
    expected_ys, expected_dxs = [], []
    for step, sizes in enumerate(steps):
        x = draw(sum(sizes), 4, 5, 5, seed=step).requires_grad_()
        y = model(x)
        loss_of(y, 7).backward()
        expected_ys.append(y.detach())
        expected_dxs.append(x.grad)
    results = run(roi_step, len(steps[0]), steps)
    for step in range(len(steps)):
        close(torch.cat([result[0][step] for result in results]), expected_ys[step])
        close(torch.cat([result[1][step] for result in results]), expected_dxs[step])
    for _, _, gradients, state in results:
        close(gradients, [p.grad for p in model.parameters()])
        close(state, model.state_dict())


def towers():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4, momentum=None)]
    return nn.Sequential(*layers).double()


SIDES = [[(2, 3, 9, 7), (1, 3, 5, 12)], [(1, 3, 8, 8), (0, 3, 6, 6), (2, 3, 3, 3)]]  # per rank: own image size


def image_of_own_size(rank, world_size, shapes):
    model = syncbn.convert(towers())
    x = draw(*shapes[rank], seed=rank).requires_grad_()
    y = model(x)
    (y**3).sum().backward()
    return y.detach(), x.grad, [p.grad for p in model.parameters()], model.state_dict()


@pytest.mark.parametrize("shapes", SIDES, ids=["two ranks", "three ranks, one empty"])
def test_every_rank_has_its_own_image_size(run, shapes):
    """The reference is one process that walks the ranks' inputs in step and normalizes their values joined."""
    model = towers()
    xs = [draw(*shape, seed=rank).requires_grad_() for rank, shape in enumerate(shapes)]
    ys = xs
    for layer in model:
        ys = normalize_joined(layer, ys) if isinstance(layer, nn.BatchNorm2d) else [layer(y) for y in ys]
    sum((y**3).sum() for y in ys).backward()
    results = run(image_of_own_size, len(shapes), shapes)
    for (y, dx, _, state), expected, x in zip(results, ys, xs, strict=True):
        close(y, expected)
        close(dx, x.grad)
        close(state, model.state_dict())
    gradients = [sum(parts) for parts in zip(*(result[2] for result in results), strict=True)]
    close(gradients, [p.grad for p in model.parameters()])


def normalize_joined(layer, ys):
    joined = torch.cat([y.movedim(1, 0).flatten(1) for y in ys], dim=1)[None, :, :, None]
    parts = layer(joined)[0, :, :, 0].split([y[:, 0].numel() for y in ys], dim=1)
    return [part.unflatten(1, y[:, 0].shape).movedim(0, 1) for part, y in zip(parts, ys, strict=True)]


def faster_rcnn():
    """FasterRCNN as its v2 is: BatchNorm in the backbone, the pyramid, and the box head."""
    torch.manual_seed(0)
    body = detection.backbone_utils.resnet.resnet18(weights=None, norm_layer=nn.BatchNorm2d)
    backbone = detection.backbone_utils._resnet_fpn_extractor(body, trainable_layers=5, norm_layer=nn.BatchNorm2d)
    head = detection.faster_rcnn.FastRCNNConvFCHead((backbone.out_channels, 7, 7), [8], [8], norm_layer=nn.BatchNorm2d)
    model = detection.FasterRCNN(
        backbone,
        box_head=head,
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(8, 3),
        min_size=64,
        max_size=64,
        rpn_pre_nms_top_n_train=20,  # below the sample sizes: every proposal is taken, none is drawn
        rpn_post_nms_top_n_train=20,
        box_batch_size_per_image=512,
    )
    return model.double()


def photographs(size):
    photos = draw(size, 3, 64, 64).sigmoid()
    boxes = [[[4.0, 4, 40, 40], [20, 10, 60, 50]], [], [[8.0, 30, 30, 62]]]  # the second shows nothing
    targets = [
        {"boxes": torch.tensor(b, dtype=torch.float64).view(-1, 4), "labels": torch.tensor([1, 2][: len(b)]).long()}
        for b in (boxes * size)[:size]
    ]
    return list(photos), targets


def faster_rcnn_step(rank, world_size, sizes):
    model = DistributedDataParallel(syncbn.convert(faster_rcnn()))
    photos, targets = photographs(sum(sizes))
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    losses = model(photos[mine], targets[mine])
    sum(losses.values()).backward()
    return [p.grad.norm() for p in model.parameters()], model.state_dict()


@pytest.mark.slow
def test_faster_rcnn_trains_where_one_rank_sees_no_object(run):
    """Its losses are means over each rank's samples, so only the statistics can be compared with one process."""
    sizes = [1, 1]
    model = faster_rcnn()
    model(*photographs(2))
    (gradients, state), (_, other_state) = run(faster_rcnn_step, 2, sizes, timeout=120)
    expected = {f"module.{k}": v for k, v in model.state_dict().items() if "running" in k or "tracked" in k}
    close({k: state[k] for k in expected}, expected)
    close(state, other_state)
    assert all(torch.isfinite(g) for g in gradients)
    assert max(gradients) > 0


def close(actual, expected):
    """float64 end to end: what differs is the order of sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
