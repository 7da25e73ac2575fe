"""Which backend runs a call: the first one that can, with the reason why the others cannot.

An op registers itself once (`register(OpSpec(...))` in its `spec.py`). The public function then asks `choose()`, which looks at the device,
the dtype and at most a bound on a size, so that it can be traced by torch.compile without recompiling for new shapes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import checks

BACKENDS = ("cpu", "cuda", "triton", "reference")

# The order in which `auto` tries them. Triton on a CPU is its interpreter, made for tests: it runs only when asked for by name.
# On CUDA, Triton stays first until a recorded benchmark row shows CUDA C++ ahead: such an op says CUDA_FIRST.
PREFERENCE = {"cpu": ("cpu", "reference", "triton"), "cuda": ("triton", "cuda", "reference")}
CUDA_FIRST = PREFERENCE | {"cuda": ("cuda", "triton", "reference")}
ELSEWHERE = ("reference",)

REDUCED = (torch.float16, torch.bfloat16)
FLOATING = (torch.float32, torch.float64, *REDUCED)


def in_taps(tensors: Sequence[Tensor], taps: int | None) -> list[Any]:
    """The tensors in lists of `taps` each; as they are for None."""
    if taps is None:
        return list(tensors)
    return [list(tensors[i : i + taps]) for i in range(0, len(tensors), taps)]


@dataclass(frozen=True)
class Sample:
    """One input of the contract tests: shapes of the tensors (drawn from a normal distribution) and keyword arguments.

    Each tensor is a positional argument; with `taps`, every so many of them are a list, and each list is one.
    `not_differentiable` says why the definition has no true derivative here, against which gradcheck could hold it.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    taps: int | None = None
    not_differentiable: str | None = None

    def arguments(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The positional arguments that hold these tensors."""
        return in_taps(tensors, self.taps)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `run` takes what the public function passes on after validation. `supports` returns None when this backend can take
    these tensors, else the reason why not, as a phrase that ends the sentence "it cannot run because ...".
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[[Sequence[Tensor]], str | None]


@dataclass(frozen=True)
class OpSpec:
    """All that is known of one public function: its backends, what it costs, and how the contract tests it.

    `bytes`, `flops` and `scratch_bytes` take the positional tensors and keyword arguments of the public function and count one
    forward pass: bytes that must move through memory, floating-point operations that must be done, and what is allocated besides
    inputs and outputs. `backward=True` adds the backward pass. `raw_ops` names the registered operators behind the function.
    `no_double_backward` says why kernels do not offer it (None: they do), `no_gradient` why the results have no gradient at all.
    `autocast` is the dtype that the function runs in under torch.autocast: "float32" for distances (checks.for_distance), "autocast"
    for attention (checks.for_attention).
    A backend that nobody has written for this op is simply not among `backends`. `preference` is the order in which `auto` tries them
    on each kind of device: PREFERENCE or CUDA_FIRST.
    """

    name: str
    function: Callable[..., Any]
    backends: tuple[Backend, ...]
    samples: tuple[Sample, ...]
    bytes: Callable[..., int]
    flops: Callable[..., int]
    scratch_bytes: Callable[..., int]
    raw_ops: tuple[str, ...] = ()
    no_double_backward: str | None = None
    no_gradient: str | None = None
    autocast: Literal["float32", "autocast"] = "float32"
    preference: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PREFERENCE)

    def has(self, name: str) -> bool:
        """Whether there is a backend of this name."""
        return any(b.name == name for b in self.backends)

    def backend(self, name: str) -> Backend:
        """The backend called `name`; RuntimeError when this op has none of that name."""
        for candidate in self.backends:
            if candidate.name == name:
                return candidate
        have = ", ".join(b.name for b in self.backends)
        raise RuntimeError(f"{self.name} has no backend {name!r}: it has {have}. Pass one of them, or 'auto'.")


def size(*tensors: Tensor) -> int:
    """Bytes of the tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


SPECS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Make an op known to choose(), explain() and the contract tests."""
    SPECS[spec.name] = spec
    return spec


# --- selection -------------------------------------------------------------------------------------------------------------------


def _check_name(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where} is {name!r}, but there is no such backend: use one of auto, {', '.join(BACKENDS)}.")
    return name


_DEFAULT = _check_name(os.environ.get("KDOPS_BACKEND") or "auto", "The environment variable KDOPS_BACKEND")


class _Selection(threading.local):
    # A thread local and not a ContextVar: torch.compile(fullgraph=True) can trace the first but not the second,
    # and it guards on an attribute of the instance, not of the class.
    def __init__(self) -> None:
        self.name = _DEFAULT


_selection = _Selection()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every kdops call of this thread on one backend: `with kdops.backend("reference"): ...`.

    Args:
        name: "auto", "cpu", "cuda", "triton" or "reference".

    Raises:
        ValueError: no such backend. A backend that cannot run a call raises RuntimeError at that call.
    """
    previous = _selection.name
    _selection.name = _check_name(name, "kdops.backend(name)")
    try:
        yield
    finally:
        _selection.name = previous


def choose(name: str, tensors: Sequence[Tensor], requested: str = "auto") -> Backend:
    """The backend that runs this call of op `name`: the requested one, else that of the thread, else the first that can.

    Raises:
        ValueError: no such backend.
        RuntimeError: the op has no such backend, or it cannot run, with its reason.
    """
    spec = SPECS[name]
    requested = _check_name(requested, "backend")
    if requested == "auto":
        requested = _selection.name
    if requested != "auto":
        chosen = spec.backend(requested)
        reason = chosen.supports(tensors)
        if reason is not None:
            raise RuntimeError(
                f"{name}: backend {requested!r} was asked for, but it cannot run because {reason}. "
                "Pass backend='auto' to let kdops choose."
            )
        return chosen
    for candidate in spec.preference.get(tensors[0].device.type, ELSEWHERE):
        if spec.has(candidate) and (chosen := spec.backend(candidate)).supports(tensors) is None:
            return chosen
    raise RuntimeError(f"{name}: no backend can run, and the reference cannot because {supports_reference(tensors)}.")


def implementation(name: str, tensors: Sequence[Tensor], requested: str = "auto") -> Callable[..., Any]:
    """What public functions call: `run` of the backend that `choose` gives."""
    chosen = choose(name, tensors, requested)
    if chosen.name != "reference":
        _refuse_transforms(name, chosen.name, tensors)
    elif checks.autocasting(tensors[0]):
        return _as_given(chosen.run, tensors[0].device.type)
    return chosen.run


def _as_given(run: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`run` in the dtype of its inputs, which checks.for_* chose: autocast would convert again within the reference."""

    def call(*args: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return run(*args)

    return call


def _refuse_transforms(name: str, chosen: str, tensors: Sequence[Tensor]) -> None:
    # A registered op without a forward-mode formula would drop the tangent without a word.
    # Compiled code cannot look for tangents.
    if torch.autograd.forward_ad._current_level >= 0 and (torch.compiler.is_compiling() or checks.any_tangent(tensors)):
        raise NotImplementedError(
            f"{name}: backend {chosen!r} has no forward-mode derivative; pass backend='reference' for torch.func.jvp and dual tensors."
        )
    if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        raise NotImplementedError(
            f"{name}: backend {chosen!r} has no rules for torch.func (grad, jacrev, vmap ...); pass backend='reference', or use "
            "torch.autograd."
        )


def explain(name: str, *tensors: Any, **kwargs: Any) -> dict[str, str]:
    """What each backend of op `name` says to these tensors: "yes", or "no: " and the reason.

    Takes the arguments of the public function. The backend that `auto` would choose comes first and reads "yes (chosen)".

    Example:
        >>> kdops.explain("pairwise_distance", x, y)
        {'cpu': 'yes (chosen)', 'cuda': 'no: ...', 'triton': 'no: ...', 'reference': 'yes'}

    Raises:
        ValueError: no such op, or no tensor among the arguments.
    """
    if name not in SPECS:
        raise ValueError(f"There is no op {name!r}: use one of {', '.join(sorted(SPECS))}.")
    spec = SPECS[name]
    flat = [
        t for group in (*tensors, *kwargs.values()) for t in (group if isinstance(group, (list, tuple)) else [group])
    ]
    given = [t for t in flat if isinstance(t, Tensor)]
    if not given:
        raise ValueError(f"explain({name!r}, ...) was given no tensor: pass the arguments that {name} would get.")
    reasons = {b.name: b.supports(given) for b in spec.backends}
    try:
        chosen = choose(name, given).name
    except RuntimeError:
        chosen = ""
    order = sorted(reasons, key=lambda b: b != chosen)
    return {b: "yes" + " (chosen)" * (b == chosen) if reasons[b] is None else f"no: {reasons[b]}" for b in order}


# --- what can run at all ---------------------------------------------------------------------------------------------------------

_HERE = Path(__file__).parent


def _build_record() -> dict[str, Any]:
    """What setup.py wrote about the build: which extension it made or skipped, and why."""
    try:
        record: dict[str, Any] = json.loads((_HERE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


def _load_extension(stem: str, key: str) -> str | None:
    """Load a compiled extension; None when it is there, else the reason why it is not."""
    path = _HERE / f"{stem}.abi3.so"
    if not path.exists():
        why = (
            _build_record()
            .get(key, {})
            .get("reason", "it was not built (reinstall with `pip install -e .` and a C++ compiler)")
        )
        return f"the {key} extension is missing: {why}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the {key} extension {path.name} does not load: {error}"
    return None


MISSING_CPU = _load_extension("_C", "cpu")
MISSING_CUDA = _load_extension("_C_cuda", "cuda") if torch.version.cuda else "this torch is built without CUDA"
HAVE_TRITON = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _unsupported(tensors: Sequence[Tensor], device: str, dtypes: Sequence[torch.dtype]) -> str | None:
    for t in tensors:
        if t.layout != torch.strided:
            return f"a tensor has the layout {t.layout} and this backend needs dense ones: convert it with .to_dense()"
        if t.device.type != device:
            return f"a tensor is on {t.device} and this backend needs {device}"
        if t.is_floating_point() and t.dtype not in dtypes:
            return f"{t.dtype} is not among its dtypes ({', '.join(str(d).removeprefix('torch.') for d in dtypes)})"
    return None


def supports_cpu(tensors: Sequence[Tensor]) -> str | None:
    """The reason why C++ on the CPU cannot take these tensors."""
    return MISSING_CPU or _unsupported(tensors, "cpu", FLOATING)


def supports_cuda(tensors: Sequence[Tensor]) -> str | None:
    """The reason why CUDA C++ cannot take these tensors."""
    return MISSING_CUDA or _unsupported(tensors, "cuda", (torch.float32, *REDUCED))


def supports_triton(tensors: Sequence[Tensor]) -> str | None:
    """The reason why Triton cannot take these tensors."""
    if not HAVE_TRITON:
        return "triton is not installed (it comes with CUDA builds of torch; for tests on a CPU: pip install triton)"
    device = tensors[0].device.type
    if device == "cpu" and not TRITON_INTERPRETS:
        return "triton on a CPU needs TRITON_INTERPRET=1 in the environment before kdops is imported (for tests; slow)"
    return _unsupported(tensors, "cpu" if device == "cpu" else "cuda", (torch.float32, *REDUCED))


def supports_reference(tensors: Sequence[Tensor]) -> str | None:
    """Eager torch takes dense tensors of the dtypes that it can compute with, on any device."""
    return _unsupported(tensors, tensors[0].device.type, FLOATING)


def info() -> dict[str, Any]:
    """What this installation can do, and why not more: versions, each backend's state, the default backend, each op's backends."""
    yes = "available"
    triton = yes if HAVE_TRITON else "not available: triton is not installed"
    if HAVE_TRITON and not torch.cuda.is_available() and not TRITON_INTERPRETS:
        triton = "not available: no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
    slower = "; ops fall back to eager torch, which is slower and needs more memory" if MISSING_CPU else ""
    return {
        "torch": torch.__version__,
        "default_backend": _selection.name,
        "cpu": yes if MISSING_CPU is None else f"not available: {MISSING_CPU}{slower}",
        "cuda": yes if MISSING_CUDA is None else f"not available: {MISSING_CUDA}",
        "triton": triton,
        "reference": yes,
        "build": _build_record(),
        "ops": {name: [b.name for b in spec.backends] for name, spec in sorted(SPECS.items())},
    }
