"""Synchronize BatchNorm over processes: any split of the batch, one answer."""

from . import compat as compat  # first: it refuses a torch that is too old
from . import debug, functional
from .audit import Audit, AuditRow, audit
from .conversion.classes import register
from .conversion.companions import PlanRow
from .conversion.convert import convert, plan, revert
from .conversion.norms.blocks import register_block
from .conversion.norms.initialize import initialize_weight_norm
from .folding.fold import fold
from .memory.save import save_memory
from .nn.batchnorm import SyncBatchNorm
from .nn.ghost import GhostBatchNorm
from .nn.renorm import BatchRenorm
from .nn.switchable import SwitchableNorm
from .ops.backends import use_kernels
from .statistics.average import average_bn_stats
from .statistics.freeze import freeze, unfreeze
from .statistics.precise import update_bn_stats

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "AuditRow",
    "BatchRenorm",
    "GhostBatchNorm",
    "PlanRow",
    "SwitchableNorm",
    "SyncBatchNorm",
    "audit",
    "average_bn_stats",
    "convert",
    "debug",
    "fold",
    "freeze",
    "functional",
    "initialize_weight_norm",
    "plan",
    "register",
    "register_block",
    "revert",
    "save_memory",
    "unfreeze",
    "update_bn_stats",
    "use_kernels",
]
