"""Python's search for cycles, spared what a process imports and keeps."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Search for no cycles meanwhile, nor ever among what the process holds then.

    Libraries make a million objects that stay, and each search walks over all of them: a process that loads its first
    pipeline is so ready in four fifths of the time. What lies in a cycle already is never freed, so this is for
    imports at the beginning of a process; where none was new, nothing is put aside.
    """
    enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
            atexit.register(gc.unfreeze)  # some bindings write a page about objects that the last search leaves
        if enabled:
            gc.enable()
