"""Training that freezes late: which statistics, on real and simulated ranks, before and after a stop."""

import contextlib
import json

import pytest
import torch
from hydra.utils import instantiate
from test_launch import composed, here, load_train, only_run  # noqa: F401  # here is a fixture
from test_resume import SMALL, assert_same_run, at_step, killed, train, train_as_rank
from torch import nn

from experiment.evaluate import MODES
from experiment.training.freeze_late import FreezeLate
from experiment.training.sharding import Draw
from experiment.training.task import Task
from experiment.training.world import World

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")  # Lightning 2.6 with torch 2.14
NORM = "+norm=frozen_from_precise"
EVERY_MODE = f"evaluate=[{','.join(MODES)}]"
NUM_IMAGES, PER_RANK = 50, 3
SIZES = [f"data.num_train={NUM_IMAGES}", f"data.per_rank_batch_size={PER_RANK}", "data.accumulate=2"]
FLOAT64 = [*SIZES, "trainer.precision=64-true"]
NUM_STEPS, FIRST = 8, 6  # two epochs of 48 images in steps of 12, on two ranks; 0.75 of them


@contextlib.contextmanager
def noting(states):
    """Note the state before the first batch of each step, as it is seen by that batch."""
    original = Task.training_step

    def training_step(task, batch, batch_idx):
        states.setdefault(task.trainer.global_step, {k: v.clone() for k, v in task.net.state_dict().items()})
        return original(task, batch, batch_idx)

    Task.training_step = training_step
    try:
        yield
    finally:
        Task.training_step = original


def states_of_rank(rank, world_size, folder, *overrides):
    states = {}
    with noting(states):
        train_as_rank(rank, world_size, folder, [], *overrides)
    return states


def pooled(weights, norm):
    """Compute by hand, with nn.BatchNorm, mean and variance of what each layer gets in the batches of two ranks."""
    config = composed(*SMALL, *FLOAT64)
    data = instantiate(config.data, _partial_=True)(world=World(), seed=config.seed)
    data.load()
    net = instantiate(config.model, num_classes=10, in_channels=3).double().train()
    net.load_state_dict(weights)
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(config.seed))
    whole = order[: NUM_IMAGES // (2 * PER_RANK) * 2 * PER_RANK].tolist()
    inputs = {name: [] for name, layer in net.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    for name, values in inputs.items():
        net.get_submodule(name).register_forward_pre_hook(lambda _, args, v=values: v.append(args[0].detach()))
    for images in data.normalize(data.splits.train[Draw(whole, 0)][0]).split(
        PER_RANK if norm == "bn" else 2 * PER_RANK
    ):
        net(images.double())
    joined = {name: torch.cat(values) for name, values in inputs.items()}
    return {name: (x.mean((0, 2, 3)), x.var((0, 2, 3))) for name, x in joined.items()}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "syncbn"])
def test_two_ranks_freeze_with_the_statistics_of_all_and_go_on(run, tmp_path, monkeypatch, norm):
    settings = [*FLOAT64, NORM, f"norm.norm={norm}", f"run_dir={tmp_path / 'run'}"]
    ranks = run(states_of_rank, 2, tmp_path, *settings, timeout=120)
    monkeypatch.setenv("SYNCBN_CACHE", str(tmp_path / "cache"))
    expected = pooled(ranks[0][FIRST], norm)
    assert len(expected) == 9
    for states in ranks:
        assert states.keys() == set(range(NUM_STEPS))
        for name, (mean, var) in expected.items():
            assert not torch.allclose(states[FIRST - 1][f"{name}.running_mean"], mean, rtol=1e-3)
            for step in range(FIRST, NUM_STEPS):
                torch.testing.assert_close(states[step][f"{name}.running_mean"], mean, rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(states[step][f"{name}.running_var"], var, rtol=1e-9, atol=1e-9)
        assert not torch.equal(states[FIRST]["0.weight"], states[NUM_STEPS - 1]["0.weight"])


def test_every_simulated_rank_has_them_and_all_evaluations_are_one(here):  # noqa: F811
    states = {}
    with noting(states):
        train(*FLOAT64, NORM, EVERY_MODE, "simulate=2")
    run, results = only_run(here)
    assert len({json.dumps(results["evaluations"][mode]) for mode in MODES}) == 1
    buffers = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["syncbn"]["ranks"][0]["buffers"]
    for name, (mean, var) in pooled(states[FIRST], "bn").items():
        for key, value in (("mean", mean), ("var", var)):
            torch.testing.assert_close(buffers[f"net.{name}.running_{key}"], value, rtol=1e-9, atol=1e-9)
            each = buffers[f"net.{name}.split_running_{key}"]
            torch.testing.assert_close(each, value.expand(2, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        *(
            pytest.param(extra, marks=pytest.mark.slow)
            for extra in (["simulate=2", "data.accumulate=2"], ["data.accumulate=2"], ["norm.freeze_at=0.5"])
        ),
    ],
)
def test_stopped_before_at_and_after_it(here, extra):  # noqa: F811
    settings = [NORM, "checkpoint_every=1", *extra]
    train(*settings, "run_dir=whole")
    first = 4 if "norm.freeze_at=0.5" in extra else 6  # of 8 steps; 4 is at the end of an epoch
    for step in (first - 1, first, first + 1):
        with killed(Task, "training_step", at_step(step)):
            train(*settings, "run_dir=run")
    train(*settings, "run_dir=run")
    assert_same_run(here / "run", here / "whole")


@pytest.mark.slow
def test_from_the_checkpoint_of_another_arm_it_freezes_at_once(here):  # noqa: F811
    with killed(Task, "training_step", at_step(7)):
        train("+norm=bn", "checkpoint_every=1", "run_dir=bn")
    states = {}
    with noting(states):
        train(NORM, "ckpt_path=bn/checkpoints/last.ckpt", "run_dir=run")
    before = torch.load("bn/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    ends = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert states.keys() == {7}
    for name, value in states[7].items():
        if "running" in name:
            assert torch.equal(value, ends[f"net.{name}"])
            assert not torch.equal(value, before[f"net.{name}"])


@pytest.mark.slow
def test_random_streams_go_on_as_without_it(here, monkeypatch):  # noqa: F811
    forward, streams = Task.forward, []
    monkeypatch.setattr(Task, "forward", lambda task, images: forward(task, images + torch.rand(()) * task.training))
    for norm in ("+norm=bn", NORM):
        train(norm, f"run_dir={norm[6:]}")
        checkpoint = torch.load(f"{norm[6:]}/checkpoints/last.ckpt", weights_only=True)
        streams.append(checkpoint["syncbn"]["ranks"][0]["random"]["torch"])
    assert torch.equal(*streams)


@pytest.mark.parametrize("part", [-0.1, 1, True, "late", None])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(ValueError, match=r"expected norm.freeze_at to be a part of the training, at least 0, below 1"):
        FreezeLate(freeze_at=part)


def test_a_layer_that_cannot_be_frozen_is_found_before_training(here, monkeypatch):  # noqa: F811
    make = nn.BatchNorm2d.__init__
    monkeypatch.setattr(nn.BatchNorm2d, "__init__", lambda *args: make(*args, track_running_stats=False))
    states = {}
    with noting(states), pytest.raises(ValueError, match="expected running statistics in every BatchNorm"):
        train(NORM)
    assert not states
