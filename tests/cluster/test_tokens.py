"""The file in which Ray keeps a token."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from flowalign.cluster.tokens import close_token_file, own_token


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    file = tmp_path / ".ray" / "auth_token"
    file.write_text("secret")
    file.chmod(0o644)
    return file


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_token_that_others_may_read_is_closed_to_them(file: Path) -> None:
    close_token_file()
    assert mode(file) == 0o600 and own_token() == "secret"


def test_a_token_file_that_is_named_is_closed_too_and_no_wider_than_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    file.chmod(0o440)
    close_token_file()
    assert mode(file) == 0o400


@pytest.mark.parametrize("what", ["nothing", "link", "pipe", "directory"])
def test_what_is_no_token_file_of_this_users_is_let_alone(file: Path, tmp_path: Path, what: str) -> None:
    other = tmp_path / "other"
    other.write_text("secret")
    other.chmod(0o644)
    file.unlink()
    if what == "link":
        file.symlink_to(other)
    elif what == "pipe":
        os.mkfifo(file, 0o644)
    elif what == "directory":
        file.mkdir(0o755)
    close_token_file()
    assert mode(other) == 0o644
    assert what in ("nothing", "link") or mode(file) in (0o644, 0o755)
