"""The ways a run may end that are not bugs: bad input (exit code 2), lack of memory (3) and divergence (4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class InputError(Exception):
    """What the user gave cannot be used. `kdtrain` prints every entry of `problems` and exits with code 2.

    Each problem says what was given, what is needed and what to do.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


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
