"""What differs between the versions of torch that syncbn supports; each entry names the versions that need it."""

import inspect
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import init
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

TESTED = "2.6.0 to 2.15.0"


def check_version(version: str) -> tuple[int, int]:
    """Return major and minor number of a version of torch.

    Raises:
        ImportError: For one that is too old, with the versions that work.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    major, minor = (int(found[1]), int(found[2])) if found is not None else (2, 6)
    if (major, minor) < (2, 6):
        raise ImportError(
            f"syncbn needs torch 2.6 or later (tested with {TESTED}), got torch {version}; "
            "upgrade it: pip install 'torch>=2.6'"
        )
    return major, minor


_version = check_version(torch.__version__)

# Before torch 2.13: another name, which is deprecated in newer versions.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

# Before torch 2.13: DDP cannot be told to copy the buffers at construction and not before every forward pass.
HAS_FORWARD_SYNC_BUFFERS = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
DDP_OPTIONS: dict[str, Any] = {"forward_sync_buffers": False} if HAS_FORWARD_SYNC_BUFFERS else {}


def copy_buffers_once(ddp: DistributedDataParallel) -> None:
    """Let DDP, now constructed, copy no buffers before its forward passes. Before torch 2.13: DDP_OPTIONS is empty."""
    if not HAS_FORWARD_SYNC_BUFFERS:
        ddp.broadcast_buffers = False


def destroy_process_group() -> None:
    """Destroy all process groups. torch 2.6: gloo's threads may need the GIL, which this holds while it joins them."""
    if _version < (2, 7):
        time.sleep(0.02)  # so that they let go of the last tensors
    dist.destroy_process_group()


@contextmanager
def full_float32() -> Iterator[None]:
    """Use all 24 bits of float32 on CUDA, and not the 11 of TF32. Before torch 2.9: another name of the switches."""
    cudnn: Any = torch.backends.cudnn
    owners: list[Any] = [getattr(cudnn, "conv", cudnn), torch.backends.cuda.matmul]
    name, value = ("fp32_precision", "ieee") if owners[0] is not cudnn else ("allow_tf32", False)
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            setattr(owner, name, old)


class BatchNorm(_BatchNorm):
    """Have the argument ``bias``. Before torch 2.13: torch's own class lacks it."""

    def __init__(self, *args: Any, bias: bool = True) -> None:
        super().__init__(*args)
        if not bias:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Reset parameters and statistics, as torch does."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)
