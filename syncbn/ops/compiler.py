"""The system's C++ compiler: how it is found, called, bounded in time, and ended."""

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

TIMEOUT = 300  # seconds
# What compilers and linkers print of the source; without it the machine was at fault: memory, disk, a signal.
_OF_THE_SOURCE = re.compile(
    r":\d+: error: |fatal error: [^\n]*no such file|undefined (reference|symbol)|symbol\(s\) not found", re.IGNORECASE
)
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")


class RefusedError(RuntimeError):
    """The compiler's own error, which would come again."""


def command() -> list[str]:
    """Return the command that compiles for this processor, without the source."""
    tuning = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return [*find(), *_FLAGS, tuning]


def find() -> list[str]:
    """Return the command of the compiler: ``CXX``, else c++, g++ or clang++.

    Raises:
        FileNotFoundError: If there is none.
    """
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("expected a C++ compiler (c++, g++ or clang++) on PATH, or in CXX, found none")


def run(arguments: list[str]) -> str:
    """Run a compiler, and return what it prints.

    Raises:
        RefusedError: If it refuses the source, which it would do again.
        RuntimeError: If it fails otherwise: killed, out of memory, a full disk.
        TimeoutError: If it took longer than `TIMEOUT` seconds.
    """
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},  # in English
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            _end(process)
            raise TimeoutError(
                f"expected `{shlex.join(arguments)}` to end within {TIMEOUT} s; it was stopped"
            ) from None
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        said = errors.strip()[-1000:]
        message = f"expected `{shlex.join(arguments)}` to succeed, got exit code {process.returncode}: {said}"
        is_refused = process.returncode > 0 and _OF_THE_SOURCE.search(errors) is not None
        raise (RefusedError if is_refused else RuntimeError)(message)
    return output


def _end(process: "subprocess.Popen[str]") -> None:
    """End a compiler, which works by processes of its own."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def describe_processor() -> str:
    """Describe the processor, for which the library is built: homes are shared between machines."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        first = []
    return "\n".join(
        [platform.machine(), *(row for row in first if row.startswith(("model", "flags", "CPU", "Feat")))]
    )
