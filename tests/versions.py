"""What tests need to know of the version of torch."""

import pytest
import torch

from syncbn import compat

IS_DEVELOPMENT = torch.__version__.startswith("2.14.")  # the pinned version, where every package is there

VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])
SHARDS_ON_CPU = pytest.mark.skipif(VERSION < (2, 7), reason="torch 2.6 has no fully_shard for the CPU")
# torch 2.6 repeats the exchanges of the forward graph in the backward graph and throws the results away.
GRAPH_REPEATS_EXCHANGES = VERSION < (2, 7)

# Keyword arguments of DistributedDataParallel, as parameters of a test.
ONE_COPY_OF_BUFFERS = pytest.param(
    {"forward_sync_buffers": False},
    marks=pytest.mark.skipif(
        not compat.HAS_FORWARD_SYNC_BUFFERS, reason="DDP has no forward_sync_buffers before torch 2.13"
    ),
)

# What other versions of other packages may say; our own code is checked with the pins.
MAY_WARN = [f"ignore::{name}" for name in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")]
MAY_WARN.append("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")


def torch_norm(cls, *args, bias=True, **options):
    """Make one of torch's layers, with or without ``bias``, which is a keyword from torch 2.13 on."""
    layer = cls(*args, **options)
    if not bias:
        layer.register_parameter("bias", None)
    return layer
