"""This process's connection to Ray: started here, or joined."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.job_config import JobConfig

from flowalign.cluster import guardian
from flowalign.cluster.errors import ClusterError, ClusterLost
from flowalign.cluster.folder import RAYS, delete, own_folder, sweep
from flowalign.cluster.heads import ASKS_FOR_TOKEN, address_of, check_answers
from flowalign.cluster.lookout import Lookout
from flowalign.cluster.placement import Share, own_resources
from flowalign.cluster.places import visible_gpus
from flowalign.cluster.store import object_store_bytes
from flowalign.cluster.tokens import close_token_file
from flowalign.config.cluster import visible_cores
from rewards.errors import one_line

_SENT_TO_ALL = (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LOST_S, _LOOK_S = 30.0, 5.0  # Ray itself ends a process, without a word, whose head is gone for 60 s
UNWAITED = "RAY_IGNORE_UNHANDLED_ERRORS"
NICENESS = "RAY_worker_niceness"
PASSED_ON = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", UNWAITED)


class RaySession:
    """Starts Ray where ``address`` is null and none runs in this process, else joins; closes only what it opened.

    An iteration puts ``needed`` bytes into the object store, which has ``store`` where Ray was started here. ``said``
    tells what was left of earlier runs; ``say`` is told of a Ray that is stopped, which is lost after ``patience_s``.

    Raises:
        PlacementError: this machine cannot hold ``asked``; known before anything is started.
        ClusterError: nothing answers at ``address``.
    """

    def __init__(
        self,
        address: str | None,
        asked: Sequence[Share],
        device: str,
        patience_s: float = LOST_S,
        say: Callable[[str], None] = lambda text: None,
        needed: int = 0,
    ) -> None:
        self._opened = not ray.is_initialized()
        self._folder: str | None = None
        self._guardian: Any = None
        self._token: str | None = None
        self._processes: dict[str, Any] = {}
        self._lookout: Lookout | None = None
        self._patience_s, self._say = patience_s, say
        self._silent_since: float | None = None
        self._looked = time.monotonic()
        self.said: list[str] = []
        self.store: int | None = None
        if not self._opened:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Whoever lost a worker says so once. Ray would print a trace of each answer that nobody waits for since then.
        os.environ.setdefault(UNWAITED, "1")
        close_token_file()
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "job_config": _job()}
        if address is None:
            cpus, gpus = own_resources(asked, visible_cores(), visible_gpus(asked, device))
            self.store = object_store_bytes(needed)
            with _hearing_alone():
                self._start(num_cpus=cpus, num_gpus=gpus, object_store_memory=self.store, **quiet)
            return
        address = address_of(address)
        check_answers(address)
        read_token_anew()
        try:
            with _hearing_alone():
                ray.init(address=address, **quiet)
        except AuthenticationError:
            raise ClusterError(ASKS_FOR_TOKEN.format(address)) from None
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise ClusterError(f"cluster.address: cannot join Ray at {address}: {one_line(error)}") from None

    def _start(self, **options: Any) -> None:
        """Start a Ray of this run alone, on loopback.

        It has a token of its own: Ray would leave one in the user's home that everybody may read, and every cluster
        that is started there later would ask for it. Its workers are as nice as this process: by itself Ray makes them
        nicer by 15, and beside any other work they starve.
        """
        if NICENESS not in os.environ:
            options["_system_config"] = {"worker_niceness": 0}
        told = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
        own_token = not told and os.environ.get("RAY_AUTH_MODE") != "disabled"
        self.said = sweep()
        for again in (True, False):
            if own_token:
                self._token = os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            read_token_anew()
            self._folder = own_folder()
            self._guardian = guardian.start(self._folder)
            try:
                with _on_loopback():
                    ray.init(
                        address="local",
                        include_dashboard=False,
                        _temp_dir=os.path.join(self._folder, RAYS),
                        **options,
                    )
                break
            except (OSError, RuntimeError, ValueError, RayError) as error:
                guardian.end(self._folder)  # Ray leaves what it had started
                self.close()
                if not (again and "gcs" in str(error).lower()):
                    raise ClusterError(f"Ray cannot start on this machine: {one_line(error)}") from None
                self.said.append(f"Ray did not start and is started again: {one_line(error)}")
        started = importlib.import_module("ray._private.worker")._global_node.all_processes
        self._processes = {name: started[name][0].process for name in ("gcs_server", "raylet") if started.get(name)}
        self._lookout = Lookout(self._folder, self._processes, self._patience_s)

    @property
    def lost(self) -> bool:
        """True where Ray would answer no question any more."""
        silent = self._silent_since is not None and time.monotonic() - self._silent_since > LOST_S
        stopped = self._lookout is not None and (self._lookout.lost or self._lookout.stopped())
        return silent or bool(stopped) or any(process.poll() is not None for process in self._processes.values())

    def check(self) -> None:
        """Look whether Ray is there; to be asked often. While Ray is stopped this waits, and nobody else is late.

        Raises:
            ClusterLost: it is gone, or was stopped for too long: who, and how.
        """
        if self._lookout is not None:
            self._lookout.wait(self._say)
            if self._lookout.lost is not None:
                raise ClusterLost(self._lookout.lost)
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise ClusterLost(
                    f"Ray's {name} (process {process.pid}) is gone, and the workers with it: {_ended(process)}"
                )
        if self._opened and self._folder is None and time.monotonic() - self._looked > _LOOK_S:
            self._look_for_head()

    def _look_for_head(self) -> None:
        """Look for the head of a cluster that was joined."""
        address = ray.get_runtime_context().gcs_address
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
            self._silent_since = None
        except OSError as error:
            self._silent_since = self._silent_since or time.monotonic()
            if self.lost:
                raise ClusterLost(
                    f"Ray's head at {address} has not answered for {LOST_S:g} s ({one_line(error)})"
                ) from None
        self._looked = time.monotonic()

    def begin_end(self) -> None:
        """Give a Ray of this run a few seconds from now on; then it is killed, whatever is still asked of it."""
        if self._lookout is not None:
            self._lookout.begin_end()

    def close(self) -> None:
        self.begin_end()
        if self._folder is not None and self.lost:
            guardian.end(self._folder)  # else Ray asks those that do not answer any more
        try:
            if self._opened and ray.is_initialized():
                ray.shutdown()
        finally:
            self._clear()

    def _clear(self) -> None:
        if self._lookout is not None:
            self._lookout.close()
        if self._folder is not None:
            delete(self._folder)
            if self._guardian is not None:
                self._guardian.kill()
                self._guardian.wait()
            self._folder, self._processes = None, {}
        if self._token is not None:
            if os.environ.get("RAY_AUTH_TOKEN") == self._token:
                del os.environ["RAY_AUTH_TOKEN"]
            self._token = None
            read_token_anew()


def read_token_anew() -> None:
    """Make Ray ask again which token this process has.

    It remembers that of the first cluster that the process had to do with, and another cluster would shut us out.
    """
    loader: Any = importlib.import_module("ray._raylet").AuthenticationTokenLoader
    loader.instance().reset_cache()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that is started inside be reached from this machine alone.

    As an option Ray takes no such address: it puts one in its place that others reach, and then listens on every
    interface.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def worker_env(threads: int) -> dict[str, str]:
    """Return the environment of an actor: its own thread count, and what it must share with this process."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {
        **passed,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors with no GPU of their own may share the visible ones
    }


@contextmanager
def _hearing_alone() -> Iterator[None]:
    """Shield the processes that are started inside from what a terminal or Slurm sends to all that belong together.

    The run needs its workers for a last checkpoint. They do hear SIGTERM, by which Ray ends them. This process hears
    afterwards what came meanwhile, by its own handlers, of which Ray replaces one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminate = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SENT_TO_ALL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _OnOwnPath(list[str]):
    """A filter of the directories that Ray adds to its workers' path: those remain where this process looks as well."""

    def extend(self, directories: Iterable[str]) -> None:
        here = {os.path.abspath(entry) for entry in sys.path}
        super().extend(directory for directory in directories if directory in here)


def _job() -> JobConfig:
    """Return the job's configuration.

    Ray would let workers look into the working directory first, where a user's ``types.py`` or ``rewards.py`` hides the
    package of that name; this process does not look there, unless it was started by ``python -m``.
    """
    job = JobConfig()
    job._py_driver_sys_path = _OnOwnPath()
    return job


def _ended(process: Any) -> str:
    code = process.returncode
    return f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
