"""What is said of a file that is not there: the name that is."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.data.prompts import PromptsError, load_prompts
from rewards.missing import hint

NFC, NFD = unicodedata.normalize("NFC", "café.jsonl"), unicodedata.normalize("NFD", "café.jsonl")


@pytest.mark.parametrize(("there", "asked"), [(NFC, NFD), (NFD, NFC)])
def test_a_name_of_another_unicode_composition_is_written_out(there: str, asked: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("")
    if (tmp_path / asked).exists():
        pytest.skip("this file system takes both for one")
    with pytest.raises(PromptsError) as error:
        load_prompts(str(tmp_path / asked))
    said = f"did you mean {there!a}? It is written with other Unicode composition than {asked!a}"
    assert said in str(error.value)


def test_a_name_in_other_capitals_or_mistyped_is_the_one_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "Data").mkdir()
    (tmp_path / "Data" / "Prompts.JSONL").write_text("")
    assert hint(tmp_path / "Data" / "prompts.jsonl") == " (did you mean 'Prompts.JSONL'?)"
    assert hint(tmp_path / "data" / "prompts.jsonl") == " (did you mean 'Data'?)"
    assert hint(tmp_path / "Data" / "Promts.JSONL") == " (did you mean 'Prompts.JSONL'?)"
    assert hint(tmp_path / "Data" / "Promts.JSONL", typos=False) == ""
    assert hint(tmp_path / "other") == hint(tmp_path / "Data" / "Prompts.JSONL" / "x") == ""


def test_every_command_that_misses_a_file_names_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Run.yaml").write_text("")
    (tmp_path / "Pictures").mkdir()
    (tmp_path / "Mine.py").write_text("")
    for arguments in (
        ["plan", "run.yaml"],
        ["launch", "run.yaml", "--cluster", "run.yaml"],
        ["sample", "pictures", "--prompt", "a"],
        ["export", "pictures", "--to", "out"],
        ["measure", "pictures", "--reference", "pictures"],
        ["precompute", "pictures", "--to", "out", "--model", "shapes"],
        ["serve-reward", "mine.py:f"],
        ["try-reward", "jpeg", "--images", "pictures"],
    ):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 2, shown.output
        name = "Mine.py" if "mine.py:f" in arguments else "Run.yaml" if "run.yaml" in arguments else "Pictures"
        assert f"(did you mean {name!r}?)" in shown.stderr, (arguments, shown.stderr)
