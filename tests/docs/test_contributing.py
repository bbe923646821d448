"""What a contributor reads first: links and files that exist, hooks that are CI's, forms of GitHub's, a citation."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import flowalign
from scripts.key_tables import slug

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_links_of_the_page_lead_to_a_heading() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", PAGE)
    assert len(links) >= 7
    for file, anchor in links:
        text = (ROOT / file).read_text(encoding="utf-8")
        headings = {slug(line) for line in re.findall(r"^#+ .+$", text, re.M)}
        assert not anchor or anchor in headings, f"{file}#{anchor}"


def test_files_and_folders_of_the_page_are_there() -> None:
    named = set(re.findall(r"`((?:flowalign|rewards|tests|scripts|docs)/[\w/.]*?)`", PAGE))
    assert len(named) >= 8
    assert not [name for name in named if "foo" not in name and not (ROOT / name).exists()]
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            assert all((ROOT / word).exists() for word in words if word.startswith(("scripts/", "tests/", ".ci/")))


def test_it_tells_how_to_add_each_of_three_and_how_tests_are_run() -> None:
    headings = re.findall(r"^## (.+)$", PAGE, re.M)
    assert {"An algorithm", "A reward", "A model family", "Tests"} <= set(headings)


def test_a_hook_runs_what_ci_runs_by_a_tool_of_the_extra_dev() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # no tool of another version, and no network
    ci = (ROOT / ".ci" / "run").read_text()
    hooks = {hook["id"]: hook["entry"].split() for hook in repository["hooks"]}
    assert all(entry[0].startswith(".venv/bin/") for entry in hooks.values())
    for name, command in {
        "ruff-check": "ruff check",
        "ruff-format": "ruff format",
        "import-linter": "lint-imports",
    }.items():
        assert f"step {command}" in ci and " ".join(hooks[name]).startswith(f".venv/bin/{command}")
    tools = " ".join(PROJECT["project"]["optional-dependencies"]["dev"])
    assert all(tool in tools for tool in ("ruff", "import-linter", "hadolint"))
    assert all((ROOT / f"{part}.py").is_file() for part in ("scripts/key_tables",))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_asks_of_one(path: Path) -> None:
    form = read(path)
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "title", "labels", "body"}
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(set(ids)) == len(ids) >= 1
    for part in form["body"]:
        assert part["type"] in KINDS
        attributes = part["attributes"]
        assert "value" in attributes if part["type"] == "markdown" else "label" in attributes
        if part["type"] in ("dropdown", "checkboxes"):
            assert attributes["options"]


def test_figures_are_asked_for_by_the_title_that_the_page_of_models_names() -> None:
    form = read(ROOT / ".github" / "ISSUE_TEMPLATE" / "figures.yml")
    models = " ".join((ROOT / "docs" / "models.md").read_text().split())
    assert f"an issue with the title `{form['title']}`" in models


def test_the_citation_is_of_this_version_and_licence() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == flowalign.__version__.partition(".dev")[0]
    assert citation["license"] == PROJECT["project"]["license"]
    assert all({"name"} == author.keys() for author in citation["authors"])
