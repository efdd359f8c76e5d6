"""Stopped at any moment, the same command ends as if nothing had happened: bit for bit, row for row."""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from ranks import RankError
from test_launch import ROOT, TRAIN, composed, here, load_train  # noqa: F401  # here is a fixture

from experiment.resume import checkpoint_files, run_folder
from experiment.resume.checkpoint_files import LAST, PREVIOUS, AtomicCheckpoints, CheckpointError, last_good, read
from experiment.resume.progress import Progress
from experiment.resume.signals import Signals
from experiment.training.sharding import BatchPlan, TrainBatches
from experiment.training.task import Task

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")  # Lightning 2.6 with torch 2.14
SLOW = pytest.mark.slow
SMALL = [
    "data.num_train=128",
    "data.num_val=5",
    "data.num_test=9",
    "model.width=8",
    "trainer.log_every_n_steps=1",
    "+trainer.enable_progress_bar=false",
    "checkpoint_every=3",
]
NUM_STEPS = 8  # two epochs of four
TIMES = {"start", "command", "training_seconds", "images_per_second"}


class Killed(BaseException):
    """Stand in for SIGKILL: nothing of ours runs any more."""


def leaves(values, name=""):
    if isinstance(values, dict | list | tuple):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {k: v for key, value in items for k, v in leaves(value, f"{name}/{key}").items()}
    return {name: values}


def assert_same_run(one, other):
    """Weights, buffers and random streams of every rank, optimizer, schedule, place, metrics and results."""
    a, b = (leaves(torch.load(run / "checkpoints" / LAST, weights_only=True)) for run in (one, other))
    assert a.keys() == b.keys()
    different = [k for k, v in a.items() if not (v.equal(b[k]) if isinstance(v, torch.Tensor) else v == b[k])]
    assert different == ["/syncbn/seconds"]
    assert (one / "csv" / "metrics.csv").read_text() == (other / "csv" / "metrics.csv").read_text()
    a, b = (json.loads((run / "results.json").read_text()) for run in (one, other))
    assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}


def train(*overrides):
    load_train().main(composed(*SMALL, *overrides))


@contextlib.contextmanager
def killed(owner, name, when):
    """Kill this process when `owner.name` is called and `when(arguments)` says so."""
    original = getattr(owner, name)

    def deadly(*args, **kwargs):
        if when(*args):
            raise Killed
        return original(*args, **kwargs)

    setattr(owner, name, deadly)
    try:
        with pytest.raises(Killed):
            yield
    finally:
        setattr(owner, name, original)


def at_step(step):
    return lambda task, *_: task.trainer.global_step == step


def place_of(path):
    place = read(path)["syncbn"]["place"]
    return place["epoch"], place["step_of_epoch"], place["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run once without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNCBN_CACHE", str(folder / "cache"))
        for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        train("+norm=bn", f"run_dir={folder / 'run'}")
    return folder / "run"


def test_killed_at_every_kind_of_moment(here, whole):  # noqa: F811
    moments = [
        (Task, "training_step", at_step(2)),  # before the first checkpoint: from the beginning
        (Task, "training_step", at_step(3)),  # the step after a checkpoint
        (Task, "validation_step", at_step(4)),  # at the end of an epoch, before its checkpoint
        (Task, "on_train_epoch_start", at_step(4)),  # right after it
        (os, "fsync", lambda *_: (here / "run" / "checkpoints" / "last.ckpt.tmp").exists()),
        (Task, "on_fit_end", at_step(8)),
        (Task, "test_step", lambda *_: True),
    ]
    for owner, name, when in moments:
        with killed(owner, name, when):
            train("+norm=bn", "run_dir=run")
    train("+norm=bn", "run_dir=run")
    assert_same_run(here / "run", whole)


