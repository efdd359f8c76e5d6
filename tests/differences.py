"""Compare what ranks made of a `programs.Program` with the truth, within what rounding allows."""

import math
import re
from typing import NamedTuple

import torch
from machines import Alone, Machine, attempt
from programs import Do, Forward
from torch import nn
from versions import torch_norm

ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # design.md
BEYOND = {torch.float64: 1e-14, torch.float32: 3e-7}  # times mean / std, which may exceed 100 here


def differences(program, results):
    """Compare what `run_programs` returned for one program, by rank, with the truth: one line for each difference."""
    found = []
    for part in program.parts(len(results)):
        found += [f"rank {rank}: {fault}" for rank in part for fault in results[rank][1]]
        mine = [results[rank][0] for rank in part]
        if len(part) == 1:
            found += _compare_with_torch(program, Alone(program, part).run().result(), *mine)
        else:
            truth = OneProcess(program, part).run()
            found += _compare_calls(program, truth, {name: value for one in mine for name, value in one.items()})
            found += _compare_layers(program, truth, mine)
    return found


def _compare_with_torch(program, torchs, mine):
    """A group of one is torch's own layer, but for the last bits.

    Its cumulative average rounds in its own way, and so do torch's loops where memory begins elsewhere (torch 2.13).
    """
    evaluates = any(step == Do("eval") for step in program.steps)
    for name, wanted in torchs.items():
        norm = program.norms[int(re.search(r"layer (\d+)", name)[1]) % len(program.norms)]
        if norm.momentum is None and name.endswith(("running_mean", "running_var")):
            relative = 4 * len(program.steps) * torch.finfo(wanted.dtype).eps
            yield from _far(name, mine[name], wanted.double(), 0.0, relative)
        elif norm.momentum is not None or not evaluates:
            tensors = isinstance(wanted, torch.Tensor) and isinstance(mine[name], torch.Tensor)
            # the mean's last bits, which differ where memory begins elsewhere, weigh in the output by |mean| / std
            mean = BEYOND[program.dtype if program.dtype in BEYOND else torch.float32] * abs(program.mean)
            invstd = (program.std**2 / 4 + norm.eps) ** -0.5
            beyond = mean * invstd * (invstd if name.endswith("dx") else 1)  # dx is small among terms of invstd * dy
            if name.endswith("gradient"):
                beyond *= num_values(program)  # of which each adds dy * xhat
            if not (_nearly(wanted, mine[name], beyond) if tensors else wanted is mine[name] or wanted == mine[name]):
                yield f"{name}, in a group of one: expected {wanted}, got {mine[name]}"


def num_values(program):
    """Count the values per channel and rank of all steps, at most."""
    sizes = [max(step.sizes) for step in program.steps if isinstance(step, Forward)]
    return sum(sizes) * math.prod(length + 1 for length in program.tail)


def _nearly(wanted, got, beyond):
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return False
    if not wanted.is_floating_point() or not wanted.numel():
        return torch.equal(wanted, got)
    largest = max(1.0, wanted.double().abs().nan_to_num(0, 0, 0).max().item())
    last = (32 * torch.finfo(wanted.dtype).eps + beyond) * largest
    return torch.allclose(wanted.double(), got.double(), rtol=0, atol=last, equal_nan=True)


def _compare_calls(program, truth, mine):
    wide = program.dtype if program.dtype in BEYOND else torch.float32  # in which half types are computed
    for (step, i, rank), (x, y) in truth.calls.items():
        name = f"step {step}, layer {i}, rank {rank}: "
        if isinstance(y, str) or isinstance(mine[name + "y"], str):
            if y != mine[name + "y"]:
                yield f"{name}expected {y}, got {mine[name + 'y']}"
            continue
        scale, norm = truth.scales[step, i], program.norms[i]
        limit = (ROUNDING[wide] + _of_mean(program, norm, scale)) * scale.weight * (1 + scale.xhat)
        yield from _far(name + "y", mine[name + "y"], y, limit, ROUNDING[program.dtype])
        limit *= scale.invstd * scale.dy
        yield from _far(name + "dx", mine[name + "dx"], x.grad, limit, ROUNDING[program.dtype])


def _of_mean(program, norm, scale):
    """Return what rounding of the statistics costs an output, relative to the weight."""
    if not scale.training:  # rounded to running statistics once per step; without, torch keeps its batch's in half
        half = program.param_dtype if norm.track_running_stats else program.dtype
        if half not in BEYOND:
            return ROUNDING[half] * len(program.steps) * scale.ratio
    wide = torch.float64 if torch.float64 in program.dtypes else torch.float32
    return BEYOND[wide] * scale.ratio + 1e-15 * scale.ratio**2  # the mean; the variance from float64 sums of squares


def _compare_layers(program, truth, mine):
    for name, wanted in truth.result().items():
        if not name.startswith("layer"):
            continue
        number, what = name.removeprefix("layer ").split(": ")
        values = [one[name] for one in mine]
        if what.endswith("gradient"):
            present = [value.double() for value in values if value is not None]
            # in eval mode without running statistics a rank with one value raises alone, and has no gradient
            one_raised = any(isinstance(y, str) for _, y in truth.calls.values())
            if 0 < len(present) < len(values) and not one_raised:
                yield f"{name}: some ranks have none"
            values = [sum(present) if present else None]
        elif any(not torch.equal(values[0], other) for other in values[1:]):
            yield f"{name} differs between ranks"
        yield from _far(name, values[0], wanted, *_limits(program, truth, int(number), what))


