"""Make layers whose statistics, weight and bias are buffers synchronize, and freeze them again."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .third_party import FROZEN_BUFFERS, activates, is_frozen_class

_TINY = 1e-20  # a variance that is nothing beside eps
_LEAST = 1e-12  # for a layer that has none, since torch refuses 0 in training


def eps_of(layer: nn.Module) -> float | None:
    """Find the eps with which ``layer`` is ``(x - mean) / sqrt(var + eps) * weight + bias``; None if it is not that.

    Some classes write it into their forward: then a few numbers are normalized by a copy of the layer, in float64.
    """
    eps = layer.__dict__.get("eps")
    is_named = is_frozen_class(type(layer)) and isinstance(eps, float)
    if is_named or activates(type(layer)):
        return eps
    mean = layer._buffers["running_mean"]
    assert mean is not None
    num, float64 = len(mean), partial(torch.tensor, dtype=torch.float64, device="cpu")
    zeros, ones, steps = float64([0.0] * num), float64([1.0] * num), float64([0.5 + i / num for i in range(num)])
    for positions in ((1, 1), (), (1,), (1, 1, 1)):
        x = ones.expand(2, num).reshape(2, num, *positions)
        try:
            y = _normalize(layer, x, (ones, zeros, zeros, zeros + _TINY))
            if not isinstance(eps, float):
                found = float(y.flatten()[0]) ** -2 - _TINY
                eps = max(float(f"{found:.6g}"), _LEAST)
            x = torch.stack([x[0] * -1.5, x[1] * 2.5])
            y = _normalize(layer, x, (steps, -steps, 1 - steps, steps))
            expected = F.batch_norm(x, 1 - steps, steps, steps, -steps, eps=eps)
        except Exception:  # of a forward that wants other dimensions
            continue
        return eps if torch.allclose(y, expected, rtol=1e-5, atol=1e-5) else None
    return None


def to_parameters(layer: nn.Module, eps: float) -> dict[str, Any]:
    """Make the buffers weight and bias parameters, and add what a BatchNorm has; return what `freeze_again` takes."""
    exists = {name: buffer is not None for name, buffer in layer._buffers.items()}
    mean = layer._buffers["running_mean"]
    assert mean is not None
    defaults = {"num_features": len(mean), "eps": eps, "momentum": 0.1, "affine": True, "track_running_stats": True}
    added = [name for name in defaults if name not in layer.__dict__]
    layer.__dict__.update({name: defaults[name] for name in added})
    for name in ("weight", "bias"):
        buffer = layer._buffers.pop(name)
        assert buffer is not None
        layer.register_parameter(name, nn.Parameter(buffer))
    if layer._buffers.get("num_batches_tracked") is None:
        layer._buffers["num_batches_tracked"] = torch.tensor(0, device=mean.device)
    return {"exists": exists, "added": added}


def freeze_again(layer: nn.Module, before: dict[str, Any]) -> None:
    """Make parameters buffers again, as trained, in their old order, and take away what was added."""
    now: dict[str, Tensor | None] = {**layer._buffers}
    now.update({name: p.detach() for name in ("weight", "bias") if (p := layer._parameters.pop(name)) is not None})
    layer._buffers.clear()
    for name, exists in before["exists"].items():
        layer._buffers[name] = now.get(name) if exists else None
    for name in before["added"]:
        layer.__dict__.pop(name, None)


def _normalize(layer: nn.Module, x: Tensor, buffers: tuple[Tensor, ...]) -> Tensor:
    """Run the forward of ``layer`` with other buffers: weight, bias, mean and variance."""
    twin = object.__new__(type(layer))
    named = dict(zip(FROZEN_BUFFERS, buffers, strict=True))
    twin.__dict__.update(layer.__dict__, _buffers={**layer._buffers, **named}, training=False)
    with torch.no_grad():
        y: Tensor = type(layer).forward(twin, x)
    return y
