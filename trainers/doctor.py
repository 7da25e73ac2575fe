"""What this machine has: versions, devices, the backends that run, extras that are missing."""

from __future__ import annotations

import importlib.util
import os

import torch

import kdops
from kdops.dispatch import SPECS
from trainers.run_folder import environment

EXTRAS = {
    "skimage": "the embedded photographs: pip install 'kdops[demo]'",
    "tensorboard": "TensorBoard logs: pip install 'kdops[tensorboard]'",
    "triton": "GPU kernels; it comes with CUDA builds of torch, and on a CPU only tests need it",
}


def report() -> str:
    """A text for people."""
    found = environment()
    lines = [f"python {found['python']}  {found['platform']}"]
    lines += [f"{name} {version or 'absent'}" for name, version in found["packages"].items()]
    lines += [f"cpu: {found['cpu']}, {os.cpu_count()} logical, torch uses {found['threads']} threads"]
    lines += [
        f"gpu: {', '.join(found['gpu']) or 'none that torch can use'} (torch built for CUDA {torch.version.cuda})"
    ]
    state = {key: value for key, value in kdops.info().items() if key != "ops"}
    lines += ["", "kdops:", *_indented(state), *_indented({"backend of each op here": _chosen()})]
    missing = [f"  {name}: {why}" for name, why in EXTRAS.items() if importlib.util.find_spec(name) is None]
    lines += ["", "missing extras:", *(missing or ["  none"])]
    return "\n".join(lines)


def _chosen() -> dict[str, str]:
    """The backend that each op runs on, for float32 tensors on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for name, spec in sorted(SPECS.items()):
        inputs = [torch.zeros(shape, device=device) for shape in spec.samples[0].shapes]
        found[name] = next(iter(kdops.explain(name, *inputs)))
    return found


def _indented(value: object, depth: int = 1) -> list[str]:
    """Nested mappings as indented lines."""
    if not isinstance(value, dict):
        return [f"{'  ' * depth}{value}"]
    lines = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            lines += [f"{'  ' * depth}{key}:", *_indented(inner, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{key}: {inner}")
    return lines
