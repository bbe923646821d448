"""Scorers of the user's code: from ``file.py:name`` or ``package.module:name`` to what stands there, and to a scorer.

Only ``user_code`` and ``from_code`` run the user's code.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rewards.errors import PLAIN_FUNCTION, pass_on_interrupt
from rewards.interface import Answers, Asked, Scorer, ScorerError, SpecError, blamed, one_line
from rewards.missing import hint
from rewards.usercode import source
from rewards.usercode.loading import load_file, load_module, user_line

_log = logging.getLogger("rewards")
_said: set[str] = set()


@dataclass(frozen=True)
class FunctionScorer(Answers):
    """A plain ``reward(images, prompts, metadata)`` as a scorer; a bare array takes the function's name."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, asked: Asked) -> Mapping[str, Any]:
        scores = self.function(asked.images, asked.prompts, asked.metadata, **self.options)
        return scores if isinstance(scores, Mapping) else {self.name: scores}


def halves(target: str) -> tuple[str, str]:
    if "://" in target:
        raise SpecError(f"reward {target!r} looks like an address; write url:{target}")
    location, _, attribute = target.rpartition(":")
    if location.endswith(":"):
        raise SpecError(f"reward {target!r} has two colons; write {location.rstrip(':')}:{attribute}")
    if not location or not attribute.isidentifier():
        raise SpecError(f"reward {target!r} is not path/to/file.py:reward or package.module:reward")
    return location, attribute


def is_file_name(location: str) -> bool:
    return location.endswith(".py") or "/" in location


def module_of(target: str, base_dir: Path) -> Path | None:
    """Find a module as `source.find_module`; it knows that ``r:f`` beside a file ``r.py`` was to be ``r.py:f``."""
    location, attribute = halves(target)
    try:
        return source.find_module(location)
    except SpecError as error:
        file = f"{location.replace('.', '/')}.py"
        if os.path.isfile(base_dir / file) or os.path.isfile(file):
            raise SpecError(f"reward {target} names no installed module; did you mean {file}:{attribute}?") from error
        raise


def file_of(location: str, base_dir: Path) -> Path:
    path = (base_dir / os.path.expanduser(location)).resolve()
    if not os.path.isfile(path):
        raise SpecError(
            f"reward file {path} does not exist{hint(path)}; write its path relative to {base_dir.resolve()}, "
            "or to where the command runs"
        )
    return path


def user_code(target: str, base_dir: str | Path = ".") -> Any:
    """Return the object at ``file.py:name`` or ``package.module:name``; the module is run, and the log says so.

    Raises ``SpecError`` where there is nothing.
    """
    location, attribute = halves(target)
    module = (
        _load_file(file_of(location, Path(base_dir)))
        if is_file_name(location)
        else _load_module(target, Path(base_dir))
    )
    if not hasattr(module, attribute):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise SpecError(f"{location} has no {attribute!r}; {nearest(attribute, known)}")
    return getattr(module, attribute)


def from_code(target: str, options: dict[str, Any], base_dir: Path) -> Scorer:
    """Return the function, class or ready scorer at ``file.py:name`` or ``package.module:name``."""
    with blamed(target, " while it was looked at"):  # where its module or class computes its attributes
        return _as_scorer(target, halves(target)[1], user_code(target, base_dir), options)


def _as_scorer(target: str, name: str, value: Any, options: dict[str, Any]) -> Scorer:
    if inspect.isclass(value):
        try:
            value = value(**options)
        except ScorerError:
            raise
        except BaseException as error:
            pass_on_interrupt(error)
            line = user_line(error)
            where = f" ({line})" if line else ""
            what = f"{type(error).__name__}: {one_line(error)}"
            raise SpecError(f"reward {target} could not be built: {what}{where}") from error
        options = {}
    asked = [getattr(value, method, None) for method in ("score", "answer")]
    if any(map(inspect.iscoroutinefunction, (value, *asked, getattr(value, "__call__", None)))):  # noqa: B004
        raise SpecError(f"reward {target} is async; {PLAIN_FUNCTION}")
    if any(map(callable, asked)) and not options:
        return cast(Scorer, value)
    if not callable(value) or hasattr(value, "score") or hasattr(value, "answer"):
        what = type(value).__name__
        raise SpecError(
            f"reward {target} is a {what}, not a function (images, prompts, metadata) or a class with a `score` method"
        )
    try:
        inspect.signature(value).bind(None, None, None, **options)
    except TypeError as error:
        raise SpecError(
            f"reward {target}: {error}; it is called as {name}(images, prompts, metadata, **options)"
        ) from error
    function = functools.partial(value) if not hasattr(value, "__name__") else value
    return FunctionScorer(name, function, options)


def _say_once(file: str) -> None:
    """Say that a user's file runs, once a process: a reward that also judges evaluations is built twice."""
    if file not in _said:
        _said.add(file)
        _log.warning("runs user code from %s", file)


def _load_module(target: str, base_dir: Path) -> ModuleType:
    name, _ = halves(target)
    try:
        module = load_module(name)
    except BaseException as error:
        pass_on_interrupt(error)
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            module_of(target, base_dir)
        raise SpecError(f"reward module {name} did not import: {type(error).__name__}: {one_line(error)}") from error
    _say_once(module.__file__ or name)
    return module


def _load_file(path: Path) -> ModuleType:
    _say_once(str(path))
    try:
        return load_file(path)
    except BaseException as error:
        pass_on_interrupt(error)
        line = user_line(error)
        where = f" ({line})" if line and not isinstance(error, SyntaxError) else ""
        raise SpecError(f"reward file {path} did not run: {type(error).__name__}: {one_line(error)}{where}") from error


def nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
