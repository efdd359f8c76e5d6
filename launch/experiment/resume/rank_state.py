"""The state that each rank has of its own in training, gathered into one checkpoint and restored from it."""

import io
import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric


def collect(model: nn.Module) -> dict[str, Any]:
    """Collect this rank's buffers (also those a state_dict leaves out), unfinished metrics and random states.

    Returns:
        Tensors on the CPU and plain values, which load with `weights_only=True`.
    """
    metrics = {
        name: {key: _copy(value) for key, value in metric.metric_state.items()}
        for name, metric in model.named_modules()
        if isinstance(metric, Metric) and metric.update_called
    }
    buffers = {name: _copy(buffer) for name, buffer in model.named_buffers()}
    return {"buffers": buffers, "metrics": metrics, "random": _random()}


def restore(model: nn.Module, own: dict[str, Any]) -> None:
    """Restore buffers and metrics to what `collect` returned."""
    for name, buffer in model.named_buffers():
        buffer.copy_(own["buffers"][name])
    for name, state in own["metrics"].items():
        metric = model.get_submodule(name)
        assert isinstance(metric, Metric)
        for key, value in state.items():
            setattr(metric, key, _to(value, metric.device))


def restore_random(own: dict[str, Any]) -> None:
    """Restore the random states of torch, Python and NumPy."""
    states = own["random"]
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])
    key = np.array(states["numpy"]["key"], dtype=np.uint32)
    np.random.set_state(("MT19937", key, *states["numpy"]["rest"]))


def _random() -> dict[str, Any]:
    _, key, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": {"key": np.asarray(key).tolist(), "rest": rest},
    }


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else [_copy(item) for item in value]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else [_to(item, device) for item in value]


def settle_buckets(trainer: L.Trainer, model: L.LightningModule) -> None:
    """Let DDP record the order in which gradients become ready, as in a run's first step; nothing else changes.

    From the second step on DDP packs gradients in that order. From three ranks up the order of an all-reduce's sums
    depends on the packing, so without this the first step of a resumed run would differ in the last bits.
    """
    before = collect(model)
    images = trainer.datamodule.example().to(trainer.strategy.root_device)  # type: ignore[attr-defined]
    images = trainer.precision_plugin.convert_input(images)
    with torch.enable_grad(), trainer.precision_plugin.train_step_context():
        outputs = trainer.strategy.model(images)  # type: ignore[misc]
        outputs.float().square().mean().backward()
    model.zero_grad()
    restore(model, before)
    restore_random(before)


def gather(trainer: L.Trainer, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Gather the state of all ranks on rank 0, by one all-gather of sizes and one gather of bytes."""
    if trainer.world_size == 1:
        return [own]
    buffer = io.BytesIO()
    torch.save(own, buffer)
    device = trainer.strategy.root_device
    mine = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(trainer.world_size)]
    dist.all_gather(sizes, torch.tensor([len(mine)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.cat([mine, mine.new_zeros(longest - len(mine))])
    parts = [torch.empty_like(padded) for _ in sizes] if trainer.is_global_zero else None
    dist.gather(padded, parts)
    cut = [part[: int(size)] for part, size in zip(parts or (), sizes, strict=False)]
    return [torch.load(io.BytesIO(part.cpu().numpy().tobytes()), weights_only=True) for part in cut]


def largest(trainer: L.Trainer, number: int) -> int:
    """Return the largest of the numbers of all ranks, by one all-reduce."""
    if trainer.world_size == 1:
        return number
    value = torch.tensor([number], device=trainer.strategy.root_device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def check_equal(trainer: L.Trainer, step: int) -> None:
    """Refuse to start from different steps on different ranks.

    Raises:
        RuntimeError: on all ranks.
    """
    high, low = largest(trainer, step), -largest(trainer, -step)
    if high != low:
        raise RuntimeError(
            f"the ranks found different checkpoints, of steps {low} to {high}, here {step}: run_dir must be a "
            "folder that all hosts share"
        )
