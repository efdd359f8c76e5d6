"""What tests need to know of the version of torch."""

import warnings

import pytest
import torch

from syncbn.compat import HAS_FORWARD_SYNC_BUFFERS

IS_DEVELOPMENT = torch.__version__.startswith("2.14.")  # the pinned version, where every package is there

VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])
SHARDS_ON_CPU = pytest.mark.skipif(VERSION < (2, 7), reason="torch 2.6 has no fully_shard for the CPU")
# torch 2.6 repeats the exchanges of the forward graph in the backward graph and throws the results away.
GRAPH_REPEATS_EXCHANGES = VERSION < (2, 7)

# Keyword arguments of DistributedDataParallel, as parameters of a test.
ONE_COPY_OF_BUFFERS = pytest.param(
    {"forward_sync_buffers": False},
    marks=pytest.mark.skipif(not HAS_FORWARD_SYNC_BUFFERS, reason="DDP has no forward_sync_buffers before torch 2.13"),
)


def ignore_deprecations():
    """Let other versions of other packages say what will change in them; our own code is checked with the pins."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)


def torch_norm(cls, *args, bias=True, **options):
    """Make one of torch's layers, with or without ``bias``, which is a keyword from torch 2.13 on."""
    layer = cls(*args, **options)
    if not bias:
        layer.register_parameter("bias", None)
    return layer
