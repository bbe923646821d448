"""Files that travel with a launched job, and may hide a module there.

Ray puts the packed directory first on the path of the job and of its workers, before the standard library.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from flowalign.cluster.errors import ClusterError

NEEDED = ("flowalign", "torch", "ray", "transformers", "diffusers", "peft", "deepspeed", "datasets", "wandb")
_NOBODYS = {
    "test",
    "tests",
    "docs",
    "examples",
    "scripts",
}  # some distribution has such a package, and nobody imports it
_OURS = {"flowalign", "rewards"}


def check_hides_nothing(home: Path, excluded: Sequence[str]) -> None:
    """Raise ClusterError, with its name, for a file or package of ``home`` that hides a module which a run imports.

    A ``rewards`` is none: `flowalign` finds its own package of that name wherever the path leads.
    """
    found = {
        entry.stem if entry.suffix == ".py" else entry.name: entry for entry in sorted(home.iterdir(), reverse=True)
    }
    mine = {name: entry for name, entry in found.items() if _is_module(entry) and not _excluded(entry, excluded)}
    hiding = {name: "Python's own" for name in mine.keys() & (sys.stdlib_module_names - _NOBODYS)}
    if "flowalign" in mine and not (home / "flowalign" / "cli" / "__init__.py").is_file():
        hiding["flowalign"] = "this project's"
    others = mine.keys() - hiding.keys() - _NOBODYS - _OURS
    hiding |= dict.fromkeys(others & _imported() if others else (), "an installed")
    if hiding:
        name = min(hiding)
        more = f" (and so do {len(hiding) - 1} more: {', '.join(sorted(hiding)[1:5])})" if len(hiding) > 1 else ""
        raise ClusterError(
            f"{mine[name]} would travel with the job and hide {hiding[name]} module {name} from it{more}; rename "
            "it, or name it under exclude in the cluster file"
        )


def _is_module(entry: Path) -> bool:
    return (entry.suffix == ".py" and entry.is_file()) or (entry / "__init__.py").is_file()


def _excluded(entry: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(entry.name, pattern.strip("/")) for pattern in patterns)


def _imported() -> set[str]:
    """Return the names by which the distributions that a run needs can be imported."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pending, needed = [*NEEDED], set[str]()
    while pending:
        name = canonicalize_name(pending.pop())
        if name in needed:
            continue
        needed.add(name)
        try:
            wanted = map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue
        pending += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": "train"})]
    return {module for module, names in packages_distributions().items() if needed & set(map(canonicalize_name, names))}
