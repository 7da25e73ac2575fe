"""The cross-entropy over a codebook against loops over single positions, and what only it promises."""

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
from torch.nn.functional import cross_entropy

import kdops
import kdops.nn
from tests.contract import RecordOps

BACKENDS = [b for b, said in kdops.explain("codebook_cross_entropy", torch.zeros(1, 1)).items() if said[:3] == "yes"]
EXACT = [b for b in BACKENDS if b != "triton"]  # those that take float64
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_exact = pytest.mark.parametrize("backend", EXACT)
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the CPU kernels")
SPACE = st.lists(st.integers(1, 5), max_size=3)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(shape: tuple[int, ...], codes: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (shape, shape, (codes, shape[1]))
    return [drawn(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate(shapes)]


def by_loops(student: Tensor, teacher: Tensor, codebook: Tensor, temperature: float) -> list[float]:
    """The definition with its squared distances, in Python's own arithmetic, one position at a time."""

    def softmax(position: list[float]) -> list[float]:
        distances = [sum((x - y) ** 2 for x, y in zip(position, code, strict=True)) for code in codebook.tolist()]
        weights = [math.exp((min(distances) - d) / temperature) for d in distances]
        return [w / sum(weights) for w in weights]

    pairs = zip(*(t.movedim(1, -1).flatten(0, -2).tolist() for t in (student, teacher)), strict=True)
    return [-sum(q * math.log(p) for p, q in zip(*map(softmax, pair), strict=True)) for pair in pairs]


@every_exact
@given(
    b=st.integers(1, 3),
    d=st.integers(1, 6),
    s=SPACE,
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.5, 1.0, 9.0]),
)
def test_is_its_definition(backend: str, b: int, d: int, s: list[int], k: int, temperature: float) -> None:
    tensors = [t.detach() for t in inputs((b, d, *s), k)]
    loss = kdops.codebook_cross_entropy(*tensors, temperature=temperature, reduction="none", backend=backend)
    assert loss.shape == (b, *s)
    exact = torch.tensor(by_loops(*tensors, temperature), dtype=torch.float64)
    torch.testing.assert_close(loss.flatten(), exact, rtol=1e-11, atol=1e-12)


@every_exact
def test_is_the_published_formula(backend: str) -> None:
    """DCKD's code: the distances as it forms them, shifted by their maximum; the paper's cross-entropy between the softmaxes."""
    student, teacher, codebook = inputs((50, 8), 30)

    def logits(z: Tensor) -> Tensor:
        d = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.t()
        return d.amax(1, keepdim=True) - d

    published = cross_entropy(logits(student), logits(teacher).softmax(1))
    torch.testing.assert_close(kdops.codebook_cross_entropy(student, teacher, codebook, backend=backend), published)


def with_gradients(tensors: list[Tensor], backend: str, **options) -> list[Tensor]:
    """The loss of each position, and the gradients of all that require one, for an upstream gradient that differs by position."""
    loss = kdops.codebook_cross_entropy(*tensors, **options, reduction="none", backend=backend)
    wanted = [t for t in tensors if t.requires_grad]
    return [loss, *torch.autograd.grad(loss, wanted, drawn(*loss.shape, seed=9).to(loss))]


