"""Which of a user's files some code is made of: its own and those beside it that it imports. Nothing is run for that.

It looks where `userfile` looks when the code runs: a neighbour is found under its plain name and by relative imports,
whatever the working directory is. Imports that only running the code would tell of (``import_module(name)``) are not
seen.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from rewards.interface import SpecError
from rewards.source import find_module

_OURS = sys.stdlib_module_names | {"flowalign", "rewards"}
_MOST = 300


def files_of_code(location: str, base_dir: Path = Path(".")) -> dict[str, Path]:
    """Files by name: ``""`` is the code itself, the others are named relative to the folder that imports start from.

    ``location`` is ``path/to/file.py`` or ``package.module``. Of an installed package only its own modules are listed.
    Empty where nothing can be found.
    """
    if location.endswith(".py") or "/" in location:
        file = (base_dir / Path(location).expanduser()).resolve()
        return _reached(file, file.parent, None) if file.is_file() else {}
    try:
        found = find_module(location)
    except SpecError:
        return {}
    if found is None:
        return {}
    parts = location.split(".")
    root = found.parents[len(parts) if found.name == "__init__.py" else len(parts) - 1]
    around = [folder / "__init__.py" for folder in list(found.parents)[: list(found.parents).index(root)]]
    packages = [path for path in around if path != found and path.is_file()]
    return _reached(found, root, parts[0] if _installed(root) else None, packages)


def _installed(root: Path) -> bool:
    return root.resolve() in {Path(place).resolve() for place in sysconfig.get_paths().values()}


def _reached(first: Path, root: Path, alone: str | None, packages: Sequence[Path] = ()) -> dict[str, Path]:
    """``first``, the ``packages`` around it and all that these import under ``root``, or ``alone`` in one package."""
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
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            start = root
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            names = [[*module, alias.name] for alias in node.names]
            start = root if not node.level else _above(file.parent, node.level - 1)
            if not start.is_relative_to(root):
                continue
        else:
            continue
        absolute = not getattr(node, "level", 0)
        for name in names:
            if absolute and (name[0] in _OURS or alone not in (None, name[0])):
                continue
            yield from _on_the_way(start, name)


def _above(folder: Path, levels: int) -> Path:
    for _ in range(levels):
        folder = folder.parent
    return folder


def _on_the_way(folder: Path, name: list[str]) -> Iterator[Path]:
    """The files that importing ``name`` from ``folder`` runs."""
    for part in name:
        module, package = folder / f"{part}.py", folder / part
        if (package / "__init__.py").is_file():
            yield package / "__init__.py"
        elif module.is_file():
            yield module
            return
        elif not package.is_dir():
            return
        folder = package
