"""Reads a config: YAML, then `--set` overrides, then the schema; every problem at once, with its place and a near name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from trainers.architectures import untold
from trainers.config import Config, contradictions
from trainers.errors import InputError
from trainers.methods import METHODS
from trainers.results import flat

Key = tuple[str | int, ...]


@dataclass
class Reading:
    """What came of reading a config."""

    config: Config | None = None
    """The config; where there are problems, what is left of it without the faulty keys, if that is a config at all."""
    problems: list[str] = field(default_factory=list)
    """Everything wrong, one message each."""
    notes: list[str] = field(default_factory=list)
    """What an override did besides setting its key."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file with `a.b=c` overrides.

    Raises:
        InputError: with every problem.
    """
    reading = read_config(path, overrides)
    if reading.config is None or reading.problems:
        raise InputError(reading.problems)
    return reading.config


def dump_config(config: Config) -> str:
    """The whole config as YAML; reading it back gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changes(before: Config, after: Config) -> list[str]:
    """What differs between two configs: `train.lr: 0.001 -> 0.0001`."""
    old, new = (flat(config.model_dump(mode="json")) for config in (before, after))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


def read_config(path: Path, overrides: Sequence[str] = ()) -> Reading:
    """Reads as far as possible: what is faulty is reported and left out, so that the rest can be checked in the same run."""
    source = Source(path)
    reading = Reading(problems=source.problems)
    if source.problems:
        return reading
    tree = source.override(overrides, reading)
    reported: set[Key] = set()
    while reading.config is None:
        try:
            reading.config = Config.model_validate(tree, context={"base": str(path.resolve().parent)})
        except ValidationError as error:
            faults = [source.fault(detail, tree) for detail in error.errors(include_url=False)]
            # A faulty key that has been left out may be missed in the next round: that is not said again.
            reading.problems += [source.say(key, message) for key, message in faults if key not in reported]
            reported |= {key for key, _ in faults}
            removed = [_remove(tree, key) for key, _ in faults]
            if not any(removed):
                return reading
    for dotted, message in contradictions(reading.config):
        reading.problems.append(source.say(tuple(dotted.split(".")), message))
    return reading


