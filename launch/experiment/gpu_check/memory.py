"""Part `memory`: what one layer keeps for its backward pass, and what it allocates at most."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .inputs import cases, draw, full, make_layer, name_of, refuse_reference, run_layer
from .process_groups import fake_group
from .result import Outcome, Row, Table

_SHAPE = {"cuda": (32, 64, 56, 56), "cpu": (4, 64, 14, 14)}
_PER_CHANNEL = 64  # bytes that a layer may keep beyond its input: O(C) numbers


def measure(device: str) -> Outcome:
    """Measure every layer that runs on the device, for each dtype and memory format."""
    kinds = ("BatchNorm2d", "SyncBatchNorm", "syncbn") if device == "cuda" else ("BatchNorm2d", "syncbn")
    failures: list[str] = []
    with fake_group():
        rows = [_measure(kind, *case, device, failures) for case in cases() for kind in kinds]
    most = max(row["bytes per channel beyond the input"] for row in rows if row["layer"] == "syncbn")
    summary = f"a layer keeps its input and at most {most:.0f} bytes per channel"
    note = f"Storages, each once, parameters left out; a layer of ours may keep {_PER_CHANNEL} bytes per channel."
    if device == "cuda":
        worst = max(row["peak to nn.BatchNorm2d"] for row in _beside(rows))
        summary += f"; peak {worst:.3f} of nn.BatchNorm2d's at worst"
    return Outcome(summary, [Table("Memory of a layer, forward and backward", rows, note)], failures)


def _beside(rows: list[Row]) -> list[Row]:
    """Add to our rows the peak beside that of nn.BatchNorm2d, which comes first in each case."""
    plain = 1.0
    for row in rows:
        if row["layer"] == "BatchNorm2d":
            plain = row["peak, MiB"]
        row["peak to nn.BatchNorm2d"] = row["peak, MiB"] / plain
    return [row for row in rows if row["layer"] == "syncbn"]


def _measure(kind: str, dtype: torch.dtype, form: str, device: str, failures: list[str]) -> Row:
    shape = _SHAPE[device]
    layer = make_layer(kind, shape[1], device, full(dtype))
    x, dy = (draw(shape, dtype, device, form, seed=i) for i in range(2))
    x.requires_grad_()
    if kind == "syncbn":
        refuse_reference(layer, x.detach(), failures)
    run_layer(layer, x, dy)  # checks and caches of the first call
    beyond = saved_bytes(lambda: layer(x), [*layer.parameters(), x]) / shape[1]
    label = f"{kind}, {name_of(dtype)}, {form}"
    if kind == "syncbn" and beyond > _PER_CHANNEL:
        failures.append(f"{label}: keeps {beyond:.0f} bytes per channel beyond the input, expected {_PER_CHANNEL}")
    row: Row = {"layer": kind, "dtype": name_of(dtype), "format": form, "bytes per channel beyond the input": beyond}
    return row | ({"peak, MiB": _peak(layer, x, dy)} if device == "cuda" else {})


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps for the backward pass of ``forward()``: storages, each once.

    Args:
        forward: The forward pass.
        known: Tensors that exist anyway, as parameters do.
    """
    saved: dict[int, Tensor] = {}  # by address; held, so that no address is given out again

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    addresses = saved.keys() - {tensor.untyped_storage().data_ptr() for tensor in known}
    del result
    return sum(saved[address].untyped_storage().nbytes() for address in addresses)


def _peak(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Return the most memory that a step has beyond what it started with, in MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_layer(layer, x, dy)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
