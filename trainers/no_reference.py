"""BRISQUE and PIQE: the quality of a picture without its ground truth, from the statistics of `kdops.nss`. Lower is better."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import Tensor

from trainers.brisque import Brisque
from trainers.errors import InputError
from trainers.metrics import to_8_bits


@dataclass(frozen=True)
class NoReference:
    """The scores that were asked for."""

    piqe: bool = False
    """PIQE, 0 to 100."""
    brisque: Brisque | None = None
    """BRISQUE by this model, about 0 to 100."""

    def __call__(self, restored: Tensor) -> dict[str, float]:
        """restored (C, H, W) in [0, 1] -> {"piqe": ..., "brisque": ...}, of the picture rounded to 8 bits."""
        import kdops

        picture, scores = to_8_bits(restored).cpu() / 255, {}
        if self.piqe:
            weights = picture.new_tensor([0.299, 0.587, 0.114] if len(picture) == 3 else [1.0])
            grey = (picture * weights[:, None, None]).sum(dim=0)
            scores["piqe"] = kdops.piqe(grey[None, None])[0].item()
        if self.brisque:
            scores["brisque"] = self.brisque(picture)
        return scores


def read_brisque(model: Path) -> Brisque:
    """OpenCV's brisque_model_live.yml and, beside it, brisque_range_live.yml.

    Raises:
        InputError: they are not there, or hold something else.
    """
    try:
        return Brisque.load(model, model.with_name(model.name.replace("model", "range")))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); give brisque_model_live.yml") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    except yaml.YAMLError:  # another kind of file
        raise InputError(f"{model}: is no YAML; give brisque_model_live.yml") from None
