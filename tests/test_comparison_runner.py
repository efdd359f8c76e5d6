"""How the machine is shared out, what is told of a cell that failed, and what is read of one that ended."""

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiment.comparison import runner, worker
from experiment.comparison.runner import Share


def machine(monkeypatch, cores, gpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_no_core_is_used_twice_and_none_lies_idle(monkeypatch, cores, gpus):
    machine(monkeypatch, cores, gpus)
    for num_processes in (1, 2, 4, 16):
        for jobs in (None, 1, 2, 5):
            for device in ("cpu", "cuda"):
                share = Share.of_machine(num_processes, jobs, device)
                running = share.jobs * num_processes
                assert min(share.jobs, share.num_threads) >= 1
                assert running * share.num_threads <= max(cores, running)
                assert running * (share.num_threads + 1) > cores
                assert share.num_gpus == (gpus if device == "cuda" else 0)
                units = share.num_gpus or cores
                assert share.jobs == jobs if jobs else running <= max(units, num_processes)


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "two", True])
def test_a_wrong_number_of_jobs(jobs):
    with pytest.raises(ValueError, match="expected jobs to be a number of cells, at least 1, got"):
        Share.of_machine(1, jobs)


def test_a_system_that_does_not_tell_the_cores_of_a_process(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert Share.of_machine(2).jobs == 3


HYDRA = """Error executing job with overrides: ['+norm=gn']
Traceback (most recent call last):
  File "launch/train.py", line 1, in main
    raise ValueError("expected Error: a: b")
{error}

Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.
"""
RANKS = """[rank1]: Traceback (most recent call last):
[rank1]: ValueError: one of
[rank1]:   two
[rank0]: Traceback (most recent call last):
[rank0]: RuntimeError: peer lost
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause (first observed failure): exitcode : 1
"""
CHAIN = """KeyError: 'x'

The above exception was the direct cause of the following exception:

ValueError: unknown x

During handling of the above exception, another exception occurred:

my.own.SpecialError: choose y
Exception ignored in: <function f>
OSError: later
"""


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        (HYDRA.format(error="ValueError: expected a: b"), 1, "ValueError: expected a: b"),
        (HYDRA.format(error="torch.OutOfMemoryError: much"), 1, "torch.OutOfMemoryError: much"),
        ("epoch 1\n\x1b[31mRuntimeError\x1b[0m: \x1b[1;33mred\x1b[0m\n", 1, "RuntimeError: red"),
        (RANKS, 1, "ValueError: one of two"),
        (CHAIN, 1, "my.own.SpecialError: choose y"),
        ("KeyboardInterrupt\n", 1, "KeyboardInterrupt"),
        (f"ValueError: {'long ' * 200}\n", 1, f"ValueError: {'long ' * 200}"[:500]),
        (HYDRA.format(error="ValueError: two:\n  a=1\n\tb=2"), 1, "ValueError: two: a=1 b=2"),
        (
            "Key 'x' is not in struct\n\nSet the environment variable HYDRA_FULL_ERROR=1 for more.\n",
            1,
            "ended with code 1 and no results; last words: Key 'x' is not in struct",
        ),
        ("", 0, "ended with code 0 and no results"),
        ("epoch 1\n", -9, "was ended by SIGKILL; last words: epoch 1"),
        ("", -15, "was ended by SIGTERM"),
        (b"\xff\xfe\nValueError: \xff\n", 1, "ValueError: \ufffd"),
    ],
)
def test_the_reason_of_a_failure(tmp_path, log, code, reason):
    (tmp_path / "log.txt").write_bytes(log if isinstance(log, bytes) else log.encode())
    done = SimpleNamespace(folder=tmp_path, process=SimpleNamespace(returncode=code))
    assert runner._reason(done) == f"{reason} (log: {tmp_path / 'log.txt'})"


@pytest.mark.parametrize("num_steps", [0, 1, 7, 50, 51, 99, 100, 437])
def test_a_training_curve_is_means_over_equal_parts(tmp_path, num_steps):
    steps = 20 * np.arange(num_steps) + 19
    losses = np.random.default_rng(0).uniform(0, 3, num_steps)
    lines = [f"{step},,{loss!r},0" for step, loss in zip(steps.tolist(), losses.tolist(), strict=True)]
    lines.insert(num_steps // 2, "5,0.25,,0")  # a validation
    (tmp_path / "metrics.csv").write_text("\n".join(["step,val,loss,epoch", *lines]))
    curve = runner._curve(tmp_path / "metrics.csv")
    size = max(1, int(np.ceil(num_steps / 50)))
    parts = range(0, num_steps, size)
    assert curve["step"] == pytest.approx([steps[i : i + size].mean() for i in parts], abs=0.5)
    assert curve["loss"] == pytest.approx([losses[i : i + size].mean() for i in parts], abs=5.1e-6)
    assert len(curve["step"]) == len(curve["loss"]) <= 50


def test_without_metrics_there_is_no_curve(tmp_path):
    assert runner._curve(tmp_path / "metrics.csv") == {"step": [], "loss": []}


def test_a_cell_tells_how_far_it_is_and_ends_with_its_comparison(tmp_path, monkeypatch):
    held, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "read", lambda *_: b"" if held.wait(60) else b"x")
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    callbacks = []
    worker.follow(callbacks)
    assert callbacks == []  # nobody asked
    monkeypatch.setenv(worker.VARIABLE, str(tmp_path / "progress"))
    worker.follow(callbacks)
    trainer = SimpleNamespace(is_global_zero=True, global_step=3, estimated_stepping_batches=8)
    callbacks[0].on_train_batch_end(trainer, None, None, None, 0)
    running = runner.Running(None, None, tmp_path, 0)
    assert running.progress == 0.375
    trainer.global_step = 4
    callbacks[0].on_train_batch_end(trainer, None, None, None, 1)
    assert running.progress == 0.375  # not written at every step
    assert not ended.is_set()
    held.set()
    assert ended.wait(60)


@pytest.mark.parametrize("text", [None, "", "half a"])
def test_progress_that_cannot_be_read_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / "progress").write_text(text)
    assert runner.Running(None, None, tmp_path, 0).progress == 0
