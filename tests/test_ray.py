"""Ray Train runs what torchrun runs, and goes on when a worker or Ray itself is lost: bit for bit."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from processes import kill, started_by
from test_launch import ROOT, SMALL, launch
from test_resume import assert_same_run

pytestmark = [
    pytest.mark.nodes,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]
LIMIT = 240  # seconds, against a loaded machine
LONG = ["+norm=syncbn", *SMALL, "+trainer.enable_progress_bar=false", "trainer.max_epochs=20", "checkpoint_every=3"]


class Command:
    """The command of docs/multinode.md, with a home and temporary files of its own, and what it starts."""

    def __init__(self, folder, temporary):
        self.run_dir, self.log, self.temporary = folder / "run", folder / "log", Path(temporary)
        own = {"HOME": str(folder / "home"), "TMPDIR": str(self.temporary), "SYNCBN_CACHE": str(folder / "cache")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "launch" / "ray_train.py", *LONG, "run_dir=run"],
                cwd=folder,
                env={**os.environ, **own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.started = {}

    def waits(self, done):
        """Wait until `done()` is true."""
        end = time.monotonic() + LIMIT
        while not done():
            self.started.update(started_by(self.process.pid))
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def waits_for_a_checkpoint(self):
        path = self.run_dir / "checkpoints" / "last.ckpt"
        self.waits(lambda: path.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.said()

    def ends(self):
        """Wait for the end of all that it has started, and give its code; nothing is left."""
        self.waits(lambda: self.process.poll() is not None)
        self.waits(lambda: not [pid for pid in self.started if is_running(pid)])
        assert not list(self.temporary.iterdir())
        return self.process.returncode

    def workers(self):
        return [pid for pid, name in started_by(self.process.pid).items() if name.startswith("ray::RayTrainWorker")]

    def said(self):
        return self.log.read_text()

    def steps_it_went_on_from(self):
        return [int(step) for step in re.findall(r"goes on from .*last.ckpt: epoch \d+, step (\d+)", self.said())]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def types(tmp_path):
    """Give a function that types the command."""
    commands = []
    with tempfile.TemporaryDirectory() as temporary:  # tmp_path is too long for names of sockets, of 107 bytes
        yield lambda: commands.append(Command(tmp_path, temporary)) or commands[-1]
        for command in commands:
            kill(command.process)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Give the run of torchrun."""
    folder = tmp_path_factory.mktemp("whole")
    done = launch(folder, *LONG, "run_dir=run", num_ranks=2, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def listening(pids):
    """List (address, pid) of the sockets on which some processes listen."""
    shown = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True, timeout=10).stdout
    rows = [
        (row.split()[3].rpartition(":")[0].strip("[]"), re.search(r"pid=(\d+)", row)) for row in shown.splitlines()
    ]
    return {(address.removeprefix("::ffff:"), int(pid[1])) for address, pid in rows if pid and int(pid[1]) in pids}


def test_the_run_of_torchrun_on_the_loopback_and_once(types, whole):
    command = types()
    command.waits_for_a_checkpoint()
    workers, found = command.workers(), listening(command.started)
    assert len(workers) == 2
    [of_store] = [pid for address, pid in found if address not in ("127.0.0.1", "::1")]
    assert of_store in workers  # torch has it listen on all interfaces
    assert len(found) > 5
    assert command.ends() == 0, command.said()
    assert_same_run(command.run_dir, whole)
    run = json.loads((command.run_dir / "run.json").read_text())
    assert "ray_train.py +norm=syncbn" in run["command"]
    again = types()
    assert again.ends() == 0
    assert "run is finished: nothing was run" in again.said()
    assert_same_run(command.run_dir, whole)


def test_a_killed_worker_is_started_again_and_the_run_goes_on(types, whole):
    command = types()
    command.waits_for_a_checkpoint()
    os.kill(command.workers()[1], signal.SIGKILL)
    assert command.ends() == 0, command.said()
    [step] = command.steps_it_went_on_from()
    assert 0 < step < 100
    assert_same_run(command.run_dir, whole)


def test_the_same_command_goes_on(types, whole):
    command = types()
    command.waits_for_a_checkpoint()
    command.process.terminate()
    assert command.ends() != 0
    again = types()
    assert again.ends() == 0, again.said()
    [step] = again.steps_it_went_on_from()
    assert 0 < step < 100
    assert_same_run(again.run_dir, whole)
