"""Give the model of a Lightning project precise statistics, whenever a fit looks at them."""

import copy
import inspect
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..statistics.precise import first_of, run_first, update_bn_stats
from .namespaces import MODULES, Callback, LightningModule, Trainer, isolate_rng


class PreciseStatistics(Callback):
    """Give the BatchNorm layers population statistics, `syncbn.update_bn_stats`, whenever a fit looks at them.

    In a fit only: before each validation, and at the end of an epoch if training went on after the last validation.
    Validation, and what ModelCheckpoint writes then, hold precise statistics; the weights are those of a fit without.
    Listed after WeightAveraging or EMAWeightAveraging, it gives each validation those of the averaged weights.

    The batches are the first of a copy of the training DataLoader, in this epoch's order where the sampler has one,
    and go through the module's hooks and the trainer's precision as in training; random states are put back, the
    sampler's too (not those that a dataset keeps in the main process).

    Collectives: those of `syncbn.update_bn_stats`; every rank needs equally many batches.

    Args:
        num_batches: Training batches of each rank, at most those of an epoch.
        forward: Called as ``forward(pl_module, batch)``; by default the module runs on the batch or its first item.

    Raises a ValueError at construction for a ``num_batches`` below 1; before the first step, if the training data is
    not one DataLoader, and, without ``forward``, if the module has no ``forward`` of one argument or the batch is no
    tensor, tuple or list; see also `syncbn.update_bn_stats`. Source: Wu & Johnson 2021, section 3.
    """

    def __init__(self, num_batches: int = 200, *, forward: Callable[..., Any] | None = None) -> None:
        if isinstance(num_batches, bool) or not isinstance(num_batches, int) or num_batches < 1:
            raise ValueError(f"num_batches: expected a whole number of at least 1, got {num_batches!r}.")
        self.num_batches, self.forward = num_batches, forward or run_first
        self._is_precise = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that does not run on the input alone, before the sanity check."""
        if self.forward is run_first:
            _check_forward(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse other data than one DataLoader before the first step."""
        _train_loader(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember that the statistics move on; refuse a batch without an input before it is trained on."""
        if self.forward is run_first:
            first_of(batch)
        self._is_precise = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update before a validation inside a fit, when averaged weights have been swapped in."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
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


def _check_forward(module: LightningModule) -> None:
    """Refuse a module whose ``forward`` is missing or wants other arguments than the first item of a batch."""
    forward = module.forward
    reason = ""
    if getattr(forward, "__func__", None) in [nn.Module.forward, *(cls.forward for cls in MODULES)]:
        reason = "has none"
    else:
        try:
            inspect.getcallargs(forward, None)
        except TypeError as error:
            reason = f"is called with the first item of a batch alone: {error}"
        except ValueError:  # a forward without a signature
            return
    if reason:
        raise ValueError(
            f"PreciseStatistics runs {type(module).__name__}.forward, which {reason}; say how the model runs on a "
            "batch: PreciseStatistics(forward=lambda module, batch: module.net(batch[0]))."
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
