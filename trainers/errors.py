"""The two ways a run may end that are not bugs: bad input (exit code 2) and divergence (exit code 4)."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(Exception):
    """What the user gave cannot be used. `kdtrain` prints every entry of `problems` and exits with code 2.

    Each problem says what was given, what is needed and what to do.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Diverged(Exception):
    """A loss became NaN or infinite. `kdtrain` exits with code 4; the message names the first such term."""
