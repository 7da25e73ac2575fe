"""The contract: what every op keeps, on every backend, for every sample. Clauses are numbered as in docs/contract.md."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from math import inf

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves, tree_map_only

import kdops
from tests.contract import DTYPES, GPU, Case, RecordOps, cases, largest, layouts, missing, relative_error

CASES = cases()
FIRST = [next(group) for _, group in itertools.groupby(CASES, key=lambda c: (c.spec.name, c.backend))]
KERNELS = [case for case in CASES if case.backend != "reference"]
GPU_KERNELS = [case for case in FIRST if case.device == "cuda"] or [None]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
first_sample = pytest.mark.parametrize("case", FIRST, ids=str)
every_gradient = pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=str)
first_gradient = pytest.mark.parametrize("case", [c for c in FIRST if c.differentiable], ids=str)


def supported(case: Case, dtype: torch.dtype) -> bool:
    return case.spec.backend(case.backend).supports(case.inputs(dtype)) is None


@pytest.mark.parametrize("sample_case", [c for c in CASES if c.backend == "reference"], ids=str)
def test_costs_are_stated(sample_case: Case) -> None:
    """Bytes, FLOPs and scratch of every sample: whole numbers, and backward costs more than forward alone."""
    spec, sample = sample_case.spec, sample_case.sample
    given = sample_case.inputs()
    for count in (spec.bytes, spec.flops, spec.scratch_bytes):
        forward, both = (count(*sample.arguments(given), **sample.kwargs, backward=b) for b in (False, True))
        assert isinstance(forward, int)
        assert 0 <= forward <= both
    if all(n for shape in sample.shapes for n in shape):
        assert spec.bytes(*sample.arguments(given), **sample.kwargs) >= kdops.dispatch.size(*given)


@pytest.mark.parametrize(("spec", "backend", "reason"), list(missing()), ids=lambda v: getattr(v, "name", v))
def test_backend_is_here(spec: kdops.dispatch.OpSpec, backend: str, reason: str) -> None:
    pytest.skip(f"{spec.name} on {backend}: {reason}")


# 1 ---------------------------------------------------------------------------------------------------------------------

# Beside twice the eager error, a kernel may be off by a few roundings of its result. In float64 the eager error cannot be
# measured, because the truth is eager too: there the floor stands for both.
FLOOR = {dtype: 4 * torch.finfo(dtype).eps for dtype in DTYPES} | {torch.float64: 1e-13}


def eager_and_exact(case: Case, given: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Every result and gradient by the reference, in the dtype of the inputs and in float64 with the same upstream gradients."""
    outs, grads = case.gradients(given, backend="reference")
    exact = [t.detach().double().requires_grad_() for t in given]
    exact_outs = case.call(*exact, backend="reference")
    upstream = [u.double() for u in case.upstream(outs)]
    exact_grads = torch.autograd.grad(exact_outs, exact, upstream) if case.differentiable else []
    return list(zip((*outs, *grads), (*exact_outs, *exact_grads), strict=True))


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_01_matches_float64(case: Case, dtype: torch.dtype, poisoned_memory: None) -> None:
    if not supported(case, dtype):
        with pytest.raises(RuntimeError, match="cannot run because"):
            case.call(*case.inputs(dtype))
        return
    given = case.inputs(dtype)
    outs, grads = case.gradients(given)
    factor = 4 if dtype == torch.bfloat16 and case.backend == "triton" and not GPU else 2
    found = eager_and_exact(case, given)
    # A gradient that is zero is measured by the largest of the others.
    scale = largest([truth for _, truth in found[len(outs) :]])
    for mine, (eager, truth) in zip((*outs, *grads), found, strict=True):
        assert mine.shape == truth.shape
        assert mine.dtype == (dtype if truth.is_floating_point() else truth.dtype)
        assert relative_error(mine, truth, scale) <= factor * relative_error(eager, truth, scale) + FLOOR[dtype]


