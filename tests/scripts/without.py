"""Runs a script as if packages were not installed: ``python without.py NAME,NAME SCRIPT [argument ...]``."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


class Without:
    """A finder of modules, and of what is installed, that knows nothing of some packages."""

    def __init__(self, finder: Any, names: list[str]) -> None:
        self._finder, self._names = finder, names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in self._names else self._finder.find_spec(name, path, target)

    def find_distributions(self, *args: Any) -> Iterator[Any]:
        found = self._finder.find_distributions(*args) if hasattr(self._finder, "find_distributions") else ()
        return (one for one in found if one.metadata["Name"].lower().replace("-", "_") not in self._names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


if __name__ == "__main__":
    packages, script, *arguments = sys.argv[1:]
    sys.meta_path[:] = [Without(finder, packages.split(",")) for finder in sys.meta_path]
    sys.argv[:] = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
