"""Hosts on one machine: a network namespace each, joined by switches that delay every frame.

Needs Linux, root, iproute2 and /dev/net/tun. The namespaces bear this process's id, nothing is added to the machine's
own network, and everything is gone when the ``with`` ends, by an error too; what a killed process left is removed by
the next one.
"""

import contextlib
import ctypes
import itertools
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

SECONDS = 10  # for one command
NAMESPACES = Path("/var/run/netns")
_CLONE_NEWNET = 0x40000000


class NotAvailableError(RuntimeError):
    """This machine cannot have such a network; says what is missing."""


class Network:
    """Hosts 0 … num_hosts - 1 and, for each of `delays`, a network between them: seconds one way between any two.

    Every host is on network n by its interface `interface(n)`, so that work over all of them can be timed in turn.

    Raises:
        NotAvailableError: On entering, if something is missing or the kernel refuses.
    """

    _numbers = itertools.count()

    def __init__(self, num_hosts: int, delays: Sequence[float]) -> None:
        self.num_hosts, self.delays = num_hosts, delays
        self._number = next(self._numbers)
        self._made: list[str] = []
        self._switch: subprocess.Popen[bytes] | None = None

    def namespace(self, host: int | str) -> str:
        """Name the namespace of a host, or of the ``"switch"``."""
        return f"syncbn-{os.getpid()}-{self._number}-{host}"

    def __enter__(self) -> "Network":
        """Make the network."""
        _check_available()
        _remove_left_over()
        try:
            for host in ("switch", *range(self.num_hosts)):
                _ip("netns", "add", self.namespace(host))
                self._made.append(self.namespace(host))
            self._switch = self._start_switch()
            for host in range(self.num_hosts):
                _ip("-n", self.namespace(host), "link", "set", "lo", "up")
                for number in range(len(self.delays)):
                    self._connect(host, number)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Remove it."""
        self._remove()

    def _start_switch(self) -> subprocess.Popen[bytes]:
        script = [sys.executable, "-I", str(Path(__file__).with_name("switch.py"))]
        switch = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace("switch"), *script, str(self.num_hosts), *map(str, self.delays)],
            stdin=subprocess.PIPE,  # the switch ends with it, even if this process is killed
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert switch.stdout is not None
        ready, _, _ = select.select([switch.stdout], [], [], SECONDS)
        if not ready or not switch.stdout.readline():
            _, errors = _end(switch)
            raise NotAvailableError(f"needs TAP devices; the switch said: {_last_line(errors)}")
        return switch

    def _connect(self, host: int, number: int) -> None:
        """Move the host's end of a wire into its namespace; the switch keeps the other."""
        name, device = self.namespace(host), interface(number)
        _ip("-n", self.namespace("switch"), "link", "set", f"tap{number}.{host}", "netns", name, "name", device)
        _ip("-n", name, "address", "add", f"10.{number}.0.{host + 1}/24", "dev", device)
        # Jumbo frames, as clusters have: the largest buffer fits into TCP's first window and takes no round trip more.
        _ip("-n", name, "link", "set", device, "mtu", "9000", "txqueuelen", "10000", "up")

    def _remove(self) -> None:
        if self._switch is not None:
            _end(self._switch)
            self._switch = None
        while self._made:
            with contextlib.suppress(NotAvailableError, subprocess.TimeoutExpired):
                _ip("netns", "delete", self._made.pop())


def interface(number: int) -> str:
    """Name the device by which each host is on network `number`."""
    return f"eth{number}"


def enter(namespace: str) -> None:
    """Move this thread, and those it starts from now on, into a network namespace.

    Raises:
        OSError: If there is no such namespace, or this process may not enter it.
    """
    file = os.open(NAMESPACES / namespace, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there from Python 3.12 on
        if libc.setns(file, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    finally:
        os.close(file)


def _check_available() -> None:
    missing = [
        *([] if sys.platform == "linux" else ["Linux"]),
        *([] if hasattr(os, "geteuid") and os.geteuid() == 0 else ["root"]),
        *([] if shutil.which("ip") else ["iproute2"]),
        *([] if os.path.exists("/dev/net/tun") else ["/dev/net/tun"]),
    ]
    if missing:
        raise NotAvailableError(f"needs {' and '.join(missing)}")


def _remove_left_over() -> None:
    """Remove what a process left that was killed: namespaces with the id of a process that is gone."""
    for path in NAMESPACES.glob("syncbn-*-*"):
        if not Path("/proc", path.name.split("-")[1]).exists():
            _ip("netns", "delete", path.name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise NotAvailableError(
            f"needs the right to make network namespaces; ip {' '.join(arguments)} said: {_last_line(done.stderr)}"
        )


def _end(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """End a process by its standard input, and by force if it does not."""
    try:
        return process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def _last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
