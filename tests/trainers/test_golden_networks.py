"""Published weights in ../shared/data reach the figures that were measured with them elsewhere: definitions and protocol are right."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from trainers.config import Data, ValSet
from trainers.data.degradations import Noise
from trainers.data.sets import open_val_set
from trainers.evaluate import count_parameters, evaluate
from trainers.metrics import PROTOCOLS
from trainers.networks import AnySize, network_of_weights
from trainers.pretrained import read_weights

SR = [  # weights, dataset, scale
    ("RLFN__rlfn_x2.pth", "set5", 2),
    pytest.param("RLFN__rlfn_x2.pth", "set14", 2, marks=pytest.mark.slow),
    ("RLFN__rlfn_x4.pth", "set5", 4),
    ("RLFN__rlfn_x4.pth", "set14", 4),
    ("RLFN__rlfn_s_x4.pth", "set5", 4),
    ("RLFN__rlfn_s_x4.pth", "set14", 4),
    ("NTIRE2022_ESR__imdn_baseline.pth", "set5", 4),
    ("NTIRE2022_ESR__imdn_baseline.pth", "set14", 4),
]


def reference(shared_data: Path, weights: str) -> dict[str, str]:
    with (shared_data / "reference_models.tsv").open() as file:
        return next(row for row in csv.DictReader(file, delimiter="\t") if row["weights_file"] == weights)


@pytest.mark.parametrize(("weights", "dataset", "scale"), SR)
def test_super_resolution(shared_data: Path, weights: str, dataset: str, scale: int) -> None:
    row = reference(shared_data, weights)
    entry, options, network = network_of_weights(read_weights(str(shared_data / "weights" / weights)))
    assert entry.scale(options) == scale == int(row["scale"])
    assert count_parameters(network) == int(row["params"])
    assert (entry.pixel_range(options) == 255) is (row["input_range"] == "0-255")
    folder = shared_data / dataset
    images = ValSet(name=dataset, gt=f"{folder}/HR", lq=f"{folder}/LR_bicubic/X{scale}", lq_template=f"{{}}x{scale}")
    measured = evaluate(AnySize(network, entry, options), open_val_set(images, scale), PROTOCOLS["sr-y"], scale)
    psnr, ssim = map(float, row[dataset].split("/"))
    assert measured["psnr"] == pytest.approx(psnr, abs=0.01)
    assert measured["ssim"] == pytest.approx(ssim, abs=1e-4)


@pytest.mark.slow
def test_denoising(shared_data: Path) -> None:
    """data/README.md: Set12 at sigma 25 gives 30.43 dB. 0.05 dB is the spread of other noise."""
    entry, options, network = network_of_weights(read_weights(str(shared_data / "weights" / "KAIR__dncnn_25.pth")))
    assert options == entry.options(features=64, depth=17, image_channels=1)
    data = Data(degradation=Noise(sigma=25.0), grey=True)
    images = open_val_set(ValSet(name="set12", gt=f"{shared_data}/set12"), 1, data)
    measured = evaluate(AnySize(network, entry, options), images, PROTOCOLS["denoise-grey"], 1)
    assert len(measured["per_image"]) == 12
    assert measured["psnr"] == pytest.approx(30.43, abs=0.05)
