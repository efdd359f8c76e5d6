"""A training step of a small net on two ranks under DistributedDataParallel, against one process in float64."""

import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.compat import destroy_process_group

from .inputs import back_end, draw, error_of
from .result import Row

_WORLD_SIZE = 2
_NUM_STEPS = 2
# Relative to the largest value. float32: a convolution's own rounding, about 1e-6, grows through the layers.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def compare(device: str, backend: str, share: bool) -> tuple[list[Row], list[str]]:
    """Train on two ranks and in one process; return the errors of gradients and statistics, and the failures.

    Args:
        device: "cuda" or "cpu".
        backend: Of torch.distributed.
        share: Whether the ranks share the first GPU.
    """
    rows: list[Row] = []
    failures = []
    for dtype, tolerance in _TOLERANCE.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                arguments = device, backend, share, dtype, folder
                spawn(_on_rank, arguments, nprocs=_WORLD_SIZE)  # type: ignore[no-untyped-call]
            except Exception as problem:  # with the traceback of the rank
                failures.append(f"DDP step, {dtype}: {str(problem).strip().splitlines()[-1]}")
                continue
            found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(_WORLD_SIZE)]
        truth = _one_process()
        for name, value in truth.items():
            error = max(error_of(state[name], value) for state in found)
            row = {"dtype": str(dtype), "back end": found[0]["back end"], "what": name}
            rows.append(row | {"error": error, "tolerance": tolerance})
            if error > tolerance:
                failures.append(f"DDP step, {dtype}: {name} is off by {error:.3g}, tolerance {tolerance:.3g}")
    return rows, failures


def _make_net() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()  # before a norm, a bias has no gradient
    return nn.Sequential(*first, nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)).double()


def _train(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Train, and return the gradients of the last step, which those before it have changed, and the statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, weights in parts:
        optimizer.zero_grad()
        (model(x) * weights).mean().backward()  # equal batches: the mean of the ranks' means is that of all
        optimizer.step()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.cpu() for name, buffer in model.named_buffers()}


def _batch(step: int) -> tuple[Tensor, Tensor]:
    """Draw inputs of all ranks, and what weighs the outputs in the loss."""
    x = draw((2 * _WORLD_SIZE, 3, 9, 9), torch.float32, "cpu", seed=step)
    return x, draw((2 * _WORLD_SIZE, 4, 5, 5), torch.float32, "cpu", seed=100 + step)


def _one_process() -> dict[str, Tensor]:
    parts = [(x.double(), weights.double()) for x, weights in map(_batch, range(_NUM_STEPS))]
    return _train(_make_net(), parts)


def _on_rank(rank: int, device: str, backend: str, share: bool, dtype: torch.dtype, folder: str) -> None:
    """Train on this rank's part, and save what came out."""
    warnings.filterwarnings("error", message="(?i)syncb", category=RuntimeWarning)  # no slower kernels unseen
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    if device == "cuda":
        torch.cuda.set_device(0 if share else rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(Path(folder) / "store"), _WORLD_SIZE),  # type: ignore[attr-defined]
        rank=rank,
        world_size=_WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    model = DistributedDataParallel(syncbn.convert(_make_net()).to(device, dtype))
    mine = slice(2 * rank, 2 * rank + 2)
    batches = [[t[mine].to(device, dtype) for t in _batch(step)] for step in range(_NUM_STEPS)]
    found = _train(model, [(x, weights) for x, weights in batches])
    kernels = back_end(model.module[1], draw((2, 8, 7, 7), dtype, device))
    results = {name.removeprefix("module."): value for name, value in found.items()}
    torch.save(results | {"back end": kernels}, Path(folder) / f"{rank}.pt")
    destroy_process_group()
