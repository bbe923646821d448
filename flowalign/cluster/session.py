"""This process's connection to Ray: started here, or joined."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterable, Sequence

import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig

from flowalign.cluster.errors import ClusterError
from flowalign.cluster.placement import Share, own_resources, visible_cores

OBJECT_STORE_BYTES = 1 << 30
_CONNECT_S = 3.0
PASSED_ON = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME")


class RaySession:
    """Starts Ray where ``address`` is null and none runs in this process, else joins; closes only what it opened.

    Raises:
        PlacementError: this machine cannot hold ``asked``; known before anything is started.
        ClusterError: nothing answers at ``address``.
    """

    def __init__(self, address: str | None, asked: Sequence[Share], device: str) -> None:
        self._opened = not ray.is_initialized()
        if not self._opened:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "job_config": _job()}
        if address is None:
            cpus, gpus = own_resources(asked, visible_cores(), _visible_gpus(asked, device))
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
            return
        _check_answers(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, RayError) as error:
            raise ClusterError(f"cluster.address: cannot join Ray at {address}: {_one_line(error)}") from None

    def close(self) -> None:
        if self._opened and ray.is_initialized():
            ray.shutdown()


def worker_env(threads: int) -> dict[str, str]:
    """Environment of an actor: its own thread count, and what it must share with this process."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {
        **passed,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors with no GPU of their own may share the visible ones
    }


class _OnOwnPath(list[str]):
    """Of the directories that Ray adds to its workers' path those where this process looks as well."""

    def extend(self, directories: Iterable[str]) -> None:
        here = {os.path.abspath(entry) for entry in sys.path}
        super().extend(directory for directory in directories if directory in here)


def _job() -> JobConfig:
    """Ray would let workers look into the working directory first, where a user's ``types.py`` or ``rewards.py`` hides
    the package of that name; this process does not look there, unless it was started by ``python -m``."""
    job = JobConfig()
    job._py_driver_sys_path = _OnOwnPath()
    return job


def _visible_gpus(asked: Sequence[Share], device: str) -> int:
    if device == "cpu" and not any(share.gpus for share in asked):
        return 0
    import torch

    return torch.cuda.device_count()


def _check_answers(address: str) -> None:
    """Ray retries a dead address for a minute; a socket knows at once."""
    host, separator, port = address.rpartition(":")
    if "://" in address:
        raise ClusterError(f"cluster.address: {address} is a URL; give auto or host:port, or use `flowalign launch`")
    if not separator:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"cluster.address: nothing answers at {address} ({_one_line(error)}); give the host:port that "
            "`ray start` printed, or null to start Ray here"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
