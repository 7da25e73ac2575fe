"""The Triton kernels of channel attention and its distance against float64, on a GPU or in the interpreter (so with small shapes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import kdops
from kdops import tiles
from kdops.channel_attention import triton_distance as kernels
from kdops.channel_attention import triton_products, triton_residual
from tests.contract import Operators, RecordOps, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def results(
    maps: list[Tensor], backend: str, dtype: torch.dtype, distance: bool, heads: int = 1, grad_seed: int = 9
) -> list[Tensor]:
    """The result, and the gradients of the maps; a map that occurs twice in the list is one tensor."""
    own: dict[int, Tensor] = {}
    given = [own.setdefault(id(t), t.detach().to(dtype).requires_grad_()) for t in maps]
    function = kdops.channel_attention_distance if distance else kdops.channel_attention
    out = function(*given, heads=heads, backend=backend)
    upstream = drawn(*out.shape, seed=grad_seed).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(own.values()), upstream)]


def errors(maps: list[Tensor], dtype: torch.dtype, distance: bool, heads: int = 1) -> Tensor:
    """How far ours and eager torch's are from float64: (2, results)."""
    maps_given: dict[int, Tensor] = {}
    rounded = [maps_given.setdefault(id(t), t.to(dtype)) for t in maps]
    mine = results(rounded, "triton", dtype, distance, heads)
    eager = results(rounded, "reference", dtype, distance, heads)
    exact = results(rounded, "reference", torch.float64, distance, heads)
    assert all(m.dtype == dtype for m in mine)
    return torch.tensor([[relative_error(t, e) for t, e in zip(r, exact, strict=True)] for r in (mine, eager)])


def check(maps: list[Tensor], dtype: torch.dtype, distance: bool, heads: int = 1, floor: float = 8) -> None:
    """At most three times as far from float64 as eager torch in the same dtype, and a few roundings."""
    mine, eager = errors(maps, dtype, distance, heads)
    assert (mine <= 3 * eager + floor * EPS[dtype]).all()


FORMS = {
    "all": (0, 1, 2, 3),
    "teacher queries": (0, 1, 1, 0),
    "key is value": (0, 1, 1, 3),
    "target is query": (0, 1, 2, 0),
}


