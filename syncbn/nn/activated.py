"""SyncBatchNorm for fused layers: normalization, then dropout and activation."""

from torch import Tensor

from .batchnorm import SyncBatchNorm


class SyncBatchNormAct(SyncBatchNorm):
    """SyncBatchNorm followed by ``drop`` and ``act``, what timm's fused BatchNormAct2d becomes."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, then drop and activate."""
        y: Tensor = self.act(self.drop(super().forward(input)))  # type: ignore[operator]
        return y
