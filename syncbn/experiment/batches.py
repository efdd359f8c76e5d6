"""How a batch is shared out: the world torchrun made, the sizes of a step, and which images each rank reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


@dataclass(frozen=True)
class World:
    """Hold the place of this process among all, as torchrun put it into the environment."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    by_torchrun: bool = False

    @classmethod
    def from_env(cls) -> World:
        """Read torchrun's variables; without them this is the only process.

        Raises:
            ValueError: the nodes do not hold equally many processes.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        rank, size, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if size % local:
            raise ValueError(
                f"expected as many processes on every node, got {local} here and {size} in all: "
                "give every node's torchrun the same --nproc-per-node"
            )
        return cls(rank, size, local, by_torchrun=True)

    @property
    def num_nodes(self) -> int:
        """Count the nodes."""
        return self.world_size // self.local_world_size


@dataclass(frozen=True)
class BatchPlan:
    """Hold the sizes of one optimizer step, in images: `global = per_rank * world_size * accumulate`."""

    per_rank_batch_size: int
    world_size: int = 1
    accumulate: int = 1

    @property
    def global_batch_size(self) -> int:
        """Count the images of one optimizer step over all ranks."""
        return self.per_rank_batch_size * self.world_size * self.accumulate


def plan_batches(
    world_size: int, *, global_batch_size: int = 32, per_rank_batch_size: int | None = None, accumulate: int = 1
) -> BatchPlan:
    """Settle the sizes: a given `per_rank_batch_size` decides, else the global batch is shared out.

    Raises:
        ValueError: a size below 1, or a global batch that does not divide; the message lists sizes that do.

    >>> plan_batches(2)
    BatchPlan(per_rank_batch_size=16, world_size=2, accumulate=1)
    >>> plan_batches(4, per_rank_batch_size=2).global_batch_size
    8
    """
    sizes = {"global_batch_size": global_batch_size, "accumulate": accumulate}
    if per_rank_batch_size is not None:
        sizes["per_rank_batch_size"] = per_rank_batch_size
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"expected data.{name} to be a whole number of at least 1, got {size!r}")
    if per_rank_batch_size is None:
        per_rank_batch_size, rest = divmod(global_batch_size, world_size * accumulate)
        if rest or not per_rank_batch_size:
            share = world_size * accumulate
            choices = sorted({max(1, per_rank_batch_size) * share, (per_rank_batch_size + 1) * share})
            raise ValueError(
                f"data.global_batch_size={global_batch_size} does not divide over {world_size} ranks x "
                f"{accumulate} accumulated batches: choose data.global_batch_size="
                f"{' or '.join(map(str, choices))}, or set data.per_rank_batch_size"
            )
    return BatchPlan(per_rank_batch_size, world_size, accumulate)


class TrainBatches(Sampler[list[int]]):
    """Deal each epoch's shuffled indices to the ranks; every rank gets equally many full batches.

    Step s reads the same images at any world size: `order[s * global:(s + 1) * global]`, of which micro-batch m
    gives rank r its r-th part. What does not fill a step at the end of an epoch is left out.

    Raises:
        ValueError: fewer images than one step needs.
    """

    def __init__(self, num_images: int, plan: BatchPlan, rank: int = 0, seed: int = 0) -> None:
        if num_images < plan.global_batch_size:
            raise ValueError(
                f"expected at least one step of {plan.global_batch_size} training images, got {num_images}: "
                "lower data.global_batch_size or data.per_rank_batch_size"
            )
        self.num_images, self.plan, self.rank, self.seed, self.epoch = num_images, plan, rank, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle; Lightning calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count this rank's batches in one epoch: steps times accumulated batches."""
        return self.num_images // self.plan.global_batch_size * self.plan.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's index lists, `per_rank_batch_size` long."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_images, generator=generator)
        micro = order[: len(self) * self.plan.per_rank_batch_size * self.plan.world_size]
        mine = micro.view(len(self), self.plan.world_size, self.plan.per_rank_batch_size)[:, self.rank]
        yield from mine.tolist()


class EvalBatches(Sampler[list[int]]):
    """Deal every index to exactly one rank, in order; a rank left without any yields one empty list.

    Nothing is padded or read twice, so ranks may end after different numbers of batches. The empty list lets every
    rank reach the metrics' exchange at the end.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        mine = list(indices[rank::world_size])
        self.batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)] or [[]]

    def __len__(self) -> int:
        """Count this rank's batches, at least 1."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's index lists."""
        return iter(self.batches)
