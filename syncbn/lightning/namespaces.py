"""The classes of Lightning, of both namespaces at once: `lightning.pytorch` and `pytorch_lightning`.

Each holds the same code under another name, and the Trainer of one refuses the classes of the other. What is derived
from the classes here is of every namespace that is installed, whatever is imported first. The second import costs a
tenth of a second, since both share what they depend on.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

NAMES = ("lightning.pytorch", "pytorch_lightning")


def _import_all() -> list[Any]:
    """Import every namespace that is installed and works.

    Raises:
        ModuleNotFoundError: If none is installed.
        ImportError: If what is installed cannot be imported; the first reason is the cause.
    """
    found, reasons = [], []
    for name in NAMES:
        try:
            namespace = import_module(name)
            for part in ("plugins", "utilities.seed"):
                import_module(f"{name}.{part}")
            found.append(namespace)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0])
            reasons += [] if missing else [error]
    if found:
        return found
    advice = "expected Lightning 2.4 or later, as lightning or pytorch_lightning; pip install 'syncbn[lightning]'"
    if reasons:
        raise ImportError(f"syncbn.lightning: {advice}; the one installed cannot be imported.") from reasons[0]
    raise ModuleNotFoundError(f"syncbn.lightning: {advice}; neither is installed.", name="lightning")


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins import LayerSync
    from lightning.pytorch.utilities.seed import isolate_rng

    MODULES: tuple[type[LightningModule], ...]
else:
    _all = _import_all()
    Trainer, LightningModule = _all[0].Trainer, _all[0].LightningModule  # in annotations alone
    MODULES = tuple(namespace.LightningModule for namespace in _all)
    isolate_rng = _all[0].utilities.seed.isolate_rng

    class Callback(*(namespace.Callback for namespace in _all)):
        """A callback of every namespace."""

    class LayerSync(*(namespace.plugins.LayerSync for namespace in _all)):
        """A layer-sync plugin of every namespace."""


__all__ = ["MODULES", "Callback", "LayerSync", "LightningModule", "Trainer", "isolate_rng"]