# 2 ---------------------------------------------------------------------------------------------------------------------


@every_gradient
def test_02_gradcheck(case: Case) -> None:
    if case.sample.not_differentiable:
        pytest.skip(case.sample.not_differentiable)
    if not supported(case, torch.float64):
        assert case.backend in ("cuda", "triton"), "the reference and the CPU must take float64"
        return
    assert torch.autograd.gradcheck(case.call, case.inputs(torch.float64), fast_mode=True)


@first_gradient
def test_02_double_backward(case: Case) -> None:
    if case.backend != "reference" and case.spec.no_double_backward is not None:
        with pytest.raises(NotImplementedError, match="no double backward"):
            case.second_gradients()
    elif supported(case, torch.float64):
        assert torch.autograd.gradgradcheck(case.call, case.inputs(torch.float64), fast_mode=True)
    else:
        torch.testing.assert_close(case.second_gradients(), case.second_gradients(backend="reference"))


@first_sample
def test_02_no_gradient_is_stated(case: Case) -> None:
    assert all(out.requires_grad == case.differentiable for out in case.call(*case.inputs()))


@first_gradient
def test_02_forward_mode(case: Case) -> None:
    given = case.inputs(requires_grad=False)
    tangents = [torch.ones_like(t) for t in given]
    if case.backend == "reference":
        _, of_outs = torch.func.jvp(lambda *t: case.call(*t), tuple(given), tuple(tangents))
        assert all(tangent.isfinite().all() for tangent in of_outs)
        return
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda *t: case.call(*t), tuple(given), tuple(tangents))
    out = case.call(*case.inputs())[0]
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        out.backward(torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


@first_gradient
def test_02_batched_gradients(case: Case) -> None:
    """`is_grads_batched`, by which torch makes Jacobians: the same as one gradient after the other."""
    given = case.inputs()
    out = case.call(*given)[0]
    batch = torch.stack([torch.ones_like(out), torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)])
    together = torch.autograd.grad(out, given, batch, retain_graph=True, is_grads_batched=True, allow_unused=True)
    alone = [torch.autograd.grad(out, given, g, retain_graph=True, allow_unused=True) for g in batch]
    for mine, each in zip(together, zip(*alone, strict=True), strict=True):
        assert relative_error(mine, torch.stack(each)) <= 1e-5


# 3 ---------------------------------------------------------------------------------------------------------------------


def recorded(case: Case, tensors: list[Tensor]) -> list[tuple]:
    """The raw operators that forward and backward ran, with their arguments."""
    with RecordOps() as ops:
        case.gradients(tensors)
    return ops.calls


def fresh(args: tuple, requires_grad: bool) -> tuple:
    """Copies of the tensors among the arguments, and in lists among them."""
    return tree_map_only(Tensor, lambda a: a.detach().clone().requires_grad_(requires_grad), args)


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_03_opcheck(case: Case) -> None:
    calls = recorded(case, case.inputs())
    assert calls, "no kdops operator ran"
    assert {op.name().removeprefix("kdops::").removesuffix("_triton") for op, *_ in calls} <= set(case.spec.raw_ops)
    for op, args, _ in calls:
        once = op.name().removesuffix("_triton").endswith("_backward") and case.spec.no_double_backward is not None
        torch.library.opcheck(op, fresh(args, requires_grad=not once))


@pytest.mark.parametrize("case", [c for c in FIRST if c.backend != "reference"], ids=str)
def test_03_opcheck_of_other_strides(case: Case) -> None:
    for name in layouts(case.inputs()[0]):
        moved = [layouts(t.detach()).get(name, t.detach()).requires_grad_() for t in case.inputs()]
        calls = recorded(case, moved)
        for op, args, _ in calls:
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


# 4 ---------------------------------------------------------------------------------------------------------------------


