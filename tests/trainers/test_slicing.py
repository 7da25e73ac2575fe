"""A student that starts as a slice of its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.trainers.tiny import STUDENT, TEACHER, last_state, tiny, write_yaml
from trainers.cli import main
from trainers.errors import InputError
from trainers.models import find
from trainers.slicing import sliced

pytestmark = pytest.mark.usefixtures("one_thread")


def edsr(features: int, blocks: int) -> dict[str, Tensor]:
    torch.manual_seed(features)
    entry = find("edsr")
    return entry.build(entry.options(scale=2, features=features, blocks=blocks)).state_dict()


def test_first_channels_and_evenly_spaced_blocks() -> None:
    teacher, student = edsr(6, 8), edsr(4, 4)
    found = sliced(teacher, student)
    assert found.keys() == student.keys()
    assert all(found[key].shape == student[key].shape for key in found)
    assert torch.equal(found["head.0.weight"], teacher["head.0.weight"][:4])
    for ours, theirs in {0: 0, 1: 2, 2: 4, 3: 6}.items():
        assert torch.equal(found[f"body.{ours}.body.2.weight"], teacher[f"body.{theirs}.body.2.weight"][:4, :4])
    assert torch.equal(found["body.4.weight"], teacher["body.8.weight"][:4, :4])  # the body's last convolution
    assert torch.equal(
        found["tail.0.0.weight"], teacher["tail.0.0.weight"][:16, :4]
    )  # pixel shuffle: channel by channel


def test_the_whole_teacher_is_a_slice() -> None:
    teacher = edsr(6, 3)
    assert all(torch.equal(value, teacher[key]) for key, value in sliced(teacher, teacher).items())


@pytest.mark.parametrize(("features", "blocks"), [(8, 3), (4, 9)])
def test_a_larger_student_is_no_slice(features: int, blocks: int) -> None:
    with pytest.raises(InputError, match="the same topology"):
        sliced(edsr(6, 4), edsr(features, blocks))


@pytest.mark.parametrize("method", ["scratch", "output"])
def test_it_goes_with_any_method(tmp_path: Path, method: str) -> None:
    tree = tiny(tmp_path, method, steps=1, save_every=1, lr=1e-12, lr_min=0.0, ema=None)
    tree |= {"teacher": TEACHER | {"weights": "teacher.safetensors"}, "student": STUDENT | {"weights": "teacher"}}
    assert main(["train", str(write_yaml(tmp_path, tree))]) == 0
    teacher, trained = load_file(tmp_path / "teacher.safetensors"), last_state(tmp_path / "runs" / method)
    torch.testing.assert_close(trained[".weights.student.head.0.weight"], teacher["head.0.weight"][:4])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": None}, "a slice of a teacher needs one"),
        ({"teacher": TEACHER | {"weights": "teacher"}}, "only a student starts as a slice"),
        ({"student": STUDENT | {"features": 7, "weights": "teacher"}}, "the same topology"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], said: str) -> None:
    tree = tiny(tmp_path, "output") | {"student": STUDENT | {"weights": "teacher"}} | change
    assert main(["check", str(write_yaml(tmp_path, tree))]) == 2
    assert said in capsys.readouterr().err
