"""Settings as they were saved with earlier results, in the form in which they are compared with those of now."""

from collections.abc import Mapping
from typing import Any

MOVED = {  # modules named by `_target_` in results made before the experiments left the library
    "syncbn.experiment.nets": "experiment.training.models.classifiers",
    "syncbn.experiment.unet": "experiment.training.models.unet",
    "syncbn.experiment.sources": "experiment.training.datasets.sources",
    "syncbn.experiment.task": "experiment.training.task",
    "syncbn.experiment.segmentation": "experiment.training.segmentation",
}


def flatten(settings: Any, name: str = "") -> dict[str, Any]:
    """Map the dotted name of each setting to its value.

    >>> flatten({"model": {"_target_": "syncbn.experiment.nets.ResNet8", "width": 16}})
    {'model._target_': 'experiment.training.models.classifiers.ResNet8', 'model.width': 16}
    """
    if isinstance(settings, Mapping) and settings:
        nested = (flatten(value, f"{name}.{key}" if name else str(key)) for key, value in settings.items())
        return {key: value for leaves in nested for key, value in leaves.items()}
    if name.endswith("_target_"):
        module, _, attribute = str(settings).rpartition(".")
        settings = f"{MOVED.get(module, module)}.{attribute}"
    return {name: settings}
