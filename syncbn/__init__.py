"""Synchronize BatchNorm over processes: any split of the batch, one answer."""

from . import compat as compat  # first: it refuses a torch that is too old
from . import debug, functional
from .audit import Audit, AuditRow, audit
from .batchnorm import SyncBatchNorm
from .coalesce import coalesce
from .convert import convert, plan, revert
from .freeze import freeze, unfreeze
from .ghost import GhostBatchNorm
from .kernels import use_kernels
from .precise import average_bn_stats, update_bn_stats
from .rules import PlanRow, register

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "AuditRow",
    "GhostBatchNorm",
    "PlanRow",
    "SyncBatchNorm",
    "audit",
    "average_bn_stats",
    "coalesce",
    "convert",
    "debug",
    "freeze",
    "functional",
    "plan",
    "register",
    "revert",
    "unfreeze",
    "update_bn_stats",
    "use_kernels",
]
