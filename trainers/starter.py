"""`kdtrain init`: a config to start from, every key with its meaning, made from the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from trainers.config import Config, Data
from trainers.errors import InputError
from trainers.methods import METHODS

TEACHER = {"arch": "edsr", "features": 32, "blocks": 8, "weights": "builtin:edsr-x2"}
STUDENT = {"arch": "edsr", "features": 16, "blocks": 4}
TRAIN = {"steps": 3000, "lr": 5.0e-4}


def schema() -> str:
    """The JSON schema of a config; editors complete and check YAML with it."""
    return json.dumps(Config.model_json_schema(), indent=1)


def write_starter(path: Path, task: str, method: str) -> None:
    """Writes a config that trains on the embedded photographs.

    Raises:
        InputError: the file exists, or there is no such method.
    """
    if path.exists():
        raise InputError(f"{path} exists already: give another file name")
    path.write_text(starter(task, method), encoding="utf-8")


def starter(task: str, method: str) -> str:
    """The text of a config for a task and a method."""
    if method not in METHODS:
        raise InputError(f"there is no method {method}: choose one of {', '.join(METHODS)}")
    needs_teacher = METHODS[method][0].needs_teacher
    config = Config.model_validate(
        {
            "name": f"{method}-edsr-x2",
            "task": task,
            "data": Data(patch=48, batch=8).model_dump(),
            "teacher": TEACHER if needs_teacher else None,
            "student": STUDENT,
            "method": {"name": method},
            "train": TRAIN,
        }
    )
    return "\n".join(["# kdtrain check FILE, then kdtrain train FILE", *_lines(config, "")]) + "\n"


def _lines(section: BaseModel, indent: str) -> Iterator[str]:
    """A section as YAML, each key under a comment with its description."""
    fields = type(section).model_fields
    for name in sorted(fields, key=lambda name: name not in ("name", "arch")):  # what a block is comes first
        if indent and name == "scale":
            continue  # a network has the run's
        value = getattr(section, name)
        yield f"{indent}# {fields[name].description}"
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {_inline(value)}"


def _inline(value: Any) -> str:
    if isinstance(value, list):
        value = [entry.model_dump(mode="json") if isinstance(entry, BaseModel) else entry for entry in value]
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")
