"""From what a configuration names to a scorer.

A spec is one of
    ``geneval``                    a scorer of ``rewards/scorers``
    ``path/to/file.py:reward``     a function or class in the user's own file
    ``package.module:reward``      the same in an installed package
    ``brightness``                 an entry point of the group ``flowalign.rewards``
    ``url:http://host:port``       a running reward server
or a dict ``{"type": <one of these>, **options}``, the options passed by keyword.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import rewards.scorers
from rewards.errors import PLAIN_FUNCTION, pass_on_interrupt
from rewards.interface import (
    Answers,
    Asked,
    Metadata,
    Offers,
    Scorer,
    ScorerError,
    SpecError,
    blamed,
    needs_of,
    one_line,
)
from rewards.missing import hint
from rewards.question import declared
from rewards.usercode import source
from rewards.usercode.loading import load_file, load_module, user_line

ENTRY_POINTS = "flowalign.rewards"
_log = logging.getLogger("rewards")


@dataclass(frozen=True)
class FunctionScorer(Answers):
    """A plain ``reward(images, prompts, metadata)`` as a scorer; a bare array takes the function's name."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, asked: Asked) -> Mapping[str, Any]:
        scores = self.function(asked.images, asked.prompts, asked.metadata, **self.options)
        return scores if isinstance(scores, Mapping) else {self.name: scores}


def resolve(spec: str | Mapping[str, Any], base_dir: str | Path = ".", offers: Offers | None = None) -> Scorer:
    """The scorer that ``spec`` names, not yet set up; relative files are looked for under ``base_dir``.

    Runs user code where the spec names it, and says so in the log. Raises ``SpecError``, also for a scorer with needs
    that ``offers`` does not have; None asks for none of that.
    """
    kind, options = _split(spec)
    scorer = _resolved(kind, options, base_dir)
    with blamed(kind, " while it was looked at"):
        needs = needs_of(kind, scorer)
    if offers is not None:
        offers.check(kind, needs)
    return scorer


def _resolved(kind: str, options: dict[str, Any], base_dir: str | Path) -> Scorer:
    if kind.startswith("url:"):
        return _http(kind, options)
    if ":" in kind:
        return _from_code(kind, options, Path(base_dir))
    if kind in builtin_names():
        return _builtin(kind, options)
    return _from_code(_entry_point(kind).value, options, Path(base_dir))


def check(spec: str | Mapping[str, Any], base_dir: str | Path = ".", offers: Offers | None = None) -> None:
    """Raise ``SpecError`` where ``resolve`` would for what can be known without loading models.

    Takes milliseconds: user code is parsed, not run; a URL is parsed, not called.
    """
    kind, options = _split(spec)
    needs: frozenset[str] = frozenset()
    if kind.startswith("url:"):
        _http(kind, options)
    elif ":" not in kind and kind in builtin_names():
        needs = needs_of(kind, _builtin(kind, options))
    else:
        target = kind if ":" in kind else _entry_point(kind).value
        location, attribute = _halves(target)
        file = _file(location, Path(base_dir)) if _is_file(location) else _module(target, Path(base_dir))
        if file is not None:
            needs = declared(kind, source.check_definition(file, attribute, set(options)))
    if offers is not None:
        offers.check(kind, needs)


def row_check(spec: str | Mapping[str, Any], base_dir: str | Path = ".") -> Callable[[Metadata], None] | None:
    """What raises ``InputError`` for a row of metadata that the scorer could never judge, without loading models.

    None where any row will do, and for a user's code, which is not run for that. Raises ``SpecError`` as ``check``.
    """
    kind, options = _split(spec)
    if ":" in kind or kind not in builtin_names():
        return None
    return getattr(_builtin(kind, options), "check_row", None)


def further_scores(spec: str) -> tuple[str, ...]:
    """What one of our scorers answers beside its main score; nothing is known of a user's code or of a server."""
    return () if ":" in spec or spec not in builtin_names() else getattr(_class(spec), "further", ())


def location_of(spec: str) -> str | None:
    """``path/to/file.py`` or ``package.module`` of a user's reward; None for ours, a server and an unknown one."""
    if spec.startswith("url:") or spec in builtin_names():
        return None
    try:
        return _halves(spec if ":" in spec else _entry_point(spec).value)[0]
    except SpecError:
        return None


def builtin_names() -> list[str]:
    """Names of the scorers in ``rewards/scorers``."""
    return sorted(module.name for module in pkgutil.iter_modules(rewards.scorers.__path__))


