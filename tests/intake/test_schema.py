"""The JSON schema of a configuration: the committed files, and what they say of shipped and of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from typer.testing import CliRunner

from flowalign.algorithms import known_algorithms
from flowalign.cli import app
from flowalign.intake.file import command_of
from flowalign.intake.schema import schema_text
from flowalign.record.yamlfiles import parse_yaml, plain, read_mapping

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCHEMAS = {name: json.loads((CONFIGS / "schema" / f"{name}.json").read_text()) for name in ("align", "pretrain")}
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "cluster")
MODELINE = "# yaml-language-server: $schema="
SMALL = "{name: a, iterations: 1, algorithm: {type: flow_grpo}, %s}"
TRAINING = "{name: a, latents: bank, algorithm: {type: rectified_flow}, %s}"


def faults(command: str, content: Any) -> list[str]:
    """Where a configuration does not fit the schema; keys are texts, as an editor has them."""
    found = Draft7Validator(SCHEMAS[command]).iter_errors(json.loads(json.dumps(content)))
    return [".".join(map(str, error.absolute_path)) for error in found]


@pytest.mark.parametrize("command", SCHEMAS)
def test_the_committed_schema_is_that_of_the_code(command: str) -> None:
    written = (CONFIGS / "schema" / f"{command}.json").read_text()
    advice = f"python -m flowalign schema {command} --to configs/schema/{command}.json"
    assert written == schema_text(command), f"it is older than the code: {advice}"
    Draft7Validator.check_schema(SCHEMAS[command])


def test_every_algorithm_is_in_the_schema_of_its_command() -> None:
    named = {
        command: schema["properties"]["algorithm"]["properties"]["type"]["anyOf"][0]["enum"]
        for command, schema in SCHEMAS.items()
    }
    assert sorted([*named["align"], *named["pretrain"]]) == known_algorithms()
    assert {"flow_grpo", "opd"} <= set(named["align"]) and {"reflow", "consistency"} <= set(named["pretrain"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_configuration_names_its_schema_and_fits_it(path: Path) -> None:
    named = [line.removeprefix(MODELINE) for line in path.read_text().splitlines() if line.startswith(MODELINE)]
    command = "align" if command_of(path) == "align" else "pretrain"
    assert [(path.parent / name).resolve() for name in named] == [CONFIGS / "schema" / f"{command}.json"]
    assert faults(command, plain(read_mapping(path))) == []


@pytest.mark.parametrize(
    ("command", "text", "where"),
    [
        ("align", SMALL % "learner: {micro_batchsize: 8}", "learner"),
        ("align", SMALL % "seed: -1", "seed"),
        ("align", "{name: a, iterations: 1, algorithm: {type: flow_grpo, group_size: 1}}", "algorithm.group_size"),
        ("align", "{name: a, iterations: 1, algorithm: {type: flow_gpro}}", "algorithm.type"),
        ("align", "{name: a, iterations: 1, algorithm: {type: nft, clip_range: 1}}", "algorithm"),
        ("align", SMALL % "latents: bank", ""),
        ("align", SMALL % "rewards: [{weight: 1}]", "rewards"),
        ("pretrain", TRAINING % "phases: [{iterations: 3}]", "phases"),
        ("pretrain", TRAINING % "rewards: [geneval]", ""),
    ],
)
def test_what_is_wrong_is_underlined_where_it_stands(command: str, text: str, where: str) -> None:
    assert faults(command, plain(parse_yaml(text, "it"))) == [where]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("align", SMALL % "rewards: geneval"),
        ("align", SMALL % "rewards: {spec: jpeg, weight: 0.5}"),
        ("align", SMALL % "model: null, data: {sizes: 64x96}"),
        ("align", SMALL % "checkpoint: {resume: 20}"),
        ("align", "{name: a, iterations: 1, algorithm: {type: flow_grpo, clip_range: {low: 1e-4, high: 2e-4}}}"),
        ("align", "{name: a, iterations: 1, algorithm: {type: my_algorithm.py, depth: 3}}"),
        ("pretrain", TRAINING % "phases: [{iterations: 3, learning_rate: 1e-3, max_sequence_lengths: {2: 1}}]"),
    ],
)
def test_what_a_configuration_may_be_short_for_fits(command: str, text: str) -> None:
    assert faults(command, plain(parse_yaml(text, "it"))) == []


def test_the_command_prints_it_or_writes_it(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["schema", "distill"])
    assert shown.exit_code == 0 and shown.stdout == (CONFIGS / "schema" / "pretrain.json").read_text()
    file = tmp_path / "align.json"
    assert CliRunner().invoke(app, ["schema", "--to", str(file)]).exit_code == 0
    assert json.loads(file.read_text()) == SCHEMAS["align"]
    assert "is a directory; name a file" in CliRunner().invoke(app, ["schema", "--to", str(tmp_path)]).stderr
