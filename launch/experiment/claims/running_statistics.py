"""The claim that running statistics are unbiased estimates."""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import syncbn
from experiment.claims import images, learning, networks
from experiment.claims.claim import Claim, Part, Plot
from experiment.claims.runs import Numbers, Run, Setting, grid
from experiment.claims.training import Recipe
from experiment.claims.verdicts import Rule

NUM_CHANNELS, MEAN, STD, MOMENTUM = 4096, 1.0, 2.0, 0.1
BATCH = 8  # draws
SIZES = (8, 32, 128)  # images of a step of SGD
AVERAGE: Setting = {"how": "average", "batches": 200}
MOVING: Setting = {"how": "moving", "batches": 200}
START: Setting = {"how": "moving", "batches": 20}
BIASED: Setting = {"how": "biased", "batches": 200}


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


def _biased(num_batches: int) -> Numbers:
    """Average the biased variances of batches, as textbooks and Keras do."""
    mean, var = torch.zeros(NUM_CHANNELS), torch.ones(NUM_CHANNELS)
    for _ in range(num_batches):
        x = MEAN + STD * torch.randn(BATCH, NUM_CHANNELS)
        mean.lerp_(x.mean(0), MOMENTUM)
        var.lerp_(x.var(0, correction=0), MOMENTUM)
    mean_of, var_of = mean.double().mean().item(), var.double().mean().item()
    return {"mean_bias": 100 * (mean_of / MEAN - 1), "var_bias": 100 * (var_of / STD**2 - 1)}


def _trained(run: Run) -> Numbers:
    """Compare the running statistics of a trained network with those of all training images in one batch."""
    data = images.digits()
    net = learning.learn(run, lambda: networks.mlp("bn"), data, Recipe(0.03, batch_size=run["size"]))[0]
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm1d)]
    mean, var = _statistics_of(layers)
    syncbn.update_bn_stats(net, [data.train.images])
    exact_mean, exact_var = _statistics_of(layers)
    is_alive = exact_var > 1e-12
    ratios = (var / exact_var).log()[is_alive].tolist()
    shifts = ((mean - exact_mean) / exact_var.sqrt())[is_alive].tolist()
    return {"mean_bias": 100 * statistics.fmean(shifts), "var_bias": 100 * math.expm1(statistics.fmean(ratios))}


def _statistics_of(layers: Sequence[nn.BatchNorm1d]) -> tuple[Tensor, Tensor]:
    """Join copies of the running means and variances."""
    means = [layer.running_mean for layer in layers if layer.running_mean is not None]
    variances = [layer.running_var for layer in layers if layer.running_var is not None]
    return torch.cat(means), torch.cat(variances)


def _measure(run: Run) -> Numbers:
    torch.manual_seed(run.seed)
    how = run["how"]
    if how == "trained":
        return _trained(run)
    num_batches = run["batches"]
    if how == "biased":
        return _biased(num_batches)
    return _of_layer(_draws(num_batches, None if how == "average" else MOMENTUM))


def _part(label: str, sentence: str, setting: Setting, what: str = "variance") -> Part:
    quantity = f"relative bias of the running {what}, mean over channels"
    if setting["how"] == "trained":
        quantity = "ratio of the running variance to the exact one, less 1: geometric mean over channels that vary"
    name = "mean_bias" if what == "mean" else "var_bias"
    return Part(label, sentence, quantity, Rule("within", 1.0, "%"), lambda at: at(name, **setting))


def _trained_part(size: int) -> Part:
    sentence = f"After training with batches of {size}, torch's moving average of the variance is unbiased."
    return _part(f"trained with {size} images", sentence, {"how": "trained", "size": size})


RUNNING_STATISTICS = Claim(
    name="running_statistics",
    sentence="The running statistics are an unbiased estimate of those of the data.",
    source="textbooks on BatchNorm at inference",
    literature="half true: torch corrects the batch variance (Bessel), Keras and hand-written layers do not; the "
    "start fades with the number of batches",
    setup=(
        "Batches of 8 draws from a normal distribution with mean 1 and standard deviation 2, in 4096 channels; "
        "momentum 0.1, running variance 1 at the start. And the network of S after 400 steps of 8, 32 and 128 images "
        "at rate 0.03, against the statistics of all training images in one batch with the final weights (geometric "
        "mean of the ratios of variances): behind another BatchNorm the values of a batch depend on each other."
    ),
    parts=(
        _part("mean", "After 200 batches, torch's moving average of the mean is unbiased.", MOVING, what="mean"),
        _part("average", "After 200 batches, torch's plain average (momentum=None) is unbiased.", AVERAGE),
        _part("moving average", "After 200 batches, torch's moving average of the variance is unbiased.", MOVING),
        _part("after 20 batches", "After 20 batches, torch's moving average of the variance is unbiased.", START),
        _part("without Bessel", "After 200 batches, a moving average of biased variances is unbiased.", BIASED),
        *(_trained_part(size) for size in SIZES),
    ),
    settings=(AVERAGE, MOVING, START, BIASED, *grid(how=("trained",), size=SIZES)),
    measure=_measure,
    columns={"var_bias": "bias of the variance, %", "mean_bias": "bias of the mean, %"},
    plots=(
        Plot("Draws: the running variance", "var_bias", "bias, %", lines=("how", "batches")),
        Plot("Networks: the running variance", "var_bias", "bias, %", lines=("how", "size")),
    ),
    seeds=tuple(range(10)),
)
