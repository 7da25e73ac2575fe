"""A finished run folder without a training: what reports and comparisons read, with numbers that tests can look for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.results import baseline_name

FakeRun = Callable[..., Path]

IMAGES = {
    "tabby_cat": (96, 120),
    "mug": (104, 88),
}  # names and sizes of the ground truth; an underscore as in real names


def fake_photo(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth waves with a sharp checkerboard patch: bicubic is worst at the patch."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(6, 18) + y / rng.uniform(9, 30)) for _ in range(3)]
    image = 127 + 90 * np.stack(waves, axis=2)
    image[30:60, 40:70] = np.where((x[30:60, 40:70] // 2 + y[30:60, 40:70] // 2) % 2, 225, 25)[..., None]
    return image.clip(0, 255).astype(np.uint8)


def save_images(folder: Path, scale: int, error: float, teacher: bool) -> None:
    """gt, lq, bicubic, student and teacher of every image, as kdtrain writes them. `error` is the student's share of bicubic's."""
    folder.mkdir(parents=True)
    for seed, (name, (height, width)) in enumerate(IMAGES.items()):
        gt = fake_photo(height, width, seed)
        small = Image.fromarray(gt).resize((width // scale, height // scale), Image.Resampling.BICUBIC)
        worse = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
        worse += (
            20 * (np.indices(worse.shape).sum(axis=0) % 2) * (scale == 1)
        )  # there an input is no smaller, but worse
        blended = {baseline_name(scale): 1.0, "student": error} | ({"teacher": 0.3} if teacher else {})
        small.save(folder / f"{name}_lq.png")
        Image.fromarray(gt).save(folder / f"{name}_gt.png")
        for who, part in blended.items():
            Image.fromarray((gt + part * (worse - gt)).round().clip(0, 255).astype(np.uint8)).save(
                folder / f"{name}_{who}.png"
            )


def scores(psnr: float, ssim: float) -> dict[str, Any]:
    per_image = {name: {"psnr": psnr + shift, "ssim": ssim} for name, shift in zip(IMAGES, (1.5, -1.5), strict=True)}
    return {"psnr": psnr, "ssim": ssim, "per_image": per_image}


def metrics_of(method: str, steps: int, seconds: float, psnr: float) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    terms = {"scratch": ["pixel"], "output": ["pixel", "output"], "facd": ["pixel", "output", "contrast"]}[method]
    for step in range(50, steps + 1, 50):
        part = step / steps
        losses = {name: size * (0.3 + np.exp(-6 * part)) for name, size in zip(terms, (0.03, 0.03, 0.9), strict=False)}
        line: dict[str, Any] = {"kind": "train", "step": step, "losses": losses, "weights": dict.fromkeys(terms, 1.0)}
        line |= {"shares": dict.fromkeys(terms[1:], 0.1 + 0.2 * part), "total": sum(losses.values()), "lr": 1e-4}
        line |= {"seconds": seconds * part, "steps_per_second": steps / seconds, "data_wait": 0.02}
        lines.append(line)
        if step % 500 == 0:
            reached = psnr - 2 * np.exp(-5 * part) + 2 * np.exp(-5)
            measured = {"kind": "val", "step": step, "set": "photos", "protocol": "sr-y", "seconds": seconds * part}
            lines.append(measured | scores(reached, 0.9))
    return lines


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process and those it starts compute on one thread: tiny networks only lose by more, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake_run(tmp_path: Path) -> FakeRun:
    """fake_run(method, psnr=..., ...) -> the folder of a finished run. `result` overrides entries of result.json."""

    def make(
        method: str = "facd",
        *,
        psnr: float = 31.24,
        seconds: float = 60.0,
        steps: int = 3000,
        scale: int = 2,
        teacher: bool = True,
        folder: str = "",
        **result: Any,
    ) -> Path:
        path = tmp_path / (folder or f"demo-{method}")
        path.mkdir(parents=True)
        sets = {"photos": {baseline_name(scale): scores(29.87, 0.8912), "student": scores(psnr, 0.9123)}}
        network = {"arch": "edsr", "options": {"scale": scale, "features": 16, "blocks": 4, "res_scale": 1.0}}
        network |= {"params": 28163, "macs": 6_490_000_000}
        if teacher:
            sets["photos"]["teacher"] = scores(31.71, 0.9201)
        found: dict[str, Any] = {"name": path.name, "status": "done", "task": "sr", "scale": scale, "method": method}
        found |= {"steps": steps, "seconds": seconds, "seed": 0, "protocol": "sr-y", "batch": 8, "patch": 48}
        found |= {
            "protocol_text": "sr-y: Y of YCbCr (16 to 235), 8-bit rounding, without a border of scale pixels",
            "sets": sets,
        }
        found |= {"student": network, "macs_for": "1280x720 output", "best": {"step": steps, "psnr": psnr}}
        larger = {
            "options": network["options"] | {"features": 32, "blocks": 8},
            "params": 180_000,
            "macs": 41_000_000_000,
        }
        found["teacher"] = network | larger | {"weights": "builtin:edsr-x2"} if teacher else None
        found |= {"environment": {}}
        (path / "result.json").write_text(json.dumps(found | result))
        (path / "metrics.jsonl").write_text(
            "".join(json.dumps(m) + "\n" for m in metrics_of(method, steps, seconds, psnr))
        )
        (path / "config.yaml").write_text(f"name: {path.name}\nmethod: {{name: {method}}}  # a < b & c\n")
        (path / "env.json").write_text(json.dumps({"python": "3.11.7", "packages": {"torch": "2.13.0"}}))
        (path / "command.txt").write_text("kdtrain train demo.yaml\n")
        save_images(path / "images" / "photos", scale, error=0.5 if method == "scratch" else 0.4, teacher=teacher)
        return path

    return make