def _split(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    options = {"type": spec} if isinstance(spec, str) else dict(spec)
    kind = options.pop("type", None)
    if not isinstance(kind, str) or not kind:
        raise SpecError(f"reward {spec!r} has no `type`; write a name, path/to/file.py:reward or url:http://…")
    return kind, options


def _http(kind: str, options: dict[str, Any]) -> Scorer:
    from rewards.http.client import HttpScorer

    return _construct(kind, HttpScorer, {"url": kind.removeprefix("url:"), **options})


def _builtin(name: str, options: dict[str, Any]) -> Scorer:
    return _construct(name, _class(name), options)


def _class(name: str) -> Callable[..., Any]:
    """Return the one class of the scorer's file that can ``score``, or ``answer``."""
    module = importlib.import_module(f"rewards.scorers.{name}")
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    able = [value for value in own if any(callable(getattr(value, ask, None)) for ask in ("score", "answer"))]
    if len(able) != 1:
        found = ", ".join(value.__name__ for value in able) or "none"
        raise SpecError(f"{module.__file__} must hold one class with a method score; it has {found}")
    return able[0]


def _construct(name: str, cls: Callable[..., Any], options: dict[str, Any]) -> Scorer:
    """Build a scorer of ours: options are checked against its signature first, so that a typo gets a hint."""
    parameters = inspect.signature(cls).parameters
    for key in options:
        if key not in parameters:
            known = [p for p in parameters if p != "url"]
            raise SpecError(f"reward {name!r} has no option {key!r}; {_nearest(key, known)}")
    size = options.get("batch_size", 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise SpecError(f"reward {name!r}: batch_size is {size!r}; write a number of images, at least 1")
    try:
        return cls(**options)
    except TypeError as error:
        raise SpecError(f"reward {name!r}: {error}; its options are {', '.join(parameters)}") from error


def _entry_point(name: str) -> EntryPoint:
    found = entry_points(group=ENTRY_POINTS)
    if name in found.names:
        return found[name]
    if name.endswith(".py"):
        raise SpecError(f"reward {name!r} names a file but nothing in it; write {name}:reward")
    if "://" in name:
        raise SpecError(f"reward {name!r} looks like an address; write url:{name}")
    known = sorted({*builtin_names(), *found.names})
    raise SpecError(f"reward {name!r} is unknown; {_nearest(name, known)} (or write path/to/file.py:function)")


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _halves(target: str) -> tuple[str, str]:
    if "://" in target:
        raise SpecError(f"reward {target!r} looks like an address; write url:{target}")
    location, _, attribute = target.rpartition(":")
    if location.endswith(":"):
        raise SpecError(f"reward {target!r} has two colons; write {location.rstrip(':')}:{attribute}")
    if not location or not attribute.isidentifier():
        raise SpecError(f"reward {target!r} is not path/to/file.py:reward or package.module:reward")
    return location, attribute


def _is_file(location: str) -> bool:
    return location.endswith(".py") or "/" in location


def _module(target: str, base_dir: Path) -> Path | None:
    """`source.find_module`, which knows that ``r:f`` beside a file ``r.py`` was to be ``r.py:f``."""
    location, attribute = _halves(target)
    try:
        return source.find_module(location)
    except SpecError as error:
        file = f"{location.replace('.', '/')}.py"
        if (base_dir / file).is_file() or Path(file).is_file():
            raise SpecError(f"reward {target} names no installed module; did you mean {file}:{attribute}?") from error
        raise


def _file(location: str, base_dir: Path) -> Path:
    path = (base_dir / os.path.expanduser(location)).resolve()
    if not path.is_file():
        raise SpecError(
            f"reward file {path} does not exist{hint(path)}; write its path relative to {base_dir.resolve()}, "
            "or to where the command runs"
        )
    return path


def user_code(target: str, base_dir: str | Path = ".") -> Any:
    """What stands at ``file.py:name`` or ``package.module:name``; the module is run, and the log says so.

    Raises ``SpecError`` where there is nothing.
    """
    location, attribute = _halves(target)
    module = _load_file(_file(location, Path(base_dir))) if _is_file(location) else _load_module(target, Path(base_dir))
    if not hasattr(module, attribute):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise SpecError(f"{location} has no {attribute!r}; {_nearest(attribute, known)}")
    return getattr(module, attribute)


def _from_code(target: str, options: dict[str, Any], base_dir: Path) -> Scorer:
    """The function, class or ready scorer at ``file.py:name`` or ``package.module:name``."""
    with blamed(target, " while it was looked at"):  # where its module or class computes its attributes
        return _as_scorer(target, _halves(target)[1], user_code(target, base_dir), options)


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


def _load_module(target: str, base_dir: Path) -> ModuleType:
    name, _ = _halves(target)
    try:
        module = load_module(name)
    except BaseException as error:
        pass_on_interrupt(error)
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            _module(target, base_dir)
        raise SpecError(f"reward module {name} did not import: {type(error).__name__}: {one_line(error)}") from error
    _log.warning("runs user code from %s", module.__file__ or name)
    return module


def _load_file(path: Path) -> ModuleType:
    _log.warning("runs user code from %s", path)
    try:
        return load_file(path)
    except BaseException as error:
        pass_on_interrupt(error)
        line = user_line(error)
        where = f" ({line})" if line and not isinstance(error, SyntaxError) else ""
        raise SpecError(f"reward file {path} did not run: {type(error).__name__}: {one_line(error)}{where}") from error
