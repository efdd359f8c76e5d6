"""A cost model of latency and bandwidth for an exchange, a layer and a step: fitted on gloo, predicted for NCCL.

``t_exchange = overhead + num_messages * (latency + delay) + num_bytes / bandwidth`` and
``t = slowdown * work + sum of its t_exchange``, for a layer as for a step (the alpha-beta model of Hockney 1994 for
collectives, Thakur et al. 2005). Pure functions of numbers: nothing here measures or communicates. Seconds and bytes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls


class Exchange(NamedTuple):
    """One collective: ``"all_reduce"`` or ``"all_gather"``, and the bytes that each rank gives to it."""

    collective: str
    num_bytes: int


class Link(NamedTuple):
    """A network: seconds of every collective, of every message one way, and of every byte that a rank sends."""

    overhead: float
    latency: float
    per_byte: float


class Point(NamedTuple):
    """Something measured without added delay: its exchanges (one for a bare collective), ranks and seconds."""

    exchanges: Sequence[Exchange]
    world_size: int
    seconds: float


def num_messages(collective: str, world_size: int) -> int:
    """Count the messages that follow each other in gloo's rings, each a delay of the network.

    all_gather goes round in ``W - 1`` steps and all_reduce in ``2 (W - 1)``. A step is two messages: the receiver says
    that its memory is ready, then the data comes.
    """
    return {"all_gather": 2, "all_reduce": 4}[collective] * (world_size - 1)


def num_bytes_sent(exchange: Exchange, world_size: int) -> float:
    """Count the bytes that a rank sends: all others' to its neighbour, or twice its part of the sum in pieces."""
    steps = world_size - 1
    return exchange.num_bytes * {"all_gather": steps, "all_reduce": 2 * steps / world_size}[exchange.collective]


def exchange_seconds(exchange: Exchange, world_size: int, link: Link, delay: float = 0.0) -> float:
    """Predict one collective on gloo, ``delay`` seconds one way beside what the link has itself."""
    return (
        link.overhead
        + num_messages(exchange.collective, world_size) * (link.latency + delay)
        + num_bytes_sent(exchange, world_size) * link.per_byte
    )


def seconds(
    work: float, exchanges: Sequence[Exchange], world_size: int, cores: int, link: Link, delay: float = 0.0
) -> float:
    """Predict a layer or a step: its work on this rank, then its exchanges, none of which overlaps with anything."""
    waits = sum(exchange_seconds(exchange, world_size, link, delay) for exchange in exchanges)
    return slowdown(world_size, cores) * work + waits


def slowdown(world_size: int, cores: int) -> float:
    """Tell how much longer work takes where ranks of one thread share cores."""
    return max(1.0, world_size / cores)


def fit_link(points: Sequence[Point]) -> Link:
    """Fit a link to bare collectives: least squares of the relative error, no part below zero."""
    terms = np.array(
        [
            [1.0, num_messages(e.collective, p.world_size), num_bytes_sent(e, p.world_size)]
            for p in points
            for e in p[0]
        ]
    )
    measured = np.array([point.seconds for point in points])
    scale = np.array([1.0, 1.0, 1e-6])  # so that all columns are of one order
    found, _ = nnls(terms * scale / measured[:, None], np.ones(len(points)))
    return Link(*map(float, found * scale))


def fit_work(points: Sequence[Point], cores: int, link: Link) -> float:
    """Fit the work of a layer or a step: least squares of the relative error, not below zero."""
    above = below = 0.0
    for point in points:
        rest = point.seconds - seconds(0.0, point.exchanges, point.world_size, cores, link)
        factor = slowdown(point.world_size, cores)
        above += factor * rest / point.seconds**2
        below += factor**2 / point.seconds**2
    return max(0.0, above / below)


# What NCCL itself assumes to choose an algorithm for small messages (protocol LL): baseLat, hwLat, getNetOverhead in
# its src/graph/tuning.cc, commit b6475625. Half of what travels are flags; NCCL counts on a quarter of the bandwidth.
_RING_BASE, _TREE_BASE = 6.6e-6, 6.8e-6
_NVLINK, _RING_NETWORK, _TREE_NETWORK = 0.6e-6, 2.7e-6, 5.0e-6
_NETWORK_OVERHEAD = 1.0e-6  # of every step of a ring that leaves the node
_NVLINK_BANDWIDTH = 450e9 / 4  # 900 GB/s both ways together: NVLink of the fourth generation, 18 links
_NETWORK_BANDWIDTH = 50e9 / 4  # 400 Gb/s: InfiniBand NDR
DEVICES_PER_NODE = 8


class Nccl(NamedTuple):
    """A predicted all_reduce on GPUs."""

    algorithm: str
    seconds: float


def nccl_all_reduce(num_bytes: int, num_devices: int) -> Nccl:
    """Predict NCCL's all_reduce over nodes of 8 devices: the faster of ring and tree. Measured nowhere here.

    A ring takes ``2 (W - 1)`` steps, of which 2 per node cross the network; a tree goes up and down: ``2 (8 - 1)``
    steps in the node and ``2 log2(nodes)`` between nodes.
    """
    nodes = math.ceil(num_devices / DEVICES_PER_NODE)
    per_node = min(num_devices, DEVICES_PER_NODE)
    steps, crossing = 2 * (num_devices - 1), 2 * nodes if nodes > 1 else 0
    inside = max(_NVLINK, _NETWORK_OVERHEAD) if nodes > 1 else _NVLINK
    ring = _RING_BASE + (steps - crossing) * inside + crossing * _RING_NETWORK
    tree = _TREE_BASE + 2 * ((per_node - 1) * _NVLINK + int(math.log2(nodes)) * _TREE_NETWORK)
    bandwidth = _NETWORK_BANDWIDTH if nodes > 1 else _NVLINK_BANDWIDTH
    name, latency = min((("ring", ring), ("tree", tree)), key=lambda pair: pair[1])
    return Nccl(name, latency + 2 * num_bytes / bandwidth)


def layer_on_gpus(num_features: int, num_devices: int) -> float:
    """Predict what the exchanges of one layer take: 2C + 1 float64 numbers forward, 2C backward."""
    return sum(nccl_all_reduce(8 * n, num_devices).seconds for n in (2 * num_features + 1, 2 * num_features))


def resnet50_on_gpus(num_devices: int) -> float:
    """Predict what the 106 exchanges of a ResNet-50's 53 layers take."""
    channels = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        channels += [width, width, 4 * width] * blocks + [4 * width]
    return sum(layer_on_gpus(num_features, num_devices) for num_features in channels)
