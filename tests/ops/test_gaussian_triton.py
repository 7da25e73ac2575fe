"""The Triton kernels of the Gaussian distance against float64, on a GPU or in the interpreter (so with small shapes)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import kdops
from kdops.gaussian import reference
from kdops.gaussian import triton as kernels
from kdops.gaussian.spec import REDUCTIONS
from tests.contract import Operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def draw(
    b: int, features: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = ([torch.randn(b, *f, generator=generator).to(DEVICE, dtype) for f in features] for _ in range(2))
    return x, y


def check(
    x: list[Tensor], y: list[Tensor], sigma: list[float] | None, mean: bool, need: list[tuple[bool, bool]] | None = None
) -> None:
    """Distances and the gradients that are needed, against float64."""
    need_x, need_y = (list(side) for side in zip(*(need or [(True, True)] * len(x)), strict=True))
    wide = [t.double().requires_grad_() for t in (*x, *y)]
    exact = reference.gaussian_distance(wide[: len(x)], wide[len(x) :], sigma, mean, "none")
    upstream = torch.linspace(-1, 2, exact.numel(), dtype=torch.float64, device=DEVICE).view(exact.shape)
    exact_grads = torch.autograd.grad(exact, wide, upstream)
    tolerance = {"rtol": max(EPS[x[0].dtype], 1e-5), "atol": 1e-9}
    distance, slope, _ = kernels.gaussian_distance(x, y, sigma, mean, REDUCTIONS.index("none"))
    torch.testing.assert_close(distance, exact.detach().to(x[0].dtype), **tolerance)
    for reduction in ("sum", "mean") if len(x[0]) else ("sum",):
        reduced = kernels.gaussian_distance(x, y, sigma, mean, REDUCTIONS.index(reduction))[0]
        torch.testing.assert_close(reduced, getattr(exact, reduction)(1).detach().to(x[0].dtype), **tolerance)
    grads_x, grads_y = kernels.gaussian_distance_backward(upstream.float(), slope, x, y, need_x, need_y)
    for grad, truth, tap, needed in zip((*grads_x, *grads_y), exact_grads, (*x, *y), (*need_x, *need_y), strict=True):
        if not needed:
            assert grad.shape == (0,)
            continue
        assert grad.dtype == tap.dtype
        assert grad.stride() == torch.empty_like(tap).stride()
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(grad.double(), truth, rtol=EPS[tap.dtype], atol=max(EPS[tap.dtype], 1e-5) * scale)


def test_a_tiny_sigma_is_not_adaptive() -> None:
    """Its square is 0 in float32, as which kernels are told of an adaptive one (on a GPU; the interpreter keeps float64)."""
    (x,), (y,) = draw(3, [(8,)])
    distance, _, rate = kernels.gaussian_distance([x, x], [y, x], [1e-24, 1e-24], True, 0)
    assert distance.tolist() == [[1.0] * 3, [0.0] * 3]
    assert torch.isfinite(rate).all()


features = st.lists(
    st.sampled_from([(1,), (2, 3), (31,), (5, 3, 11), (257,), (1024,), (1300,)]), min_size=1, max_size=4
)


@settings(max_examples=12)
@given(
    b=st.integers(1, 3),
    f=features,
    dtype=st.sampled_from(DTYPES),
    sigma=st.sampled_from([0.6, 3.0, None]),
    mean=st.booleans(),
    data=st.data(),
)
def test_any_taps(
    b: int, f: list[tuple[int, ...]], dtype: torch.dtype, sigma: float | None, mean: bool, data: st.DataObject
) -> None:
    x, y = draw(b, f, dtype, data.draw(st.integers(0, 9)))
    need = data.draw(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=len(f), max_size=len(f)))
    check(x, y, None if sigma is None else [sigma * (t + 1) for t in range(len(f))], mean, need)


def test_more_samples_and_chunks_than_a_tile_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_STEPS", 1)
    monkeypatch.setattr(kernels, "ROWS", 2)
    monkeypatch.setattr(kernels, "COLUMNS", 2)
    check(*draw(3, [(5000,), (5,), (4097,)]), None, True)


@pytest.mark.parametrize("z", [0.0, 1e-9, 1e-3, 0.3, 0.4999, 0.5001, 3.0, 200.0])
def test_minus_expm1(z: float) -> None:
    """Its series and its difference, to float32's rounding."""
    x = torch.full((1, 1), (2 * z) ** 0.5, device=DEVICE)
    exponent = float(x.double().square() / 2)
    distance, slope, _ = kernels.gaussian_distance([x], [torch.zeros_like(x)], [1.0], True, 0)
    expected = -torch.expm1(torch.tensor(-exponent, dtype=torch.float64)).item()
    assert distance.item() == pytest.approx(expected, rel=4e-7, abs=1e-38)
    assert slope.item() == pytest.approx(0.5 * (1 - expected), rel=1e-5, abs=1e-38)


def test_one_launch_reads_all_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many taps: one launch and one that finishes the sums; backward one for each kind of need."""
    launched = []
    kind = InterpretedFunction if DEVICE == "cpu" else JITFunction
    run = kind.run
    monkeypatch.setattr(kind, "run", lambda self, *a, **k: (launched.append(self.fn.__name__), run(self, *a, **k))[1])
    x, y = draw(2, [(5,), (2, 3), (7,), (4, 4), (1,)])
    _, slope, _ = kernels.gaussian_distance(x, y, None, True, 0)
    assert launched == ["_squares", "_finish"]
    launched.clear()
    kernels.gaussian_distance_backward(slope, slope, x, y, [True] * 5, [False] * 5)
    assert launched == ["_gradients"]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_step_runs_no_operator_of_torch(reduction: str) -> None:
    """Reductions, casts and the product of upstream gradient and slopes are within the kernels."""
    (x,), (y,) = draw(2, [(4, 6)], torch.bfloat16)
    upstream = torch.ones((2,) if reduction == "none" else (), device=DEVICE, dtype=x.dtype)
    with Operators() as ran:
        distance = kdops.gaussian_distance(x.requires_grad_(), y, reduction=reduction, backend="triton")
        torch.autograd.grad(distance, x, upstream)
    assert ran.names == [
        "kdops::gaussian_distance_triton",
        "kdops::gaussian_distance_backward_triton",
    ]


@pytest.mark.parametrize("shape", [(0, [(4,), (2, 2)]), (2, [(0,), (3,)]), (2, [(0,)])])
def test_empty(shape: tuple[int, list[tuple[int, ...]]]) -> None:
    check(*draw(*shape), [1.0] * len(shape[1]), mean=False)


def test_any_layout_and_upstream_strides() -> None:
    x, y = draw(3, [(4, 3, 5), (2, 6)])
    moved = [x[0].movedim(1, -1).contiguous().movedim(-1, 1), x[1].mT.contiguous().mT]
    check(moved, y, [1.0, 2.0], True)
    check(moved, [moved[0] + 1, y[1]], [1.0, 2.0], True)
    grad, slope = torch.rand(2, 3, 2, device=DEVICE).mT
    strided = kernels.gaussian_distance_backward(grad, slope, x, y, [True] * 2, [False] * 2)[0]
    dense = kernels.gaussian_distance_backward(grad.contiguous(), slope.contiguous(), x, y, [True] * 2, [False] * 2)[0]
    for mine, other, a, b, factor in zip(strided, dense, x, y, 2 * grad * slope, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, factor.view(-1, *[1] * (a.ndim - 1)) * (a - b))
