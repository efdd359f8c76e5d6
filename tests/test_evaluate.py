"""The four kinds of statistics, against computations by hand, on real and on simulated ranks."""

import dataclasses
import json
import warnings

import pytest
import torch
from hydra.utils import instantiate
from test_launch import CONF_NORMS, composed, launch, load_train, only_run
from torch import nn
from torch.nn import functional as F

from experiment.evaluate import MODES
from experiment.training.data import NUM_PRECISE
from experiment.training.datasets.sources import DigitsOnPhotos
from experiment.training.image_set import ImageSet
from experiment.training.sharding import BatchPlan, Draw
from experiment.training.task import Classifier
from experiment.training.world import World

SIZES = ["data.num_train=200", "data.num_val=0", "data.num_test=60", "model.width=8"]
TINY = [
    "data.num_train=64",
    "data.num_test=36",
    "model.width=8",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
]
FLOAT64 = [*SIZES, "trainer.precision=64-true", "trainer.max_epochs=1", "trainer.log_every_n_steps=1"]
ALL = f"evaluate=[{','.join(MODES)}]"


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def simulated(folder, monkeypatch, *overrides):
    """Run in this process; returns the run's folder and results."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    load_train().main(composed(*overrides))
    return only_run(folder)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNCBN_CACHE", str(tmp_path / "cache"))
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def agree(tmp_path, monkeypatch, num_ranks, *overrides):
    """Assert that real ranks and one process give the same weights, statistics and evaluations."""
    settings = [*FLOAT64, ALL, "task.lr_rule=constant", *overrides]
    run, results = simulated(tmp_path / "simulated", monkeypatch, *settings, f"simulate={num_ranks}")
    (tmp_path / "real").mkdir()
    done = launch(tmp_path / "real", *settings, num_ranks=num_ranks, timeout=240)
    assert done.returncode == 0, done.stderr
    real_run, real = only_run(tmp_path / "real")
    torch.testing.assert_close(weights(run), weights(real_run), rtol=1e-9, atol=1e-9)
    for name in ("num_steps", "lr", "global_batch_size", "per_rank_batch_size", "world_size", "accumulate"):
        assert results[name] == real[name], name
    assert results["evaluations"].keys() == real["evaluations"].keys() == set(MODES)
    for mode in MODES:
        assert results["evaluations"][mode] == pytest.approx(real["evaluations"][mode], rel=1e-5), mode
    return results


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")  # Lightning 2.6 with torch 2.14
def test_real_and_simulated_ranks_agree(tmp_path, monkeypatch):
    sizes = ["data.per_rank_batch_size=3", "data.accumulate=2"]
    results = agree(tmp_path, monkeypatch, 2, "+norm=bn", *sizes)
    losses = [r["test_loss"] for r in results["evaluations"].values()]
    assert len({round(loss, 6) for loss in losses}) == 4  # four different statistics
    assert results["evaluations"]["batch"]["num_test"] == 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")
@pytest.mark.parametrize("norm", CONF_NORMS)
def test_every_arm_agrees(tmp_path, monkeypatch, norm):
    sizes = ["data.per_rank_batch_size=2", "data.accumulate=3", "model.width=8"]  # gn has 8 groups
    agree(tmp_path, monkeypatch, 4, f"+norm={norm}", *sizes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")
@pytest.mark.parametrize("norm", ["bn", "syncbn"])
def test_segmentation_agrees(tmp_path, monkeypatch, norm):
    scenes = ["data=digit_scenes", "model=unet", "task=segmentation", "data.per_rank_batch_size=2"]
    agree(tmp_path, monkeypatch, 2, *scenes, f"+norm={norm}", "data.accumulate=2")


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")
@pytest.mark.slow
def test_each_kind_by_hand(tmp_path, monkeypatch):
    """From the checkpoint alone, with nn.BatchNorm: W=2 ranks of 3 images, test images left over at the end."""
    plan = BatchPlan(3, 2)
    sizes = ["data.per_rank_batch_size=3", "data.num_test=62", "trainer.max_steps=9"]
    run, results = simulated(tmp_path / "run", monkeypatch, *FLOAT64, *sizes, "+norm=bn", "simulate=2", ALL)
    config = composed(*FLOAT64, *sizes)
    data = instantiate(config.data, _partial_=True)(world=World(), seed=config.seed)
    data.load()
    net = instantiate(config.model, num_classes=10, in_channels=3).double()
    net.load_state_dict({k.removeprefix("net."): v for k, v in weights(run).items() if k.startswith("net.")})

    def test_images(indices):
        images, labels = data.splits.test[Draw(indices, 0)]
        return data.normalize(images).double(), labels

    def loss(indices):
        images, labels = test_images(indices)
        return F.cross_entropy(net.eval()(images), labels).item()

    everything, measured = list(range(62)), results["evaluations"]
    assert measured["rank0"]["test_loss"] == pytest.approx(loss(everything), rel=1e-5)
    assert measured["rank0"]["num_test"] == 62

    shuffled = torch.randperm(62, generator=torch.Generator().manual_seed(0)).tolist()[:60]
    net.train()
    losses = [
        F.cross_entropy(net(x), y).item() for x, y in (test_images(shuffled[i : i + 3]) for i in range(0, 60, 3))
    ]
    assert measured["batch"]["test_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert measured["batch"]["num_test"] == 60

    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    inputs = {layer: [] for layer in layers}
    hooks = [layer.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0].detach())) for layer in layers]
    num = min(NUM_PRECISE, 200) // (plan.per_rank_batch_size * plan.world_size) * 6
    order = torch.randperm(200, generator=torch.Generator().manual_seed(config.seed))[:num]
    images = data.normalize(data.splits.train[Draw(order.tolist(), 0)][0]).double()
    for part in images.split(3):
        net.train()(part)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        x = torch.cat(inputs[layer])
        layer.running_mean.copy_(x.mean((0, 2, 3)))
        layer.running_var.copy_(x.var((0, 2, 3)))
    assert measured["precise"]["test_loss"] == pytest.approx(loss(everything), rel=1e-5)


class Drawn(nn.GroupNorm):
    """A norm whose parameters are drawn at random."""

    def __init__(self, num_features):
        super().__init__(1, num_features)
        self.mix = nn.Parameter(torch.randn(num_features))

    def forward(self, input):
        return super().forward(input) * self.mix.view(-1, 1, 1)


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")
@pytest.mark.slow
def test_a_norm_with_random_parameters_starts_alike(tmp_path, monkeypatch):
    settings = [*FLOAT64, "+norm={_target_: test_evaluate.Drawn}", "trainer.max_steps=2"]
    one, _ = simulated(tmp_path / "simulated", monkeypatch, *settings, "simulate=1")
    real, _ = simulated(tmp_path / "real", monkeypatch, *settings)
    assert any(key.endswith("mix") for key in weights(one))
    torch.testing.assert_close(weights(one), weights(real), rtol=1e-9, atol=1e-9)


class Unreadable(ImageSet):
    """Images that nobody may read."""

    def __getitem__(self, draw):
        raise AssertionError("a test image was read")


def test_a_run_that_chooses_settings_reads_no_test_image(tmp_path, monkeypatch):
    """With every kind of statistics, from an arm's own cells: the test split raises when it is read."""
    make = DigitsOnPhotos.make_splits

    def guarded(data):
        splits = make(data)
        return dataclasses.replace(splits, test=Unreadable(splits.test.images, splits.test.labels))

    monkeypatch.setattr(DigitsOnPhotos, "make_splits", guarded)
    settings = [*TINY, "data.num_val=40", "+norm=syncbn", "simulate=2", ALL]
    _, results = simulated(tmp_path / "val", monkeypatch, *settings, "eval_split=val")
    assert results["eval_split"] == "val"
    for mode, measured in results["evaluations"].items():
        assert set(measured) == {"val_error", "val_loss", "train_error", "train_loss", "num_val"}
        assert measured["num_val"] == (32 if mode == "batch" else 40)
    assert not [name for name in results if name.startswith("test")]
    with pytest.raises(AssertionError, match="a test image was read"):
        simulated(tmp_path / "test", monkeypatch, *settings)
    with pytest.raises(ValueError, match="expected eval_split to be test or val, got 'train'"):
        simulated(tmp_path / "train", monkeypatch, *settings, "eval_split=train")