@pytest.mark.slow
@settings(max_examples=25)
@given(
    form=st.sampled_from(sorted(FORMS)),
    distance=st.booleans(),
    b=st.integers(1, 2),
    heads=st.sampled_from([1, 2]),
    channels=st.tuples(st.sampled_from([1, 5, 16, 33, 70]), st.sampled_from([1, 3, 24, 67])),
    n=st.sampled_from([1, 2, 31, 64, 130]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    form: str, distance: bool, b: int, heads: int, channels: tuple[int, int], n: int, dtype: torch.dtype
) -> None:
    cq, ck = (heads * c for c in channels)
    maps = [drawn(b, c, n, seed=i) for i, c in enumerate((cq, ck, ck, cq))]
    check([maps[i] for i in FORMS[form][: 4 if distance else 3]], dtype, distance, heads)


@pytest.mark.parametrize(
    "form", ["all", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form != "all")]
)
def test_many_chunks(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over positions that several programs share; the last chunk is short."""
    monkeypatch.setattr(tiles, "SHORTEST_CHUNK", 32)
    monkeypatch.setattr(tiles, "WAVES", 20)
    maps = [drawn(2, c, 10, 13, seed=i) for i, c in enumerate((12, 20, 20, 12))]
    chosen = [maps[i] for i in FORMS[form]]
    check(chosen, torch.float32, True)
    check(chosen[:3], torch.float32, False)
    monkeypatch.setattr(kernels, "FEW_CHUNKS", 1)  # summed by a launch of their own
    check(chosen, torch.float32, True)


@pytest.mark.parametrize(("rows", "columns"), [(12, 60), (50, 10), (64, 64), (33, 17)])
@pytest.mark.parametrize("form", ["all", "key is value"])
def test_programs_share_the_channels_of_a_value(
    rows: int, columns: int, form: str, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """Each block of rows is compared by one program for every 16 channels of the value, where there are chunks to sum."""
    monkeypatch.setattr(tiles, "SHORTEST_CHUNK", 32)
    maps = [drawn(2, c, 130, seed=i) for i, c in enumerate((rows, columns, columns, rows))]
    check([maps[i] for i in FORMS[form]], torch.float32, True)


def near(maps: list[Tensor], difference: float) -> Tensor:
    """A target that differs from the attention of the maps by this part."""
    out = kdops.channel_attention(*maps, backend="reference")
    return out * (1 + difference * drawn(*out.shape, seed=7))


@pytest.mark.parametrize("difference", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("form", ["all", "key is value"])
def test_networks_close_by(difference: float, form: str) -> None:
    """Student and target that differ by 30 %, 1 % and 0.01 %: as exact as eager torch, which forms the output.

    On the mean of eight draws: where most digits cancel, eager torch is ten times as exact for one draw as for the next.
    """

    def of_draw(draw: int) -> Tensor:
        maps = [drawn(3, c, 9, 11, seed=10 * draw + i) for i, c in enumerate((12, 20, 20))]
        maps = [maps[i] for i in FORMS[form][:3]]
        return errors([*maps, near(maps, difference)], torch.float32, True)

    mine, eager = torch.stack([of_draw(draw) for draw in range(8)]).mean(0)
    assert (mine <= 2 * eager + 8 * EPS[torch.float32]).all()


def test_only_close_samples_take_the_direct_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample of three is close: it alone is marked, and without the direct form it alone would be wrong."""
    maps = [drawn(3, 8, 50, seed=i).float() for i in range(3)]
    target = near([t.double() for t in maps], 1.0).float()
    target[1] = near([t.double() for t in maps], 1e-4)[1].float()
    exact = kdops.channel_attention_distance(
        *(t.double() for t in (*maps, target)), backend="reference", statistic="sum"
    )
    distance, _, _, close = kernels.channel_attention_distance(*maps, target, None, 1, False)
    assert close.tolist() == [0, 1, 0]
    torch.testing.assert_close(distance.double(), exact, rtol=1e-3, atol=0)
    monkeypatch.setattr(triton_residual, "CLOSE", -1.0)
    distance, _, _, close = kernels.channel_attention_distance(*maps, target, None, 1, False)
    assert not close.any()
    torch.testing.assert_close(distance[::2].double(), exact[::2], rtol=1e-5, atol=0)
    assert abs(float(distance[1]) - float(exact[1])) > 1e-2 * float(exact[1])


def test_gradients_of_close_and_far_samples_in_one_batch() -> None:
    maps = [drawn(3, 8, 50, seed=i) for i in range(2)]
    target = near([maps[0], maps[1], maps[1]], 1.0)
    target[1] = near([maps[0], maps[1], maps[1]], 1e-3)[1]
    mine, exact = (
        results([maps[0].float(), key := maps[1].float(), key, target.float()], backend, dtype, True)
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    for m, truth in zip(mine, exact, strict=True):
        for sample in range(3):
            assert relative_error(m[sample], truth[sample]) < (5e-3 if sample == 1 else 1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_close_samples_are_settled_by_their_last_programs(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close samples beside far ones, of several tiles, chunks and heads: as exact as eager torch, and the same bits again."""
    monkeypatch.setattr(tiles, "SHORTEST_CHUNK", 32)
    maps = [drawn(5, c, 90, seed=i) for i, c in enumerate((70, 40, 40))]
    out = kdops.channel_attention(*maps, heads=heads, backend="reference")
    scale = torch.tensor([1e-3, 1.0, 1e-2, 1e-4, 1.0], dtype=out.dtype, device=DEVICE)[:, None, None]
    rounded = [t.float() for t in (*maps, out * (1 + scale * drawn(*out.shape, seed=7)))]
    *_, close = kernels.channel_attention_distance(*rounded, None, heads, True)
    assert close.tolist() == [1, 0, 1, 1, 0]
    mine = results(rounded, "triton", torch.float32, True, heads)
    eager = results(rounded, "reference", torch.float32, True, heads)
    exact = results(rounded, "reference", torch.float64, True, heads)
    for one, other, truth in zip(mine, eager, exact, strict=True):
        for sample in range(5):
            allowed = 3 * relative_error(other[sample], truth[sample]) + 32 * EPS[torch.float32]
            assert relative_error(one[sample], truth[sample]) <= allowed
    for one, again in zip(mine, results(rounded, "triton", torch.float32, True, heads), strict=True):
        assert torch.equal(one, again)


def test_the_residual_is_not_formed_for_far_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the direct kernels leave behind is not used: garbage there changes nothing."""
    maps = [drawn(2, 6, 40, seed=i).float() for i in range(4)]
    before = results(maps, "triton", torch.float32, True)
    form = triton_residual._residual_sums

    class Spoilt:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                sums = args[7].fill_(float("nan"))
                form[grid](*args, **kwargs)
                assert sums.isnan().all()

            return launch

    monkeypatch.setattr(triton_residual, "_residual_sums", Spoilt())
    for mine, first in zip(results(maps, "triton", torch.float32, True), before, strict=True):
        assert torch.equal(mine, first)


@pytest.mark.parametrize("distance", [False, True])
def test_channels_last_is_read_without_a_copy(distance: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [drawn(2, 6, 5, 7, seed=i).float() for i in range(4)][: 3 + distance]
    plain = results(maps, "triton", torch.float32, distance)
    last = [t.contiguous(memory_format=torch.channels_last) for t in maps]
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "contiguous", lambda *_, **__: pytest.fail("a copy was made"))
        moved = results(last, "triton", torch.float32, distance)
    for mine, first in zip(moved, plain, strict=True):
        torch.testing.assert_close(mine, first)


def test_a_step_runs_no_operator_of_torch() -> None:
    """Mean, casts and the gradients that statistics do not have: all within the kernels."""
    teacher, student = (drawn(2, 4, 30, seed=i).bfloat16() for i in range(2))
    student.requires_grad_()
    upstream = drawn(2, seed=2).bfloat16()
    with Operators() as ran:
        distance = kdops.channel_attention_distance(teacher, student, student, teacher, backend="triton")
        torch.autograd.grad(distance, student, upstream)
    op = "kdops::channel_attention_distance"
    assert ran.names == [f"{op}_triton", f"{op}_backward_triton"]


@pytest.mark.parametrize("difference", [1.0, 1e-2])
@pytest.mark.parametrize("statistic", ["mean", "sum"])
def test_an_expanded_gradient(difference: float, statistic: str) -> None:
    """That of a mean over the batch is one number for all samples, far or close."""
    maps = [drawn(3, 8, 50, seed=i) for i in range(3)]
    given = [t.float().requires_grad_() for t in (*maps, near(maps, difference))]
    distance = kdops.channel_attention_distance(*given, statistic=statistic, backend="triton")
    one = torch.tensor(0.7, device=DEVICE)
    expanded, dense = (
        torch.autograd.grad(distance, given, upstream, retain_graph=True) for upstream in (one.expand(3), one.repeat(3))
    )
    for mine, same in zip(expanded, dense, strict=True):
        assert torch.equal(mine, same)


def test_forward_keeps_only_small_matrices() -> None:
    """Nothing of the size of a map is a result of the distance's forward pass."""
    maps = [drawn(1, 4, 1, 500, seed=i).float().requires_grad_() for i in range(4)]
    with RecordOps() as ops:
        kdops.channel_attention_distance(*maps, backend="triton")
    (_, _, out), *_ = ops.calls
    assert max(t.numel() for t in out) == 16


@pytest.mark.parametrize("channels", [16, 48, 64, 180, 512])
def test_on_sm_90_every_warpgroup_has_rows_of_its_own(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32, as in spatial attention: of fewer than 64 rows there are no products of warpgroups."""
    monkeypatch.setattr(tiles, "architecture", lambda: "cuda:90")
    chosen = [triton_products.gram_tile(channels, torch.float32, grams) for grams in (1, 2, 3)]
    chosen.append(triton_products.mix_tile(channels, channels, torch.float32, terms=2, minus=False))
    assert all(tile.block < 64 or tile.block >= 16 * tile.warps for tile in chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [48, 64, 180])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_many_channels(dtype: torch.dtype, channels: int, form: str) -> None:
    """Blocks of 64 channels, which no sample of the contract has, and more positions than a program has on chip."""
    maps = [drawn(2, channels, 3000, seed=i) for i in range(4)]
    for distance in (False, True):
        check([maps[i] for i in FORMS[form][: 4 if distance else 3]], dtype, distance)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """64-bit offsets in products of both kinds and in the direct form: what counts lies beyond 2^31 elements."""
    channels, positions = 512, 2**22 + 8192
    key = torch.zeros(1, channels, positions, dtype=torch.bfloat16, device=DEVICE)
    key[0, -1, -1] = 100.0
    key.requires_grad_()
    query = torch.zeros(1, 1, positions, dtype=torch.bfloat16, device=DEVICE)
    query[0, 0, -1] = 1.0
    out = kdops.channel_attention(query, key, key, scale=1.0, backend="triton")
    assert out[0, 0, -1].item() == 100.0
    assert not out[..., :-1].any()
    target = out.detach().clone()
    target[0, 0, -1] = 99.0  # close by
    distance = kdops.channel_attention_distance(query, key, key, target, scale=1.0, statistic="sum", backend="triton")
    assert distance.item() == 1.0
    (gradient,) = torch.autograd.grad(distance.sum(), key)
    assert gradient[0, -1, -1].item() == 2.0
    assert not gradient[..., :-1].any()
