"""The record of one run in its directory: configuration, versions and results."""

import dataclasses
import importlib.metadata
import itertools
import json
import platform
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import syncbn
from experiment.training import shares
from experiment.training.atomic_files import write_file
from experiment.training.sharding import BatchPlan
from experiment.training.task import Task

PACKAGES = ("torch", "lightning", "torchmetrics", "hydra-core", "torchvision", "timm", "scikit-learn", "numpy")


def new_folder(root: Path, now: datetime) -> Path:
    """Make a folder named by the time, with a number behind it if that name is taken; never one that exists."""
    for number in itertools.count():
        folder = root / f"{now:%Y-%m-%d_%H-%M-%S}{f'_{number}' if number else ''}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def first_line(error: Exception) -> str:
    """Shorten a message of another library."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def versions() -> dict[str, str]:
    """List the versions that can change a result; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "syncbn": syncbn.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_inputs(folder: Path, config: DictConfig) -> None:
    """Write `config.yaml`, every interpolation resolved, and `run.json` with command, start and versions.

    A resumed run keeps the `run.json` of its first start.

    Raises:
        ValueError: `run.json` is damaged.
    """
    write_file(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    if (folder / "run.json").exists():
        read_json(folder / "run.json", "remove it: the next start writes its own")  # found before training
    else:
        run = {"command": shlex.join(sys.argv), "start": datetime.now().isoformat(timespec="seconds")}
        _write_json(folder / "run.json", {**run, "versions": versions()})


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json`: the results and what `run.json` says. With it a run is finished."""
    _write_json(folder / "results.json", {**results, **json.loads((folder / "run.json").read_text())})


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Read what this module wrote.

    Raises:
        ValueError: it is damaged; the message ends with `advice`.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): {advice}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (expected names and values, got {content!r}): {advice}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2) + "\n")


class Clock(Callback):
    """Measure the seconds of training without validation; `seconds` may start at those of earlier starts."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.since: float | None = None

    def elapsed(self) -> float:
        """Return the seconds up to now."""
        return self.seconds + (0.0 if self.since is None else time.monotonic() - self.since)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.since = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause the clock."""
        self.seconds, self.since = self.elapsed(), None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the clock."""
        self.since = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.seconds, self.since = self.elapsed(), None


def summarize_training(trainer: Trainer, task: Task, plan: BatchPlan) -> dict[str, Any]:
    """Summarize a finished fit.

    Returns:
        `images_per_second` over all ranks in training, batch sizes in images, `lr` at its peak.
    """
    [clock] = [callback for callback in trainer.callbacks if isinstance(callback, Clock)]  # type: ignore[attr-defined]
    seconds = clock.elapsed()
    return {
        "images_per_second": task.num_steps * plan.global_batch_size / seconds if task.num_steps else 0.0,
        "training_seconds": seconds,
        "num_steps": task.num_steps,
        "lr": task.lr,
        "global_batch_size": plan.global_batch_size,
        **dataclasses.asdict(plan),
        "device": str(trainer.strategy.root_device),
        "num_threads": torch.get_num_threads(),
    }


def summarize_tests(task: Task, evaluations: dict[str, dict[str, Any]], split: str) -> dict[str, Any]:
    """Summarize the tests: all of them, and the scores of the first mode.

    Args:
        task: Names the score.
        evaluations: Per mode, as `evaluate` gives them.
        split: Whose images they read, test or val.

    Returns:
        Scores and errors as fractions (`error = 1 - score`), losses in nats per label.
    """
    first = next(iter(evaluations.values()))
    return {
        "score": task.score_name,
        "eval_split": split,
        f"{split}_{task.score_name}": 1 - first[f"{split}_error"],
        f"{split}_loss": first[f"{split}_loss"],
        "train_error": first["train_error"],
        "train_loss": first["train_loss"],
        "evaluations": evaluations,
    }


def print_table(results: dict[str, Any], folder: Path) -> None:
    """Print the results, a row each."""
    table = Table("", Column(overflow="fold"), show_header=False)
    score, split = results["score"], results["eval_split"]
    others = dict(list(results["evaluations"].items())[1:])
    rows = {
        "arm": results["arm"],
        f"{split} {score}": _number(results[f"{split}_{score}"]),
        f"{split} loss": _number(results[f"{split}_loss"]),
        **{f"{split} {score}, {mode} statistics": _number(1 - r[f"{split}_error"]) for mode, r in others.items()},
        "train error (eval mode)": _number(results["train_error"]),
        "training images/s": f"{results['images_per_second']:.0f}",
        "world size": f"{results['world_size']}{' (simulated)' if results['simulate'] else ''}",
        "per-rank batch": f"{results['per_rank_batch_size']}",
        "accumulated batches": f"{results['accumulate']}",
        "global batch": f"{results['global_batch_size']}",
        "output folder": str(folder),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value), end_section=name == "output folder")
    Console().print(*filter(None, [table, shares.table(results)]), sep="\n")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
