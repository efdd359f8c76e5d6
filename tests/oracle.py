"""The truth: what one process computes with nn.BatchNorm in float64 on the joined batch."""

import copy
import itertools
from dataclasses import dataclass, field, replace

import ranks
import torch
from torch import nn
from versions import torch_norm

import syncbn


@dataclass
class Case:
    """One layer and the inputs of every rank, one list per step; ``dys`` weighs the outputs in the loss."""

    xs: list[list[torch.Tensor]]
    dys: list[list[torch.Tensor]]
    layer: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float64  # of parameters and buffers
    x_requires_grad: bool = True
    frozen_weight: bool = False
    label: str = ""

    @property
    def num_features(self):
        return self.xs[0][0].shape[1]


def make_case(
    shapes, *, steps=1, dtype=torch.float64, param_dtype=None, seed=0, mean=0.5, std=2.0, layout=None, **options
):
    """Draw a case: ``shapes`` are those of the ranks' inputs."""
    generator = torch.Generator().manual_seed(seed)
    label = options.pop("label", f"{shapes} {dtype} {options}")

    def draw(shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return lay_out(x.to(dtype), layout)

    offset = mean + torch.randn(shapes[0][1], generator=generator, dtype=torch.float64)
    xs, dys = [], []
    for _ in range(steps):
        drawn = [draw(shape) for shape in shapes]
        xs.append([lay_out((x.double() * std + _shape(offset, x)).to(dtype), layout) for x in drawn])
        dys.append([draw(shape) for shape in shapes])
    return Case(xs, dys, dtype=param_dtype or dtype, label=label, **options)


def lay_out(x, layout):
    """Give ``x`` another memory layout, values kept."""
    if layout == "channels_last" and x.dim() in (4, 5):
        return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "permuted" and x.dim() > 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    return x


def _shape(values, x):
    return values.view(1, -1, *[1] * (x.dim() - 2))


def run_case(rank, case, layer=None):
    """Run this rank's part of ``case``; returns per step y and dx, and at the end gradients and statistics."""
    device = ranks.device()
    if layer is None:
        layer = syncbn.SyncBatchNorm(case.num_features, dtype=case.dtype, device=device, **case.layer)
    initialize(layer, case)
    out = {"y": [], "dx": []}
    for xs, dys in zip(case.xs, case.dys, strict=True):
        x = xs[rank].to(device).detach().requires_grad_(case.x_requires_grad)
        y = layer(x)
        if y.requires_grad:
            (y * dys[rank].to(device)).sum().backward()
        out["y"].append(y.detach().cpu())
        out["dx"].append(None if x.grad is None else x.grad.cpu())
    gradients = {k: getattr(layer, k).grad for k in ("weight", "bias") if getattr(layer, k) is not None}
    out.update({k: None if gradient is None else gradient.cpu() for k, gradient in gradients.items()})
    out.update({k: v.cpu() for k, v in layer.named_buffers()})
    return out


def initialize(layer, case):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.copy_(torch.randn(case.num_features, generator=generator) + 1)
    if layer.weight is not None:
        layer.weight.requires_grad_(not case.frozen_weight)


def truth(case):
    """Run nn.BatchNorm1d in float64 on the values of all ranks, joined as ``(1, C, all values)``."""
    options = {k: v for k, v in case.layer.items() if k != "process_group"}
    layer = torch_norm(nn.BatchNorm1d, case.num_features, dtype=torch.float64, **options)
    initialize(layer, replace(case, dtype=torch.float64))
    if layer.weight is not None:  # the same rounding as the layer's own parameters
        layer.weight.data = layer.weight.data.to(case.dtype).double()
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(case.dtype).double()
    out = {"y": [], "dx": []}
    for xs, dys in zip(case.xs, case.dys, strict=True):
        x = _join(xs).requires_grad_(case.x_requires_grad)
        y = layer(x)
        if y.requires_grad:
            (y * _join(dys)).sum().backward()
        out["y"].append(_split(y.detach(), xs))
        out["dx"].append(None if x.grad is None else _split(x.grad, xs))
    out.update({k: getattr(layer, k).grad for k in ("weight", "bias") if getattr(layer, k) is not None})
    out.update(layer.named_buffers())
    return copy.deepcopy(out)


def _join(parts):
    return torch.cat([p.detach().double().movedim(1, 0).flatten(1) for p in parts], dim=1).unsqueeze(0)


def _split(joined, parts):
    sizes = [p.numel() // p.shape[1] for p in parts]
    pieces = joined.squeeze(0).split(sizes, dim=1)
    return [
        piece.reshape(p.shape[1], p.shape[0], *p.shape[2:]).movedim(0, 1)
        for piece, p in zip(pieces, parts, strict=True)
    ]


def compare(results, expected, case, rtol):
    """Assert that the ranks' ``results`` equal the truth: outputs, input gradients, sums of gradients, statistics.

    ``rtol`` is relative to the largest value of the tensor on all ranks: rounding is, too.
    """

    def close(actual, wanted, scale, what):
        assert torch.isfinite(actual).all() or not torch.isfinite(wanted).all(), f"{case.label}: {what} is not finite"
        error = (actual.double() - wanted).abs().max().item() if wanted.numel() else 0.0
        assert actual.shape == wanted.shape, f"{case.label}: {what} has shape {actual.shape}"
        assert error <= rtol * max(scale, 1e-30), f"{case.label}: {what} is off by {error:.3g} of {scale:.3g}"

    def largest(tensors):
        return max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)

    for step, rank in itertools.product(range(len(case.xs)), range(len(results))):
        for what in ("y", "dx"):
            wanted = expected[what][step]
            if wanted is None:
                assert results[rank][what][step] is None, f"{case.label}: unexpected {what}"
                continue
            actual = results[rank][what][step]
            assert actual.dtype == case.xs[step][rank].dtype, f"{case.label}: {what} has dtype {actual.dtype}"
            # dx is a difference of terms as large as dy (times weight * invstd, about 1 here), which may cancel
            scale = largest(wanted if what == "y" else [*wanted, *case.dys[step]])
            close(actual, wanted[rank], scale, f"{what} of rank {rank}, step {step}")
    for what in ("weight", "bias"):
        if expected.get(what) is not None:
            total = sum(result[what].double() for result in results)
            close(total, expected[what], largest([expected[what]]), f"sum of {what} gradients")
        else:
            assert all(result.get(what) is None for result in results), f"{case.label}: unexpected {what} gradient"
    for what in ("running_mean", "running_var"):
        for rank, result in enumerate(results):
            if what in expected:
                close(result[what], expected[what], largest([expected[what]]), f"{what} of rank {rank}")
            assert (what in result) == (what in expected)
    if "num_batches_tracked" in expected:
        assert all(result["num_batches_tracked"] == expected["num_batches_tracked"] for result in results)
