"""Files that a user's code is made of: its own and those beside it that it imports. Nothing is run for that.

It looks where `loading` looks when the code runs: a neighbour is found under its plain name and by relative imports,
whatever the working directory is, compiled modules (``.so``, ``.pyd``, ``.pyc``) included. What these import cannot be
read off them, so where one lies in a package all of the package counts. Imports of a name that only running the code
would tell of (``import_module(name)``) are not seen.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from pathlib import Path

SUFFIXES = (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES, *BYTECODE_SUFFIXES)  # in the order in which Python looks
_OURS = sys.stdlib_module_names | {"flowalign", "rewards"}
_MOST = 300
# Whether a finder is asked only where a module is, as here: nothing is imported that could be another one.
looks: ContextVar[bool] = ContextVar("looks", default=False)


def files_of_code(location: str, base_dir: Path = Path(".")) -> dict[str, Path]:
    """Return the files by name.

    ``""`` is the code itself, others are named relative to the folder that imports start from.

    ``location`` is ``path/to/file.py`` or ``package.module``. Of an installed package only its own modules are listed.
    Empty where nothing can be found.
    """
    if location.endswith(".py") or "/" in location:
        file = (base_dir / Path(location).expanduser()).resolve()
        return _reached(file, file.parent, None) if file.is_file() else {}
    parts = location.split(".")
    found = _module(parts)
    if found is None:
        return {}
    root = found.parents[len(parts) if found.name.startswith("__init__.") else len(parts) - 1]
    folders = list(found.parents)[: list(found.parents).index(root)]
    around = [path for folder in folders if (path := _file(folder)) is not None and path.parent == folder]
    packages = [path for path in around if path != found]
    return _reached(found, root, parts[0] if is_installed(root) else None, packages)


def is_installed(path: Path) -> bool:
    """Tell whether a file or folder lies where Python keeps its own modules or those of packages."""
    places = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not places.isdisjoint((path.resolve(), *path.resolve().parents))


def _module(parts: list[str]) -> Path | None:
    """Return the file that importing a module runs last; no package is imported to find it."""
    looking = looks.set(True)
    try:
        top = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return None
    finally:
        looks.reset(looking)
    if top is None:
        return None
    if len(parts) == 1:
        return Path(top.origin) if top.origin is not None and top.origin.endswith(SUFFIXES) else None
    places = [Path(root, *parts[1:]) for root in top.submodule_search_locations or ()]
    return next((found for place in places if (found := _file(place)) is not None), None)


def _file(place: Path) -> Path | None:
    """Return the file that Python takes for a module without a suffix: a package, else a file."""
    bases = [f"{place}{os.sep}__init__"] if place.is_dir() else []
    names = (f"{base}{suffix}" for base in (*bases, place) for suffix in SUFFIXES)
    return next((Path(name) for name in names if os.path.isfile(name)), None)


def _reached(first: Path, root: Path, alone: str | None, packages: Sequence[Path] = ()) -> dict[str, Path]:
    """Return ``first``, the ``packages`` around it and all that these import under ``root``, or ``alone`` in a
    package."""
    found, pending, seen = {"": first}, [first, *packages], {first, *packages}
    found |= {path.relative_to(root).as_posix(): path for path in packages}
    while pending and len(found) < _MOST:
        for path in _imported(pending.pop(), root, alone):
            if path not in seen:
                seen.add(path)
                found[path.relative_to(root).as_posix()] = path
                pending.append(path)
    return found


def _imported(file: Path, root: Path, alone: str | None) -> Iterator[Path]:
    if file.suffix not in SOURCE_SUFFIXES:
        if file.parent != root and alone is None:
            yield from _importable(root / file.relative_to(root).parts[0])
        return
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    for level, name in dict.fromkeys(_names(tree)):
        if not level and (name[0] in _OURS or alone not in (None, name[0])):
            continue
        start = _above(file.parent, level - 1) if level else root
        if start.is_relative_to(root):
            yield from _on_the_way(start, name)


def _names(tree: ast.AST) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield what is imported: how many dots, and the name; its last part may be something in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            yield from ((node.level, (*module, alias.name)) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called, name = getattr(node.func, "attr", getattr(node.func, "id", "")), node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str) and name.strip("."):
                yield len(name) - len(name.lstrip(".")), tuple(name.strip(".").split("."))


def _importable(package: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(package):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        yield from (Path(place, name) for name in sorted(files) if name.endswith(SUFFIXES))


def _above(folder: Path, levels: int) -> Path:
    for _ in range(levels):
        folder = folder.parent
    return folder


def _on_the_way(folder: Path, name: Sequence[str]) -> Iterator[Path]:
    """Yield the files that importing ``name`` from ``folder`` runs."""
    for part in name:
        found, folder = _file(folder / part), folder / part
        if found is not None:
            yield found
        if not folder.is_dir() or (found is not None and found.parent != folder):
            return
