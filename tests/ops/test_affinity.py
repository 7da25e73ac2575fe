"""The affinity distance against loops over pairs of positions, and what only it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdops
import kdops.nn
from kdops.affinity import spec
from tests.contract import RecordOps, relative_error

ONE = torch.zeros(1, 1, 1, dtype=torch.float64)  # what takes float64; tests/ops/test_affinity_triton.py has the rest
BACKENDS = [b for b, said in kdops.explain("affinity_distance", ONE).items() if said.startswith("yes")]
KERNELS = [b for b in BACKENDS if b != "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kernel = pytest.mark.parametrize("backend", KERNELS)
both_p = pytest.mark.parametrize("p", [1, 2])


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loops(student: Tensor, teacher: Tensor, p: int, eps: float) -> np.ndarray:
    """Pair by pair of positions, in numpy."""
    totals = []
    for sample in zip(student.flatten(2).numpy(), teacher.flatten(2).numpy(), strict=True):
        s, t = ([column / (math.sqrt(column @ column) + eps) for column in maps.T] for maps in sample)
        totals.append(sum(abs(s[i] @ s[j] - t[i] @ t[j]) ** p for i in range(len(s)) for j in range(len(s))))
    return np.array(totals)


def results(
    student: Tensor, teacher: Tensor, p: int, backend: str, dtype: torch.dtype | None = None, **options: float
) -> list[Tensor]:
    """Distance and both gradients."""
    maps = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (student, teacher)]
    out = kdops.affinity_distance(*maps, p=p, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out.sum(), maps)]


@every_backend
@given(
    b=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    spatial=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    p=st.sampled_from([1, 2]),
    eps=st.sampled_from([1e-8, 0.5]),
)
def test_is_its_definition(
    backend: str, b: int, channels: tuple[int, int], spatial: list[int], p: int, eps: float
) -> None:
    student, teacher = (drawn(b, c, *spatial, seed=i) for i, c in enumerate(channels))
    exact = by_loops(student, teacher, p, eps)
    total = kdops.affinity_distance(student, teacher, p=p, eps=eps, statistic="sum", backend=backend)
    np.testing.assert_allclose(total.numpy(), exact, rtol=1e-9, atol=1e-12)
    mean = kdops.affinity_distance(student, teacher, p=p, eps=eps, backend=backend)
    np.testing.assert_allclose(mean.numpy(), exact / math.prod(spatial) ** 2, rtol=1e-9, atol=1e-12)


@every_kernel
@both_p
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(b=st.integers(1, 2), cs=st.integers(1, 40), ct=st.integers(1, 40), n=st.integers(1, 800), last=st.booleans())
def test_any_size(backend: str, p: int, dtype: torch.dtype, b: int, cs: int, ct: int, n: int, last: bool) -> None:
    """Panels, strips and their remainders, differing channel counts, both layouts: against the float64 reference."""
    student, teacher = drawn(b, cs, n, dtype=dtype), drawn(b, ct, n, seed=1, dtype=dtype)
    if last:
        student, teacher = (t.mT.contiguous().mT for t in (student, teacher))
    # One channel has affinities of +1 and -1 alone, whose gradient is zero but for eps: an eps that counts gives it a value.
    mine = results(student, teacher, p, backend, eps=0.1)
    exact = results(student, teacher, p, "reference", torch.float64, eps=0.1)
    eager = results(student, teacher, p, "reference", torch.float32, eps=0.1)
    for m, truth, reference in zip(mine, exact, eager, strict=True):
        floor = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert relative_error(m, truth) <= 2 * relative_error(reference, truth) + floor


@every_kernel
@both_p
@pytest.mark.parametrize("n", [9, 600])
def test_equal_networks_have_no_distance(backend: str, p: int, n: int) -> None:
    """Exactly 0, with gradients of exactly 0: no noise of signs near a tie."""
    student = drawn(2, 8, n, dtype=torch.float32)
    for result in results(student, student.clone(), p, backend):
        assert not result.any()
    scaled = results(student, 2 * student, p, backend)  # a power of two: the same directions, bit for bit
    assert 0 <= scaled[0].min() <= scaled[0].max() < 1e-7


@every_kernel
@both_p
@pytest.mark.parametrize("difference", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("n", [24, 576])
def test_networks_close_by(backend: str, p: int, difference: float, n: int) -> None:
    """Student and teacher that differ by 30 %, 1 % and 0.01 %: as exact as eager torch, and by Grams far better."""
    teacher = drawn(2, 16, n, dtype=torch.float32)
    student = (teacher.double() * (1 + difference * drawn(2, 16, n, seed=1))).float()
    exact = results(student, teacher, p, "reference", torch.float64)
    eager = results(student, teacher, p, "reference")
    mine = results(student, teacher, p, backend)
    for m, e, truth in zip(mine, eager, exact, strict=True):
        assert relative_error(m, truth) <= 2 * relative_error(e, truth) + 1e-6
    if p == 2 and n > 64:
        assert all(relative_error(m, truth) < 1e-6 for m, truth in zip(mine, exact, strict=True))


@every_backend
@both_p
@pytest.mark.parametrize("n", [6, 50])
def test_dead_positions(backend: str, p: int, n: int) -> None:
    """A column of zeros, as after a ReLU, has no direction: its affinities are 0, and nothing is NaN, in half precision neither."""
    student, teacher = drawn(1, 3, n), drawn(1, 2, n, seed=1)
    student[..., 0] = 0
    distance, of_student, of_teacher = results(student, teacher, p, backend)
    np.testing.assert_allclose(distance.numpy(), by_loops(student, teacher, p, 1e-8) / n**2, rtol=1e-9)
    assert of_student.isfinite().all()
    assert of_teacher.isfinite().all()
    assert all(t.isfinite().all() for t in results(student, teacher, p, backend, torch.float16)[:1])


@every_kernel
@both_p
@given(b=st.integers(1, 3), c=st.integers(1, 20), n=st.integers(1, 700))
def test_same_bits_for_any_number_of_threads(backend: str, p: int, b: int, c: int, n: int) -> None:
    student, teacher = drawn(b, c, n, dtype=torch.float32), drawn(b, c, n, seed=1, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(student, teacher, p, backend))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(run, runs[0], strict=True))


@every_kernel
@both_p
def test_no_positions_by_positions_matrix(backend: str, p: int) -> None:
    """At N = 4,096 such a matrix is 64 MiB in float32; forward and backward stay in the order of the maps."""
    student, teacher = drawn(1, 8, 64, 64, dtype=torch.float32).requires_grad_(), drawn(1, 12, 64, 64, seed=1).float()
    with torch.profiler.profile(profile_memory=True) as profile:
        kdops.affinity_distance(student, teacher, p=p, backend=backend).sum().backward()
    largest = max((e.self_cpu_memory_usage for e in profile.events()), default=0)
    assert 0 < largest < 64 * 2**20 / 16


@every_kernel
def test_unneeded_gradient_is_empty_in_the_raw_operator(backend: str) -> None:
    student, teacher = drawn(2, 3, 10).requires_grad_(), drawn(2, 4, 10, seed=1)
    for p in (1, 2):
        with RecordOps() as ops:
            kdops.affinity_distance(student, teacher, p=p, backend=backend).sum().backward()
        calls = {op.name(): out for op, _, out in ops.calls}
        assert [g.numel() for g in calls["kdops::affinity_distance_backward"]] == [60, 0]


def test_defaults_are_fakds() -> None:
    """The mean of the absolute values, each column over its own norm: 1e-8 is nothing beside it."""
    student, teacher = drawn(2, 3, 4, 5), drawn(2, 6, 4, 5, seed=1)
    np.testing.assert_allclose(
        kdops.affinity_distance(student, teacher).numpy(), by_loops(student, teacher, 1, 1e-8) / 20**2, rtol=1e-10
    )


def test_an_eps_is_a_number() -> None:
    with pytest.raises(TypeError, match="eps is '1'"):
        kdops.affinity_distance(drawn(1, 2, 3), drawn(1, 2, 3), eps="1")  # type: ignore[arg-type]  # the wrong type is the test


def test_costs_by_hand() -> None:
    """`kdtrain plan` rests on them. B = 2, Cs = 3, Ct = 5, float32: by tiles at N = 16 = 2 (Cs + Ct), by Grams beyond."""
    few, many = ([drawn(2, c, n, dtype=torch.float32) for c in (3, 5)] for n in (16, 100))
    assert [spec.by_grams(*maps, p) for maps in (few, many) for p in (1, 2)] == [False, False, False, True]
    assert spec._flops(*many, p=1) == 2 * 100**2 * 8  # a multiply and an add, of half of the pairs
    assert spec._flops(*many, p=2) == 2 * 2 * 100 * (3 * 3 + 3 * 5 + 5 * 5)
    assert spec._bytes(*many) == 4 * 2 * 100 * 8
    scratch = [spec._scratch_bytes(*many, p=p) for p in (1, 2)]
    assert scratch == [2 * 100 * 4 * 3 * 8 + 2**20, 8 * 2 * 8**2 + 8 * 2**20]
    # Of no more positions than channels slopes are kept.
    least = [drawn(2, c, 6, dtype=torch.float32) for c in (3, 5)]
    assert spec._scratch_bytes(*least) == 2 * 6 * 4 * (3 * 8 + 6 + spec.SLOPES) + 2**20
    many[0].requires_grad_()
    assert spec._flops(*many, p=1, backward=True) == 2 * 100**2 * (2 * 8 + 2 * 3)
    assert spec._flops(*many, p=2, backward=True) == 2 * 2 * 100 * (3 * 3 + 3 * 5 + 5 * 5 + 3 * 8)
    assert spec._bytes(*many, backward=True) == 4 * 2 * 100 * (2 * 8 + 3)


def test_module_is_the_function() -> None:
    student, teacher = drawn(2, 3, 4, 5), drawn(2, 6, 4, 5, seed=1)
    module = kdops.nn.AffinityDistance(p=2, statistic="sum", eps=1e-3)
    assert torch.equal(
        module(student, teacher), kdops.affinity_distance(student, teacher, p=2, statistic="sum", eps=1e-3)
    )


@pytest.mark.parametrize(
    ("shapes", "options", "says"),
    [
        (((2, 3, 4), (2, 3, 5)), {}, r"student \(2, 3, 4\) float64 and teacher \(2, 3, 5\) float64"),
        (((2, 3, 4), (1, 3, 4)), {}, "with the same B"),
        (((2, 3, 4, 1), (2, 3, 4)), {}, "spatial axes"),
        (((2, 3), (2, 3)), {}, "spatial axes"),
        (((2, 3, 1, 1, 1, 4), (2, 3, 1, 1, 1, 4)), {}, "one to three equal spatial axes"),
        (((2, 3, 0), (2, 3, 0)), {}, "at least one channel and one position"),
        (((2, 3, 4), (2, 0, 4)), {}, "at least one channel and one position"),
        (((2, 3, 4), (2, 3, 4)), {"p": 3}, "p is 3, but it must be one of 1, 2"),
        (((2, 3, 4), (2, 3, 4)), {"statistic": "max"}, "'mean', 'sum'"),
        (((2, 3, 4), (2, 3, 4)), {"eps": -1.0}, "at least 0"),
        (((2, 3, 4), (2, 3, 4)), {"eps": math.nan}, "at least 0"),
    ],
)
def test_errors_say_what_is_needed(shapes: tuple[tuple[int, ...], ...], options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kdops.affinity_distance(*(drawn(*shape) for shape in shapes), **options)
