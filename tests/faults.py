"""What goes wrong on one rank of a job: one function of (rank, world_size) for each kind.

They train `Net` for three steps; in the second, rank 1 does something else than the others. Each returns the outputs,
gradients and buffers of its rank, which `one_process` computes with nn.BatchNorm on the joined batches.
"""

import contextlib
import os
import signal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.compat import DDP_OPTIONS

GUILTY, STEPS, WHEN = 1, 3, 1  # rank, number of steps, step of the fault
IN_ORDER = ("norm1", "norm2", "norm3")


class Net(nn.Module):
    """Three linear layers with their norms; the caller may give another order, or None for a layer left out."""

    def __init__(self, channels=(6, 6, 5)):
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(map(nn.Linear, (4, *channels[:-1]), channels))
        self.norm1, self.norm2, self.norm3 = map(nn.BatchNorm1d, channels)
        self.double()

    def forward(self, x, order=IN_ORDER):
        for linear, norm in zip(self.linears, order, strict=True):
            x = linear(x)
            x = (x if norm is None else getattr(self, norm)(x)).tanh()
        return x


class WithParts(Net):
    """A part that rank 0 alone uses, in front, and one that rank 1 alone uses, behind."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(5, 5)]).double()

    def forward(self, x, rank=None):
        num_first = 4 if rank is None else (1 - rank) * len(x)  # rows of rank 0
        x = super().forward(torch.cat([self.parts[0](x[:num_first]), x[num_first:]]) if num_first else x)
        return torch.cat([x[:num_first], self.parts[1](x[num_first:])]) if num_first < len(x) else x


class Branches(nn.Module):
    """Two layers that do not wait for each other, of different sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 5)])
        self.left, self.right = nn.BatchNorm1d(6), nn.BatchNorm1d(5)
        self.double()

    def forward(self, x, turned=False):
        if turned:
            right = self.right(self.linears[1](x))
        left = self.left(self.linears[0](x))
        return left, right if turned else self.right(self.linears[1](x))


def batch(step, rank, size=None):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4 + rank if size is None else size, 4, generator=generator, dtype=torch.float64)


def learn(y):
    parts = y if isinstance(y, tuple) else (y,)
    sum(part.pow(3).sum() for part in parts).backward()
    return y


def step_of(model, x):
    return learn(model(x))


def train(rank, fault=None, model=None, batches=batch, num_steps=STEPS, usual=step_of):
    """Train by ``usual(model, x)``; in step WHEN the guilty rank calls ``fault(model, x)`` instead."""
    model = syncbn.convert(Net()) if model is None else model
    ys = []
    for step in range(num_steps):
        faulty = fault is not None and rank == GUILTY and step == WHEN
        ys.append((fault if faulty else usual)(model, batches(step, rank)))
    return result(model, ys)


def result(model, ys):
    model = nn.ModuleList(model) if isinstance(model, list) else model
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    ys = [y.detach() for y in ys if isinstance(y, torch.Tensor)]
    return {"y": ys, "gradients": gradients, "buffers": dict(model.named_buffers())}


def one_process(world_size, batches=batch, model=Net, usual=step_of):
    """Return what `train` gives on one process, for the joined batches and the model as it was written."""
    joined = [torch.cat([batches(step, rank) for rank in range(world_size)]) for step in range(STEPS)]
    return train(0, model=model(), batches=lambda step, rank: joined[step], usual=usual)


def in_ddp(model, **options):
    return DistributedDataParallel(syncbn.convert(model), **DDP_OPTIONS, **options)


