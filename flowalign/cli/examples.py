"""Examples of a command, by which its ``--help`` ends, and the application that prints them there."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from typing import Any, TypeVar

import typer

WIDTH = 78  # of a terminal of 80 columns, between the margins
_INDENT = "  "

Function = TypeVar("Function", bound=Callable[..., Any])


def examples(first: str, second: str) -> Callable[[Function], Function]:
    """Give a command its two examples, each as it is typed, without brackets, which are markup in a help."""

    def mark(command: Function) -> Function:
        command.examples = (first, second)  # type: ignore[attr-defined]
        return command

    return mark


def epilog_of(given: tuple[str, ...]) -> str:
    """Return the end of a help: a line each, broken with a backslash where a terminal is too narrow."""
    return "\n".join(["Examples:" if len(given) > 1 else "Example:", *map(_broken, given)]) if given else ""


def _broken(example: str) -> str:
    lines, line = [], _INDENT
    for word in _words(example):
        if len(line) + len(word) + 3 > WIDTH and line.strip():
            lines.append(f"{line}\\")
            line = _INDENT * 3
        line += f"{word} "
    return "\n".join([*lines, line.rstrip()])


def _words(example: str) -> list[str]:
    """Return the words of an example as they are typed, an option together with its value."""
    typed, found = [shlex.quote(word) for word in shlex.split(example)], list[str]()
    for word in typed:
        if found and found[-1].startswith("-") and " " not in found[-1] and not word.startswith("-"):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


class App(typer.Typer):
    """Commands whose help is told in paragraphs, as wide as the terminal, and ends with their `examples`."""

    def command(self, name: str | None = None, **given: Any) -> Callable[[Any], Any]:
        def add(function: Any) -> Any:
            told = inspect.cleandoc(function.__doc__ or "").split("\n\n")
            own = {"help": "\n\n".join(" ".join(paragraph.split()) for paragraph in told)}
            own |= {"epilog": epilog_of(getattr(function, "examples", ()))}
            return super(App, self).command(name, **{**own, **given})(function)

        return add
