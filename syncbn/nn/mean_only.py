"""Mean-only BatchNorm: what goes with weight normalization, which has set the scale."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..local import evaluate
from ..ops.checks import check_input
from ..ops.reference import Running
from ..plain.batch import join
from .affine import tensor_of
from .batchnorm import SyncBatchNorm

_NOTHING = 1e-30  # an eps that leaves a variance of 1 as it is


class MeanOnlyBatchNorm(SyncBatchNorm):
    """Subtract the mean of the batch on all ranks, and divide by nothing: ``y = x - mean + bias`` per channel.

    In eval mode ``y = x - running_mean + bias``, with `SyncBatchNorm`'s moving average. There is no weight and no
    ``running_var``; keys are ``bias, running_mean, num_batches_tracked``. Masks, process groups and errors are those
    of `SyncBatchNorm`. Salimans & Kingma 2016, arXiv 1602.07868, section 4.

    Shapes: input and output ``(N, C, *)``. Collectives: one exchange of 2C + 1 numbers forward and one backward.

    Args:
        layer: The BatchNorm whose channels, momentum, device and dtype it takes.
        process_group: As in `SyncBatchNorm`.
    """

    def __init__(self, layer: _BatchNorm, process_group: Any = None) -> None:
        like = tensor_of(layer)
        tracks = layer.track_running_stats
        options = layer.eps, layer.momentum, True, tracks, process_group, like.device, like.dtype
        super().__init__(layer.num_features, *options)
        self.register_parameter("weight", None)
        self.register_buffer("running_var", None)

    def reset_running_stats(self) -> None:
        """Begin with a mean of 0."""
        for buffer in (self.running_mean, self.num_batches_tracked):
            if buffer is not None:
                buffer.zero_()

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Subtract the mean of ``input``; see the class."""
        self._check_input_dim(input)
        if not self.training:
            return self._evaluate(input, mask)
        check_input(input, self.bias, self.running_mean, self.eps, self.num_features)
        group, name = self._group_and_name()
        batch = join(input, self.eps, self.momentum, group, name, mask)
        if self.running_mean is not None:
            unused = torch.zeros_like(self.running_mean)
            batch.move(Running(self.running_mean, unused, self.num_batches_tracked, self.momentum))
        mean = batch.mean_var()[0]
        return batch.scale(mean, torch.ones_like(mean), self.bias)

    def _evaluate(self, x: Tensor, mask: Tensor | None) -> Tensor:
        check_input(x, self.bias, self.running_mean, None, self.num_features)
        self._note_eval()
        if self.running_mean is None:
            batch = join(x, self.eps, self.momentum, None, "eval", mask)
            mean = batch.mean_var()[0]
            return batch.scale(mean, torch.ones_like(mean), self.bias)
        return evaluate(x, self.running_mean, torch.ones_like(self.running_mean), None, self.bias, _NOTHING, mask)
