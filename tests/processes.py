"""Processes that a test has started, with all that they have started."""

import contextlib
import os
import signal
from pathlib import Path


def started_by(pid):
    """List what a process has started, and what that has, as {pid: command}; the ended are left out."""
    parents, commands = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            number = int(process.name)
            parents[number] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            commands[number] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    found = [pid]
    for number in found:
        found += [child for child, parent in parents.items() if parent == number]
    return {number: commands[number] for number in found[1:] if commands[number]}  # a zombie's is empty


def kill(process):
    """End a Popen and all that it has started by SIGKILL."""
    for pid in (process.pid, *started_by(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
