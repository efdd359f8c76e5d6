"""Frozen statistics: ``y = (x - running_mean) / sqrt(running_var + eps) * weight + bias``, in training mode too.

The arm of fine-tuning, where the statistics of pretraining are kept; in a new network they are 0 and 1.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenStatistics(nn.Module):
    """Normalize with running statistics that never move, whatever ``train()`` says; weight and bias go on learning.

    No BatchNorm class, so that nothing updates, freezes or synchronizes it; the keys are nn.BatchNorm's.

    Shapes: input and output ``(N, C, *)``. Collectives: none.

    Args:
        layer: The BatchNorm whose parameters and buffers it takes.

    Raises:
        ValueError: If ``layer`` has no running statistics.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        if layer.running_mean is None:
            raise ValueError(
                "norm 'frozen' needs running statistics, this layer has none (track_running_stats=False); "
                "leave it out with exclude"
            )
        self.num_features, self.eps = layer.num_features, layer.eps
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(layer, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``; see the class."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the channels and eps."""
        return f"{self.num_features}, eps={self.eps}"