@pytest.mark.parametrize(
    ("num_done", "step"),
    [(1, 3), (4, 4), *(pytest.param(*case, marks=SLOW) for case in [(0, None), (2, 3), (3, 4)])],
)
def test_killed_while_a_checkpoint_takes_its_place(here, whole, num_done, step):  # noqa: F811
    calls = []

    def is_next(path, target):
        calls.extend([target] if target.parent.name == "checkpoints" else [])
        return len(calls) > num_done

    with killed(Path, "replace", is_next):
        train("+norm=bn", "run_dir=run")
    found = last_good(here / "run" / "checkpoints")
    assert (found and place_of(found[0])[2]) == step
    if num_done in (0, 2):
        train("+norm=bn", "run_dir=run")
        assert_same_run(here / "run", whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(here, whole, capsys):  # noqa: F811
    with killed(Task, "training_step", at_step(7)):
        train("+norm=bn", "run_dir=run")
    last, previous = (here / "run" / "checkpoints" / name for name in (LAST, PREVIOUS))
    assert (place_of(last), place_of(previous)) == ((1, 2, 6), (1, 0, 4))
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    with killed(Task, "training_step", at_step(5)):
        train("+norm=bn", "run_dir=run")
    assert "run/checkpoints/last.ckpt is cut short or no checkpoint" in capsys.readouterr().out
    with killed(Task, "training_step", at_step(7)):
        train("+norm=bn", "run_dir=run")
    assert (place_of(last), place_of(previous)) == ((1, 2, 6), (1, 0, 4))  # the damaged one did not replace a good one
    flipped = bytearray(last.read_bytes())
    with zipfile.ZipFile(last) as archive:
        largest = max((archive.read(name) for name in archive.namelist()), key=len)
    flipped[flipped.index(largest) + len(largest) // 2] ^= 4  # not in the padding between tensors
    last.write_bytes(flipped)
    train("+norm=bn", "run_dir=run")
    assert "run/checkpoints/last.ckpt is damaged: the checksum of" in capsys.readouterr().out
    assert_same_run(here / "run", whole)

    for path in (last, previous):
        path.write_bytes(b"garbage")
    (here / "run" / "results.json").unlink()
    before = (here / "run" / "csv" / "metrics.csv").read_text()
    with pytest.raises(
        CheckpointError, match=r"no good checkpoint in run/checkpoints: .*last.*previous.*remove the folder"
    ):
        train("+norm=bn", "run_dir=run")
    assert (here / "run" / "csv" / "metrics.csv").read_text() == before


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path, draw = tmp_path / LAST, random.Random(0)
    good = {name: {} for name in checkpoint_files.LIGHTNING} | {"syncbn": {"w": torch.arange(20.0), "n": 3}}
    AtomicCheckpoints().save_checkpoint(good, path)
    content = path.read_bytes()
    num_refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        part = None
        with contextlib.suppress(CheckpointError):
            part = read(path)["syncbn"]
        if part is None:
            num_refused += 1
        else:  # a bit that nothing reads: padding, a date
            assert part["w"].equal(good["syncbn"]["w"])
            assert part["n"] == 3
    assert num_refused > 50
    for size in range(0, len(content), 197):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="cut short"):
            read(path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_what_is_no_checkpoint_is_refused_by_name(here, tmp_path):  # noqa: F811
    torch.save({"state_dict": Harmful()}, "pickle.ckpt")
    torch.save({"state_dict": {}, "loops": {}}, "other.ckpt")
    Path("text.ckpt").write_text("no checkpoint")
    for name, message in [
        ("pickle", "does not load as tensors and plain values"),
        ("other", "no checkpoint of launch/train.py .*: expected optimizer_states, lr_schedulers, syncbn in it"),
        ("text", "cut short or no checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=f"^{name}.ckpt .*{message}"):
            train("+norm=bn", f"ckpt_path={name}.ckpt")
    for every in (0, "often", "true"):
        with pytest.raises(ValueError, match="checkpoint_every to be a number of"):
            train("+norm=bn", f"checkpoint_every={every}")
    assert not (here / "outputs").exists()
    assert not (here / "harm").exists()
    assert not torch.distributed.is_initialized()


def test_a_finished_run_is_not_run_again_and_another_is_kept_out(here, whole, capsys):  # noqa: F811
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    train("+norm=bn", f"run_dir={whole}")
    shown = capsys.readouterr().out
    assert "test accuracy" in shown
    assert f"{whole} is finished: nothing was run" in shown
    with pytest.raises(ValueError, match=r"holds a run with norm.norm=bn \(here syncbn\): .*another run_dir"):
        train("+norm=syncbn", f"run_dir={whole}")
    with pytest.raises(ValueError, match=r"holds a run with seed=0 \(here 1\): "):
        train("+norm=bn", f"run_dir={whole}", "seed=1")
    for changed, message in [
        ("evaluate=[rank0,precise]", r"evaluate=\['rank0'\] \(here \['rank0', 'precise'\]\)"),
        ("data.global_batch_size=64", r"data.global_batch_size=32 \(here 64\)"),
        ("data.per_rank_batch_size=8", r"data.per_rank_batch_size=None \(here 8\)"),
        ("data.accumulate=2", r"data.accumulate=1 \(here 2\)"),
    ]:
        with pytest.raises(ValueError, match=f"holds a run with {message}: .*ckpt_path={whole}/checkpoints/last.ckpt"):
            train("+norm=bn", f"run_dir={whole}", changed)
    train("+norm=bn", f"run_dir={whole}", "data.cache_dir=elsewhere", "+data.num_workers=1", "checkpoint_every=5")
    assert "finished: nothing was run" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_run_from_before_the_move_is_the_same_run(here, whole, capsys):  # noqa: F811
    """Its config names classes of syncbn.experiment."""
    shutil.copytree(whole, "run")
    text = (here / "run" / "config.yaml").read_text()
    old = text.replace("experiment.training.models.classifiers", "syncbn.experiment.nets")
    old = old.replace("experiment.training.datasets.sources", "syncbn.experiment.sources")
    old = old.replace("experiment.training.task", "syncbn.experiment.task")
    assert old.count("_target_: syncbn.experiment.") == 3
    (here / "run" / "config.yaml").write_text(old)
    train("+norm=bn", "run_dir=run")
    assert "run is finished: nothing was run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("config.yaml", "norm: {norm: b", "if this is the command of the run in run, remove the file"),
        ("config.yaml", "\0" * 100, "if this is the command of the run in run, remove the file"),
        ("run.json", "{", "remove it: the next start writes its own"),
        ("results.json", '{"arm": ', "remove it, and this command tests again"),
        ("results.json", "\0" * 100, "remove it, and this command tests again"),
        ("results.json", "null", "remove it, and this command tests again"),
    ],
    ids=["config", "config of zeros", "run", "results", "results of zeros", "results of nothing"],
)
def test_a_damaged_file_of_a_run_is_named_and_can_be_removed(here, whole, name, content, advice):  # noqa: F811
    shutil.copytree(whole, "run")
    path = here / "run" / name
    if name != "results.json":
        (here / "run" / "results.json").unlink()
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^run/{name} is damaged .*{advice}"):
        train("+norm=bn", "run_dir=run")
    path.unlink()
    train("+norm=bn", "run_dir=run")
    results = (json.loads((run / "results.json").read_text()) for run in (here / "run", whole))
    one, other = ({k: v for k, v in result.items() if k not in TIMES} for result in results)
    assert one == other


def test_two_runs_in_one_folder(here, monkeypatch):  # noqa: F811
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 1)
    config = composed("run_dir=run")
    with run_folder.claim(config, 0):
        with pytest.raises(RuntimeError, match="run is in use by a run that has not ended"):
            run_folder.claim(config, 0).__enter__()
        with run_folder.claim(config, 1):  # other ranks do not write
            pass
    with run_folder.claim(config, 0):
        pass


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(["data.accumulate=2", "trainer.max_steps=7", "+data.num_workers=1"], marks=SLOW),
        pytest.param(["trainer.precision=64-true"], marks=SLOW),
        pytest.param(["+trainer.val_check_interval=2"], marks=SLOW),
        pytest.param(["trainer.precision=bf16-true"], marks=SLOW),
        pytest.param(["trainer.precision=bf16-mixed"], marks=SLOW),
        pytest.param(["simulate=2"], marks=SLOW),
        pytest.param(["trainer.max_epochs=3"], marks=SLOW),
    ],
)
def test_accumulated_and_simulated_batches_precisions_and_a_number_of_steps(here, extra):  # noqa: F811
    train("+norm=bn", *extra, "run_dir=whole")
    for step in (3, 6):
        with killed(Task, "training_step", at_step(step)):
            train("+norm=bn", *extra, "run_dir=run")
    with killed(Task, "test_step", lambda *_: True):
        train("+norm=bn", *extra, "run_dir=run")
    train("+norm=bn", *extra, "run_dir=run")
    assert_same_run(here / "run", here / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(here, whole, number, monkeypatch, capsys):  # noqa: F811
    loss = Task.loss

    def interrupted(task, batch):
        if task.trainer.global_step == 4:
            signal.raise_signal(number)
        return loss(task, batch)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Task, "loss", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train("+norm=bn", "run_dir=run")
    assert stopped.value.code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert f"{number.name}: stopped with a checkpoint of step 5; run_dir=run goes on" in capsys.readouterr().out
    assert place_of(here / "run" / "checkpoints" / LAST) == (1, 1, 5)
    train("+norm=bn", "run_dir=run")
    assert_same_run(here / "run", whole)


def test_a_process_whose_launcher_is_gone_is_asked_to_stop(monkeypatch):
    signals = Signals()
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        signals.catch(alone=False)
        assert signals.wanted() == 0
        monkeypatch.setattr(os, "getppid", lambda: 1 + signals.parent)
        assert signals.wanted() == signal.SIGTERM
    finally:
        for n, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(n, handler)


@pytest.mark.parametrize(("rank", "accumulate"), [(0, 1), (1, 2), (None, 2)])
def test_the_order_of_data_goes_on(rank, accumulate):
    plan = BatchPlan(per_rank_batch_size=2, world_size=2, accumulate=accumulate)
    one, other = (TrainBatches(51, plan, rank, seed=3) for _ in range(2))
    for epoch in range(3):
        one.set_epoch(epoch)
        expected = list(one)
        for start in range(len(one)):
            other.resume(epoch, start)
            other.set_epoch(epoch)
            assert list(other) == expected[start:]
            assert list(other) == expected  # the next iteration is whole


def place(world_size=2, per_rank=4, accumulate=1, num_images=80, seed=0, simulate=None, lr=0.1, **where):
    return Progress(BatchPlan(per_rank, world_size, accumulate), num_images, seed, simulate, world_size, lr, **where)


@pytest.mark.parametrize("epoch", [0, 3])
def test_another_world_at_equal_global_batches_is_the_same_step(epoch):
    saved = place(epoch=epoch, step_of_epoch=7, step=10 * epoch + 7)
    for now in (place(4, 2), place(1, 8), place(1, 4, 2), place(8, 1)):
        there, notes = now.resume_from(Progress.from_dict(saved.as_dict()))
        assert (there.epoch, there.step_of_epoch, there.step) == (epoch, 7, saved.step)
        assert there.batch_of_epoch == 7 * now.plan.accumulate
        assert f"ranks 2 -> {now.plan.world_size}" in notes
        assert {"every step has the same images as before", "running statistics from rank 0, random streams anew"} <= {
            *notes
        }
    assert saved.resume_from(saved) == (saved, [])


def test_another_global_batch_goes_on_where_the_images_seen_are_whole_steps():
    saved = place(epoch=1, step_of_epoch=6, step=16)  # 48 images into epoch 1
    there, notes = place(1, 4).resume_from(saved)
    assert (there.epoch, there.step_of_epoch, there.step) == (1, 12, 32)
    assert {"global batch 8 -> 4", "steps per epoch 10 -> 20"} <= {*notes}
    there, _ = place(4, 4).resume_from(saved)
    assert (there.epoch, there.step_of_epoch, there.step) == (1, 3, 8)
    with pytest.raises(
        ValueError, match=r"48 images into epoch 1, no whole steps of 20 images: set data.global_batch_size=8"
    ):
        place(5, 4).resume_from(saved)
    between = place(epoch=2, step=20)
    there, notes = place(5, 4, seed=1).resume_from(between)
    assert (there.epoch, there.step_of_epoch, there.step) == (2, 0, 8)
    assert "seed 0 -> 1" in notes
    with pytest.raises(ValueError, match="order of images is another: seed 0 -> 1"):
        place(seed=1).resume_from(saved)
    with pytest.raises(ValueError, match="simulate=null, here it is 2"):
        place(simulate=2).resume_from(between)


def test_another_number_of_threads_is_said(here, whole, capsys):  # noqa: F811
    path = whole / "checkpoints" / LAST
    torch.set_num_threads(3)
    train("+norm=bn", f"ckpt_path={path}", "run_dir=run")
    before = torch.load(path, weights_only=True)["syncbn"]["num_threads"]
    assert f"threads {before} -> 3: the same up to rounding, not bit for bit" in capsys.readouterr().out


def changed_copy(path, change):
    """Write `early.ckpt`, the checkpoint as an earlier version would have made it, or another run."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["syncbn"])
    AtomicCheckpoints().save_checkpoint(checkpoint, "early.ckpt")
    return "ckpt_path=early.ckpt"


def test_a_checkpoint_that_does_not_say_threads_and_norm(here, whole, capsys):  # noqa: F811
    def forget(part):
        del part["num_threads"], part["norm"]

    train("+norm=syncbn", changed_copy(whole / "checkpoints" / LAST, forget))
    shown = capsys.readouterr().out
    assert "goes on from early.ckpt: epoch 2, step 8" in shown
    assert " -> " not in shown


def test_a_new_run_has_its_own_settings_of_the_optimizer_and_norm_and_says_so(here, capsys):  # noqa: F811
    with killed(Task, "training_step", at_step(5)):
        train("+norm=bn", "run_dir=run")
    capsys.readouterr()
    changes = ["+norm=syncbn_2", "norm.process_group=1", "task.momentum=0.5", "task.weight_decay=0.01"]
    train(*changes, "ckpt_path=run/checkpoints/last.ckpt", "run_dir=other")
    shown = capsys.readouterr().out
    for note in ("momentum 0.9 -> 0.5\n", "weight_decay 0.0001 -> 0.01\n", "norm bn -> syncbn (process_group=1)\n"):
        assert shown.count(note) == 1
    saved = torch.load(here / "other" / "checkpoints" / LAST, weights_only=True)
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.5, 0.01), (0.5, 0.0)]
    assert saved["syncbn"]["norm"] == "syncbn (process_group=1)"
    assert place_of(here / "other" / "checkpoints" / LAST) == (2, 0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["+norm=gn"], r"running_mean is \(8,\) there, missing here; .* more\. .*norm bn -> gn \(num_groups=8\)"),
        (["+norm=bn", "model.width=16"], r"weight is \(8, 3, 3, 3\) there, \(16, 3, 3, 3\) here; "),
    ],
)
def test_the_checkpoint_of_another_model_is_refused(here, whole, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=rf"^expected the model of {whole}/checkpoints/last.ckpt, .*{message}"):
        train(*changes, f"ckpt_path={whole / 'checkpoints' / LAST}")
    assert not (here / "outputs").exists()


def test_the_rows_are_on_the_disk_before_the_checkpoint_that_counts_them(here, monkeypatch):  # noqa: F811
    fsync, order = os.fsync, []

    def noted(handle):
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    train("+norm=bn", "run_dir=run")
    before = [order[i - 1] for i, name in enumerate(order) if name == "last.ckpt.tmp"]
    assert before == ["metrics.csv"] * 4


def test_another_global_batch_moves_schedule_and_learning_rate(here, capsys):  # noqa: F811
    with killed(Task, "training_step", at_step(5)):
        train("+norm=bn", "run_dir=run")
    train("+norm=bn", "run_dir=run", "data.global_batch_size=16")
    shown = capsys.readouterr().out
    for note in ("global batch 32 -> 16", "steps per epoch 4 -> 8", "learning rate 0.1 -> 0.05"):
        assert note in shown
    path = here / "run" / "checkpoints" / LAST
    assert place_of(path) == (2, 0, 16)
    schedule = torch.load(path, weights_only=True)["lr_schedulers"][0]
    assert (schedule["base_lrs"], schedule["last_epoch"]) == ([0.05, 0.05], 16)
    with (here / "run" / "csv" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]
    assert steps == [*range(4), *range(8, 16)]
    train("+norm=bn", "run_dir=run", "data.global_batch_size=16")
    assert "run is finished: nothing was run" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds a run with data.global_batch_size=16 \(here 32\)"):
        train("+norm=bn", "run_dir=run")


def train_as_rank(rank, world_size, folder, steps, *overrides):
    """Train in this process as torchrun's rank; be killed at these steps, one start after the other."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    words = {"TORCHELASTIC_RUN_ID": "a", "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "GROUP_RANK": "0"}
    words |= {"SYNCBN_CACHE": str(folder / "cache"), **{name: str(value) for name, value in own.items()}}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
        for name, value in words.items():
            patch.setenv(name, value)
        for step in steps:
            with killed(Task, "training_step", at_step(step)):
                train(*overrides)
        train(*overrides)


@pytest.mark.parametrize(
    ("world_size", "norm", "more"),
    [
        pytest.param(2, "bn", [], marks=SLOW),
        pytest.param(2, "syncbn", [], marks=SLOW),
        pytest.param(4, "syncbn_2", ["trainer.precision=64-true"], marks=SLOW),
        pytest.param(4, "syncbn", [], marks=SLOW),
        pytest.param(2, "frozen_from_precise", [], marks=SLOW),  # at step 6
    ],
)
def test_several_ranks(run, tmp_path, world_size, norm, more):
    for name, steps in (("whole", []), ("run", [3, 4, 7])):
        arguments = (f"+norm={norm}", f"run_dir={tmp_path / name}", "evaluate=[rank0,averaged]", *more)
        run(train_as_rank, world_size, tmp_path, steps, *arguments, timeout=300)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    own = torch.load(tmp_path / "run" / "checkpoints" / LAST, weights_only=True)["syncbn"]["ranks"]
    means = [next(v for k, v in rank["buffers"].items() if k.endswith("running_mean")) for rank in own]
    assert len({tuple(mean.tolist()) for mean in means}) == {"bn": world_size, "syncbn_2": 2}.get(norm, 1)


def train_and_look_early(rank, world_size, folder, num_looks, *overrides):
    """Train as torchrun's rank where rank 1 looks so often before a killed run wrote its last checkpoint."""
    look, looks = run_folder.last_good, iter(range(num_looks))

    def early(path):
        return look(path) if rank == 0 or next(looks, None) is None else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "last_good", early)
        train_as_rank(rank, world_size, folder, [], *overrides)


