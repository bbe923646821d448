"""The log of this package, and lines that it has once."""

from __future__ import annotations

import logging
from functools import lru_cache

LOG = logging.getLogger("flowalign")


@lru_cache
def say_once(text: str) -> None:
    LOG.warning(text)
