"""The tables of keys in ``docs/`` are what the code says, and every key says something."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from flowalign.algorithms import algorithm_class, known_algorithms
from flowalign.config.alignment import AlignConfig
from flowalign.config.training import PretrainConfig
from scripts import key_tables

PAGES = {path.name: path.read_text(encoding="utf-8") for path in key_tables.DOCS.glob("*.md")}
TABLES = set(key_tables.found_in(PAGES).values())
WHOLE = (AlignConfig, PretrainConfig, *(algorithm_class(name).Config for name in known_algorithms()))


def test_the_tables_of_the_pages_are_those_of_the_code() -> None:
    for name, made in key_tables.filled(PAGES).items():
        assert made == PAGES[name], f"docs/{name} is older than the code: python -m scripts.key_tables"


@pytest.mark.parametrize("section", WHOLE, ids=lambda section: section.__module__.rpartition(".")[2])
def test_every_configuration_and_every_algorithm_has_a_table(section: type[BaseModel]) -> None:
    assert section in TABLES


def lacking(schema: dict[str, Any]) -> list[str]:
    return [name for name, key in schema.get("properties", {}).items() if name != "type" and "description" not in key]


@pytest.mark.parametrize("section", WHOLE, ids=lambda section: section.__module__.rpartition(".")[2])
def test_every_key_says_what_it_is_in_the_schema_too(section: type[BaseModel]) -> None:
    schema = section.model_json_schema()
    silent = {name: lacking(inner) for name, inner in {"": schema, **schema.get("$defs", {})}.items()}
    assert not {name: keys for name, keys in silent.items() if keys}


def test_a_key_says_what_it_takes_in_words() -> None:
    said = {row.key: row.takes for section in (AlignConfig, PretrainConfig) for row in key_tables.rows(section, {})}
    assert said["learner.ranks"] == "whole number, 1 or more"
    assert said["model.lora"] == "section, or null"
    assert said["learner.optimizer.betas"] == "list of 2: number from 0 to below 1"
    assert said["evaluation.weights"] == "`model` or `ema`"
    assert said["data.task_weights"] == "mapping of text to whole number from 0 to 1000"
