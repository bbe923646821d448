"""Parts that no reward has, or nothing could train on, are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowalign.config.section import ConfigError
from flowalign.intake.file import load_align
from tests.tiny import write_config

CODE = "def mine(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"


def loaded(folder: Path, *overrides: str):
    (folder / "r.py").write_text(CODE)
    return load_align(write_config(folder), overrides).config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rewards=[{spec: geneval, parts: {geneval_colours: 1}}]"], r"rewards\.0\.parts: geneval with these"),
        (["rewards=[{spec: geneval, parts: {geneval_colors: 1}}]"], r"rewards\.0\.parts: .*answers geneval, geneval_s"),
        (["rewards=[{spec: geneval, parts: {geneval: 1}}]"], r"rewards\.0\.parts: geneval is the main score"),
        (
            ["rewards=[{spec: jpeg}, {spec: geneval, gold: true, parts: {geneval_strict: 1}}]"],
            r"rewards\.1\.parts: nothing of a gold reward",
        ),
        (["rewards=[{spec: geneval, weight: 0, parts: {geneval_strict: 0}}]"], "rewards: none is trained on"),
        (["rewards=[{spec: geneval, options: {clauses: 1}}]"], r"rewards\.0: geneval: clauses is 1; write true or"),
        (
            ["rewards=[{spec: geneval, parts: {mine: 1}}, {spec: 'r.py:mine'}]"],
            r"rewards\.0\.parts: geneval with these options answers no 'mine'",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_key_and_a_reason(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, *overrides)


def test_parts_of_code_whose_answers_nobody_knows_yet_may_have_any_name_but_another_s(tmp_path: Path) -> None:
    own = loaded(tmp_path, "rewards=[{spec: 'r.py:mine', parts: {sky: 0.5}}]").rewards[0]
    assert own.terms == {"mine": 1.0, "sky": 0.5}
    with pytest.raises(ConfigError, match=r"rewards: .*'jpeg'.*'mine'|rewards: .*'mine'.*'jpeg'"):
        loaded(tmp_path, "rewards=[{spec: 'r.py:mine', parts: {jpeg: 1}}, {spec: jpeg}]")
