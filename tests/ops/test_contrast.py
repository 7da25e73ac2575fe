"""The contrastive distances against loops over single elements, and what only they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdops
import kdops.nn
from tests.contract import RecordOps

BACKENDS = [
    b
    for b, said in kdops.explain("pairwise_distance", torch.zeros(1, 1)).items()
    if said.startswith("yes") and b != "triton"  # its own tests are in test_contrast_triton.py
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
FEATURES = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loops(x: Tensor, y: Tensor, p: int, mean: bool) -> np.ndarray:
    """|x_i - y_k|^p summed element by element in Python's own arithmetic."""
    rows_x, rows_y = x.flatten(1).tolist(), y.flatten(1).tolist()
    table = [[sum(abs(a - b) ** p for a, b in zip(u, v, strict=True)) for v in rows_y] for u in rows_x]
    return np.array(table).reshape(len(rows_x), len(rows_y)) / (len(rows_x[0]) if mean else 1)


@every_backend
@given(b=st.integers(1, 6), k=st.integers(1, 6), features=FEATURES, p=st.sampled_from([1, 2]), mean=st.booleans())
def test_pairwise_is_its_definition(backend: str, b: int, k: int, features: list[int], p: int, mean: bool) -> None:
    x, y = drawn(b, *features), drawn(k, *features, seed=1)
    out = kdops.pairwise_distance(x, y, p=p, statistic="mean" if mean else "sum", backend=backend)
    np.testing.assert_allclose(out.numpy(), by_loops(x, y, p, mean), rtol=1e-12)


@every_backend
@given(b=st.integers(1, 5), k=st.integers(1, 5), features=FEATURES, p=st.sampled_from([1, 2]))
def test_matched_is_pairwise_within_each_row(backend: str, b: int, k: int, features: list[int], p: int) -> None:
    anchor, others = drawn(b, *features), drawn(b, k, *features, seed=1)
    out = kdops.matched_distance(anchor, others, p=p, backend=backend)
    rows = [by_loops(anchor[i : i + 1], others[i], p, mean=True)[0] for i in range(b)]
    np.testing.assert_allclose(out.numpy(), np.array(rows), rtol=1e-12)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(b=st.integers(1, 40), k=st.integers(1, 40), f=st.integers(1, 1100))
def test_gradients_of_any_size(backend: str, dtype: torch.dtype, b: int, k: int, f: int) -> None:
    """Row blocks, feature tiles and their remainders: every size against the float64 reference."""
    x, y = drawn(b, f, dtype=dtype).requires_grad_(), drawn(k, f, seed=1, dtype=dtype).requires_grad_()
    out = kdops.pairwise_distance(x, y, statistic="sum", backend=backend)
    upstream = drawn(b, k, seed=2, dtype=dtype)
    grads = torch.autograd.grad(out, (x, y), upstream)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    exact = kdops.pairwise_distance(*wide, statistic="sum", backend="reference")
    exact_grads = torch.autograd.grad(exact, wide, upstream.double())
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for mine, truth in zip((out, *grads), (exact, *exact_grads), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()))


@every_backend
def test_gradient_at_ties_is_zero(backend: str) -> None:
    x = drawn(3, 40, dtype=torch.float32).requires_grad_()
    y = x.detach().clone().requires_grad_()
    distance = kdops.pairwise_distance(x, y, backend=backend)
    assert torch.equal(distance.diagonal(), torch.zeros(3))
    grads = torch.autograd.grad(distance.diagonal().sum(), (x, y))
    assert not any(g.any() for g in grads)


