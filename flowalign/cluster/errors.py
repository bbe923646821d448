"""Errors of a cluster, each in one sentence; free of Ray, so that a CLI may catch it cheaply."""

from __future__ import annotations

from flowalign.run.restarts import RankLost


class ClusterError(RuntimeError):
    """The cluster cannot be reached or used as configured."""


class PlacementError(ClusterError):
    """The actors do not fit: what is needed, what is there, which key to change."""


class WorkerLost(ClusterError):
    """A rollout or reward worker kept dying over the same chunk."""


class LearnerLost(ClusterError, RankLost):
    """A learner rank died, or was silent for too long."""


class ClusterLost(ClusterError):
    """Ray itself is gone, and with it all workers; the run ends at its last checkpoint."""


class WorkerImportError(ClusterError, ImportError):
    """A worker could not import this package, or what it was to unpickle."""


class ObjectLost(ClusterError):
    """What lay in the object store is gone with its node: ``ref``, in hexadecimal digits."""

    def __init__(self, said: str, ref: str = "") -> None:
        super().__init__(said)
        self.ref = ref
