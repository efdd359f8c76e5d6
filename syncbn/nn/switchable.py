"""Switchable normalization: a learned mixture of the statistics of InstanceNorm, LayerNorm and BatchNorm."""

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.groups import ProcessGroupLike
from ..ops.checks import check_input
from ..ops.layout import SUM_DTYPE
from ..ops.reference import Running
from ..plain.batch import join
from .batchnorm import SyncBatchNorm

KINDS = ("IN", "LN", "BN")  # the order of the weights


class SwitchableNorm(SyncBatchNorm):
    """Normalize with weighted means of the statistics per channel, per sample, and of the batch on all ranks.

    ``y = (x - sum_k p_k mean_k) / sqrt(sum_k q_k var_k + eps) * weight + bias``, with biased variances, k in (IN, LN,
    BN), ``p = softmax(mean_weight)`` and ``q = softmax(var_weight)``, three learned numbers each, 1 at the start:

    - IN over the positions of a sample's channel; LN over all channels and positions of a sample;
    - BN over samples, positions and the ranks of ``process_group``; in eval mode the running statistics, which move
      as nn.BatchNorm's (``running_var`` is unbiased and begins at 1).

    So one-hot weights are InstanceNorm, LayerNorm with weight and bias per channel, and SyncBatchNorm, in both modes.
    Inputs ``(N, C)`` have no positions: p and q are the softmax of the last two weights. No gradient is stopped; those
    of the six numbers are sums over this rank's samples, as ``weight``'s, which DistributedDataParallel averages.

    State dicts of the authors' code load: their ``(1, C, 1, 1)`` and ``(1, C, 1)`` become ``(C,)``. Their IN takes the
    unbiased variance and their ``running_var`` begins at 0, so outputs differ a little on small maps.

    Shapes: input and output ``(N, C, *)``, N may be 0. Collectives in training: one exchange of 2C + 1 numbers
    forward, and one backward. Saves O(N C) numbers and several tensors of the input's size. Arguments as
    SyncBatchNorm.

    Raises:
        ValueError: As `functional.sync_batch_norm`; for a mask, which statistics per sample are not defined for.

    Source: Luo et al. 2019, arXiv 1806.10779 and 1907.10473.

    Examples:
        >>> import torch, syncbn
        >>> layer = syncbn.SwitchableNorm(3)
        >>> y = layer(torch.randn(8, 3, 4, 4))
        >>> [round(share, 2) for share in layer.shares()["mean"].values()]
        [0.33, 0.33, 0.33]
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroupLike = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        tracks = track_running_stats
        super().__init__(num_features, eps, momentum, affine, tracks, process_group, device, dtype, bias=bias)
        self.mean_weight = nn.Parameter(torch.ones(len(KINDS), device=device, dtype=dtype))
        self.var_weight = nn.Parameter(torch.ones(len(KINDS), device=device, dtype=dtype))

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input``; see the class."""
        self._check_input_dim(input)
        if mask is not None:
            raise ValueError("SwitchableNorm takes no mask: use SyncBatchNorm (norm 'syncbn') for padded inputs.")
        uses_batch = self.training or self.running_mean is None
        check_input(input, self.weight, self.running_mean, self.eps if uses_batch else None, self.num_features)
        if not uses_batch:
            self._note_eval()
            assert self.running_mean is not None
            assert self.running_var is not None
            return self._mix(input, self.running_mean.double(), self.running_var.double())
        group, name = self._group_and_name() if self.training else (None, "eval")
        batch = join(input, self.eps, self.momentum, group, name)
        if self.training:
            batch.move(Running(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum))
        return self._mix(input, *batch.mean_var())

    def shares(self) -> dict[str, dict[str, float]]:
        """Compute p ("mean") and q ("var") by kind of statistics.

        "IN" is left out once the last input in eager mode was ``(N, C)``; a compiled layer does not note its inputs.
        """
        kinds = KINDS[1:] if self._last_dims == 2 else KINDS
        weights = {"mean": self.mean_weight, "var": self.var_weight}
        shares = {name: weight.detach().double()[-len(kinds) :].softmax(0) for name, weight in weights.items()}
        return {name: dict(zip(kinds, values.tolist(), strict=True)) for name, values in shares.items()}

    def _mix(self, x: Tensor, mean_bn: Tensor, var_bn: Tensor) -> Tensor:
        """Normalize ``x``, given the statistics of BN, ``(C,)``; those of IN are ``(N, C)``, all in float64."""
        offset, centred, mean_in, var_in = _moments(x)
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = (var_in + (mean_in - mean_ln).square()).mean(1, keepdim=True)
        has_positions = x.dim() > 2
        mean = _average(self.mean_weight, (mean_in, mean_ln, mean_bn), has_positions)
        var = _average(self.var_weight, (var_in, var_ln, var_bn), has_positions)
        slope = torch.rsqrt(var + self.eps) if self.weight is None else torch.rsqrt(var + self.eps) * self.weight
        constant = (offset - mean) * slope if self.bias is None else (offset - mean) * slope + self.bias
        slope, constant = (t.to(centred.dtype).view(*t.shape, *[1] * (x.dim() - 2)) for t in (slope, constant))
        return (centred * slope + constant).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load, also what the authors' code has saved."""
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor) and value.numel() == self.num_features and value.dim() > 1:
                state_dict[f"{prefix}{name}"] = value.flatten()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def shares_of(model: nn.Module) -> dict[str, dict[str, dict[str, float]]]:
    """Return `SwitchableNorm.shares` of every such layer of ``model``, by name."""
    return {name: layer.shares() for name, layer in model.named_modules() if isinstance(layer, SwitchableNorm)}


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split ``x = offset + centred``, offset ``(N, C)``; return both, and mean and biased variance over positions.

    The offset is the mean as the dtype of ``x`` rounds it, so that what is summed is small; all but ``centred``,
    half types of which are float32, is float64.
    """
    x = x.to(SUM_DTYPE.get(x.dtype, x.dtype))
    rows = x if x.dim() > 2 else x.unsqueeze(2)
    dims, count = list(range(2, rows.dim())), max(rows.shape[2:].numel(), 1)
    offset = rows.detach().sum(dims) / count
    centred = rows - offset.view(*offset.shape, *[1] * len(dims))
    rest, square = centred.sum(dims).double() / count, centred.square().sum(dims).double() / count
    var = (square - rest.square()).clamp(min=0)
    return offset.double(), centred.view(x.shape), offset.double() + rest, var


def _average(weight: Tensor, statistics: tuple[Tensor, Tensor, Tensor], has_positions: bool) -> Tensor:
    """Average the statistics of IN, LN and BN, without positions of LN and BN."""
    first = 0 if has_positions else 1
    shares = weight.double()[first:].softmax(0)
    parts = [share * part for share, part in zip(shares.unbind(), statistics[first:], strict=True)]
    return sum(parts[1:], parts[0])
