"""The tasks: their schedule, and metrics and steps that are the same at any world size."""

import os
import warnings
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F

import syncbn
from experiment.training.data import ImageData
from experiment.training.image_set import ImageSet, Splits
from experiment.training.known_warnings import ignore_known_warnings
from experiment.training.schedule import scale_lr, warmup_cosine
from experiment.training.segmentation import Segmenter
from experiment.training.sharding import Draw
from experiment.training.task import Classifier
from experiment.training.world import World
from syncbn.compat import DDP_OPTIONS

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
METRICS = ("train/loss", *(f"{name}/{kind}" for name in ("val", "test", "train_eval") for kind in ("loss", "score")))


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
    """Serve random images of 5 classes, or 5 classes of pixels: 24 to train, `num_eval` to validate and test."""

    def __init__(self, num_eval, per_pixel=False, **kwargs):
        super().__init__([0.5] * 3, [0.25] * 3, global_batch_size=8, eval_batch_size=3, num_train_eval=5, **kwargs)
        self.num_eval, self.per_pixel = num_eval, per_pixel
        self.load()

    def make_splits(self):
        def draw(num):
            images = torch.randint(256, (num, 3, 4, 4), generator=generator, dtype=torch.uint8)
            size = (num, 4, 4) if self.per_pixel else (num,)
            return ImageSet(images, torch.randint(5, size, generator=generator))

        generator = torch.Generator().manual_seed(0)
        train, evaluation = draw(24), draw(self.num_eval)
        return Splits(train, train, evaluation, evaluation, num_classes=5)