def test_a_run_that_diverges_still_ends_with_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *_, **options: logits.sum(1) * torch.nan)
    monkeypatch.setattr(Classifier, "loss", lambda task, batch: task(batch[0]).sum() * torch.nan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered `nan`")
        _, results = simulated(tmp_path / "run", monkeypatch, *TINY, "data.num_val=0", "+norm=none")
    assert results["test_loss"] is None
    assert "not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        "evaluate=[]",
        *(pytest.param(f"evaluate=[{wrong}]", marks=pytest.mark.slow) for wrong in ("rank1", "rank0,ema")),
    ],
)
def test_unknown_kinds(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected evaluate to be a list of rank0, averaged, precise, batch"):
        load_train().main(composed(wrong))


def test_too_few_images_are_found_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = [*SIZES, "simulate=4", "data.per_rank_batch_size=16"]
    with pytest.raises(ValueError, match="statistics of the batch needs 16 x 4 images, got 60"):
        load_train().main(composed(*sizes, ALL))
    assert not (tmp_path / "outputs").exists()


def test_results_of_a_norm_without_statistics(tmp_path, monkeypatch, recwarn):
    sizes = [*SIZES, "trainer.max_steps=2", "trainer.log_every_n_steps=1"]
    _, results = simulated(tmp_path / "run", monkeypatch, *sizes, "+norm=ln", ALL)
    assert len({json.dumps(results["evaluations"][mode]) for mode in MODES}) == 1
    assert not [w for w in recwarn if "syncbn" in str(w.message)]