@pytest.mark.slow
def test_ranks_that_look_while_an_earlier_run_still_writes(run, tmp_path):
    path, stop = tmp_path / "run" / "checkpoints" / LAST, f"run_dir={tmp_path / 'run'}"
    run(train_as_rank, 2, tmp_path, [], "+norm=bn", stop)
    path.unlink()
    path.with_name(PREVIOUS).rename(path)
    (tmp_path / "run" / "results.json").unlink()
    before = place_of(path)[2]
    assert before < NUM_STEPS
    with pytest.raises(
        RankError, match=f"different checkpoints, of steps 0 to {before}, here .* in which no earlier run still writes"
    ) as failed:
        run(train_and_look_early, 2, tmp_path, 2, "+norm=bn", stop)
    assert {name for name, _ in failed.value.errors.values()} == {"RuntimeError"}
    run(train_and_look_early, 2, tmp_path, 1, "+norm=bn", stop)
    assert place_of(path) == (2, 0, NUM_STEPS)
    with (tmp_path / "run" / "csv" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["loss"]] == [*range(NUM_STEPS)]


def processes():
    """Map the pid of every running process to its parent's."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            found |= {int(path.parent.name): int(parent)} if state != "Z" else {}
    return found


def descendants(pid):
    parents, found = processes(), [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.02)


def stopped(command, run, num_rows, strike):
    """Start `command`, call `strike` with its pids when it has written so many rows, and wait until all are gone."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    before = rows_of(run)
    with (run.parent / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
    pids = [process.pid]
    try:
        wait_until(lambda: process.poll() is not None or (rows_of(run) != before and len(rows_of(run)) >= num_rows))
        assert process.poll() is None, (run.parent / "log.txt").read_text()
        pids += descendants(process.pid)
        strike(pids)
        code = process.wait(120)
        wait_until(lambda: not set(pids) & processes().keys(), 120)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return code, (run.parent / "log.txt").read_text()


def rows_of(run):
    path = run / "csv" / "metrics.csv"
    return path.read_text().splitlines()[1:] if path.is_file() else []


def send(number, *which):
    def strike(pids):
        for pid in [pids[i] for i in which] or reversed(pids):
            os.kill(pid, number)

    return strike


@pytest.mark.slow
def test_a_real_sigkill(here, whole):  # noqa: F811
    command = [str(TRAIN), *SMALL, "+norm=bn", "run_dir=run"]
    code, _ = stopped(command, here / "run", 5, send(signal.SIGKILL))
    assert code == -signal.SIGKILL
    train("+norm=bn", "run_dir=run")
    assert_same_run(here / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "syncbn"])
def test_torchrun_stopped_in_every_way(here, norm):  # noqa: F811
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TRAIN)]
    command = [*torchrun, *SMALL, f"+norm={norm}", "data.num_train=640", "evaluate=[rank0,averaged]"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, *command, "run_dir=whole"], env=environment, check=True, timeout=600)
    ways = [
        (send(signal.SIGKILL), ""),  # all at once
        (send(signal.SIGTERM, 0), "SIGTERM: stopped with a checkpoint of step"),
        (send(signal.SIGINT, 0), "SIGINT: stopped with a checkpoint of step"),
        (send(signal.SIGKILL, 0), "SIGTERM: stopped with a checkpoint of step"),  # torchrun; its ranks notice
        (send(signal.SIGKILL, 2), ""),  # one rank
        (send(signal.SIGTERM, 2), "SIGTERM: stopped with a checkpoint of step"),
    ]
    for number, (strike, message) in enumerate(ways):
        code, log = stopped([*command, "run_dir=run"], here / "run", 4 + 5 * number, strike)
        assert code != 0
        assert message in log
    subprocess.run([sys.executable, *command, "run_dir=run"], env=environment, check=True, timeout=600)
    assert_same_run(here / "run", here / "whole")
