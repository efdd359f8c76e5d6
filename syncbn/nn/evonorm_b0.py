"""EvoNorm-B0: a norm and an activation in one, with the variance of the batch on all ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed.groups import GroupSpec, ProcessGroupLike
from ..ops.checks import check_input
from ..ops.layout import SUM_DTYPE, per_channel
from ..ops.reference import Running
from ..plain.batch import join
from .affine import check_eps, scale_and_shift, tensor_of
from .batchnorm import SyncBatchNorm
from .evonorm_s0 import var_of_positions


class EvoNormB0(SyncBatchNorm):
    """Divide by the standard deviation of the batch on all ranks, or by what its sample makes larger.

    ``y = x / max(sqrt(var + eps), v * x + sqrt(var_x + eps)) * weight + bias``: var is the biased variance per channel
    over all ranks of ``process_group`` (in eval mode ``running_var``), var_x that of one sample and channel over its
    positions. ``v``, ``(C,)``, starts at 1 and learns. It replaces the norm and the activation behind it. Without
    ``v`` nothing is normalized or exchanged: ``y = x * weight + bias``.

    ``running_var`` moves by ``momentum`` with the unbiased variance. ``running_mean`` moves too and is not used: it is
    there for `update_bn_stats`, `average_bn_stats`, `freeze` and `revert`, which treat the layer as any BatchNorm, and
    not saved. State_dict: ``weight, bias, v, running_var``, as of timm's EvoNorm2dB0, which it equals in one process;
    and ``num_batches_tracked`` if momentum is None.

    Shapes: input and output ``(N, C, *)``, the output in the input's dtype; half types are computed in float32. N may
    be 0 on some ranks. Collectives: one exchange of 2C + 1 numbers forward and one backward, none in eval mode.

    Source: Liu et al. 2020 (arXiv 2004.02967), table 1.

    Args:
        layer: The BatchNorm whose channels, weight, bias and momentum it takes.
        eps: Added to the variances.
        process_group: As in SyncBatchNorm.

    Raises:
        ValueError: Unless ``eps`` is above 0; in forward for a mask, and as SyncBatchNorm for an input that does not
            fit, and on all ranks for one value per channel.
    """

    ACTIVATION, WITHOUT = "its own activation", "weight and bias alone"  # for `plan`
    v: nn.Parameter | None

    def __init__(
        self, layer: _BatchNorm, eps: float = 1e-3, process_group: ProcessGroupLike | GroupSpec = None
    ) -> None:
        check_eps(eps)
        like = tensor_of(layer)
        tracks = layer.track_running_stats
        super().__init__(layer.num_features, eps, layer.momentum, False, tracks, None, like.device, like.dtype)
        self.process_group = process_group
        self.affine = layer.affine
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(layer, name))
        self.v = nn.Parameter(like.new_ones(self.num_features))
        if self.momentum is not None:  # only the average of all batches has a use for it
            self.register_buffer("num_batches_tracked", None)
        self._non_persistent_buffers_set.add("running_mean")

    def remove_activation(self) -> None:
        """Take ``v`` away, for a place without an activation to replace."""
        self.v = None

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize and activate ``input``; see the class."""
        if mask is not None:
            raise ValueError("evonorm_b0: expected no mask, got one; leave the layer out with exclude.")
        check_input(input, self.weight, self.running_var, self.eps if self.training else None, self.num_features)
        x = input.to(SUM_DTYPE.get(input.dtype, input.dtype))
        if self.v is not None:
            std = per_channel((self._var_of_batch(input).double() + self.eps).sqrt().to(x.dtype), x)
            x = x / torch.maximum(std, x * per_channel(self.v, x) + (var_of_positions(x) + self.eps).sqrt())
        return scale_and_shift(x, self.weight, self.bias).to(input.dtype)

    def _var_of_batch(self, x: Tensor) -> Tensor:
        """Return the variance to normalize with, ``(C,)``; in training the running statistics move."""
        if not self.training:
            self._note_eval()
            if self.running_var is not None:
                return self.running_var
        group, name = self._group_and_name() if self.training else (None, "")
        batch = join(x, self.eps, self.momentum, group, name)
        if self.training:
            batch.move(Running(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum))
        return batch.mean_var()[1]

    def extra_repr(self) -> str:
        """Show what SyncBatchNorm shows, and whether the activation is missing."""
        return super().extra_repr() if self.v is not None else f"{super().extra_repr()}, {self.WITHOUT}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        # to a state of an older version BatchNorm adds num_batches_tracked
        super()._load_from_state_dict(state, prefix, {**metadata, "version": 2}, *rest)
