"""Convert the model of a Lightning project, by a callback or by Lightning's plugin; give it precise statistics.

The callback converts after ``configure_model`` has built the last layers, and before the checkpoint is restored, the
strategy wraps and the optimizers are made. Lightning's layer-sync hook, which the plugin uses, comes after the restore
and only in DDP and FSDP fits: too late for norms with other keys than BatchNorm's.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import MethodType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader

from .conversion.convert import convert, plan, revert
from .conversion.norms import Norm
from .conversion.swap import original_of
from .distributed.groups import ProcessGroupLike
from .statistics.precise import run_first, update_bn_stats


class NormConverter(Callback):
    """Convert the BatchNorm layers of the LightningModule, in every stage and strategy; arguments as `syncbn.convert`.

    Layers built in ``__init__``, ``setup`` and ``configure_model`` are all found. The model stays converted after the
    stage (`syncbn.revert`). Several converters work in their order. Collectives: those of `syncbn.convert`, where the
    process group exists. In Hydra a norm of your own is ``norm: {_target_: mypackage.MyNorm, _partial_: true}``.

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
        pl_module.__dict__.setdefault("_syncbn_converters", []).append(self)
        pl_module.configure_model = MethodType(configure_model, pl_module)  # type: ignore[method-assign]


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


class PreciseStatistics(Callback):
    """Give the BatchNorm layers population statistics, `syncbn.update_bn_stats`, whenever a fit looks at them.

    In a fit only: before each validation, and at the end of an epoch if training went on after the last validation.
    Validation, and what ModelCheckpoint writes then, hold precise statistics; the weights are those of a fit without.

    The batches are the first of a copy of the training DataLoader, in this epoch's order where the sampler has one,
    and go through the module's hooks and the trainer's precision as in training; random states are put back, the
    sampler's too (not those that a dataset keeps in the main process).

    Collectives: those of `syncbn.update_bn_stats`; every rank needs equally many batches.

    Args:
        num_batches: Training batches of each rank, at most those of an epoch.
        forward: Called as ``forward(pl_module, batch)``; by default the module runs on the batch or its first item.

    Raises a ValueError at construction for a ``num_batches`` below 1; in the fit, if the training data is not one
    DataLoader; see also `syncbn.update_bn_stats`. Source: Wu & Johnson 2021, section 3.
    """

    def __init__(self, num_batches: int = 200, *, forward: Callable[..., Any] | None = None) -> None:
        if isinstance(num_batches, bool) or not isinstance(num_batches, int) or num_batches < 1:
            raise ValueError(f"num_batches: expected a whole number of at least 1, got {num_batches!r}.")
        self.num_batches, self.forward = num_batches, forward or run_first
        self._is_precise = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse other data than one DataLoader before the first step."""
        _train_loader(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember that the statistics move on."""
        self._is_precise = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update before a validation inside a fit."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        modes = [(module, module.training) for module in pl_module.modules()]
        trainer.fit_loop.epoch_loop.val_loop._module_mode.restore(pl_module)  # those of training
        trainer.training = True  # for hooks that ask
        try:
            self._update(trainer, pl_module)
        finally:
            trainer.validating = True
            for module, mode in modes:
                module.training = mode

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update after an epoch that ends without validation; ModelCheckpoint saves after this."""
        if not self._is_precise:
            self._update(trainer, pl_module)

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def batches() -> Iterator[Any]:
            num_batches = int(min(self.num_batches, trainer.num_training_batches))
            for batch in islice(_copy_of(_train_loader(trainer)), num_batches):
                converted = trainer.precision_plugin.convert_input(batch)
                prepared = pl_module._on_before_batch_transfer(converted)
                yield trainer.strategy.batch_to_device(prepared)

        def forward(module: LightningModule, batch: Any) -> None:
            with trainer.precision_plugin.train_step_context():
                self.forward(module, batch)

        with isolate_rng():
            update_bn_stats(pl_module, batches(), forward=forward)
        self._is_precise = True


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


def _train_loader(trainer: Trainer) -> DataLoader[Any]:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"PreciseStatistics: expected the training data in one torch DataLoader, got {type(loader).__name__}; "
            "for other data call syncbn.update_bn_stats yourself, say in on_train_epoch_end."
        )
    return loader


def _copy_of(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Copy a DataLoader but for its dataset: workers, samplers and generator of the running one do not notice."""
    own, dataset = copy.copy(loader), {id(loader.dataset): loader.dataset}
    for name in ("sampler", "batch_sampler", "generator"):
        own.__dict__[name] = copy.deepcopy(loader.__dict__[name], dataset)
    own.__dict__.update(_iterator=None, persistent_workers=False)
    return own
