"""Channel attention against loops over single channels, and what only it promises."""

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
from kdops.channel_attention import spec
from tests.contract import RecordOps, relative_error

ONE = torch.zeros(
    1, 1, 1, dtype=torch.float64
)  # what takes float64; tests/ops/test_channel_attention_triton.py has the rest
BACKENDS = [b for b, said in kdops.explain("channel_attention", ONE).items() if said.startswith("yes")]
KERNELS = [b for b in BACKENDS if b != "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kernel = pytest.mark.parametrize("backend", KERNELS)
SPATIAL = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loops(query: Tensor, key: Tensor, value: Tensor, scale: float | None, heads: int) -> np.ndarray:
    """Channel by channel, in numpy."""
    q, k, v = (t.detach().double().flatten(2).numpy() for t in (query, key, value))
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    out = np.zeros((*q.shape[:2], v.shape[2]))
    of_query, of_key = q.shape[1] // heads, k.shape[1] // heads
    for b, c in np.ndindex(*q.shape[:2]):
        group = range(c // of_query * of_key, (c // of_query + 1) * of_key)
        weights = np.array([math.exp(scale * float(q[b, c] @ k[b, d])) for d in group])
        out[b, c] = (weights / weights.sum()) @ v[b, list(group)]
    return out.reshape(*query.shape[:2], *value.shape[2:])


@every_backend
@given(
    b=st.integers(1, 3),
    per_head=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    heads=st.integers(1, 3),
    spatial=SPATIAL,
    of_value=SPATIAL,
    scale=st.sampled_from([None, 0.0, 0.3, -0.7]),
)
def test_is_its_definition(
    backend: str,
    b: int,
    per_head: tuple[int, int],
    heads: int,
    spatial: list[int],
    of_value: list[int],
    scale: float | None,
) -> None:
    cq, ck = (heads * channels for channels in per_head)
    query, key, value = drawn(b, cq, *spatial), drawn(b, ck, *spatial, seed=1), drawn(b, ck, *of_value, seed=2)
    out = kdops.channel_attention(query, key, value, scale=scale, heads=heads, backend=backend)
    exact = by_loops(query, key, value, scale, heads)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-10, atol=1e-12)
    target = drawn(b, cq, *of_value, seed=3)
    distance = kdops.channel_attention_distance(query, key, value, target, scale=scale, heads=heads, backend=backend)
    squares = (exact - target.numpy()) ** 2
    np.testing.assert_allclose(distance.numpy(), squares.reshape(b, -1).mean(axis=1), rtol=1e-10)
    total = kdops.channel_attention_distance(
        query, key, value, target, scale=scale, heads=heads, statistic="sum", backend=backend
    )
    np.testing.assert_allclose(total.numpy(), squares.reshape(b, -1).sum(axis=1), rtol=1e-10)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(b=st.integers(1, 3), cq=st.integers(1, 40), ck=st.integers(1, 40), n=st.integers(1, 700), data=st.data())
def test_gradients_of_any_size(
    backend: str, dtype: torch.dtype, b: int, cq: int, ck: int, n: int, data: st.DataObject
) -> None:
    """Tiles and their remainders, in both layouts, against the float64 reference."""
    shapes = ((b, cq, n), (b, ck, n), (b, ck, n), (b, cq, n))
    maps = [drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    if data.draw(st.booleans(), label="channels last"):
        maps = [t.mT.contiguous().mT for t in maps]
    given_maps = [t.requires_grad_() for t in maps]
    wide = [t.detach().double().requires_grad_() for t in maps]
    out = kdops.channel_attention_distance(*given_maps, backend=backend)
    exact = kdops.channel_attention_distance(*wide, backend="reference")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    gradients = torch.autograd.grad(out.sum(), given_maps), torch.autograd.grad(exact.sum(), wide)
    for mine, truth in zip((out, *gradients[0]), (exact, *gradients[1]), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()))


@every_kernel
@pytest.mark.parametrize("difference", [0.3, 1e-2, 1e-4])
def test_a_target_close_by(backend: str, difference: float) -> None:
    """What a student near its goal has: output and target agree to 30 %, 1 % and 0.01 %. Grams would lose the last."""
    maps = [drawn(2, 16, 24, 24, seed=i, dtype=torch.float32) for i in range(3)]
    output = kdops.channel_attention(*(t.double() for t in maps), backend="reference")
    target = (output * (1 + difference * drawn(*output.shape, seed=5))).float()
    given_maps = [t.requires_grad_() for t in (*maps, target)]
    wide = [t.detach().double().requires_grad_() for t in given_maps]
    exact = kdops.channel_attention_distance(*wide, backend="reference")
    errors = {}
    for name in (backend, "reference"):
        out = kdops.channel_attention_distance(*given_maps, backend=name)
        results = (out, *torch.autograd.grad(out.sum(), given_maps))
        truths = (exact, *torch.autograd.grad(exact.sum(), wide, retain_graph=True))
        errors[name] = [relative_error(mine, truth) for mine, truth in zip(results, truths, strict=True)]
    assert errors[backend][0] < 1e-3  # float32 Grams would be off by 10 and more at 0.01 %
    for mine, eager in zip(errors[backend], errors["reference"], strict=True):
        assert mine <= 2 * eager + 1e-6


@every_backend
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_key_is_value(backend: str, with_target: bool, heads: int) -> None:
    """One tensor in both roles: both gradients flow into it, from one raw gradient."""
    query, both, target = drawn(2, 4, 5, 3), drawn(2, 6, 5, 3, seed=1).requires_grad_(), drawn(2, 4, 5, 3, seed=2)
    copies = both.detach().clone().requires_grad_(), both.detach().clone().requires_grad_()

    def run(key: Tensor, value: Tensor) -> Tensor:
        if with_target:
            return kdops.channel_attention_distance(query, key, value, target, heads=heads, backend=backend)
        return kdops.channel_attention(query, key, value, heads=heads, backend=backend).square()

    with RecordOps() as ops:
        (mine,) = torch.autograd.grad(run(both, both).sum(), both)
    apart = torch.autograd.grad(run(*copies).sum(), copies)
    torch.testing.assert_close(mine, apart[0] + apart[1])
    if backend != "reference":
        assert [g.numel() for g in ops.calls[-1][2]] == [0, both.numel(), 0] + [0] * with_target


@every_kernel
@given(b=st.integers(1, 3), c=st.integers(1, 24), n=st.integers(1, 400), heads=st.integers(1, 2))
def test_same_bits_for_any_number_of_threads(backend: str, b: int, c: int, n: int, heads: int) -> None:
    maps = [drawn(b, c * heads, n, seed=i, dtype=torch.float32).requires_grad_() for i in range(4)]
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            distance = kdops.channel_attention_distance(*maps, heads=heads, backend=backend)
            runs.append((distance, *torch.autograd.grad(distance.sum(), maps)))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(run, runs[0], strict=True))


