"""The Triton kernels of spatial attention against float64, on a GPU or in the interpreter (so with small shapes)."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("triton", reason="triton is not installed")

import kdops
from kdops.dispatch import SPECS, choose
from kdops.spatial_attention import table
from kdops.spatial_attention import triton as kernels
from kdops.spatial_attention.table import Tile
from kdops.tiles import features

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ROLES = {"teacher queries": (0, 1, 1), "student queries": (1, 0, 1), "all": (0, 1, 2), "self": (0, 0, 0)}
FROZEN = {"teacher queries": (0,), "student queries": (0,)}
both_ways = pytest.mark.parametrize("normalize", ["key", "query"])
every_form = pytest.mark.parametrize("form", ROLES)


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, frozen: tuple[int, ...] = ()) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(DEVICE, dtype).requires_grad_(i not in frozen) for i, t in enumerate(found)]


def results(tensors: list[Tensor], roles: tuple[int, ...], backend: str, **options: object) -> list[Tensor]:
    """The result and every gradient; `roles` says which tensor is query, key and value."""
    out = kdops.spatial_attention(*(tensors[role] for role in roles), **options, backend=backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, [t for t in tensors if t.requires_grad], upstream)]


def check(
    tensors: list[Tensor], roles: tuple[int, ...] = (0, 1, 2), tolerance: float | None = None, **options: object
) -> None:
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    found, exact = results(tensors, roles, "triton", **options), results(wide, roles, "reference", **options)
    for gradient, t in zip(found[1:], [t for t in tensors if t.requires_grad], strict=True):
        assert gradient.stride() == torch.empty_like(t).stride()
    largest = max(float(g.abs().max()) for g in exact[1:])  # that of a gradient which cancels is no scale
    for got, truth, scale in zip(found, exact, (float(exact[0].abs().max()), *[largest] * 3), strict=False):
        assert float((got.double() - truth).abs().max()) <= (tolerance or TOLERANCE[tensors[0].dtype]) * scale


@settings(max_examples=15)
@given(
    form=st.sampled_from(sorted(ROLES)),
    dtype=st.sampled_from(DTYPES),
    b=st.integers(1, 2),
    c=st.integers(1, 40),
    cv=st.integers(1, 40),
    nq=st.integers(1, 90),
    nk=st.integers(1, 90),
    normalize=st.sampled_from(["key", "query"]),
)
def test_any_size(form: str, dtype: torch.dtype, b: int, c: int, cv: int, nq: int, nk: int, normalize: str) -> None:
    shapes = {"all": [(b, c, nq), (b, c, nk), (b, cv, nk)], "teacher queries": [(b, c, nq), (b, c, nk)]}
    check(
        drawn(*shapes.get(form, [(b, c, nq)] * 2)[: 1 + max(ROLES[form])], dtype=dtype, frozen=FROZEN.get(form, ())),
        ROLES[form],
        normalize=normalize,
    )


@pytest.mark.parametrize("c", [48, 96, 180, 192, 256, 384, 512])
def test_channel_counts_of_networks(c: int) -> None:
    check(drawn((1, c, 17), (1, c, 21), dtype=torch.bfloat16, frozen=(0,)), ROLES["teacher queries"])
    check(drawn((1, c, 17), (1, c, 17), frozen=(0,)), ROLES["student queries"])


def test_on_sm_90_every_warpgroup_has_rows_of_its_own() -> None:
    """Triton 3.6 lets two that share 64 rows do the same products, and in float32 wrong ones."""
    tiles = [tile for sizes in table.TILES["cuda:90"].values() for tile in sizes.values()]
    assert all(tile.rows >= 16 * tile.warps for tile in tiles)


@pytest.mark.parametrize("architecture", list(table.TILES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_sweep_sums_logits_in_one_order(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are made again from logits that must be the very numbers of which the statistics are, whatever channels the values have."""
    monkeypatch.setattr(table.tiles, "architecture", lambda: architecture)
    sweeps = ("attend", "attend shared", "attend given", "slopes", "slopes shared")
    for c in (16, 33, 64, 65, 180, 512):
        held = {min(c, table.tile_for(s, max(c, cv), dtype).held) for s in sweeps for cv in (1, 64, 65, 512)}
        assert len(held) == 1, (c, held)


