"""Hosts on one machine: each with a network (`bench.network`), a name, a hosts file and processes of its own."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from experiment.bench.scaling.network import NAMESPACES, Network, NotAvailableError, interface

INTERFACE = interface(0)
SECONDS = 10  # for one small command
BOOT = (
    'hostname "$0" && mount --bind "$1" /etc/hosts && mount --bind /dev/null /etc/resolv.conf && echo up && exec cat'
)


class Host:
    """One host: its processes end with it, and it ends when this process does, even by a SIGKILL.

    Its first process is a ``cat`` that waits for the end of our pipe; with it the kernel ends all others.
    """

    def __init__(self, name, address, namespace, names):
        self.name, self.address, self.namespace, self.names = name, address, namespace, names
        self.first, self.started = None, []

    def boot(self):
        """Start it, also again after `kill`; the file system is the machine's, so that all hosts share it."""
        apart = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.first = subprocess.Popen(
            ["nsenter", f"--net={NAMESPACES / self.namespace}", *apart, "sh", "-c", BOOT, self.name, str(self.names)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said = self.first.stdout.readline()
        if said != b"up\n":
            self.kill()
            raise NotAvailableError(f"needs namespaces of names, mounts and processes; unshare said: {said.decode()}")

    def start(self, *command, log, folder="/", env=None):
        """Start a command in `folder` on this host; its output goes to the end of the file `log`."""
        space = f"/proc/{self.first.pid}/ns"
        inside = [
            f"--net={space}/net",
            f"--uts={space}/uts",
            f"--mount={space}/mnt",
            f"--pid={space}/pid_for_children",
        ]
        there = ["sh", "-c", 'cd "$0" && exec "$@"', str(folder)]  # to enter its mounts leads to their root
        with log.open("ab") as file:
            process = subprocess.Popen(
                ["nsenter", *inside, *there, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
            )
        self.started.append(process)
        return process

    @property
    def is_up(self):
        return self.first.poll() is None

    def processes(self):
        """List the command lines of what runs on it."""
        space = os.readlink(f"/proc/{self.first.pid}/ns/pid_for_children")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if os.readlink(process / "ns" / "pid") == space and (command := (process / "cmdline").read_bytes()):
                    found.append(command.replace(b"\0", b" ").decode().strip())  # a zombie's is empty
        return [command for command in found if command != "cat"]

    def set_link(self, state):
        """Cut its link to the network ("down"), or mend it ("up")."""
        link = ["ip", "-n", self.namespace, "link", "set", INTERFACE, state]
        subprocess.run(link, check=True, timeout=SECONDS)

    def kill(self):
        """End the host and all that runs on it by SIGKILL."""
        self.first.kill()
        self.first.communicate()
        while self.started:
            self.started.pop().wait(SECONDS)


@contextlib.contextmanager
def made_hosts(number, folder):
    """Make hosts n0, n1, … that know each other by name; `folder` is for their hosts file.

    Raises:
        NotAvailableError: If this machine cannot, with what is missing.
    """
    _check_available()
    with Network(number, [0.0]) as network, contextlib.ExitStack() as stack:
        addresses = {f"n{i}": f"10.0.0.{i + 1}" for i in range(number)}
        names = folder / "hosts"
        names.write_text("".join(f"{a} {n}\n" for n, a in {"localhost": "127.0.0.1", **addresses}.items()))
        hosts = [Host(n, a, network.namespace(i), names) for i, (n, a) in enumerate(addresses.items())]
        for host in hosts:
            host.boot()
            stack.callback(host.kill)
        yield hosts


def _check_available():
    tools = [tool for tool in ("unshare", "nsenter") if not shutil.which(tool)]
    if tools:
        raise NotAvailableError(f"needs {' and '.join(tools)} of util-linux")


def missing():
    """Say what this machine lacks for hosts, in a list: nothing or one thing."""
    try:
        with tempfile.TemporaryDirectory() as folder, made_hosts(1, Path(folder)):
            return []
    except NotAvailableError as error:
        return [f"network namespaces: {error}"]
