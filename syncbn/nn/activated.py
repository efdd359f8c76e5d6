"""SyncBatchNorm for fused layers: normalization, then dropout and activation."""

import torch
from torch import Tensor

from ..plain.mask import weights_of
from .batchnorm import SyncBatchNorm


class SyncBatchNormAct(SyncBatchNorm):
    """SyncBatchNorm followed by ``drop`` and ``act``, if it has them: what timm's fused BatchNormAct2d becomes."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize, then drop and activate; where ``mask`` is False the output is 0 all the same."""
        y = super().forward(input, mask)
        for module in (self._modules.get("drop"), self._modules.get("act")):
            y = y if module is None else module(y)
        return y if mask is None else torch.where(weights_of(mask, y).padding, 0, y)
