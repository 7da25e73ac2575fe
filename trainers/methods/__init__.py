"""The distillation methods, by name. To add one: write its file, then add it to the union and to the table below."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from trainers.methods.base import Batch, Features, Method, MethodOptions, Network, Requirements
from trainers.methods.facd import FACD, FACDOptions
from trainers.methods.output import Output, OutputOptions
from trainers.methods.scratch import Scratch, ScratchOptions

__all__ = [
    "METHODS",
    "AnyMethodOptions",
    "Batch",
    "Features",
    "Method",
    "MethodOptions",
    "Network",
    "Requirements",
    "build",
]

AnyMethodOptions = Annotated[ScratchOptions | OutputOptions | FACDOptions, Field(discriminator="name")]

METHODS: dict[str, tuple[type[MethodOptions], Any]] = {
    "scratch": (ScratchOptions, Scratch),
    "output": (OutputOptions, Output),
    "facd": (FACDOptions, FACD),
}


def build(options: MethodOptions) -> Method:
    """The method that these options describe."""
    for kind, constructor in METHODS.values():
        if isinstance(options, kind):
            method: Method = constructor(options)
            return method
    raise TypeError(f"no method takes options of type {type(options).__name__}")
