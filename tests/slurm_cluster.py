"""A SLURM cluster of `hosts`: n0, where users log in, with slurmctld, and the nodes n1 and n2 with slurmd.

Everything is written into one folder, and every daemon ends with its host: at the end of the ``with``, or with this
process if that is killed.
"""

import contextlib
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

from hosts import made_hosts

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
CHOICES = ("SLURM", "MASTER_", "GLOO_")  # of whoever runs the tests, which are not the user's
LIMIT = 300  # seconds, against a loaded machine
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
CONFIG = """
ClusterName=test
SlurmctldHost=n0
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
NodeName=n[1-2] CPUs=4
PartitionName=short Nodes=ALL Default=YES MaxTime=60
"""


def missing():
    """Name the programs that are not installed."""
    return [program for program in PROGRAMS if not shutil.which(program, path=PATH)]


class Cluster:
    """What a user who is logged in can do, and what can happen to a node."""

    def __init__(self, hosts, folder):
        self.login, *self.nodes = hosts
        self.folder = folder
        self.started = []
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(CHOICES)}
        self.env |= {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "SBATCH_TIMELIMIT": "15"}

    def boot(self):
        """Start the daemons, and wait until both nodes are idle."""
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder))
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed", "log-file": "munge.log"}
        options = [f"--{name}={self.folder / file}" for name, file in {**files, "key-file": key.name}.items()]
        self._daemon(self.login, "munged", "--foreground", "--force", *options)
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon(self.login, "slurmctld", "-D")
        for node in self.nodes:
            self.boot_node(node)
        self.wait(lambda: self.states() == {"n1": "IDLE", "n2": "IDLE"}, "idle nodes")

    def boot_node(self, node):
        self._daemon(node, "slurmd", "-D", "-N", node.name)

    def _daemon(self, host, *command):
        self._start(host, self.folder / f"{command[0]}-{host.name}.log", *command, folder=self.folder)

    def _start(self, host, log, *command, folder, **variables):
        self.started.append(host.start(*command, log=log, folder=folder, env={**self.env, **variables}))
        return self.started[-1]

    def run(self, *command, folder=None, **variables):
        """Run a command where users log in, and give what it printed; it must succeed."""
        log = self.folder / f"said-{len(self.started)}"
        process = self._start(self.login, log, *command, folder=folder or self.folder, **variables)
        try:
            code = process.wait(LIMIT)
        finally:
            process.kill()
        assert code == 0, log.read_text()
        return log.read_text()

    def reap(self):
        """Wait for the end of everything started, which ended with its host."""
        for process in self.started:
            process.wait(LIMIT)

    def show(self, kind, *name):
        """Give scontrol's facts about a "job", or each "node"."""
        lines = self.run("scontrol", "--oneliner", "show", kind, *name).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def states(self):
        """Give the state of each node."""
        with contextlib.suppress(AssertionError):  # slurmctld does not answer yet
            return {node["NodeName"]: node["State"] for node in self.show("node")}

    def has_ended(self, job):
        return self.show("job", job)[0]["JobState"] in ENDS

    def end(self, job):
        """Wait for the end of a job, and give its facts; one in the queue again does not wait for its two minutes."""

        def ended():
            [now] = self.show("job", job)
            if (now["JobState"], now["Reason"]) == ("PENDING", "BeginTime"):
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return now if now["JobState"] in ENDS else None

        return self.wait(ended, f"end of job {job}")

    def wait(self, done, what):
        """Wait until `done()` is true; if that takes too long, the logs tell more."""
        end = time.monotonic() + LIMIT
        while not (answer := done()):
            if time.monotonic() > end:
                logs = [f"{log}:\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log")]
                raise AssertionError("\n".join([f"no {what} within {LIMIT} s", *logs]))
            time.sleep(0.1)
        return answer


@contextlib.contextmanager
def made_cluster(folder):
    """Make a cluster that lives in `folder`.

    Raises:
        NotAvailableError: If this machine cannot have its hosts.
    """
    with contextlib.ExitStack() as after, made_hosts(3, folder) as hosts:
        cluster = Cluster(hosts, folder)
        after.callback(cluster.reap)
        cluster.boot()
        yield cluster
