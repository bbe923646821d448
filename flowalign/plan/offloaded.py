"""Bytes of a learner's rank that ``learner.offload`` keeps off its device."""

from __future__ import annotations

from collections.abc import Iterable

from flowalign.config.updates import UpdatesConfig
from flowalign.engine.piecewise import PIECE

_MOMENTS = 2 * 4 * PIECE  # of the piece that is in


def offloaded_bytes(
    learner: UpdatesConfig, device: str, num_layers: int, *, moments: int, averages: int, frozen: Iterable[int]
) -> int:
    """Return how many bytes fewer a rank holds than with ``offload: none``.

    ``moments`` and ``averages`` are a rank's own. ``frozen`` are the bytes of the ``num_layers`` blocks of each network
    that it holds whole and does not learn: all go but the one that is at work.
    """
    if learner.offload == "none" or (learner.offload == "host" and device == "cpu"):
        return 0
    return max(0, moments - _MOMENTS) + averages + sum(frozen) * (num_layers - 1) // num_layers
