"""trainers.evaluate: the golden values of bicubic upsampling, modes, and counts."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.trainers.tiny import tiny, write_images, write_yaml
from trainers.config import ValSet
from trainers.config_file import load_config
from trainers.data.images import read_image
from trainers.data.resize import imresize
from trainers.data.sets import ValPair, open_val_set
from trainers.errors import InputError
from trainers.evaluate import bicubic, count_macs, count_parameters, evaluate
from trainers.metrics import PROTOCOLS, psnr, rgb_to_y, ssim
from trainers.models.edsr import EDSR, EDSROptions
from trainers.validation import Validation

SR_Y = PROTOCOLS["sr-y"]
REFERENCE = [("set5", 2), ("set5", 3), ("set5", 4), ("set14", 2), ("set14", 3), ("set14", 4), ("b100", 4)]


def reference_row(shared_data: Path, dataset: str, scale: int) -> list[str]:
    """set, scale, PSNR and SSIM of three ways to upsample, published PSNR and SSIM, number of images."""
    with (shared_data / "reference_bicubic.tsv").open() as file:
        return next(row for row in csv.reader(file, delimiter="\t") if row[:2] == [dataset, str(scale)])


@pytest.mark.parametrize(("dataset", "scale"), REFERENCE)
def test_bicubic_on_shipped_lr(shared_data: Path, dataset: str, scale: int) -> None:
    folder = shared_data / dataset
    entry = ValSet(name=dataset, gt=f"{folder}/HR", lq=f"{folder}/LR_bicubic/X{scale}", lq_template=f"{{}}x{scale}")
    measured = evaluate(lambda lq: bicubic(lq, scale), open_val_set(entry, scale), SR_Y, scale)
    row = reference_row(shared_data, dataset, scale)
    assert measured["psnr"] == pytest.approx(float(row[2]), abs=1e-3)
    assert measured["ssim"] == pytest.approx(float(row[3]), abs=6e-5)
    assert len(measured["per_image"]) == int(row[-1])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_our_own_downscaling_gives_the_shipped_lr(shared_data: Path, scale: int) -> None:
    folder = shared_data / "set5"
    shipped = ValSet(name="set5", gt=f"{folder}/HR", lq=f"{folder}/LR_bicubic/X{scale}", lq_template=f"{{}}x{scale}")
    made = ValSet(name="set5", gt=f"{folder}/HR")
    for expected, pair in zip(open_val_set(shipped, scale), open_val_set(made, scale), strict=True):
        assert torch.equal(pair.lq, expected.lq)
        assert torch.equal(pair.gt, expected.gt)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_luma_only_path_gives_the_published_values(shared_data: Path, scale: int) -> None:
    """As papers up to 2016 did it: 8-bit Y, down and up in floating point, rounded at the end."""
    psnrs, ssims = [], []
    for path in sorted((shared_data / "set5" / "HR").iterdir()):
        image = read_image(path) / 255.0
        height, width = (side // scale * scale for side in image.shape[1:])
        y = rgb_to_y(image[:, :height, :width]).round()
        restored = imresize(imresize(y, 1 / scale), scale).clamp(0, 255).round()
        inner = (slice(None), slice(scale, -scale), slice(scale, -scale))
        psnrs.append(psnr(restored[inner], y[inner]))
        ssims.append(ssim(restored[inner], y[inner]))
    row = reference_row(shared_data, "set5", scale)
    assert torch.stack(psnrs).mean().item() == pytest.approx(float(row[6]), abs=1e-3)
    assert torch.stack(psnrs).mean().item() == pytest.approx(float(row[8]), abs=5e-3)
    assert torch.stack(ssims).mean().item() == pytest.approx(float(row[9]), abs=6e-4)


class Recorder(nn.Module):
    """Nearest upsampling by 2 that notes in which mode it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.frozen = nn.Dropout().eval()
        self.dropout = nn.Dropout()
        self.modes: list[tuple[bool, bool, bool]] = []

    def forward(self, lq: Tensor) -> Tensor:
        self.modes.append((self.training, self.dropout.training, torch.is_grad_enabled()))
        out: Tensor = self.frozen(self.dropout(lq)).repeat_interleave(2, -1).repeat_interleave(2, -2) * self.weight
        return out


def val_pairs(count: int = 2) -> list[ValPair]:
    generator = torch.Generator().manual_seed(0)
    gts = [torch.rand(3, 24, 30, generator=generator) for _ in range(count)]
    return [ValPair(f"image{i}", imresize(gt, 0.5).clamp(0, 1), gt) for i, gt in enumerate(gts)]


