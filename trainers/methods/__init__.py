"""The distillation methods, by name. To add one: write its file, then add it to the union and to the table below."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from trainers.methods.at import AT, ATOptions
from trainers.methods.base import Batch, Features, Method, MethodOptions, Network, Requirements, Run
from trainers.methods.csd import CSD, CSDOptions
from trainers.methods.dckd import DCKD, DCKDOptions
from trainers.methods.dukd import DUKD, DUKDOptions
from trainers.methods.facd import FACD, FACDOptions
from trainers.methods.fakd import FAKD, FAKDOptions
from trainers.methods.fitnet import FitNet, FitNetOptions
from trainers.methods.output import Output, OutputOptions
from trainers.methods.rkd import RKD, RKDOptions
from trainers.methods.scratch import Scratch, ScratchOptions
from trainers.methods.skd import SKD, SKDOptions
from trainers.methods.slkd import SLKD, SLKDOptions

__all__ = [
    "METHODS",
    "AnyMethodOptions",
    "Batch",
    "Features",
    "Method",
    "MethodOptions",
    "Network",
    "Requirements",
    "Run",
    "build",
]

AnyMethodOptions = Annotated[
    ScratchOptions
    | OutputOptions
    | FitNetOptions
    | ATOptions
    | FAKDOptions
    | RKDOptions
    | CSDOptions
    | DUKDOptions
    | FACDOptions
    | SKDOptions
    | DCKDOptions
    | SLKDOptions,
    Field(discriminator="name"),
]

METHODS: dict[str, tuple[type[MethodOptions], Any]] = {
    "scratch": (ScratchOptions, Scratch),
    "output": (OutputOptions, Output),
    "fitnet": (FitNetOptions, FitNet),
    "at": (ATOptions, AT),
    "fakd": (FAKDOptions, FAKD),
    "rkd": (RKDOptions, RKD),
    "csd": (CSDOptions, CSD),
    "dukd": (DUKDOptions, DUKD),
    "facd": (FACDOptions, FACD),
    "skd": (SKDOptions, SKD),
    "dckd": (DCKDOptions, DCKD),
    "slkd": (SLKDOptions, SLKD),
}


def build(options: MethodOptions) -> Method:
    """The method that these options describe."""
    for kind, constructor in METHODS.values():
        if isinstance(options, kind):
            method: Method = constructor(options)
            return method
    raise TypeError(f"no method takes options of type {type(options).__name__}")
