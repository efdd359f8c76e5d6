"""Layers that normalize by other formulas than BatchNorm's over all ranks, simulated by running the layers themselves.

What all ranks compute together in one forward, such a layer computes on their joined batch. So it runs on one
accumulated batch of all ranks after another, and its own state moves in that order.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from syncbn.nn.activated import SyncBatchNormAct

INSTEAD = "use engine=torchrun (for launch/train.py: torchrun --nproc-per-node, without simulate)"
_BATCHNORM = {syncbn.SyncBatchNorm.forward, SyncBatchNormAct.forward}


class JointLayer(nn.Module):
    """Run a layer, the other base of its class, on each batch of `split_size` images of all ranks in turn."""

    split_size: int
    num_images: int | None = None  # in the batch of the running forward
    num_calls: int | None = None  # in a training forward of the model

    def begin(self, num_images: int, training: bool) -> None:
        """Get to know the forward of the model that begins."""
        self.num_images, self.num_calls = num_images, 0 if training else None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`.

        Raises:
            ValueError: rows that are not equally many of each image; a second call with several batches.
        """
        num_images = self.num_images or len(input)
        forward: Callable[[Tensor], Tensor] = super().forward  # masks are not simulated
        if self.num_calls is not None:
            self.num_calls += 1
            if self.num_calls > 1 and num_images > self.split_size:
                raise ValueError(
                    f"cannot simulate a {type(self).__name__} that runs twice in a forward, since the ranks' "
                    f"statistics move batch by batch; {INSTEAD}"
                )
        if not self.training:
            return forward(input)
        num_batches, rest = divmod(num_images, self.split_size)
        if rest or len(input) % num_images:
            raise ValueError(
                f"cannot simulate: expected equally many rows of each image of batches of {self.split_size}, got "
                f"{tuple(input.shape)} of {num_images} images; {INSTEAD}"
            )
        return torch.cat([forward(part) for part in input.chunk(num_batches)])


def is_joint(layer: nn.Module) -> bool:
    """Whether `layer` is one of syncbn's that synchronizes by a formula of its own."""
    forward: Any = type(layer).forward
    is_ours = isinstance(layer, syncbn.SyncBatchNorm) and forward.__module__.startswith("syncbn.nn.")
    return is_ours and forward not in _BATCHNORM


def make_joint(layer: nn.Module, split_size: int) -> None:
    """Change the class of `layer` to one that is a `JointLayer` too."""
    cls = type(layer)
    layer.__class__ = type(cls.__name__, (JointLayer, cls), {"split_size": split_size})
