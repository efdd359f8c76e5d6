"""Averages of the weights beside NormConverter, against the mean of the weights that the steps have left, by hand."""

import warnings

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from test_lightning import SAFE, clean_environment, loader, trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

import syncbn
from syncbn.lightning import NormConverter, PreciseStatistics

NEEDS_WEIGHT_AVERAGING = pytest.mark.skipif(
    not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="Lightning has no WeightAveraging before 2.6"
)
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, another order of summation
DECAY = 0.7


class Project(LightningModule):
    """Has all its layers from the start, as WeightAveraging wants them; keeps the weights of every step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double()
        self.extra = nn.BatchNorm1d(3, affine=False).double()
        self.steps, self.validated = [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, *args):
        self.steps.append(numbers(self.state_dict()))

    def validation_step(self, batch, batch_idx):
        self.validated.append(numbers(self.state_dict()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def numbers(state):
    return {name: value.clone() for name, value in state.items() if value.is_floating_point()}


class Builds(Project):
    """Overrides ``configure_model``, which WeightAveraging then calls by itself, with a warning."""

    def configure_model(self):
        if not hasattr(self, "late"):
            self.late = nn.BatchNorm1d(2, affine=False).double()


class Averages(Callback):
    """A callback as users write them, for the whole module or one part."""

    def __init__(self, part=None):
        self.part, self.average = part, None

    def setup(self, trainer, pl_module, stage):
        self.average = AveragedModel(self.of(pl_module), use_buffers=True)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.average.update_parameters(self.of(pl_module))

    def of(self, module):
        return module if self.part is None else getattr(module, self.part)


def weight_averaging(use_buffers):
    return lightning_callbacks.EMAWeightAveraging(decay=DECAY, use_buffers=use_buffers)


def by_hand(steps, decay=None, use_buffers=True):
    """Compute the average of weights over steps: with equal weights, or the moving one that begins with the first."""
    average = dict(steps[0])
    for n, step in enumerate(steps[1:], 1):
        rate = 1 / (n + 1) if decay is None else 1 - decay
        for name, value in step.items():
            keep = use_buffers or "running" not in name
            average[name] = average[name] + rate * (value - average[name]) if keep else value
    return average


CONVERSIONS = {"syncbn": ("syncbn", {}), "gn": ("gn", {"num_groups": 4, "include": ["net.*"]})}
KINDS = {"syncbn": syncbn.SyncBatchNorm, "gn": nn.GroupNorm}


def fit(rank, world_size, path, callbacks, module, **options):
    """Fit and return what was warned of ``configure_model``."""
    clean_environment()
    batches = loader(rank, world_size, 12 // world_size)
    run = trainer(rank, world_size, path, callbacks=callbacks, enable_checkpointing=True)
    run.fit_loop.max_epochs = options.pop("max_epochs", 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, batches, batches, **options, **(SAFE if options else {}))
    return [str(w.message) for w in caught if "configure_model" in str(w.message)]


def in_order(order, converter, other):
    return [converter, other] if order == "converter first" else [other, converter]


ORDERS = pytest.mark.parametrize("order", ["converter first", "converter last"])


def saved_and_resumed(rank, world_size, path, norm, order, use_buffers):
    name, options = CONVERSIONS[norm]

    def callbacks(folder):
        converter = NormConverter(name, **options)
        keep = ModelCheckpoint(f"{path}/{folder}", filename="{epoch}", save_top_k=-1)
        return [*in_order(order, converter, weight_averaging(use_buffers)), keep]

    module, all_callbacks = Project(), callbacks("whole")
    assert fit(rank, world_size, path, all_callbacks, module) == []
    assert isinstance(module.net[1], KINDS[norm])
    wanted = {n: by_hand(module.steps[:n], DECAY, use_buffers) for n in (2, 4)}
    torch.testing.assert_close(numbers(module.state_dict()), wanted[4], **EXACT)
    torch.testing.assert_close(module.validated[-1], wanted[4], **EXACT)
    saved = torch.load(f"{path}/whole/epoch=0.ckpt", weights_only=True)
    torch.testing.assert_close(numbers(saved["state_dict"]), wanted[2], **EXACT)
    torch.testing.assert_close(numbers(saved["current_model_state"]), module.steps[1], **EXACT)

    resumed = Project()
    fit(rank, world_size, path, callbacks("resumed"), resumed, ckpt_path=f"{path}/whole/epoch=0.ckpt")
    assert len(resumed.steps) == 2
    torch.testing.assert_close(resumed.state_dict(), module.state_dict(), **EXACT)
    return module.steps


@NEEDS_WEIGHT_AVERAGING
@ORDERS
@pytest.mark.parametrize("norm", CONVERSIONS)
@pytest.mark.parametrize("use_buffers", [True, False])
def test_the_average_is_of_the_converted_model_saved_and_resumed(run, tmp_path, norm, order, use_buffers):
    results = run(saved_and_resumed, 2, str(tmp_path), norm, order, use_buffers)
    for steps in results:
        torch.testing.assert_close(steps, results[0], **EXACT)


def builds(rank, world_size, path, order):
    module = Builds()
    average = weight_averaging(True)
    said = fit(rank, world_size, path, in_order(order, NormConverter("gn", num_groups=1), average), module)
    assert len(said) == 1  # Lightning's, and right
    assert [type(m) for m in (module.net[1], module.late)] == [nn.GroupNorm] * 2
    torch.testing.assert_close(numbers(module.state_dict()), by_hand(module.steps, DECAY), **EXACT)


@NEEDS_WEIGHT_AVERAGING
@ORDERS
def test_a_project_with_a_configure_model_of_its_own(run, tmp_path, order):
    run(builds, 1, str(tmp_path), order, initialize=False)


def users_own(rank, world_size, path, order, norm, part):
    name, options = CONVERSIONS[norm]
    module, own = Project(), Averages(part)
    assert fit(rank, world_size, path, in_order(order, NormConverter(name, **options), own), module) == []
    average = own.average.module
    assert isinstance((average if part else average.net)[1], KINDS[norm])
    assert part or type(average.extra) is type(module.extra)  # outside of include
    assert "setup" not in average.__dict__
    prefix = f"{part}." if part else ""
    average = {f"{prefix}{key}": value for key, value in numbers(average.state_dict()).items()}
    wanted = by_hand(module.steps)
    torch.testing.assert_close(average, {key: wanted[key] for key in average}, **EXACT)


@ORDERS
@pytest.mark.parametrize("norm", CONVERSIONS)
@pytest.mark.parametrize("part", [None, "net"])
def test_an_average_that_a_callback_of_the_user_keeps(run, tmp_path, order, norm, part):
    run(users_own, 2, str(tmp_path), order, norm, part)


class AtEpochs(Project):
    def on_train_epoch_start(self):
        self.epochs = [*getattr(self, "epochs", []), numbers(self.state_dict())]


def stochastic(rank, world_size, path, order):
    module, swa = AtEpochs(), StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    # Parameters of "frozen" layers are fewer than BatchNorm's: Lightning pairs them by their order.
    assert fit(rank, world_size, path, in_order(order, NormConverter("frozen"), swa), module) == []
    assert type(swa._average_model.net[1]) is type(module.net[1])
    wanted = by_hand(module.epochs)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], **EXACT)


@ORDERS
def test_stochastic_weight_averaging(run, tmp_path, order):
    run(stochastic, 1, str(tmp_path), order, initialize=False)


def precise(rank, world_size, path):
    module = Project()
    callbacks = [weight_averaging(False), NormConverter(), PreciseStatistics()]
    fit(rank, world_size, path, callbacks, module)
    first = nn.functional.linear(
        torch.cat([x for r in range(world_size) for x, _ in loader(r, world_size, 12 // world_size)]),
        module.net[0].weight,
        module.net[0].bias,
    )
    wanted = by_hand(module.steps, DECAY)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], **EXACT)
    torch.testing.assert_close(module.net[1].running_mean, first.mean(0).detach(), **EXACT)


@NEEDS_WEIGHT_AVERAGING
def test_precise_statistics_of_the_averaged_weights(run, tmp_path):
    run(precise, 2, str(tmp_path))
