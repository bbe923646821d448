"""The quickstart's configuration, as it comes with the package: one text with ``configs/shapes/quickstart.yaml``."""

from __future__ import annotations

import shlex
from pathlib import Path

from flowalign.config.sections import SHIPPED

FILE = SHIPPED.parent / "quickstart.yaml"
IN_REPOSITORY = "configs/shapes/quickstart.yaml"
MODELINE = "# yaml-language-server:"


def quickstart(to: Path) -> str:
    """Return the quickstart's configuration as the file ``to``: its own command, and no schema that lies elsewhere."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(MODELINE)]
    return "\n".join(kept).replace(IN_REPOSITORY, shlex.quote(str(to))) + "\n"
