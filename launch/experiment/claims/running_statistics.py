"""The claim that running statistics are unbiased estimates."""

import math
import statistics

import torch
from torch import nn

import syncbn
from experiment.claims import images, learning, networks
from experiment.claims.claim import Claim, Part, Plot
from experiment.claims.runs import Numbers, Run
from experiment.claims.training import Recipe
from experiment.claims.verdicts import Rule

NUM_CHANNELS, BATCH, MEAN, STD, MOMENTUM = 4096, 8, 1.0, 2.0, 0.1
WITHIN = Rule("within", 1.0, "%")


def _draws(num_batches: int, momentum: float | None) -> nn.BatchNorm1d:
    """Let a layer see batches of 8 values of a known distribution."""
    layer = nn.BatchNorm1d(NUM_CHANNELS, momentum=momentum)
    with torch.no_grad():
        for _ in range(num_batches):
            layer(MEAN + STD * torch.randn(BATCH, NUM_CHANNELS))
    return layer


def _of_layer(layer: nn.BatchNorm1d) -> Numbers:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var = layer.running_mean.double().mean().item(), layer.running_var.double().mean().item()
    return {"mean_bias": 100 * (mean / MEAN - 1), "var_bias": 100 * (var / STD**2 - 1)}


def _textbook(num_batches: int) -> Numbers:
    """Average the biased variances of batches, as textbooks and Keras do."""
    mean, var = torch.zeros(NUM_CHANNELS), torch.ones(NUM_CHANNELS)
    for _ in range(num_batches):
        x = MEAN + STD * torch.randn(BATCH, NUM_CHANNELS)
        mean.lerp_(x.mean(0), MOMENTUM)
        var.lerp_(x.var(0, correction=0), MOMENTUM)
    mean_of, var_of = mean.double().mean().item(), var.double().mean().item()
    return {"mean_bias": 100 * (mean_of / MEAN - 1), "var_bias": 100 * (var_of / STD**2 - 1)}


def _trained(run: Run) -> Numbers:
    """Compare the running variances of a trained network with those of all training images by the last weights."""
    data = images.digits()
    net = learning.learn(run, lambda: networks.mlp("bn"), data, Recipe(0.03))[0]
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm1d)]
    running = torch.cat([layer.running_var.clone() for layer in layers if layer.running_var is not None])
    syncbn.update_bn_stats(net, data.train.images.split(32))  # type: ignore[no-untyped-call]
    exact = torch.cat([layer.running_var for layer in layers if layer.running_var is not None])
    ratios = (running / exact).log()[exact > 1e-12].tolist()
    return {"var_bias": 100 * math.expm1(statistics.fmean(ratios))}


def _measure(run: Run) -> Numbers:
    torch.manual_seed(run.seed)
    how, num_batches = run["how"], run["batches"]
    if how == "trained":
        return _trained(run)
    if how == "textbook":
        return _textbook(num_batches)
    return _of_layer(_draws(num_batches, None if how == "exact" else MOMENTUM))


def _part(sentence: str, how: str, num_batches: int) -> Part:
    quantity = "relative bias of the running variance, mean over channels"
    return Part(
        f"{how} {num_batches}", sentence, quantity, WITHIN, lambda at: at("var_bias", how=how, batches=num_batches)
    )


RUNNING_STATISTICS = Claim(
    name="running_statistics",
    sentence="The running statistics are an unbiased estimate of those of the data.",
    source="textbooks on BatchNorm at inference",
    literature="half true: torch corrects the batch variance (Bessel), Keras and hand-written layers do not; the "
    "start fades with the number of batches",
    setup=(
        "Batches of 8 draws from a normal distribution with mean 1 and standard deviation 2, in 4096 channels; "
        "momentum 0.1, running variance 1 at the start. And the network of S after training at rate 0.03, against "
        "the variances of all training images with the final weights (geometric mean of the ratios)."
    ),
    parts=(
        _part("torch's average over all batches (momentum=None), 200 batches", "exact", 200),
        _part("torch's moving average, 200 batches", "moving", 200),
        _part("torch's moving average, 20 batches", "moving", 20),
        _part("A moving average of the batches' biased variances, 200 batches", "textbook", 200),
        _part("torch's moving average in a network after training", "trained", 400),
    ),
    settings=(
        {"how": "exact", "batches": 200},
        {"how": "moving", "batches": 200},
        {"how": "moving", "batches": 20},
        {"how": "textbook", "batches": 200},
        {"how": "trained", "batches": 400},
    ),
    measure=_measure,
    columns={"var_bias": "bias of the variance, %", "mean_bias": "bias of the mean, %"},
    plots=(Plot("Relative bias of the running variance", "var_bias", "bias, %", lines=("how", "batches")),),
    seeds=tuple(range(10)),
)