@every_kernel
def test_the_output_is_not_kept(backend: str) -> None:
    """Forward holds a tile, backward the gradients that are asked for and a tile: nothing else of the size of a map."""
    maps = [drawn(2, 32, 128, 128, seed=i, dtype=torch.float32) for i in range(4)]
    maps[1].requires_grad_()

    def largest(run) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
        return max((e.self_cpu_memory_usage for e in profile.events()), default=0)

    def forward() -> Tensor:
        return kdops.channel_attention_distance(*maps, backend=backend)

    distance = forward()
    assert largest(forward) < maps[0].nbytes / 2
    assert largest(lambda: distance.sum().backward()) <= maps[1].nbytes + 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_small_residual_is_kept(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, in place of forming it again: the gradients' bits do not tell which was done."""
    maps = [drawn(2, 20, 9, 31, seed=i, dtype=dtype).requires_grad_() for i in range(4)]
    runs = []
    for most, kept in ((spec.MOST_KEPT, maps[3].numel()), (0, 0)):
        monkeypatch.setattr(spec, "MOST_KEPT", most)
        assert torch.ops.kdops.channel_attention_distance(*maps, None, 2, True)[2].numel() == kept
        distance = kdops.channel_attention_distance(*maps, heads=2, backend="cpu")
        runs.append(torch.autograd.grad(distance.sum(), maps))
    assert all(torch.equal(mine, other) for mine, other in zip(*runs, strict=True))


@every_backend
def test_constant_and_extreme_logits(backend: str) -> None:
    """Logits far beyond the range of exp: the softmax picks the largest; equal logits give the mean."""
    query = torch.ones(1, 2, 4)
    key = torch.stack([torch.full((4,), x) for x in (1e3, -1e3, 5.0)])[None]
    value = drawn(1, 3, 7, dtype=torch.float32)
    out = kdops.channel_attention(query, key, value, scale=1e3, backend=backend)
    torch.testing.assert_close(out, value[:, :1].expand(1, 2, 7))
    mean = kdops.channel_attention(query, torch.zeros(1, 3, 4), value, backend=backend)
    torch.testing.assert_close(mean, value.mean(dim=1, keepdim=True).expand(1, 2, 7))


@every_backend
def test_compiles_with_a_scale(backend: str) -> None:
    maps = [drawn(2, 4, 6, 5, seed=i).requires_grad_() for i in range(3)]

    def run(*tensors: Tensor) -> Tensor:
        return kdops.channel_attention(*tensors, scale=0.25, heads=2, backend=backend)

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(*maps), run(*maps))


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in KERNELS, reason="needs the CPU kernels")
def test_more_than_2_to_the_31_elements() -> None:
    """64-bit offsets: what counts lies in the last channel of the key, which begins beyond 2^31 elements."""
    channels, positions = 512, 2**22 + 8192
    key = torch.zeros(1, channels, positions, dtype=torch.bfloat16)
    key[0, -1, -1] = 100.0
    query = torch.zeros(1, 1, positions, dtype=torch.bfloat16)
    query[0, 0, -1] = 1.0
    out = kdops.channel_attention(query, key, key, scale=1.0, backend="cpu")
    assert out[0, 0, -1].item() == 100.0
    assert not out[..., :-1].any()


