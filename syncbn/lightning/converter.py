"""Convert the model of a Lightning project by a callback, in every stage and strategy.

The callback converts after ``configure_model`` has built the last layers, and before the checkpoint is restored, the
strategy wraps and the optimizers are made. Lightning's layer-sync hook, which the plugin uses, comes after the restore
and only in DDP and FSDP fits: too late for norms with other keys than BatchNorm's.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..conversion.convert import plan
from ..conversion.norms.registry import Norm
from ..distributed.groups import ProcessGroupLike
from .hooks import forget, wait
from .namespaces import Callback, LightningModule, Trainer


class NormConverter(Callback):
    """Convert the BatchNorm layers of the LightningModule, in every stage and strategy; arguments as `syncbn.convert`.

    Layers built in ``__init__``, ``setup`` and ``configure_model`` are all found. The model stays converted after the
    stage (`syncbn.revert`). Several converters work in their order. Collectives: those of `syncbn.convert`, where the
    process group exists. In Hydra a norm of your own is ``norm: {_target_: mypackage.MyNorm, _partial_: true}``.

    Averages of the model that other callbacks make in ``setup`` are converted too, in any order of the callbacks:
    WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging, and a ``torch.optim.swa_utils.AveragedModel`` in an
    attribute of a callback. A callback that copies the model by other means does so in ``on_fit_start`` or later, when
    the model is converted.

    Raises:
        ValueError: At construction for an unknown norm or unusable arguments; in setup, if ``Trainer`` has
            ``sync_batchnorm=True`` too; as `syncbn.convert`.

    Examples:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormConverter("gn", num_groups=8)], accelerator="cpu", logger=False,
        ...                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    """

    def __init__(
        self,
        norm: Norm = "syncbn",
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
        wait(trainer, pl_module, self.norm, self.options)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind in the module for its next trainer."""
        forget(pl_module)


def _refuse_second_converter(trainer: Trainer) -> None:
    """Refuse Lightning's own conversion beside ours: torch's converter would silently replace our layers."""
    holders = (trainer.strategy, trainer._accelerator_connector)
    if any(getattr(holder, "_layer_sync", None) is not None for holder in holders):
        raise ValueError(
            "NormConverter and Trainer(sync_batchnorm=True) both convert the BatchNorm layers, and torch's converter "
            "would replace ours: drop sync_batchnorm=True (or, to keep Lightning's hook, drop the callback and use "
            "plugins=[SyncBatchNormLayerSync()])."
        )
