"""Text from outside is shown, never obeyed: names, prompts, paths and what servers answer, on terminals and in logs."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.cli.terminal import TextConsole, print_rows, progress, say_trace
from rewards.printable import printable, printable_lines, write_out_logs

HOSTILE = "\x1b]0;owned\x07\x1b[2J[red]x[/b] :smile: \u202egnp.exe\u2066\r\n\x9b5m\ud8ff"
SHOWN = r"\x1b]0;owned\x07\x1b[2J[red]x[/b] :smile: \u202egnp.exe\u2066\r\n\x9b5m\ud8ff"  # as it is to be printed
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@given(st.text(st.characters()))
def test_what_is_printable_steers_nothing_and_stays_as_it_is(text: str) -> None:
    made = printable(text)
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in made)
    assert printable(made) == made and "\n" not in made
    assert printable_lines(text).count("\n") == text.count("\n")


@pytest.mark.parametrize("text", ["größer 大きい مرحبا", "क्‍ष می‌خواهم", "👩‍🚀 👍🏽", r"C:\x1b is no escape"])
def test_letters_of_every_script_are_printed_as_they_are(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_text_on_the_console_is_neither_markup_nor_emoji_nor_an_escape(terminal: bool) -> None:
    out = TextConsole(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    out.print(HOSTILE)
    out.out(HOSTILE)
    print_rows(out, [("ok", HOSTILE), ("fail", "/x/a[/b]c")])
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.rstrip() for line in lines] == [SHOWN, SHOWN, f"ok    {SHOWN}", "fail  /x/a[/b]c"]


def test_a_count_is_written_over_itself_on_a_terminal() -> None:
    out = TextConsole(file=io.StringIO(), force_terminal=True, width=80)
    show = progress(out, "images")
    show(1, 2)
    show(2, 2)
    assert out.file.getvalue() == "\r1/2 images\r2/2 images\n"  # type: ignore[attr-defined]


REWARD = f"""
def steers(images, prompts, metadata):
    return {{{HOSTILE.encode("utf-8", "replace").decode()!r}: [0.5] * len(images), "steers": [0.5] * len(images)}}
def raises(images, prompts, metadata):
    raise ValueError("it broke \\x1b[31m here \\u202e")
"""


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    folder = tmp_path / "pictures"
    folder.mkdir()
    name = "a\x1b[8m\u202eb[red].png"
    Image.new("RGB", (8, 8), (90, 90, 90)).save(folder / name)
    (folder / "index.json").write_text(json.dumps([{"file": name, "prompt": "a dog\x1b[1A\x1b[2K a [/cat]\u2067"}]))
    return folder


def tried(spec: str, code: int) -> str:
    """All that ``flowalign try-reward`` prints."""
    done = CliRunner().invoke(app, ["try-reward", spec, "--images", "pictures"])
    assert done.exit_code == code, done.output
    assert not STEERING.search(done.output), repr(done.output)
    return done.output


def test_names_prompts_and_scores_of_a_tried_reward_are_written_out(pictures: Path) -> None:
    said = tried("mine.py:steers", 0)
    assert r"a\x1b[8m\u202eb[red].png" in said and r"a dog\x1b[1A\x1b[2K a [/cat]\u2067" in said
    assert r"\x1b]0;owned\x07\x1b[2J[red]x[/b] :smile: \u202egnp.exe" in said


def test_what_a_reward_raises_is_written_out(pictures: Path) -> None:
    assert r"it broke \x1b[31m here \u202e" in tried("mine.py:raises", 2)


class Evil(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(200, {"name": "evil\x1b[5m", "scores": ["\x1b[31mred"], "version": 1})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(422, {"error": {"type": "InputError", "message": "no \x1b]52;c;cm0gLXJmIH4=\x07 \u202eway[/b]"}})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_what_a_reward_server_answers_is_written_out(pictures: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = tried(f"url:http://127.0.0.1:{server.server_address[1]}", 2)
    finally:
        server.shutdown()
        server.server_close()
    assert r"no \x1b]52;c;cm0gLXJmIH4=\x07 \u202eway[/b]" in said


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["plan", "/nowhere/\x1b[31m[/b]\udcff.yaml"], r"/nowhere/\x1b[31m[/b]\udcff.yaml"),
        (["plan", "no.yaml", "--\x1b[31m[/b]"], r"--\x1b[31m[/b]"),
        (["report", "/nowhere/\u202etxt[red]"], r"/nowhere/\u202etxt[red]"),
        (["export", "/nowhere/\n\nerror: all is well", "--to", "x"], "/nowhere/ error: all is well"),
        (["try-reward", "jpeg", "\x1b[31m=1", "--images", "pictures"], r"\x1b[31m"),
    ],
)
def test_words_of_the_command_line_are_written_out(pictures: Path, arguments: list[str], shown: str) -> None:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert done.exit_code == 2 and not STEERING.search(done.output), repr(done.output)
    assert shown in done.output


LOGGING = """
import logging, sys, warnings
from rewards.printable import write_out_logs
write_out_logs()
logging.getLogger("flowalign").warning("one %s line", "a\\nb\\x1b[31m")
logging.getLogger("elsewhere").warning("two\\nlines \\x1b[31m")
warnings.warn("odd \\x1b[31m file")
try:
    raise ValueError("boom \\x1b[31m")
except ValueError:
    logging.getLogger("rewards.serve").exception("failed")
"""


def test_what_loggers_and_warnings_say_is_written_out() -> None:
    done = subprocess.run([sys.executable, "-c", LOGGING], capture_output=True, text=True, timeout=60)
    said = done.stderr
    assert not STEERING.search(said), repr(said)
    assert said.startswith("one a\\nb\\x1b[31m line\ntwo\nlines \\x1b[31m\n"), said
    assert r"UserWarning: odd \x1b[31m file" in said and "\nValueError: boom \\x1b[31m\n" in said


def test_the_trace_of_a_defect_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise RuntimeError("boom \x1b[31m\n\u202eline")
    except RuntimeError as error:
        say_trace(error)
    assert capsys.readouterr().err.endswith("\nRuntimeError: boom \\x1b[31m\n\\u202eline\n")


def test_writing_logs_out_may_be_asked_twice(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        write_out_logs()
        write_out_logs()
        logging.getLogger("flowalign").warning("a\x1b")
        assert caplog.messages == [r"a\x1b"]
    finally:
        logging.setLogRecordFactory(before)