def test_modules_are_the_functions() -> None:
    query, key, value, target = (drawn(2, 4, 5, 3, seed=i) for i in range(4))
    attention = kdops.nn.ChannelAttention(scale=0.5, heads=2)
    assert torch.equal(attention(query, key, value), kdops.channel_attention(query, key, value, scale=0.5, heads=2))
    distance = kdops.nn.ChannelAttentionDistance(heads=2, statistic="sum")
    assert torch.equal(
        distance(query, key, value, target),
        kdops.channel_attention_distance(query, key, value, target, heads=2, statistic="sum"),
    )


@pytest.mark.parametrize(
    ("shapes", "options", "says"),
    [
        (((2, 4, 6), (2, 4, 5), (2, 4, 5)), {}, r"as many positions .* with one to three spatial axes"),
        (((2, 4, 6), (2, 3, 6), (2, 4, 6)), {}, r"key \(2, 3, 6\) float64, value \(2, 4, 6\) float64"),
        (((2, 4, 6), (1, 4, 6), (1, 4, 6)), {}, "they must be"),
        (((2, 4), (2, 4), (2, 4)), {}, "spatial"),
        (((2, 0, 6), (2, 4, 6), (2, 4, 6)), {}, "at least one channel and one position"),
        (((2, 4, 0), (2, 4, 0), (2, 4, 0)), {}, "at least one channel and one position"),
        (((2, 4, 6), (2, 4, 6), (2, 4, 0)), {}, "at least one channel and one position"),
        (((2, 4, 6), (2, 4, 6), (1, 4, 6)), {}, "they must be"),
        (((2, 4, 6), (2, 4, 6), (2, 4, 1, 1, 1, 6)), {}, "one to three spatial axes"),
        (((2, 4, 6), (2, 3, 6), (2, 3, 6)), {"heads": 2}, "divides the channels of query 4 and key 3"),
        (((2, 3, 6), (2, 4, 6), (2, 4, 6)), {"heads": 2}, "divides the channels of query 3 and key 4"),
        (((2, 4, 6), (2, 4, 6), (2, 4, 6)), {"heads": 0}, "heads is 0"),
    ],
)
def test_errors_say_what_is_needed(shapes: tuple[tuple[int, ...], ...], options: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kdops.channel_attention(*(drawn(*shape) for shape in shapes), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": "0.5"}, "scale is '0.5'"),
        ({"scale": torch.ones(())}, "scale is a tensor"),
        ({"heads": 2.0}, "heads is 2.0"),
    ],
)
def test_options_are_numbers(options: dict[str, object], says: str) -> None:
    maps = [drawn(2, 4, 6, seed=i) for i in range(4)]
    with pytest.raises(TypeError, match=says):
        kdops.channel_attention(*maps[:3], **options)
    with pytest.raises(TypeError, match=says):
        kdops.channel_attention_distance(*maps, **options)


