"""The user's commands: one folder per run, the same results from any world, and a clear end for bad input."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiment.training.task import Classifier

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "launch" / "train.py"
SMALL = ["data.num_train=160", "data.num_val=21", "data.num_test=37", "model.width=8", "trainer.log_every_n_steps=1"]
CONF_NORMS = sorted(path.stem for path in (ROOT / "conf" / "norm").glob("*.yaml"))
FILES = {"config.yaml", "run.json", "results.json", "csv/metrics.csv"} | {
    f"checkpoints/{name}.ckpt" for name in ("last", "previous")
}


class Own(torch.nn.GroupNorm):
    """A norm that conf/norm does not know."""

    def __init__(self, num_features):
        super().__init__(1, num_features)


def launch(folder, *arguments, num_ranks=1, timeout=120):
    """Run the user's command in `folder`; torchrun meets over a free port of the loopback."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), str(TRAIN)]
    environment = {**os.environ, "SYNCBN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=folder,
        env=environment,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def only_run(folder):
    """Give the one folder a run has made, with its results."""
    [run] = (folder / "outputs").iterdir()
    return run, json.loads((run / "results.json").read_text())


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def load_train():
    spec = importlib.util.spec_from_file_location("train_under_test", TRAIN)
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    return train


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Stand in an empty folder, in the only process of its world."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SYNCBN_CACHE", str(tmp_path / "cache"))
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("num_ranks", "norm"),
    [
        pytest.param(1, "syncbn", marks=pytest.mark.slow),
        (2, "syncbn"),
        *(pytest.param(2, norm, marks=pytest.mark.slow) for norm in CONF_NORMS if "syncbn" not in norm),
    ],
)
def test_the_users_command(tmp_path, num_ranks, norm):
    done = launch(tmp_path, f"+norm={norm}", *SMALL, num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    run, results = only_run(tmp_path)
    assert files_in(run) == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "outputs"}
    assert (results["arm"], results["world_size"]) == (norm, num_ranks)
    assert results["per_rank_batch_size"] * num_ranks == results["global_batch_size"] == 32
    assert results["num_steps"] == 10
    assert results["images_per_second"] > 0
    assert round(results["test_accuracy"] * 37, 3) % 1 in (0, 1)  # a whole number of 37 images
    assert OmegaConf.load(run / "config.yaml").norm == composed(f"+norm={norm}").norm
    assert (done.stdout.count("world size 1: SyncBatchNorm equals BatchNorm")) == (num_ranks == 1)
    for text in ("test accuracy", f"{results['test_accuracy']:.4f}", run.name):
        assert done.stdout.count(text) == 1


@pytest.mark.slow
def test_an_error_on_two_ranks_ends_at_once_and_leaves_nothing(tmp_path):
    import torchvision  # noqa: F401  # what reads the folders

    done = launch(tmp_path, "+norm=syncbn", "data=imagefolder", num_ranks=2)
    assert done.returncode != 0
    assert "FileNotFoundError: expected folders train and val" in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["data=cifar10"], FileNotFoundError, "data_batch_1.bin"),
        (["data=imagefolder"], FileNotFoundError, "train and val"),
        (["ckpt_path=nowhere.ckpt"], FileNotFoundError, "a checkpoint to resume, found no file nowhere.ckpt"),
        (["data.per_rank_batch_size=0"], ValueError, "at least 1, got 0"),
        (["data.accumulate=3"], ValueError, "does not divide over 1 ranks x 3 accumulated batches"),
        (["data.global_batch_size=512"], ValueError, "one step of 512 training images, got 160"),
        (["model=torchvision", "model.arch=resnet81"], ValueError, "close names: .*resnet18"),
        (["model=timm", "model.arch=efficientnet"], ValueError, "close names: .*efficientnet_b"),
        (["model=torchvision", "model.arch=vit_b_16"], ValueError, r"cannot read images of shape \(3, 28, 28\)"),
        (["task.lr_rule=cubic"], ValueError, "one of constant, sqrt, linear"),
        (["data.num_test=0"], ValueError, "at least one test image"),
        (["+norm=gn", "norm.num_groups=5"], ValueError, "num_groups"),
        (["+norm=syncbn", "norm.process_group=0"], ValueError, "process_group: expected None"),
        (["+norm=gn", "norm.norm=layernorm"], ValueError, "unknown norm 'layernorm'"),
    ],
)
def test_bad_input_ends_before_training(here, overrides, error, message):
    sizes = SMALL[:3] if not overrides[0].startswith("data=") else []
    with pytest.raises(error, match=message):
        load_train().main(composed(*sizes, *overrides))
    assert not (here / "outputs").exists()
    assert not torch.distributed.is_initialized()


