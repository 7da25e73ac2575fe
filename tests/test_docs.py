"""What README, CONTRIBUTING and docs/ show is true: examples run, commands parse, configs are valid, links and targets exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from trainers.cli import parser
from trainers.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def lines_of(page: Path, program: str) -> list[list[str]]:
    """The arguments of every line in a shell block that calls this program."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


@every_page
def test_python_examples_run(page: Path) -> None:
    names: dict[str, object] = {}  # the examples of a page follow on one another
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@every_page
def test_commands_parse(page: Path) -> None:
    for arguments in lines_of(page, "kdtrain"):
        assert parser().parse_args(arguments).run


@every_page
def test_configs_are_valid(page: Path, tmp_path: Path) -> None:
    """Whole configs as they stand, method blocks within the demo's."""
    for block in blocks(page, "yaml"):
        if "student:" in block:
            file, overrides = tmp_path / "run.yaml", []
            file.write_text(block)
        else:
            file, overrides = (
                ROOT / "trainers/recipes/demo.yaml",
                [f"method={json.dumps(yaml.safe_load(block)['method'])}"],
            )
        load_config(file, overrides)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            found = page.parent / target
            assert found.is_file() or (found.is_dir() and page.parent == ROOT), target  # mkdocs links to files alone


@every_page
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@every_page
def test_named_files_exist(page: Path) -> None:
    """Paths in backticks; those of the imagined op and of files that a run writes are no paths of ours."""
    for path in re.findall(r"`((?:kdops|csrc|trainers|tests|docs|benchmarks)/[\w./-]*)`", page.read_text()):
        if "gaussian" not in path:
            assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation
