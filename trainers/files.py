"""Files that are whole, whatever happens while they are written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Gives a file new content: whoever reads it, whenever, finds the old or the new one."""
    unfinished = path.with_name(
        f"{path.name}.{os.getpid()}.tmp"
    )  # of this process: others may be writing the same file
    try:
        write_synced(unfinished, content)
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if error.errno is not None:  # the system's: its text is made of these
            error.filename = str(path)  # the one that the caller knows
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