def test_an_audit_prints_and_does_not_train(here, capsys):
    load_train().main(composed(*SMALL, "+norm=syncbn", "simulate=4", "data.per_rank_batch_size=1", "audit=true"))
    shown = capsys.readouterr().out
    assert shown.startswith("9 normalization layers; per_rank_batch_size 1, world_size 4; measured on 160 images")
    assert shown.count("SyncBatchNorm") >= 9
    assert "Advice: " in shown
    assert not (here / "outputs").exists()


def test_a_norm_of_the_users_own(here):
    own = "{_target_: test_launch.Own, _partial_: true}"
    for norm in (
        f"+norm={{_target_: syncbn.lightning.NormConverter, norm: {own}}}",
        "+norm={_target_: test_launch.Own}",
    ):
        load_train().main(composed(*SMALL, norm, "trainer.max_steps=1"))
    arms = {json.loads((run / "results.json").read_text())["arm"] for run in (here / "outputs").iterdir()}
    assert arms == {"NormConverter", "Own"}


def test_a_group_size_that_does_not_divide_the_ranks(here, monkeypatch):
    train = load_train()
    monkeypatch.setattr(train.World, "from_env", lambda _: train.World(0, 4, 4, by_torchrun=True))
    with pytest.raises(ValueError, match=r"divides the world size 4; choose one of \[1, 2, 4\]"):
        train.main(composed(*SMALL, "+norm=syncbn", "norm.process_group=3"))
    assert not (here / "outputs").exists()


SCHEDULED = {"brn": ["norm.warmup_steps=0.8", "norm.momentum=0.2"]}  # the stop is in the middle of 10 steps


@pytest.mark.parametrize("norm", ["gn", *(pytest.param(n, marks=pytest.mark.slow) for n in CONF_NORMS if n != "gn")])
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")  # Lightning 2.6 with torch 2.14
def test_a_resumed_run_ends_like_one_that_never_stopped(here, monkeypatch, norm):
    arm = [f"+norm={norm}", *SCHEDULED.get(norm, []), *SMALL]
    train, config = load_train(), composed(*arm)
    train.main(config)
    whole, expected = only_run(here)

    def stop(task, *_):
        if task.current_epoch == 1:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_start", stop)
        with pytest.raises(InterruptedError):
            train.main(config)
    [stopped] = set((here / "outputs").iterdir()) - {whole}
    train.main(composed(*arm, f"ckpt_path={stopped / 'checkpoints' / 'last.ckpt'}"))
    [resumed] = set((here / "outputs").iterdir()) - {whole, stopped}
    assert (stopped / "checkpoints" / "last.ckpt").is_file()
    results = json.loads((resumed / "results.json").read_text())
    for name in ("test_accuracy", "test_loss", "train_error"):
        assert results[name] == expected[name]
    assert results["num_steps"] == 5  # of this run
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, resumed)]
    torch.testing.assert_close(ends[0]["state_dict"], ends[1]["state_dict"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_default_recipe_learns(tmp_path, num_ranks):
    done = launch(tmp_path, "+norm=syncbn", num_ranks=num_ranks, timeout=600)
    assert done.returncode == 0, done.stderr
    assert only_run(tmp_path)[1]["test_accuracy"] >= 0.94
