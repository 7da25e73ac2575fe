"""Runs the CUDA kernels, compiled for the CPU, and holds them against the reference in float64: `python checks.py`, in a package built by
tests/test_cuda_on_cpu.py. Prints one JSON object: of each case, the largest error of a result or gradient over its largest number, less
twice that of eager torch in the dtype of the inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import kdops
from tests.contract import relative_error

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def results(function: Function, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """Results and the gradients that are wanted; the upstream gradients are the same at every call."""
    given = [t.detach().requires_grad_(need) for t, need in zip(inputs, wanted, strict=True)]
    out = function(*given)
    outs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outs]
    torch.autograd.backward(outs, upstream)
    return [*(o.detach() for o in outs), *(t.grad for t in given if t.grad is not None)]


def finite_error(got: Tensor, exact: Tensor) -> float:
    """The relative error of what is finite; what is not must be the same."""
    finite = exact.isfinite()
    torch.testing.assert_close(got.double()[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    return relative_error(got.double().where(finite, 0.0), exact.where(finite, 0.0))


def error(function: Function, inputs: Sequence[Tensor]) -> float:
    """The largest of all results and gradients, beyond twice that of eager torch."""
    wanted = [True] * len(inputs)
    mine = results(partial(function, backend="cpu"), inputs, wanted)
    eager = results(partial(function, backend="reference"), inputs, wanted)
    exact = results(partial(function, backend="reference"), [t.double() for t in inputs], wanted)
    found = zip(mine, eager, exact, strict=True)
    return max(finite_error(m, x) - 2 * finite_error(e, x) for m, e, x in found)


def contrast() -> dict[str, float]:
    found = {}
    draw = torch.randn
    for b, k, features in ((16, 20, 333), (9, 70, 200), (3, 5, 64), (1, 7, 130), (17, 1, 65), (20, 33, 77)):
        for p in (1, 2):
            distance = partial(kdops.pairwise_distance, p=p)
            found[f"pairwise {b} {k} {features} p={p}"] = error(distance, [draw(b, features), draw(k, features)])
    for dtype in (torch.bfloat16, torch.float16):
        pair = [draw(16, 512).to(dtype), draw(24, 512).to(dtype)]
        found[f"{dtype}"] = error(kdops.pairwise_distance, pair)
    found["rows that are not aligned, bfloat16"] = error(
        kdops.pairwise_distance, [draw(8, 77).bfloat16(), draw(9, 77).bfloat16()]
    )
    found["to itself"] = error(lambda x, backend: kdops.pairwise_distance(x, x, backend=backend), [draw(12, 300)])
    found["matched"] = error(kdops.matched_distance, [draw(3, 4, 5, 6), draw(3, 7, 4, 5, 6)])
    ties = [torch.randint(0, 3, (16, 300)).float(), torch.randint(0, 3, (24, 300)).float()]
    found["ties"] = error(kdops.pairwise_distance, ties)
    same = [torch.full((5, 300), 1.7), torch.full((70, 300), 1.7)]
    found["nothing but ties"] = error(kdops.pairwise_distance, same)  # exactly 0
    odd = [draw(9, 40), draw(12, 40)]
    odd[0][0, 3], odd[0][1, 4], odd[1][2, 4], odd[1][3, 5] = float("nan"), float("inf"), float("inf"), float("-inf")
    found["not finite"] = error(kdops.pairwise_distance, odd)
    found["same bits for one gradient"] = same_bits([draw(16, 90), draw(40, 90)])
    return found


def signs_on_tensor_cores() -> dict[str, float]:
    """Gradients of L1 distances of bfloat16 rows, for which tensor cores add up signs."""
    found = {}
    shapes = ((16, 64, 208), (5, 70, 64), (40, 7, 80), (20, 33, 96), (16, 16, 448), (9, 20, 136))
    for b, k, features in shapes:
        x, y = torch.randn(b, features).bfloat16(), torch.randn(k, features).bfloat16()
        found[f"signs {b} {k} {features}, bfloat16"] = error(kdops.pairwise_distance, [x, y])
    x, y = (torch.randint(0, 3, (n, 96)).bfloat16() for n in (16, 24))
    found["signs, ties, bfloat16"] = error(kdops.pairwise_distance, [x, y])
    same = [torch.full((n, 64), 1.7).bfloat16() for n in (5, 70)]
    found["signs, nothing but ties"] = error(kdops.pairwise_distance, same)
    odd = [torch.randn(n, 48).bfloat16() for n in (9, 12)]
    odd[0][0, 3], odd[0][1, 4], odd[1][2, 4], odd[1][3, 5] = float("nan"), float("inf"), float("inf"), float("-inf")
    found["signs, not finite, bfloat16"] = error(kdops.pairwise_distance, odd)
    matched = [torch.randn(3, 8, 2, 4).bfloat16(), torch.randn(3, 7, 8, 2, 4).bfloat16()]
    found["signs, matched, bfloat16"] = error(kdops.matched_distance, matched)
    pair = [torch.randn(n, 80).bfloat16() for n in (16, 40)]
    found["signs, same bits for one gradient"] = same_bits(pair)
    weights = torch.randn(16, 40)
    found["signs, weights"] = error_of_weights(*pair, weights)
    found["signs, weights of each row"] = max(
        error_of_weights(*pair, weights * torch.logspace(-36, 36, 40)),
        error_of_weights(*pair, weights * torch.logspace(36, -36, 16)[:, None]),
    )
    found["signs, weights of 0"] = error_of_weights(*pair, weights.index_fill(1, torch.arange(40), 0.0))
    weights[3, 5] = float("inf")
    of_x, of_y = torch.ops.kdops.pairwise_distance_backward(weights, *pair, 1, True, True)
    others = torch.cat([of_x[torch.arange(16) != 3], of_y[torch.arange(40) != 5]])
    spread = of_x[3].isfinite().any() | of_y[5].isfinite().any() | ~others.isfinite().all()
    found["signs, a weight that is not finite"] = float(spread)
    return found


def error_of_weights(x: Tensor, y: Tensor, weights: Tensor) -> float:
    """Of gradients for float32 weights, beyond their own rounding to bfloat16, over the largest weight of the row and the root of how
    many there are."""
    signs = torch.sign(x.double()[:, None] - y.double())
    exact = ((weights[..., None] * signs).sum(1), -(weights[..., None] * signs).sum(0))
    mine = torch.ops.kdops.pairwise_distance_backward(weights, x, y, 1, True, True)
    errors = []
    for axis, (m, e) in enumerate(zip(mine, exact, strict=True)):
        beyond = (m.double() - e).abs() - e.abs() * 2**-8
        largest = weights.double().abs().amax(1 - axis).clamp(min=1e-300)[:, None]
        errors.append(float((beyond / largest).max()) / weights.shape[1 - axis] ** 0.5)
    return max(errors)


def same_bits(pair: list[Tensor]) -> float:
    """0 if a gradient does not depend on whether the other one is wanted."""
    both, first, second = (
        results(partial(kdops.pairwise_distance, backend="cpu"), pair, wanted)
        for wanted in ((True, True), (True, False), (False, True))
    )
    return 0.0 if torch.equal(both[1], first[1]) and torch.equal(both[2], second[1]) else 1.0


def nss() -> dict[str, float]:
    found = {}
    for shape in ((2, 1, 70, 130), (1, 3, 33, 40), (1, 1, 5, 6)):
        for padding in ("zeros", "replicate"):
            # 31 pixels around each of 5 x 6, of which most are replicas: up to 2.5 times the bound, of the C++ for CPUs too.
            for window in (7, 3) if shape[-1] < 31 else (7, 3, 31):
                statistics = partial(kdops.mscn, window=window, sigma=window / 6, padding=padding)
                found[f"mscn {shape} {padding} {window}"] = error(statistics, [torch.rand(shape) * 255])
    image = torch.rand(2, 3, 40, 70).to(memory_format=torch.channels_last)
    found["mscn, channels last"] = error(kdops.mscn, [image])
    found["mscn, one pixel in two"] = error(kdops.mscn, [torch.rand(1, 1, 80, 140)[..., ::2, ::2]])
    found["mscn, one gradient"] = error(
        lambda x, backend: kdops.mscn(x, backend=backend)[0], [torch.rand(1, 1, 40, 66)]
    )
    found["mscn, the same gradient everywhere"] = error(
        lambda x, backend: kdops.mscn(x, backend=backend)[1].sum(), [torch.rand(1, 2, 40, 64)]
    )
    found["mscn, bfloat16"] = error(kdops.mscn, [torch.rand(1, 1, 40, 66).bfloat16()])
    return found


if __name__ == "__main__":
    assert Path(kdops.__file__).is_relative_to(Path.cwd()), "this is not the package that was built for the checks"
    torch.manual_seed(0)
    print(json.dumps(contrast() | signs_on_tensor_cores() | nss()))
