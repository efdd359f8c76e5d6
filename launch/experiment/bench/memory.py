"""Memory: what one layer keeps for its backward pass, and what a training step takes at most."""

import ctypes
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from experiment.bench import spawn
from experiment.bench.contenders import CONTENDERS
from experiment.bench.layer import make_layer
from experiment.bench.tables import Table, shape_text
from experiment.bench.training_step import NUM_CLASSES, make_step
from experiment.training.models import classifiers
from syncbn import use_kernels

Row = dict[str, Any]
MIB = 2**20
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def measure(config: DictConfig) -> list[Row]:
    """Count what autograd saves, of a layer and of a model, and the peak of a training step in a fresh process.

    Returns:
        Rows of `kind` "layer": `shape`, `contender`, `input` (bytes), `saved` (bytes, the input among them); rows of
        `kind` "step": `arch`, `contender`, `saved` (bytes, parameters left out), `peak` (bytes above what the process
        had before the step).
    """
    part, rows = config.memory, []
    with spawn.fake_group():
        for shape in part.shapes:
            rows += [_of_layer(list(shape), name, config.device) for name in part.contenders]
    setting = spawn.Setting(config.timeout, config.device, config.threads, fake=True)
    for name in part.step_contenders:
        [(saved, peak)] = spawn.run(_of_step, 1, setting, config, name)
        rows.append({"kind": "step", "arch": part.arch, "contender": name, "saved": saved, "peak": peak})
    return rows


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps for the backward pass of ``forward()``: storages, each once.

    Args:
        forward: The forward pass.
        known: Tensors that are not counted, such as parameters.
    """
    saved: dict[int, Tensor] = {}  # by address; held, so that no address is given out again

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(_address(tensor), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    addresses = saved.keys() - {_address(tensor) for tensor in known}
    del result
    return sum(saved[address].untyped_storage().nbytes() for address in addresses)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _of_layer(shape: list[int], name: str, device: str) -> Row:
    x = torch.randn(shape, device=device, requires_grad=True)
    layer = make_layer(name, x)
    with use_kernels(CONTENDERS[name].kernels):
        saved = saved_bytes(lambda: layer(x))
    return {"kind": "layer", "shape": shape, "contender": name, "input": x.nbytes, "saved": saved}


def _of_step(config: DictConfig, name: str) -> tuple[int, int]:
    """Measure in a process of its own, in which nothing was larger before."""
    part, device = config.memory, config.device
    return_freed_memory_at_once()
    torch.manual_seed(0)
    model = CONTENDERS[name].convert(classifiers.torchvision(part.arch, NUM_CLASSES)).to(device)
    step = make_step(model, part.per_rank_batch_size, part.image_size, device)
    images = torch.randn(part.per_rank_batch_size, 3, part.image_size, part.image_size, device=device)
    with use_kernels(CONTENDERS[name].kernels):
        before = peak(device)
        step()
        highest = peak(device) - before
        saved = saved_bytes(lambda: model(images), model.parameters())
    return saved, highest


def return_freed_memory_at_once() -> None:
    """Make malloc return every larger block when it is freed, where it is glibc's: else peaks are left to chance."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 65536)


def peak(device: str) -> int:
    """Return the most bytes that this process had: of the GPU, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """Lay out both kinds."""
    layers = [row for row in rows if row["kind"] == "layer"]
    steps = [row for row in rows if row["kind"] == "step"]
    return [*([_layers(layers)] if layers else []), *([_steps(steps)] if steps else [])]


def _layers(rows: Sequence[Row]) -> Table:
    lines = [
        [shape_text(row["shape"]), CONTENDERS[row["contender"]].label, f"{row['saved']:,}",
         f"{row['saved'] / row['input']:.3f}", f"{row['saved'] - row['input']:,}"]
        for row in rows
    ]  # fmt: skip
    columns = ["shape", "", "bytes saved", "inputs", "beyond the input"]
    return Table("Saved for backward by one layer", columns, lines, "Storages, each once; parameters included.")


def _steps(rows: Sequence[Row]) -> Table:
    plain = next((row for row in rows if row["contender"] == "plain"), None)
    lines = []
    for row in rows:
        cells = [f"{row['saved'] / MIB:.1f}", f"{row['peak'] / MIB:.1f}"]
        ratio = f"{row['peak'] / plain['peak']:.3f}" if plain else ""
        lines.append([row["arch"], CONTENDERS[row["contender"]].label, *cells, ratio])
    columns = ["model", "", "saved, MiB", "peak, MiB", "to nn.BatchNorm"]
    note = "Saved: without parameters. Peak: resident memory of a training step above the highest before it."
    return Table("Memory of a training step", columns, lines, note)
