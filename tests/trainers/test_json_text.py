"""trainers.json_text: the infinite PSNR of equal images survives a file that any JSON reader takes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.tiny import tiny, write_yaml
from trainers.cli import main
from trainers.data.images import write_png
from trainers.json_text import from_json, to_json
from trainers.results import load_run


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=refuse)


def test_what_json_has_no_word_for_is_null_and_scores_are_read_back() -> None:
    written = to_json(
        {"equal": {"psnr": math.inf, "ssim": 1.0}, "lost": {"psnr": math.nan, "ssim": math.nan}, "a": (1, math.inf)}
    )
    assert strict(written) == {
        "equal": {"psnr": None, "ssim": 1.0},
        "lost": {"psnr": None, "ssim": None},
        "a": [1, None],
    }
    read = from_json(written)
    assert read["equal"] == {"psnr": math.inf, "ssim": 1.0}
    assert math.isnan(read["lost"]["psnr"])
    assert math.isnan(read["lost"]["ssim"])
    assert from_json('{"psnr": Infinity, "ssim": 1.0}')["psnr"] == math.inf  # as runs of old have it


@pytest.mark.usefixtures("one_thread")
def test_a_run_whose_baseline_is_perfect_ends_with_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny(tmp_path, steps=2)
    write_png(tmp_path / "flat" / "flat.png", torch.full((3, 24, 24), 0.5))
    tree["data"]["val"] = [{"name": "flat", "gt": "flat"}]
    assert main(["train", str(write_yaml(tmp_path, tree))]) == 0
    run = tmp_path / "runs" / "scratch"
    scores = strict((run / "result.json").read_text())["sets"]["flat"]
    assert scores["bicubic"]["psnr"] is None
    assert load_run(run).psnr("flat", "bicubic") == math.inf
    report = (run / "report.html").read_text()
    assert "inf dB below bicubic" in report
    assert "nan" not in report
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(tmp_path / "flat"), "--json"]) == 0
    assert strict(capsys.readouterr().out)["sets"]["flat"]["bicubic"]["per_image"]["flat"]["psnr"] is None
    assert main(["eval", str(run), "--data", str(tmp_path / "flat")]) == 0
    assert "inf" in capsys.readouterr().out
