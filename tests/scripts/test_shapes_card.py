"""``scripts/shapes_card.py``: what it writes checksums of."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize("stray", [".README.md.swp", "pipeline/weights.part", "pipeline/.config.json"])
def test_a_file_that_does_not_ship_is_named_and_gets_no_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stray: str
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    card = importlib.import_module("shapes_card")
    assert [path.name for path in card.shipped()]
    monkeypatch.setattr(card, "ASSETS", tmp_path)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "config.json").write_text("{}")
    lines = card.checksums(card.shipped())
    assert lines.endswith("  pipeline/config.json\n") and lines.count("\n") == 1
    (tmp_path / stray).write_text("x")
    with pytest.raises(SystemExit, match=stray.rpartition("/")[2]):
        card.shipped()
