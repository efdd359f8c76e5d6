"""Part `compile`: torch.compile of the layer, whole, against nn.BatchNorm2d in float64, gradients too.

torch 2.11 can compile gradients to zeros without a word, so each is asserted not to be zero.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .inputs import TOLERANCE, draw, error_of, full, make_layer, name_of
from .process_groups import group_of_one
from .result import Outcome, Row, Table

_SHAPE = (8, 16, 14, 14)
_NAMES = ("y", "dx", "weight", "bias", "running_mean", "running_var")
_Setting = tuple[str, torch.dtype, str]  # back end of torch.compile, dtype, memory format
_SETTINGS: dict[str, tuple[_Setting, ...]] = {
    "cuda": (
        ("inductor", torch.float32, "contiguous"),
        ("inductor", torch.bfloat16, "channels_last"),
        ("inductor", torch.float16, "contiguous"),
        ("inductor", torch.float64, "contiguous"),
    ),
    "cpu": (
        ("aot_eager", torch.float32, "contiguous"),
        ("aot_eager", torch.bfloat16, "channels_last"),
        ("aot_eager", torch.float64, "contiguous"),
        ("inductor", torch.float32, "contiguous"),
    ),
}


def measure(device: str) -> Outcome:
    """Compile for every setting; one that does not compile is a failure, and the others go on."""
    rows: list[Row] = []
    failures: list[str] = []
    with group_of_one(device):
        for backend, dtype, form in _SETTINGS[device]:
            label = f"{backend}, {name_of(dtype)}, {form}"
            torch.compiler.reset()
            try:
                errors = _compare(backend, dtype, form, device)
            except Exception as error:  # of the compiler, of any kind
                failures.append(f"{label}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
                continue
            rows.append({"compiler": backend, "dtype": name_of(dtype), "format": form, **errors})
            for name, value in errors.items():
                if not value <= 1:
                    failures.append(f"{label}: {name} is zero or off by {value:.3g} times its tolerance")
    worst = max((row[name] for row in rows for name in _NAMES), default=float("nan"))
    summary = f"{len(rows)} compiled steps, worst error {worst:.2g} of the tolerance, no gradient is zero"
    note = "Errors as parts of the tolerance; inf for a tensor of zeros, or not finite."
    return Outcome(summary, [Table("Compiled steps against nn.BatchNorm2d in float64", rows, note)], failures)


def _compare(backend: str, dtype: torch.dtype, form: str, device: str) -> dict[str, float]:
    """Return the errors as parts of the tolerance, inf for what is all zeros or not finite."""
    layer = make_layer("syncbn", _SHAPE[1], device, full(dtype))
    truth = make_layer("BatchNorm2d", _SHAPE[1], "cpu", full(dtype)).double()
    x, dy = (draw(_SHAPE, dtype, device, form, seed=i) for i in range(2))
    compiled: Any = torch.compile(layer, fullgraph=True, backend=backend)
    found = _step(compiled, layer, x, dy)
    true = _step(truth, truth, x.detach().cpu().double(), dy.cpu().double())
    errors = {}
    for name in _NAMES:
        scale = max(float(t.abs().max()) for t in ((true[name], dy) if name == "dx" else (true[name],)))
        # twice the tolerance: a compiled pass rounds in other places, as where it fuses a product into a sum
        tolerance = 2 * TOLERANCE[dtype if name in ("y", "dx") else full(dtype)]
        errors[name] = error_of(found[name], true[name], scale) / tolerance if found[name].any() else float("inf")
    return errors


def _step(call: Any, layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Train one step by backward(), as a user does."""
    x.requires_grad_()
    y = call(x)
    y.backward(dy)
    gradients: dict[str, Any] = {"dx": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if missing:
        raise AssertionError(f"no gradient of {', '.join(missing)}")
    statistics = {name: buffer for name, buffer in layer.named_buffers()}
    return {"y": y.detach(), **gradients, **statistics}
