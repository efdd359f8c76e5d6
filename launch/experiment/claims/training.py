"""One plain training loop for all experiments: SGD with momentum, linear warm-up, then half a cosine."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.claims.images import Split
from experiment.training.schedule import warmup_cosine

CHANCE = 0.9  # error of a network that has diverged: one class of ten is right
ROUNDING = 1e-6  # errors are numbers of float32
LEARNS = 0.5  # error of a network that has learned something, at most
EVAL_BATCH = 500
Around = Callable[[int, nn.Module, Tensor], AbstractContextManager[object]]  # step, network, images


@dataclass(frozen=True)
class Recipe:
    """Hold how a network is trained; `rate` is the peak of the learning rate."""

    rate: float
    num_steps: int = 400
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 0.0  # of parameters with more than one dimension
    warmup: float = 0.1  # part of the steps
    normalize_all: bool = False  # let every step normalize with the statistics of all training images


def train(net: nn.Module, split: Split, recipe: Recipe, seed: int, around: Around | None = None) -> list[float]:
    """Train in place, and give the loss of each step; a loss that is not finite is the last one.

    Args:
        net: The network.
        split: The images to train with.
        recipe: How.
        seed: Of the order of the images, which therefore is the same for every arm.
        around: A context for each step, in which something can be measured before and after it.
    """
    optimizer = _optimizer(net, recipe)
    losses: list[float] = []
    net.train()
    for step, indices in enumerate(batches(len(split.labels), recipe, seed)):
        images, labels = split.images[indices], split.labels[indices]
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * warmup_cosine(step, recipe.num_steps, recipe.warmup)
        with around(step, net, images) if around else nullcontext():
            outputs = net(split.images)[indices] if recipe.normalize_all else net(images)
            loss = F.cross_entropy(outputs, labels)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return losses


def _optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=recipe.rate, momentum=recipe.momentum)


def batches(num_images: int, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    """Yield the indices of each step's images, shuffled anew in every epoch; what fills no batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = num_images // recipe.batch_size
    for step in range(recipe.num_steps):
        if step % per_epoch == 0:
            order = torch.randperm(num_images, generator=generator)
        start = step % per_epoch * recipe.batch_size
        yield order[start : start + recipe.batch_size]


@torch.no_grad()
def error_and_loss(net: nn.Module, split: Split) -> tuple[float, float]:
    """Evaluate: the part of the images that is classified wrongly, and the mean cross entropy."""
    net.eval()
    outputs = torch.cat([net(images) for images in split.images.split(EVAL_BATCH)])  # type: ignore[no-untyped-call]
    loss = F.cross_entropy(outputs, split.labels).item()
    if not math.isfinite(loss):
        return CHANCE, math.inf
    return (outputs.argmax(1) != split.labels).float().mean().item(), loss
