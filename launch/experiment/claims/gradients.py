"""The claim that with BatchNorm gradients neither vanish nor explode."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from experiment.claims import images, networks
from experiment.claims.claim import Claim, Part, Plot
from experiment.claims.runs import Numbers, Run, grid
from experiment.claims.training import Recipe, train
from experiment.claims.verdicts import Rule

NUM_IMAGES, NUM_STEPS, GRADIENT_RATE = 128, 10, 0.01


def _ratio(net: nn.Module, first_hidden: int) -> float:
    """Compare the gradients of the first and last hidden weights: log10 of the ratio of their norms."""
    data = images.digits().train.first(NUM_IMAGES)
    net.zero_grad()
    F.cross_entropy(net.train()(data.images.double()), data.labels).backward()  # type: ignore[no-untyped-call]
    weights = [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear)]
    first, last = (
        w.grad.norm().item() for w in (weights[first_hidden], weights[-2]) if w.grad is not None
    )  # -1: the classifier
    return math.log10(first / last) if first > 0 and last > 0 else math.nan


def _gradients(run: Run) -> Numbers:
    torch.manual_seed(run.seed)
    make = networks.residual_mlp if run["net"] == "residual" else networks.mlp
    net = make(run["arm"], run["activation"], depth=run["depth"], width=128).double()
    first_hidden = 1 if run["net"] == "residual" else 0  # behind the linear layer in front of the blocks
    start = _ratio(net, first_hidden)
    data = images.digits().train
    data = images.Split(data.images.double(), data.labels)
    train(net, data, Recipe(GRADIENT_RATE, NUM_STEPS, NUM_IMAGES), run.seed)
    return {"start": start, "after": _ratio(net, first_hidden)}


ARMS = ("none", "bn", "ln")
NETS = (*(("plain", activation) for activation in networks.ACTIVATIONS), ("residual", "relu"))
WHEN = {"start": "at the start", "after": "after 10 steps"}


def _gradient_part(net: str, activation: str, when: str) -> Part:
    return Part(
        f"{net} {activation} {WHEN[when]}",
        f"A {net} network of 50 layers of {activation}, {WHEN[when]}: the gradients neither vanish nor explode.",
        "log10 of (norm of the gradient of the first / of the last hidden weights) with BatchNorm",
        Rule("within", 1.0, "decades"),
        lambda at: at(when, net=net, arm="bn", activation=activation, depth=50),
    )


GRADIENTS = Claim(
    name="gradients",
    sentence="With BatchNorm gradients neither vanish nor explode.",
    source="textbooks, after Ioffe & Szegedy 2015, section 3.3",
    literature="half false: BatchNorm makes deep plain networks explode (Yang et al. 2019), residual ones not "
    "(De & Smith 2020)",
    setup=(
        "Plain networks of 10, 30 and 50 hidden layers of 128, and residual ones of as many blocks with the norm in "
        "front, in float64, without norm, with BatchNorm and with LayerNorm: the gradients of one batch of 128 at the "
        "start, and after 10 steps of SGD with a peak rate of 0.01. The rule looks at 50 layers."
    ),
    parts=tuple(_gradient_part(*net, when) for net in NETS for when in WHEN),
    settings=tuple(
        setting
        for net, activation in NETS
        for setting in grid(net=(net,), activation=(activation,), arm=ARMS, depth=(10, 30, 50))
    ),
    measure=_gradients,
    columns={"start": "log10 of the ratio at the start", "after": "after 10 steps"},
    plots=tuple(
        Plot(
            f"{net} {activation}, {name}",
            when,
            "log10 (first / last)",
            x="depth",
            x_label="hidden layers",
            where={"net": net, "activation": activation},
            log_x=False,
        )
        for net, activation in NETS
        for when, name in WHEN.items()
    ),
    seeds=(0, 1, 2, 3, 4),
)
