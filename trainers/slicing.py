"""A student that starts as a slice of its teacher: the first channels, and evenly spaced blocks. It goes with any method."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from trainers import networks
from trainers.config import Config
from trainers.errors import InputError
from trainers.fields import TEACHER


def build_student(config: Config) -> nn.Module:
    """The student of a config: freshly initialised, with its weights, or with a slice of its teacher's (`weights: teacher`).

    Raises:
        InputError: weights that cannot be read or do not fit, or a teacher of another topology.
    """
    if config.student.weights != TEACHER:
        return networks.build_network(config.student, "student")
    if config.teacher is None:
        raise InputError("student.weights: a slice of a teacher needs one: give teacher")
    student = networks.build_network(config.student.model_copy(update={"weights": None}), "student")
    teacher = networks.build_network(config.teacher, "teacher")
    student.load_state_dict(sliced(teacher.state_dict(), student.state_dict()))
    return student


def sliced(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first entries of the teacher's tensors along every axis, as many as the student's have.

    Where a list of blocks is shorter in the student, its block i of n is the teacher's block round(i (m - 1) / (n - 1)) of m: the first
    is the first, the last is the last. (CSD's student is the first quarter of the channels; blocks evenly spaced are our reading.)

    Raises:
        InputError: the student has a tensor that no slice of the teacher fits.
    """
    counts = {name: (_children(teacher, name), _children(student, name)) for name in _lists(student)}
    found, misfits = {}, []
    for key, like in student.items():
        source = teacher.get(_source(key, counts))
        if (
            source is None
            or source.ndim != like.ndim
            or any(has < needs for has, needs in zip(source.shape, like.shape, strict=True))
        ):
            misfits.append(key)
        else:
            found[key] = source[tuple(slice(size) for size in like.shape)].clone()
    if misfits:
        raise InputError(
            f"student.weights: teacher: {len(misfits)} of the student's tensors are no slice of the teacher's ({', '.join(misfits[:3])}): "
            "both must have the same topology, and the teacher at least as many channels and blocks"
        )
    return found


def _lists(names: Mapping[str, Tensor]) -> set[str]:
    """The prefixes that are followed by a number."""
    found = set()
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:place]) for place, part in enumerate(parts) if part.isdigit()}
    return found


def _children(names: Mapping[str, Tensor], prefix: str) -> int:
    """How long the list at a prefix is: layers without weights count, so it is the highest number and one."""
    depth = prefix.count(".") + 1 if prefix else 0
    start = f"{prefix}." if prefix else ""
    numbers = [part for name in names if name.startswith(start) and (part := name.split(".")[depth]).isdigit()]
    return max(map(int, numbers), default=-1) + 1


def _source(key: str, counts: Mapping[str, tuple[int, int]]) -> str:
    """The teacher's key for one of the student's. Lists are counted where the student has them."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        theirs, ours = counts.get(".".join(key.split(".")[:place]), (0, 0))
        if part.isdigit() and theirs > ours > 1:
            parts[place] = str(round(int(part) * (theirs - 1) / (ours - 1)))
    return ".".join(parts)