def pair_of(rank):
    """Make the groups of ranks 0 and 1 and of 2 and 3; returns this rank's."""
    return [dist.new_group(pair) for pair in ([0, 1], [2, 3])][rank // 2]


# Layers: which, in which order, of which size


def skips_a_layer(rank, world_size):
    return train(rank, lambda model, x: learn(model(x, ("norm1", None, "norm3"))))


def skips_a_layer_in_ddp(rank, world_size):
    model = in_ddp(Net(), find_unused_parameters=True)
    return train(rank, lambda model, x: learn(model(x, ("norm1", None, "norm3"))), model)


def uses_other_parameters_in_ddp(rank, world_size):
    model = in_ddp(WithParts(), find_unused_parameters=True, bucket_cap_mb=1e-6)
    return result(model.module, train(rank, model=model, usual=lambda model, x: learn(model(x, rank)))["y"])


def skips_a_layer_under_torchs_checks(rank, world_size):
    """With what torch itself compares, in a group made under ``TORCH_DISTRIBUTED_DEBUG=DETAIL``."""
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    dist.set_debug_level_from_env()
    model = syncbn.convert(Net(), process_group=dist.new_group(list(range(world_size))))
    return train(rank, lambda model, x: learn(model(x, ("norm1", None, "norm3"))), model)


def skips_the_last_layer(rank, world_size):
    return train(rank, lambda model, x: learn(model(x, ("norm1", "norm2", None))))


def skips_a_layer_for_one_row(rank, world_size):
    """A layer that the data decide on, as PyG's BatchNorm with ``allow_single_element``."""
    return train(rank, _with_rows(("norm1", None, "norm3")), syncbn.convert(Net((6, 6, 6))), sized(3, 1))


def skips_all_layers_for_one_row(rank, world_size):
    return train(rank, _with_rows((None, None, None)), batches=sized(3, 1))


def _with_rows(order):
    return lambda model, x: learn(model(x, order if len(x) == 1 else IN_ORDER))


def swaps_layers_of_one_size(rank, world_size):
    return train(rank, lambda model, x: learn(model(x, ("norm2", "norm1", "norm3"))))


def swaps_layers_of_two_sizes(rank, world_size):
    return train(rank, lambda model, x: learn(model(x, True)), syncbn.convert(Branches()))


def calls_a_layer_twice(rank, world_size):
    return train(rank, lambda model, x: learn(model(x, ("norm1", "norm1", "norm3"))))


def has_other_channels(rank, world_size):
    return train(rank, model=syncbn.convert(Net((6, 8, 5) if rank == GUILTY else (6, 6, 5))))


def leaves_a_layer_unconverted(rank, world_size):
    return train(rank, model=syncbn.convert(Net(), exclude=["norm2"] if rank == GUILTY else []))


def two_models(second=Net):
    first, second = Net(), second()
    second.linears[0].weight.data *= 2  # not the first one's numbers
    return nn.ModuleList([first, second])


def step_of_each(models, x):
    for model in models:
        step_of(model, x)


def _swaps(rank, models):
    """As a generator and a discriminator, each with its backward pass."""
    return train(rank, lambda models, x: step_of_each(reversed(models), x), models, usual=step_of_each)


def swaps_two_models(rank, world_size):
    return _swaps(rank, syncbn.convert(two_models(Branches)))


def swaps_two_models_of_one_class(rank, world_size):
    return _swaps(rank, syncbn.convert(two_models()))


def swaps_two_models_that_nothing_holds(rank, world_size):
    """Of one class, and not parts of a larger module: their layers have the same names."""
    return _swaps(rank, list(map(syncbn.convert, two_models())))


# Modes: dtypes, gradients, train and eval


def has_another_dtype(rank, world_size):
    def fault(model, x):
        y = learn(model.float()(x.float()))
        model.double()
        return y

    return train(rank, fault)


def autocasts_alone(rank, world_size):
    def fault(model, x):
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x.float())
        learn(y.float())
        model.double()
        return y

    return train(rank, fault)


def has_frozen_inputs(rank, world_size):
    model = syncbn.convert(Net())
    model.linears[0].requires_grad_(rank != GUILTY)  # the first norm's input needs no gradient
    return train(rank, model=model)


def runs_without_gradients(rank, world_size):
    def fault(model, x):
        with torch.no_grad():
            return model(x)

    return train(rank, fault)


def gives_a_mask_alone(rank, world_size):
    """As a collate function that makes no mask for a batch without padding."""

    def fault(model, x):
        valid = torch.ones(len(x), 1, dtype=torch.bool)
        hook = model.norm1.register_forward_pre_hook(lambda layer, args: (*args, valid))
        y = learn(model(x))
        hook.remove()
        return y

    return train(rank, fault)


