"""Synchronize BatchNorm over processes: any split of the batch, one answer."""

from . import functional
from .batchnorm import SyncBatchNorm
from .convert import convert, plan, revert
from .freeze import freeze, unfreeze
from .rules import PlanRow, register

__version__ = "0.1.0"

__all__ = [
    "PlanRow",
    "SyncBatchNorm",
    "convert",
    "freeze",
    "functional",
    "plan",
    "register",
    "revert",
    "unfreeze",
]
