"""Spatial attention against loops over single positions, its special forms, and what only it promises."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdops
import kdops.nn
from tests.contract import RecordOps

ONE = torch.zeros(
    1, 1, 1, dtype=torch.float64
)  # what Triton does not take: test_spatial_attention_triton.py has its tests
BACKENDS = [b for b, said in kdops.explain("spatial_attention", ONE).items() if said.startswith("yes")]
KERNELS = [b for b in BACKENDS if b != "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kernel = pytest.mark.parametrize("backend", KERNELS)
both_ways = pytest.mark.parametrize("normalize", ["key", "query"])
SPACE = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loops(query: Tensor, key: Tensor, value: Tensor, scale: float, normalize: str) -> Tensor:
    """The definition in Python's own arithmetic, one position at a time."""
    out = torch.zeros(*value.shape[:2], *query.shape[2:], dtype=torch.float64)
    for b in range(len(query)):
        q, k, v = (t[b].flatten(1).t().tolist() for t in (query, key, value))  # rows of positions
        weight = [[math.exp(scale * sum(x * y for x, y in zip(m, n, strict=True))) for n in q] for m in k]
        for n in range(len(q)):
            for m in range(len(k)):
                total = sum(weight[m]) if normalize == "query" else sum(row[n] for row in weight)
                out[b].flatten(1)[:, n] += torch.tensor(v[m], dtype=torch.float64) * (weight[m][n] / total)
    return out


@every_backend
@given(
    b=st.integers(1, 2),
    c=st.integers(1, 5),
    cv=st.integers(1, 5),
    sq=SPACE,
    sk=SPACE,
    scale=st.sampled_from([None, 0.3, -1.0]),
    normalize=st.sampled_from(["key", "query"]),
)
def test_is_its_definition(backend: str, b: int, c: int, cv: int, sq, sk, scale: float | None, normalize: str) -> None:
    query, key, value = drawn(b, c, *sq), drawn(b, c, *sk, seed=1), drawn(b, cv, *sk, seed=2)
    out = kdops.spatial_attention(query, key, value, scale=scale, normalize=normalize, backend=backend)
    exact = by_loops(query, key, value, c**-0.5 if scale is None else scale, normalize)
    torch.testing.assert_close(out, exact, rtol=1e-11, atol=1e-12)


def with_gradients(tensors: list[Tensor], roles: tuple[int, int, int], backend: str, **options) -> list[Tensor]:
    """Result and gradients in float64 or the given dtype; `roles` says which tensor is query, key and value."""
    out = kdops.spatial_attention(*(tensors[role] for role in roles), **options, backend=backend)
    wanted = [t for t in tensors if t.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, drawn(*out.shape, seed=9).to(out))]


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    c=st.integers(1, 70),
    cv=st.integers(1, 70),
    nq=st.integers(1, 260),
    nk=st.integers(1, 700),
    normalize=st.sampled_from(["key", "query"]),
)
def test_any_size(backend: str, dtype: torch.dtype, c: int, cv: int, nq: int, nk: int, normalize: str) -> None:
    """Blocks, tiles, panels and their remainders: every size against the float64 reference."""
    tensors = [
        drawn(*shape, seed=i).to(dtype).requires_grad_()
        for i, shape in enumerate(((1, c, nq), (1, c, nk), (1, cv, nk)))
    ]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    mine = with_gradients(tensors, (0, 1, 2), backend, normalize=normalize)
    exact = with_gradients(wide, (0, 1, 2), "reference", normalize=normalize)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    largest = max(float(g.abs().max()) for g in exact[1:])  # that of a gradient which cancels is no scale
    for got, truth, scale in zip(mine, exact, (float(exact[0].detach().abs().max()), *[largest] * 3), strict=True):
        assert float((got - truth).detach().abs().max()) <= tolerance * scale