def test_eval_mode_is_used_and_put_back() -> None:
    network = Recorder().train()
    network.frozen.eval()
    evaluate(network, val_pairs(), SR_Y, 2)
    assert network.modes == [(False, False, False)] * 2
    assert (network.training, network.dropout.training, network.frozen.training) == (True, True, False)
    with pytest.raises(RuntimeError, match="stop"):
        evaluate(failing(network), val_pairs(), SR_Y, 2)
    assert network.training


def failing(network: nn.Module) -> nn.Module:
    def stop(*_: object) -> None:
        raise RuntimeError("stop")

    network.register_forward_pre_hook(stop)
    return network


def test_means_and_per_image_values() -> None:
    pairs = val_pairs(3)
    measured = evaluate(lambda lq: bicubic(lq, 2), pairs, SR_Y, 2)
    assert list(measured["per_image"]) == [pair.name for pair in pairs]
    for metric in ("psnr", "ssim"):
        values = [image[metric] for image in measured["per_image"].values()]
        assert measured[metric] == pytest.approx(sum(values) / 3)
        assert values[1] == SR_Y.measure(bicubic(pairs[1].lq, 2), pairs[1].gt, 2)[metric]


def test_channels_last_network_measures_the_same() -> None:
    network = EDSR(EDSROptions(features=8, blocks=1))
    plain = evaluate(network, val_pairs(), SR_Y, 2)
    last = evaluate(network.to(memory_format=torch.channels_last), val_pairs(), SR_Y, 2)
    assert last["psnr"] == pytest.approx(plain["psnr"], abs=1e-3)


@pytest.mark.gpu
def test_the_gpu_measures_the_same() -> None:
    network = EDSR(EDSROptions(features=8, blocks=1))
    cpu = evaluate(network, val_pairs(), SR_Y, 2)
    cuda = evaluate(network.to("cuda"), val_pairs(), SR_Y, 2, "cuda")
    assert cuda["psnr"] == pytest.approx(cpu["psnr"], abs=1e-2)


def test_an_image_that_is_too_small_is_named() -> None:
    small = ValPair("speck", torch.zeros(3, 6, 6), torch.zeros(3, 12, 12))
    with pytest.raises(InputError, match=r"speck: .* 11 x 11"):
        evaluate(lambda lq: bicubic(lq, 2), [small], SR_Y, 2)


def test_no_images() -> None:
    with pytest.raises(ValueError, match="no image"):
        evaluate(lambda lq: lq, [], SR_Y, 2)


def test_bicubic_is_clipped() -> None:
    edge = torch.zeros(3, 8, 8)
    edge[..., 4:] = 1
    up = bicubic(edge, 2)
    assert (up.min(), up.max()) == (0, 1)


def test_macs_and_parameters() -> None:
    network = EDSR(EDSROptions(scale=2, features=16, blocks=4)).train()
    height, width = 12, 17
    convolutions = {(3, 16): 1, (16, 16): 9, (16, 64): 1}  # at the input's size; then (16, 3) at twice that
    macs = sum(count * a * b * 9 for (a, b), count in convolutions.items()) * height * width
    macs += 16 * 3 * 9 * 4 * height * width
    assert count_macs(network, (1, 3, height, width)) == macs
    assert count_macs(network, (5, 3, height, width)) == 5 * macs
    assert network.training
    parameters = sum(count * (a * b * 9 + b) for (a, b), count in convolutions.items()) + 16 * 3 * 9 + 3
    assert count_parameters(network) == parameters
    assert count_parameters(network.requires_grad_(False)) == parameters


def test_macs_of_a_large_network_take_no_memory() -> None:
    """EDSR baseline at 1280x720 output: 316.3 G multiply-accumulates, the figure that SR papers quote."""
    network = EDSR(EDSROptions(scale=2))
    assert count_macs(network, (1, 3, 360, 640)) == pytest.approx(316.3e9, rel=1e-3)


def test_what_a_set_is_described_by_is_what_its_numbers_depend_on(tmp_path: Path) -> None:
    tree = tiny(tmp_path)
    write_images(tmp_path / "lq", 1, (20, 24))
    for lq, made in ((None, "bicubic"), ("lq", None)):
        tree["data"]["val"][0]["lq"] = lq
        found = Validation(load_config(write_yaml(tmp_path, tree)), torch.device("cpu")).described["val"]
        assert (found["degradation"] and found["degradation"]["name"]) == made
        assert (found["protocol"], found["grey"]) == ("sr-y", False)