def most_compilations(case: Case) -> int:
    """One; two for kernels whose operator takes a float, which torch first traces as a symbol and then fixes, starting over once.

    Torch 2.11 does the same for floats that plain torch code works with.
    """
    if case.backend == "reference":
        return 2 if torch.__version__.startswith("2.11.") else 1
    schemas = [getattr(torch.ops.kdops, name).default._schema for name in case.spec.raw_ops]
    return 1 + any("float" in str(argument.type) for schema in schemas for argument in schema.arguments)


@every_case
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_04_compiles_to_one_graph(case: Case, dynamic: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.call, fullgraph=True, dynamic=dynamic, backend=counter)
    given = case.inputs()
    outs, grads = case.gradients(given)
    compiled_outs = compiled(*given)
    compiled_grads = case.backward(compiled_outs, given)
    for mine, eager in zip((*compiled_outs, *compiled_grads), (*outs, *grads), strict=True):
        torch.testing.assert_close(mine, eager)
    compiled(*given)
    assert 1 <= counter.frame_count <= most_compilations(case)


@first_sample
def test_04_other_shapes_do_not_recompile(case: Case) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.call, fullgraph=True, dynamic=True, backend=counter)
    for scale in (2, 3, 4):
        larger = [torch.cat([t] * scale, dim=-1).detach().requires_grad_() for t in case.inputs()]
        torch.testing.assert_close(compiled(*larger), case.call(*larger))
    assert 1 <= counter.frame_count <= most_compilations(case)


@first_sample
def test_04_backend_context_compiles(case: Case) -> None:
    torch._dynamo.reset()

    def forced(*tensors: Tensor) -> Tensor:
        with kdops.backend(case.backend):
            return case.call(*tensors, backend="auto")

    given = case.inputs()
    torch.testing.assert_close(torch.compile(forced, fullgraph=True, backend="aot_eager")(*given), case.call(*given))


@pytest.mark.slow
@first_sample
def test_04_inductor(case: Case) -> None:
    torch._dynamo.reset()
    given = case.inputs()
    outs, grads = case.gradients(given)
    compiled_outs = torch.compile(case.call, fullgraph=True)(*given)
    compiled_grads = case.backward(compiled_outs, given)
    for mine, eager in zip((*compiled_outs, *compiled_grads), (*outs, *grads), strict=True):
        torch.testing.assert_close(mine, eager)


# 5 ---------------------------------------------------------------------------------------------------------------------


