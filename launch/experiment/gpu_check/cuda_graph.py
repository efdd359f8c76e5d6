"""Part `cuda_graph`: a training step captured in a CUDA graph and replayed, against the same step run eagerly."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from . import cuda_calls
from .inputs import cases, draw, full, make_layer, name_of, refuse_reference, run_layer
from .process_groups import fake_group, group_of_one
from .result import Outcome, Row, Table

_SHAPE = (8, 64, 28, 28)
_NUM_WARM_UP = 11  # steps on a side stream, as torch's notes on CUDA graphs ask for with NCCL
_NUM_REPLAYS = 3
_NAMES = ("y", "dx", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def measure(device: str) -> Outcome:
    """Compare the bits of replays with those of eager steps on the same inputs, over both groups."""
    groups: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "fake, of 8": fake_group,
        "NCCL, of one": lambda: group_of_one(device),
    }
    rows: list[Row] = []
    failures: list[str] = []
    for name, group in groups.items():
        with group():
            for dtype, form in cases((torch.float32, torch.bfloat16)):
                label = f"{name}, {name_of(dtype)}, {form}"
                try:
                    kernels, different = _compare(dtype, form, failures)
                except RuntimeError as error:  # of the capture: it leaves the process unusable
                    failures.append(f"{label}: {str(error).splitlines()[0]}")
                    return _outcome(rows, failures)
                row = {"group": name, "dtype": name_of(dtype), "format": form, "back end": kernels}
                rows.append(row | {"different": ", ".join(different)})
                failures += [f"{label}: {what} has other bits than eager" for what in different]
    return _outcome(rows, failures)


def _outcome(rows: list[Row], failures: list[str]) -> Outcome:
    summary = f"{_NUM_REPLAYS} replays of {len(rows)} captured steps give the bits of eager steps"
    return Outcome(summary, [Table("Replays against eager", rows, "What differs in any bit.")], failures)


def _compare(dtype: torch.dtype, form: str, failures: list[str]) -> tuple[str, list[str]]:
    """Return the back end, and the names of what differs."""
    layer = make_layer("syncbn", _SHAPE[1], "cuda", full(dtype))
    eager = copy.deepcopy(layer)
    x, dy = (draw(_SHAPE, dtype, "cuda", form, seed=i) for i in range(2))
    kernels = refuse_reference(layer, x, failures)
    graph, captured = _capture(layer, x.requires_grad_(), dy)
    layer.load_state_dict(eager.state_dict())  # in place: the warm-up has moved the statistics
    different = set()
    for step in range(_NUM_REPLAYS):
        new_x, new_dy = (draw(_SHAPE, dtype, "cuda", form, seed=10 + 2 * step + i) for i in range(2))
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
        graph.replay()
        expected = run_layer(eager, new_x.requires_grad_(), new_dy)
        torch.cuda.synchronize()
        pairs = zip(_NAMES, [*captured, *layer.buffers()], [*expected, *eager.buffers()], strict=True)
        different |= {name for name, mine, other in pairs if not torch.equal(mine, other)}
    return kernels, [name for name in _NAMES if name in different]


def _capture(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """Return a graph of one step, and the tensors that its replays write."""
    side = cuda_calls.make_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_NUM_WARM_UP):
            run_layer(layer, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog is a thread of its own that asks for events, which "global" takes for an error of the capture
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = run_layer(layer, x, dy)
    return graph, captured
