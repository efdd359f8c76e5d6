"""Checkpoint files: written atomically, checked before use, the last two kept.

`last.ckpt` is the newest, `previous.ckpt` the one before. At least one of them is good at every moment, also while
the next one is written and after a power failure. Both load with `weights_only=True`.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import nn

from experiment.training.atomic_files import write_atomically
from experiment.training.report import first_line

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
PART = "syncbn"  # what launch/train.py adds to Lightning's checkpoint
LIGHTNING = ("state_dict", "optimizer_states", "lr_schedulers", "loops")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint of launch/train.py onto the CPU.

    torch does not look at the checksums (CRC-32) that `torch.save` writes; here they are compared first.

    Raises:
        CheckpointError: the file is cut short or damaged, or holds something else.
    """
    advice = (
        f"take {path.with_name(PREVIOUS)}, if it is there, or another" if path.name != PREVIOUS else "take another"
    )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises what the damaged bytes lead it to
        raise CheckpointError(f"{path} is cut short or no checkpoint ({error}): {advice}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} in it is wrong; {advice}")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} does not load as tensors and plain values ({first_line(error)}): {advice}"
        ) from error
    missing = [k for k in (*LIGHTNING, PART) if not isinstance(checkpoint, dict) or k not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{path} is no checkpoint of launch/train.py from this version: expected {', '.join(missing)} in it"
        )
    return checkpoint


def check_fits(path: Path, saved: Mapping[str, Any], model: nn.Module, change: str | None) -> None:
    """Refuse a checkpoint of another model.

    Args:
        path: The checkpoint.
        saved: Its tensors.
        model: As it will be trained.
        change: A description of the change of norm, if there is one.

    Raises:
        ValueError: names or shapes differ.
    """
    there, here = ({k: tuple(getattr(v, "shape", ())) for k, v in s.items()} for s in (saved, model.state_dict()))
    keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]  # in the order of the layers
    if keys:
        shown = [f"{key} is {there.get(key, 'missing')} there, {here.get(key, 'missing')} here" for key in keys[:3]]
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ValueError(
            f"expected the model of {path}, got another: {'; '.join(shown)}{more}. Give the settings of norm and "
            f"model it was made with{f' ({change})' if change else ''}, or take another checkpoint"
        )


def last_good(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Find the newest checkpoint in `folder` that is good.

    Returns:
        Its path, what is in it, and what is wrong with a newer one; None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are some, and none is good.
    """
    wrong: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            return path, read(path), wrong
        except CheckpointError as error:
            wrong.append(str(error))
    if wrong:
        raise CheckpointError(f"no good checkpoint in {folder}: {'; '.join(wrong)}. To start anew, remove the folder")
    return None


class AtomicCheckpoints(CheckpointIO):
    """Write and read the checkpoints of a trainer; keep the one before if this process knows that it is good."""

    def __init__(self) -> None:
        self.good: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write, and keep the file before as `previous.ckpt`, but never replace a good one by a damaged one."""
        path = Path(path)
        keep = path.with_name(PREVIOUS) if self.good == path else None
        write_atomically(path, lambda file: torch.save(checkpoint, file), keep=keep)
        self.good = path

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read, always with `weights_only=True`."""
        checkpoint = read(Path(path))
        self.good = Path(path)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove."""
        Path(path).unlink(missing_ok=True)
