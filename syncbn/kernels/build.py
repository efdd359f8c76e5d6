"""Build a C++ file with the system's compiler on its first use, and keep the library for this user and machine."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: every process builds for itself
    fcntl = None

_TIMEOUT = 300  # seconds
_MEMORY = 24 * 3600  # seconds for which a build that failed is not tried again
_FLAGS: tuple[str, ...] = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
if platform.system() == "Linux":
    _FLAGS += ("-Wl,-Bsymbolic", "-Wl,--no-as-needed")  # names of our own first; libraries named before the source


def load(source: Path, more_flags: Sequence[str] = ("-std=c++17",), notice: str = "") -> ctypes.CDLL:
    """Load the library of ``source``; build it if it is not in the cache.

    The compiler is the command in ``CXX``, else c++, g++ or clang++. The cache is ``syncbn/kernels`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``; where that cannot be written, every process builds for itself. A library is
    named after what it depends on, its processor too, and put in its place at once. Of processes that start together
    one builds, and the others wait for it. A build that failed is not tried again for a day.

    Args:
        source: The C++ file.
        more_flags: For the compiler.
        notice: Logged as a warning by the process that builds, for a build that is long enough to wonder about.

    Raises:
        FileNotFoundError: If there is no compiler.
        PermissionError: If others could have put a library into the cache.
        RuntimeError: If the compiler fails, or did so within the last day.
        OSError: If the library cannot be loaded.
        subprocess.TimeoutExpired: If the compiler takes longer than five minutes.
    """
    command = _command(more_flags)
    name, folder = _name(source, command), _cache()
    if folder is not None:
        library = folder / name
        problem: OSError | None = None
        for _ in range(2):  # a damaged one is built anew
            found = _find_or_build(command, source, library, notice, problem)
            try:
                return ctypes.CDLL(str(found))
            except OSError as error:
                problem = error
        if notice:  # too long for every process; the folder's system runs nothing, or the library misses something
            library.with_suffix(".failed").write_text(f"expected {library} to load, got {problem}")
            raise OSError(f"expected {library} to load, got {problem}") from problem
    with tempfile.TemporaryDirectory(prefix="syncbn-", ignore_cleanup_errors=True) as private:
        return ctypes.CDLL(str(_build(command, source, Path(private) / name)))


def keeps() -> bool:
    """Whether what `load` builds is kept for later processes; raises what `load` raises."""
    return _cache() is not None


def _command(more_flags: Sequence[str]) -> list[str]:
    tuning = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return [*_compiler(), *_FLAGS, *more_flags, tuning]


def _name(source: Path, command: list[str]) -> str:
    """Name the library after what it depends on: the sources beside and below, the command and the processor."""
    texts = [
        path.read_text()
        for path in (source, *sorted(source.parent.rglob("*.cpp")), *sorted(source.parent.rglob("*.h")))
    ]
    depends_on = [*texts, *command, _run([*_compiler(), "--version"]), _processor()]
    return f"{source.stem}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]}.so"


def _compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("expected a C++ compiler (c++, g++ or clang++) on PATH, or in CXX, found none")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder``, which the system gives back when a process dies."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _find_or_build(command: list[str], source: Path, library: Path, notice: str, problem: OSError | None) -> Path:
    """Return the library in the cache, after a build if it is not there, or if it is the one that had a problem."""
    damaged = library.stat().st_ino if problem is not None and library.exists() else None
    if damaged is not None or not library.exists():
        with _alone(library.parent):
            if damaged is not None and library.exists() and library.stat().st_ino == damaged:
                library.unlink()
            if not library.exists():
                _build_once(command, source, library, notice)
    _refuse_foreign(library)
    return library


def _build_once(command: list[str], source: Path, library: Path, notice: str) -> None:
    """Build, but not again what failed within the last day: other processes need not wait for the same end."""
    failed = library.with_suffix(".failed")
    if failed.exists() and time.time() - failed.stat().st_mtime < _MEMORY:
        raise RuntimeError(f"{failed.read_text()} (not tried again for a day; remove {failed} to do so)")
    if notice:
        logging.getLogger("syncbn").warning("%s", notice)
    try:
        _build(command, source, library)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        failed.write_text(str(error))
        raise
    failed.unlink(missing_ok=True)


def _build(command: list[str], source: Path, library: Path) -> Path:
    handle, partial = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        _run([*command, str(source), "-o", partial])
        os.chmod(partial, 0o700)
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)
    return library


def _run(command: list[str]) -> str:
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=_TIMEOUT)
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        said = errors.strip()[-1000:]
        raise RuntimeError(f"expected `{shlex.join(command)}` to succeed, got exit code {process.returncode}: {said}")
    return output


def _end(process: "subprocess.Popen[str]") -> None:
    """End a compiler, which works by processes of its own."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _processor() -> str:
    """Describe the processor, for which the library is built: homes are shared between machines."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        first = []
    return "\n".join(
        [platform.machine(), *(row for row in first if row.startswith(("model", "flags", "CPU", "Feat")))]
    )


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
        raise PermissionError(
            f"expected {path} to be owned by user {os.geteuid()} and to be writable for nobody else, got owner "
            f"{status.st_uid} and mode {stat.filemode(status.st_mode)}; remove it"
        )