@pytest.mark.gpu
@pytest.mark.parametrize("c", [64, 128, 180, 256, 384, 512])
def test_whole_tiles_of_many_channels(c: int) -> None:
    """Other kernels than where a tile is not full; the tables for a GPU are not those of the interpreter."""
    for form in ("teacher queries", "student queries"):
        check(drawn((1, c, 256), (1, c, 256), dtype=torch.bfloat16, frozen=(0,)), ROLES[form])


@both_ways
@every_form
@pytest.mark.parametrize("held", [512, 16], ids=["held", "streamed"])
def test_slices_of_channels_and_many_tiles(
    form: str, normalize: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several programs may share the channels of the result, and those of the logits may stream through: 40 = 16 + 16 + 8."""
    monkeypatch.setattr(kernels, "tile_for", lambda *_: Tile(32, 32, 4, 1, 16, held))
    shape = (1, 40, 37)
    check(drawn(*[shape] * (1 + max(ROLES[form])), frozen=FROZEN.get(form, ())), ROLES[form], normalize=normalize)


LAYOUTS = {
    "channels first": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "expanded": lambda t: t[:1].expand(t.shape),
    "every other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
}


@both_ways
def test_a_sample_does_not_read_the_next(normalize: str) -> None:
    """Whole tiles of positions, and channels that do not fill theirs: behind the last channel lies the next sample's first."""
    both = drawn(*[(2, 20, 128)] * 3)
    alone = [t.detach()[:1].clone().requires_grad_() for t in both]
    with torch.no_grad():
        for t in both:
            t[1] = math.nan
    found = [results(tensors, (0, 1, 2), "triton", normalize=normalize) for tensors in (both, alone)]
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine[:1], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_layouts_are_read_where_they_lie(layout: str) -> None:
    tensors = drawn((2, 6, 5, 8), (2, 6, 7, 4), frozen=(0, 1))
    moved = [LAYOUTS[layout](t).detach().requires_grad_() for t in tensors]
    for t in moved:
        assert features(t).data.data_ptr() == t.data_ptr(), "a copy was made"
    check(moved, ROLES["teacher queries"])


def test_other_layouts_are_copied() -> None:
    tensors = [t.detach().transpose(2, 3).requires_grad_() for t in drawn((2, 6, 5, 8), (2, 6, 7, 4))]
    check(tensors, ROLES["teacher queries"])


@pytest.mark.parametrize(
    ("form", "normalize", "launched"),
    [
        ("teacher queries", "key", ["attend", "delta", "slopes"]),
        ("student queries", "key", ["attend", "delta", "slopes", "attend"]),
        ("all", "key", ["attend", "delta", "slopes", "slopes", "attend"]),
        ("teacher queries", "query", ["attend", "attend", "slopes", "slopes"]),
    ],
)
def test_only_what_is_asked_is_computed(
    form: str, normalize: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for name in ("attend", "slopes", "delta"):
        launch = getattr(kernels, f"_launch_{name}")
        monkeypatch.setattr(
            kernels,
            f"_launch_{name}",
            lambda *args, name=name, launch=launch, **kwargs: (seen.append(name), launch(*args, **kwargs)),
        )
    tensors = drawn(*[(1, 4, 9)] * (1 + max(ROLES[form])), frozen=FROZEN.get(form, ()))
    results(tensors, ROLES[form], "triton", normalize=normalize)
    assert seen == launched


@both_ways
def test_large_logits_do_not_overflow(normalize: str) -> None:
    """Logits in the thousands, of either sign of the scale. Their own rounding is that of a few 1e-4."""
    for scale in (300.0, -300.0):
        check(drawn((1, 6, 30), (1, 6, 80), (1, 6, 80)), tolerance=1e-3, scale=scale, normalize=normalize)


@both_ways
def test_scale_of_zero_takes_the_mean(normalize: str) -> None:
    """Also where a tile has columns that do not exist, whose logits are -infinity."""
    check(drawn((1, 6, 30), (1, 6, 80), (1, 6, 80)), scale=0.0, normalize=normalize)


def test_positions_of_minus_infinity_have_no_weight() -> None:
    """Tiles that hold nothing else must not poison those that follow, and they get no gradient but their own 0."""
    query, key, value = drawn((1, 1, 9), (1, 1, 150), (1, 3, 150), frozen=(0, 1))
    query = query.abs() + 0.1
    key[..., :130] = -math.inf
    out = kdops.spatial_attention(query, key, value, backend="triton")
    exact = kdops.spatial_attention(query, key[..., 130:], value[..., 130:], backend="reference")
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), value)
    assert not grad[..., :130].any()
    assert grad[..., 130:].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN and infinities
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_reach_what_they_reach_in_the_reference(bad: float) -> None:
    query, key, value = drawn((1, 3, 5), (1, 3, 70), (1, 2, 70))
    with torch.no_grad():
        query[0, 0, 1], value[0, 1, 3] = bad, bad
    found = results([query, key, value], (0, 1, 2), "triton")
    exact = results([query, key, value], (0, 1, 2), "reference")
    for got, truth in zip(found, exact, strict=True):
        assert torch.equal(got.isfinite(), truth.isfinite())


