"""The Triton kernels of the locally normalised image against float64, on images of several tiles."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import kdops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize(("shape", "window"), [((1, 2, 5, 66), 7), ((1, 3, 3, 2), 5)])
def test_several_planes_and_tiles(shape: tuple[int, ...], window: int, padding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = (255 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(DEVICE).requires_grad_()
    upstream = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(2)]
    image = exact.detach().float().requires_grad_()
    mine = kdops.mscn(image, window=window, padding=padding, backend="triton")
    theirs = kdops.mscn(image.double(), window=window, padding=padding, backend="reference")
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    for used in ([0, 1], [0], [1]):  # one result may be unused
        grads = [
            torch.autograd.grad([o[i] for i in used], image, [upstream[i].to(o[i]) for i in used], retain_graph=True)[0]
            for o in (mine, theirs)
        ]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_a_constant_image_is_exactly_zero() -> None:
    image = torch.full((1, 1, 9, 9), 255.0, device=DEVICE, requires_grad=True)
    normalised, std = kdops.mscn(image, padding="replicate", backend="triton")
    assert normalised.eq(0).all()
    assert torch.autograd.grad(std.sum(), image)[0].eq(0).all()