@first_sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_05_autocast_runs_in_the_stated_dtype(case: Case, dtype: torch.dtype) -> None:
    stated = {"float32": torch.float32, "autocast": torch.bfloat16}[case.spec.autocast]
    given = case.inputs(dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    mixed = [given[0].detach().to(other), *given[1:]]  # a teacher outside autocast beside a student under it
    with torch.autocast(case.device, dtype=torch.bfloat16):
        outs, of_mixed = case.call(*given), case.call(*mixed)
    assert {out.dtype for out in (*outs, *of_mixed) if out.is_floating_point()} == {stated}
    for results, tensors in ((outs, given), (of_mixed, mixed)):
        expected = case.call(*(t.detach().to(stated) for t in tensors))
        torch.testing.assert_close(results, expected, rtol=0, atol=0)
    assert [grad.dtype for grad in case.backward(outs, given)] == [dtype] * len(given) * case.differentiable


# 6, 7 ------------------------------------------------------------------------------------------------------------------


@first_gradient
def test_06_every_subset_of_gradients(case: Case) -> None:
    everything = dict(enumerate(case.gradients(case.inputs())[1]))
    for subset in itertools.product([False, True], repeat=len(everything)):
        given = [t.detach().requires_grad_(wanted) for t, wanted in zip(case.inputs(), subset, strict=True)]
        outs = case.call(*given)
        assert all(out.requires_grad == any(subset) for out in outs)
        if not any(subset):
            continue
        torch.autograd.backward(outs, case.upstream(outs))
        for i, (t, wanted) in enumerate(zip(given, subset, strict=True)):
            if wanted:
                torch.testing.assert_close(t.grad, everything[i], rtol=0, atol=0)
            else:
                assert t.grad is None


# With a single input there is none that nobody wants; beneath, an operator may see others (the halves of an image).
@pytest.mark.parametrize("case", [c for c in FIRST if c.backend != "reference" and len(c.sample.shapes) > 1], ids=str)
def test_06_unwanted_gradients_are_not_computed(case: Case) -> None:
    """The backward operator returns as many elements as there are inputs that ask for a gradient."""
    given = [t.detach().requires_grad_(i == 0) for i, t in enumerate(case.inputs())]
    for op, args, out in recorded(case, given):
        if op.name().removesuffix("_triton").endswith("_backward"):
            tensors = [a for a in tree_leaves(args[1:]) if isinstance(a, Tensor)]
            wanted = [a.numel() for a in tensors if a.data_ptr() == given[0].data_ptr()]
            assert sum(g.numel() for g in tree_leaves(out)) == sum(wanted)


@every_gradient
def test_07_backward_twice(case: Case) -> None:
    given = case.inputs()
    outs = case.call(*given)
    first = case.backward(outs, given, seed=1, retain_graph=True)
    second = case.backward(outs, given, seed=2)
    for seed, grads in ((1, first), (2, second)):
        for mine, fresh in zip(grads, case.gradients(case.inputs(), seed=seed)[1], strict=True):
            torch.testing.assert_close(mine, fresh, rtol=0, atol=0)


# 8, 9 ------------------------------------------------------------------------------------------------------------------


def memory_order(t: Tensor) -> list[tuple[int, int]]:
    """Size and stride of the axes whose stride means something."""
    return [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


@every_case
def test_08_any_strides(case: Case) -> None:
    given = case.inputs()
    outs, grads = case.gradients(given)
    # A layout may change the order of sums, and with it what clause 1 allows of rounding.
    rounding = [
        2 * relative_error(eager, exact) + FLOOR[torch.float32] for eager, exact in eager_and_exact(case, given)
    ]
    allowed = [max(1e-5, error * largest([t])) for error, t in zip(rounding, (*outs, *grads), strict=True)]
    for name in layouts(given[0].detach()):
        moved = [layouts(t.detach()).get(name, t.detach()).requires_grad_() for t in given]
        for some in (
            [True] * len(given),
            [i == 0 for i in range(len(given))],
        ):  # all moved, and one layout beside another
            mixed = [m if take else t for m, t, take in zip(moved, given, some, strict=True)]
            moved_outs, moved_grads = case.gradients(mixed)
            assert all(out.is_contiguous() for out in moved_outs)
            for mine, usual, atol in zip((*moved_outs, *moved_grads), (*outs, *grads), allowed, strict=True):
                torch.testing.assert_close(mine, usual, rtol=1.3e-6, atol=atol)
            for mine, t in zip(moved_grads, mixed, strict=case.differentiable):
                if case.backend != "reference":  # eager torch lets its own operators choose
                    assert memory_order(mine) == memory_order(torch.empty_like(t)), name


@every_case
def test_08_expanded(case: Case) -> None:
    """Overlapping memory (a stride of 0) reads as the values it stands for; its gradient is contiguous."""
    rows = [t.detach()[..., :1].expand(t.shape).requires_grad_() for t in case.inputs()]
    copies = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in rows]
    outs, grads = case.gradients(rows)
    torch.testing.assert_close((outs, grads), case.gradients(copies))
    assert case.backend == "reference" or all(grad.is_contiguous() for grad in grads)


@first_sample
def test_09_samples_hold_the_awkward_sizes(case: Case) -> None:
    """Every clause above runs on size 1, on primes and, where the definition allows it, on an empty batch."""
    sizes = {n for sample in case.spec.samples for shape in sample.shapes for n in shape}
    assert {0, 1} <= sizes
    assert any(n > 10 and all(n % d for d in range(2, n)) for n in sizes)


# 10 --------------------------------------------------------------------------------------------------------------------

# More than 2^31 elements in the first tensor at least, and what is computed of the last rows alone: the same, wherever they lie.
LARGE = {
    "affinity_distance": ((8200, 64, 4096), (8200, 16, 4096)),
    "channel_attention": ((33, 64, 1024, 1024),) * 3,
    "channel_attention_distance": ((33, 64, 1024, 1024),) * 4,
    "codebook_cross_entropy": ((33, 64, 1024, 1024), (33, 64, 1024, 1024), (64, 64)),
    "contrastive_ratio": ((3, 2**30 - 7), (3, 2**30 - 7), (2, 2**30 - 7)),
    "gaussian_distance": ((3, 2**30 - 7), (3, 2**30 - 7)),
    "matched_distance": ((3, 2**29 + 5), (3, 2, 2**29 + 5)),
    "mscn": ((2049, 1, 1024, 1025),),
    "pairwise_distance": ((3, 2**30 - 7), (2, 2**30 - 7)),
    "spatial_attention": ((8200, 64, 4096),) * 3,
}
SHARED = {
    "codebook_cross_entropy": 2,
    "contrastive_ratio": 2,
    "pairwise_distance": 1,
}  # this argument has no rows of its own


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in GPU_KERNELS if c is None or c.spec.name in LARGE], ids=str)
def test_10_more_than_two_billion_elements(case: Case) -> None:
    name, taken = case.spec.name, SHARED.get(case.spec.name)
    generator = torch.Generator("cuda").manual_seed(0)
    given = [
        torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator) for shape in LARGE[name]
    ]
    last = [t if i == taken else t[-1:].clone() for i, t in enumerate(given)]
    results = []
    for tensors in (given, last):
        trained = tensors[0].requires_grad_()
        options = (
            {"reduction": "none"}
            if name in ("codebook_cross_entropy", "contrastive_ratio", "gaussian_distance")
            else {}
        )
        outs = case.spec.function(*tensors, **options, backend=case.backend)
        outs = (outs,) if isinstance(outs, Tensor) else outs
        (grad,) = torch.autograd.grad([out.float().sum() for out in outs], [trained])
        results.append([*(out.detach()[-1:].clone() for out in outs), grad[-1:].clone()])
        del outs, grad
    for whole, alone in zip(*results, strict=True):
        torch.testing.assert_close(
            whole.float(), alone.float(), rtol=1e-2, atol=1e-2 * float(alone.float().abs().max())
        )