@pytest.mark.parametrize("architecture", table.TILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_channel_count_has_a_tile(architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.tiles, "architecture", lambda: architecture)
    for sweep in ("attend", "attend shared", "attend given", "slopes", "slopes shared"):
        found = [table.tile_for(sweep, c, dtype) for c in range(1, 513)]
        assert all(min(tile.rows, tile.columns, tile.slice) >= 16 for tile in found)  # what a product takes


@pytest.mark.parametrize(
    ("architecture", "same_as"), [("cuda:89", "cuda"), ("cuda:90", "cuda:90"), ("hip:gfx90a", "hip")]
)
def test_an_unlisted_architecture_takes_the_tiles_of_its_kind(
    architecture: str, same_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table.tiles, "architecture", lambda: architecture)
    limit, tile = next(iter(table.TILES[same_as]["slopes", 2].items()))
    assert table.tile_for("slopes", limit, torch.bfloat16) == tile


@pytest.mark.parametrize("channels", [(513, 3), (3, 513)], ids=["query and key", "value"])
def test_more_channels_than_a_program_holds_are_left_to_others(
    channels: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    c, cv = channels
    tensors = drawn((1, c, 4), (1, c, 5), (1, cv, 5))
    reason = "a tensor has 513 channels and the Triton kernels take at most 512"
    assert kdops.explain("spatial_attention", *tensors)["triton"] == f"no: {reason}"
    with pytest.raises(RuntimeError, match=f"cannot run because {reason}"):
        kdops.spatial_attention(*tensors, backend="triton")
    first = dataclasses.replace(SPECS["spatial_attention"], preference={DEVICE: ("triton", "reference")})
    monkeypatch.setitem(SPECS, "spatial_attention", first)
    assert choose("spatial_attention", tensors).name == "reference"
    assert choose("spatial_attention", [t[:, :512] for t in tensors]).name == "triton"


def test_other_counts_of_channels_do_not_recompile() -> None:
    """Although the backend looks at them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = partial(kdops.spatial_attention, backend="triton")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for c in (8, 20, 36):
        tensors = drawn((1, c, 11), (1, c, 13), (1, c + 1, 13))
        torch.testing.assert_close(compiled(*tensors), attend(*tensors))
    assert counter.frame_count == 1
