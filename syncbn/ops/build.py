"""Build a C++ file with the system's compiler on its first use, and keep the library for this user and machine."""

import ctypes
import hashlib
import math
import os
import shlex
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from . import compiler

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: every process builds for itself
    fcntl = None

_MEMORY = 24 * 3600  # seconds for which source that the compiler refused is not tried again


def load(source: Path) -> ctypes.CDLL:
    """Load the library of ``source``, a C++ file; build it if it is not in the cache.

    The compiler is the command in ``CXX``, else c++, g++ or clang++. The cache is ``syncbn/kernels`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``; where that cannot be written, every process builds for itself. A library is
    named after what it depends on, its processor too, and put in its place at once. Of processes that start together
    one builds, and the others wait for it. What the compiler refuses is not tried again for a day; a build that was
    interrupted, killed or took too long is tried again by the next process that starts.

    Raises:
        FileNotFoundError: If there is no compiler.
        PermissionError: If others could have put a library into the cache.
        RuntimeError: If the compiler fails, or refused the source within the last day.
        OSError: If the library cannot be loaded.
        TimeoutError: If the compiler takes longer than five minutes.
    """
    command = compiler.command()
    name, folder = _name(source, command), _cache()
    if folder is not None:
        library = folder / name
        problem: OSError | None = None
        for _ in range(2):  # a damaged one is built anew
            found = _find_or_build(command, source, library, problem)
            try:
                return ctypes.CDLL(str(found))
            except OSError as error:
                problem = error
    with tempfile.TemporaryDirectory(prefix="syncbn-", ignore_cleanup_errors=True) as private:
        return ctypes.CDLL(str(_build(command, source, Path(private) / name)))


def _name(source: Path, command: list[str]) -> str:
    """Name the library after what it depends on: the sources beside it, the command and the processor."""
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    depends_on = [*texts, *command, compiler.run([*compiler.find(), "--version"]), compiler.describe_processor()]
    return f"{source.stem}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]}.so"


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


def _find_or_build(command: list[str], source: Path, library: Path, problem: OSError | None) -> Path:
    """Return the library in the cache, after a build if it is not there, or if it is the one that had a problem."""
    damaged = library.stat().st_ino if problem is not None and library.exists() else None
    if damaged is not None or not library.exists():
        start = time.time()
        with _alone(library.parent):
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
    except compiler.RefusedError as error:
        refusal.write_text(str(error))
        raise RuntimeError(f"{error} {forget}") from error
    except TimeoutError as error:
        timeout.write_text(str(error))
        raise
    for path in (refusal, timeout):
        path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime if path.exists() else math.inf


def _build(command: list[str], source: Path, library: Path) -> Path:
    handle, partial = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        compiler.run([*command, str(source), "-o", partial])
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
        raise PermissionError(
            f"expected {path} to be owned by user {os.geteuid()} and to be writable for nobody else, got owner "
            f"{status.st_uid} and mode {stat.filemode(status.st_mode)}; remove it"
        )
