"""`kdtrain init`: a config to start from, every key with its meaning, made from the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from trainers.config import Config
from trainers.errors import InputError
from trainers.files import replace_file
from trainers.methods import METHODS, Run
from trainers.tasks import TASKS

TEACHER = {"arch": "edsr", "features": 32, "blocks": 8, "weights": "builtin:edsr-x2"}
STUDENT = {"arch": "edsr", "features": 16, "blocks": 4}
# For tasks that keep the size of an image. There is no teacher for them in the package: the file is to be provided.
SAME_SIZE_TEACHER = {"arch": "nafnet", "width": 32, "weights": "teacher.safetensors"}
SAME_SIZE_STUDENT = {"arch": "nafnet", "width": 16, "encoder_blocks": [1, 1, 1, 2], "middle_blocks": 1}
PAIRS = {"gt": "gt", "lq": "lq"}  # for a task without a degradation of its own: folders to be provided
TRAIN = {"steps": 3000, "lr": 5.0e-4}


def schema() -> str:
    """The JSON schema of a config; editors complete and check YAML with it."""
    return json.dumps(Config.model_json_schema(), indent=1)


def write_starter(path: Path, task: str, method: str) -> None:
    """Writes a config that trains on the embedded photographs, where the task can make its inputs from them.

    Raises:
        InputError: the file exists, there is no such task or method, or the method refuses the task.
    """
    if path.exists():
        raise InputError(f"{path} exists already: give another file name")
    replace_file(path, starter(task, method).encode())


def starter(task: str, method: str) -> str:
    """The text of a config for a task and a method."""
    if method not in METHODS:
        raise InputError(f"there is no method {method}: choose one of {', '.join(METHODS)}")
    if task not in TASKS:
        raise InputError(f"there is no task {task}: choose one of {', '.join(TASKS)}")
    same_size, needs_teacher = TASKS[task].scale == 1, METHODS[method][0].needs_teacher
    student, teacher = (SAME_SIZE_STUDENT, SAME_SIZE_TEACHER) if same_size else (STUDENT, TEACHER)
    data: dict[str, Any] = {"patch": 64 if same_size else 48, "batch": 8}
    if TASKS[task].degradation is None:
        data |= {"train": PAIRS, "val": [{"name": task, **PAIRS}]}
    config = Config.model_validate(
        {
            "name": f"{method}-nafnet-{task}" if same_size else f"{method}-edsr-x2",
            "task": task,
            "data": data,
            "teacher": teacher if needs_teacher else None,
            "student": student,
            "method": {"name": method},
            "train": TRAIN,
        }
    )
    refused = config.method.refusals(Run(config.scale, config.data.patch))
    if refused:
        raise InputError([f"method {method} {text}" for _, text in refused])
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
