"""Convert the model of a Lightning project: one callback, or Lightning's own plugin for what sync_batchnorm=True does.

The callback converts at the one right moment: after ``configure_model`` has built the last layers, and before the
checkpoint is restored, the strategy wraps and the optimizers are made. Lightning's layer-sync hook, which the plugin
uses, comes after the restore and only in DDP and FSDP fits: early enough for SyncBatchNorm, whose keys are
BatchNorm's, too late for norms with other keys.
"""

from collections.abc import Iterable
from types import MethodType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import LayerSync
from torch import nn

from .collectives import ProcessGroupLike
from .convert import convert, plan, revert
from .swap import original_of


class NormConverter(Callback):
    """Convert the BatchNorm layers of the LightningModule, in every stage and strategy; arguments as `syncbn.convert`.

    Layers built in ``__init__``, ``setup`` and ``configure_model`` are all found. The model stays converted after the
    stage; `syncbn.revert` gives the original back. Several converters work in their order. Collectives: those of
    `syncbn.convert`, where the process group exists, as in DDP.

    Raises:
        ValueError: At construction for an unknown norm or unusable arguments; in setup, if ``Trainer`` has
            ``sync_batchnorm=True`` too; when converting, as `syncbn.convert`.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormConverter("gn", num_groups=8)], accelerator="cpu", logger=False,
        ...                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    """

    def __init__(
        self,
        norm: str = "syncbn",
        *,
        process_group: ProcessGroupLike = None,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        **norm_kwargs: Any,
    ) -> None:
        self.norm = norm
        self.options = {"process_group": process_group, "include": include, "exclude": exclude, **norm_kwargs}
        plan(nn.Identity(), norm, **self.options)  # errors in the arguments now, not after the data has loaded

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let ``configure_model`` convert what it has built."""
        _refuse_second_converter(trainer)
        pl_module.__dict__.setdefault("_syncbn_converters", []).append(self)
        pl_module.configure_model = MethodType(configure_model, pl_module)  # type: ignore[method-assign]


class SyncBatchNormLayerSync(LayerSync):
    """Do what ``Trainer(sync_batchnorm=True)`` does, with this layer: on CPU too, and reverted exactly after the fit.

    Lightning calls it in fits of the DDP and FSDP strategies only; elsewhere it does nothing.

    Args:
        process_group: Ranks that share statistics, as in `syncbn.SyncBatchNorm`.
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


# A function of the module level that removes itself, bound to the module: unlike a closure it acts on the right module
# after deepcopy, and pickles. Its name is what Lightning looks up.
def configure_model(self: LightningModule) -> None:
    """Build the model as the LightningModule does, then convert it."""
    del self.configure_model
    converters: list[NormConverter] = self.__dict__.pop("_syncbn_converters")
    self.configure_model()
    for converter in converters:
        convert(self, converter.norm, **converter.options)


def _refuse_second_converter(trainer: Trainer) -> None:
    """Refuse Lightning's own conversion beside ours: torch's converter would silently replace our layers."""
    holders = (trainer.strategy, trainer._accelerator_connector)
    if any(getattr(holder, "_layer_sync", None) is not None for holder in holders):
        raise ValueError(
            "NormConverter and Trainer(sync_batchnorm=True) both convert the BatchNorm layers, and torch's converter "
            "would replace ours: drop sync_batchnorm=True (or, to keep Lightning's hook, drop the callback and use "
            "plugins=[SyncBatchNormLayerSync()])."
        )
