"""The manifests of launch/kubernetes: valid, of one piece, and their command is run. No cluster is."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from processes import kill
from test_launch import ROOT, SMALL, composed
from test_resume import assert_same_run

FOLDER = ROOT / "launch" / "kubernetes"
FILES = {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}
OBJECTS = {thing["kind"]: thing for things in FILES.values() for thing in things}
JOB = OBJECTS["Job"]["spec"]
POD = JOB["template"]["spec"]
[CONTAINER] = POD["containers"]
LIMIT = 240  # seconds, against a loaded machine
LONG = [*SMALL, "+trainer.enable_progress_bar=false", "trainer.max_epochs=20", "checkpoint_every=3"]  # 100 steps


def torchrun_arguments():
    """Split torchrun's command, which ends the script."""
    [script] = CONTAINER["args"]
    return shlex.split(script.partition("exec ")[2])


def option(name):
    command = torchrun_arguments()
    return command[command.index(name) + 1]


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", OBJECTS)
def test_the_schema(kind, version):
    kubernetes_validate.validate(OBJECTS[kind], version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**OBJECTS[kind], "specs": {}}, version, strict=True)


def test_the_parts_fit_together():
    assert [len(things) for things in FILES.values()] == [3, 1]  # job.yaml, runs.yaml
    service, policy, labels = (
        OBJECTS["Service"],
        OBJECTS["NetworkPolicy"]["spec"],
        JOB["template"]["metadata"]["labels"],
    )
    assert service["spec"]["selector"] == policy["podSelector"]["matchLabels"] == labels
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}]  # from no other namespace, too
    assert POD["subdomain"] == service["metadata"]["name"]
    host = f"{OBJECTS['Job']['metadata']['name']}-0.{POD['subdomain']}"
    assert option("--rdzv-endpoint") == f"{host}:{service['spec']['ports'][0]['port']}"
    assert JOB["completions"] == JOB["parallelism"] == int(option("--nnodes"))
    assert JOB["completionMode"] == "Indexed"  # which gives the pods their names, too
    assert POD["restartPolicy"] == "Never"  # which podFailurePolicy needs
    [gpus] = re.findall(r"# nvidia.com/gpu: (\d+) ", (FOLDER / "job.yaml").read_text())
    assert gpus == option("--nproc-per-node")


def test_volumes_and_settings():
    assert {volume["name"] for volume in POD["volumes"]} == {mount["name"] for mount in CONTAINER["volumeMounts"]}
    [claim] = [volume["persistentVolumeClaim"] for volume in POD["volumes"] if volume["name"] == "runs"]
    assert claim["claimName"] == OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]
    command = torchrun_arguments()
    config = composed(*command[command.index("launch/train.py") + 1 :])
    assert config.norm.norm == "syncbn"
    assert str(Path(config.run_dir).parent) in [mount["mountPath"] for mount in CONTAINER["volumeMounts"]]


class Pods:
    """Stand in for the Job: run the container's command for each index, and again for one that failed."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        [script] = CONTAINER["args"]
        for old, new in {option("--rdzv-endpoint"): f"127.0.0.1:{port}", "/runs/": f"{folder}/runs/"}.items():
            assert script.count(old) == 1
            script = script.replace(old, new)
        for name in ("conf", "launch"):
            (folder / name).symlink_to(ROOT / name)
        self.folder, self.script = folder, " ".join([script.rstrip(), *LONG])
        self.pods, self.num_starts = {}, 0
        for index in range(JOB["completions"]):
            self.start(index)

    def start(self, index):
        self.num_starts += 1
        of_container = {item["name"]: item["value"] for item in CONTAINER["env"]}
        own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        own |= {"SYNCBN_CACHE": str(self.folder / "cache"), "GLOO_SOCKET_IFNAME": "lo", "PET_LOCAL_ADDR": "127.0.0.1"}
        with (self.folder / f"{index}.log").open("a") as log:
            self.pods[index] = subprocess.Popen(
                [*CONTAINER["command"], self.script],
                cwd=self.folder,
                env={**os.environ, **own, **of_container, "JOB_COMPLETION_INDEX": str(index)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said(self):
        return "\n".join((self.folder / f"{index}.log").read_text() for index in self.pods)

    def wait(self, done):
        """Wait until `done()` is true; pods that fail are started anew meanwhile."""
        end = time.monotonic() + LIMIT
        while not done():
            assert time.monotonic() < end, self.said()
            assert self.num_starts <= JOB["backoffLimit"], self.said()
            for index, pod in self.pods.items():
                if pod.poll():
                    self.start(index)
            time.sleep(0.1)

    def complete(self):
        self.wait(lambda: all(pod.poll() == 0 for pod in self.pods.values()))


@pytest.fixture
def job(tmp_path_factory):
    """Give a function that starts the pods of a Job, in a folder of its own."""
    jobs = []
    yield lambda: jobs.append(Pods(tmp_path_factory.mktemp("job"))) or jobs[-1]
    for pods in jobs:
        for pod in pods.pods.values():
            kill(pod)


@pytest.mark.slow
def test_the_command_of_two_pods_each_of_which_is_lost_once(job):
    whole = job()
    whole.complete()
    assert whole.num_starts == 2, whole.said()
    broken = job()
    broken.wait((broken.folder / "runs/syncbn/checkpoints/last.ckpt").exists)
    kill(broken.pods[1])
    broken.wait(lambda: "goes on from" in broken.said())
    kill(broken.pods[0])  # which keeps the rendezvous
    broken.complete()
    assert len(re.findall(r"goes on from .*/last.ckpt: epoch \d+, step [1-9]", broken.said())) == 2
    assert_same_run(whole.folder / "runs/syncbn", broken.folder / "runs/syncbn")
