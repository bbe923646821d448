"""Resolution of what a configuration names into a scorer.

A spec is one of
    ``geneval``                    a scorer of ``rewards/scorers``
    ``path/to/file.py:reward``     a function or class in the user's own file
    ``package.module:reward``      the same in an installed package
    ``brightness``                 an entry point of the group ``flowalign.rewards``
    ``url:http://host:port``       a running reward server
or a dict ``{"type": <one of these>, **options}``, the options passed by keyword.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import rewards.scorers
from rewards.interface import MAX_MAGNITUDE, Metadata, Offers, Scorer, SpecError, blamed, main_key, needs_of
from rewards.models.usercode import file_of, from_code, halves, is_file_name, module_of, nearest
from rewards.question import declared
from rewards.usercode import source

ENTRY_POINTS = "flowalign.rewards"


def resolve(spec: str | Mapping[str, Any], base_dir: str | Path = ".", offers: Offers | None = None) -> Scorer:
    """Return the scorer that ``spec`` names, not yet set up; relative files are looked for under ``base_dir``.

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
        return from_code(kind, options, Path(base_dir))
    if kind in builtin_names():
        return _builtin(kind, options)
    return from_code(_entry_point(kind).value, options, Path(base_dir))


def check(spec: str | Mapping[str, Any], base_dir: str | Path = ".", offers: Offers | None = None) -> frozenset[str]:
    """Raise ``SpecError`` where ``resolve`` would for what can be known without loading models.

    Return the scorer's needs, as far as they can be read.

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
        location, attribute = halves(target)
        file = file_of(location, Path(base_dir)) if is_file_name(location) else module_of(target, Path(base_dir))
        if file is not None:
            needs = declared(kind, source.check_definition(file, attribute, set(options)))
    if offers is not None:
        offers.check(kind, needs)
    return needs


def row_check(spec: str | Mapping[str, Any]) -> Callable[[Metadata], None] | None:
    """Return what raises ``InputError`` for a row of metadata that the scorer could never judge; loads no model.

    None where any row will do, and for a user's code, which is not run for that. Raises ``SpecError`` as ``check``.
    """
    return getattr(_of_ours(spec), "check_row", None)


def row_absences(spec: str | Mapping[str, Any]) -> Callable[[Metadata], Collection[str]] | None:
    """Return what tells which scores no image of a row can have; loads no model.

    None where nobody can tell: every score may be of any row, or the code is the user's. Raises ``SpecError`` as
    ``check``.
    """
    scorer = _of_ours(spec)
    return getattr(scorer, "absent", None) if getattr(scorer, "sometimes", ()) else None


def bounds(spec: str | Mapping[str, Any]) -> tuple[float, float]:
    """Return the least and the largest value of a scorer's scores; larger magnitudes are masked. Loads no model.

    Raises ``SpecError`` as ``check``.
    """
    low, high = getattr(_of_ours(spec), "range", (-math.inf, math.inf))
    return max(low, -MAX_MAGNITUDE), min(high, MAX_MAGNITUDE)


def further_scores(spec: str) -> tuple[str, ...]:
    """Return the names that one of our scorers answers beside its main score.

    Nothing is known of a user's code or of a server.
    """
    return () if ":" in spec or spec not in builtin_names() else getattr(_class(spec), "further", ())


def answered(spec: str | Mapping[str, Any], label: str = "") -> tuple[str, ...] | None:
    """Return the names of all scores that one of ours answers with its options, as it calls them; loads no model.

    The main one is first: the one that is called as the reward's ``label``, else the scorer's own. None for a user's
    code and for a server, of which nothing is known. Raises ``SpecError`` as ``check``.
    """
    scorer = _of_ours(spec)
    if scorer is None:
        return None
    names = (getattr(scorer, "name", _split(spec)[0]), *getattr(scorer, "further", ()))
    main = main_key(label, names[0], names)
    return (main, *(name for name in names if name != main))


def option_for(spec: str | Mapping[str, Any], score: str) -> str | None:
    """Return the option, such as ``clauses: true``, with which one of our scorers would answer a ``score``.

    None where no option does, and for a user's code and a server. Raises ``SpecError`` as ``check``.
    """
    return getattr(_of_ours(spec), "asked_for", {}).get(score)


def location_of(spec: str) -> str | None:
    """Return ``path/to/file.py`` or ``package.module`` of a user's reward.

    It is None for ours, a server and an unknown one.
    """
    if spec.startswith("url:") or spec in builtin_names():
        return None
    try:
        return halves(spec if ":" in spec else _entry_point(spec).value)[0]
    except SpecError:
        return None


def options_of(assignments: Sequence[str], scalar: Callable[[str], Any] = str) -> dict[str, Any]:
    """Parse ``key=value`` options of a command line.

    Values are JSON where they parse as JSON, else what ``scalar`` reads.

    Raises ``SpecError`` for one without a value.
    """
    options = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise SpecError(f"option {assignment!r} has no value; write key=value")
        try:
            options[key] = json.loads(value)
        except (ValueError, RecursionError):
            options[key] = scalar(value)
    return options


def builtin_names() -> list[str]:
    """Return the names of the scorers in ``rewards/scorers``."""
    return sorted(module.name for module in pkgutil.iter_modules(rewards.scorers.__path__))


def _split(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    options = {"type": spec} if isinstance(spec, str) else dict(spec)
    kind = options.pop("type", None)
    if not isinstance(kind, str) or not kind:
        raise SpecError(f"reward {spec!r} has no `type`; write a name, path/to/file.py:reward or url:http://…")
    return kind, options


def _of_ours(spec: str | Mapping[str, Any]) -> Scorer | None:
    """Return one of our scorers, not set up; None for a user's code and a server."""
    kind, options = _split(spec)
    return None if ":" in kind or kind not in builtin_names() else _builtin(kind, options)


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
            raise SpecError(f"reward {name!r} has no option {key!r}; {nearest(key, known)}")
    size = options.get("batch_size", 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise SpecError(f"reward {name!r}: batch_size is {size!r}; write a number of images, at least 1")
    if lacking := [key for key, own in parameters.items() if own.default is own.empty and key not in options]:
        raise SpecError(f"reward {name!r} needs {' and '.join(lacking)}; its options are {', '.join(parameters)}")
    for key, value in options.items():
        if _is_no_text(parameters[key].annotation, value):
            raise SpecError(f"reward {name!r}: {key} is {value!r:.80}; write a text")
    try:
        return cls(**options)
    except TypeError as error:
        raise SpecError(f"reward {name!r}: {error}; its options are {', '.join(parameters)}") from error


def _is_no_text(annotation: Any, value: Any) -> bool:
    """Tell whether an option of texts alone was given something else."""
    return (
        annotation in ("str", "str | None")
        and not isinstance(value, str)
        and (value is not None or annotation == "str")
    )


def _entry_point(name: str) -> EntryPoint:
    found = entry_points(group=ENTRY_POINTS)
    if name in found.names:
        return found[name]
    if name.endswith(".py"):
        raise SpecError(f"reward {name!r} names a file but nothing in it; write {name}:reward")
    if "://" in name:
        raise SpecError(f"reward {name!r} looks like an address; write url:{name}")
    known = sorted({*builtin_names(), *found.names})
    raise SpecError(f"reward {name!r} is unknown; {nearest(name, known)} (or write path/to/file.py:function)")