class Source:
    """A YAML file, with the place of every key, and the overrides put on top of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.overridden: dict[Key, str] = {}
        self.root: yaml.Node | None = None
        self.loaded: Any = None  # OmegaConf's tree
        try:
            text = path.read_text(encoding="utf-8")
            self.root = yaml.compose(text, Loader=yaml.SafeLoader)
            self.loaded = OmegaConf.create(text)
        except OSError as error:
            self.problems.append(f"{path}: cannot be read ({error.strerror}); write one with kdtrain init")
        except UnicodeDecodeError:
            self.problems.append(f"{path}: is no UTF-8 text")
        except yaml.reader.ReaderError as error:  # a control character, refused before anything is parsed
            line = text.count("\n", 0, error.position) + 1
            self.problems.append(f"{path}:{line}: not valid YAML: the character {chr(error.character)!r}: remove it")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
            self.problems.append(f"{path}{where}: not valid YAML: {error.problem}")
        else:
            if not isinstance(self.root, yaml.MappingNode):
                self.problems.append(f"{path}: must hold keys and values (name: ..., student: ...); see kdtrain init")

    def override(self, overrides: Iterable[str], reading: Reading) -> dict[str, Any]:
        """The file's tree with the overrides, as plain values; what cannot be applied becomes a problem."""
        for text in overrides:
            dotted, equals, value = text.partition("=")
            if not equals or not dotted:
                reading.problems.append(f"--set {text}: write it as --set key.of.the.config=value")
                continue
            try:
                written: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
                parsed = written["value"]
                if dotted == "method.name":
                    self._change_method(str(parsed), reading)
                OmegaConf.update(self.loaded, dotted, parsed, merge=False, force_add=True)
            except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
                reading.problems.append(f"--set {text}: {str(error).splitlines()[0]}")
                continue
            key = tuple(
                int(part) if part.isdigit() else part for part in dotted.replace("[", ".").replace("]", "").split(".")
            )
            self.overridden[key] = f"--set {text}"
        try:
            tree: dict[str, Any] = OmegaConf.to_container(self.loaded, resolve=True)  # type: ignore[assignment]  # checked above
        except OmegaConfBaseException as error:
            reading.problems.append(f"{self.path}: {str(error).splitlines()[0]}")
            tree = OmegaConf.to_container(self.loaded, resolve=False)  # type: ignore[assignment]
        return tree

    def _change_method(self, name: str, reading: Reading) -> None:
        """Another method has other keys: those of the file's block that it does not know are dropped, and that is said."""
        block = self.loaded.get("method")
        if not OmegaConf.is_dict(block) or block.get("name") == name or name not in METHODS:
            return
        known = METHODS[name][0].model_fields
        dropped = [str(key) for key in block if key not in known]
        weights = block.get("weights")
        if OmegaConf.is_dict(weights):
            terms = type(METHODS[name][0].model_validate({"name": name}).weights).model_fields  # type: ignore[attr-defined]
            dropped += [f"weights.{key}" for key in weights if key not in terms]
        for key in dropped:
            parent, _, last = key.rpartition(".")
            del (block[parent] if parent else block)[last]
        if dropped:
            reading.notes.append(f"method {name} has no {', '.join(dropped)}: dropped from the file's method block")

    def fault(self, detail: ErrorDetails, tree: Any) -> tuple[Key, str]:
        """The key that a pydantic error is about, and the error in our words."""
        location, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
        key = _without_tags(location, tree)
        if kind == "extra_forbidden":
            return key, f"unknown key; {_near(str(location[-1]), _names(Config, location[:-1]))}"
        if kind == "missing":
            return (*key, location[-1]), "is missing"
        if kind == "union_tag_not_found":
            tag = context["discriminator"].strip("'")
            return (*key, tag), "is missing" + (self._why_untold(key, tree) if tag == "arch" else "")
        if kind == "union_tag_invalid":
            known = context["expected_tags"].replace("'", "").split(", ")
            return (
                *key,
                context["discriminator"].strip("'"),
            ), f"there is no {context['tag']}; {_near(context['tag'], known)}"
        return key, f"{detail['msg']}, but is {detail['input']!r}"

    def _why_untold(self, key: Key, tree: Any) -> str:
        """What is wrong with the weights of a network's block, which could have told its arch."""
        for part in key:
            tree = tree[part]
        reason = untold(tree, str(self.path.resolve().parent))
        return f", and its weights do not tell it: {reason}" if reason else ""

    def say(self, key: Key, message: str) -> str:
        """The message with its key and its place: file:line:column, or the override that set it."""
        dotted = ".".join(str(part) for part in key)
        for overridden, text in reversed(self.overridden.items()):
            shared = min(len(key), len(overridden))
            if key[:shared] == overridden[:shared]:  # it set this key, a part of it, or what it stands in
                return f"{text}: {dotted}: {message}"
        line, column = self.place(key)
        return f"{self.path}:{line}:{column}: {dotted}: {message}"

    def place(self, key: Key) -> tuple[int, int]:
        """Line and column, from 1, of a key, or of its nearest parent that is written in the file."""
        node = self.root
        assert node is not None  # a file that does not parse has no keys to look for
        mark = node.start_mark
        for part in key:
            if isinstance(node, yaml.MappingNode):
                found = [(name, value) for name, value in node.value if name.value == str(part)]
                if not found:
                    break
                mark, node = found[-1][0].start_mark, found[-1][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                mark = node.start_mark
            else:
                break
        return mark.line + 1, mark.column + 1


def _near(wrong: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def _without_tags(location: tuple[str | int, ...], tree: Any) -> Key:
    """A pydantic location as a key of the tree: the names of union members, which nobody wrote, are left out."""
    key: list[str | int] = []
    for part in location:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            continue
        key.append(part)
    return tuple(key)


def _remove(tree: Any, key: Key) -> bool:
    """Deletes a key of the tree; False if it is not there."""
    parent: Any = tree
    for part in key[:-1]:
        parent = parent[part]
    if not key or not isinstance(parent, dict) or key[-1] not in parent:
        return False
    del parent[key[-1]]
    return True


def _names(annotation: Any, location: Sequence[str | int]) -> list[str]:
    """The keys that a block of the config knows: follows a pydantic location, tags of unions included, down the schema."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        if not location:
            return list(fields)
        first, rest = location[0], location[1:]
        if first in fields:
            return _names(fields[str(first)].annotation, rest)
        return _names(annotation, rest)  # the tag of a union member that has been chosen already
    origin = get_origin(annotation)
    if origin is Annotated:
        return _names(get_args(annotation)[0], location)
    if origin in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if location and len(members) > 1:
            tagged = [member for member in members if _has_tag(member, str(location[0]))]
            return _names(tagged[0], location[1:]) if tagged else []
        return _names(members[0], location)
    if origin is list:
        return _names(get_args(annotation)[0], location[1:])
    return []


def _has_tag(member: Any, tag: str) -> bool:
    if get_origin(member) is Annotated:
        return any(isinstance(extra, Tag) and extra.tag == tag for extra in get_args(member)[1:])
    return any(
        tag in get_args(member.model_fields[name].annotation)
        for name in ("name", "arch")
        if name in member.model_fields
    )
