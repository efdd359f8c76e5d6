"""Synchronize BatchNorm over processes: any split of the batch, one answer."""

from . import compat as compat  # first: it refuses a torch that is too old
from . import debug, functional
from .audit import Audit, AuditRow, audit
from .conversion.classes import register
from .conversion.convert import convert, plan, revert
from .conversion.fold import fold
from .conversion.rules import PlanRow
from .nn.batchnorm import SyncBatchNorm
from .nn.ghost import GhostBatchNorm
from .ops.backends import use_kernels
from .statistics.average import average_bn_stats
from .statistics.freeze import freeze, unfreeze
from .statistics.precise import update_bn_stats

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "AuditRow",
    "GhostBatchNorm",
    "PlanRow",
    "SyncBatchNorm",
    "audit",
    "average_bn_stats",
    "convert",
    "debug",
    "fold",
    "freeze",
    "functional",
    "plan",
    "register",
    "revert",
    "unfreeze",
    "update_bn_stats",
    "use_kernels",
]
