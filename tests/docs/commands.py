"""Reads the commands of the pages, and what each of them is: whose it is, and in which words it can be parsed.

Pages are the Markdown files, the forms of the issues, the comments on top of configurations, what stands on top of a
script, and the examples at the end of each ``--help``.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

from flowalign.cli import app

ROOT = Path(__file__).resolve().parents[2]
GROUP: Any = typer.main.get_command(app)
LEFT_OUT = {"CHANGELOG.md"}  # commands as they were
OURS = ("flowalign", "python", "bash", "torchrun")
# Programs of others, whose words nobody here can parse; one that is in neither row is a mistyped one.
OTHERS = {".", "curl", "export", "pip", "ray", "umask", "venv"}
# What a reader has: prompts, here a few.
_ROW = '{"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}\n'
BROUGHT = {
    "prompts.txt": "a photo of a circle\na photo of two stars\n",
    "prompts.jsonl": _ROW * 2,
    "mine.jsonl": _ROW * 2,
    "captions.csv": "caption,language,split\na red circle,en,train\nein Stern,de,test\n",
}
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*", re.S)
_PLACE = re.compile(r"…|\.\.\.|key=value|(^|[/=])[A-Z]+(\.\w+|:\d+|/.*)?$")  # what a reader replaces
_APART = set("();|&")
_CODE = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.M | re.S)
_YAML = re.compile(r"^```yaml\n# (\w+\.yaml)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Command:
    """A command of a page, in the words that a shell hands over; a ``form`` has names for what a reader puts there."""

    page: str
    line: int
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(word if re.fullmatch(r"[\w./:=…@<>+,-]+", word) else shlex.quote(word) for word in self.words)

    @property
    def program(self) -> str:
        """``flowalign``, a script or a module of this repository, ``bash``, ``python -c``, or a program of others."""
        first = Path(self.words[0]).name if "/" in self.words[0] else self.words[0]
        if self.command is not None:
            return "flowalign"
        if first == "python":
            return next(word for word in self.words[1:] if word not in ("-m", "-P"))
        return first

    @property
    def command(self) -> tuple[str, ...] | None:
        """The words after ``flowalign``, however it is started; None of another program."""
        for begin in ("flowalign", "flowalign.cli"):
            if begin in self.words and (begin == self.words[0] or self.words[self.words.index(begin) - 1] == "-m"):
                return self.words[self.words.index(begin) + 1 :]
        return None

    @property
    def arguments(self) -> tuple[str, ...]:
        """The words after a script's name, or a module's."""
        return self.words[self.words.index(self.program) + 1 :]

    @property
    def form(self) -> bool:
        return any(_PLACE.search(word) for word in self.words[1:])


def split(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the commands of a line of a shell, without comments, redirections and assignments before them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    tokens = iter(lexer)
    for token in tokens:
        if token.startswith("#"):
            break
        if set(token) <= {">", "&"} and ">" in token:
            next(tokens)
        elif set(token) <= {"<", ">"}:
            raise ValueError(f"{line.strip()}: a shell takes < and > for files; write a name in capitals")
        elif set(token) <= _APART:
            yield from [tuple(words)] if words else []
            words = []
        elif words or not _ASSIGNMENT.fullmatch(token):
            words.append(token)
    yield from [tuple(words)] if words else []


def lines_of(block: str, begin: int = 1) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers, those that end in a backslash together with the next."""
    whole, at = "", begin
    for number, line in enumerate(block.splitlines(), begin):
        at = at if whole else number
        whole += (line.lstrip() if whole else line).removesuffix("\\")
        if not line.endswith("\\"):
            yield at, whole
            whole = ""


def unfolded(text: str) -> str:
    """Return a usage as a command that has all of it: without brackets, the first of several."""
    text = re.sub(r"(?<=\s)\[([^\]]*)\]", r"\1", text.replace("\\|", "|"))
    return re.sub(r"(?<=\s)(\w+)(\|\w+)+", r"\1", text)


def of_markdown(page: str, text: str) -> Iterator[Command]:
    """Yield the commands of blocks for a shell, and those between backticks that have more than their name."""
    for found in _FENCE.finditer(text):
        if found[1] == "bash":
            for number, line in lines_of(found[2], text[: found.start(2)].count("\n") + 1):
                yield from (Command(page, number, words) for words in split(line))
    prose = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
    for found in _SPAN.finditer(prose):
        whole = unfolded(" ".join(found[1].split()))
        whole = f"python {whole}" if re.match(r"scripts/[\w/]+\.py .", whole) else whole
        if whole.partition(" ")[0] in OURS and len(whole.split()) > 1:
            for words in split(whole):
                if words[0] != "flowalign" or len(words) > 2:
                    yield Command(page, prose[: found.start()].count("\n") + 1, words)


def of_text(page: str, text: str) -> Iterator[Command]:
    """Yield the commands of a comment or a docstring, a line each."""
    for number, line in lines_of(text):
        whole = re.sub(r"   .*", "", unfolded(line.strip()))  # what stands far behind it explains
        if re.match(r"(flowalign|python3?|bash) [\w-]", whole):
            yield from (Command(page, number, words) for words in split(whole))


def of_help() -> Iterator[Command]:
    for command in (GROUP, *GROUP.commands.values()):
        page = "flowalign --help" if command is GROUP else f"flowalign {command.name} --help"
        yield from of_text(page, command.epilog or "")


@cache
def commands() -> tuple[Command, ...]:
    """Return all commands of all pages, each once a page, in the order of the pages."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found: list[Command] = []
    for name in sorted(set(listed) - LEFT_OUT):
        path = ROOT / name
        if name.endswith(".md") or name.startswith(".github/ISSUE_TEMPLATE/"):
            found += of_markdown(name, path.read_text(encoding="utf-8"))
        elif name.startswith("configs/") and name.endswith(".yaml"):
            head = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))
            found += of_text(name, re.sub(r"^# ?", "", head[0] if head else "", flags=re.M))
        elif name.startswith("scripts/") and name.endswith(".py"):
            found += of_text(name, ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    found += of_help()
    return tuple({(one.page, one.words): one for one in reversed(found)}.values())[::-1]


def names() -> set[str]:
    """Return what pages call commands of ``flowalign`` by, where the name stands alone between backticks."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in listed.split() if name not in LEFT_OUT)
    return set(re.findall(r"`flowalign\s+([\w-]+)`", text))


def write_files(page: str, folder: Path) -> None:
    """Make ``folder`` a place to give a page's commands at: the repository's, with the files that the page shows."""
    for name in ("configs", "flowalign", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    for name, text in BROUGHT.items():
        (folder / name).write_text(text)
    for name, code in shown(page):
        (folder / name).write_text(code)


def shown(page: str) -> list[tuple[str, str]]:
    """Return the files that a page shows whole: their names, and what is in them."""
    if not page.endswith(".md"):
        return []
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(name, code) for name, code in (*_CODE.findall(text), *_YAML.findall(text))]
