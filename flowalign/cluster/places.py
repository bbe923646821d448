"""What is known of a run's places before Ray is started or joined."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from flowalign.cluster.heads import address_of, check_answers
from flowalign.cluster.placement import Share, own_resources, shares
from flowalign.config.cluster import visible_cores
from flowalign.config.run import RunConfig


def check_places(config: RunConfig) -> None:
    """Check that this machine holds the actors of a Ray of the run's own, or that a head answers at the address of
    another; within seconds, and nothing is started.

    Raises:
        PlacementError: the actors do not fit. ClusterError: nothing answers.
    """
    if ray.is_initialized():  # in this process, whose Ray the run takes
        return
    if config.cluster.address is not None:
        check_answers(address_of(config.cluster.address))
        return
    asked = shares(config)
    own_resources(asked, visible_cores(), visible_gpus(asked, config.cluster.device))


def visible_gpus(asked: Sequence[Share], device: str) -> int:
    """Return the number of GPUs that torch sees here; 0 where neither the device nor an actor asks for one."""
    if device == "cpu" and not any(share.gpus for share in asked):
        return 0
    import torch

    return torch.cuda.device_count()
