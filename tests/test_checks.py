"""Options that are numbers: what is taken for one, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kdops import checks
from kdops.dispatch import SPECS

MAPS = torch.ones(1, 4, 3, 3)
SCALARS = {
    "pairwise_distance": {},
    "matched_distance": {},
    "contrastive_ratio": {"eps": 0.5},
    "spatial_attention": {"scale": 0.5},
    "channel_attention": {"scale": 0.5},
    "channel_attention_distance": {"scale": 0.5},
    "affinity_distance": {"eps": 0.5},
    "gaussian_distance": {"sigma": 0.5},
    "codebook_cross_entropy": {"temperature": 0.5},
    "mscn": {"sigma": 0.5, "c": 0.5},
    "brisque_features": {},
    "piqe": {},
}
WHOLE = {"pairwise_distance": "p", "affinity_distance": "p", "channel_attention": "heads", "mscn": "window"}


def arguments(name: str) -> list[Tensor]:
    count = sum(p.kind is not p.KEYWORD_ONLY for p in inspect.signature(SPECS[name].function).parameters.values())
    given = [MAPS] * count
    return given if name != "codebook_cross_entropy" else [MAPS, MAPS, torch.ones(2, 4)]


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, options in SCALARS.items() for option in options]
)
def test_a_number_is_no_tensor(name: str, option: str) -> None:
    """A learned one would get no gradient, without a word; numbers of numpy are numbers."""
    call, value = partial(SPECS[name].function, *arguments(name)), SCALARS[name][option]
    for wrong, why in ((torch.nn.Parameter(torch.tensor(value)), "is a tensor"), ("a", "must be a number")):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: {option} .*{why}"):
            call(**{option: wrong})
    torch.testing.assert_close(call(**{option: np.float32(value)}), call(**{option: value}))
    for beyond in (10**400, Fraction(10**400)):
        with pytest.raises(ValueError, match=rf"^{name}: {option} is beyond"):
            call(**{option: beyond})


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name, options in SCALARS.items() if "scale" in options])
def test_a_scale_is_finite(name: str, scale: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: scale is {scale}, but it must be finite"):
        SPECS[name].function(*arguments(name), scale=scale)


def test_every_number_was_tried() -> None:
    for name, spec in SPECS.items():
        floats = {k for k, p in inspect.signature(spec.function).parameters.items() if "float" in str(p.annotation)}
        assert floats == set(SCALARS[name])


@pytest.mark.parametrize(("name", "option"), WHOLE.items())
def test_a_whole_number_is_one(name: str, option: str) -> None:
    call = partial(SPECS[name].function, *([MAPS.flatten(1)] * 2 if name == "pairwise_distance" else arguments(name)))
    torch.testing.assert_close(call(**{option: np.int64(1)}), call(**{option: 1}))
    with pytest.raises((TypeError, ValueError), match=f"^{name}: {option} is 1.5, but it must be"):
        call(**{option: 1.5})


@pytest.mark.parametrize(
    ("bring", "stated"), [(checks.for_distance, torch.float32), (checks.for_attention, torch.bfloat16)]
)
@pytest.mark.parametrize(
    "dtypes", [("float32", "float64"), ("float64", "bfloat16"), ("float32", "float16"), ("float16",)]
)
def test_autocast_brings_dtypes_together_and_float64_stays(
    bring: Callable[..., tuple[Tensor, ...]], stated: torch.dtype, dtypes: tuple[str, ...]
) -> None:
    given = [torch.zeros(2, dtype=getattr(torch, name)) for name in dtypes]
    assert all(one is two for one, two in zip(bring(*given), given, strict=True))  # outside autocast
    with torch.autocast("cpu", torch.bfloat16):
        found = bring(*given)
    assert {t.dtype for t in found} == {torch.float64 if "float64" in dtypes else stated}
