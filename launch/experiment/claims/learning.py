"""Train one network of a run and measure its errors; only runs that report read test images."""

import statistics
from collections.abc import Callable

import torch
from torch import nn

from experiment.claims import images, networks
from experiment.claims.images import Images
from experiment.claims.runs import Numbers, Run
from experiment.claims.training import Around, Recipe, error_and_loss, train

EPOCH = 437  # steps of 32 of the 14 000 images in setting R
STEPS = {"S": 400, "R": 3 * EPOCH}  # with one epoch, the network of R does not learn without norm
NUM_TRAIN_EVAL = 1500  # training images of which the train error is measured
WINDOW = 20  # steps that a training loss is averaged over


def learn(
    run: Run, make: Callable[[], nn.Module], source: Images, recipe: Recipe, around: Around | None = None
) -> tuple[nn.Module, list[float], Numbers]:
    """Train what `make` gives, with the run's seed, and evaluate it.

    Returns:
        The network, the loss of every step, and the errors as fractions: `validate_error`, and where the run reports
        `test_error`, `train_error` and `train_loss`.
    """
    torch.manual_seed(run.seed)
    net = make()
    losses = train(net, source.train, recipe, run.seed, around)
    numbers = {"validate_error": error_and_loss(net, source.validate)[0]}
    if run.phase == "report":
        numbers["test_error"] = error_and_loss(net, source.test())[0]
        numbers["train_error"], numbers["train_loss"] = error_and_loss(net, source.train.first(NUM_TRAIN_EVAL))
    return net, losses, numbers


def in_s(run: Run, make: Callable[[], nn.Module], weight_decay: float = 0.0, *, few: bool = False) -> Numbers:
    """Learn in setting S, at the run's rate; `few`: with 200 images."""
    assert run.rate is not None
    source = images.few_digits() if few else images.digits()
    return learn(run, make, source, Recipe(run.rate, weight_decay=weight_decay))[2]


def recipe_of_r(rate: float, num_steps: int = STEPS["R"]) -> Recipe:
    """Give the recipe of setting R."""
    return Recipe(rate, num_steps, weight_decay=1e-4)


def steps_to(level: float, losses: list[float]) -> int | None:
    """Count the steps until the mean loss of the last 20 is `level` or less; None if it never is."""
    for end in range(WINDOW, len(losses) + 1):
        if statistics.fmean(losses[end - WINDOW : end]) <= level:
            return end
    return None


def learn_in(name: str, run: Run, arm: str, rate: float) -> tuple[list[float], Numbers]:
    """Learn in setting S or R with one arm's network."""
    if name == "S":
        return learn(run, lambda: networks.mlp(arm), images.digits(), Recipe(rate))[1:]
    return learn(run, lambda: networks.resnet(arm), images.digits_on_photos(), recipe_of_r(rate))[1:]
