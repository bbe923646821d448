"""``docs/pretraining.md`` says what is: its keys and defaults are the code's, its example is a configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowalign.config.training import PretrainConfig, ValidationConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `")]
EXAMPLE = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)[0]


def test_every_key_of_a_training_run_is_on_the_page() -> None:
    named = {name.split(".")[0] for row in ROWS for name in re.findall(r"`([^`]+)`", row[0])}
    named |= set(yaml.safe_load(EXAMPLE))
    assert not set(PretrainConfig.model_fields) - named


def defaults() -> list[tuple[str, Any]]:
    """Keys and default of each row of the second table, a value for each key."""
    begin = PAGE.index("The other keys")
    lines = PAGE[begin:].split("\n\n")[1].splitlines()[2:]
    found = []
    for line in lines:
        keys, values = (re.findall(r"`([^`]*)`", cell) for cell in line.split("|")[1:3])
        found += list(zip(keys, values, strict=True)) if values else []
    return found


@pytest.mark.parametrize(("key", "written"), defaults())
def test_defaults_of_the_page_are_the_codes(key: str, written: str) -> None:
    default = PretrainConfig.model_fields[key].get_default(call_default_factory=True)
    assert json.loads(json.dumps(default)) == yaml.safe_load(written)


def test_the_validations_numbers_are_the_codes() -> None:
    own = {key: ValidationConfig.model_fields[key].default for key in ("every", "num_samples", "num_times")}
    assert own == {"every": 500, "num_samples": 512, "num_times": 8}
    assert all(f"`{key}` ({value}" in PAGE for key, value in own.items())


def test_the_example_is_a_whole_configuration() -> None:
    config = PretrainConfig.model_validate(yaml.safe_load(EXAMPLE))
    assert config.phases[0].steps == 3000