@every_kernel
@both_ways
@pytest.mark.parametrize(
    ("roles", "trained"),
    [
        ((0, 1, 1), (False, True)),  # teacher query, the student is key and value
        ((0, 1, 0), (True, False)),  # the student is query and value, teacher key
        ((0, 1, 1), (True, True)),
        ((0, 0, 0), (True,)),  # self-attention
        ((0, 1, 1), (True, False)),
    ],
    ids=["teacher query", "student query", "all", "self", "query alone"],
)
def test_forms_of_distillation(backend: str, normalize: str, roles, trained) -> None:
    """One tensor in two roles gets the sum of both gradients, and a frozen one gets none."""
    wide = [drawn(2, 5, 11, 13, seed=i).requires_grad_(t) for i, t in enumerate(trained)]
    mine = with_gradients(wide, roles, backend, normalize=normalize)
    exact = with_gradients(wide, roles, "reference", normalize=normalize)
    for got, truth in zip(mine, exact, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


@every_kernel
def test_key_that_is_value_is_read_once(backend: str) -> None:
    student = drawn(1, 4, 9, dtype=torch.float32).requires_grad_()
    with RecordOps() as ops:
        kdops.spatial_attention(drawn(1, 4, 7, dtype=torch.float32), student, student, backend=backend).sum().backward()
    (_, forward, _), (_, _, gradients) = ops.calls
    assert forward[2] is None
    assert [g.numel() for g in gradients] == [0, student.numel(), 0]


@every_kernel
@both_ways
def test_large_logits_do_not_overflow(backend: str, normalize: str) -> None:
    """Logits in the thousands: weights are ones and zeros, and nothing is NaN."""
    tensors = [drawn(1, 6, n, seed=i).requires_grad_() for i, n in enumerate((300, 500, 500))]
    mine = with_gradients(tensors, (0, 1, 2), backend, scale=1e3, normalize=normalize)
    exact = with_gradients(tensors, (0, 1, 2), "reference", scale=1e3, normalize=normalize)
    for got, truth in zip(mine, exact, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-8, atol=1e-8)


@every_backend
def test_positions_of_minus_infinity_have_no_weight(backend: str) -> None:
    """Tiles that hold nothing else must not poison those that follow, and they get no gradient but their own 0."""
    query, value = drawn(1, 1, 40).abs() + 0.1, drawn(1, 3, 700, seed=2).requires_grad_()
    key = drawn(1, 1, 700, seed=1)
    key[..., :520] = -math.inf
    out = kdops.spatial_attention(query, key, value, backend=backend)
    torch.testing.assert_close(
        out, kdops.spatial_attention(query, key[..., 520:], value[..., 520:], backend="reference")
    )
    (grad,) = torch.autograd.grad(out.sum(), value)
    assert not grad[..., :520].any()
    assert grad[..., 520:].isfinite().all()


@every_kernel
def test_autocast_around_backward_changes_nothing(backend: str) -> None:
    tensors = [drawn(1, 6, 30, seed=i, dtype=torch.float32).requires_grad_() for i in range(3)]
    out = kdops.spatial_attention(*tensors, backend=backend)
    plain = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


MEASURE = """
import resource, sys, torch, kdops
c, n = int(sys.argv[1]), int(sys.argv[2])
def step(n):
    teacher, student = torch.randn(1, c, n), torch.randn(1, c, n, requires_grad=True)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for tensors in ((teacher, student, student), (student, teacher, student)):
        student.grad = None
        kdops.spatial_attention(*tensors, backend="cpu").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
step(256)
print(step(n) // 1024)
"""


def peak_mib(channels: int, positions: int) -> int:
    """MiB above its inputs that forward and backward take, in both forms of distillation, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(channels), str(positions)],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif("cpu" not in KERNELS, reason="needs the CPU kernels")
@pytest.mark.skipif(sys.platform != "linux", reason="needs the peak memory of a process in KiB")
def test_memory_grows_with_positions_not_with_pairs() -> None:
    """At N = 12,288 one matrix of weights takes 576 MiB."""
    assert peak_mib(4, 12288) < 64


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in KERNELS, reason="needs the CPU kernels")
@pytest.mark.skipif(sys.platform != "linux", reason="needs the peak memory of a process in KiB")
def test_256_by_256_image_in_less_than_a_gibibyte() -> None:
    """One matrix of weights takes 16 GiB."""
    assert peak_mib(64, 65536) < 1024


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in KERNELS, reason="needs the CPU kernels")
def test_more_than_2_to_the_31_elements() -> None:
    """64-bit offsets: all weight lies on the last position of a key whose last channel begins beyond 2^31 elements."""
    channels, positions = 512, 2**22 + 64
    key = torch.zeros(1, channels, positions, dtype=torch.bfloat16)
    key[0, -1, -1] = 100.0
    value = torch.zeros(1, 1, positions, dtype=torch.bfloat16)
    value[0, 0, -1] = 3.0
    query = torch.ones(1, channels, 1, dtype=torch.bfloat16)
    assert kdops.spatial_attention(query, key, value, scale=1.0, backend="cpu").item() == 3.0


def test_module_is_the_function() -> None:
    query, key = drawn(1, 3, 4, 5), drawn(1, 3, 7, seed=1)
    module = kdops.nn.SpatialAttention(scale=0.5, normalize="query")
    assert torch.equal(module(query, key, key), kdops.spatial_attention(query, key, key, scale=0.5, normalize="query"))


@pytest.mark.parametrize(
    ("shapes", "options", "says"),
    [
        (((2, 3, 4), (2, 5, 4), (2, 3, 4)), {}, r"query \(2, 3, 4\) float64, key \(2, 5, 4\) float64"),
        (((2, 3, 4), (1, 3, 4), (1, 3, 4)), {}, r"\(B, C, \*Sq\), \(B, C, \*Sk\) and \(B, Cv, \*Sk\)"),
        (((2, 3, 4), (2, 3, 4), (2, 3, 5)), {}, r"value \(2, 3, 5\)"),
        (((2, 3), (2, 3), (2, 3)), {}, "one to three spatial axes"),
        (((2, 3, 0), (2, 3, 4), (2, 3, 4)), {}, "at least one channel and one position"),
        (((2, 0, 4), (2, 0, 4), (2, 3, 4)), {}, "at least one channel and one position"),
        (
            ((2, 3, 4), (2, 3, 4), (2, 3, 4)),
            {"normalize": "rows"},
            "normalize is 'rows', but it must be one of 'key', 'query'",
        ),
    ],
)
def test_errors_say_what_is_needed(shapes, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        kdops.spatial_attention(*(drawn(*shape) for shape in shapes), **options)
