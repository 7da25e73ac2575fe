"""`kdtrain eval`: how sets are named, which inputs it refuses, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainers.test_restore import evaluated, weights
from tests.trainers.tiny import tiny, write_images, write_yaml
from trainers.cli import main
from trainers.measure import print_measured

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["set5/HR"], ["HR"]),
        (["set5/HR", "set14/HR"], ["set5/HR", "set14/HR"]),
        (["set5/HR", "mine=set14/HR"], ["set5/HR", "mine"]),
        (["my pics", "set5/HR/image0.png"], ["my pics", "image0"]),
        (["my pics/image0.png", "set5/HR/image0.png"], ["my pics/image0", "HR/image0"]),
        (["."], ["here"]),
    ],
)
def test_sets_have_names_of_their_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    places: list[str],
    names: list[str],
) -> None:
    for folder in ("set5/HR", "set14/HR", "my pics", "."):
        write_images(tmp_path / "here" / folder, 1)
    monkeypatch.chdir(tmp_path / "here")
    data = [part for place in places for part in ("--data", place)]
    assert list(evaluated(capsys, weights(tmp_path, scale=2), *data)["sets"]) == names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "in", "--data", "in"], "two sets are called in: give each a name, --data NAME=PLACE"),
        (["--data", "a=in", "--data", "a=photos"], "two sets are called a"),
        (
            ["--degradation", "{name: noise, sigma: 15}"],
            "noise keeps the size of an image, but the network's scale is 2",
        ),
        (["--degradation", "{name: bicubic, border: [}"], "it is no YAML; write it as in a config"),
        (["--degradation", "{name: noise, sigma: -1}"], "must be from 0 to 255; write it as in a config"),
        (["--data", "dot"], "image0.png: 1x1 is smaller than"),
        (["--data", "photos", "--lq", "in"], "in: holds no inputs of the embedded photographs"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "in", 1)
    write_images(tmp_path / "dot", 1, (1, 1))
    assert main(["eval", str(weights(tmp_path, scale=2)), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_ensemble_is_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, given = weights(tmp_path, scale=2), write_images(tmp_path / "in", 1)
    plain, averaged = (evaluated(capsys, source, "--data", given, *more) for more in ([], ["--ensemble"]))
    assert (plain["ensemble"], averaged["ensemble"]) == (False, True)
    assert plain["sets"]["in"]["bicubic"] == averaged["sets"]["in"]["bicubic"]
    assert plain["sets"]["in"]["network"]["psnr"] != averaged["sets"]["in"]["network"]["psnr"]


def test_a_run_is_measured_on_another_task_as_that_task_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny(tmp_path, steps=1) | {"task": "denoise", "student": {"arch": "dncnn", "features": 4, "depth": 3}}
    tree["data"]["degradation"] = {"name": "noise", "sigma": 50.0}
    tree["data"]["val"][0]["degradation"] = {"name": "noise", "sigma": 5.0}
    assert main(["train", str(write_yaml(tmp_path, tree))]) == 0
    run = tmp_path / "runs" / "scratch"
    for task, protocol, degradation in (("denoise", "denoise-rgb", "noise"), ("deblur", "deblur-rgb", "motion_blur")):
        found = evaluated(capsys, run, "--task", task)
        assert (found["protocol"], found["degradations"]["val"]["name"]) == (protocol, degradation)
        assert found["degradations"]["val"].get("sigma", 5.0) == 5.0
    assert main(["eval", str(run), "--task", "dehaze"]) == 2
    assert "task dehaze makes no inputs by itself: give --lq or --degradation" in capsys.readouterr().err


def test_the_table_is_whole_however_narrow_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    image = dict.fromkeys(("psnr", "ssim", "piqe", "brisque"), 36.84567)
    scores = image | {"per_image": {"photo[copy]": image}}
    better = {"psnr": 39.5, "per_image": {"photo[copy]": image | {"psnr": 40.5}}}
    measured = {"weights": "my[red].pth", "arch": "edsr", "options": {}, "protocol_text": "sr-y", "baseline": "bicubic"}
    print_measured(measured | {"sets": {"val": {"bicubic": scores, "network": scores | better}}}, as_json=False)
    said = capsys.readouterr().out
    assert "my[red].pth" in said
    row = next(line for line in said.splitlines() if "photo[copy]" in line)
    assert [row.count(number) for number in ("36.846", "36.8457", "36.85")] == [1, 2, 4]
    assert row.index("36.846") < row.index("40.500")  # the baseline before the network
    mean = next(line for line in said.splitlines() if "mean" in line)
    assert mean.index("36.846") < mean.index("39.500")
