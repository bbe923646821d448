"""The object store of a Ray that is started here: as large as there is room, and never too small for an iteration."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from flowalign.cluster.errors import PlacementError
from flowalign.record.disk import size_text

SHARE = 0.3  # of the room: others start a Ray beside this one, and actors need memory of their own


def object_store_bytes(needed: int) -> int:
    """Return its size where an iteration puts ``needed`` bytes there.

    That is 30 % of the smaller of what ``/dev/shm`` and the memory have free, or what is needed where that is more.

    Raises:
        PlacementError: not even that is free.
    """
    utils: Any = importlib.import_module("ray._private.utils")
    constants: Any = importlib.import_module("ray._private.ray_constants")
    free = {"the memory": utils.estimate_available_memory()}
    if sys.platform == "linux":
        free["/dev/shm"] = utils.get_shared_memory_bytes()
    where = min(free, key=lambda place: free[place])
    least = max(needed, constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES)
    if least > free[where]:
        raise PlacementError(
            f"placement: Ray's object store needs {size_text(least)} for an iteration, {where} has "
            f"{size_text(free[where])} free; make room there (docker: --shm-size), take fewer images an iteration "
            "(data.groups_per_iteration), or leave Ray out (cluster.backend=local)"
        )
    return max(least, int(SHARE * free[where]))
