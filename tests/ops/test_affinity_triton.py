"""The Triton kernels of the affinity distance against float64, on a GPU or in the interpreter (so with small shapes)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import kdops
from kdops import tiles
from kdops.affinity import triton as kernels
from kdops.affinity import triton_columns as columns
from tests.contract import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def results(student: Tensor, teacher: Tensor, p: int, backend: str, dtype: torch.dtype) -> list[Tensor]:
    maps = [t.detach().to(dtype).requires_grad_() for t in (student, teacher)]
    out = kdops.affinity_distance(*maps, p=p, eps=0.125, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.sum(), maps)]


def check(student: Tensor, teacher: Tensor, p: int, dtype: torch.dtype = torch.float32) -> None:
    student, teacher = student.to(dtype), teacher.to(dtype)
    mine = results(student, teacher, p, "triton", dtype)
    eager = results(student, teacher, p, "reference", dtype)
    exact = results(student, teacher, p, "reference", torch.float64)
    for m, e, truth in zip(mine, eager, exact, strict=True):
        assert m.dtype == dtype
        assert relative_error(m, truth) <= 3 * relative_error(e, truth) + 8 * torch.finfo(dtype).eps


def test_on_sm_90_every_warpgroup_has_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32, as in spatial attention: of fewer than 64 rows there are no products of warpgroups."""
    monkeypatch.setattr(tiles, "architecture", lambda: "cuda:90")
    chosen = [kernels.tile_for(torch.float32, gradients=gradients) for gradients in (False, True)]
    assert all(tile.side < 64 or tile.side >= 16 * tile.warps for tile in chosen)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_channels(p: int, dtype: torch.dtype) -> None:
    check(drawn(1, 5, 40), drawn(1, 33, 40, seed=1), p, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cs", "ct", "n"), [(1, 1, 1), (5, 70, 129), (70, 5, 260), (33, 64, 40)])
def test_any_shape(p: int, dtype: torch.dtype, cs: int, ct: int, n: int) -> None:
    """Several tiles and slices, padded positions and channels, differing channel counts, few and many positions."""
    check(drawn(2, cs, n), drawn(2, ct, n, seed=1), p, dtype)


@pytest.mark.slow
def test_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SHORTEST_CHUNK", 48)
    monkeypatch.setattr(tiles, "WAVES", 20)
    check(drawn(1, 6, 300), drawn(1, 4, 300, seed=1), 2)


@pytest.mark.slow
def test_slices_of_many_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WIDEST", 32)
    check(drawn(1, 70, 20), drawn(1, 40, 20, seed=1), 1)


@pytest.mark.parametrize(
    "difference", [pytest.param(0.3, marks=pytest.mark.slow), pytest.param(1e-2, marks=pytest.mark.slow), 1e-4]
)
def test_grams_of_networks_close_by(difference: float) -> None:
    """p=2 by Grams is exact to float32 where the networks differ by 30 %, 1 % and 0.01 %."""
    teacher = drawn(2, 12, 130)
    student = teacher * (1 + difference * drawn(2, 12, 130, seed=1))
    student, teacher = student.float(), teacher.float()
    exact = results(student, teacher, 2, "reference", torch.float64)
    for mine, truth in zip(results(student, teacher, 2, "triton", torch.float32), exact, strict=True):
        assert relative_error(mine, truth) < 1e-6


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("n", [20, pytest.param(150, marks=pytest.mark.slow)])
def test_equal_networks_have_no_distance(p: int, n: int) -> None:
    student = drawn(2, 8, n).float()
    assert not any(t.any() for t in results(student, student.clone(), p, "triton", torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**12])
def test_columns_are_packed_exactly(dtype: torch.dtype, scale: float) -> None:
    """Packed columns are the maps times powers of two, their largest numbers between 1 and 2, and zeros around them."""
    maps = (drawn(2, 5, 37) * scale).to(dtype).clamp(-60000, 60000)
    packed = columns.pack(maps, maps, 1e-8, grams=True)
    found = packed.columns[:, :37, :5].mT.double()
    torch.testing.assert_close(found, maps.double() * packed.scales[:, 0, None, :37].double(), rtol=0, atol=0)
    assert ((found.abs().amax(1) >= 1) & (found.abs().amax(1) < 2)).all()
    assert not packed.columns[:, 37:].any()
    assert not packed.columns[..., 5 : packed.teacher].any()
    norms = torch.linalg.vector_norm(maps.double(), dim=1)
    factors = packed.factors[:, 0, :37] * packed.scales[:, 0, :37]
    torch.testing.assert_close(factors, 1 / (norms + 1e-8), rtol=1e-6, atol=0)


def test_float32_columns_of_tiles_are_normalised() -> None:
    """As the reference rounds them: a column of one number is exactly 1, so that networks of one channel agree exactly."""
    maps = drawn(2, 1, 37).float() * 1e30
    packed = columns.pack(maps, maps, 1e-8, grams=False)
    assert torch.equal(packed.columns[:, :37, :1].mT, maps.sign())
    assert not packed.columns[:, 37:].any()
    assert kdops.affinity_distance(maps, -maps, backend="triton").tolist() == [0.0, 0.0]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 2])
def test_more_than_2_to_the_31_elements(p: int) -> None:
    """64-bit offsets: the one sample whose networks differ begins beyond 2^31 elements."""
    batch, channels, positions = 2**13 + 1, 256, 2**10 + 64  # by Grams for p=2
    student = torch.ones(batch, channels, 1, dtype=torch.bfloat16, device=DEVICE).repeat(1, 1, positions)
    teacher = student.clone()
    student[-1, : channels // 2, -1] = -1.0  # orthogonal to all other columns
    student.requires_grad_()
    out = kdops.affinity_distance(student, teacher, p=p, statistic="sum", backend="triton")
    assert out[:-1].abs().max() < 1e-3
    torch.testing.assert_close(out[-1].item(), 2.0 * (positions - 1), rtol=1e-2, atol=0)
    (gradient,) = torch.autograd.grad(out.sum(), student)
    assert gradient[:-1].abs().amax() < 1e-3 * gradient[-1].abs().amax()