def evaluates_while_others_train(rank, world_size):
    return train(rank, _evaluated)


def evaluates_while_others_train_in_ddp(rank, world_size):
    return train(rank, _evaluated, in_ddp(Net()))


def _evaluated(model, x):
    learn(model.eval()(x))
    model.train()


def is_frozen(rank, world_size):
    return train(rank, model=_frozen(rank, syncbn.convert(Net())))


def is_frozen_in_ddp(rank, world_size):
    return train(rank, model=_frozen(rank, in_ddp(Net())))


def _frozen(rank, model):
    return syncbn.freeze(model) if rank == GUILTY else model


def calls_forward_once_more(rank, world_size):
    def fault(model, x):
        model(x)
        return step_of(model, x)

    return train(rank, fault)


def calls_no_backward(rank, world_size):
    return train(rank, lambda model, x: model(x))


def leaves_an_output_out_of_the_loss(rank, world_size):
    return train(rank, lambda model, x: learn(model(x)[0]), syncbn.convert(Branches()))


def has_a_penalty_alone(rank, world_size):
    """Gradients with ``create_graph=True`` need more exchanges."""

    def fault(model, x):
        y = model(x)
        torch.autograd.grad(y.pow(3).sum(), list(model.parameters()), create_graph=True)
        return y

    return train(rank, fault)


def accumulates_more(rank, world_size):
    model = in_ddp(Net())
    ys = []
    for step in range(STEPS):
        num_parts = 3 if rank == GUILTY and step == WHEN else 2
        for i in range(num_parts):
            with model.no_sync() if i < num_parts - 1 else contextlib.nullcontext():
                ys.append(step_of(model, batch(step, rank)))
    return result(model, ys)


def has_fewer_batches(rank, world_size):
    return train(rank, num_steps=STEPS - (rank == GUILTY))


def compiles_alone(rank, world_size):
    model = syncbn.convert(Net())
    if rank == GUILTY:
        model.compile(backend="aot_eager")
    return train(rank, model=model)


def checkpoints_alone(rank, world_size):
    """Activation checkpointing, non-reentrant, repeats no exchange."""
    return train(rank, lambda model, x: learn(checkpoint(model, x, use_reentrant=False)))


def repeats_exchanges_alone(rank, world_size):
    """By the reentrant variant, whose first pass cannot be told from a forward without gradients."""
    return train(rank, lambda model, x: learn(checkpoint(model, x.requires_grad_(), use_reentrant=True)))


def computes_with_other_kernels(rank, world_size):
    with syncbn.use_kernels("reference" if rank == GUILTY else "auto"):
        return train(rank)


def has_another_eps(rank, world_size):
    model = syncbn.convert(Net())
    model.norm2.eps = 0.5 if rank == GUILTY else 1e-5
    return train(rank, model=model)


def has_another_group(rank, world_size):
    return train(rank, model=syncbn.convert(Net(), process_group=2 if rank == GUILTY else None))


def has_another_group_in_one_layer(rank, world_size):
    model = syncbn.convert(Net())
    model.norm3.process_group = 2  # so that the groups are made, by all ranks
    syncbn.convert(model)
    if rank == GUILTY:
        model.norm2.process_group = 2
    return train(rank, model=model)


# Mishaps: errors, signals, dead and sleeping processes


class Mishap(Exception):  # noqa: N818
    """An error of the user's own code."""


def _mishap():
    raise Mishap("no such image")


def _signals(number):
    return lambda: os.kill(os.getpid(), number)


def _layer(model, name):
    return getattr(getattr(model, "module", model), name)


def _in_forward(act, layer="norm2"):
    """Return a fault that does ``act`` when ``layer`` is about to be called."""

    def fault(model, x):
        handle = _layer(model, layer).register_forward_pre_hook(lambda module, args: act())
        y = model(x)
        handle.remove()
        return learn(y)

    return fault


