"""Every command on every page is parsed; one with a configuration passes `flowalign check`; the quick ones run nightly.

``commands.txt`` says of each which of these holds, and of one that is not run why.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowalign.intake.file import load_run
from flowalign.intake.ready import looked_at
from tests.docs.commands import GROUP, OTHERS, ROOT, Command, commands, names, of_markdown, shown, write_files

LIST = Path(__file__).with_name("commands.txt")
WHY = {
    "form": "has names for what a reader puts there",
    "files": "needs a model, pictures or a run: the reader's, or of a command that is not run",
    "long": "takes more than 20 seconds, with one iteration too",
    "pages": "writes into the repository",
    "machine": "installs, listens or downloads",
    "gpu": "is for a GPU",
}
# What is named by configurations and by their overrides, and is not here.
LACKING = {
    "weights that are not shipped": (
        *("stable-diffusion-3.5-medium", "FLUX.1-dev", "FLUX.1-schnell", "Qwen-Image", "Z-Image", "Z-Image-Turbo"),
        *("hps/HPS_v2.1_compressed.pt", "PickScore_v1", "mask2former"),
    ),
    "prompts that the recipe says where to get": (
        *("geneval/train_metadata.jsonl", "geneval/evaluation_metadata.jsonl", "hpd/prompts.txt"),
        *("pickscore/train.txt", "pickscore/test.txt", "ocr/train.txt", "ocr/test.txt"),
    ),
    "what another command makes": (
        *("runs/bank", "runs/pairs", "runs/scenes", "runs/base-model", "runs/aligned-model"),
        *("runs/shapes-teacher-objects", "preferences/shapes", "cache.json", "untrained"),
    ),
    "the reader's own": ("BANK", "MODEL", "…"),
    "a GPU": ("torch sees no GPU here",),
}


class Parsed(BaseException):
    """The arguments of a script are parsed, and nothing of it may run."""


def parse(command: Command) -> str | None:
    """Return what is wrong with the words of a command of ``flowalign``."""
    assert command.command is not None
    name, *words = command.command
    if name not in GROUP.commands:
        return f"no command {name}"
    # --json moves standard output as soon as it is parsed.
    given = [{"PORT": "8000"}.get(word, word) for word in words if word != "--json"]
    try:
        GROUP.commands[name].make_context(name, given)
    except Exception as error:
        return getattr(error, "message", "") or str(error)
    return None


def parse_script(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return what is wrong with the words of a Python program: it runs until its arguments are parsed."""
    if command.program == "-c":
        compile(command.arguments[0], "-c", "exec")
        return None
    path = ROOT / command.program
    if path.suffix != ".py":
        found = importlib.util.find_spec(command.program)
        path = Path(str(found and found.origin))
    if not path.is_file():
        return "no such program"
    if not re.search(r"\b(ArgumentParser|study)\(", path.read_text(encoding="utf-8")):
        return f"takes no arguments: {command.arguments}" if command.arguments else None
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, ends(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [str(path), *command.arguments])
        patch.syspath_prepend(str(path.parent))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Parsed:
            return None
        except SystemExit:
            return capsys.readouterr().err.splitlines()[-1]
    return "its arguments are not parsed"


def ends(real: Callable[..., Any]) -> Callable[..., Any]:
    def parse_args(*args: Any, **options: Any) -> None:
        real(*args, **options)
        raise Parsed

    return parse_args


@pytest.fixture
def scripts_alone() -> Iterator[None]:
    """Forget the modules of scripts afterwards: they go by names such as ``paths``."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "scripts")):
            del sys.modules[name]


@cache
def missing_of(run_as: str | None, config: Path, overrides: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Return what a run lacks in ``folder``; one that lacks nothing is looked at as `flowalign check` does."""
    loaded = load_run(config, overrides, run_as)
    if not loaded.missing:
        looked_at(run_as, config, overrides)
    return loaded.missing


def configured(command: Command) -> Mapping[str, Any] | None:
    """Return the parameters of a command with a configuration that is there, in the working directory."""
    if command.command is None:
        return None
    name, *words = command.command
    given = (
        GROUP.commands[name]
        .make_context(name, [word for word in words if word not in ("--json", "PORT")], resilient_parsing=True)
        .params
    )
    file = str(given.get("config") or given.get("source") or "")
    return {**given, "config": Path(file)} if file.endswith(".yaml") and Path(file).is_file() else None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Command], Path]:
    """A folder for a command; those whose page shows no file that they name share one."""
    found: dict[str, Path] = {}

    def of(command: Command) -> Path:
        page = command.page if any(name in command.text for name, _ in shown(command.page)) else ""
        if page not in found:
            found[page] = tmp_path_factory.mktemp("page")
            write_files(page, found[page])
        return found[page]

    return of


def listed() -> dict[str, list[tuple[str, str]]]:
    """Return of each page what the list says: a state, with why it is no more, and the command."""
    found: dict[str, list[tuple[str, str]]] = {}
    page = ""
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("    "):
            page = line
        elif line:
            state, text = line.strip().split("  ", 1)
            found.setdefault(page, []).append((state, text.strip()))
    return found


OURS = [command for command in commands() if command.program == "flowalign"]
PROGRAMS = [command for command in commands() if re.search(r"\w\.\w|^-c$", command.program)]


def test_every_command_of_flowalign_is_parsed() -> None:
    wrong = {f"{one.page}:{one.line}: {one.text}": parse(one) for one in OURS}
    assert not {text: said for text, said in wrong.items() if said} and len(OURS) > 150
    assert names() <= set(GROUP.commands)


