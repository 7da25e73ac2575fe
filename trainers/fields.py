"""What the sections of a config are made of: the strict base class, paths, loss weights, spans of random numbers."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from trainers.errors import InputError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
PHOTOS = "photos"
BUILTIN = "builtin:"
TEACHER = "teacher"


class Section(BaseModel):
    """A block of the config: an unknown key is an error, nothing is converted (1.0 is no integer), values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def absolute(value: str, base: str) -> str:
    """A path of a config that is relative to the folder `base`; names of ours stay."""
    if value in (PHOTOS, TEACHER) or value.startswith(BUILTIN):
        return value
    return os.path.abspath(os.path.join(base, os.path.expanduser(value)))


def base_folder(info: ValidationInfo) -> str:
    """The folder of the YAML file that is being read."""
    return str((info.context or {}).get("base", ""))


def _absolute(value: str, info: ValidationInfo) -> str:
    return absolute(value, base_folder(info))


# A file or folder. A relative path is relative to the YAML file; `photos`, `teacher` and `builtin:...` are names of ours and stay.
PathText = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]


def parse_bytes(text: str) -> int:
    """8GiB, 512M, 2e9 -> bytes; G and GiB are both 2^30.

    Raises:
        InputError: not a size.
    """
    found = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:e\d{1,2})?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = 0 if found is None else int(float(found[1]) * UNITS[found[2].upper()])
    if size < 1:
        raise InputError(f"{text}: give a size such as 8GiB or 512MiB")
    return size


def _is_size(value: str) -> str:
    try:
        parse_bytes(value)
    except InputError as error:
        raise ValueError(str(error)) from None
    return value


# A number of bytes, such as 20GiB.
SizeText = Annotated[str, AfterValidator(_is_size)]


def _shape(value: Any) -> str:
    if isinstance(value, (dict, BaseModel)):
        return "mapping"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "list"
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else "neither"


def shape_of(expected: str) -> Discriminator:
    """Chooses a union's member by what was written (mapping, number, list or text), so that one mistake gives one message."""
    return Discriminator(_shape, custom_error_type="wrong_shape", custom_error_message=f"must be {expected}")


class Fixed(Section):
    """A weight that is a number, reached by a linear ramp."""

    value: float = Field(ge=0)
    """The factor on the loss term."""
    ramp: int = Field(default=0, ge=0)
    """Steps in which the weight grows linearly from 0; 0 = the full weight from the first step."""
    final: float = Field(default=0.0, ge=0)
    """The factor after `decay` steps, which must be given with it."""
    decay: int = Field(default=0, ge=0)
    """Steps in which the factor goes linearly from value to final; 0 = it stays."""

    @model_validator(mode="after")
    def _final_needs_decay(self) -> Fixed:
        forgotten = (
            "final" in self.model_fields_set and "decay" not in self.model_fields_set
        )  # final: 0 is forgotten too
        if forgotten or (self.final and not self.decay):
            raise ValueError(f"final: {self.final:g} is reached after `decay` steps: give decay, or leave out final")
        return self


class Share(Section):
    """A weight that keeps the term's gradient at a fixed share of the pixel term's gradient."""

    share: float = Field(gt=0)
    """Norm of the weighted term's gradient over the student's parameters, divided by that of the weighted pixel term."""
    ramp: int = Field(default=0, ge=0)
    """Steps in which the share grows linearly from 0; 0 = the full share from the first step."""


def _weight_kind(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "share" if isinstance(value, Share) else "fixed"
    if isinstance(value, dict):
        return "fixed" if "value" in value else "share"
    return _shape(value)


Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[Fixed, Tag("fixed")] | Annotated[Share, Tag("share")],
    Discriminator(
        _weight_kind,
        custom_error_type="wrong_shape",
        custom_error_message="must be a number, {value: number, ramp: steps} or {share: number, ramp: steps}",
    ),
]

Auto = Annotated[Literal["auto"], Tag("text")]


def _in_order(span: float | list[float]) -> float | list[float]:
    if isinstance(span, list) and span[0] > span[1]:
        raise ValueError(f"the least comes first: write [{span[1]:g}, {span[0]:g}]")
    return span


# A fixed number, or the two ends of a uniform distribution.
Span = Annotated[
    Annotated[float, Tag("number")] | Annotated[list[float], Field(min_length=2, max_length=2), Tag("list")],
    shape_of("a number or [least, most]"),
    AfterValidator(_in_order),
]


def within(least: float, largest: float) -> AfterValidator:
    """Bounds of a number, or of both ends of a span; what is not finite lies in none."""

    def bounded(span: float | list[float]) -> float | list[float]:
        if not all(least <= number <= largest for number in (span if isinstance(span, list) else [span])):
            raise PydanticCustomError("out_of_bounds", f"must be from {least:g} to {largest:g}")
        return span

    return AfterValidator(bounded)


def most(span: float | list[float]) -> float:
    """The largest number that a span can give."""
    return span[1] if isinstance(span, list) else span


def draw(
    span: float | list[float], random: np.random.Generator, shape: tuple[int, ...] = ()
) -> npt.NDArray[np.float64]:
    """Uniform numbers of the span, in an array of this shape."""
    least = span[0] if isinstance(span, list) else span
    return random.uniform(least, most(span), shape)
