"""The run directory: whether its run is finished, whether its settings are these, and which checkpoint to resume."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiment.resume.checkpoint_files import LAST, PART, check_fits, last_good, read
from experiment.resume.progress import Progress, Start
from experiment.training import norm_config, report
from experiment.training.report import first_line
from experiment.training.saved_settings import flatten

# Settings that may differ between starts of one run: they change no result.
FREE = (
    "run_dir",
    "output_dir",
    "ckpt_path",
    "checkpoint_every",
    "timeout",
    "logger.",
    "audit",
    "data.cache_dir",
    "data.num_workers",
)
# These may also differ when a run resumes (`Progress` checks the batches), but not from those of finished results.
JUDGED = ("eval_split", "evaluate", "data.global_batch_size", "data.per_rank_batch_size", "data.accumulate")
LOCK_TIMEOUT = 20  # seconds


def check_settings(config: DictConfig) -> None:
    """Refuse settings that make no sense.

    Raises:
        ValueError: `checkpoint_every` or `timeout` is not a number in its range; `run_dir` holds a run of another
            configuration, or a damaged config.
        FileNotFoundError: `ckpt_path` is not a file.
    """
    every = config.checkpoint_every
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(
            f"expected checkpoint_every to be a number of optimizer steps, at least 1, or null, got {every!r}"
        )
    if isinstance(config.timeout, bool) or not isinstance(config.timeout, int | float) or config.timeout <= 0:
        raise ValueError(f"expected timeout to be a number of seconds, more than 0, got {config.timeout!r}")
    if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
        raise FileNotFoundError(f"expected ckpt_path to be a checkpoint to resume, found no file {config.ckpt_path}")
    if config.run_dir is not None:
        _check_same(Path(config.run_dir), config, (*FREE, *JUDGED))


def finished(config: DictConfig) -> dict[str, Any] | None:
    """Return the results of the run in `run_dir`, None if it has none yet.

    Raises:
        ValueError: they are damaged, or were made with other settings.
    """
    path = Path(config.run_dir) / "results.json"
    if not path.is_file():
        return None
    _check_same(path.parent, config, FREE)
    return report.read_json(path, "remove it, and this command tests again")


def find_start(config: DictConfig, now: Progress, model: nn.Module | None) -> Start:
    """Find where this run starts: the last good checkpoint in `run_dir`, else `ckpt_path`, else the beginning.

    Args:
        config: The configuration of the run.
        now: The run's progress at its beginning.
        model: The model to be trained; None if it is converted only later.

    Raises:
        CheckpointError: there are checkpoints, and none is good.
        ValueError: nothing in this run corresponds to its progress, or its model is another.
    """
    norm = _describe(config.norm)
    found = None if config.run_dir is None else last_good(Path(config.run_dir) / "checkpoints")
    if found is None and config.ckpt_path is None:
        return Start(now, norm)
    path, checkpoint, wrong = found or (Path(config.ckpt_path), read(Path(config.ckpt_path)), [])
    part = checkpoint[PART]
    saved, saved_norm = Progress.from_dict(part["place"]), part.get("norm", norm)  # older checkpoints do not say it
    change = f"norm {saved_norm} -> {norm}" if saved_norm != norm else None
    if model is not None:
        check_fits(path, checkpoint["state_dict"], model, change)
    try:
        progress, changes = now.resume_from(saved)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if change:
        changes = [*changes, change]
    now_threads = torch.get_num_threads()
    threads = part.get("num_threads", now_threads)
    if threads != now_threads:  # whose sums are added in another order
        changes = [*changes, f"threads {threads} -> {now_threads}: the same up to rounding, not bit for bit"]
    notes = (*wrong, f"goes on from {path}: epoch {progress.epoch}, step {progress.step}", *changes)
    return Start(progress, norm, path, found is not None, now.has_ranks_of(saved), notes)


@contextmanager
def claim(config: DictConfig, rank: int) -> Iterator[None]:
    """Make `run_dir` on rank 0 and lock it for this process; a killed process releases it, too.

    Raises:
        RuntimeError: another run is using it, and does not end within `LOCK_TIMEOUT`.
    """
    if config.run_dir is None or rank:
        yield
        return
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if os.name == "posix" else None
    try:
        if handle is not None:
            _lock(handle, folder)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    """Lock the directory where the file system can; the ranks of an earlier start may need a moment to end."""
    import fcntl

    for waited in range(LOCK_TIMEOUT + 1):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(min(1, LOCK_TIMEOUT - waited))
        except OSError:
            return
        else:
            return
    raise RuntimeError(f"{folder} is in use by a run that has not ended: wait for it, end it, or set another run_dir")


def _check_same(folder: Path, config: DictConfig, free: tuple[str, ...]) -> None:
    """Refuse the directory of a run whose settings differ in others than the `free` ones."""
    path = folder / "config.yaml"
    if not path.is_file():
        return
    try:
        before = flatten(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except Exception as error:  # yaml and OmegaConf raise what the damaged text leads them to
        raise ValueError(
            f"{path} is damaged ({first_line(error)}): if this is the command of the run in {folder}, remove the "
            "file, it is written anew; otherwise set another run_dir"
        ) from error
    now = flatten(OmegaConf.to_container(config, resolve=True))
    other = [
        f"{key}={before.get(key)} (here {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]
    if other:
        raise ValueError(
            f"run_dir={folder} holds a run with {', '.join(other)}: give its settings, or another run_dir; "
            f"ckpt_path={folder / 'checkpoints' / LAST} starts a new run there from its checkpoint"
        )


def _describe(norm: DictConfig | None) -> str:
    """Name the norm with its options, as a checkpoint records it."""
    values = {} if norm is None else flatten(OmegaConf.to_container(norm, resolve=True))
    options = [f"{k}={v}" for k, v in values.items() if k not in ("_target_", "norm") and v is not None]
    return norm_config.name_of(norm) + (f" ({', '.join(options)})" if options else "")