def _limits(program, truth, number, what):
    """Return the allowed difference of a gradient or buffer: absolute, and relative to its largest value."""
    dtype, wide = program.param_dtype, torch.float64 if program.dtype == torch.float64 else torch.float32
    scales = [scale for (_, i), scale in truth.scales.items() if i == number % len(program.norms)]
    norm = program.norms[number % len(program.norms)]
    largest = Scale(*map(max, zip(*scales, strict=True))) if scales else Scale()
    relative = ROUNDING[dtype] * (1 if dtype in BEYOND else len(program.steps))  # half types round at every step
    # eval mode is torch's own, which sums in the dtype of the input
    sums = [(scale, max(relative, 0 if scale.training else ROUNDING[program.dtype]) * scale.sum) for scale in scales]
    absolute = {
        "weight gradient": sum(limit + _of_mean(program, norm, scale) * scale.sum for scale, limit in sums),
        "bias gradient": sum(limit for _, limit in sums),
        "running_mean": (relative + BEYOND[wide]) * largest.mean,
        "running_var": (BEYOND[wide] * largest.mean) ** 2,
    }
    if what == "running_var" and largest.ratio > 100:
        relative = max(relative, 1e-4)
    tiny = torch.finfo(dtype).smallest_normal * relative  # where half types have fewer digits
    return absolute.get(what, 0.0) + tiny, relative


def _far(what, actual, wanted, absolute, relative):
    """Yield a line if ``actual`` is not ``wanted`` within ``absolute`` plus ``relative`` of the largest value."""
    if actual is None or wanted is None:
        if actual is not wanted:
            yield f"{what}: expected {wanted}, got {actual}"
    elif actual.shape != wanted.shape:
        yield f"{what}: expected shape {tuple(wanted.shape)}, got {tuple(actual.shape)}"
    elif wanted.numel():
        error, largest = (actual.double() - wanted).abs().max().item(), wanted.abs().max().item()
        limit = absolute + relative * largest
        if not error <= limit:  # NaN too
            yield f"{what}: off by {error:.3g} where {limit:.3g} is allowed and the largest value is {largest:.3g}"


class OneProcess(Machine):
    """The truth: nn.BatchNorm1d in float64 on what the members have, joined to ``(1, C, all values)``."""

    def __init__(self, program, members):
        super().__init__(program, members)
        self.scales = {}  # by step and layer

    def make(self, norm):
        return torch_norm(nn.BatchNorm1d, norm.num_features, **norm.options, dtype=torch.float64)

    def input(self, call, place):
        return super().input(call, place).double().clone()

    def output_gradient(self, call, place):
        return super().output_gradient(call, place).double()

    def initialized(self, norm):
        return super().initialized(norm).double()

    def forward(self, step, call):
        self.step, self.call = step, call
        super().forward(step, call)

    def normalize(self, xs):
        return [
            self.normalize_joined(i, layer, parts)
            for i, (layer, parts) in enumerate(zip(self.layers, xs, strict=True))
        ]

    def normalize_joined(self, i, layer, parts):
        flat = [x.movedim(1, 0).flatten(1)[None] for x in parts]  # (1, C, n) each
        dys = [self.output_gradient(self.call, (self.step, i, rank)) for rank in self.members]
        dys = [dy.movedim(1, 0).flatten(1)[None] for dy in dys]
        if layer.training or layer.track_running_stats:
            joined, dys = [torch.cat(flat, dim=2)], [torch.cat(dys, dim=2)]
        else:  # each rank has its own statistics
            joined = flat
        scales = [_scale(layer, x.detach(), dy) for x, dy in zip(joined, dys, strict=True)]
        self.scales[self.step, i] = Scale(*map(max, zip(*scales, strict=True)))
        ys = [attempt(layer, x) for x in joined]
        if len(ys) < len(parts):
            ys = ys * len(parts) if isinstance(ys[0], str) else ys[0].split([x.shape[2] for x in flat], dim=2)
        return [y if isinstance(y, str) else _unflatten(y[0], x) for y, x in zip(ys, parts, strict=True)]


class Scale(NamedTuple):
    """What rounding is relative to: the largest values of one call."""

    training: bool = False
    weight: float = 0.0
    mean: float = 0.0
    ratio: float = 0.0  # |mean| / std
    invstd: float = 0.0
    xhat: float = 0.0
    dy: float = 0.0
    sum: float = 0.0  # of |dy| and of |dy * xhat|


def _scale(layer, x, dy):
    if not x.numel():
        return Scale(layer.training)
    mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
    if not layer.training and layer.track_running_stats:
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
    invstd = torch.rsqrt(var + layer.eps)
    weight = torch.ones(()) if layer.weight is None else layer.weight.detach()
    xhat = (x - mean[:, None]) * invstd[:, None]
    sums = (dy.abs() * (1 + xhat.abs())).sum((0, 2))
    values = (weight, mean, mean * invstd, invstd, xhat, dy, sums)
    return Scale(layer.training, *(v.abs().max().item() for v in values))


def _unflatten(y, like):
    return y.reshape(like.shape[1], like.shape[0], *like.shape[2:]).movedim(0, 1)
