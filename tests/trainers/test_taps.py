"""Taps take what the module gives; adapters start where least squares ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainers.errors import InputError
from trainers.models import find
from trainers.taps import Adapters, Tapped, tap_problems


def edsr() -> nn.Module:
    torch.manual_seed(0)
    return find("edsr").build(find("edsr").options(scale=2, features=4, blocks=3))


def test_taps_are_the_outputs_of_their_modules() -> None:
    network, image = edsr(), torch.rand(2, 3, 8, 8)
    output, taps = Tapped(network, {"late": "body.1", "early": "head.0"})(image)
    torch.testing.assert_close(output, network(image))
    assert list(taps) == ["late", "early"]
    head = network.get_submodule("head.0")(network.get_submodule("sub_mean")(image))
    torch.testing.assert_close(taps["early"], head)
    torch.testing.assert_close(taps["late"], network.get_submodule("body")[:2](head))


def test_taps_leave_no_hook_behind() -> None:
    network = edsr()
    tapped = Tapped(network, {"t": "body.0"})
    tapped(torch.rand(1, 3, 8, 8))
    with pytest.raises(RuntimeError):
        tapped(torch.rand(1, 5, 8, 8))
    assert not any(module._forward_hooks for module in network.modules())


def test_a_wrong_path_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"tap t: there is no module body\.33; nearest: .*body\.3"):
        Tapped(edsr(), {"t": "body.33"})
    assert tap_problems(edsr(), {"a": "body.0", "b": "tail", "c": "nothing like it"})[0].startswith("tap c")


def test_a_tap_must_be_a_feature_map() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.unused = nn.Flatten(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.flatten(x)

    for path, said in (("flatten", r"gives \(1, 12\)"), ("unused", "was not run")):
        with pytest.raises(InputError, match=said):
            Tapped(Tokens(), {"t": path})(torch.zeros(1, 3, 2, 2))


def test_adapters_start_from_the_least_squares_fit() -> None:
    """The teacher's taps are an affine map of the student's: the fit finds it, and the normalised RMS is 1."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(6, 3, 5, 5, generator=generator)
    matrix, offset = torch.randn(7, 3, generator=generator), torch.randn(7, generator=generator)

    def student(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {"t": x}

    def teacher(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {"t": 20 * (torch.einsum("tc,bchw->bthw", matrix, x) + offset[:, None, None])}

    adapters = Adapters(student(samples)[1], teacher(samples)[1])
    adapters.calibrate((student(x)[1], teacher(x)[1]) for x in samples.split(1))
    normalised = adapters.normalise(teacher(samples)[1])["t"]
    torch.testing.assert_close(normalised.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(adapters.adapt({"t": samples})["t"], normalised, atol=1e-4, rtol=1e-4)


def test_adapters_survive_dead_and_equal_channels() -> None:
    image = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    degenerate = torch.cat([image, image, torch.zeros_like(image)], dim=1)
    adapters = Adapters({"t": degenerate}, {"t": degenerate})
    adapters.calibrate(({"t": x}, {"t": x}) for x in degenerate.split(1))
    torch.testing.assert_close(
        adapters.adapt({"t": degenerate})["t"], adapters.normalise({"t": degenerate})["t"], atol=1e-4, rtol=1e-4
    )


def test_adapters_refuse_taps_that_do_not_belong_together() -> None:
    small, large = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8)
    with pytest.raises(InputError, match="tap a: the student's is"):
        Adapters({"a": small, "b": small}, {"a": large, "b": small})
    with pytest.raises(InputError, match="the same names"):
        Adapters({"a": small}, {"b": small})