@every_backend
@pytest.mark.parametrize("b", [0, 1, 3, 4, 5, 9, 64, 70])
@pytest.mark.parametrize("p", [1, 2])
def test_the_same_tensor_twice(backend: str, b: int, p: int) -> None:
    """A table with one value for both places of a pair, and both gradients in the one tensor, as in the reference."""
    x = drawn(b, 3, 4).requires_grad_()
    upstream = drawn(b, b, seed=1)
    mine = kdops.pairwise_distance(x, x, p=p, backend=backend)
    eager = kdops.pairwise_distance(x, x, p=p, backend="reference")
    torch.testing.assert_close(mine, eager)
    assert torch.equal(mine, mine.t())
    torch.testing.assert_close(
        torch.autograd.grad(mine, x, upstream)[0], torch.autograd.grad(eager, x, upstream)[0], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_the_same_tensor_twice_is_one_to_the_operators(backend: str) -> None:
    """They see that there is no second tensor, and return no second gradient."""
    x = drawn(5, 8, dtype=torch.float32).requires_grad_()
    with RecordOps() as ops:
        kdops.pairwise_distance(x, x, backend=backend).sum().backward()
    (_, forward, _), (_, backward, grads) = ops.calls
    assert forward[1] is backward[2] is None
    assert [g.numel() for g in grads] == [40, 0]


@every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("p", [1, 2])
def test_the_same_tensor_twice_with_nan_and_inf(backend: str, value: float, p: int) -> None:
    x = drawn(6, 5, dtype=torch.float32)
    x[2, 1] = value
    x.requires_grad_()
    mine = kdops.pairwise_distance(x, x, p=p, backend=backend)
    eager = kdops.pairwise_distance(x, x, p=p, backend="reference")
    torch.testing.assert_close(mine, eager, equal_nan=True)
    grads = [torch.autograd.grad(d.sum(), x)[0] for d in (mine, eager)]
    torch.testing.assert_close(*grads, equal_nan=True, rtol=1e-4, atol=1e-4)


@every_backend
@given(b=st.integers(1, 4), k=st.integers(1, 5), own=st.booleans(), p=st.sampled_from([1, 2]), data=st.data())
def test_ratio_is_its_definition(backend: str, b: int, k: int, own: bool, p: int, data: st.DataObject) -> None:
    anchor, positive = drawn(b, 3, 4), drawn(b, 3, 4, seed=1)
    negatives = drawn(b, k, 3, 4, seed=2) if own else drawn(k, 3, 4, seed=2)
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=b, max_size=b)))
    losses = []
    for i in range(b):
        rows = negatives[i] if own else negatives
        pull = by_loops(anchor[i : i + 1], positive[i : i + 1], p, mean=True)[0, 0]
        push = by_loops(anchor[i : i + 1], rows, p, mean=True)[0][mask[i].numpy()]
        losses.append(pull / (push.mean() + 1e-3) if len(push) else 0.0)
    out = kdops.contrastive_ratio(
        anchor, positive, negatives, p=p, eps=1e-3, mask=mask, reduction="none", backend=backend
    )
    np.testing.assert_allclose(out.numpy(), losses, rtol=1e-12)
    mean = kdops.contrastive_ratio(anchor, positive, negatives, p=p, eps=1e-3, mask=mask, backend=backend)
    np.testing.assert_allclose(mean.item(), np.mean(losses), rtol=1e-12)


@every_backend
def test_masked_out_negatives_leave_no_trace(backend: str) -> None:
    """Not in the value, not in the gradient, and not as 0/0 in a row without any negative and without eps."""
    anchor = drawn(2, 6).requires_grad_()
    negatives = drawn(3, 6, seed=1)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    loss = kdops.contrastive_ratio(
        anchor, drawn(2, 6, seed=2), negatives, mask=mask, eps=0.0, reduction="none", backend=backend
    )
    fewer = kdops.contrastive_ratio(
        anchor[:1], drawn(2, 6, seed=2)[:1], negatives[[0, 2]], eps=0.0, reduction="none", backend=backend
    )
    torch.testing.assert_close(loss[:1], fewer)
    assert loss[1] == 0
    (grad,) = torch.autograd.grad(loss.sum(), anchor)
    assert grad.isfinite().all()
    assert not grad[1].any()


def test_perfect_student_has_no_loss() -> None:
    """methods.md 7: with student equal to teacher the ratio is 0."""
    teacher = drawn(4, 8, 3, 3)
    others = ~torch.eye(4, dtype=torch.bool)
    assert kdops.contrastive_ratio(teacher.clone(), teacher, teacher, mask=others) == 0


