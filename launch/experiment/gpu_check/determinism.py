"""Part `determinism`: the same bits in every run, and from two CUDA streams at once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import cuda_calls
from .inputs import cases, draw, full, make_layer, name_of, refuse_reference, run_layer
from .process_groups import fake_group, group_of_one
from .result import Outcome, Row, Table

_NUM_RUNS = 200
_SHAPES = {"cuda": ((16, 64, 56, 56), (64, 512, 7, 7)), "cpu": ((4, 8, 12, 12),)}
_NUM_BATCHES, _PER_BATCH = 25, 4  # on two streams: calls that are queued behind a sleep, so that kernels overlap
_SLEEP = 10_000_000  # cycles, some milliseconds


def measure(device: str) -> Outcome:
    """Repeat forward and backward passes, and compare every result with that of the first run."""
    failures: list[str] = []
    settings = [(shape, *case) for shape in _SHAPES[device] for case in cases((torch.float32, torch.bfloat16))]
    with group_of_one(device):
        rows = [_repeat(*setting, device, failures) for setting in settings]
    tables = [Table("Equal runs", rows)]
    summary = f"{_NUM_RUNS} runs of {len(rows)} cases give equal bits"
    if device == "cuda":
        with fake_group():  # of which nothing couples the streams
            streams = [_two_streams(*setting, failures) for setting in settings]
        tables.append(Table("Two streams at once", streams))
        summary += "; so do two streams at once"
    return Outcome(summary, tables, failures)


def _repeat(shape: Sequence[int], dtype: torch.dtype, form: str, device: str, failures: list[str]) -> Row:
    layer, x, dy = _make(shape, dtype, form, device, seed=0)
    kernels = refuse_reference(layer, x.detach(), failures)
    first = _all_results(layer, x, dy)
    different = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(_NUM_RUNS - 1):
        different += _differ(_all_results(layer, x, dy), first)  # stays on the device: runs follow each other closely
    row = _row(shape, dtype, form) | {"back end": kernels, "runs": _NUM_RUNS, "different": int(different)}
    if row["different"]:
        failures.append(f"{row['shape']}, {row['dtype']}, {form}: {row['different']} of {_NUM_RUNS} runs differ")
    return row


def _two_streams(shape: Sequence[int], dtype: torch.dtype, form: str, failures: list[str]) -> Row:
    """Run two layers on a stream each; every result must be that of the layer alone."""
    layers = [_make(shape, dtype, form, "cuda", seed=seed) for seed in range(2)]
    alone = [_all_results(*each) for each in layers]
    streams = [cuda_calls.make_stream() for _ in layers]
    different = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in layers]
    torch.cuda.synchronize()
    for _ in range(_NUM_BATCHES):
        for stream in streams:
            with torch.cuda.stream(stream):
                cuda_calls.sleep(_SLEEP)
        for _ in range(_PER_BATCH):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    different[i] += _differ(_all_results(*layers[i]), alone[i])
    torch.cuda.synchronize()
    num = sum(map(int, different))
    row = _row(shape, dtype, form) | {"runs": 2 * _NUM_BATCHES * _PER_BATCH, "different": num}
    if num:
        failures.append(f"two streams: {row['shape']}, {row['dtype']}, {form}: {num} runs differ")
    return row


def _make(
    shape: Sequence[int], dtype: torch.dtype, form: str, device: str, seed: int
) -> tuple[nn.Module, Tensor, Tensor]:
    layer = make_layer("syncbn", shape[1], device, full(dtype), momentum=1.0)  # statistics of this run alone
    x, dy = (draw(shape, dtype, device, form, seed=2 * seed + i) for i in range(2))
    return layer, x.requires_grad_(), dy


def _all_results(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    results = run_layer(layer, x, dy)
    return *results, *(buffer.clone() for buffer in layer.buffers() if buffer.is_floating_point())


def _differ(found: Sequence[Tensor], first: Sequence[Tensor]) -> Tensor:
    """Whether any value differs, as a tensor that nobody waits for."""
    return torch.stack([(a != b).any() for a, b in zip(found, first, strict=True)]).any()


def _row(shape: Sequence[int], dtype: torch.dtype, form: str) -> Row:
    return {"shape": "x".join(map(str, shape)), "dtype": name_of(dtype), "format": form}
