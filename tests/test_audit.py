"""The audit: counts and errors against numpy, redundant biases, what cannot be normalized, and nothing changed."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(x, size):
    """Root mean square over channels of std / mean of the variances of parts of ``size`` images, by numpy."""
    parts = x.double().numpy()[: len(x) // size * size].reshape(-1, size, *x.shape[1:])
    dims = (1, *range(3, parts.ndim))
    variances = parts.var(dims)  # (num_parts, C)
    return math.sqrt(np.mean((variances.std(0, ddof=1) / variances.mean(0)) ** 2))


@pytest.mark.parametrize("shape", [(48, 5), (48, 5, 7), (50, 5, 4, 3), (48, 5, 2, 3, 2)], ids=str)
def test_counts_and_errors_equal_numpy(shape):
    x = images(*shape) * torch.linspace(0.1, 9, 5).view(-1, *[1] * (len(shape) - 2)) + 3
    layers = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    report = syncbn.audit(layers[x.dim()](5), (x, None), per_rank_batch_size=4, world_size=3)
    (row,) = report.rows
    positions = x[0, 0].numel()
    assert (row.name, row.num_features) == ("(the model)", 5)
    assert (row.count, row.group_count) == (4 * positions, 12 * positions)
    assert row.bound == pytest.approx(math.sqrt(2 / row.count))
    assert row.error == pytest.approx(spread(x, 4), rel=1e-5)  # the moments of an image are float32
    assert row.group_error == pytest.approx(spread(x, 12), rel=1e-5)
    assert not row.is_estimate
    assert row.note == ""


def test_independent_values_reach_the_bound_and_correlated_ones_do_not():
    independent = images(512, 16, 8, 8)
    (row,) = syncbn.audit(nn.BatchNorm2d(16), independent, 4, 8).rows
    assert row.error == pytest.approx(row.bound, rel=0.1)  # 128 parts, 16 channels: known to 1 / sqrt(2 * 16 * 127)
    assert row.group_error == pytest.approx(row.bound / math.sqrt(8), rel=0.2)
    constant = images(512, 16, 1, 1).expand(-1, -1, 8, 8)
    (row,) = syncbn.audit(nn.BatchNorm2d(16), constant, 4, 8).rows
    assert row.error == pytest.approx(math.sqrt(2 / 3), rel=0.15)  # 4 values, whose variance has 3 degrees of freedom
    assert row.error > 5 * row.bound


def test_the_error_over_the_group_is_estimated_where_the_batch_is_small():
    x = images(8, 3, 4, 4)
    (row,) = syncbn.audit(nn.BatchNorm2d(3), x, 2, 4).rows
    assert row.is_estimate
    assert row.error == pytest.approx(spread(x, 2), rel=1e-5)
    assert row.group_error == pytest.approx(row.error / 2)
    report = syncbn.audit(nn.BatchNorm2d(3), x, 6, 4)
    assert report.rows[0].error is report.rows[0].group_error is None
    assert report.rows[0].count == 96
    assert "give a batch of 12 images or more, not 8" in report.advice


def test_half_precision_and_dead_channels():
    x = images(32, 3, 4, 4)
    x[:, 1] = 7
    (row,) = syncbn.audit(nn.BatchNorm2d(3).bfloat16(), x.bfloat16(), 2, 2).rows
    assert row.error == pytest.approx(spread(x.bfloat16().float()[:, [0, 2]], 2), rel=1e-5)
    assert syncbn.audit(nn.BatchNorm2d(3), torch.ones(8, 3, 2, 2), 2, 2).rows[0].error is None


class Patches(nn.Module):
    """Each image becomes two rows, one after the other; and a layer that reads rows of no image."""

    def __init__(self):
        super().__init__()
        self.norm, self.odd, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.norm(x.view(-1, 3, 8)) + self.norm(2 * x.view(-1, 3, 8))
        return self.odd(y[1:])


def test_rows_of_an_image_calls_and_rows_of_none():
    x = images(12, 6, 8)
    norm, odd, unused = syncbn.audit(Patches(), x, 3, 2).rows
    assert norm.count == 3 * 2 * 8
    assert norm.note == "called 2 times"
    assert norm.error == pytest.approx(spread(x.view(-1, 3, 8), 6), rel=1e-5)
    assert odd.count is odd.error is None
    assert "no multiple" in odd.note
    assert unused.note == "not called in this forward"
    alone = nn.Sequential(nn.Flatten(0, 0), nn.BatchNorm2d(6))
    alone[0].forward = lambda x: x[1:, :, :, None]
    assert syncbn.audit(alone, x, 3, 2).advice == "No layer with batch statistics could be measured: see the notes."


class Net(nn.Module):
    def __init__(self, first, between=None):
        super().__init__()
        self.first, self.norm, self.between = first, nn.BatchNorm2d(4), between

    def forward(self, x):
        x = self.first(x)
        return self.norm(x if self.between is None else self.between(x))


class ReadTwice(Net):
    def forward(self, x):
        x = self.first(x)
        return self.norm(x) + x.mean()


class Returned(Net):
    def forward(self, x):
        x = self.first(x)
        return self.norm(x), x


class Twice(Net):
    def forward(self, x):
        return F.relu(self.first(x)) + self.norm(self.first(x))


class Tokens(nn.Module):
    """A linear layer adds its bias to the last dimension, the norm reads channels in the second."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.first(x[:, 0, :4, :]))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Net(nn.Conv2d(3, 4, 3)), ["first.bias"]),
        (Net(nn.ConvTranspose2d(3, 4, 3)), ["first.bias"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4)), ["1.bias"]),
        (Net(nn.Conv2d(3, 4, 3, bias=False)), []),
        (Net(nn.Conv2d(3, 4, 3), nn.ReLU()), []),
        (Net(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), []),  # the same tensor object, changed
        (Net(nn.Conv2d(3, 4, 3), lambda x: x.view(x.shape)), []),
        (Net(nn.Conv2d(3, 4, 3), lambda x: x.mul_(2)), []),
        (ReadTwice(nn.Conv2d(3, 4, 3)), []),
        (Returned(nn.Conv2d(3, 4, 3)), []),
        (Twice(nn.Conv2d(3, 4, 3)), []),
        (Tokens(), []),
        (syncbn.freeze(Net(nn.Conv2d(3, 4, 3))), []),
        (syncbn.convert(Net(nn.Conv2d(3, 4, 3))), ["first.bias"]),
        (syncbn.convert(Net(nn.Conv2d(3, 4, 3)), "gn", num_groups=2), []),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)), ["0.bias"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
def test_redundant_biases(net, expected):
    report = syncbn.audit(net, images(4, 3, 6, 6), 2, 2)
    assert report.redundant_biases == expected
    assert report.num_redundant_parameters == 4 * len(expected)
    assert ("Redundant biases" in str(report)) == bool(expected)


def test_without_a_redundant_bias_training_is_the_same():
    torch.manual_seed(0)
    net, x = Net(nn.Conv2d(3, 4, 3)), images(4, 3, 6, 6)
    without = copy.deepcopy(net)
    with torch.no_grad():
        without.first.bias.add_(5)
    torch.testing.assert_close(net(x), without(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_torchvision_models():
    models = pytest.importorskip("torchvision.models", reason="torchvision does not import beside this torch")
    report = syncbn.audit(models.resnet18(num_classes=10), images(4, 3, 32, 32), 1, 2)
    assert len(report.rows) == 20
    assert report.redundant_biases == []
    assert "layer4.0.bn1 and 4 more cannot be normalized on one rank" in report.advice
    report = syncbn.audit(models.vgg11_bn(num_classes=10), images(4, 3, 32, 32), 2, 2)
    assert report.redundant_biases == [f"features.{i}.bias" for i in (0, 4, 8, 11, 15, 18, 22, 25)]
    assert report.num_redundant_parameters == 64 + 128 + 2 * 256 + 4 * 512
    frozen = models.resnet18(norm_layer=models.detection.backbone_utils.misc_nn_ops.FrozenBatchNorm2d)
    assert {row.note for row in syncbn.audit(frozen, images(2, 3, 32, 32), 1, 2).rows} == {"frozen"}


@pytest.mark.parametrize("num_images", [1, 4])
def test_one_value_per_channel(num_images):
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    report = syncbn.audit(net, images(num_images, 3, 4, 4), 1, 4)
    (row,) = report.rows
    assert (row.count, row.group_count, row.error, row.bound) == (1, 4, None, None)
    assert row.note == "cannot be normalized: 1 value per channel on one rank; over the group 4 values"
    assert report.advice.startswith("Synchronize (syncbn.convert): 1 cannot be normalized on one rank")
    report = syncbn.audit(net, images(num_images, 3, 4, 4), 1, 1)
    assert "over the group too" in report.rows[0].note
    assert "not even over the group" in report.advice
    syncbn.convert(net)
    assert syncbn.audit(net, images(num_images, 3, 4, 4), 1, 4).rows[0].note.startswith("1 value per channel on one")
    advice = syncbn.audit(net, images(1024, 3, 4, 4), 1, 32).advice
    assert advice.startswith(
        "Keep synchronizing over 32 ranks: that brings the worst layer, 1, from no variance at all"
    )


def test_images_that_are_constant_on_every_rank():
    (row,) = syncbn.audit(nn.BatchNorm2d(3), images(8, 3, 1, 1).expand(-1, -1, 4, 4), 1, 2).rows
    assert row.error is None
    assert row.note == "3 of 3 channels are constant on every rank"


def test_every_kind_of_norm_has_a_row():
    norms = [
        syncbn.freeze(nn.BatchNorm2d(4)),
        syncbn.convert(nn.BatchNorm2d(4), "frozen"),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4),
        nn.LayerNorm([4, 5, 5]),
        nn.RMSNorm(5),
    ]
    report = syncbn.audit(nn.Sequential(*norms), images(4, 4, 5, 5), 2, 2)
    assert [row.kind for row in report.rows] == [type(norm).__name__ for norm in norms]
    assert [row.num_features for row in report.rows] == [4, 4, 4, 4, 100, 5]
    assert [row.note for row in report.rows] == ["frozen", "frozen", "", "", "", ""]
    assert all(row[3:8] == (None,) * 5 for row in report.rows)
    assert "the batch per rank does not matter" in report.advice
    assert not norms[0].training


def test_groups():
    x = images(16, 3, 4, 4)
    for group, expected in ((None, 128), ("node", 128), (1, 32), (2, 64), (4, 128)):
        (row,) = syncbn.audit(syncbn.SyncBatchNorm(3, process_group=group), x, 2, 4).rows
        assert (row.count, row.group_count) == (32, expected)
        assert row.error == pytest.approx(spread(x, 2), rel=1e-5)
        assert row.group_error == pytest.approx(spread(x, expected // 16), rel=1e-5)
    with pytest.raises(ValueError, match=r"choose one of \[1, 2, 4\]"):
        syncbn.audit(syncbn.SyncBatchNorm(3, process_group=3), x, 2, 4)
    ghost = syncbn.GhostBatchNorm(3, num_splits=3)  # which does not divide 16
    assert syncbn.audit(ghost, x, 2, 4).rows[0].count == 32
    assert ghost.num_splits == 3


class Careless(nn.Module):
    """Random, stateful, of mixed modes, and it may fail."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval(), syncbn.SyncBatchNorm(3))
        self.calls, self.fails = 0, False
        self.register_buffer("seen", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(())) * 2  # a computed tensor, which deepcopy refuses

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        assert self.training
        assert not torch.is_grad_enabled()
        if self.fails:
            torch.rand(3)
            raise RuntimeError("out of luck")
        return self.net(x) * self.scale


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(fails):
    model = Careless().eval()
    model.fails = fails
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    attributes = [set(vars(m)) for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    x = images(8, 3, 4, 4)
    if fails:
        with pytest.raises(RuntimeError, match="out of luck"):
            syncbn.audit(model, [x], 2, 4)
    else:
        assert len(syncbn.audit(model, [x], 2, 4).rows) == 3
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.calls == 0
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(x, images(8, 3, 4, 4))


def on_rank_0(rank, world_size):
    group = dist.new_group([0, 1])
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        syncbn.SyncBatchNorm(4),
        syncbn.SyncBatchNorm(4, process_group=1),  # whose group is not made yet
        syncbn.SyncBatchNorm(4, process_group=2),
        syncbn.SyncBatchNorm(4, process_group=group),
    )
    ddp = DistributedDataParallel(model)
    torchs = nn.Sequential(nn.SyncBatchNorm(3), nn.SyncBatchNorm(3, process_group=group))
    reports = [syncbn.audit(net, images(8, 3, 5, 5), 2, world_size) for net in (ddp, torchs) if rank == 0]
    dist.barrier()
    return reports


@pytest.mark.slow
def test_one_rank_alone_does_not_hang(run):
    (report, torchs), _ = run(on_rank_0, 2, timeout=40)
    assert [row.name for row in report.rows] == ["1", "2", "3", "4"]
    assert [row.group_count for row in report.rows] == [36, 18, 36, 36]
    assert report.redundant_biases == ["0.bias"]
    assert [row.group_count for row in torchs.rows] == [100, 100]
    assert torchs.rows[0].error == pytest.approx(spread(images(8, 3, 5, 5), 2), rel=1e-5)


def advice_for(correlated, per_rank_batch_size, world_size, sync=False):
    x = images(256, 8, 1, 1).expand(-1, -1, 8, 8) if correlated else images(256, 8, 8, 8)
    layer = syncbn.SyncBatchNorm(8) if sync else nn.BatchNorm2d(8)
    return syncbn.audit(nn.Sequential(layer), x, per_rank_batch_size, world_size).advice


def test_advice_follows_the_errors():
    assert advice_for(False, 1, 4).startswith("Plain BatchNorm suffices: the worst layer, 0, has an error of 17.")
    assert advice_for(True, 32, 4).startswith("Plain BatchNorm suffices")
    assert advice_for(True, 4, 16).startswith("Synchronize (syncbn.convert) over 16 ranks: that brings the worst")
    assert advice_for(True, 4, 16, sync=True).startswith("Keep synchronizing over 16 ranks")
    assert advice_for(True, 2, 2).startswith("Use GroupNorm, larger groups or more images per rank")
    assert "no other rank" in advice_for(True, 4, 1)


def long_net(depth, channels):
    block = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.AdaptiveAvgPool2d(1))
    block.append(nn.Conv2d(channels, channels, 1)).append(nn.BatchNorm2d(channels))
    for _ in range(depth):
        outer = nn.Sequential()
        outer.add_module("a_rather_long_name", block)
        block = outer
    return block


@pytest.mark.parametrize("depth", [0, 8])
def test_the_text_fits_100_columns(depth):
    report = syncbn.audit(long_net(depth, channels=2048), images(4, 3, 6, 6), 1, 10**6)
    lines = str(report).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert "".join(str(report).split()).endswith("".join(["Advice:", *report.advice.split()]))
    assert report.advice.count(". ") == 0
    header, first, second, note = lines[2:6]
    assert header.split() == ["layer", "kind", "C", "values", "in", "group", "error", "bound", "in", "group"]
    assert first.split()[1:5] == ["BatchNorm2d", "2048", "16", "16000000"]
    assert len(first) == len(header)
    assert second.split()[0].endswith("name.4" if depth else "4")
    assert note.startswith("    cannot be normalized")


def test_bad_input_is_refused():
    x = images(4, 3, 6, 6)
    net = Net(nn.Conv2d(3, 4, 3))
    for sizes in ((0, 2), (2, 0), (2.0, 2), (True, 2), (2, "2")):
        with pytest.raises(ValueError, match=r"expected (per_rank_batch_size|world_size) to be a whole number"):
            syncbn.audit(net, x, *sizes)
    for batch in ({"image": x}, None, [], [[x]], x[0, 0, 0, 0], x.numpy()):
        with pytest.raises(ValueError, match="expected batch to be a tensor of images"):
            syncbn.audit(net, batch, 2, 2)
    with pytest.raises(ValueError, match="at least the 5 images of one rank, got 4; give 10"):
        syncbn.audit(net, x, 5, 2)
    with pytest.raises(ValueError, match="lazy layer '0'"):
        syncbn.audit(nn.Sequential(nn.LazyBatchNorm2d()), x, 2, 2)
    with pytest.raises(ValueError, match="got DataParallel at 'first'"):
        syncbn.audit(Net(nn.DataParallel(nn.Conv2d(3, 4, 3))), x, 2, 2)
    assert syncbn.audit(nn.DataParallel(net), x, 2, 2).rows[0].name == "norm"
    assert syncbn.audit(nn.ReLU(), x, 2, 2).rows == []
