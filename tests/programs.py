"""Programs: what users do with one or two layers, as plain data, and the tensors that go in.

A `Program` says everything about a case, so that it prints, shrinks and runs again. `machines.py` runs it on ranks,
`differences.py` on one process, and compares.
"""

import zlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Norm:
    """One layer; ``converted``: made as nn.BatchNorm*d and converted."""

    num_features: int = 1
    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    bias: bool = True
    track_running_stats: bool = True
    converted: bool = False

    @property
    def options(self):
        options = {"eps": self.eps, "momentum": self.momentum, "affine": self.affine, "bias": self.bias}
        return {**options, "track_running_stats": self.track_running_stats}


@dataclass(frozen=True)
class Forward:
    """A call of every layer: ``sizes`` are the images of each rank."""

    sizes: tuple[int, ...]
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    mode: str = "grad"
    requires_grad: bool = True


@dataclass(frozen=True)
class Do:
    """Anything but a call: a method of `Machine`."""

    what: str


@dataclass(frozen=True)
class Program:
    """``group``: None, an int, "node", ``("mesh", size)``, or one label per rank for a ProcessGroup of equal ones."""

    norms: tuple[Norm, ...]
    steps: tuple[Forward | Do, ...]
    tail: tuple[int, ...] = ()
    uneven_maps: bool = False
    group: int | str | tuple | None = None
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64)  # of inputs, of parameters
    mean: float = 0.5
    std: float = 1.0
    kernels: tuple[tuple[str, str], ...] = ()  # of each rank, forward and backward
    seed: int = 0

    @property
    def dtype(self):
        return self.dtypes[0]

    @property
    def param_dtype(self):
        return self.dtypes[1]

    def shape(self, step, layer, rank):
        tail = (self.tail[0] + rank % 2, *self.tail[1:]) if self.uneven_maps and self.tail else self.tail
        return (self.steps[step].sizes[rank], self.norms[layer].num_features, *tail)

    def parts(self, world_size):
        """Return the ranks of each group."""
        group, everyone = self.group, list(range(world_size))
        if isinstance(group, tuple) and group[0] == "mesh":
            group = group[1]
        if isinstance(group, tuple):
            return [[r for r in everyone if group[r] == label] for label in sorted(set(group))]
        return [everyone[i : i + group] for i in range(0, world_size, group)] if isinstance(group, int) else [everyone]


def draw(program, what, *where):
    """Return a generator of its own for each tensor, the same on every rank and in the truth."""
    return torch.Generator().manual_seed(zlib.crc32(repr((program.seed, what, *where)).encode()))


def lay_out(values, layout):
    """Give ``values`` another memory layout; "expanded" repeats the first image."""
    if layout == "channels_last" and values.dim() > 3:
        return values.contiguous(memory_format=[torch.channels_last, torch.channels_last_3d][values.dim() - 4])
    if layout == "permuted":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and len(values):
        return values[:1].expand_as(values)
    if layout == "offset":
        return torch.cat([values[:1], values])[len(values[:1]) :]
    if layout == "sliced":
        return torch.cat([values, values], dim=1)[:, : values.shape[1]]
    return values.contiguous()
