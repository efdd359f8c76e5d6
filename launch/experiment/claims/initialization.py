"""Claims on the initial weights: how sensitive training is to them, and whether gradients vanish or explode."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from experiment.claims import images, learning, networks
from experiment.claims.claim import At, Claim, Part, Plot
from experiment.claims.runs import Numbers, Run, Setting, grid
from experiment.claims.training import Recipe, train
from experiment.claims.verdicts import Rule

WORKS = 0.1  # of error: the network has learned
SCALES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DEPTHS = (5, 10, 20, 40)
ARMS = ("none", "bn", "ln")


def _initial(run: Run) -> Numbers:
    return learning.in_s(run, lambda: networks.mlp(run["arm"], depth=run["depth"], scale=run["scale"]))


def _usual(setting: Setting) -> Setting:
    """Tune the rate at the usual depth and scale."""
    return {**setting, "depth": 5, "scale": 1.0}


def _num_working(at: At, arm: str, axis: str, **fixed: float) -> int:
    errors = at.along(axis, "test_error", arm=arm, **fixed)
    if len(errors) != len(SCALES if axis == "scale" else DEPTHS):
        raise LookupError(f"not every {axis} of {arm} has a result")
    return sum(error <= WORKS for error in errors.values())


def _more_working(axis: str, unit: str, name: str, **fixed: float) -> Part:
    return Part(
        axis,
        f"With BatchNorm training works at more {name}.",
        f"number of {name} with a test error of at most 10 %, with BatchNorm less without norm",
        Rule("above", 0.5, unit),
        lambda at: _num_working(at, "bn", axis, **fixed) - _num_working(at, "none", axis, **fixed),
    )


INITIALIZATION = Claim(
    name="initialization",
    sentence="With BatchNorm training is less sensitive to the initial weights.",
    source="Ioffe & Szegedy 2015, section 1",
    literature="true for the scale, as BatchNorm does not see it; false for the depth (Yang et al. 2019)",
    setup=(
        "S with no norm, BatchNorm and LayerNorm: the initial weights of the hidden layers (He) times 0.03 to 10, and "
        "5 to 40 hidden layers. The rate of an arm is its best at factor 1 and 5 layers, as somebody has it who did "
        "not tune for the change."
    ),
    parts=(
        _more_working("scale", "factors", "factors of the initial weights", depth=5),
        _more_working("depth", "depths", "depths", scale=1.0),
    ),
    settings=(*grid(arm=ARMS, depth=(5,), scale=SCALES), *grid(arm=ARMS, depth=DEPTHS[1:], scale=(1.0,))),
    measure=_initial,
    columns={"test_error": "test error, %", "train_error": "train error, %"},
    plots=(
        Plot(
            "5 hidden layers, other scales",
            "test_error",
            "test error, %",
            x="scale",
            x_label="factor of the initial weights",
            where={"depth": 5},
            percent=True,
        ),
        Plot(
            "Usual scale, other depths",
            "test_error",
            "test error, %",
            x="depth",
            x_label="hidden layers",
            where={"scale": 1.0},
            percent=True,
        ),
    ),
    rates=(0.01, 0.03, 0.1, 0.3),
    tuned_as=_usual,
)

NUM_IMAGES, NUM_STEPS, GRADIENT_RATE = 128, 10, 0.01


def _ratio(net: nn.Module) -> float:
    """Compare the gradients of the first and last hidden weights: log10 of the ratio of their norms."""
    data = images.digits().train.first(NUM_IMAGES)
    net.zero_grad()
    F.cross_entropy(net.train()(data.images.double()), data.labels).backward()  # type: ignore[no-untyped-call]
    weights = [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear)]
    first, last = (w.grad.norm().item() for w in (weights[0], weights[-2]) if w.grad is not None)  # -1: the classifier
    return math.log10(first / last) if first > 0 and last > 0 else math.nan


def _gradients(run: Run) -> Numbers:
    torch.manual_seed(run.seed)
    net = networks.mlp(run["arm"], run["activation"], depth=run["depth"], width=128).double()
    start = _ratio(net)
    data = images.digits().train
    data = images.Split(data.images.double(), data.labels)
    train(net, data, Recipe(GRADIENT_RATE, NUM_STEPS, NUM_IMAGES), run.seed)
    return {"start": start, "after": _ratio(net)}


def _gradient_part(activation: str, when: str) -> Part:
    name = {"start": "at the start", "after": "after 10 steps"}[when]
    return Part(
        f"{activation} {name}",
        f"50 layers of {activation}, {name}: the gradients neither vanish nor explode.",
        "log10 of (norm of the gradient of the first / of the last hidden weights) with BatchNorm",
        Rule("within", 1.0, "decades"),
        lambda at: at(when, arm="bn", activation=activation, depth=50),
    )


GRADIENTS = Claim(
    name="gradients",
    sentence="With BatchNorm gradients neither vanish nor explode.",
    source="textbooks, after Ioffe & Szegedy 2015, section 3.3",
    literature="half false: BatchNorm makes deep plain networks explode (Yang et al. 2019), residual ones not "
    "(De & Smith 2020)",
    setup=(
        "Plain networks of 10, 30 and 50 hidden layers of 128, in float64, without norm, with BatchNorm and with "
        "LayerNorm: the gradients of one batch of 128 at the start, and after 10 steps of SGD with a peak rate of "
        "0.01. The rule looks at 50 layers."
    ),
    parts=tuple(_gradient_part(a, when) for a in networks.ACTIVATIONS for when in ("start", "after")),
    settings=tuple(grid(activation=tuple(networks.ACTIVATIONS), arm=ARMS, depth=(10, 30, 50))),
    measure=_gradients,
    columns={"start": "log10 of the ratio at the start", "after": "after 10 steps"},
    plots=tuple(
        Plot(
            f"{activation}, {name}",
            when,
            "log10 (first / last)",
            x="depth",
            x_label="hidden layers",
            where={"activation": activation},
            log_x=False,
        )
        for activation in networks.ACTIVATIONS
        for when, name in (("start", "at the start"), ("after", "after 10 steps"))
    ),
    seeds=(0, 1, 2, 3, 4),
)