def test_half_precision_ratio_is_formed_in_float32() -> None:
    """Distances of 1e-4 beside eps = 1e-7 would lose all their digits in float16."""
    anchor = drawn(2, 64, dtype=torch.float16)
    positive, negatives = anchor + 1e-3, drawn(3, 64, seed=1, dtype=torch.float16)
    out = kdops.contrastive_ratio(anchor, positive, negatives)
    exact = kdops.contrastive_ratio(anchor.double(), positive.double(), negatives.double())
    assert out.dtype == torch.float16
    assert abs(out.double() - exact) < 2e-3 * exact


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_no_pairs_by_features_tensor(backend: str) -> None:
    """Forward and backward allocate what they return and nothing of the size B x K x features."""
    x, y = (
        drawn(32, 4096, dtype=torch.float32).requires_grad_(),
        drawn(32, 4096, seed=1, dtype=torch.float32).requires_grad_(),
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        kdops.pairwise_distance(x, y, backend=backend).sum().backward()
    largest = max((e.self_cpu_memory_usage for e in profile.events()), default=0)
    assert 0 < largest <= 2 * x.nbytes + 4096


def test_unneeded_gradient_is_empty_in_the_raw_operator() -> None:
    x, teacher = drawn(3, 10, dtype=torch.float32).requires_grad_(), drawn(4, 10, seed=1, dtype=torch.float32)
    backend = BACKENDS[0]
    if backend == "reference":
        pytest.skip("no kernel backend on this machine: see kdops.info()")
    with RecordOps() as ops:
        kdops.pairwise_distance(x, teacher, backend=backend).sum().backward()
    assert [g.numel() for g in ops.calls[-1][2]] == [30, 0]


def test_modules_are_the_functions() -> None:
    x, y, own = drawn(2, 3, 4), drawn(5, 3, 4, seed=1), drawn(2, 5, 3, 4, seed=2)
    assert torch.equal(kdops.nn.PairwiseDistance(p=2)(x, y), kdops.pairwise_distance(x, y, p=2))
    assert torch.equal(
        kdops.nn.MatchedDistance(statistic="sum")(x, own), kdops.matched_distance(x, own, statistic="sum")
    )
    module = kdops.nn.ContrastiveRatio(eps=1e-3, reduction="none")
    assert torch.equal(module(x, x + 1, y), kdops.contrastive_ratio(x, x + 1, y, eps=1e-3, reduction="none"))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: kdops.pairwise_distance(drawn(2, 3), drawn(2, 4)),
            ValueError,
            r"\(2, 3\) float64 and y \(2, 4\) float64",
        ),
        (lambda: kdops.pairwise_distance(drawn(2), drawn(2)), ValueError, r"\(B, \*F\)"),
        (
            lambda: kdops.pairwise_distance(drawn(2, 3), drawn(2, 3), p=3),
            ValueError,
            "p is 3, but it must be one of 1, 2",
        ),
        (lambda: kdops.pairwise_distance(drawn(2, 3), drawn(2, 3), statistic="max"), ValueError, "'mean', 'sum'"),
        (lambda: kdops.pairwise_distance(drawn(2, 0), drawn(2, 0)), ValueError, "use statistic='sum'"),
        (lambda: kdops.matched_distance(drawn(2, 3), drawn(3, 4, 3)), ValueError, r"\(B, K, \*F\)"),
        (lambda: kdops.contrastive_ratio(drawn(2, 3), drawn(2, 3), drawn(0, 3)), ValueError, "at least one negative"),
        (lambda: kdops.contrastive_ratio(drawn(2, 3), drawn(3, 3), drawn(4, 3)), ValueError, "same features"),
        (lambda: kdops.contrastive_ratio(drawn(2, 3), drawn(2, 3), drawn(4, 3), eps=-1.0), ValueError, "at least 0"),
        (lambda: kdops.contrastive_ratio(drawn(0, 3), drawn(0, 3), drawn(4, 3)), ValueError, "batch is empty"),
        (
            lambda: kdops.contrastive_ratio(drawn(2, 3), drawn(2, 3), drawn(4, 3), mask=torch.ones(2, 4)),
            TypeError,
            "bool",
        ),
        (
            lambda: kdops.contrastive_ratio(
                drawn(2, 3), drawn(2, 3), drawn(4, 3), mask=torch.ones(4, 2, dtype=torch.bool)
            ),
            ValueError,
            r"\(2, 4\)",
        ),
    ],
)
def test_errors_say_what_is_needed(call, error, says) -> None:
    with pytest.raises(error, match=says):
        call()


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """64-bit offsets: the last elements of rows that begin beyond 2^31 count."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    f = 2**30 + 64
    x = torch.zeros(2, f, dtype=torch.bfloat16, device=device).requires_grad_()
    y = torch.zeros(2, f, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        x[1, -3:] = 2.0
        y[1, -3:] = -1.0
    distance = kdops.pairwise_distance(x, y, statistic="sum")
    assert distance.tolist() == [[0.0, 3.0], [6.0, 9.0]]
    distance[1, 1].backward()
    assert x.grad is not None
    assert x.grad[1, -4:].tolist() == [0.0, 1.0, 1.0, 1.0]
    assert not x.grad[0, :1000].any()


@every_backend
def test_sums_of_many_float16_features_do_not_overflow(backend: str) -> None:
    """147,456 differences of about 1 add up to more than the largest float16."""
    x, y, z = (drawn(4, 64, 48, 48, seed=seed, dtype=torch.float16) for seed in range(3))
    for call, rows in ((kdops.pairwise_distance, (x, y)), (kdops.contrastive_ratio, (x, y, z))):
        found, exact = call(*rows, backend=backend), call(*(t.double() for t in rows), backend="reference")
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


@every_backend
def test_a_ratio_of_sums_has_its_eps_in_their_unit(backend: str) -> None:
    anchor, positive, negatives = (torch.full((1, 6), value) for value in (0.0, 1.0, 3.0))
    found = [
        kdops.contrastive_ratio(anchor, positive, negatives, eps=2.0, statistic=statistic, backend=backend).item()
        for statistic in ("sum", "mean")
    ]
    assert found == pytest.approx([6 / (18 + 2), 1 / (3 + 2)])
