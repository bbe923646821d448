"""The example of ``docs/pretraining.md`` is a configuration."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from flowalign.config.training import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)[0]


def test_the_example_is_a_whole_configuration() -> None:
    config = PretrainConfig.model_validate(yaml.safe_load(EXAMPLE))
    assert config.total == 3000
