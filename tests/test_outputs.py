"""Directories that exports and merges write to: what may be replaced, and what never is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowalign.outputs import RECORD, DirectoryTaken, check_place, take_place


def exported(to: Path, files: tuple[str, ...] = ("vae/config.json",), **record: object) -> Path:
    """An export of ``files``, in the place of an earlier one."""
    draft = to.parent / ".tmp-draft"
    for file in files:
        (draft / file).parent.mkdir(parents=True, exist_ok=True)
        (draft / file).write_text(file)
    take_place(draft, to, {"kind": "ema", "checkpoint": "run/checkpoints/step_000004", **record})
    return to


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_or_empty_directory_is_free(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "deep/new"):
        check_place(tmp_path / name, overwrite)


def test_a_file_is_no_directory_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DirectoryTaken, match="is no earlier export"):
        check_place(tmp_path / "file", True)


def test_an_earlier_export_is_named_and_replaced_when_asked(tmp_path: Path) -> None:
    to = exported(tmp_path / "out")
    with pytest.raises(
        DirectoryTaken, match=r"holds an export \(ema\) of run/checkpoints/step_000004; give --overwrite"
    ):
        check_place(to, False)
    check_place(to, True)
    exported(to, ("transformer/config.json",))
    assert sorted(json.loads((to / RECORD).read_text())["files"]) == [RECORD, "transformer/config.json"]
    assert not (to / "vae").exists() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("stranger", ["notes.txt", "vae/notes.txt", "samples/0000.png", ".hidden"])
def test_a_strangers_file_is_never_deleted(tmp_path: Path, stranger: str) -> None:
    to = exported(tmp_path / "out")
    (to / stranger).parent.mkdir(exist_ok=True)
    (to / stranger).write_text("mine")
    with pytest.raises(DirectoryTaken, match=rf"holds 1 file that no export wrote, first {stranger}"):
        check_place(to, True)
    assert (to / stranger).read_text() == "mine"


def test_an_export_of_an_older_version_which_lists_no_files_is_known_by_its_layout(tmp_path: Path) -> None:
    to = exported(tmp_path / "out", ("vae/config.json", "text_encoder_2/model.safetensors", "README.md"))
    record = json.loads((to / RECORD).read_text())
    del record["files"]
    (to / RECORD).write_text(json.dumps(record))
    check_place(to, True)
    (to / "thesis.tex").write_text("mine")
    with pytest.raises(DirectoryTaken, match=r"first thesis\.tex"):
        check_place(to, True)


@pytest.mark.parametrize("content", ["", "[1, 2]", "{"])
def test_a_record_that_cannot_be_read_marks_no_export(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(DirectoryTaken, match="is no record of an export"):
        check_place(tmp_path, True)
