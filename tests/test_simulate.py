"""One process that stands for W ranks against W real ones, and what it must refuse."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import syncbn
from experiment.simulation.exactness import check_exact
from experiment.simulation.simulate import SimulatedBatchNorm, simulate
from experiment.training.freeze_late import freeze_precisely
from experiment.training.models.classifiers import ResNet8
from experiment.training.models.unet import UNet
from experiment.training.sharding import BatchPlan
from experiment.training.task import Classifier
from syncbn.compat import DDP_OPTIONS, copy_buffers_once

STEPS, CLASSES = 3, 4


class Shared(nn.Module):
    """Use one norm at two places, norms of 2-D, 3-D and 4-D inputs, and one with its own momentum."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.rows = nn.BatchNorm1d(6, momentum=None)
        self.head = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, affine=False), nn.Linear(5, CLASSES))

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = self.norm(F.relu(x) + x)
        x = self.rows(x.flatten(2))
        return self.head(x.mean(2))


class PerPatch(nn.Module):
    """Normalize the patches of each image as rows of their own, in the order of the images."""

    def __init__(self, images_first=True):
        super().__init__()
        self.images_first = images_first
        self.embed = nn.Linear(12, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)  # (N, patches, 12)
        if not self.images_first:
            patches = patches.transpose(0, 1)
        rows = self.norm(self.embed(patches).flatten(0, 1)).view(*patches.shape[:2], 6)
        return self.head(F.relu(rows).mean(1 if self.images_first else 0))


MODELS = {"resnet": partial(ResNet8, CLASSES, width=8), "shared": Shared, "patches": PerPatch}
ARMS = {
    "bn": ("bn", {}),
    "syncbn": ("syncbn", {}),
    "pairs": ("syncbn", {"process_group": 2}),
    "part": ("syncbn", {"exclude": ["*norm1*", "*rows"]}),
    "gn": ("gn", {"num_groups": 1}),
    "ln": ("ln", {}),
    "in": ("in", {}),
    "frozen": ("frozen", {}),
    "none": ("none", {}),
    "own": (partial(nn.GroupNorm, 1), {}),
}
OF_RESNETS = {  # which have a layer of its own for every place
    "brn": ("brn", {"r_max": 1.2, "d_max": 0.1, "warmup_steps": 1, "r_ramp_steps": 1, "d_ramp_steps": 2}),
    "sn": ("sn", {}),
    "gn_ws": ("gn_ws", {"num_groups": 1}),
    "wn": ("wn", {}),
    "wn_mean_only": ("wn", {"mean_only": True}),
    "fixup": ("fixup", {}),
    "frn": ("frn", {}),
    "evonorm_s0": ("evonorm_s0", {"num_groups": 1}),
    "evonorm_b0": ("evonorm_b0", {}),
}
FITTING = [  # one value per channel, as "patches" has it, is no instance
    *((arm, model) for arm in ARMS for model in MODELS if (arm, model) != ("in", "patches")),
    *(pytest.param(arm, "resnet", marks=[] if arm == "brn" else pytest.mark.slow) for arm in OF_RESNETS),
]
ARMS |= OF_RESNETS


def make(model, arm):
    torch.manual_seed(5)
    norm, options = ARMS[arm]
    task = Classifier(MODELS[model](), CLASSES)
    for layer in task.modules():  # statistics as if trained before
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return syncbn.convert(task, norm, **options).double()


def draw(plan):
    """Draw the images and labels of every step, joined in the order of BatchPlan.deal."""
    generator = torch.Generator().manual_seed(1)
    num = plan.global_batch_size
    images = torch.randn(STEPS, num, 3, 8, 8, generator=generator, dtype=torch.float64)
    images += torch.randn(STEPS, num, 3, 1, 1, generator=generator, dtype=torch.float64)  # images differ
    return images, torch.randint(CLASSES, (STEPS, num), generator=generator)


def train_rank(rank, world_size, model, arm, accumulate, per_rank, freeze_before=None):
    """Train one real rank with DDP, and freeze before this step; returns its parameters and buffers."""
    plan = BatchPlan(per_rank, world_size, accumulate)
    task = make(model, arm)
    wrapped = DistributedDataParallel(task, **DDP_OPTIONS)
    copy_buffers_once(wrapped)
    optimizer = torch.optim.SGD(task.parameters(), 0.1, 0.9)
    for step, (images, labels) in enumerate(zip(*draw(plan), strict=True)):
        batches = plan.deal(torch.arange(plan.global_batch_size), rank)
        if step == freeze_before:
            freeze_precisely(task, [images[indices] for indices in batches])
        for indices in batches:
            (F.cross_entropy(wrapped(images[indices]), labels[indices]) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k: v.detach() for k, v in task.net.state_dict().items()}


def train_simulated(model, arm, plan, freeze_before=None):
    task = make(model, arm)
    simulate(task, plan)
    images, labels = draw(plan)
    before = copy.deepcopy(task.state_dict())
    check_exact(task, (images[0], labels[0]), plan)
    torch.testing.assert_close(task.state_dict(), before, rtol=0, atol=0)
    optimizer = torch.optim.SGD(task.parameters(), 0.1, 0.9)
    for number, step in enumerate(zip(images, labels, strict=True)):
        if number == freeze_before:
            freeze_precisely(task, [step])
        task.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return task


@pytest.mark.parametrize(("arm", "model"), FITTING)
def test_the_ranks_and_their_simulation_agree(run, model, arm):
    agree(run, model, arm)


@pytest.mark.parametrize(("arm", "model"), [("bn", "shared"), pytest.param("pairs", "resnet", marks=pytest.mark.slow)])
def test_they_agree_when_they_freeze(run, model, arm):
    agree(run, model, arm, freeze_before=1)


