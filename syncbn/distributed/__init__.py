"""The only room that calls torch.distributed: one exchange, and which ranks take part in it."""

from .exchange import Exchange, all_reduce, gather_limit
from .groups import GroupSpec, ProcessGroupLike, check_size, make_groups

__all__ = ["Exchange", "GroupSpec", "ProcessGroupLike", "all_reduce", "check_size", "gather_limit", "make_groups"]
