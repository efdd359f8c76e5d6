"""The commands of docs/multinode.md on a SLURM cluster of two nodes: what one process gives, and no job is lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
import torch
from hosts import INTERFACE

from experiment.bench.scaling.network import NotAvailableError
from experiment.training.world import World

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "multinode.md").read_text().split("\n## SLURM\n")[1].split("\n## ")[0]
SIZES = ["data.num_train=160", "data.num_val=21", "data.num_test=37", "model.width=8"]
# In float64 40 steps do not grow what rounding does; and a run that has a checkpoint is still far from its end.
SETTINGS = [*SIZES, "trainer.precision=64-true", "trainer.max_epochs=8", "checkpoint_every=1"]
TASK = {"SLURM_STEP_ID": 0, "SLURM_PROCID": 5, "SLURM_NTASKS": 8, "SLURM_NTASKS_PER_NODE": 4, "SLURM_NNODES": 2}


class User:
    """Who submits jobs from a checkout."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.env = {"PYTHONPATH": str(ROOT), "SYNCBN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        for name in ("conf", "launch"):
            (folder / name).symlink_to(ROOT / name)

    def types(self, word, *settings, **variables):
        """Type the command of the page that has a word in it, with settings at its end; give what it prints."""
        [command] = [text for text in re.findall(r"```bash\n(.*?)\n```", PAGE, re.DOTALL) if word in text]
        script = " ".join([command, *SETTINGS, *settings])
        return self.cluster.run("bash", "-c", script, folder=self.folder, **self.env, **variables)

    def submits(self, word, *settings, **variables):
        return self.types(word, *settings, **variables).split()[-1]  # Submitted batch job 1

    def said(self, job):
        return (self.folder / f"slurm-{job}.out").read_text()

    def waits_for_a_checkpoint(self, job):
        path = self.folder / f"outputs/slurm-{job}/checkpoints/last.ckpt"
        self.cluster.wait(lambda: path.exists() or self.cluster.has_ended(job), f"checkpoint of job {job}")
        assert path.exists(), self.said(job)

    def run(self, name):
        """Give the results and the weights of a finished run."""
        weights = torch.load(self.folder / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        return json.loads((self.folder / name / "results.json").read_text()), weights

    def ended(self, job):
        """Wait for a job's end, and give its facts, results and weights."""
        facts = self.cluster.end(job)
        assert facts["JobState"] == "COMPLETED", self.said(job)
        return facts, *self.run(f"outputs/slurm-{job}")


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    if slurm_cluster.missing():
        pytest.skip("SLURM is not installed")
    try:
        with slurm_cluster.made_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
            yield User(cluster, tmp_path_factory.mktemp("checkout"))
    except NotAvailableError:
        pytest.skip("network namespaces cannot be made")


@pytest.fixture(scope="module")
def one(user):
    """Give what one process comes to."""
    command = [sys.executable, "launch/train.py", "+norm=syncbn", *SETTINGS, "run_dir=outputs/one"]
    done = subprocess.run(
        command,
        cwd=user.folder,
        env={**os.environ, **user.env},
        capture_output=True,
        text=True,
        timeout=slurm_cluster.LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return user.run("outputs/one")


@pytest.fixture(scope="module")
def whole(user):
    """Give what a job comes to that was never stopped."""
    return user.ended(user.submits("torchrun.sbatch", PROCESSES="1", INTERFACE=INTERFACE))


def assert_same(results, weights, other):
    torch.testing.assert_close(weights, other[1], rtol=1e-8, atol=1e-8)
    for name in ("test_loss", "test_accuracy", "train_error"):
        assert results[name] == pytest.approx(other[0][name], rel=1e-6)  # a sum in float32


def assert_went_on(user, job, restarts, step):
    """A job that was stopped went on, from a step before its end."""
    assert restarts == "1"
    [went_on] = re.findall(
        rf"goes on from outputs/slurm-{job}/checkpoints/.*ckpt: epoch \d+, step (\d+)", user.said(job)
    )
    assert 0 < int(went_on) < 40
    assert step in (None, int(went_on))


def stopped_at(user, job):
    [step] = re.findall(r"SIGTERM: stopped with a checkpoint of step (\d+)", user.said(job))
    return int(step)


@pytest.mark.nodes
def test_torchrun_on_two_nodes_gives_what_one_process_gives(whole, one):
    facts, results, weights = whole
    assert (facts["NumNodes"], facts["Restarts"], results["world_size"]) == ("2", "0", 2)
    assert_same(results, weights, one)


@pytest.mark.nodes
def test_a_job_whose_time_is_up_goes_on_bit_for_bit(user, whole):
    job = user.submits("torchrun.sbatch", PROCESSES="1")
    user.waits_for_a_checkpoint(job)
    user.cluster.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does by the file's --signal
    facts, results, weights = user.ended(job)
    assert_went_on(user, job, facts["Restarts"], stopped_at(user, job))
    torch.testing.assert_close(weights, whole[2], rtol=0, atol=0)
    assert results["test_loss"] == whole[1]["test_loss"]


@pytest.mark.nodes
def test_without_torchrun_and_preempted_it_is_what_one_process_gives(user, one):
    job = user.submits("srun.sbatch", INTERFACE=INTERFACE)
    user.waits_for_a_checkpoint(job)
    user.cluster.run("scontrol", "requeue", job)
    facts, results, weights = user.ended(job)
    assert results["world_size"] == 4
    assert_went_on(user, job, facts["Restarts"], stopped_at(user, job))
    assert_same(results, weights, one)


@pytest.mark.nodes
def test_a_job_goes_on_when_a_lost_node_is_back(user, whole):
    job, node = user.submits("torchrun.sbatch", PROCESSES="1"), user.cluster.nodes[1]
    user.waits_for_a_checkpoint(job)
    node.set_link("down")  # so that nobody hears of its end
    node.kill()
    user.cluster.wait(lambda: user.cluster.show("job", job)[0]["JobState"] == "PENDING", "requeueing")
    assert user.cluster.states()[node.name].startswith("DOWN")
    node.set_link("up")
    node.boot()
    user.cluster.boot_node(node)
    facts, _, weights = user.ended(job)
    assert_went_on(user, job, facts["Restarts"], None)
    torch.testing.assert_close(weights, whole[2], rtol=0, atol=0)


@pytest.mark.nodes
def test_a_wrong_setting_fails_and_stays_failed(user):
    job = user.submits("srun.sbatch", "data.global_batch_size=2")
    facts = user.cluster.end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    assert "does not divide over 4 ranks" in user.said(job)
    assert not (user.folder / f"outputs/slurm-{job}").exists()


@pytest.mark.nodes
def test_a_sweep_is_an_array_of_jobs_and_its_command_can_be_repeated(user, one):
    settings = ["hydra.launcher.tasks_per_node=1", "hydra.launcher.timeout_min=15"]
    user.types("hydra/launcher=slurm", *settings)
    jobs = [job for job in user.cluster.show("job") if "ArrayJobId" in job]
    jobs = [user.cluster.end(f"{job['ArrayJobId']}_{job['ArrayTaskId']}") for job in jobs]
    assert sorted((job["ArrayTaskId"], job["JobState"], job["NumNodes"]) for job in jobs) == [
        ("0", "COMPLETED", "2"),
        ("1", "COMPLETED", "2"),
    ]
    (bn, weights_of_bn), syncbn = user.run("outputs/sweep/0"), user.run("outputs/sweep/1")
    assert [(results["arm"], results["world_size"]) for results in (bn, syncbn[0])] == [("bn", 2), ("syncbn", 2)]
    assert_same(*syncbn, one)
    with pytest.raises(AssertionError):
        assert_same(bn, weights_of_bn, one)
    user.types("hydra/launcher=slurm", *settings)
    assert "outputs/sweep/1 is finished: nothing was run" in "".join(
        log.read_text() for log in (user.folder / "outputs" / ".submitit").rglob("*_0_log.out")
    )


def test_the_world_of_srun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in TASK.items():
        monkeypatch.setenv(name, str(value))
    world = World.from_env()
    assert (world.rank, world.world_size, world.num_nodes, world.by_slurm) == (5, 8, 2, True)
    with pytest.raises(ValueError, match="srun started 8: start one, or drop simulate"):
        World.from_env(simulate=4)
    monkeypatch.setenv("SLURM_NTASKS", "7")
    with pytest.raises(ValueError, match="got 4 here and 7 in all: give sbatch or srun --nodes and --ntasks-per-node"):
        World.from_env()
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ValueError, match="7 in all: give sbatch or srun"):
        World.from_env()


@pytest.mark.parametrize("changed", [{"SLURM_STEP_ID": None}, {"SLURM_STEP_ID": 2**32 - 6}, {"SLURM_NTASKS": 1}])
def test_a_batch_script_an_interactive_shell_and_a_single_task_are_the_only_process(monkeypatch, changed):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {**TASK, **changed}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, str(value))
    assert World.from_env(simulate=4) == World(simulate=4)


def test_torchrun_goes_before_srun(monkeypatch):
    torchrun = {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "x"}
    for name, value in {**TASK, **torchrun}.items():
        monkeypatch.setenv(name, str(value))
    assert World.from_env() == World(1, 4, 2, by_torchrun=True)
