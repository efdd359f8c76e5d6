"""Callbacks and a plugin for Lightning: convert the model of a project, give it precise statistics.

They belong to both namespaces, `lightning` and `pytorch_lightning`, where both are installed: a Trainer of either
takes them.
"""

from .converter import NormConverter
from .layer_sync import SyncBatchNormLayerSync
from .precise import PreciseStatistics

__all__ = ["NormConverter", "PreciseStatistics", "SyncBatchNormLayerSync"]
