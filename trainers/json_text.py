"""JSON as its standard has it: without the infinite PSNR of equal images, and without NaN. Both are written as null."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """The text; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def from_json(text: str) -> Any:
    """The value; scores get back the numbers that became null: an infinite PSNR, whose SSIM is a number, else NaN.

    Raises:
        ValueError: it is no JSON.
    """
    return json.loads(text, object_hook=_score)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _score(found: dict[str, Any]) -> dict[str, Any]:
    if found.get("psnr", 0) is None:
        found["psnr"] = math.nan if found.get("ssim", 1) is None else math.inf
    if found.get("ssim", 0) is None:
        found["ssim"] = math.nan
    return found
