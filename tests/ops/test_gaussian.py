"""The Gaussian distance against loops over single numbers, and what only it promises."""

from __future__ import annotations

from math import expm1

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdops
import kdops.nn
from tests.contract import RecordOps

BACKENDS = [
    b
    for b, said in kdops.explain("gaussian_distance", torch.zeros(1, 1), torch.zeros(1, 1)).items()
    if said.startswith("yes") and b != "triton"  # its own tests are in test_gaussian_triton.py
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(4, 3, 5), (4, 2, 3, 7), (4, 1)]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def drawn_taps(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [drawn(*shape, seed=seed + t, dtype=dtype) for t, shape in enumerate(SHAPES)]


def by_loops(x: Tensor, y: Tensor, sigma: float | str, mean: bool) -> list[float]:
    """Of each sample, in Python's own arithmetic."""
    rows = [
        [(a - b) ** 2 for a, b in zip(u, v, strict=True)]
        for u, v in zip(*(t.flatten(1).tolist() for t in (x, y)), strict=True)
    ]
    d2 = [sum(row) / (len(row) if mean else 1) for row in rows]
    variance = sum(d2) / len(d2) + 1e-12 if isinstance(sigma, str) else sigma**2
    return [-expm1(-d / (2 * variance)) for d in d2]


@every_backend
@given(
    b=st.integers(1, 5),
    features=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    sigma=st.sampled_from([0.3, 1.0, 5.0, "adaptive"]),
    mean=st.booleans(),
)
def test_it_is_its_definition(backend: str, b: int, features: list[int], sigma: float | str, mean: bool) -> None:
    x, y = drawn(b, *features), drawn(b, *features, seed=1)
    statistic = "mean" if mean else "sum"
    out = kdops.gaussian_distance(x, y, sigma=sigma, statistic=statistic, reduction="none", backend=backend)
    expected = by_loops(x, y, sigma, mean)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12)
    for reduction, reduce in (("mean", np.mean), ("sum", np.sum)):
        out = kdops.gaussian_distance(x, y, sigma=sigma, statistic=statistic, reduction=reduction, backend=backend)
        np.testing.assert_allclose(out.item(), reduce(expected), rtol=1e-12)


@every_backend
@pytest.mark.parametrize("sigma", [2.0, (0.5, 1.0, 2.0), "adaptive"])
def test_a_list_is_its_taps_one_by_one(backend: str, sigma: float | tuple[float, ...] | str) -> None:
    x, y = drawn_taps(0), drawn_taps(10)
    widths = sigma if isinstance(sigma, tuple) else (sigma,) * 3
    each = [
        kdops.gaussian_distance(a, b, sigma=s, reduction="none", backend=backend)
        for a, b, s in zip(x, y, widths, strict=True)
    ]
    table = kdops.gaussian_distance(x, tuple(y), sigma=sigma, reduction="none", backend=backend)
    assert torch.equal(table, torch.stack(each))
    torch.testing.assert_close(kdops.gaussian_distance(x, y, sigma=sigma, backend=backend), table.mean(dim=1))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@settings(max_examples=8)
