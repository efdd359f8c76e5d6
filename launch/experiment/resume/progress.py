"""Training progress in epochs and optimizer steps, and the same progress with other batch sizes or ranks."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiment.training.sharding import BatchPlan


@dataclass(frozen=True)
class Progress:
    """Hold the training progress between two optimizer steps, and what determines the order of the data.

    Args:
        plan: Batch sizes.
        num_images: Of the training set.
        seed: Of the shuffles.
        simulate: Ranks one process stands for.
        num_processes: That train.
        lr: The peak of the learning rate.
        epoch: Epochs done.
        step_of_epoch: Steps of the next one done.
        step: Steps done in all.
    """

    plan: BatchPlan
    num_images: int
    seed: int
    simulate: int | None
    num_processes: int
    lr: float
    epoch: int = 0
    step_of_epoch: int = 0
    step: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Read what `as_dict` gave."""
        return cls(**{**values, "plan": BatchPlan(**values["plan"])})

    @property
    def steps_per_epoch(self) -> int:
        """Count the steps of an epoch."""
        return self.num_images // self.plan.global_batch_size

    @property
    def batch_of_epoch(self) -> int:
        """Count the batches of this epoch that a rank has had; joined batches hold all of a step."""
        return self.step_of_epoch * (1 if self.simulate else self.plan.accumulate)

    def resume_from(self, saved: "Progress") -> tuple["Progress", list[str]]:
        """Find the progress in this run that corresponds to `saved`, of another run or an earlier start.

        With an equal global batch it is the same step, since step s reads the same images on any number of ranks. With
        another, the images of the epoch that were seen must make a whole number of steps.

        Returns:
            The progress, and a description of each change.

        Raises:
            ValueError: nothing in this run corresponds to it.
        """
        if self.simulate != saved.simulate:
            raise ValueError(
                f"the checkpoint was made with simulate={_text(saved.simulate)}, here it is {_text(self.simulate)}, "
                f"and their running statistics do not fit: set simulate={_text(saved.simulate)}"
            )
        notes = self._changes(saved)
        old, new = saved.plan.global_batch_size, self.plan.global_batch_size
        shuffled = (self.num_images, self.seed) != (saved.num_images, saved.seed)
        num_seen = saved.step_of_epoch * old
        if not num_seen and (shuffled or old != new):
            return replace(self, epoch=saved.epoch, step=saved.epoch * self.steps_per_epoch), notes
        if shuffled:
            raise ValueError(
                f"the checkpoint lies {num_seen} images into epoch {saved.epoch}, and here the order of images is "
                f"another: {'; '.join(notes)}. "
                "Keep seed and training images, or take a checkpoint from the end of an epoch"
            )
        if old == new:
            return replace(self, epoch=saved.epoch, step_of_epoch=saved.step_of_epoch, step=saved.step), notes
        if num_seen % new or num_seen // new >= self.steps_per_epoch:
            raise ValueError(
                f"the checkpoint lies {num_seen} images into epoch {saved.epoch}, no whole steps of {new} images: "
                f"set data.global_batch_size={old}, or a size that divides {num_seen}, or take a checkpoint from "
                "the end of an epoch"
            )
        of_epoch = num_seen // new
        return replace(
            self, epoch=saved.epoch, step_of_epoch=of_epoch, step=saved.epoch * self.steps_per_epoch + of_epoch
        ), notes

    def _changes(self, saved: "Progress") -> list[str]:
        """Describe what differs."""
        pairs = {
            "seed": (saved.seed, self.seed),
            "training images": (saved.num_images, self.num_images),
            "processes": (saved.num_processes, self.num_processes),
            "ranks": (saved.plan.world_size, self.plan.world_size),
            "per-rank batch": (saved.plan.per_rank_batch_size, self.plan.per_rank_batch_size),
            "accumulated batches": (saved.plan.accumulate, self.plan.accumulate),
            "global batch": (saved.plan.global_batch_size, self.plan.global_batch_size),
            "steps per epoch": (saved.steps_per_epoch, self.steps_per_epoch),
            "learning rate": (saved.lr, self.lr),
        }
        notes = [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
        if notes and saved.plan.global_batch_size == self.plan.global_batch_size:
            notes.append("every step has the same images as before")
        if not self.has_ranks_of(saved):
            notes.append("running statistics from rank 0, random streams anew")
        return notes

    def has_ranks_of(self, saved: "Progress") -> bool:
        """Whether every rank of `saved` has a counterpart here to which its own state can be restored."""
        return (self.num_processes, self.plan.world_size) == (saved.num_processes, saved.plan.world_size)


@dataclass(frozen=True)
class Start:
    """Describe where a run starts.

    Args:
        progress: In this run.
        norm: The normalization of this run, with its options.
        path: The checkpoint; None at the beginning.
        same_run: Whether the checkpoint is from this run directory, so that its metrics and times are continued.
        same_ranks: Whether the checkpoint holds the state of each of these ranks.
        notes: A description of each change.
    """

    progress: Progress
    norm: str
    path: Path | None = None
    same_run: bool = False
    same_ranks: bool = False
    notes: tuple[str, ...] = ()


def rescale(checkpoint: dict[str, Any], factor: float, step: int) -> None:
    """Adapt optimizer and schedule in a checkpoint to another peak learning rate and another step."""
    for state in checkpoint["optimizer_states"]:
        for group in state["param_groups"]:
            group["lr"], group["initial_lr"] = group["lr"] * factor, group["initial_lr"] * factor
    for schedule in checkpoint["lr_schedulers"]:
        schedule["base_lrs"] = [lr * factor for lr in schedule["base_lrs"]]
        schedule["_last_lr"] = [lr * factor for lr in schedule["_last_lr"]]
        schedule["last_epoch"], schedule["_step_count"] = step, step + 1


def _text(value: int | None) -> str:
    return "null" if value is None else str(value)
