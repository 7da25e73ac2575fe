"""The Triton kernels of the cross-entropy over a codebook against float64, on a GPU or in the interpreter (so with small shapes)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import kdops
from kdops.codebook import table
from kdops.codebook import triton as kernels
from kdops.codebook.table import Tile
from tests.contract import GPU, relative_error

DEVICE = "cuda" if GPU else "cpu"
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def drawn(shape: tuple[int, ...], codes: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, shape, (codes, shape[1]))
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def with_gradients(tensors: list[Tensor], backend: str, temperature: float) -> list[Tensor]:
    loss = kdops.codebook_cross_entropy(*tensors, temperature=temperature, reduction="none", backend=backend)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, tensors, upstream)]


def check(tensors: list[Tensor], temperature: float) -> None:
    exact = with_gradients([t.detach().double().requires_grad_() for t in tensors], "reference", temperature)
    mine, eager = (with_gradients(tensors, backend, temperature) for backend in ("triton", "reference"))
    for got, plain, truth in zip(mine, eager, exact, strict=True):
        assert relative_error(got, truth) <= 2 * relative_error(plain, truth) + 8 * EPS[got.dtype]


@settings(max_examples=12)
@given(
    shape=st.sampled_from([(1, 1), (70, 5), (2, 17, 33), (3, 20, 5, 7), (1, 50, 2, 3, 4)]),
    codes=st.sampled_from([2, 7, 64, 100]),
    dtype=st.sampled_from(sorted(EPS, key=str)),
    temperature=st.sampled_from([1.0, 10.0]),
)
def test_any_shape(shape: tuple[int, ...], codes: int, dtype: torch.dtype, temperature: float) -> None:
    check(drawn(shape, codes, dtype), temperature)


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_one_code_leaves_no_choice(dtype: torch.dtype) -> None:
    """All is 0; but for roundings of 70 logits, which the code's gradient makes again in another order."""
    *zeros, of_code = with_gradients(drawn((70, 5), 1, dtype), "triton", 1.0)
    assert not any(t.any() for t in zeros)
    assert float(of_code.abs().max()) <= 70 * 2**-20  # logits are of the order of 8


@pytest.mark.parametrize("channels", [48, 180, 300])
def test_channels_in_two_parts(channels: int) -> None:
    check(drawn((40, channels), 70, torch.float32), float(channels))


@pytest.mark.parametrize("in_one_sweep", [True, False])
@pytest.mark.parametrize(
    ("student_scale", "teacher_scale", "noise"),
    [(1.0, 1.0, 1e-3), (1.0, 1.0, 0.1), (1.0, 1.0, 3.0), (8.0, 0.01, 0.1), (0.01, 8.0, 0.1)],
    ids=["alike", "close", "apart", "the student is sure", "the teacher is sure"],
)
def test_rounding_follows_the_difference_of_the_softmaxes(
    student_scale: float, teacher_scale: float, noise: float, in_one_sweep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few roundings of the slopes themselves, where each softmax alone is up to 1,000 times as large as their difference.

    Codes are sorted: the student's weights rise from tile to tile and the teacher's fall, so the first maxima are no guide.
    """
    monkeypatch.setattr(kernels, "in_one_sweep", lambda *_: in_one_sweep)
    teacher, offset, codes = (t.detach().float() for t in drawn((40, 32), 250, torch.float32))
    student = (teacher + noise * offset) * student_scale
    codes = codes[(codes @ student[0]).argsort()]
    tensors = [t.bfloat16().requires_grad_() for t in (student, teacher * teacher_scale, codes)]
    mine, exact = (
        with_gradients([t.detach().to(d).requires_grad_() for t in tensors], b, 32.0)[1]
        for d, b in ((torch.bfloat16, "triton"), (torch.float64, "reference"))
    )
    assert relative_error(mine, exact) <= 2 * EPS[torch.bfloat16]


@pytest.mark.parametrize(("share", "held"), [(16, 16), (16, 512), (512, 16)])
def test_channels_in_slices_and_streamed(share: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs may share the channels of the result, and those of the logits may stream through: 40 = 16 + 16 + 8."""
    monkeypatch.setattr(kernels, "tile_for", lambda *_: Tile(32, 32, 4, 1, share, held))
    monkeypatch.setattr(kernels, "in_one_sweep", lambda *_: False)
    check(drawn((2, 40, 37), 70, torch.float32), 4.0)


def test_on_sm_90_every_warpgroup_has_rows_of_its_own() -> None:
    """Triton 3.6 multiplies float32 wrongly where two share 64 rows."""
    for (kernel, size), tiles in table.TILES["cuda:90"].items():
        for tile in tiles.values():
            assert size == 2 or (tile.codes if kernel == "code_sums" else tile.rows) >= 16 * tile.warps, kernel


def test_the_codebook_sums_over_groups_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    check(drawn((5, 8, 150), 40, torch.float32), 4.0)


def test_small_upstream_gradients_survive_float16() -> None:
    """A mean over 65,536 positions hands each a gradient of 1.5e-5, of which float16 would keep eight bits."""
    tensors = drawn((64, 8), 20, torch.float16)
    loss = kdops.codebook_cross_entropy(*tensors, reduction="none", backend="triton")
    full, tiny = (
        torch.autograd.grad(loss, tensors[2], loss.new_full((64,), g), retain_graph=True)[0] for g in (1, 2**-14)
    )
    torch.testing.assert_close(tiny.float() * 2**14, full.float(), rtol=2**-9, atol=2**-10)


def test_a_teacher_with_logits_far_apart_in_float16() -> None:
    """Its slopes are weighted by differences of logits, here beyond what float16 holds."""
    tensors = drawn((20, 4), 12, torch.float16)
    mine, exact = (
        with_gradients([t.detach().to(d).requires_grad_() for t in tensors], b, 2e-5)[2]
        for d, b in ((torch.float16, "triton"), (torch.float64, "reference"))
    )
    assert exact.isfinite().all()
    held = exact.abs() < 6e4
    torch.testing.assert_close(mine[held].double(), exact[held], rtol=5e-2, atol=1.0)