def make_task(data):
    torch.manual_seed(0)
    if data.per_pixel:
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 5, 1))
    else:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5))
    kind = Segmenter if data.per_pixel else Classifier
    return kind(nn.Sequential(Double(), net.double()), 5, data.plan.global_batch_size)


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def train_and_test(rank, world_size, per_pixel, num_eval, accumulate):
    """Fit two epochs, then test; give the weights and every metric, the task's own as score."""
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
            data = Random(num_eval, per_pixel, accumulate=accumulate, world=World.from_env())
            task = make_task(data)
            trainer = L.Trainer(
                accelerator="cpu",
                devices=world_size,
                strategy=DDPStrategy(**DDP_OPTIONS),
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
            metrics |= trainer.callback_metrics
            return dict(task.net.state_dict()), {k.replace(task.score, "score"): v for k, v in metrics.items()}
    finally:
        os.environ.clear()
        os.environ.update(saved)


@pytest.mark.parametrize(
    ("per_pixel", "world_size", "num_eval", "accumulate"),
    [(False, 2, 7, 1), (False, 2, 1, 2), (False, 4, 7, 1), (False, 4, 2, 2), (True, 2, 7, 2), (True, 4, 2, 1)],
)
def test_ranks_do_what_one_process_does(run, per_pixel, world_size, num_eval, accumulate):
    """Uneven last batches and ranks without any image included: 7 images on 4 ranks, 1 image on 2."""
    [(weights, metrics)] = run(train_and_test, 1, per_pixel, num_eval, 1)
    assert metrics.keys() >= set(METRICS)
    for rank_weights, rank_metrics in run(train_and_test, world_size, per_pixel, num_eval, accumulate):
        torch.testing.assert_close(rank_weights, weights, rtol=1e-12, atol=1e-12)  # float64, 6 steps
        for name in METRICS:
            torch.testing.assert_close(rank_metrics[name], metrics[name], rtol=1e-6, atol=0)  # float32 sums


def logits_of(data, weights):
    """Compute the test images' logits by themselves, and give them with the labels."""
    task = make_task(data)
    task.net.load_state_dict(weights)
    images, labels = data.splits.test[Draw(list(range(len(data.splits.test))), 0)]
    return task(data.normalize(images)).detach(), labels


def test_metrics_are_means_over_images(run):
    [(weights, metrics)] = run(train_and_test, 1, False, 7, 1)
    logits, labels = logits_of(Random(7), weights)
    assert metrics["test/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics["test/score"].item() == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    torch.testing.assert_close(metrics["val/loss"], metrics["test/loss"])


def mean_iou(predictions, labels, num_classes):
    """Compute the mIoU of the whole set with numpy, over the classes that are somewhere."""
    pairs = zip(labels.flatten().tolist(), predictions.flatten().tolist(), strict=True)
    confusion = np.zeros((num_classes, num_classes))
    for pair in pairs:
        confusion[pair] += 1
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return (confusion.diagonal()[union > 0] / union[union > 0]).mean()


@pytest.mark.parametrize(("world_size", "num_eval"), [(1, 7), (2, 7), (2, 1)])
def test_miou_is_that_of_all_pixels_of_all_ranks(run, world_size, num_eval):
    """One image on two ranks leaves the second without any."""
    for weights, metrics in run(train_and_test, world_size, True, num_eval, 1):
        logits, labels = logits_of(Random(num_eval, per_pixel=True), weights)
        assert metrics["test/score"].item() == pytest.approx(mean_iou(logits.argmax(1), labels, 5), rel=1e-6)
        assert metrics["test/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
        assert metrics["val/score"] == metrics["test/score"]


def test_a_class_that_is_nowhere_has_no_part_in_the_miou():
    score = Segmenter(nn.Identity(), 6).make_score(6)
    predictions, labels = torch.tensor([[[0, 1], [3, 4]], [[0, 1], [2, 2]]]), torch.tensor([[[0, 1], [3, 3]]] * 2)
    for part in range(2):  # 5 is neither label nor prediction; 2 and 4 are predicted and never right
        score.update(F.one_hot(predictions[[part]], 6).permute(0, 3, 1, 2).float(), labels[[part]])
    assert score.compute().item() == pytest.approx(mean_iou(predictions, labels, 6), rel=1e-6)
    assert score.compute().item() == pytest.approx((1 + 1 + 0 + 0.25 + 0) / 5, rel=1e-6)


def test_labels_of_the_other_task_are_refused():
    classifier, segmenter = Classifier(nn.Identity(), 5), Segmenter(nn.Identity(), 5)
    classifier.check_labels(torch.zeros(2))
    segmenter.check_labels(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"Classifier needs one label per image, \(N,\), got \(2, 4, 4\)"):
        classifier.check_labels(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"Segmenter needs one label per pixel, \(N, H, W\), got \(2,\)"):
        segmenter.check_labels(torch.zeros(2))


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")  # Lightning 2.6 with torch 2.14
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")  # images in memory
@pytest.mark.parametrize(("kind", "optimizer"), [(Classifier, torch.optim.SGD), (Segmenter, torch.optim.AdamW)])
def test_weight_decay_spares_norms_and_biases_and_the_rate_follows_the_schedule(kind, optimizer):
    data = Random(3, per_pixel=kind.per_pixel)
    last = [nn.Conv2d(4, 5, 1)] if kind.per_pixel else [nn.Flatten(), nn.Linear(64, 5)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), *last)
    task = kind(net, 5, data.plan.global_batch_size, lr=0.4, lr_rule="linear", weight_decay=0.3, warmup=0.5)
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, limit_val_batches=0, **QUIET)
    trainer.fit(task, datamodule=data)
    assert type(trainer.optimizers[0]) is optimizer
    decay, rest = trainer.optimizers[0].param_groups
    assert decay["weight_decay"] == 0.3
    assert rest["weight_decay"] == 0
    assert {id(p) for p in decay["params"]} == {id(net[0].weight), id(net[-1].weight)}
    assert len(rest["params"]) == 4
    assert decay["initial_lr"] == pytest.approx(0.1)  # 0.4 at 32 images, 8 here
    assert decay["lr"] == pytest.approx(0)  # after the last step


def test_weight_decay_spares_the_scale_of_a_normalized_weight():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    task = Classifier(syncbn.convert(net, "wn"), 2, weight_decay=0.3)
    task._trainer = SimpleNamespace(estimated_stepping_batches=1)
    decay, rest = task.configure_optimizers()["optimizer"].param_groups
    directions = [layer.parametrizations.weight.original1 for layer in (net[0], net[2])]
    assert {id(p) for p in decay["params"]} == {id(p) for p in (*directions, net[4].weight)}
    assert len(decay["params"] + rest["params"]) == len(list(task.parameters()))
