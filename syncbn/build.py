"""Build a C++ file with the system's compiler on its first use, and keep the library for this user and machine."""

import ctypes
import hashlib
import math
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

_MEMORY = 24 * 3600  # seconds for which source that the compiler refused is not tried again
TIMEOUT = 300  # seconds
# What compilers and linkers print of the source; without it the machine was at fault: memory, disk, a signal.
_OF_THE_SOURCE = re.compile(
    r":\d+: error: |fatal error: [^\n]*no such file|undefined (reference|symbol)|symbol\(s\) not found", re.IGNORECASE
)
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")


class RefusedError(RuntimeError):
    """The compiler's own error, which would come again."""


def load(source: Path) -> ctypes.CDLL:
    """Load the library of ``source``, a C++ file; build it if it is not in the cache.

    The compiler is the command in ``CXX``, else c++, g++ or clang++. The cache is ``syncbn/kernels`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``; where that cannot be written, every process builds for itself. A library is
    named after what it depends on, its processor too, and put in its place at once. Of processes that start together
    one builds, and the others wait for it. What the compiler refuses is not tried again for a day; a build that was
    interrupted, killed or took too long is tried again by the next process that starts.

    Raises FileNotFoundError without a compiler; PermissionError if others could have put a library into the cache;
    RuntimeError if the compiler fails, or has; TimeoutError if it takes longer than five minutes.
    """
    command = _command()
    name, folder = _name(source, command), _cache()
    if folder is not None:
        library = folder / name
        for is_damaged in (False, True):  # a damaged one is built anew
            found = _find_or_build(command, source, library, is_damaged)
            with suppress(OSError):
                return ctypes.CDLL(str(found))
    with tempfile.TemporaryDirectory(prefix="syncbn-", ignore_cleanup_errors=True) as private:
        return ctypes.CDLL(str(_build(command, source, Path(private) / name)))


def _name(source: Path, command: list[str]) -> str:
    """Name the library after what it depends on: the sources beside it, the command and the processor."""
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    depends_on = [*texts, *command, run_compiler([*_find_compiler(), "--version"]), _describe_processor()]
    return f"{source.stem}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]}.so"


def _find_or_build(command: list[str], source: Path, library: Path, is_damaged: bool) -> Path:
    """Return the library in the cache, after a build if it is not there, or if it is damaged."""
    damaged = library.stat().st_ino if is_damaged and library.exists() else None
    if damaged is not None or not library.exists():
        start = time.time()
        with FileLock(library.parent.with_suffix(".lock"), mode=0o600):  # the system lifts it when a process dies
            if damaged is not None and library.exists() and library.stat().st_ino == damaged:
                library.unlink()
            if not library.exists():
                _build_once(command, source, library, start)
    _refuse_foreign(library)
    return library


def _build_once(command: list[str], source: Path, library: Path, start: float) -> None:
    """Build, but not what the compiler has refused, nor what took too long while this process waited for it."""
    refusal, timeout = library.with_suffix(".refused"), library.with_suffix(".timeout")
    forget = f"(not tried again for a day; to forget it: rm {shlex.quote(str(refusal))})"
    if _age(refusal) < _MEMORY:
        raise RuntimeError(f"{refusal.read_text()} {forget}")
    if _age(timeout) < time.time() - start:
        raise TimeoutError(timeout.read_text())
    try:
        _build(command, source, library)
    except (RefusedError, TimeoutError) as error:
        (timeout if isinstance(error, TimeoutError) else refusal).write_text(str(error))
        raise error if isinstance(error, TimeoutError) else RuntimeError(f"{error} {forget}") from error
    for path in (refusal, timeout):
        path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime if path.exists() else math.inf


def _build(command: list[str], source: Path, library: Path) -> Path:
    handle, partial = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        run_compiler([*command, str(source), "-o", partial])
        os.chmod(partial, 0o700)
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)
    return library


def _cache() -> Path | None:
    """Return the folder for libraries, made if it is missing; None if it cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "syncbn" / "kernels"
    if not folder.is_absolute():  # no home
        return None
    try:
        for part in (folder.parent.parent, folder.parent, folder):  # mode is not for parents=True
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    _refuse_foreign(folder)
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"expected {parent} not to be writable for everybody, who could replace {folder}")
    return folder if os.access(folder, os.W_OK) else None


def _refuse_foreign(path: Path) -> None:
    """Refuse what another user owns or can write: it is about to be run."""
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        found = f"owner {status.st_uid} and mode {stat.filemode(status.st_mode)}; remove it"
        wanted = f"owned by user {os.geteuid()} and to be writable for nobody else"
        raise PermissionError(f"expected {path} to be {wanted}, got {found}")


def _command() -> list[str]:
    """Return the command that compiles for this processor, without the source."""
    tuning = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return [*_find_compiler(), *_FLAGS, tuning]


def _find_compiler() -> list[str]:
    """Return the command of the compiler: ``CXX``, else c++, g++ or clang++; FileNotFoundError if there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("expected a C++ compiler (c++, g++ or clang++) on PATH, or in CXX, found none")


def run_compiler(arguments: list[str]) -> str:
    """Run a compiler, and return what it prints; RefusedError if it refuses the source, see `load` for others."""
    text, pipe = shlex.join(arguments), subprocess.PIPE
    env = {**os.environ, "LC_ALL": "C"}  # in English
    with subprocess.Popen(
        arguments, stdout=pipe, stderr=pipe, text=True, errors="replace", env=env, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except BaseException as error:
            if hasattr(os, "killpg"):  # it works by processes of its own
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"expected `{text}` to end within {TIMEOUT} s; it was stopped") from None
            raise
    if process.returncode:
        message = f"expected `{text}` to succeed, got exit code {process.returncode}: {errors.strip()[-1000:]}"
        is_refused = process.returncode > 0 and _OF_THE_SOURCE.search(errors) is not None
        raise (RefusedError if is_refused else RuntimeError)(message)
    return output


def _describe_processor() -> str:
    """Describe the processor, for which the library is built: homes are shared between machines."""
    file = Path("/proc/cpuinfo")
    first = file.read_text().split("\n\n")[0].splitlines() if file.exists() else []
    facts = [row for row in first if row.startswith(("model", "flags", "CPU", "Feat"))]
    return "\n".join([platform.machine(), *facts])
