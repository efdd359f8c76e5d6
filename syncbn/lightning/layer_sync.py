"""The plugin for Lightning's own layer-sync hook: what ``Trainer(sync_batchnorm=True)`` does, with this layer."""

from torch import nn

from ..conversion.convert import convert, revert
from ..conversion.original import original_of
from ..distributed.groups import ProcessGroupLike
from .namespaces import LayerSync


class SyncBatchNormLayerSync(LayerSync):
    """Do what ``Trainer(sync_batchnorm=True)`` does, with this layer: on CPU too, and reverted exactly after the fit.

    Lightning calls it in fits of the DDP and FSDP strategies only; elsewhere it does nothing. ``process_group``: see
    `syncbn.SyncBatchNorm`.
    """

    def __init__(self, process_group: ProcessGroupLike = None) -> None:
        self.process_group = process_group
        self._converted: list[nn.Module] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert every BatchNorm layer."""
        before = [layer for layer in model.modules() if original_of(layer) is None]
        convert(model, process_group=self.process_group)
        self._converted = [layer for layer in before if original_of(layer) is not None]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Give back the layers that `apply` converted; what was converted before stays."""
        for layer in self._converted:
            revert(layer)
        self._converted = []
        return model