def agree(run, model, arm, freeze_before=None):
    # the head of "shared" has one value per image
    for plan in (BatchPlan(2, 4), BatchPlan(3 if model == "shared" else 1, 2, 3)):
        sizes = (plan.accumulate, plan.per_rank_batch_size)
        ranks = run(train_rank, plan.world_size, model, arm, *sizes, freeze_before)
        task = train_simulated(model, arm, plan, freeze_before)
        mine = task.net.state_dict()
        assert mine.keys() == ranks[0].keys()
        for name, value in ranks[0].items():  # what DDP saves
            torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        for name, layer in task.net.named_modules():
            if isinstance(layer, SimulatedBatchNorm) and layer.track_running_stats:
                size = plan.world_size // layer.num_splits
                for key in ("running_mean", "running_var"):
                    held = torch.stack([ranks[group * size][f"{name}.{key}"] for group in range(layer.num_splits)])
                    torch.testing.assert_close(getattr(layer, f"split_{key}"), held, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arm", ["brn", "sn"])
def test_other_norms_that_synchronize(run, arm):
    """A layer that runs twice is simulated where no batches are accumulated; groups are not."""
    [ranks, *_] = run(train_rank, 2, "shared", arm, 1, 3)
    for name, value in train_simulated("shared", arm, BatchPlan(3, 2)).net.state_dict().items():
        torch.testing.assert_close(value, ranks[name], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"cannot simulate .*that runs twice in a forward.*use engine=torchrun"):
        train_simulated("shared", arm, BatchPlan(3, 2, 3))
    task = syncbn.convert(Classifier(ResNet8(CLASSES, width=8), CLASSES), arm, process_group=2)
    with pytest.raises(ValueError, match=r"cannot simulate net.1: a \w+ in groups of 2 of 4; use engine=torchrun"):
        simulate(task, BatchPlan(2, 4))
    task = make("resnet", arm)
    simulate(task, BatchPlan(2, 4))
    with pytest.raises(ValueError, match=r"got \(9, 8, 8, 8\) of 9 images; use engine=torchrun"):
        task.train()(torch.zeros(9, 3, 8, 8, dtype=torch.float64))


def test_nodes_are_groups_of_their_size():
    task = syncbn.convert(Classifier(ResNet8(CLASSES, width=8), CLASSES), process_group="node")
    simulate(task, BatchPlan(2, 8), node_size=4)
    assert {layer.num_splits for layer in task.modules() if isinstance(layer, SimulatedBatchNorm)} == {2}
    whole = syncbn.convert(Classifier(ResNet8(CLASSES, width=8), CLASSES), process_group="node")
    simulate(whole, BatchPlan(2, 8))
    assert {layer.num_splits for layer in whole.modules() if isinstance(layer, SimulatedBatchNorm)} == {1}


def test_a_loaded_state_is_every_ranks():
    plan = BatchPlan(2, 4)
    task = train_simulated("resnet", "bn", plan)
    other = make("resnet", "bn")
    simulate(other, plan)
    other.load_state_dict(task.state_dict())
    layer = other.net[1]
    assert torch.equal(layer.split_running_mean, task.net[1].running_mean.expand(4, -1))
    assert not any("split" in key for key in task.state_dict())


class Mixing(nn.Module):
    """Join images in a way that is told."""

    def __init__(self, how):
        super().__init__()
        self.how, self.norm, self.head = how, nn.BatchNorm2d(3), nn.Linear(3, CLASSES)
        self.extra = {"dropout": nn.Dropout(0.5), "unknown norm": Renorm(3)}.get(how, nn.Identity())

    def forward(self, x):
        if self.how == "centred batch":
            x = x - x.mean(0)
        if self.how == "sorted":
            x = x[x.mean((1, 2, 3)).argsort()]
        y = self.extra(F.relu(self.norm(x)))
        if self.how == "selected":
            y = y[y.mean((1, 2, 3)) > y.mean()]
            y = F.pad(y, (0, 0, 0, 0, 0, 0, 0, len(x) - len(y)))
        if self.how == "attention over the batch":
            rows = y.flatten(1)
            y = (rows @ rows.T).softmax(1) @ y.mean((2, 3))
            return self.head(y)
        return self.head(y.mean((2, 3)))


class Renorm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm that syncbn does not know."""

    def _check_input_dim(self, input):
        pass

    def forward(self, input):
        return (input - input.mean((0, 2, 3), keepdim=True)) / (1 + input.std())


def test_a_users_batchnorm_with_its_own_forward_is_not_taken_for_a_plain_one():
    class Half(nn.BatchNorm2d):
        def forward(self, input):
            return 0.5 * super().forward(input) + 0.5 * input

    class Small(nn.BatchNorm2d):
        def reset_parameters(self):
            super().reset_parameters()
            nn.init.constant_(self.weight, 0.1)

    plan = BatchPlan(2, 4)
    images, labels = draw(plan)
    own = syncbn.convert(Classifier(ResNet8(CLASSES, width=8), CLASSES), Half)
    simulate(own, plan)
    with pytest.raises(ValueError, match="use engine=torchrun"):
        check_exact(own, (images[0].float(), labels[0]), plan)
    small = syncbn.convert(Classifier(ResNet8(CLASSES, width=8), CLASSES), Small)
    simulate(small, plan)
    check_exact(small, (images[0].float(), labels[0]), plan)
    assert isinstance(small.net[1], SimulatedBatchNorm)


class Keeping(nn.Module):
    """Do what the check must find though the gradients agree."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        norm = nn.InstanceNorm2d(3, track_running_stats=True) if how == "instance statistics" else nn.Identity()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), norm)
        self.head = nn.Linear(3, CLASSES)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if "checkpoint" in self.how:
            y = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant="reentrant" in self.how)
        elif self.how == "keyword":
            y = self.inner[1](input=self.inner[0](x))
        else:
            y = self.inner(x)
        if self.how == "counter":
            self.seen += 1
        logits = self.head(y.mean((2, 3)))
        return logits.float() @ torch.eye(CLASSES) if self.how == "float32" else logits


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("checkpoint", "activation checkpointing"),
        ("reentrant checkpoint", "the check in float64 failed"),
        ("instance statistics", "training moves net.inner.2.running_mean"),
        ("counter", "training moves net.seen"),
        ("float32", None),
        ("keyword", None),
    ],
)
def test_what_the_ranks_would_keep_apart_is_refused(how, message):
    plan = BatchPlan(2, 4)
    images, labels = draw(plan)
    task = Classifier(Keeping(how), CLASSES)
    simulate(task, plan)
    if message is None:
        check_exact(task, (images[0].float(), labels[0]), plan)
        return
    with pytest.raises(ValueError, match=rf"cannot simulate.*{message}.*use engine=torchrun"):
        check_exact(task, (images[0].float(), labels[0]), plan)