@pytest.mark.usefixtures("scripts_alone")
def test_every_command_of_a_script_is_parsed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {f"{one.page}:{one.line}: {one.text}": parse_script(one, monkeypatch, capsys) for one in PROGRAMS}
    assert not {text: said for text, said in wrong.items() if said} and len(PROGRAMS) > 80


def test_every_other_command_is_a_script_of_a_shell_that_is_there_or_a_program_of_others() -> None:
    rest = [one for one in commands() if one not in OURS and one not in PROGRAMS]
    shell = [one for one in rest if one.program == "bash"]
    assert not [one.text for one in shell if not (ROOT / one.words[1]).is_file()]
    folders = ("tests/", "scripts/", ".ci/")
    assert not [
        one.text for one in shell for word in one.words if word.startswith(folders) and not (ROOT / word).exists()
    ]
    assert {one.program for one in rest} == OTHERS | {"bash"}


def test_every_configuration_of_a_command_passes_the_check(
    place: Callable[[Command], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, said = dict[str, str](), ""
    for one in OURS:
        monkeypatch.chdir(folder := place(one))
        if (given := configured(one)) is None:
            continue
        name = one.command[0]  # type: ignore[index]
        run_as = {"check": given.get("run_as"), "plan": None, "precompute": None, "launch": "align"}.get(name, name)
        try:
            lacks = missing_of(run_as, given["config"], tuple(given["overrides"] or ()), folder)
        except Exception as error:
            wrong[f"{one.page}:{one.line}: {one.text}"] = str(error)
            continue
        said += "\n".join(lacks)
        if unknown := [line for line in lacks if not any(known in line for part in LACKING.values() for known in part)]:
            wrong[f"{one.page}:{one.line}: {one.text}"] = f"not among LACKING: {unknown}"
    assert not wrong
    assert not [known for part in LACKING.values() for known in part if known not in said], "lacking on no page"


def test_the_list_says_of_every_command_what_is_done_with_it(
    place: Callable[[Command], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {(page, text): state for page, lines in listed().items() for state, text in lines}
    here = {(one.page, one.text): one for one in commands()}
    unsaid = [f"{page}: {text}" for page, text in here if (page, text) not in said]
    gone = [f"{page}: {text}" for page, text in said if (page, text) not in here]
    assert unsaid == [], "write them into commands.txt, under their page, with how far they are tried"
    assert gone == [], "in commands.txt, and on no page"
    for key, state in said.items():
        monkeypatch.chdir(place(here[key]))
        kind, _, why = state.partition(" ")
        most = "checked" if configured(here[key]) is not None else "parsed"
        most = "others" if here[key].program in OTHERS else most
        assert kind in ("run", most) and (kind in ("run", "others") or why in WHY), (state, *key)
        assert here[key].form == (why == "form") or most in ("checked", "others"), (state, *key)
    assert {state.partition(" ")[2] for state in said.values()} == {*WHY, ""}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("`flowalign align run.yaml --dryrun`", "No such option: --dryrun"),
        ("`flowalign export runs/a`", "Missing parameter: to"),
        ("```bash\nflowalign sample shapes \\\n    --num-images two  # a comment\n```", "should be a valid integer"),
        ("`flowalign alignn run.yaml`", "no command alignn"),
        ("`torchrun --nproc-per-node 2 -m flowalign.cli pretrain [--dry-run]`", "Missing parameter: config"),
        ("```bash\nA=b flowalign doctor && flowalign doctor --siz 3 > a.txt | tee b\n```", "No such option: --siz"),
    ],
)
def test_a_wrong_command_is_found_however_it_is_written(text: str, reason: str) -> None:
    found = [said for one in of_markdown("page.md", text) if one.program == "flowalign" and (said := parse(one))]
    assert len(found) == 1 and reason in found[0]


def test_what_a_shell_takes_for_a_file_is_no_placeholder() -> None:
    with pytest.raises(ValueError, match="a shell takes < and > for files"):
        list(of_markdown("page.md", "```bash\nflowalign export runs/<name> --to aligned\n```"))


def write_photographs(folder: Path) -> None:
    """Make a folder of pictures with captions, as `flowalign precompute` takes it."""
    folder.mkdir()
    for level in range(0, 256, 32):
        Image.new("RGB", (64, 64), (level, 0, 0)).save(folder / f"{level}.png")
    rows = [json.dumps({"file_name": path.name, "text": f"red of {path.stem}"}) for path in sorted(folder.iterdir())]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


NIGHTLY = [page for page, lines in listed().items() if any(state == "run" for state, _ in lines)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", NIGHTLY)
def test_what_ends_within_20_seconds_runs_in_the_order_of_its_page(page: str, tmp_path: Path) -> None:
    write_files(page, tmp_path)
    write_photographs(tmp_path / "photographs")
    here = {one.text: one for one in commands() if one.page == page}
    for state, text in listed()[page]:
        if state != "run":
            continue
        one = here[text]
        own = ["-P", "-m", "flowalign.cli", *(one.command or ())] if one.command else one.words[1:]
        once = ["iterations=1"] if one.command and one.command[0] == "align" else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *own, *once],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{seconds:5.1f} s  {text}")
        assert done.returncode == 0, (text, done.stdout[-1000:], done.stderr[-2000:])
        assert seconds < 40, (text, seconds)  # twice as many: other tests run beside it
