"""Files that are written completely or not at all, also when the process is killed or the power fails."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it, and wait for the disk each time.

    Args:
        path: The file; a reader finds the old or the new content, never a part. Only one process may write it at a
            time.
        write: Called with the open file.
        keep: Where the file goes that was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    if keep is not None and path.exists():
        path.replace(keep)
    temporary.replace(path)
    if os.name == "posix":  # so that the renames survive a power failure; other systems do not open directories
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_file(path: Path, content: str | bytes) -> None:
    """Write text in UTF-8, or bytes, as `write_atomically` does."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda file: file.write(data))
