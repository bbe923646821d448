"""Reinforcement-learning alignment of flow-matching image models on Ray clusters."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

__version__ = "0.2.0.dev0"


def _find_own_rewards() -> None:
    """Bind the name ``rewards`` to the package beside this one.

    A user's ``rewards.py`` or folder ``rewards`` may come first on the path: in the working directory of
    ``python -m flowalign.cli``, or in that of a job on a cluster.
    """
    home = Path(__file__).resolve().parent.parent / "rewards"
    known = sys.modules.get("rewards")
    if known is not None:
        if str(home) not in map(str, getattr(known, "__path__", ())) and home.is_dir():
            raise ImportError(
                f"a module `rewards` was imported from {getattr(known, '__file__', None)} before flowalign, whose own "
                "package has that name; import flowalign first, or rename the file"
            )
        return
    spec = importlib.util.spec_from_file_location(
        "rewards", home / "__init__.py", submodule_search_locations=[str(home)]
    )
    if not home.is_dir() or spec is None or spec.loader is None:
        return
    sys.modules["rewards"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_find_own_rewards()
