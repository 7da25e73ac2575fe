"""Reading a network's options from the keys of its state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor


def require(state_dict: Mapping[str, Tensor], network: str, *keys: str) -> None:
    """ValueError that names the keys that this network's state dicts have and this one lacks."""
    missing = [key for key in keys if key not in state_dict]
    if missing:
        raise ValueError(f"not a state dict of {network}: it lacks {', '.join(missing)}")


def count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the group of `pattern` takes at the beginning of keys: r"body\\.(\\d+)\\." counts blocks."""
    found = (re.match(pattern, key) for key in state_dict)
    return len({match.group(1) for match in found if match})


def shortest_between(low: float, high: float) -> float:
    """The number of the fewest decimals in [low, high), the smallest of them: 2.66 for [2.6588, 2.6615)."""
    for decimals in range(16):
        candidate = round(math.ceil(low * 10.0**decimals) / 10.0**decimals, decimals)
        if low <= candidate < high:
            return candidate
    return low
