"""What images add to a training process: the largest one to be restored, in tiles where it does not fit, and those kept decoded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.tiny import tiny, write_images, write_yaml
from trainers.cli import main
from trainers.config import Config
from trainers.config_file import load_config
from trainers.data.sets import open_train_set, open_val_set
from trainers.live_bytes import LiveBytes
from trainers.plan import Learned, Planner, Point
from trainers.plan_images import decoded, largest_image, plan_validation, restore, simulated, tile_that_fits
from trainers.plan_table import validation_verdict

MIB = 2**20
POINT = Point(16, 4, False, "kdops")


def wide(folder: Path, features: int = 4) -> Config:
    """Validated on an image of 403 x 300 beside smaller ones, by a student of so many channels."""
    tree = tiny(folder, "output")
    tree["student"] = {"arch": "edsr", "features": features, "blocks": 3}
    write_images(folder / "wide", 1, (300, 403))
    tree["data"]["val"].append({"name": "wide", "gt": "wide"})
    return load_config(write_yaml(folder, tree))


@pytest.fixture
def nothing_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process takes what is counted; no step is run for it."""

    def learned(self: Planner, backend: str) -> Learned:
        parts = self.simulate(POINT)[0].parts()
        return Learned((0, 0), (0, 1), (0, 1), dict.fromkeys(parts, 0.0), 1.0)

    monkeypatch.setattr(Planner, "_of_backend", learned)


def test_the_largest_image_counts(tmp_path: Path) -> None:
    assert largest_image(wide(tmp_path)) == ("wide/image0", (300, 402))  # cropped to a multiple of the scale


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_images_are_those_of_the_caches(tmp_path: Path, workers: int) -> None:
    config = wide(tmp_path)
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    sets = [open_val_set(entry, config.scale, config.data).pairs for entry in config.data.val]
    if not workers:
        sets.append(open_train_set(config.data, config.scale, config.data.patch).pairs)
    kept = sum(image.nbytes for pairs in sets for index in range(len(pairs)) for image in pairs[index])
    assert decoded(config) == pytest.approx(kept, rel=0.01)  # an odd row or column is cropped


@pytest.mark.parametrize("tile", [None, 64])
def test_fake_images_take_what_real_ones_take(tmp_path: Path, nothing_besides: None, tile: int | None) -> None:
    planner = Planner(wide(tmp_path), 2**40)
    size = (300, 402)
    peak, _ = simulated(planner, POINT, size, tile)
    step = planner.predict(POINT)
    with LiveBytes() as live:
        restore(planner.config, planner.train_step(False), size, tile)
    assert peak == pytest.approx(step.peak - step.costs.peak + step.costs.small + live.peak, rel=0.01)


def test_what_does_not_fit_is_refused_with_a_tile_that_fits(tmp_path: Path, nothing_besides: None) -> None:
    config = wide(tmp_path, features=32)  # with fewer, SSIM takes more than the network
    peak, _ = simulated(Planner(config, 2**40), POINT, largest_image(config)[1], None)
    planner = Planner(config, peak + decoded(config) - 1)
    refused = plan_validation(planner, POINT)
    tiled = tile_that_fits(planner, POINT, refused)
    assert not refused.measured
    assert tiled is not None
    assert tiled.peak < refused.peak
    said = validation_verdict(refused, tiled, planner.memory)
    assert "wide/image0 has 402 x 300 pixels; to fit: --set val.tile=" in said
    assert "no tile fits" in validation_verdict(refused, tile_that_fits(Planner(config, 1000), POINT, refused), 1000)


@pytest.mark.slow
def test_a_run_takes_what_was_planned(tmp_path: Path) -> None:
    """The peak of a whole run, validation of student and teacher included."""
    config = wide(tmp_path)
    planned = plan_validation(Planner(config, 2**40), POINT)
    assert planned.measured
    code = "import re; from trainers.cli import main; main({}); print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    arguments = ["train", str(tmp_path / "output.yaml")]
    run = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, check=True)
    assert planned.peak == pytest.approx(int(run.stdout.splitlines()[-1]) * 1024, rel=0.1)


@pytest.mark.slow
def test_the_command_plans_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide(tmp_path)
    assert main(["plan", str(tmp_path / "output.yaml"), "--memory", "2GiB", "--json"]) == 0
    out = capsys.readouterr()
    validation = json.loads(out.out)["validation"]
    assert (validation["image"], validation["measured"], validation["proposal"]) == ("wide/image0", True, None)
    assert re.search(r"validation: 0\.\d\d GiB \(measured\), 0\.00 of it images", out.err)
