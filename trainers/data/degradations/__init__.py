"""The degradations that make an input from a ground truth, by name. To add one: write its class, then name it in the union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainers.data.degradations.base import Degradation
from trainers.data.degradations.bicubic import Bicubic
from trainers.data.degradations.blur import GaussianBlur, MotionBlur
from trainers.data.degradations.noise import Noise
from trainers.data.degradations.rain import Rain

__all__ = ["AnyDegradation", "Bicubic", "Degradation", "GaussianBlur", "MotionBlur", "Noise", "Rain"]

AnyDegradation = Annotated[Bicubic | Noise | Rain | MotionBlur | GaussianBlur, Field(discriminator="name")]
