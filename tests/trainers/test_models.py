"""trainers.models: the registry, and EDSR against what is published of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from trainers.errors import InputError
from trainers.models import MODELS, find
from trainers.models.edsr import EDSR, EDSROptions, natural_taps, options_from_state_dict


def test_published_key_names() -> None:
    keys = set(EDSR(EDSROptions(scale=4, features=4, blocks=1)).state_dict())
    modules = [
        "head.0",
        "body.0.body.0",
        "body.0.body.2",
        "body.1",
        "tail.0.0",
        "tail.0.2",
        "tail.1",
        "sub_mean",
        "add_mean",
    ]
    assert keys == {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}


@settings(deadline=None, max_examples=30)
@given(
    scale=st.sampled_from([1, 2, 3, 4, 8]),
    features=st.sampled_from([1, 3, 16, 256]),
    blocks=st.integers(1, 5),
    pixel_range=st.sampled_from([1, 255]),
)
def test_options_from_state_dict_inverts_construction(scale: int, features: int, blocks: int, pixel_range: int) -> None:
    res_scale = 0.1 if features >= 256 else 1.0
    options = EDSROptions.model_validate(
        {"scale": scale, "features": features, "blocks": blocks, "res_scale": res_scale, "pixel_range": pixel_range}
    )
    assert options_from_state_dict(EDSR(options).state_dict()) == options


def test_options_from_a_foreign_state_dict() -> None:
    with pytest.raises(ValueError, match=r"not a state dict of EDSR.*head\.0\.weight"):
        options_from_state_dict(nn.Linear(2, 2).state_dict())


@settings(deadline=None, max_examples=15)
@given(scale=st.sampled_from([2, 3, 4, 8]), height=st.integers(1, 9), width=st.integers(1, 9))
def test_output_size(scale: int, height: int, width: int) -> None:
    network = EDSR(EDSROptions.model_validate({"scale": scale, "features": 2, "blocks": 1}))
    assert network(torch.rand(2, 3, height, width)).shape == (2, 3, scale * height, scale * width)


def test_mean_is_subtracted_and_added() -> None:
    network = EDSR(EDSROptions(features=2, blocks=1))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    colour = network(torch.rand(1, 3, 2, 2))[0, :, 0, 0]
    torch.testing.assert_close(colour, torch.tensor([0.4488, 0.4371, 0.4040]))


def test_pixel_range_255_takes_and_gives_zero_to_one() -> None:
    """A network in 0-255 equals one in 0-1 whose biases are 255 times smaller: all its layers are homogeneous."""
    inside255 = EDSR(EDSROptions(features=4, blocks=2, pixel_range=255)).double()
    inside1 = EDSR(EDSROptions(features=4, blocks=2)).double()
    state = {k: v / 255 if k.endswith("bias") else v for k, v in inside255.state_dict().items()}
    inside1.load_state_dict(state)
    image = torch.rand(1, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(inside255(image), inside1(image))


def test_residual_scaling() -> None:
    plain, scaled = (EDSR(EDSROptions(features=4, blocks=1, res_scale=r)) for r in (1.0, 0.5))
    scaled.load_state_dict(plain.state_dict())
    x = torch.rand(1, 4, 5, 5)
    torch.testing.assert_close(scaled.body[0](x) - x, 0.5 * (plain.body[0](x) - x))


@pytest.mark.parametrize(
    ("blocks", "paths"),
    [
        (4, ["body.0", "body.2", "body.4"]),
        (8, ["body.2", "body.4", "body.8"]),
        (16, ["body.4", "body.10", "body.16"]),
        (32, ["body.10", "body.20", "body.32"]),
    ],
)
def test_natural_taps_are_the_thirds(blocks: int, paths: list[str]) -> None:
    options = EDSROptions(features=2, blocks=blocks)
    taps = natural_taps(options)
    assert list(taps.values()) == paths
    network = EDSR(options)
    for path in taps.values():
        assert isinstance(network.get_submodule(path), nn.Module)


def test_third_tap_is_before_the_global_skip() -> None:
    options = EDSROptions(features=4, blocks=2)
    network = EDSR(options)
    seen = []
    network.get_submodule(natural_taps(options)["t3"]).register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    network(torch.rand(1, 3, 5, 5))
    (entering, leaving), conv = seen[0], network.body[-1]
    torch.testing.assert_close(leaving, conv(entering))  # still so after the forward: the skip was not added in place


def test_registry() -> None:
    assert find("edsr") is MODELS["edsr"]
    network = find("edsr").build(find("edsr").options(features=4, blocks=1))
    assert isinstance(network, EDSR)
    with pytest.raises(InputError, match="did you mean 'edsr'"):
        find("esdr")


@pytest.mark.parametrize("wrong", [{"features": 0}, {"blocks": 1.5}, {"scale": 5}, {"feature": 64}])
def test_wrong_options(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        EDSROptions.model_validate(wrong)
