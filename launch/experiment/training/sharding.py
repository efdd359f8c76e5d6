"""How a batch is shared over the ranks: the sizes of one optimizer step, and which images each rank reads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler


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

    def deal(self, order: Tensor, rank: int | None) -> list[list[int]]:
        """Distribute image indices in complete batches of all ranks; the rest at the end is dropped.

        Args:
            order: Indices; batch m of all ranks is `order[m * P : (m + 1) * P]`, P = per_rank * world_size, of which
                rank r gets the r-th part.
            rank: The rank whose batches to return; None for those of all ranks and accumulated batches joined, in
                the same order.
        """
        share = self.per_rank_batch_size * self.world_size
        whole = order[: len(order) // share * share]
        if rank is None:
            starts = range(0, len(whole), self.global_batch_size)
            return [whole[start : start + self.global_batch_size].tolist() for start in starts]
        mine: list[list[int]] = whole.view(-1, self.world_size, self.per_rank_batch_size)[:, rank].tolist()
        return mine


def plan_batches(
    world_size: int, *, global_batch_size: int = 32, per_rank_batch_size: int | None = None, accumulate: int = 1
) -> BatchPlan:
    """Compute the sizes from `per_rank_batch_size` if it is given, else by dividing the global batch.

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


class Draw(NamedTuple):
    """Images of one batch, and the seed of their augmentation, which does not depend on the rank."""

    indices: list[int]
    seed: int


class TrainBatches(Sampler[Draw]):
    """Distribute each epoch's shuffled indices over the ranks; every rank gets equally many full batches.

    Step s reads the same images at any world size: `order[s * global:(s + 1) * global]`, in the parts of
    `BatchPlan.deal`. What does not fill a step at the end of an epoch is left out.

    Raises:
        ValueError: fewer images than one step needs.
    """

    def __init__(self, num_images: int, plan: BatchPlan, rank: int | None = 0, seed: int = 0) -> None:
        if num_images < plan.global_batch_size:
            raise ValueError(
                f"expected at least one step of {plan.global_batch_size} training images, got {num_images}: "
                "lower data.global_batch_size or data.per_rank_batch_size"
            )
        self.num_images, self.plan, self.rank, self.seed, self.epoch = num_images, plan, rank, seed, 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle; Lightning calls it before each epoch."""
        self.epoch = epoch

    def resume(self, epoch: int, start: int) -> None:
        """Start the next iteration at batch `start` of `epoch`; later ones start at 0."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Count this rank's batches in one epoch: steps times accumulated batches, which are one if joined."""
        return self.num_images // self.plan.global_batch_size * (1 if self.rank is None else self.plan.accumulate)

    def __iter__(self) -> Iterator[Draw]:
        """Yield this rank's batches; Lightning may choose the epoch after this call, before the first batch."""
        seed = self.seed * 1_000_003 + self.epoch
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(seed))
        used = order[: self.num_images // self.plan.global_batch_size * self.plan.global_batch_size]
        start, self.start = self.start, 0
        yield from (Draw(indices, seed) for indices in self.plan.deal(used, self.rank)[start:])


class FixedBatches(Sampler[Draw]):
    """Serve given batches, the same each time."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Draw]:
        """Yield the batches."""
        return (Draw(batch, 0) for batch in self.batches)


def eval_batches(indices: Sequence[int], batch_size: int, rank: int = 0, world_size: int = 1) -> FixedBatches:
    """Assign every index to exactly one rank, in order; a rank without any gets one empty list.

    Nothing is padded or read twice, so ranks may have different numbers of batches. The empty list lets every rank
    reach the collectives of the metrics at the end.
    """
    mine = list(indices[rank::world_size])
    return FixedBatches([mine[i : i + batch_size] for i in range(0, len(mine), batch_size)] or [[]])
