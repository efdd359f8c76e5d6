"""Build a C++ file with the system's compiler on its first use, and keep the library for this user and machine."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_TIMEOUT = 60  # seconds
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fPIC", "-shared", "-pthread")


def load(source: Path) -> ctypes.CDLL:
    """Load the library of ``source`` and the headers beside it; build it if it is not in the cache.

    The compiler is the command in ``CXX``, else c++, g++ or clang++. The cache is ``syncbn/kernels`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``; where that cannot be written, every process builds for itself. A library is
    named after what it depends on, its processor too, and put in its place at once, so that processes which start
    together do not disturb each other.

    Raises:
        FileNotFoundError: If there is no compiler.
        PermissionError: If others could have put a library into the cache.
        RuntimeError: If the compiler fails.
        OSError: If the library cannot be loaded.
    """
    compiler = _compiler()
    tuning = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [*compiler, *_FLAGS, tuning]
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    depends_on = [*texts, *command, _run([*compiler, "--version"]), _processor()]
    name = f"{source.stem}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]}.so"
    folder = _cache()
    if folder is not None:
        library = folder / name
        if not library.exists():
            _build(command, source, library)
        _refuse_foreign(library)
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # damaged, or where nothing may be run
            library.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="syncbn-", ignore_cleanup_errors=True) as private:
        return ctypes.CDLL(str(_build(command, source, Path(private) / name)))


def _compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("expected a C++ compiler (c++, g++ or clang++) on PATH, or in CXX, found none")


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
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False)
    if result.returncode:
        said = result.stderr.strip()[-1000:]
        raise RuntimeError(f"expected `{shlex.join(command)}` to succeed, got exit code {result.returncode}: {said}")
    return result.stdout


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
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    _refuse_foreign(folder)
    return folder if os.access(folder, os.W_OK) else None


def _refuse_foreign(path: Path) -> None:
    """Refuse what another user owns or can write: it is about to be run."""
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"expected {path} to be owned by user {os.geteuid()} and to be writable for nobody else, got owner "
            f"{status.st_uid} and mode {stat.filemode(status.st_mode)}; remove it"
        )
