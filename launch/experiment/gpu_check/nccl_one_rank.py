"""Part `nccl_one`: the layer over a group of one that exchanges all the same, against nn.BatchNorm2d in float64."""

import copy

import torch
from torch import Tensor, nn

from .inputs import TOLERANCE, cases, draw, error_of, full, make_layer, name_of, refuse_reference
from .process_groups import group_of_one, record_exchanges
from .result import Outcome, Row, Table

_SHAPE = (8, 16, 9, 7)
_NUM_STEPS = 2
_NAMES = ("y", "dx", "weight", "bias", "running_mean", "running_var")
_SECOND = ("x", "dy", "weight")


def measure(device: str) -> Outcome:
    """Compare two training steps of all dtypes and formats, and the second order of the full types."""
    rows: list[Row] = []
    failures: list[str] = []
    with group_of_one(device):
        for dtype, form in cases():
            rows.append({"dtype": name_of(dtype), "format": form, **_first_order(dtype, form, device, failures)})
        second = [_second_order(dtype, device, failures) for dtype in (torch.float64, torch.float32)]
    worst = max(row[name] for row in rows for name in _NAMES)
    worst_second = max(row[name] for row in second for name in _SECOND)
    summary = f"{len(rows)} cases, worst error {worst:.2g} of the tolerance; second order {worst_second:.2g}"
    note = "Errors as parts of the tolerance; running statistics and parameters are float32 for half types."
    tables = [Table("Two steps against nn.BatchNorm2d in float64", rows, note), Table("Second order", second, note)]
    return Outcome(summary, tables, failures)


def _first_order(dtype: torch.dtype, form: str, device: str, failures: list[str]) -> Row:
    layer = make_layer("syncbn", _SHAPE[1], device, full(dtype))
    truth = make_layer("BatchNorm2d", _SHAPE[1], "cpu", full(dtype)).double()
    errors = dict.fromkeys(_NAMES, 0.0)
    kernels = ""
    for step in range(_NUM_STEPS):
        x, dy = (draw(_SHAPE, dtype, device, form, seed=2 * step + i) for i in range(2))
        kernels = refuse_reference(layer, x, failures)
        found, true = _step(layer, x, dy), _step(truth, x.cpu().double(), dy.cpu().double())
        if found["y"].stride() != x.stride():
            strides = f"expected y with strides {x.stride()}, got {found['y'].stride()}"
            failures.append(f"{name_of(dtype)}, {form}: {strides}")
        for name in _NAMES:
            # dx is a difference of terms as large as dy, which may cancel
            scale = max(float(t.abs().max()) for t in ((true[name], dy) if name == "dx" else (true[name],)))
            of = dtype if name in ("y", "dx") else full(dtype)
            error = error_of(found[name], true[name], scale) / TOLERANCE[of]
            errors[name] = max(errors[name], error)
            if error > 1:
                failures.append(f"{name_of(dtype)}, {form}: {name} is off by {error:.3g} times its tolerance")
    return {"back end": kernels, **errors}


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Run one training step; a layer that does not exchange where it should is an error."""
    x.requires_grad_()
    with record_exchanges() as found:
        y = layer(x)
        dx, dweight, dbias = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    expected = [] if type(layer) is nn.BatchNorm2d else ["forward", "backward"]
    if found != expected:
        raise AssertionError(f"expected the exchanges {expected} over the group of one, got {found}")
    statistics = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return {"y": y.detach(), "dx": dx, "weight": dweight, "bias": dbias, **statistics}


def _second_order(dtype: torch.dtype, device: str, failures: list[str]) -> Row:
    """Compare the gradients of a gradient penalty, as of a WGAN-GP critic."""
    layer = make_layer("syncbn", _SHAPE[1], device, dtype)
    truth = make_layer("BatchNorm2d", _SHAPE[1], "cpu", dtype).double()
    x, dy, weights = (draw(_SHAPE, dtype, device, seed=i) for i in range(3))
    found = _penalty_gradients(layer, x, dy, weights)
    true = _penalty_gradients(truth, *(t.detach().cpu().double() for t in (x, dy, weights)))
    errors = [error_of(mine, other) / (10 * TOLERANCE[dtype]) for mine, other in zip(found, true, strict=True)]
    for name, error in zip(_SECOND, errors, strict=True):
        if error > 1:
            failures.append(f"second order, {name_of(dtype)}: the gradient of {name} is off by {error:.3g} tolerances")
    return {"dtype": name_of(dtype), **dict(zip(_SECOND, errors, strict=True))}


def _penalty_gradients(layer: nn.Module, x: Tensor, dy: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients, of x, dy and weight, of a weighted sum of squares of dx."""
    layer = copy.deepcopy(layer)
    x, dy = x.detach().requires_grad_(), dy.detach().requires_grad_()
    [dx] = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    weight = next(layer.parameters())
    return torch.autograd.grad((dx.square() * weights).sum(), [x, dy, weight])