def check(tensors: list[Tensor], backend: str, **options) -> None:
    """As exact as eager torch in the same dtype, by the largest error of each result."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    floor = 8 * torch.finfo(tensors[0].dtype).eps
    results = (with_gradients(tensors, b, **options) for b in (backend, "reference"))
    truth = with_gradients(wide, "reference", **options)
    largest = max(float(g.abs().max()) for g in truth[1:])
    for i, (mine, eager, exact) in enumerate(zip(*results, truth, strict=True)):
        errors = [float((t.double() - exact).detach().abs().max()) for t in (mine, eager)]
        scale = largest if i else float(exact.detach().abs().max())
        assert errors[0] <= 2 * errors[1] + floor * scale


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(
    m=st.integers(1, 130),
    d=st.integers(1, 70),
    k=st.integers(1, 300),
    maps=st.booleans(),
    temperature=st.sampled_from([1.0, 20.0]),
)
def test_any_size(dtype: torch.dtype, m: int, d: int, k: int, maps: bool, temperature: float) -> None:
    """Blocks, panels, chunks and their remainders; rows of two samples in one block."""
    check(inputs((2, d, m) if maps else (m, d), k, dtype), "cpu", temperature=temperature)


@needs_cpu
@pytest.mark.parametrize(("m", "k", "d"), [(29, 16384, 16), (49, 1024, 512), (3, 5000, 3)])
def test_many_codes_and_channels(m: int, k: int, d: int) -> None:
    check(inputs((m, d), k, torch.float32), "cpu", temperature=float(d))


@needs_cpu
def test_the_codebook_sums_over_groups_of_rows() -> None:
    """More rows than one group holds, each with its own upstream gradient."""
    check(inputs((3, 4, 700), 20, torch.float32), "cpu")


@every_backend
@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_large_features_cost_the_loss_no_digits(backend: str, temperature: float) -> None:
    """Logits in the thousands and millions, exact in float32: softmaxes are ones and zeros, and the loss is a difference of logits."""
    codebook = torch.tensor([[64.0, 0.0], [0.0, 64.0], [64.0, 64.0], [-64.0, 32.0]])
    student = torch.tensor([[60.0, 1.0], [-8.0, 63.0], [33.0, 31.0]], requires_grad=True)
    teacher = torch.tensor([[64.0, 0.0], [1.0, 40.0], [-60.0, 32.0]], requires_grad=True)
    tensors = [student, teacher, codebook.requires_grad_()]
    mine = with_gradients(tensors, backend, temperature=temperature)
    exact = with_gradients(
        [t.detach().double().requires_grad_() for t in tensors], "reference", temperature=temperature
    )
    for got, truth in zip(mine, exact, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=1e-6 * float(truth.detach().abs().max()))


@every_backend
def test_a_student_like_its_teacher(backend: str) -> None:
    """The loss is the entropy of the softmax, and the student's gradient is 0."""
    features, _, codebook = inputs((60, 6), 40, torch.float32)
    loss = kdops.codebook_cross_entropy(features, features.detach(), codebook.detach(), backend=backend)
    (gradient,) = torch.autograd.grad(loss, features)
    logits = -torch.cdist(features.detach().double(), codebook.detach().double()).square()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    torch.testing.assert_close(loss.detach().double(), entropy, rtol=1e-5, atol=0)
    assert float(gradient.abs().max()) < 1e-7


@every_backend
def test_codes_are_translated_with_the_features(backend: str) -> None:
    """Only distances count."""
    student, teacher, codebook = (t.detach() for t in inputs((40, 5), 17, torch.float32))
    first, moved = (
        kdops.codebook_cross_entropy(student + c, teacher + c, codebook + c, backend=backend) for c in (0.0, 8.0)
    )
    torch.testing.assert_close(first, moved, rtol=1e-4, atol=0)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(backend: str, reduction: str) -> None:
    tensors = inputs((2, 3, 4, 5), 6, torch.float32)
    each = kdops.codebook_cross_entropy(*tensors, reduction="none", backend=backend)
    total = kdops.codebook_cross_entropy(*tensors, reduction=reduction, backend=backend)
    torch.testing.assert_close(total, getattr(each, reduction)())


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_only_the_student_costs_slopes(backend: str) -> None:
    """With a frozen teacher and codebook nothing is kept or returned for them; without gradients nothing at all."""
    student, teacher, codebook = inputs((9, 4), 7, torch.float32)
    with RecordOps() as ops:
        kdops.codebook_cross_entropy(student, teacher.detach(), codebook.detach(), backend=backend).backward()
        with torch.no_grad():
            kdops.codebook_cross_entropy(student, teacher, codebook, backend=backend)
    (_, _, kept), (_, _, gradients), (_, _, nothing) = ops.calls
    assert [t.numel() for t in kept[2:]] == [student.numel(), 0]
    assert [t.numel() for t in gradients] == [student.numel(), 0, 0]
    assert [t.numel() for t in nothing[2:]] == [0, 0]


