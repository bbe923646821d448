"""A user's code as it was when it was loaded: what a run has hashed is what runs, however late a module is imported.

The files that code is made of (`imports`) are read when it is loaded. Python sources are compiled from that content,
never from a ``.pyc``, which may be an older file's: of one with the same time and size. Traces and ``inspect`` show it
too. A compiled module, which only the system's loader can read, must still be the same file when it is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import linecache
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec, SourceFileLoader
from importlib.machinery import SourcelessFileLoader as BytecodeLoader
from pathlib import Path
from types import CodeType, ModuleType

from rewards.usercode.imports import files_of_code, is_installed, looks

_COMPILED = tuple(EXTENSION_SUFFIXES)
_NEVER = ("flowalign", "rewards")
_kept: dict[str, bytes] = {}  # by path: a source's content, a compiled module's sha256
_stems: set[str] = set()  # the last parts of the names under which these are imported
_locations: dict[str, str | None] = {}  # code that was loaded, with the name that its modules begin with
_refused: list[str] = []


class CodeChanged(RuntimeError):
    """A module that a user's code imports late is another one than when the code was loaded."""


def keep(location: str) -> None:
    """Read all files of the code at ``location``, as `files_of_code` takes it, which is about to be loaded."""
    files = files_of_code(location)
    of_file = location.endswith(".py")
    _locations[location] = None if of_file else location.partition(".")[0]
    for path in files.values():
        try:
            content = path.read_bytes()
        except OSError:  # loading it says more
            continue
        _kept[_name(path)] = hashlib.sha256(content).digest() if path.name.endswith(_COMPILED) else content
        stem = path.name.partition(".")[0]
        _stems.add(path.parent.name if stem == "__init__" else stem)
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def load_module(name: str) -> ModuleType:
    """Import as ``importlib.import_module``, from the sources of the module and of those beside it that it imports."""
    if name not in _locations and name.partition(".")[0] not in _NEVER:
        keep(name)
    return importlib.import_module(name)


def refusals() -> list[str]:
    """Return the texts that `CodeChanged` has said in this process, also where a user's code has caught it."""
    return list(_refused)


def from_content(spec: ModuleSpec) -> ModuleSpec:
    """Return ``spec`` with a loader that takes what was kept.

    Raises:
        CodeChanged: the file was not among those that the code was made of, and is now.
    """
    loader = spec.loader
    if isinstance(loader, SourceFileLoader | BytecodeLoader | ExtensionFileLoader):
        path = loader.path
        if _name(path) not in _kept:
            _check_new(path)
        if type(loader) is SourceFileLoader:
            spec.loader = Source(spec.name, path)
        elif type(loader) is BytecodeLoader:
            spec.loader = _Bytecode(spec.name, path)
        elif type(loader) is ExtensionFileLoader:
            spec.loader = _Extension(spec.name, path)
    return spec


class _Kept:
    def get_data(self, path: str) -> bytes:
        known = _kept.get(_name(path))
        return super().get_data(path) if known is None else known  # type: ignore[misc]


class Source(_Kept, SourceFileLoader):
    """Compiles what was kept, and leaves no ``.pyc``."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        content = self.get_data(path)
        code = self.source_to_code(content, path)
        lines = importlib.util.decode_source(content).splitlines(keepends=True)
        linecache.cache[path] = (len(content), None, lines, path)  # no time: it is not looked for on the disk
        return code


class _Bytecode(_Kept, BytecodeLoader):
    """A ``.pyc`` without a source, as it was kept."""


class _Extension(ExtensionFileLoader):
    """Loads a compiled module if it is the one that was kept."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        known = _kept.get(_name(self.path))
        if known is not None and hashlib.sha256(Path(self.path).read_bytes()).digest() != known:
            raise _refusal(self.path, "has changed")
        return super().create_module(spec)


class _Finder(MetaPathFinder):
    """Finds importable modules of users as the finders behind it do, and has them taken from what was kept."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, last = fullname.partition(".")[0], fullname.rpartition(".")[2]
        if looks.get() or (last not in _stems and top not in _locations.values()):
            return None
        for finder in list(sys.meta_path):
            if type(finder) is not _Finder and (spec := finder.find_spec(fullname, path, target)) is not None:
                return from_content(spec) if top in _locations.values() or _name(spec.origin or "") in _kept else spec
        return None


def _check_new(path: str) -> None:
    """Check a module that no kept file named; one of a name that is made while code runs is none of this."""
    for location in list(_locations):
        files = files_of_code(location)
        if "" in files and not is_installed(files[""]) and _name(path) in map(_name, files.values()):
            raise _refusal(path, "is new")


def _refusal(path: str, what: str) -> CodeChanged:
    said = f"{path} {what} since the code that imports it was loaded; put back what was there"
    _refused.append(said)
    return CodeChanged(said)


def _name(path: str | Path) -> str:
    return os.path.abspath(path)