def test_costs_by_hand() -> None:
    """`kdtrain plan` rests on them. B = 2, Cq = 6, Ck = 4, N = 10 positions of the key, M = 15 of the value, 2 heads, float32."""
    query, key, value, target = (drawn(2, c, n, dtype=torch.float32) for c, n in ((6, 10), (4, 10), (4, 15), (6, 15)))
    pairs = 2 * 2 * 6 * 4 // 2
    assert spec._flops(query, key, value, heads=2) == pairs * (10 + 15)
    assert spec._bytes(query, key, value) == 4 * 2 * (6 * 10 + 4 * 10 + 4 * 15 + 6 * 15)
    assert spec._bytes(query, key, key) == 4 * 2 * (6 * 10 + 4 * 10 + 6 * 10)  # one tensor in both roles is read once
    assert spec._bytes(query, key, value, target) == 4 * 2 * (6 * 10 + 4 * 10 + 4 * 15 + 6 * 15)
    query.requires_grad_()
    assert spec._flops(query, key, value, heads=2, backward=True) == pairs * (10 + 15 + 15 + 10)
    read = 4 * 2 * (6 * 10 + 4 * 10 + 4 * 15 + 6 * 15)
    assert spec._bytes(query, key, value, backward=True) == 2 * read + query.nbytes
    kept = spec._scratch_bytes(query, key, value, target) - spec._scratch_bytes(query, key, value)
    assert kept == 4 * (target.numel() + 3 * 2 * 6 * 4)  # the residual, and sums of three Grams more


def test_a_residual_that_is_not_kept_is_formed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [drawn(2, 4, 10, seed=i).requires_grad_() for i in range(4)]
    kept = spec._flops(*maps, backward=True)
    monkeypatch.setattr(spec, "MOST_KEPT", 2 * 4 * 10 - 1)
    assert spec._flops(*maps, backward=True) - kept == 2 * 2 * 4 * 4 * 10


def test_errors_of_the_distance() -> None:
    maps = [drawn(2, 4, 6, seed=i) for i in range(3)]
    with pytest.raises(ValueError, match=r"target \(2, 3, 6\) float64, but it must have the channels of query"):
        kdops.channel_attention_distance(*maps, drawn(2, 3, 6))
    for shape in ((2, 4, 5), (2, 4, 2, 3), (1, 4, 6)):
        with pytest.raises(ValueError, match="the positions of value"):
            kdops.channel_attention_distance(*maps, drawn(*shape))
    with pytest.raises(ValueError, match="'mean', 'sum'"):
        kdops.channel_attention_distance(*maps, drawn(2, 4, 6), statistic="max")


@every_backend
@pytest.mark.parametrize("channels", [4, 6])
def test_an_infinite_value_gives_an_infinite_distance(backend: str, channels: int) -> None:
    """Also where the channels do not fill a block of 6 rows."""
    query, key, target = drawn(1, channels, 9).float(), drawn(1, 4, 9).float(), drawn(1, channels, 9, seed=1).float()
    value = drawn(1, 4, 9, seed=2).float()
    value[0, 0, 0] = float("inf")
    assert kdops.channel_attention_distance(query, key, value, target, backend=backend).tolist() == [float("inf")]


@every_backend
def test_squares_of_float16_do_not_overflow(backend: str) -> None:
    maps = [drawn(1, 4, 48, 48, seed=seed).half() for seed in range(3)]
    target = 100 * drawn(1, 4, 48, 48, seed=3).half()
    found = kdops.channel_attention_distance(*maps, target, backend=backend)
    exact = kdops.channel_attention_distance(*(t.double() for t in (*maps, target)), backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=0)
