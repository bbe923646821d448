"""A user's Python file as a module, with what lies beside it: ``import my_helpers`` finds the neighbour.

It does so while the file loads and later in its functions, in every process and thread, whatever the working directory
and ``sys.path`` are. A folder is a namespace of its own: two folders may each have a ``my_helpers``, and a file of a
user hides no module from anybody but its own neighbours. ``from . import my_helpers`` is the same.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.usercode.kept import Source, from_content, keep, load_module

__all__ = ["keep_user_line", "load_file", "load_module", "user_line"]

_PREFIX, _NOTE = "beside_", "in the user's file "
_NEVER = sys.stdlib_module_names | {"flowalign", "rewards"}  # a neighbour of such a name hides nothing


def load_file(path: Path) -> ModuleType:
    """Run a file and return it as a module; it is run again each time, its neighbours once.

    Raises what the file raises, or ImportError where it is not Python source.
    """
    path = path.resolve()
    name = f"{_namespace(path.parent)}.{path.stem.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Neighbour(name, str(path)))
    if spec is None or spec.loader is None or path.suffix != ".py":
        raise ImportError(f"{path} is not Python source")
    module = importlib.util.module_from_spec(spec)
    keep(str(path))
    before = sys.modules.get(name)
    sys.modules[name] = module  # before it runs: pydantic and dataclasses look the annotations of its classes up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    return module


def _namespace(folder: Path) -> str:
    """Return the package that stands for a folder, made where it is not there yet."""
    name = _PREFIX + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if name not in sys.modules:
        package = ModuleType(name, f"The Python files of {folder}.")
        package.__path__ = [str(folder)]
        package.__package__ = name
        sys.modules[name] = package
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return name


class _Finder(MetaPathFinder):
    """Finds the modules of such packages."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PREFIX) or path is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(found := from_content(spec).loader) is Source:
            spec.loader = _Neighbour(fullname, found.path)
        return spec


class _Neighbour(Source):
    """Runs a file so that its own import statements look beside the first file of its namespace."""

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__.partition(".")[0]
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _importing(package)}
        super().exec_module(module)


def _importing(package: str) -> Callable[..., ModuleType]:
    """Return an ``__import__`` of the files of ``package``."""
    folder = list(sys.modules[package].__path__)

    def import_(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        beside = None if level or top in _NEVER else PathFinder.find_spec(top, folder)
        if beside is not None and beside.loader is not None and beside.origin is not None:
            return own(name, globals, locals, fromlist)
        try:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        except ModuleNotFoundError as error:
            if beside is None or error.name != top:  # a folder without __init__.py comes after every real module
                raise
        return own(name, globals, locals, fromlist)

    def own(name: str, globals: Any, locals: Any, fromlist: Sequence[str] | None) -> ModuleType:
        found = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or (), 0)
        return found if fromlist else sys.modules[f"{package}.{name.partition('.')[0]}"]

    return import_


def user_line(error: BaseException) -> str | None:
    """Return the line where a user's own file raised ``error`` or led to it: ``mine.py, line 3``.

    It is None where none is in its trace.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    found, trace = _kept(error), error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_PREFIX) and code.co_filename.endswith(".py"):
            found = f"{code.co_filename}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def keep_user_line(error: BaseException) -> None:
    """Let ``user_line`` answer the same after the error has crossed to another process, which loses its trace."""
    line = user_line(error)
    if line is not None and _kept(error) is None:
        error.add_note(_NOTE + line)


def _kept(error: BaseException) -> str | None:
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE)]
    return notes[0].removeprefix(_NOTE) if notes else None
