"""Which packages are here."""

from __future__ import annotations

import importlib.util


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported, and is no mere folder of this name where the command runs.

    Trackers leave such folders behind: ``wandb/``, ``mlflow/``.
    """
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