def _in_backward(act, layer="norm2"):
    """Return a fault that does ``act`` when the gradient of the output of ``layer`` is there."""

    def fault(model, x):
        def watch(module, args, y):
            y.register_hook(lambda dy: act())

        handle = _layer(model, layer).register_forward_hook(watch)
        y = step_of(model, x)
        handle.remove()
        return y

    return fault


def raises_in_forward(rank, world_size):
    return train(rank, _in_forward(_mishap))


def raises_in_backward(rank, world_size):
    return train(rank, _in_backward(_mishap))


def raises_in_backward_in_ddp(rank, world_size):
    return train(rank, _in_backward(_mishap), in_ddp(Net()))


def raises_and_goes_on(rank, world_size):
    def fault(model, x):
        with contextlib.suppress(Mishap):
            _in_forward(_mishap)(model, x)
        for layer in (model.norm1, model.norm2, model.norm3):
            layer._forward_pre_hooks.clear()

    return train(rank, fault)


def gets_an_input_of_the_wrong_width(rank, world_size):
    return train(rank, lambda model, x: model.norm2(torch.ones(3, 7, dtype=torch.float64)))


def exits(rank, world_size):
    def leave():
        raise SystemExit(3)

    return train(rank, _in_forward(leave))


def is_interrupted(rank, world_size):
    return train(rank, _in_forward(_signals(signal.SIGINT)))


def is_terminated(rank, world_size):
    return train(rank, _in_forward(_signals(signal.SIGTERM)))


def is_killed_in_forward(rank, world_size):
    return train(rank, _in_forward(_signals(signal.SIGKILL)))


def is_killed_in_backward(rank, world_size):
    return train(rank, _in_backward(_signals(signal.SIGKILL)))


def is_killed_between_steps(rank, world_size):
    return train(rank, lambda model, x: _signals(signal.SIGKILL)())


def kills_rank_0(rank, world_size):
    """As `is_killed_in_forward`, of the rank that keeps the store."""
    if rank == 0:
        return train(GUILTY, _in_forward(_signals(signal.SIGKILL)), batches=lambda step, _: batch(step, 0))
    return train(0, batches=lambda step, _: batch(step, rank))


def stops_in_forward(rank, world_size):
    return train(rank, _in_forward(_signals(signal.SIGSTOP)))


def stops_in_backward(rank, world_size):
    return train(rank, _in_backward(_signals(signal.SIGSTOP)))


# Data


def odd_values(value, dtype=torch.float64):
    """Return batches in which one number of the guilty rank is ``value``."""

    def batches(step, rank):
        x = batch(step, rank).to(dtype)
        if rank == GUILTY and step == WHEN:
            x[0, 2] = value
        return x

    return batches


def sized(*sizes):
    """Return batches of which those of step WHEN have these sizes."""
    return lambda step, rank: batch(step, rank, sizes[rank] if step == WHEN else None)


def just_norms():
    """Two norms on the four columns of the input, which stay apart."""
    return nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)).double()


def gets_an_odd_value(rank, world_size, value, kernels, dtype):
    with syncbn.use_kernels(kernels):
        return train(rank, model=syncbn.convert(just_norms()).to(dtype), batches=odd_values(value, dtype))


def gets_one_empty_batch(rank, world_size):
    return train(rank, batches=sized(3, 0))


def gets_empty_batches(rank, world_size):
    return train(rank, batches=sized(0, 0))


def gets_single_values(rank, world_size):
    return train(rank, batches=sized(1, 0, 1))


def gets_one_value_in_all(rank, world_size):
    return train(rank, batches=sized(0, 1))


def evaluates_on_rank_0(rank, world_size):
    model = syncbn.convert(Net())

    def batches(step, rank):
        if rank == 0:  # between two steps
            with torch.no_grad():
                model.eval()(batch(9, rank))
            model.train()
        return batch(step, rank)

    return train(rank, model=model, batches=batches)


def runs_under_join(rank, world_size):
    model = in_ddp(Net())
    try:
        with model.join():
            return train(rank, model=model, num_steps=STEPS - (rank == GUILTY))
    finally:
        dist.barrier()