# 11 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KERNELS, ids=str)  # eager torch makes no such promise
def test_11_same_bits_for_any_number_of_threads(case: Case) -> None:
    threads = torch.get_num_threads()
    interpreted = case.backend == "triton" and not GPU  # slow, and in one thread whatever torch uses: two runs say all
    try:
        runs = []
        for n in (1, 2) if interpreted else (1, 2, 3, 2):
            torch.set_num_threads(n)
            outs, grads = case.gradients(case.inputs())
            runs.append((*outs, *grads))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        for mine, first in zip(other, runs[0], strict=True):
            assert torch.equal(mine, first)


# 12, 13 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_KERNELS, ids=str)
def test_12_no_host_synchronisation(case: Case) -> None:
    given = case.inputs()
    case.gradients(given)  # compiles, which may synchronise
    upstream = case.upstream(case.call(*given))
    torch.cuda.set_sync_debug_mode("error")
    try:
        outs = case.call(*given)
        if case.differentiable:
            torch.autograd.grad(outs, given, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_KERNELS, ids=str)
def test_13_cuda_graph(case: Case) -> None:
    given = case.inputs()
    outs, grads = case.gradients(given)
    upstream = case.upstream(outs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.call(*given)
        captured_grads = torch.autograd.grad(captured, given, upstream) if case.differentiable else []
    graph.replay()
    for mine, eager in zip((*captured, *captured_grads), (*outs, *grads), strict=True):
        assert torch.equal(mine, eager)


# 14 --------------------------------------------------------------------------------------------------------------------

CONSTANTS = {"constant": 3.0, "large constant": 3e3}
EXTREMES = {
    "tiny": lambda t: t * 1e-30,
    "huge": lambda t: t * 1e30,
    **{name: partial(torch.full_like, fill_value=value) for name, value in CONSTANTS.items()},
    "nan": lambda t: t.index_fill(-1, torch.tensor([0], device=t.device), float("nan")),
    "inf": lambda t: t.index_fill(-1, torch.tensor([0], device=t.device), float("inf")),
}


def eager_errors(found: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Of each result and gradient of `eager_and_exact`, the largest error where both are finite."""
    finite = ((e.double() - x.double())[e.isfinite() & x.isfinite()].abs() for e, x in found)
    return [float(error.amax()) if error.numel() else 0.0 for error in finite]


@every_case
@pytest.mark.parametrize("extreme", EXTREMES)
def test_14_extreme_values_behave_as_in_the_reference(case: Case, extreme: str) -> None:
    given = [EXTREMES[extreme](t).detach().requires_grad_() for t in case.inputs()]
    outs, grads = case.gradients(given)
    found = eager_and_exact(case, given)
    # What is zero but for rounding (a squared distance of equal maps, a softmax over constant values) is measured by eager's
    # own error and, as eager may happen to be exact, by that at constants near this one and by what cancels: the square of one rounding
    # of the constant, and 16 roundings of the largest gradient, for constant maps the largest of each input where maps of that size vary
    # (15 were seen).
    eps = torch.finfo(torch.float32).eps
    errors = eager_errors(found)
    if extreme in CONSTANTS:
        value = CONSTANTS[extreme]
        for near in (0.9, 0.95, 1.05, 1.1):
            beside = eager_and_exact(case, [(near * t.detach()).requires_grad_() for t in given])
            errors = [*map(max, errors, eager_errors(beside))]
        varied = case.gradients([(value * t.detach()).requires_grad_() for t in case.inputs()], backend="reference")[1]
        of_gradients = [16 * eps * (largest([grad]) or largest(varied)) for grad in varied]
        if extreme == "large constant":  # of what cancels roundings are left, as large as it was: it must be finite
            exact = [x for _, x in found[len(outs) :]]
            of_gradients = [
                floor if largest([x]) >= 1e-6 else inf for floor, x in zip(of_gradients, exact, strict=True)
            ]
        floors = [(value * eps) ** 2] * len(outs) + of_gradients
    else:
        floors = [0.0] * len(outs) + [16 * eps * largest([e for e, _ in found[len(outs) :]])] * len(grads)
    for mine, (eager, _), error, floor in zip((*outs, *grads), found, errors, floors, strict=True):
        torch.testing.assert_close(mine, eager, equal_nan=True, rtol=1e-4, atol=max(1e-30, 3 * error, floor))


# 15 --------------------------------------------------------------------------------------------------------------------


@first_sample
def test_15_bad_input_is_said(case: Case) -> None:
    given = case.inputs()
    for place, t in enumerate(given):
        before, after = given[:place], given[place + 1 :]
        with pytest.raises(TypeError, match="floating point"):
            case.call(*before, t.detach().int(), *after)
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
            case.call(*before, t.tolist(), *after)  # type: ignore[arg-type]  # the wrong type is the test
        if len(given) > 1:
            with pytest.raises(TypeError, match="one dtype"):
                case.call(*before, t.double(), *after)
            with pytest.raises(ValueError, match="one device"):
                case.call(*before, t.to("meta"), *after)
    with pytest.raises(ValueError, match="but they must be"):
        case.call(given[0].flatten(), *given[1:])
    with pytest.raises(ValueError, match="no such backend"):
        case.call(*given, backend="gpu")
