"""The ways a run may end that are not bugs: bad input (exit code 2), lack of memory (3) and divergence (4)."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import torch

ADVICE = {
    errno.ENOENT: "give a path that exists, or make its folder first",
    errno.ENOTDIR: "a file is where a folder is needed: give another path",
    errno.EEXIST: "a file is where a folder is needed: give another path",
    errno.EISDIR: "a folder is where a file is needed: give another path",
    errno.EACCES: "give a place that this user may read and write",
    errno.EPERM: "give a place that this user may read and write",
    errno.EROFS: "give a place that can be written",
    errno.ENAMETOOLONG: "give a shorter name",
}


class InputError(Exception):
    """What the user gave cannot be used. `kdtrain` prints every entry of `problems` and exits with code 2.

    Each problem says what was given, what is needed and what to do.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ImageLost(InputError):
    """An image cannot be read or measured any more. On several devices one process finds it, and says so itself."""

    def __init__(self, cause: InputError) -> None:
        super().__init__([*cause.problems, "put that right to go on"])


class Diverged(Exception):
    """A loss became NaN or infinite. `kdtrain` exits with code 4; the message names the first such term."""


class OutOfMemory(Exception):
    """A step does not fit, whatever is tried. `kdtrain` exits with code 3; the message names what takes most."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU torch has a type for it, on a CPU only a text."""
    texts = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def unusable_path(error: BaseException) -> str | None:
    """What a failure says about a path that cannot be used; None if it names none, or one of ours, whose absence is a bug."""
    if not isinstance(error, OSError) or error.errno not in ADVICE or not isinstance(error.filename, (str, Path)):
        return None
    if Path(error.filename).absolute().is_relative_to(Path(__file__).parent):
        return None
    return f"{error.filename}: {error.strerror}: {ADVICE[error.errno]}"


def disk_failure(error: BaseException) -> str | None:
    """What a failure says about a disk that is full or broken; None if it is none."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}: " + ("look after the disk" if error.errno == errno.EIO else "free some space")


def process_lost(error: BaseException) -> str | None:
    """What a failure says about another process of this run that has ended; None if it is none."""
    text = str(error)
    # torch says so where it notices the signal first; else the batch that was on its way breaks off, with a GPU in a thread that pins it.
    ended = ("DataLoader worker", "Pin memory thread exited")
    if isinstance(error, (ConnectionError, EOFError)) or text.startswith(ended):
        return f"a data worker has ended ({text or type(error).__name__}): if memory was short, lower data.workers"
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    if isinstance(error, RuntimeError) and any(said in text for said in lost):
        return "the process of another device has ended: see what it said"
    return None
