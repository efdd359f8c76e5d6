"""The commands of docs/multinode.md on two hosts, as a user types them: equal numbers, and faults that end."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hosts import SECONDS, made_hosts
from test_launch import composed, load_train

from experiment.bench.scaling.network import NotAvailableError

pytestmark = pytest.mark.nodes
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "multinode.md").read_text()
LIMIT = 240  # seconds, against a loaded machine
SMALL = ["data.num_train=160", "data.num_val=21", "data.num_test=37", "model.width=8", "trainer.log_every_n_steps=1"]
DOUBLE = [*SMALL, "trainer.precision=64-true"]
LONG = [*SMALL, "trainer.max_epochs=20", "checkpoint_every=5"]  # 100 steps


def commands(heading):
    """Give the commands that the page has under a heading."""
    [section] = [part for part in PAGE.split("\n## ") if part.startswith(f"{heading}\n")]
    return "".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))


class User:
    """Who types commands on hosts, in a folder that all of them see."""

    def __init__(self, hosts, folder, cache):
        self.hosts, self.folder = hosts, folder
        for name in ("conf", "launch"):
            (folder / name).symlink_to(ROOT / name)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.env = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "SYNCBN_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
        }
        self.commands = []

    def types(self, host, text, *settings, **words):
        """Type commands; `settings` come at the end of the last, and words in capitals become what they stand for."""
        for word, value in {"HOST": self.hosts[0].name, "ID": "1", **words}.items():
            text = re.sub(rf"\b{word}\b", str(value), text)
        log = self.folder / f"{host.name}.log"
        script = " ".join([text.rstrip(), *settings])
        self.commands.append(host.start("bash", "-e", "-c", script, log=log, folder=self.folder, env=self.env))

    def starts(self, heading, *settings, hosts=None, n=1):
        """Type what the page says, on all hosts."""
        self.commands = []
        for rank, host in enumerate(self.hosts):
            if hosts is None or host in hosts:
                self.types(host, commands("Every node") + commands(heading), *settings, N=n, RANK=rank)

    def waits(self, done, what):
        """Wait until `done()` is true."""
        start = time.monotonic()
        while not (answer := done()):
            ended = all(command.poll() is not None for command in self.commands)
            if (ended and not (answer := done())) or time.monotonic() > start + LIMIT:
                raise AssertionError(f"{what}: {'ended without' if ended else f'not within {LIMIT} s'}\n{self.said()}")
            time.sleep(0.05)
        print(f"{what}: after {time.monotonic() - start:.1f} s")  # pytest -rP shows it
        return answer

    def codes(self):
        """Wait for the end of all commands, and for that of everything that they started."""
        self.waits(lambda: all(command.poll() is not None for command in self.commands), "the end")
        assert not [p for host in self.hosts if host.is_up for p in host.processes()]
        return [command.returncode for command in self.commands]

    def said(self, *hosts):
        """Give the output so far."""
        return "\n".join((self.folder / f"{host.name}.log").read_text() for host in hosts or self.hosts)

    def run(self, name):
        """Give the results and the weights of a finished run."""
        [folder] = self.folder.glob(name)
        weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        return json.loads((folder / "results.json").read_text()), weights

    def place(self, name):
        """Tell (processes, step) of the newest checkpoint of a run, (0, 0) if there is none."""
        path = self.folder / name / "checkpoints" / "last.ckpt"
        if not path.exists():
            return 0, 0
        place = torch.load(path, weights_only=True)["syncbn"]["place"]
        return place["num_processes"], place["step"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def user(tmp_path, cache):
    try:
        with made_hosts(2, tmp_path) as hosts:
            yield User(hosts, tmp_path, cache)
    except NotAvailableError:
        pytest.skip("network namespaces cannot be made")


@pytest.fixture
def simulate(user, cache, monkeypatch):
    """Give a function that runs one process that stands for all ranks, and gives its results and weights."""
    monkeypatch.setenv("SYNCBN_CACHE", str(cache))
    monkeypatch.chdir(user.folder)

    def run(norm, *settings):
        load_train().main(composed(*DOUBLE, f"+norm={norm}", f"run_dir=runs/{norm}", *settings))
        return user.run(f"runs/{norm}")

    return run


def assert_same(run, other):
    """Compare runs that add up in another order, in float64: ten steps grow what rounding does."""
    torch.testing.assert_close(run[1], other[1], rtol=1e-8, atol=1e-8)
    for name in ("test_loss", "test_accuracy", "train_error", "num_steps"):
        assert run[0][name] == pytest.approx(other[0][name], rel=1e-6)  # torchmetrics adds up in float32


def listening(host):
    """List (address, program) of the sockets on which a host listens."""
    tool = ["ss", "--listening", "--tcp", "--numeric", "--processes"]
    shown = subprocess.run(
        ["nsenter", f"--net=/proc/{host.first.pid}/ns/net", *tool],
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    ).stdout
    rows = [row for row in shown.splitlines() if "users:" in row]
    return {(row.split()[3].rpartition(":")[0], re.search(r'"([^"]+)"', row)[1]) for row in rows}


def test_two_hosts_give_what_one_gives_and_one_listens_on_its_loopback(user, simulate):
    open_to, first = set(), user.hosts[0]
    user.types(first, "torchrun --nproc-per-node 2 launch/train.py +norm=syncbn run_dir=runs/one", *DOUBLE)
    user.waits(lambda: open_to.update(listening(first)) or user.commands[0].poll() is not None, "a run on one host")
    assert user.codes() == [0], user.said()
    assert {address for address, program in open_to if program != "pt_elastic"} == {"127.0.0.1"}  # gloo; not torchrun
    user.starts("Fixed nodes", *DOUBLE)
    assert user.codes() == [0, 0], user.said()
    one, two = user.run("runs/one"), user.run("runs/fixed")
    assert two[0]["world_size"] == 2
    torch.testing.assert_close(one[1], two[1], rtol=0, atol=0)
    assert_same(two, simulate("syncbn", "simulate=2"))


def test_each_host_is_a_group(user, simulate):
    user.starts("Nodes in any order", *DOUBLE, n=2)
    assert user.codes() == [0, 0], user.said()
    of_nodes = user.run("runs/any")
    assert of_nodes[0]["world_size"] == 4
    assert_same(of_nodes, simulate("syncbn_node", "simulate=4", "node_size=2"))
    with pytest.raises(AssertionError):
        assert_same(of_nodes, simulate("syncbn", "simulate=4"))


def steps(user, name):
    """List the steps whose losses a run has written down."""
    lines = (user.folder / name / "csv" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("loss"), lines[0].split(",").index("step")
    return [int(row.split(",")[column[1]]) for row in lines[1:] if row.split(",")[column[0]]]


def test_a_cut_link_ends_both_hosts_and_the_same_command_goes_on(user):
    settings = [*LONG, "timeout=15"]
    user.starts("Fixed nodes", *settings)
    user.waits(lambda: user.place("runs/fixed")[1], "a checkpoint")
    user.hosts[1].set_link("down")
    assert 0 not in user.codes()
    for host in user.hosts:
        assert re.search("RuntimeError: .*(Timed out waiting 15000ms|Application timeout)", user.said(host)), (
            user.said(host)
        )
    _, step = user.place("runs/fixed")
    user.hosts[1].set_link("up")
    user.starts("Fixed nodes", *settings)
    assert user.codes() == [0, 0], user.said()
    assert 0 < step < 100
    assert re.search(rf"goes on from runs/fixed/checkpoints/last.ckpt: epoch \d+, step {step}\n", user.said())
    assert steps(user, "runs/fixed") == list(range(100))


def test_a_killed_host_ends_the_other_without_waiting_for_the_time_out(user):
    user.starts("Fixed nodes", *LONG, "trainer.max_epochs=100000")
    user.waits(lambda: user.place("runs/fixed")[1], "a checkpoint")
    user.hosts[1].kill()
    assert user.codes()[0] == 1  # within LIMIT, which is less than conf/train.yaml's timeout
    assert composed().timeout > LIMIT
    assert re.search("RuntimeError.*(Connection|connection|closed by peer|reset)", user.said(user.hosts[0]))


def test_an_elastic_run_goes_on_alone_and_takes_a_host_back(user):
    settings = [*LONG, "trainer.max_epochs=100000"]

    def trains_on(number, after):
        """Wait until `number` processes have made a checkpoint after a step, and give its step."""

        def step():
            processes, step = user.place("runs/elastic")
            return step if processes == number and step > after else None

        return user.waits(step, f"a later checkpoint of {number} processes")

    user.starts("Elastic", *settings)
    step = trains_on(2, 0)
    user.hosts[1].kill()
    step = trains_on(1, step)
    assert "processes 2 -> 1" in user.said(user.hosts[0])
    user.hosts[1].boot()
    user.starts("Elastic", *settings, hosts=user.hosts[1:])
    step = trains_on(2, step)
    assert "processes 1 -> 2" in user.said(user.hosts[0])
