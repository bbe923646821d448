"""The image's file names what is there, and installs by the one script that installs; hadolint has nothing to say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "scripts" / "docker" / "Dockerfile"
INSTRUCTIONS = {"ARG", "FROM", "SHELL", "RUN", "WORKDIR", "USER", "COPY", "ENV", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in FILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_the_base_is_an_argument_and_the_run_is_no_root_s() -> None:
    found = instructions()
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "ARG" and found[0][1].startswith("BASE=") and found[1] == ("FROM", "${BASE}")
    users = [rest for word, rest in found if word == "USER"]
    assert users == ["10001"] and any("useradd" in rest and "--uid 10001" in rest for _, rest in found)


def test_what_is_copied_is_there_and_what_is_left_out_is_no_part_of_the_code() -> None:
    sources = [part for word, rest in instructions() if word == "COPY" for part in rest.split()[1:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    assert any(word == "RUN" and rest.endswith("bash scripts/setup.sh") for word, rest in instructions())
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    assert {"scripts/setup.sh", *re.findall(r"^\. (\S+)", setup, re.M)} <= set(sources)
    left_out = FILE.with_name("Dockerfile.dockerignore").read_text().split()
    assert {".venv", ".git", "runs"} <= set(left_out)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [name for name in left_out if re.search(rf"^{re.escape(name)}(/|$)", tracked, re.M)]


def test_the_commands_of_its_head_name_it() -> None:
    builds = re.findall(r"^#\s+docker build -f (\S+) .* \.$", FILE.read_text(), re.M)
    assert len(builds) == 2 and all((ROOT / name) == FILE for name in builds)


def test_hadolint_has_nothing_to_say() -> None:
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which("hadolint", path=beside)
    if program is None:
        pytest.skip("hadolint is not installed; it comes with the extra dev")
    said = subprocess.run([program, "--no-color", str(FILE)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout
