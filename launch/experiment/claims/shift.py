"""The claim that BatchNorm works since it lowers the internal covariate shift."""

import copy
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from experiment.claims import images, learning, networks, training
from experiment.claims.claim import At, Claim, Part, Plot
from experiment.claims.runs import Numbers, Run, grid
from experiment.claims.verdicts import Rule

EVERY = 20  # steps between two measurements
LOSS = 1.0  # down to which shifts are compared


class Shift:
    """Measure how much a step changes the distribution of what the layers get.

    For the inputs of every convolution and linear layer but the first, on the images of the step and in training
    mode: `sqrt(sum (change of mean)^2 + (change of std)^2) / sqrt(sum std^2)` over channels, then the mean over
    layers.
    """

    def __init__(self) -> None:
        self.values: list[float] = []  # of steps 0, 20, 40, ...

    @contextmanager
    def around(self, step: int, net: nn.Module, batch: Tensor) -> Iterator[None]:
        """Measure around a step, every 20 steps."""
        if step % EVERY:
            yield
            return
        before = _moments(net, batch)
        yield
        after = _moments(net, batch)
        changes = [_change(*pair) for pair in zip(before, after, strict=True)]
        self.values.append(statistics.fmean(changes))

    def mean(self, num_steps: int | None = None) -> float:
        """Average over the first steps, or over all."""
        return statistics.fmean(self.values if num_steps is None else self.values[: math.ceil(num_steps / EVERY)])


@torch.no_grad()
def _moments(net: nn.Module, batch: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Give mean and standard deviation per channel of the input of each layer but the first, from a copy of `net`."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1)  # (C, values)
        found.append((x.mean(1), x.std(1)))

    other = copy.deepcopy(net).train()
    for layer in other.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_pre_hook(keep)
    other(batch)
    return found[1:]


def _change(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> float:
    moved = sum((b - a).square().sum() for b, a in zip(before, after, strict=True))
    spread = float(before[1].square().sum())
    return math.sqrt(float(moved) / spread) if spread else math.inf


def _measure(run: Run) -> Numbers:
    assert run.rate is not None
    shift, recipe = Shift(), learning.recipe_of_r(run.rate)
    make = partial(networks.resnet, run["arm"])
    _, losses, numbers = learning.learn(run, make, images.digits_on_photos(), recipe, shift.around)
    return {**numbers, "shift": shift.mean(), "early_shift": shift.mean(learning.steps_to(LOSS, losses))}


def _more_shift(at: At, of: str, than: str) -> float:
    """Compare the shifts of two arms in decades, where both have learned."""
    for arm in (of, than):
        if at("test_error", arm=arm) > training.LEARNS:
            raise LookupError(f"{arm} has not learned")
    return math.log10(at("early_shift", arm=of) / at("early_shift", arm=than))


def _cost_of_noise(at: At) -> float:
    return 100 * (at("test_error", arm="noisy_bn") - at("test_error", arm="bn"))


COVARIATE_SHIFT = Claim(
    name="covariate_shift",
    sentence="BatchNorm works since it reduces the internal covariate shift.",
    source="Ioffe & Szegedy 2015, title and section 2",
    literature="false: BatchNorm trains as well with noise that brings the shift back, and need not reduce it "
    "(Santurkar et al. 2018)",
    setup=(
        "R: no norm, BatchNorm, and BatchNorm whose outputs are shifted and scaled at random in every "
        "training step, each at its own best rate. The shift is the change by one step of means and standard "
        "deviations of the layers' inputs, relative to the standard deviations; larger rates make it larger. "
        "Arms are compared over the steps until the mean training loss of 20 steps is 1, since a network that "
        "is nearly trained moves little, and where both have learned (test error of at most 50 %). If the "
        "sentence is true, BatchNorm has less of the shift, and loses with the noise that brings it back: one "
        "part that is refuted refutes it."
    ),
    parts=(
        Part(
            "shift reduced",
            "BatchNorm reduces the shift.",
            "log10 of (shift without norm / with BatchNorm), until the loss is 1; 0.04 decades are 10 %",
            Rule("above", 0.04, "decades"),
            partial(_more_shift, of="none", than="bn"),
        ),
        Part(
            "noise hurts",
            "With the shift brought back by noise, BatchNorm trains worse.",
            "test error of BatchNorm with noise, less that of BatchNorm",
            Rule("above", 1.0, "points"),
            _cost_of_noise,
        ),
    ),
    settings=tuple(grid(data=("R",), arm=("none", "bn", "noisy_bn"))),
    measure=_measure,
    columns={
        "test_error": "test error, %",
        "train_error": "train error, %",
        "early_shift": "shift until the loss is 1",
        "shift": "shift of all steps",
    },
    needs_all=True,
    remark=(
        "A first run asked whether noise loses half of the gain, with one epoch, in which no network without norm "
        "learned; and a sentence with one part shown and one refuted counted as half true."
    ),
    plots=(
        Plot("Test error", "test_error", "test error, %", percent=True),
        Plot("Shift of one step until the loss is 1", "early_shift", "shift", log_y=True),
        Plot("Shift of one step in all of training", "shift", "shift", log_y=True),
    ),
    rates=(0.03, 0.1, 0.3),
    tuned_by="converges_faster",
)
