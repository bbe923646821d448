"""Directories that exports and merges write to: what may be replaced, and what never is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.record.outputs import RECORD, DirectoryTaken, check_file, check_place, take_place, unwritable


def exported(to: Path, files: tuple[str, ...] = ("vae/config.json",), **record: object) -> Path:
    """An export of ``files``, in the place of an earlier one."""
    draft = to.parent / ".tmp-draft"
    for file in files:
        (draft / file).parent.mkdir(parents=True, exist_ok=True)
        (draft / file).write_text(file)
    take_place(draft, to, {"kind": "ema", "checkpoint": "run/checkpoints/step_000004", **record})
    return to


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file", "file is not a directory"),
        ("file/x/y", "file is not a directory"),
        ("gone", "gone is a link to nothing"),
        ("gone/x", "gone is a link to nothing"),
        ("new/" + "n" * 300, "nnn… is a name of more than 255 bytes"),
        ("a\0b", "no file can have this name"),
        ("\ud800", "no file can have this name"),
        ("/dev/null/x", "/dev/null is not a directory"),
        ("new/deep", None),
    ],
)
def test_where_nothing_can_be_written_is_known_before_anything_is(tmp_path: Path, name: str, why: str | None) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gone").symlink_to("nowhere")
    found = unwritable(tmp_path / name)
    assert found is None if why is None else found is not None and why in found
    assert not (tmp_path / "new").exists()
    if why is not None:
        with pytest.raises(DirectoryTaken, match=r"cannot be written|exists and is no earlier"):
            check_place(tmp_path / name, True)
        with pytest.raises(ConfigError, match=r"^--to: "):
            check_file("--to", tmp_path / name / "file")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("evaluate shapes", "--out"),
        ("sample shapes --prompt a", "--out"),
        ("export runs/x", "--to"),
        ("merge shapes shapes", "--to"),
        ("precompute pictures --model shapes", "--to"),
        ("caption pictures --url http://127.0.0.1:1/v1 --model vlm", "--to"),
        ("make-pairs shapes", "--to"),
        ("make-preferences shapes --reward jpeg", "--out"),
        ("calibrate-cache shapes", "--to"),
    ],
)
def test_a_command_that_could_not_leave_its_files_does_no_work(tmp_path: Path, command: str, option: str) -> None:
    (tmp_path / "file").write_text("mine")
    shown = CliRunner().invoke(app, [*command.split(), option, str(tmp_path / "file" / "x")])
    assert shown.exit_code == 2, shown.output
    assert "file is not a directory); name another " in " ".join(shown.stderr.split())


def test_a_link_to_an_earlier_export_is_replaced_and_what_it_led_to_is_left_alone(tmp_path: Path) -> None:
    exported(tmp_path / "elsewhere")
    (tmp_path / "out").symlink_to("elsewhere")
    to = exported(tmp_path / "out", ("transformer/config.json",))
    assert not to.is_symlink() and (to / "transformer").is_dir()
    assert (tmp_path / "elsewhere" / "vae").is_dir() and not list(tmp_path.glob(".tmp-*"))


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
