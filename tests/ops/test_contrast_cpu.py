"""The C++ kernels of the contrastive distances: sizes around their blocks, layouts of memory, every 16-bit number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdops
from kdops.contrast import reference

pytestmark = pytest.mark.skipif(kdops.info()["cpu"] != "available", reason=kdops.info()["cpu"])

ops = torch.ops.kdops
REDUCED = (torch.float16, torch.bfloat16)


def laid_out(t: Tensor, rows: int, layout: str) -> Tensor:
    """The same values, stored in another order."""
    if layout == "features permuted":
        return t.movedim(rows, -1).contiguous().movedim(-1, rows)
    if layout == "batch innermost":
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    return t


layouts = st.sampled_from(["contiguous", "features permuted", "batch innermost"])


@pytest.mark.parametrize("own", [False, True], ids=["pairwise", "matched"])
@given(
    rows=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    # One register block, more than one tile (1,024 columns), more than one chunk (4,096 columns), and remainders of each.
    features=st.sampled_from([(0,), (1, 1), (3, 5), (2, 32), (7, 149), (2, 2051), (4097, 1)]),
    layout=st.tuples(layouts, layouts),
    p=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float64, *REDUCED]),
    need=st.tuples(st.booleans(), st.booleans()),
)
def test_any_size_and_layout(
    own: bool,
    rows: tuple[int, int],
    features: tuple[int, int],
    layout: tuple[str, str],
    p: int,
    dtype: torch.dtype,
    need: tuple[bool, bool],
) -> None:
    name = "matched_distance" if own else "pairwise_distance"
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows[0], *features), (*rows, *features) if own else (rows[1], *features))
    exact = [torch.randn(shape, generator=generator).to(dtype).double().requires_grad_() for shape in shapes]
    x, y = (laid_out(t.detach().to(dtype), n, how) for t, n, how in zip(exact, (1, 1 + own), layout, strict=True))
    truth = getattr(reference, name)(*exact, p)
    upstream = torch.randn(rows[::-1], generator=generator).t()

    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    distance = getattr(ops, name)(x, y, p)
    torch.testing.assert_close(distance.double(), truth.detach(), rtol=tolerance, atol=tolerance)

    grads = getattr(ops, f"{name}_backward")(upstream.to(distance.dtype), x, y, p, *need)
    exact_grads = torch.autograd.grad(truth, exact, upstream.double())
    for grad, exact_grad, like, needed in zip(grads, exact_grads, (x, y), need, strict=True):
        if not needed:
            assert grad.shape == (0,)
            continue
        assert grad.stride() == torch.empty_like(like).stride()
        rounding = torch.finfo(dtype).eps if dtype in REDUCED else tolerance
        torch.testing.assert_close(grad.double(), exact_grad, rtol=rounding, atol=rounding)


def test_more_rows_than_one_task_takes() -> None:
    x, y = torch.randn(150, 3, 11), torch.randn(70, 3, 11)
    torch.testing.assert_close(ops.pairwise_distance(x, y, 1), reference.pairwise_distance(x, y, 1))


@pytest.mark.parametrize("dtype", REDUCED, ids=str)
def test_every_16_bit_number_is_read_exactly(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
    distance = ops.matched_distance(numbers, torch.zeros(len(numbers), 1, 1, dtype=dtype), 1)
    torch.testing.assert_close(distance, numbers.float().abs(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", REDUCED, ids=str)
def test_gradients_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-9, 6, (2**16,), generator=generator)
    edges = torch.tensor([65519.9, 65520.0, 65535.0, 1e30, torch.inf, torch.nan, 6e-8, 3e-8, 2.98e-8, 0.0, -0.0])
    weights = torch.cat([torch.randn(2**16, generator=generator) * 10.0**exponents, edges])[:, None]
    below = torch.zeros(len(weights), 1, 1, dtype=dtype)  # p=1 with x > y: the gradient of x is the upstream gradient
    grad, _ = ops.matched_distance_backward(weights, below[:, 0] + 1, below, 1, True, False)
    torch.testing.assert_close(grad, weights.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("p", [0, 3])
def test_an_unknown_p_is_refused(p: int) -> None:
    with pytest.raises(RuntimeError, match=f"p is {p}, but it must be 1 or 2"):
        ops.pairwise_distance(torch.ones(2, 3), torch.ones(2, 3), p)


@pytest.mark.parametrize(
    ("x", "y"),
    [((2, 3), (2, 4)), ((2, 3), (2, 3, 1)), ((2, 3, 4), (2, 4, 3))],
    ids=["sizes", "axes", "order"],
)
def test_shapes_that_do_not_fit_are_refused_before_memory_is_read(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="kdops: x and y"):
        ops.pairwise_distance(torch.ones(x), torch.ones(y), 1)
