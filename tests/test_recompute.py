"""Activation checkpointing: recomputations update no statistics; the non-reentrant variant repeats no collective."""

import copy
import warnings

import pytest
import torch
from test_functional import Collectives
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import syncbn

# A private name, which torch 2.6 lacks: the exchange is repeated.
FINDS_THE_CHECKPOINT = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


def net(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.BatchNorm1d(3, momentum=None)]
    return nn.Sequential(*layers).double()


def step(model, x, run):
    """One forward and backward; returns what must not depend on checkpointing, and the collectives that ran."""
    x = x.clone().requires_grad_()
    with Collectives() as seen:
        run(model, x)
    gradients = [p.grad.clone() for p in model.parameters()] + [x.grad]
    return gradients + [b.clone() for b in model.buffers()], len(seen.seen)


def plain(model, x):
    (model(x) ** 3).sum().backward()


def whole(model, x, **options):
    (checkpoint(model, x, **options) ** 3).sum().backward()


def halves(model, x, **options):
    y = checkpoint(model[:2], x, **options)
    (checkpoint(model[2:], y, **options) ** 3).sum().backward()


def twice(model, x, **options):
    """One checkpointed region used twice before one backward pass: a queue of statistics would mix them up."""
    y = checkpoint(model, x, **options)
    z = checkpoint(model, x * 2 + 1, **options)
    ((y**3).sum() + 2 * (z**3).sum()).backward()


def twice_plain(model, x):
    y, z = model(x), model(x * 2 + 1)
    ((y**3).sum() + 2 * (z**3).sum()).backward()


def retained(model, x, **options):
    loss = (checkpoint(model, x, **options) ** 3).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def retained_plain(model, x):
    loss = (model(x) ** 3).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def nested(model, x, **options):
    def outer(x):
        return checkpoint(model[2:], model[:2](x), **options)

    with warnings.catch_warnings():  # the reentrant variant warns that its first pass needs no gradient
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        (checkpoint(outer, x, **options) ** 3).sum().backward()


def offloaded(model, x, **options):
    """Hooks of the user's own on top of the checkpoint's: its frame is not found, the exchange is repeated."""

    def inner(x):
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    (checkpoint(inner, x, **options) ** 3).sum().backward()


def selective(model, x, **options):
    contexts = lambda: create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])  # noqa: E731
    whole(model, x, context_fn=contexts, **options)


CASES = {
    "whole": (whole, plain),
    "halves": (halves, plain),
    "twice": (twice, twice_plain),
    "retain_graph": (retained, retained_plain),
    "nested": (nested, plain),
    "offloaded": (offloaded, plain),
    "selective": (selective, plain),
}


def compare_steps(rank, world_size, case, options):
    checkpointed, reference = CASES[case]
    model = syncbn.convert(net())
    other = copy.deepcopy(model)
    x = torch.randn(2 + rank, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    counts = []
    for _ in range(2):
        wanted, count = step(model, x, reference)
        actual, again = step(other, x, lambda m, x: checkpointed(m, x, **options))
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
        counts.append((count, again))
    return counts


@pytest.mark.parametrize("case", CASES)
def test_non_reentrant(run, case):
    repeats = case in ("nested", "offloaded") or not FINDS_THE_CHECKPOINT
    for counts in run(compare_steps, 2, case, {"use_reentrant": False}):
        for count, again in counts:
            assert again == count if not repeats else again >= count


@pytest.mark.parametrize("case", ["whole", "halves", "nested"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_reentrant(run, case, world_size):
    for counts in run(compare_steps, world_size, case, {"use_reentrant": True}):
        for count, again in counts:
            assert again > count if world_size > 1 else again == count == 0


def test_one_process_updates_once_too(run):
    run(compare_steps, 1, "whole", {"use_reentrant": False}, initialize=False)


def early_stop_off(rank, world_size):
    from torch.utils.checkpoint import set_checkpoint_early_stop

    with set_checkpoint_early_stop(False):
        return compare_steps(rank, world_size, "whole", {"use_reentrant": False})


def test_without_early_stop(run):
    for counts in run(early_stop_off, 2):
        assert all(again == count if FINDS_THE_CHECKPOINT else again > count for count, again in counts)


def test_selective_on_one_process(run):
    run(compare_steps, 1, "selective", {"use_reentrant": False}, initialize=False)