@given(b=st.integers(1, 3), f=st.sampled_from([1, 31, 2047, 2049, 32769, 70001]))
def test_pieces_and_their_remainders(backend: str, dtype: torch.dtype, b: int, f: int) -> None:
    x, y = drawn(b, f, dtype=dtype).requires_grad_(), drawn(b, f, seed=1, dtype=dtype).requires_grad_()
    out = kdops.gaussian_distance(x, y, reduction="none", backend=backend)
    upstream = drawn(b, seed=2, dtype=dtype)
    grads = torch.autograd.grad(out, (x, y), upstream)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    exact = kdops.gaussian_distance(*wide, reduction="none", backend="reference")
    exact_grads = torch.autograd.grad(exact, wide, upstream.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for mine, truth in zip((out, *grads), (exact, *exact_grads), strict=True):
        torch.testing.assert_close(
            mine.double(), truth, rtol=tolerance, atol=tolerance * float(truth.detach().abs().max())
        )


@every_backend
def test_identical_inputs(backend: str) -> None:
    """methods.md 7: a perfect student has loss 0 and gradient 0, with an adaptive sigma too."""
    for sigma in (1.0, "adaptive"):
        x = drawn(3, 4, 5, dtype=torch.float32).requires_grad_()
        loss = kdops.gaussian_distance(x, x.detach().clone(), sigma=sigma, backend=backend)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss == 0
        assert not grad.any()


@every_backend
def test_small_distances_do_not_cancel(backend: str) -> None:
    """1 - exp(-z) has no digit left at z = 1e-9 in float32; -expm1(-z) has all."""
    x = torch.zeros(1, 64)
    out = kdops.gaussian_distance(x, x + 1e-4, sigma=2.0, backend=backend)
    assert out.item() == pytest.approx(1e-8 / 8, rel=1e-5)


@every_backend
def test_a_saturated_loss_has_no_gradient(backend: str) -> None:
    """Why the mean is the default (methods.md 1): on a sum over many features the Gaussian is exactly 1."""
    x, y = drawn(2, 64, 16, 16, dtype=torch.float32).requires_grad_(), drawn(2, 64, 16, 16, seed=1, dtype=torch.float32)
    loss = kdops.gaussian_distance(x, y, statistic="sum", backend=backend)
    assert loss == 1
    assert not torch.autograd.grad(loss, x)[0].any()
    assert torch.autograd.grad(kdops.gaussian_distance(x, y, backend=backend), x)[0].all()


@every_backend
def test_no_gradient_through_an_adaptive_sigma(backend: str) -> None:
    x, y = drawn(3, 8).requires_grad_(), drawn(3, 8, seed=1)
    d2 = (x - y).square().mean(dim=1)
    sigma = (d2.mean() + 1e-12).sqrt().item()
    adaptive = torch.autograd.grad(kdops.gaussian_distance(x, y, sigma="adaptive", backend=backend), x)[0]
    fixed = torch.autograd.grad(kdops.gaussian_distance(x, y, sigma=sigma, backend=backend), x)[0]
    torch.testing.assert_close(adaptive, fixed)


@every_backend
@pytest.mark.parametrize("need", [(True, False), (False, True), (True, True)], ids=["x", "y", "both"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradgradcheck_of_lists(backend: str, need: tuple[bool, bool], reduction: str) -> None:
    shapes = [(2, 3), (2, 2, 2)]
    x, y = ([drawn(*s, seed=10 * i + t).requires_grad_(need[i]) for t, s in enumerate(shapes)] for i in range(2))

    def call(*tensors: Tensor) -> Tensor:
        return kdops.gaussian_distance(tensors[:2], tensors[2:], sigma=(0.7, 1.5), reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(call, (*x, *y))
    assert torch.autograd.gradgradcheck(call, (*x, *y))


@every_backend
def test_the_same_tensor_in_several_places(backend: str) -> None:
    """One tensor as two taps, and on both sides: its gradients add up."""
    x, y = drawn(2, 6).requires_grad_(), drawn(2, 6, seed=1)
    (grad,) = torch.autograd.grad(kdops.gaussian_distance([x, x], [y, y], backend=backend).sum(), x)
    (single,) = torch.autograd.grad(kdops.gaussian_distance(x, y, backend=backend), x)
    torch.testing.assert_close(grad, 2 * single)
    (same,) = torch.autograd.grad(kdops.gaussian_distance(x, x, backend=backend), x)
    assert not same.any()


@every_backend
@pytest.mark.parametrize("trained", [0b000001, 0b101010, 0b010110, 0b111111])
def test_gradients_of_some_taps(backend: str, trained: int) -> None:
    """Gradients of those that ask for one, the same numbers as all together."""
    tensors = [*drawn_taps(0), *drawn_taps(10)]
    everything = [t.clone().requires_grad_() for t in tensors]
    all_grads = torch.autograd.grad(
        kdops.gaussian_distance(everything[:3], everything[3:], backend=backend).sum(), everything
    )
    wanted = [bool(trained >> i & 1) for i in range(6)]
    some = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    with RecordOps() as ops:
        kdops.gaussian_distance(some[:3], some[3:], backend=backend).sum().backward()
    for t, w, grad in zip(some, wanted, all_grads, strict=True):
        assert (t.grad is not None) == w
        assert t.grad is None or torch.equal(t.grad, grad)
    for op, _, out in ops.calls:
        if op.name().endswith("_backward"):
            assert [g.numel() > 0 for side in out for g in side] == wanted


@every_backend
def test_lists_compile_to_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    x, y = [t.requires_grad_() for t in drawn_taps(0)], drawn_taps(10)

    def loss(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return kdops.gaussian_distance(x, y, sigma=[0.5, 1.0, 2.0], backend=backend).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y))
    for mine, eager in zip(torch.autograd.grad(compiled(x, y), x), torch.autograd.grad(loss(x, y), x), strict=True):
        torch.testing.assert_close(mine, eager)


def test_module_is_the_function() -> None:
    x, y = drawn_taps(0), drawn_taps(10)
    module = kdops.nn.GaussianDistance(sigma="adaptive", reduction="none")
    assert torch.equal(module(x, y), kdops.gaussian_distance(x, y, sigma="adaptive", reduction="none"))


ONE, TWO = torch.zeros(2, 3), [torch.zeros(2, 3), torch.zeros(2, 4)]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: kdops.gaussian_distance(ONE, torch.zeros(2, 4)),
            ValueError,
            r"\(2, 3\) float32 and y \(2, 4\) float32",
        ),
        (lambda: kdops.gaussian_distance(ONE, TWO), TypeError, "y is list"),
        (lambda: kdops.gaussian_distance(TWO, 3.0), TypeError, "two lists of taps"),
        (lambda: kdops.gaussian_distance(TWO, TWO[:1]), ValueError, "x has 2 taps and y has 1"),
        (lambda: kdops.gaussian_distance([], []), ValueError, "at least one"),
        (lambda: kdops.gaussian_distance([ONE, torch.zeros(1, 4)], [ONE, torch.zeros(1, 4)]), ValueError, "tap 1"),
        (lambda: kdops.gaussian_distance([ONE, ONE.double()], [ONE, ONE.double()]), TypeError, r"x\[1\].*one dtype"),
        (lambda: kdops.gaussian_distance(TWO, TWO, sigma=[1.0]), ValueError, "one for each of the taps"),
        (lambda: kdops.gaussian_distance(ONE, ONE, sigma=[1.0]), ValueError, "it must be one number"),
        (lambda: kdops.gaussian_distance(ONE, ONE, sigma=0.0), ValueError, "above 0 and finite"),
        (lambda: kdops.gaussian_distance(ONE, ONE, sigma=float("nan")), ValueError, "above 0 and finite"),
        (lambda: kdops.gaussian_distance(ONE, ONE, sigma="auto"), ValueError, "'adaptive'"),
        (lambda: kdops.gaussian_distance(ONE, ONE, statistic="max"), ValueError, "'mean', 'sum'"),
        (lambda: kdops.gaussian_distance(ONE, ONE, reduction="max"), ValueError, "'none'"),
        (lambda: kdops.gaussian_distance(ONE[:0], ONE[:0]), ValueError, "batch is empty"),
        (lambda: kdops.gaussian_distance(ONE[:, :0], ONE[:, :0]), ValueError, "use statistic='sum'"),
        (lambda: kdops.gaussian_distance(torch.zeros(3), torch.zeros(3)), ValueError, r"\(B, \*F\)"),
    ],
)
def test_errors_say_what_is_needed(call, error, says) -> None:
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_no_tensor_of_differences(backend: str) -> None:
    """Forward and backward allocate the gradient and nothing else of that size."""
    x, y = drawn(4, 65536, dtype=torch.float32).requires_grad_(), drawn(4, 65536, seed=1, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        kdops.gaussian_distance(x, y, backend=backend).backward()
    taken = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert x.nbytes <= taken < 1.01 * x.nbytes


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """64-bit offsets: the last features of a sample that begins beyond 2^31 count."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    f = 2**30 + 64
    x = torch.zeros(3, f, dtype=torch.bfloat16, device=device).requires_grad_()
    y = torch.zeros(3, f, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        x[2, -2:] = 1.0
    loss = kdops.gaussian_distance(x, y, statistic="sum", reduction="none")
    assert loss.tolist() == [0.0, 0.0, pytest.approx(-expm1(-1.0), rel=4e-3)]
    loss[2].backward()
    assert x.grad is not None
    assert x.grad[2, -3:].tolist() == [0.0, *[pytest.approx(np.exp(-1.0), rel=8e-3)] * 2]
    assert not x.grad[0, :1000].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_of_float16_do_not_overflow(backend: str) -> None:
    """300^2 is more than the largest float16."""
    x, y = torch.full((1, 8), 300.0).half(), torch.zeros(1, 8).half()
    distance = kdops.gaussian_distance(x, y, sigma=1000.0, backend=backend)
    torch.testing.assert_close(distance.item(), -expm1(-0.045), rtol=1e-3, atol=0)


@every_backend
def test_products_of_float16_do_not_overflow_in_double_backward(backend: str) -> None:
    """(x - y) times the direction that is asked about."""
    x, y, v = (300 * drawn(2, 64, dtype=torch.float32, seed=seed).half() for seed in range(3))

    def second(x: Tensor, y: Tensor, v: Tensor, backend: str) -> Tensor:
        x = x.requires_grad_()
        distance = kdops.gaussian_distance(x, y, sigma=200.0, reduction="sum", backend=backend)
        (first,) = torch.autograd.grad(1000 * distance, x, create_graph=True)  # so that float16 has digits for it
        return torch.autograd.grad(first, x, v)[0]

    exact = second(x.double(), y.double(), v.double(), "reference")
    torch.testing.assert_close(
        second(x, y, v, backend).double(), exact, rtol=2e-3, atol=1e-3 * float(exact.abs().max())
    )


@every_backend
def test_a_sigma_whose_square_is_beyond_float64(backend: str) -> None:
    x, y = drawn(2, 3, dtype=torch.float32), drawn(2, 3, dtype=torch.float32, seed=1)
    assert kdops.gaussian_distance(x, y, sigma=1e160, backend=backend) == 0
