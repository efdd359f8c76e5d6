"""One training step of layers that share their exchanges: autograd, first and second order.

Forward: per-channel sums of the local part, one exchange, ``y = (x - mean) * invstd * weight + bias``.
Backward: per-channel sums of dy and dy * xhat, one exchange,
``dx = weight * invstd * (dy - sum_dy / n - xhat * sum_dy_xhat / n)`` with xhat = (x - mean) * invstd and n values per
channel over all ranks. The gradients of weight and bias stay local sums, as DDP averages them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from . import debug, kernels, moments, recompute, step
from .collectives import Exchange, all_reduce
from .compat import BUILDS_STEP
from .debug.names import Owner
from .moments import Batch
from .private import assert_in_graph


class Layer(NamedTuple):
    """What one layer brings to a training step; see `functional.sync_batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float | Tensor | None  # None for the cumulative average
    eps: float
    num_batches: Tensor | None = None  # counts this one
    owner: nn.Module | None = None  # for its name in messages; None for the function


def count_batch(layer: Layer) -> Layer:
    """Count the batch, and return the layer with its part in the running statistics, of which nothing is read back."""
    x, mean, var, weight, bias, momentum, eps, num_batches, owner = layer
    if num_batches is not None and not recompute.is_recomputing():
        num_batches.add_(1)
    if momentum is None:
        momentum = 0.0 if num_batches is None else 1.0 / num_batches.double()
    return Layer(x, mean, var, weight, bias, momentum, eps, None, owner)


def normalize_batch(layers: Sequence[Layer], group: ProcessGroup) -> tuple[Tensor, ...]:
    """Normalize the inputs of independent layers over ``group``: one exchange forward, one backward for all of them.

    Counts the batch, and moves their running statistics, but not in a recomputation.
    """
    if len(layers) == 1 and not debug.is_on():  # step.cpp announces nothing
        x, running_mean, running_var, weight, bias, momentum, eps, num_batches, owner = layers[0]
        try:
            y = step.train(x, weight, bias, running_mean, running_var, num_batches, momentum, eps, group)
        except RuntimeError as error:
            if step.OF_EXCHANGE not in str(error):
                raise
            raise debug.explain(error, "forward", [owner]) from error
        if y is not None:
            return (y,)
    layers = [count_batch(layer) for layer in layers]
    chosen = [kernels.choose(layer.input) for layer in layers]
    grad_mode = torch.is_grad_enabled()
    with torch.no_grad():  # the backward pass knows how the moments depend on the input
        batches = _global_moments(layers, chosen, group, grad_mode)
    arguments: list[Tensor | None] = []
    for layer, batch in zip(layers, batches, strict=True):
        arguments += (layer.input, layer.weight, layer.bias, *batch)
    owners = None if torch.compiler.is_compiling() else [debug.keep(layer.owner) for layer in layers]
    outputs: tuple[Tensor, ...] = _Normalize.apply(group, chosen, [layer.eps for layer in layers], owners, *arguments)
    return outputs


def _global_moments(
    layers: Sequence[Layer], chosen: list[kernels.Kernels], group: ProcessGroup, grad_mode: bool
) -> list[Batch]:
    """Compute the moments over all ranks of ``group``: one exchange, none in a recomputation that has its records."""
    known = [recompute.replay() for _ in layers]
    if None not in known:
        return [batch for batch in known if batch is not None]
    packed = [kernel.local_sums(layer.input) for kernel, layer in zip(chosen, layers, strict=True)]
    if len(packed) == 1:
        summed: Sequence[Tensor] = [_sum_forward(packed[0], layers, group, grad_mode)]
    else:
        joined = _sum_forward(torch.cat(packed), layers, group, grad_mode)
        summed = torch.split(joined, [len(p) for p in packed])
    batches = []
    for kernel, layer, mine in zip(chosen, layers, summed, strict=True):
        # with a global count of 1 every rank comes here; no other has to read it
        if layer.input.numel() <= layer.input.shape[1]:
            _refuse_one_value(mine[-1])
        batches.append(_advance(kernel, layer, mine))
        recompute.record(batches[-1])
    return batches


def _sum_forward(packed: Tensor, layers: Sequence[Layer], group: ProcessGroup, grad_mode: bool) -> Tensor:
    if debug.is_on():
        owners, inputs = [layer.owner for layer in layers], [layer.input for layer in layers]
        needs = [grad_mode and x.requires_grad for x in inputs]
        direction = "forward again" if recompute.is_recomputing() else "forward"
        settings = [(layer.eps, layer.momentum) for layer in layers]
        debug.announce(direction, owners, inputs, needs, packed.numel(), group, settings)
    try:
        return all_reduce(packed, group)
    except RuntimeError as error:
        raise debug.explain(error, "forward", [layer.owner for layer in layers]) from error


def _advance(kernel: kernels.Kernels, layer: Layer, packed: Tensor) -> Batch:
    x, running_mean, running_var, _, _, momentum, eps, _, _ = layer
    assert momentum is not None
    if recompute.is_recomputing():
        running_mean = running_var = None  # the first pass has moved them
    arguments = (packed, eps, kernels.sum_dtype(x), running_mean, running_var, momentum, x.numel() == 0)
    advance = getattr(kernel, "advance", None)  # of kernels that do without a dozen small operators
    quick = None if advance is None else advance(*arguments)
    return moments.advance(*arguments) if quick is None else Batch(*quick)


def _refuse_one_value(count: Tensor) -> None:
    message = "Expected more than 1 value per channel when training, got 1 over all ranks of the process group"
    if torch.compiler.is_compiling():
        assert_in_graph(count != 1, message)
    elif count.item() == 1:
        raise ValueError(f"{message}. Use a larger batch or eval mode.")


class _Normalize(torch.autograd.Function):
    """Normalize with the moments of the whole batch, which are constants to autograd and functions of x in backward.

    Takes six tensors per layer: x, weight, bias, count, mean, invstd. Saves the inputs, the weights and O(C) numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        group: ProcessGroup,
        chosen: list[kernels.Kernels],
        eps: list[float],
        owners: list[Owner] | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = []
        bias_dtypes, constant = [], []
        needs = ctx.needs_input_grad[4:]
        for i, kernel in enumerate(chosen):
            x, weight, bias, count, mean, invstd = tensors[6 * i : 6 * i + 6]
            y = kernel.normalize(x, mean, invstd, weight, bias)
            outputs.append(y)
            saved += (x, weight, count, mean, invstd)
            bias_dtypes.append(None if bias is None else bias.dtype)
            if True not in needs[6 * i : 6 * i + 3]:
                constant.append(y)
        ctx.save_for_backward(*saved)
        if constant:
            ctx.mark_non_differentiable(*constant)
        ctx.group, ctx.eps, ctx.bias_dtypes = group, eps, bias_dtypes
        ctx.owners, ctx.is_checked = owners or [None] * len(chosen), debug.is_on()
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[4:]
        steps = []
        for i, dy in enumerate(dys):
            x, weight, count, mean, invstd = saved[5 * i : 5 * i + 5]
            if dy is None:
                dy = torch.zeros_like(x)  # undefined here, perhaps not on the other ranks
            mine = needs[6 * i : 6 * i + 3]
            last = mine, ctx.eps[i], ctx.bias_dtypes[i], ctx.owners[i], ctx.is_checked
            steps.append(_Step(kernels.choose(x), dy, x, weight, count, mean, invstd, *last))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = [_differentiable_backward(step, ctx.group) for step in steps]
        else:
            grads = _backward(steps, ctx.group)
        result: list[Tensor | None] = [None] * 4
        for three in grads:
            result += (*three, None, None, None)
        return tuple(result)


class _Step(NamedTuple):
    """What the backward pass of one layer needs."""

    kernel: kernels.Kernels
    dy: Tensor
    x: Tensor
    weight: Tensor | None
    count: Tensor  # type: ignore[assignment]  # a field here, not tuple.count
    mean: Tensor
    invstd: Tensor
    needs: Sequence[bool]  # dx, dweight, dbias
    eps: float
    bias_dtype: torch.dtype | None
    owner: Owner = None
    is_checked: bool = False  # as the forward pass was


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, weight and bias


def _backward(steps: list[_Step], group: ProcessGroup) -> list[_Gradients]:
    local: list[Tensor] = []
    sums = []
    for s in steps:
        sums.append(s.kernel.backward_sums(s.dy, s.x, s.mean, s.invstd))
        local += sums[-1] if s.needs[0] else ()
    exchange = _start_backward(torch.cat(local).double(), steps, group) if local else None  # (2C,) each
    # while it is under way
    parameters = [_parameter_gradients(s, *parts) for s, parts in zip(steps, sums, strict=True)]
    if exchange is None:
        return [(None, *two) for two in parameters]
    total, start, gradients = _wait_backward(exchange, steps), 0, []
    for s, two in zip(steps, parameters, strict=True):
        dx, end = None, start + 2 * len(s.mean)
        if s.needs[0]:
            mine = total if end - start == len(total) else total[start:end]
            dx = s.kernel.input_gradient(s.dy, s.x, s.mean, s.invstd, s.weight, mine, s.count)
            start = end
        gradients.append((dx, *two))
    return gradients


def _start_backward(packed: Tensor, steps: list[_Step], group: ProcessGroup) -> Exchange:
    if steps[0].is_checked and debug.is_on():
        used = [step for step in steps if step.needs[0]]
        inputs = [step.x for step in used]
        debug.announce("backward", [step.owner for step in used], inputs, (), packed.numel(), group)
    try:
        return Exchange(packed, group)
    except RuntimeError as error:
        raise debug.explain(error, "backward", [step.owner for step in steps]) from error


def _wait_backward(exchange: Exchange, steps: list[_Step]) -> Tensor:
    try:
        return exchange.wait()
    except RuntimeError as error:
        raise debug.explain(error, "backward", [step.owner for step in steps]) from error


def _parameter_gradients(step: _Step, sum_dy: Tensor, sum_dy_xhat: Tensor) -> tuple[Tensor | None, Tensor | None]:
    dweight = sum_dy_xhat.to(step.weight.dtype) if step.needs[1] and step.weight is not None else None
    return dweight, sum_dy.to(step.bias_dtype) if step.needs[2] and step.bias_dtype is not None else None


def _differentiable_backward(step: _Step, group: ProcessGroup) -> _Gradients:
    """Compute the gradients so that autograd can differentiate them again (``create_graph=True``).

    The moments are functions of the inputs of all ranks, so they are computed anew: one exchange of 2C numbers more,
    and every exchange has a gradient, which is one exchange. The known mean is a shift that keeps the sums small.
    """
    if not step.needs[0]:
        sums = kernels.reference.backward_sums(step.dy, step.x, step.mean, step.invstd)  # seen by autograd
        return None, *_parameter_gradients(step, *sums)
    x = step.x
    dims = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    count = step.count.clamp(min=1)
    xmu = x.double() - step.mean.double().view(shape)
    dy = step.dy.double()
    mean, sqmean = (_sum_backward(torch.cat([xmu.sum(dims), xmu.square().sum(dims)]), step, group) / count).chunk(2)
    invstd = torch.rsqrt(sqmean - mean.square() + step.eps)
    xhat = (xmu - mean.view(shape)) * invstd.view(shape)
    sum_dy, sum_dy_xhat = dy.sum(dims), (dy * xhat).sum(dims)
    mean_dy, mean_dy_xhat = (_sum_backward(torch.cat([sum_dy, sum_dy_xhat]), step, group) / count).chunk(2)
    scale = invstd if step.weight is None else invstd * step.weight
    dx = (dy - mean_dy.view(shape) - xhat * mean_dy_xhat.view(shape)) * scale.view(shape)
    return dx.to(x.dtype), *_parameter_gradients(step, sum_dy, sum_dy_xhat)


def _sum_backward(packed: Tensor, step: _Step, group: ProcessGroup) -> Tensor:
    exchange: Any = [step.owner], [step.x], (), packed.numel(), group
    is_checked = step.is_checked and debug.is_on()
    if is_checked:
        debug.announce("backward with create_graph", *exchange)
    try:
        summed = all_reduce(packed, group)
    except RuntimeError as error:
        raise debug.explain(error, "backward with create_graph", [step.owner]) from error
    return debug.watch(summed, "second-order backward", *exchange) if is_checked else summed


def _backward_of_step(
    dy: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    count: Tensor,
    mean_invstd: Tensor,
    needs: Sequence[bool],
    eps: float,
    bias_dtype: torch.dtype,
    group: Any,
) -> _Gradients:
    """Do the backward pass of step.cpp where it is not usual."""
    group = ProcessGroup.unbox(group)
    dy = torch.zeros_like(x) if dy is None else dy
    mean, invstd = mean_invstd.unbind()
    step = _Step(kernels.choose(x), dy, x, weight, count, mean, invstd, needs, eps, bias_dtype, weight)
    return _differentiable_backward(step, group) if torch.is_grad_enabled() else _backward([step], group)[0]


if BUILDS_STEP:
    _library: Any = torch.library.Library("syncbn", "FRAGMENT")  # type: ignore[no-untyped-call]
    _library.define(
        "backward(Tensor? dy, Tensor x, Tensor? weight, Tensor count, Tensor mean_invstd, bool[] needs, float eps, "
        "ScalarType bias_dtype, __torch__.torch.classes.c10d.ProcessGroup group) -> (Tensor?, Tensor?, Tensor?)"
    )
    _library.impl("backward", _backward_of_step, "CompositeImplicitAutograd")
    _library.define("explain(Tensor weight) -> str")
    _library.impl("explain", lambda weight: debug.where("backward", [weight]), "CompositeImplicitAutograd")
