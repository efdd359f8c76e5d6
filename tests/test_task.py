"""The task: its schedule, and metrics and steps that are the same at any world size."""

import os
import warnings

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F

from syncbn.experiment.batches import World
from syncbn.experiment.data import ImageData, ImageSet, Splits
from syncbn.experiment.known_warnings import ignore_known_warnings
from syncbn.experiment.task import Classifier, scale_lr, warmup_cosine

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
METRICS = {"train/loss", "val/loss", "val/acc", "test/loss", "test/acc", "train_eval/loss", "train_eval/acc"}


@pytest.mark.parametrize(("rule", "factor"), [("constant", 1), ("sqrt", 2), ("linear", 4)])
def test_learning_rate_rules(rule, factor):
    assert scale_lr(0.1, rule, 128, 32) == pytest.approx(0.1 * factor)


def test_an_unknown_rule():
    with pytest.raises(ValueError, match="one of constant, sqrt, linear, got 'cubic'"):
        Classifier(nn.Identity(), 3, lr_rule="cubic")


def test_the_schedule_rises_for_a_tenth_and_falls_to_zero():
    factors = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert warmup_cosine(0, 1, 0.0) == 1


class Random(ImageData):
    """Serve random images: 24 to train, `num_eval` to validate and test."""

    def __init__(self, num_eval, **kwargs):
        super().__init__([0.5] * 3, [0.25] * 3, global_batch_size=8, eval_batch_size=3, num_train_eval=5, **kwargs)
        self.num_eval = num_eval
        self.load()

    def make_splits(self):
        def draw(num):
            images = torch.randint(256, (num, 3, 4, 4), generator=generator, dtype=torch.uint8)
            return ImageSet(images, torch.randint(5, (num,), generator=generator))

        generator = torch.Generator().manual_seed(0)
        train, evaluation = draw(24), draw(self.num_eval)
        return Splits(train, train, evaluation, evaluation, num_classes=5)


def make_task(data, **kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5)).double()
    return Classifier(nn.Sequential(Double(), net), 5, data.plan.global_batch_size, **kwargs)


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def train_and_test(rank, world_size, num_eval, accumulate):
    """Fit two epochs, then test; give the weights and every metric."""
    environment = {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "",
        "MASTER_PORT": 0,
    }
    environment |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    saved = dict(os.environ)
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        with warnings.catch_warnings():
            ignore_known_warnings()
            data = Random(num_eval, accumulate=accumulate, world=World.from_env())
            task = make_task(data)
            trainer = L.Trainer(
                accelerator="cpu",
                devices=world_size,
                strategy=DDPStrategy(forward_sync_buffers=False),
                plugins=[TorchElasticEnvironment()],
                max_epochs=2,
                accumulate_grad_batches=accumulate,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                **QUIET,
            )
            trainer.fit(task, datamodule=data)
            metrics = dict(trainer.callback_metrics)
            trainer.test(task, datamodule=data, verbose=False)
            return dict(task.net.state_dict()), metrics | trainer.callback_metrics
    finally:
        os.environ.clear()
        os.environ.update(saved)


@pytest.mark.parametrize(("world_size", "num_eval", "accumulate"), [(2, 7, 1), (2, 1, 2), (4, 7, 1), (4, 2, 2)])
def test_ranks_do_what_one_process_does(run, world_size, num_eval, accumulate):
    """Uneven last batches and ranks without any image included: 7 images on 4 ranks, 1 image on 2."""
    [(weights, metrics)] = run(train_and_test, 1, num_eval, 1)
    for rank_weights, rank_metrics in run(train_and_test, world_size, num_eval, accumulate):
        torch.testing.assert_close(rank_weights, weights, rtol=1e-12, atol=1e-12)  # float64, 6 steps
        for name in (
            "train/loss",
            "val/loss",
            "val/acc",
            "test/loss",
            "test/acc",
            "train_eval/loss",
            "train_eval/acc",
        ):
            torch.testing.assert_close(rank_metrics[name], metrics[name], rtol=1e-6, atol=0)  # float32 sums


def test_metrics_are_means_over_images(run):
    [(weights, metrics)] = run(train_and_test, 1, 7, 1)
    data = Random(7)
    task = make_task(data)
    task.net.load_state_dict(weights)
    images, labels = data.splits.test[list(range(7))]
    logits = task(data.normalize(images))
    assert metrics["test/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics["test/acc"].item() == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    torch.testing.assert_close(metrics["val/loss"], metrics["test/loss"])


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")  # Lightning 2.6 with torch 2.14
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")  # images in memory
def test_weight_decay_spares_norms_and_biases_and_the_rate_follows_the_schedule():
    data = Random(3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    task = Classifier(net, 5, data.plan.global_batch_size, lr=0.4, lr_rule="linear", weight_decay=0.3, warmup=0.5)
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, limit_val_batches=0, **QUIET)
    trainer.fit(task, datamodule=data)
    decay, rest = trainer.optimizers[0].param_groups
    assert decay["weight_decay"] == 0.3
    assert rest["weight_decay"] == 0
    assert {id(p) for p in decay["params"]} == {id(net[0].weight), id(net[3].weight)}
    assert len(rest["params"]) == 4
    assert decay["initial_lr"] == pytest.approx(0.1)  # 0.4 at 32 images, 8 here
    assert decay["lr"] == pytest.approx(0)  # after the last step
