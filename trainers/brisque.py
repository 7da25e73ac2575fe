"""The BRISQUE score: features of natural-scene statistics, judged by a support-vector machine that is read from files.

    Brisque.load("brisque_model_live.yml", "brisque_range_live.yml")(image)   ->  18.3

The files are OpenCV's (opencv_contrib, modules/quality/samples, Apache-2.0); they are no part of this project.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import kdops


class _OpenCV(yaml.SafeLoader):
    """YAML as OpenCV's FileStorage writes it: a matrix is a mapping with a tag."""


def _matrix(loader: _OpenCV, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_OpenCV.add_constructor("tag:yaml.org,2002:opencv-matrix", _matrix)


@dataclass(frozen=True)
class Brisque:
    """A regression f(x) = sum_i weight_i exp(-gamma ||x - vector_i||^2) - rho of features x, scaled to [-1, 1] by `low` and `high`."""

    vectors: Tensor  # (N, 36)
    weights: Tensor  # (N,)
    gamma: float
    rho: float
    low: Tensor  # (36,)
    high: Tensor  # (36,)

    @classmethod
    def load(cls, model: str | Path, ranges: str | Path) -> Brisque:
        """Read OpenCV's model and range files. Raises ValueError for files that hold something else."""
        machine, scale = _read(model).get("opencv_ml_svm"), _read(ranges).get("range")
        if machine is None or machine["kernel"]["type"] != "RBF" or scale is None or scale["cols"] != 36:
            raise ValueError(
                f"{model} and {ranges} must hold OpenCV's support-vector machine with an RBF kernel and the ranges of 36 features"
            )
        (decision,) = machine["decision_functions"]
        vectors = torch.tensor(machine["support_vectors"], dtype=torch.float64)
        order = decision.get("index", range(len(decision["alpha"])))
        low, high = torch.tensor(scale["data"], dtype=torch.float64).view(2, 36)
        weights = torch.tensor(decision["alpha"], dtype=torch.float64)
        return cls(vectors[list(order)], weights, machine["kernel"]["gamma"], decision["rho"], low, high)

    def __call__(self, image: Tensor) -> float:
        """The score of one image, about 0 (natural) to 100; outside that range for what the machine never saw.

        image  RGB (3, H, W) or grey (1, H, W), floating, in [0, 1]; values outside are clipped
        The luma (Y of YIQ) is rounded to 8 bits. Raises ValueError for other shapes, TypeError for integer images.
        """
        if not image.is_floating_point():
            raise TypeError(f"image must be floating in [0, 1], got {image.dtype}; divide by 255 first")
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"image must be (3, H, W) or (1, H, W), got shape {tuple(image.shape)}")
        pixels = image.detach().double().clamp(0, 1) * 255
        weights = pixels.new_tensor([0.299, 0.587, 0.114] if len(pixels) == 3 else [1.0])
        luma = (pixels * weights[:, None, None]).sum(dim=0).round()
        return self.judge(kdops.brisque_features(luma[None, None].cpu())[0])

    def judge(self, features: Tensor) -> float:
        """The score of 36 features."""
        x = 2 * (features.double() - self.low) / (self.high - self.low) - 1
        distance = (self.vectors - x).square().sum(dim=1)
        return float((self.weights * (-self.gamma * distance).exp()).sum() - self.rho)


def _read(path: str | Path) -> dict[str, Any]:
    text = Path(path).read_text()
    text = re.sub(r"^%YAML:1\.0\s*\n---", "", text)  # OpenCV's header is not YAML's
    text = re.sub(r"(\w):(?=[-\w.])", r"\1: ", text)  # nor is a key without a space after its colon
    content = yaml.load(text, Loader=_OpenCV)
    return content if isinstance(content, dict) else {}
