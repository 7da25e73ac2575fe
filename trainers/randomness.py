"""Random numbers as a function of a key, and the state of the generators in types that torch.load(weights_only=True) accepts."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


@contextmanager
def real_numbers() -> Iterator[None]:
    """What is drawn or tabulated beneath is real, even where a step is simulated on fake tensors, which have no values (kdtrain plan)."""
    with unset_fake_temporarily():
        yield


def random_words(purpose: str, *key: int) -> tuple[int, int, int]:
    """Three independent, uniform 64-bit numbers that depend on nothing but the purpose and the key."""
    digest = hashlib.blake2b(f"{purpose} {[int(part) for part in key]}".encode(), digest_size=24).digest()
    first, second, third = struct.unpack("<3Q", digest)
    return first, second, third


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators of Python, numpy, torch, and of the device."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss_next],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
