"""tiles.py is exact where Triton's interpreter is not, and the kernels use nothing else."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from kdops import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)
KERNELS = sorted((Path(__file__).parents[1] / "kdops").glob("*/triton*.py"))


@triton.jit
def _copy(source, target, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tiles.store(target + i, tiles.load(source + i, i < n), i < n)


@triton.jit
def _multiply(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tiles.dot(tl.load(a + i), tl.load(b + i))
    tiles.store(out + i, product, i < N * N)


@triton.jit
def _fused(a, b, c, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tiles.store(out + i, tiles.fma(tl.load(a + i), b, tl.load(c + i)), i < N)


def copied(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` through tiles.load and tiles.store, written as `dtype`."""
    values = values.to(DEVICE)
    out = torch.full_like(values, 7, dtype=dtype)
    _copy[(triton.cdiv(len(values), 1024),)](values, out, len(values), 1024)
    return out.cpu()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy on float32 values beyond float16
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_store_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (20_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    halfway = (torch.arange(0x3F80, 0x4080, dtype=torch.int32) << 16) | 0x8000  # between two bfloat16, odd and even
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-30, 65520.0])
    values = torch.cat([bits.view(torch.float32), halfway.view(torch.float32), special])
    torch.testing.assert_close(copied(values, dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_survives_load_and_store(dtype: torch.dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(copied(values, torch.float32), values.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(copied(values, dtype), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_dot_is_the_matrix_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).to(DEVICE, dtype) for _ in range(2))
    out = torch.empty(32, 32, device=DEVICE)
    _multiply[(1,)](a, b, out, 32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_fma_does_not_round_the_product() -> None:
    """a * b + c = (1 + e)(1 + e) - (1 + 2 e) = e^2, of which a rounded product leaves nothing."""
    e = 2.0**-12
    a, c = torch.full((32,), 1 + e, device=DEVICE), torch.full((32,), -(1 + 2 * e), device=DEVICE)
    out = torch.empty_like(a)
    _fused[(1,)](a, 1 + e, c, out, 32)
    assert (out == e * e).all()


def forbidden(source: str) -> list[str]:
    """The calls in `source` that are wrong in the interpreter or not deterministic."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [f"{f.value.id}.{f.attr}" for f in calls if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)]
    return [name for name in names if name in ("tl.dot", "tl.fma", "tl.store") or name.startswith("tl.atomic")]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_kernels_use_tiles(path: Path) -> None:
    found = forbidden(path.read_text())
    assert not found, f"{path} calls {found}: use tiles.dot, tiles.fma and tiles.store, and no float atomics"


def test_the_ban_sees_what_it_bans() -> None:
    assert KERNELS
    assert forbidden("def f(p):\n    tl.store(p, tl.dot(1, tl.fma(1, 2, 3)))\n    tl.atomic_add(p, 1)") == [
        "tl.store",
        "tl.atomic_add",
        "tl.dot",
        "tl.fma",
    ]


@pytest.mark.parametrize("value", range(1, 40))
def test_round_numbers_are_those_of_triton(value: int) -> None:
    assert tiles.next_power_of_2(value) == triton.next_power_of_2(value)
    for by in (1, 3, 16, 64):
        assert tiles.cdiv(value, by) == triton.cdiv(value, by)


def test_each_device_is_asked_once_for_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        device, asked = 0, 0

        def get_current_device(self) -> int:
            return self.device

        def get_current_target(self) -> GPUTarget:
            self.asked += 1
            return GPUTarget("cuda", (90, 80)[self.device], 32)

    active = Driver()
    monkeypatch.setattr(tiles, "INTERPRETING", tl.constexpr(False))
    monkeypatch.setattr(tiles, "driver", SimpleNamespace(active=active))
    assert [tiles.architecture(), tiles.architecture()] == ["cuda:90"] * 2
    active.device = 1
    assert [tiles.architecture(), tiles.architecture()] == ["cuda:80"] * 2
    assert active.asked == 2


@pytest.mark.parametrize(
    ("architecture", "early"),
    [("cuda:90", True), ("cuda:100", True), ("cuda:80", False), ("hip:gfx942", False), ("interpreter", False)],
)
def test_early_starts_only_where_there_are_some(
    architecture: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that a backend does not know is an error there."""
    monkeypatch.setattr(tiles, "architecture", lambda: architecture)
    assert tiles.early() == ({"EARLY": True, "launch_pdl": True} if early else {"EARLY": False})


def test_kernels_that_start_early_wait_first() -> None:
    """What stood before the wait would read what the launch before is still writing."""
    functions = [
        node for path in KERNELS for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    early = [f for f in functions if "EARLY" in [argument.arg for argument in f.args.args]]
    assert early
    for kernel in early:
        body = kernel.body[1:] if ast.get_docstring(kernel) else kernel.body
        assert ast.unparse(body[0]) == "tiles.start(EARLY)", kernel.name


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [("cuda:80", "tf32x3"), ("cuda:100", "tf32x3"), ("hip:gfx942", "ieee"), ("interpreter", "ieee")],
)
def test_float32_is_multiplied_as_float32(architecture: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain "tf32" would keep 11 bits, and "tf32x3" is an error elsewhere."""
    monkeypatch.setattr(tiles, "architecture", lambda: architecture)
    assert tiles.precision() == precision


@pytest.mark.parametrize("resident", [0, 1, 8])
def test_chunks_are_neither_none_nor_longer_than_rounding_allows(resident: int) -> None:
    """Many programs want no chunks of their own; a long sum is cut all the same, and a short one not below SHORTEST_CHUNK."""
    cpu = torch.device("cpu")
    for positions in (1, 255, 256, 4096, 4097, 10**6):
        for programs in (1, 7, 10**6):
            count = tiles.chunks(positions, programs, cpu, resident)
            assert count >= 1
            assert positions <= count * 4096
            assert count == 1 or positions > (count - 1) * 256
    assert tiles.chunks(10**4, 1, cpu, resident) >= tiles.chunks(10**4, 10**6, cpu, resident) == 3
    assert tiles.chunks(10**4, 1, cpu, 8) > 3


def test_parts_hold_every_channel_in_sides_that_a_product_takes() -> None:
    """The interpreter would take sides below 16, a GPU does not."""
    for channels in range(1, 600):
        first, second = tiles.parts(channels)
        assert first + second >= channels
        assert all(side >= 16 and side & (side - 1) == 0 for side in (first, second) if side)
        assert second < first
    assert (tiles.parts(180), tiles.parts(64), tiles.parts(3)) == ((128, 64), (64, 0), (16, 0))
