"""The tasks: what a config that names one gets by default, and what the numbers are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainers.data.degradations import AnyDegradation, Bicubic, MotionBlur, Noise, Rain


@dataclass(frozen=True)
class Task:
    """A kind of restoration."""

    name: str
    """The word for it in a config: `task: sr`."""
    text: str
    """The task in words, for reports."""
    scale: int
    """Default upsampling factor; 1 where input and ground truth have the same size."""
    degradation: AnyDegradation | None
    """Makes the inputs where there is no folder of them; None: there must be one."""
    protocol: str
    """How its results are usually measured."""
    grey_protocol: str = "denoise-grey"
    """The same for grey images."""

    def defaults(self, *, grey: bool) -> dict[str, Any]:
        """What a config of this task need not say."""
        made = self.degradation and self.degradation.model_dump()
        return {"data": {"degradation": made}, "val": {"protocol": self.grey_protocol if grey else self.protocol}}


TASKS = {
    task.name: task
    for task in [
        Task("sr", "super-resolution", 2, Bicubic(), "sr-y"),
        Task("denoise", "denoising", 1, Noise(), "denoise-rgb"),
        Task("derain", "deraining", 1, Rain(), "derain-y"),
        Task("deblur", "deblurring", 1, MotionBlur(), "deblur-rgb"),
        Task("dehaze", "dehazing", 1, None, "dehaze-rgb"),
    ]
}
