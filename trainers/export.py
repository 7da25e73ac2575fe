"""`kdtrain export`: a trained student as files that others can use: safetensors, ONNX, and a card that says what it is and does."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trainers.errors import InputError
from trainers.evaluate import count_macs, count_parameters
from trainers.files import replace_file
from trainers.json_text import from_json
from trainers.live_bytes import LiveBytes
from trainers.pretrained import note
from trainers.sources import Source, open_source

TOLERANCE = 1e-4  # of pixel values in [0, 1]: two runtimes round differently, and 8-bit images have steps of 4e-3
SIZES = (
    (64, 96),
    (120, 72),
)  # heights and widths that ONNX Runtime is compared at, made multiples of what the network takes
OPSET = 20


@dataclass(frozen=True)
class Measured:
    """Cost of the network on one image."""

    height: int
    width: int
    macs: int
    milliseconds: float
    activation_bytes: int


def export(path: Path, out: Path, *, onnx: bool, size: tuple[int, int]) -> list[Path]:
    """Write the student of `path` (a run, a checkpoint or weights) to the folder `out`; returns the files.

    Args:
        onnx: also write model.onnx, for every height and width, and compare it with torch at two sizes.
        size: height and width of the image that latency and memory are measured on.

    Raises:
        InputError: no weights there, `out` holds an export already, onnx is not installed, or ONNX Runtime gives another image.
    """
    if onnx:
        _need_onnx()
    source = open_source(path)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: remove it or choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "model.safetensors", *([out / "model.onnx"] if onnx else []), out / "README.md"]
    try:
        weights = {key: value.contiguous() for key, value in source.network.network.state_dict().items()}
        replace_file(files[0], safetensors.torch.save(weights, metadata=note(source.entry, source.options)))
        differences = write_onnx(source, files[1]) if onnx else {}
        replace_file(files[-1], card(source, path, measure(source, size), differences).encode())
    except BaseException:  # half an export would be in the way of the next
        for file in files:
            file.unlink(missing_ok=True)
        raise
    return files


# --- ONNX ------------------------------------------------------------------------------------------------------------------------


def _need_onnx() -> None:
    for package in ("onnxruntime", "onnxscript"):  # torch.onnx needs the second
        if find_spec(package) is None:
            raise InputError(f"--onnx needs {package}: pip install 'kdops[onnx]'")


def write_onnx(source: Source, path: Path) -> dict[str, float]:
    """The network with free batch, height and width; "HxW" -> largest difference between ONNX Runtime and torch.

    Raises:
        InputError: the images differ.
    """
    import onnxruntime

    network, unit = source.network.network.cpu().eval(), source.network.multiple_of
    # Two samples: torch.export takes a size of 1 for a constant.
    example = _image(source, *(_fitting(side, unit) for side in SIZES[0])).expand(2, -1, -1, -1).contiguous()
    height, width = (torch.export.Dim(name, min=2, max=4096) for name in ("h", "w"))
    free = {0: torch.export.Dim("batch", min=1, max=64), 2: unit * height, 3: unit * width}
    with _quiet():
        torch.onnx.export(
            network,
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=(free,),
            input_names=["image"],
            output_names=["restored"],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences = {}
    for sides in SIZES:
        image = _image(source, *(_fitting(side, unit) for side in sides))
        with torch.no_grad():
            ours = network(image)
        (theirs,) = session.run(None, {"image": image.numpy()})
        found = float((ours - torch.from_numpy(theirs)).abs().max())
        name = f"{image.shape[2]}x{image.shape[3]}"
        if not found <= TOLERANCE:
            raise InputError(
                f"{path}: ONNX Runtime differs from torch by {found:.1e} at {name}, above {TOLERANCE:.0e}; it is not kept"
            )
        differences[name] = found
    return differences


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes that torchvision is not there, and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _fitting(side: int, unit: int) -> int:
    return -(-side // unit) * unit


def _image(source: Source, height: int, width: int) -> Tensor:
    """Smooth noise in [0, 1]: (1, channels, height, width)."""
    channels = source.entry.image_channels(source.options)
    coarse = torch.rand(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear")


# --- the card ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(source: Source, size: tuple[int, int]) -> Measured:
    """MACs, latency (median of five after one to warm up) and peak activation memory on one image of this size."""
    image = _image(source, *size).to(source.device)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        source.network(image)
        if image.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    with LiveBytes() as live:
        source.network(image)
    macs = count_macs(source.network, tuple(image.shape))
    return Measured(*size, macs, 1e3 * median(seconds[1:]), live.peak)


def card(source: Source, path: Path, measured: Measured, differences: dict[str, float]) -> str:
    """README.md: what the network is, what it scored by which protocol, what it costs."""
    options = ", ".join(f"{key} {value}" for key, value in source.options.model_dump().items())
    scale, unit = source.network.scale, source.network.multiple_of
    device = (
        "one CPU, " + f"{torch.get_num_threads()} threads"
        if source.device.type == "cpu"
        else torch.cuda.get_device_name()
    )
    lines = [
        f"# {source.entry.title}" + (f" x{scale}" if scale > 1 else ""),
        "",
        f"{source.entry.title} ({options}), from `{path}`.",
        "",
        *_training(source),
        "## Use",
        "",
        f"Images are (batch, {source.entry.image_channels(source.options)}, height, width) in [0, 1], red first; height and width are "
        f"multiples of {unit}, and those of the result {scale} times as large.",
        "",
        "    kdtrain restore IN OUT --weights model.safetensors",
        "",
        *_scores(source, path),
        "## Cost",
        "",
        "| parameters | MACs | latency | peak activation memory | measured on |",
        "| --- | --- | --- | --- | --- |",
        f"| {count_parameters(source.network):,} | {measured.macs / 1e9:.2f} G | {measured.milliseconds:.1f} ms | "
        f"{measured.activation_bytes / 2**20:.1f} MiB | one {measured.height} x {measured.width} input, float32, {device} |",
    ]
    if differences:
        where = ", ".join(f"{found:.1e} at {name}" for name, found in differences.items())
        lines += ["", f"model.onnx differs from torch by at most {where} (ONNX Runtime, CPU)."]
    return "\n".join(lines) + "\n"


def _training(source: Source) -> list[str]:
    run = source.config
    if run is None:
        return []
    teacher = f", teacher {run.teacher.arch} ({run.teacher.weights})" if run.teacher else ""
    steps = f"{source.step}" if source.step == run.train.steps else f"{source.step} of {run.train.steps}"
    return [f"Task {run.task}, method {run.method.name}{teacher}, {steps} steps, seed {run.train.seed}.", ""]


def _scores(source: Source, path: Path) -> list[str]:
    """The table of result.json, where the weights are those of a finished run."""
    file = path / "result.json"
    result: dict[str, Any] = from_json(file.read_text()) if file.is_file() else {}
    if not result or result["steps"] != source.step:
        return [
            "## Scores",
            "",
            "Not measured: these weights are not those of a finished run. `kdtrain eval` measures them.",
            "",
        ]
    rows = [
        f"| {name} | {who} | {score['psnr']:.3f} | {score['ssim']:.4f} |"
        for name, found in result["sets"].items()
        for who, score in found.items()
    ]
    return [
        "## Scores",
        "",
        f"Protocol `{result['protocol']}`: {result['protocol_text'].removeprefix(result['protocol'] + ': ')}",
        "",
        "| set | | PSNR, dB | SSIM |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
    ]
