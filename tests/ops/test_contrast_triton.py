"""The Triton kernels of the contrastive distances against float64, on a GPU or in the interpreter (so with small shapes)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import kdops  # noqa: F401  (registers the ops)
from kdops.contrast import reference
from kdops.contrast import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
PAIRWISE, MATCHED = "pairwise_distance", "matched_distance"


def draw(name: str, b: int, k: int, features: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """The two operands and a gradient of their distances."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, *features), (k, *features) if name == PAIRWISE else (b, k, *features)]
    operands = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    return [*operands, torch.randn(b, k, generator=generator).to(DEVICE)]


def exact(name: str, x: Tensor, y: Tensor, grad: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distance and gradients in float64."""
    a, b = x.double().requires_grad_(), y.double().requires_grad_()
    distance = getattr(reference, name)(a, b, p)
    return distance.detach(), *torch.autograd.grad(distance, (a, b), grad.double())


def run(name: str, x: Tensor, y: Tensor, grad: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same on the kernels."""
    distance = getattr(kernels, name)(x, y, p)
    return distance, *getattr(kernels, f"{name}_backward")(grad, x, y, p, True, True)


def check(name: str, x: Tensor, y: Tensor, grad: Tensor, p: int) -> None:
    found, wanted = run(name, x, y, grad, p), exact(name, x, y, grad, p)
    assert found[0].dtype == torch.float32
    assert found[0].is_contiguous()
    for gradient, operand in zip(found[1:], (x, y), strict=True):
        assert gradient.dtype == operand.dtype
        assert gradient.stride() == torch.empty_like(operand).stride()
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=4 * EPS[torch.float32], atol=0)  # terms do not cancel
    # A gradient adds terms that may cancel (|x - y| < 8 here), in float32, and is rounded once to the dtype.
    floor = 2 * EPS[torch.float32] * float(grad.abs().sum()) * (8 if p == 2 else 1)
    for f, w in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(f.double(), w, rtol=EPS[x.dtype], atol=floor)


counts = st.sampled_from([1, 2, 3, 4, 5, 7, 16, 17])
shapes = st.sampled_from([(1,), (2, 3), (31,), (5, 3, 11), (2, 8, 8), (257,), (640,)])


@settings(max_examples=40)
@given(
    name=st.sampled_from([PAIRWISE, MATCHED]),
    b=counts,
    k=counts,
    f=shapes,
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_any_shape(name: str, b: int, k: int, f: tuple[int, ...], dtype: torch.dtype, p: int, seed: int) -> None:
    check(name, *draw(name, b, k, f, dtype, seed), p)


@pytest.mark.parametrize(("b", "k"), [(17, 18), (40, 2), (2, 40), (33, 16)])
def test_more_rows_than_a_program_holds(b: int, k: int) -> None:
    check(PAIRWISE, *draw(PAIRWISE, b, k, (37,), torch.float32), 1)


@pytest.mark.parametrize("b", [1, 3, 8, 9, 16, 17, 25])
@pytest.mark.parametrize("p", [1, 2])
def test_rows_to_one_another(b: int, p: int) -> None:
    """Each pair of blocks once, and the sums in both of their places: odd and even numbers of blocks, and remainders."""
    x, _, grad = draw(PAIRWISE, b, b, (3, 13), torch.float32)
    distance, *_ = exact(PAIRWISE, x, x.clone(), grad, p)
    found = kernels.pairwise_distance(x, None, p)
    torch.testing.assert_close(found.double(), distance, rtol=4 * EPS[torch.float32], atol=0)
    assert torch.equal(found, found.t())
    both = grad + grad.t()
    mine, nothing = kernels.pairwise_distance_backward(both, x, None, p, True, False)
    assert nothing.shape == (0,)
    expected = exact(PAIRWISE, x, x.clone(), both, p)[1]  # one side, of twice the weights
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max() + 1))


def test_more_steps_than_one_sum_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_STEPS", 2)
    check(PAIRWISE, *draw(PAIRWISE, 3, 2, (3001,), torch.float32), 2)


@pytest.mark.parametrize(("name", "p"), list(product((PAIRWISE, MATCHED), (1, 2))))
@pytest.mark.parametrize("shape", [(0, 3, (4,)), (2, 0, (4,)), (2, 3, (4, 0)), (0, 0, (0,))])
def test_empty(name: str, p: int, shape: tuple[int, int, tuple[int, ...]]) -> None:
    check(name, *draw(name, *shape, torch.float32), p)