def test_layers_without_running_statistics_are_refused():
    task = Classifier(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), CLASSES)
    with pytest.raises(ValueError, match=r"cannot simulate net.0: without running statistics.*use engine=torchrun"):
        simulate(task, BatchPlan(2, 4))


REFUSED = ["dropout", "centred batch", "sorted", "selected", "attention over the batch", "unknown norm"]


@pytest.mark.filterwarnings("ignore:syncbn.convert left:UserWarning")
@pytest.mark.parametrize("arm", ["bn", "syncbn"])
@pytest.mark.parametrize("how", REFUSED)
def test_what_joins_images_is_refused(how, arm):
    plan = BatchPlan(2, 4)
    task = syncbn.convert(Classifier(Mixing(how), CLASSES), arm)
    simulate(task, plan)
    images, labels = draw(plan)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"cannot simulate.*use engine=torchrun"):
        check_exact(task, (images[0].float(), labels[0]), plan)
    assert torch.equal(state, torch.get_rng_state())


def test_the_same_model_without_mixing_is_accepted():
    plan = BatchPlan(2, 4)
    task = syncbn.convert(Classifier(Mixing("nothing"), CLASSES))
    simulate(task, plan)
    images, labels = draw(plan)
    check_exact(task, (images[0].float(), labels[0]), plan)


@pytest.mark.parametrize("arm", ["bn", "syncbn", "pairs"])
def test_rows_in_another_order_are_refused(arm):
    plan = BatchPlan(2, 4)
    norm, options = ARMS[arm]
    task = syncbn.convert(Classifier(PerPatch(images_first=False), CLASSES), norm, **options)
    simulate(task, plan)
    images, labels = draw(plan)
    with pytest.raises(ValueError, match=r"input of net.norm does not keep the images"):
        check_exact(task, (images[0].float(), labels[0]), plan)


def test_a_segmentation_net_and_one_value_per_image():
    plan = BatchPlan(1, 4)
    task = syncbn.convert(Classifier(UNet(CLASSES, 3, width=8), CLASSES))  # its bottom has one value per image
    simulate(task, plan)
    labels = torch.zeros(4, 8, 8, dtype=torch.int64)
    check_exact(task, (draw(plan)[0][0].float(), labels), plan)
    plain = Classifier(UNet(CLASSES, 3, width=8), CLASSES)
    simulate(plain, plan)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        plain.train()(draw(plan)[0][0].float())


def test_another_number_of_rows_later_is_refused():
    task = make("resnet", "bn")
    simulate(task, BatchPlan(2, 4))
    with pytest.raises(ValueError, match=r"got \(9, 8, 8, 8\) of 9 images; use engine=torchrun"):
        task.train()(torch.zeros(9, 3, 8, 8, dtype=torch.float64))


def test_groups_on_one_rank_are_that_rank():
    task = syncbn.convert(Classifier(ResNet8(CLASSES, width=8), CLASSES), process_group=2)
    simulate(task, BatchPlan(8))
    assert (task.net[1].num_splits, task.net[1].split_size) == (1, 8)


def test_groups_that_do_not_divide():
    task = syncbn.convert(Classifier(ResNet8(CLASSES, width=8), CLASSES), process_group=3)
    with pytest.raises(ValueError, match=r"process_group=3: .* world size 4; choose one of \[1, 2, 4\]"):
        simulate(task, BatchPlan(2, 4))