MEASURE = """
import resource, sys, torch, kdops
m, k, d = map(int, sys.argv[1:])
def step(m):
    student, teacher, codebook = torch.randn(m, d, requires_grad=True), torch.randn(m, d), torch.randn(k, d)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kdops.codebook_cross_entropy(student, teacher, codebook, backend="cpu").backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
step(256)
print(step(m) // 1024)
"""


def peak_mib(positions: int, codes: int, channels: int) -> int:
    """MiB above its inputs that forward and backward take, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, *map(str, (positions, codes, channels))]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@needs_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="needs the peak memory of a process in KiB")
def test_memory_does_not_grow_with_positions_times_codes() -> None:
    """One M x K matrix takes 256 MiB; the gradient and the slopes 4 MiB each."""
    assert peak_mib(65536, 1024, 16) < 32


@pytest.mark.slow
@needs_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="needs the peak memory of a process in KiB")
def test_65536_positions_of_256_channels() -> None:
    """One M x K matrix takes 256 MiB; the gradient and the slopes are 64 MiB each."""
    assert peak_mib(65536, 1024, 256) < 160


@pytest.mark.slow
@needs_cpu
def test_more_than_2_to_the_31_elements() -> None:
    """64-bit offsets: the last of 2^23 positions of 260 channels, whose student alone chooses another code than its teacher."""
    positions, channels = 2**23, 260
    features = torch.zeros(1, channels, 1, dtype=torch.bfloat16).expand(1, channels, positions).contiguous()
    other = features[..., -4:].clone()
    other[0, -1, -1] = 8.0
    codebook = torch.zeros(2, channels, dtype=torch.bfloat16)
    codebook[1, -1] = 8.0
    student = features.clone()
    student[..., -4:] = other
    loss = kdops.codebook_cross_entropy(student, features, codebook, reduction="none", backend="cpu")
    assert loss[0, -1].item() == 64.0
    assert loss[0, -2].item() < 1e-20  # the entropy of a choice that is all but certain


def test_captured_without_gradients_it_says_so_when_it_is_trained() -> None:
    """The slopes of a network that needs no gradient are not kept, and an export keeps what was needed then."""
    tensors = inputs((2, 3, 4), 5)
    exported = torch.export.export(kdops.nn.CodebookCrossEntropy(), tuple(t.detach() for t in tensors)).module()
    student, teacher, codebook = (t.detach() for t in tensors)
    loss = exported(student.requires_grad_(), teacher, codebook)
    with pytest.raises(
        RuntimeError, match="student needs a gradient, but needed none where the op was called or captured"
    ):
        loss.backward()


def test_module_is_the_function() -> None:
    tensors = inputs((2, 3, 4), 5)
    module = kdops.nn.CodebookCrossEntropy(temperature=2.0, reduction="none")
    assert torch.equal(module(*tensors), kdops.codebook_cross_entropy(*tensors, temperature=2.0, reduction="none"))


@pytest.mark.parametrize(
    ("shapes", "options", "says"),
    [
        (((2, 3, 4), (2, 5, 4), (7, 3)), {}, r"student \(2, 3, 4\) float64, teacher \(2, 5, 4\) float64"),
        (((2, 3, 4), (2, 3, 4), (7, 4)), {}, r"the same, and \(K, D\)"),
        (((2, 3, 4), (2, 3, 4), (7, 3, 1)), {}, r"codebook \(7, 3, 1\)"),
        (((5,), (5,), (7, 5)), {}, "but they must be"),
        (((2, 3), (2, 3), (0, 3)), {}, "at least one code and one channel"),
        (((2, 0), (2, 0), (4, 0)), {}, "at least one code and one channel"),
        (((0, 3), (0, 3), (4, 3)), {}, "no positions, so it has no mean"),
        (
            ((2, 3), (2, 3), (4, 3)),
            {"temperature": 0.0},
            r"temperature is 0\.0, but it must be a finite number above 0",
        ),
        (((2, 3), (2, 3), (4, 3)), {"temperature": math.nan}, "temperature is nan"),
        (((2, 3), (2, 3), (4, 3)), {"reduction": "batch"}, "reduction is 'batch', but it must be one of"),
    ],
)
def test_errors_say_what_is_needed(shapes, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        kdops.codebook_cross_entropy(*(drawn(*shape) for shape in shapes), **options)