def strided(t: Tensor, layout: str, leading: int) -> Tensor:
    """`t` with the same values and other strides."""
    axes = list(range(t.ndim))
    if layout == "channels last":  # the first feature axis innermost
        order = [*axes[:leading], *axes[leading + 1 :], leading]
    elif layout == "rows inside":  # the batch axis innermost
        order = [*axes[1:], 0]
    else:
        order = axes
    inverse = [order.index(axis) for axis in axes]
    return t.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("name", [PAIRWISE, MATCHED])
@pytest.mark.parametrize(("first", "second"), list(product(("contiguous", "channels last", "rows inside"), repeat=2)))
def test_any_dense_layout(name: str, first: str, second: str) -> None:
    x, y, grad = draw(name, 3, 2, (4, 3, 5), torch.float32)
    x, y = strided(x, first, 1), strided(y, second, 1 if name == PAIRWISE else 2)
    check(name, x, y, grad, 1)


def test_one_layout_is_read_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, grad = draw(PAIRWISE, 3, 2, (4, 3, 5), torch.float32)
    x, y = strided(x, "channels last", 1), strided(y, "channels last", 1)
    monkeypatch.setattr(Tensor, "contiguous", lambda t: pytest.fail("a copy was made"))
    run(PAIRWISE, x, y, grad, 1)


@pytest.mark.parametrize("name", [PAIRWISE, MATCHED])
def test_any_strides_of_the_upstream_gradient(name: str) -> None:
    x, y, grad = draw(name, 3, 2, (50,), torch.float32)
    transposed = grad.t().contiguous().t()
    check(name, x, y, transposed, 1)
    check(name, x, y, grad[:1, :1].expand(3, 2), 2)  # what mean().backward() sends


@pytest.mark.parametrize("name", [PAIRWISE, MATCHED])
@pytest.mark.parametrize("rows", [(3, 2), (2, 18), (18, 2), (17, 17)])
def test_gradients_asked_for_singly_are_the_same_numbers(name: str, rows: tuple[int, int]) -> None:
    x, y, grad = draw(name, *rows, (21,), torch.bfloat16)
    backward = getattr(kernels, f"{name}_backward")
    both = backward(grad, x, y, 1, True, True)
    first, nothing = backward(grad, x, y, 1, True, False)
    assert nothing.shape == (0,)
    nothing, second = backward(grad, x, y, 1, False, True)
    assert nothing.shape == (0,)
    neither = backward(grad, x, y, 1, False, False)
    assert [t.shape for t in neither] == [(0,), (0,)]
    for found, wanted in zip((first, second), both, strict=True):
        torch.testing.assert_close(found.float(), wanted.float(), rtol=2**-7, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy on inf - inf
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("name", [PAIRWISE, MATCHED])
def test_nan_and_inf_go_where_they_go_in_torch(name: str, p: int) -> None:
    x, y, grad = draw(name, 3, 2, (6,), torch.float32)
    x[0, 1], x[1, 2], x[2, 3] = float("nan"), float("inf"), float("-inf")
    y.view(-1, 6)[0, 2] = float("inf")  # inf - inf
    y.view(-1, 6)[1, 4] = float("inf")  # and no sum of inf and -inf, which would hide a NaN: positive weights
    grad = grad.abs()
    for found, wanted in zip(run(name, x, y, grad, p), exact(name, x, y, grad, p), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tie_has_no_gradient(dtype: torch.dtype) -> None:
    x, _, grad = draw(PAIRWISE, 4, 4, (33,), dtype)
    distance, grad_x, grad_y = run(MATCHED, x, x.unsqueeze(1), grad[:, :1], 1)
    assert not any(t.any() for t in (distance, grad_x, grad_y))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale: float) -> None:
    x, y, grad = draw(PAIRWISE, 3, 5, (33,), torch.float32)
    check(PAIRWISE, x * scale, y * scale, grad, 1)


def test_the_same_bits_every_time() -> None:
    inputs = draw(PAIRWISE, 5, 4, (700,), torch.float32)
    for first, second in zip(run(PAIRWISE, *inputs, 1), run(PAIRWISE, *inputs, 1), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [PAIRWISE, MATCHED])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    x, y, grad = draw(name, 3, 2, (4, 5), dtype)
    forward: Callable[..., Any] = getattr(torch.ops.kdops, f"{name}_triton").default
    backward: Callable[..., Any] = getattr(torch.ops.kdops, f"{name}_backward_triton").default
    torch.library.opcheck(forward, (x.clone().requires_grad_(), y.clone().requires_grad_(), 1))
    torch.library.opcheck(forward, (strided(x, "channels last", 1), y, 2))
    for needed in product((True, False), repeat=2):
        torch.library.opcheck(backward, (grad, x, strided(y, "channels last", y.ndim - 2), 1, *needed))
