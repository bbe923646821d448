"""What rewards answer goes through a real run to its page, and stays text there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from tests.fault.test_bad_input import written
from tests.fault.victim import content
from tests.report.test_hostile_pages import PAYLOADS, Elements, browser, title
from tests.report.test_report import Page, write_samples
from tests.rewards.conftest import Server

OURS, THEIRS, SCRIPT = PAYLOADS[0], PAYLOADS[1], PAYLOADS[2]
REWARD = """
def hostile(images, prompts, metadata, name, keys):
    bright = images.reshape(len(images), -1).mean(1) / 255.0
    return {key: bright for key in [name, *keys]}
"""
ALGORITHM = {"type": "flow_grpo", "group_size": 2, "num_steps": 2}


@pytest.fixture(scope="module")
def run(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two iterations whose rewards, of a file and of a server, answer keys of their own."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile.py").write_text(REWARD)
    spec = f"{folder / 'hostile.py'}:hostile"
    server = Server(spec, "name=theirs", f"keys={json.dumps([THEIRS, SCRIPT])}")
    try:
        rewards = [
            {"spec": spec, "name": "ours", "options": {"name": "ours", "keys": [OURS]}},
            {"spec": f"url:{server.url}", "name": "theirs"},
        ]
        own = content("r", folder, tiny_pipeline_dir, algorithm=ALGORITHM, rewards=rewards, iterations=2)
        done = CliRunner().invoke(app, ["align", str(written(own))])
        assert done.exit_code == 0, done.output
    finally:
        server.kill()
    yield folder / "runs" / "r"


def test_keys_that_rewards_answer_are_text_on_the_page_of_a_run(run: Path) -> None:
    page = Page(run / "report.html")
    found = Elements(page.source)
    for key in (OURS, THEIRS, SCRIPT):
        assert key[:50] in page.text, key  # longer ones are cut
        assert any(key[:50] in label for label in found.labels), key
    assert not found.tags & {"script", "iframe"} and not [name for name in found.attributes if name.startswith("on")]


@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
def test_a_real_browser_runs_nothing_of_what_rewards_answered_a_run(run: Path, tmp_path: Path) -> None:
    assert title(run / "report.html", tmp_path) == "r · flowalign report"


def test_the_command_report_shows_nothing_that_lies_outside_of_its_run(run: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "elsewhere", 0, [1.0])
    write_samples(run, 1, [1.0, 1.0])
    folder = run / "samples" / "iteration_000001"
    outside = tmp_path / "elsewhere" / "samples" / "iteration_000000" / "0000.png"
    (folder / "0001.png").unlink()
    (folder / "0001.png").symlink_to(outside)
    files = ["0000.png", "0001.png", str(outside), "../" * 20 + str(outside).lstrip("/")]
    rows = [{"file": file, "prompt": f"prompt {n}.", "scores": {"ours": 1.0}} for n, file in enumerate(files)]
    (folder / "index.json").write_text(json.dumps(rows))
    (run / "report.html").unlink()
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0, done.output
    page = Page(run / "report.html")
    assert [n for n in range(len(files)) if f"prompt {n}." in page.text] == [0]
    assert "3 outside of this run" in page.text
