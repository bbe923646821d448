"""The mirror of a run's metrics in wandb: nothing that goes wrong there may end a run."""

from __future__ import annotations

import importlib.util
import os
import socket
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flowalign.config.logging import LoggingConfig
from flowalign.config.section import ConfigError
from flowalign.record.log import LOG
from rewards.errors import one_line

_CONNECT_S, _VERIFY_S, _START_S, _FINISH_S = 3.0, 5, 30, 60
_KEY = "logging.wandb"
_OTHERWISE = "write logging.wandb=offline (`wandb sync` sends such a run later) or disabled"


def check_wandb(config: LoggingConfig) -> None:
    """Ask whether wandb is there, and whether it would take a run that is to be logged online.

    Raises:
        ConfigError: it is not installed, there is no key, it is refused, or no server answers; within seconds.
    """
    if config.wandb == "offline" and importlib.util.find_spec("wandb") is None:
        _wandb()
    if config.wandb != "online":
        return
    wandb = _wandb()
    os.environ.pop("WANDB_MODE", None)  # the configuration says what holds
    url = str(wandb.setup().settings.base_url)
    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise ConfigError(_KEY, f"online, but wandb cannot use the key: {_said(error)}; or {_OTHERWISE}") from None
    if not known:
        raise ConfigError(
            _KEY, f"online needs a key: set WANDB_API_KEY, or run `wandb login` on this machine; or {_OTHERWISE}"
        )
    _check_answers(url)
    try:
        wandb.Api(timeout=_VERIFY_S)
    except wandb.errors.Error as error:
        raise ConfigError(_KEY, f"online, but {url} does not let us in: {_said(error)}; or {_OTHERWISE}") from None


class Mirror:
    """Sends what is logged to wandb, or to its files; what fails there is said once and the run goes on."""

    def __init__(self, run_dir: Path, name: str, config: LoggingConfig) -> None:
        self._run: Any = None
        if config.wandb == "disabled":
            return
        wandb = _wandb()
        try:
            self._run = _start(wandb, run_dir, name, config, config.wandb)
        except (wandb.errors.Error, OSError, TimeoutError) as error:
            LOG.warning("wandb cannot start (%s); this run is logged offline for `wandb sync`", _said(error))
        if self._run is None and config.wandb == "online":
            self._try("start offline", lambda: self._keep(_start(wandb, run_dir, name, config, "offline")))

    def log(self, row: Mapping[str, Any], step: int) -> None:
        if self._run is not None:
            run = self._run
            self._try("log", lambda: run.log(dict(row), step=step))

    def close(self) -> None:
        if self._run is not None:
            self._try("finish", self._run.finish)
            self._run = None

    def _keep(self, run: Any) -> None:
        self._run = run

    def _try(self, what: str, work: Any) -> None:
        """Make a call of wandb.

        Its own process may die, its socket break, its disk fill up: any error of its is said, none is raised.
        """
        try:
            work()
        except Exception as error:
            LOG.warning("wandb cannot %s (%s); metrics.jsonl goes on without it", what, _said(error))
            self._run = None
            with suppress(Exception):  # else it prints the same as a traceback when Python ends
                _wandb().teardown()


def _wandb() -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(_KEY, f"wandb does not import ({_said(error)}); install it, or write disabled") from None
    return wandb


def _start(wandb: Any, run_dir: Path, name: str, config: LoggingConfig, mode: str) -> Any:
    settings = wandb.Settings(console="off", x_disable_stats=True, init_timeout=_START_S, finish_timeout=_FINISH_S)
    return wandb.init(
        project=config.wandb_project, name=name, id=name, dir=str(run_dir), mode=mode, resume="allow", settings=settings
    )


def _check_answers(url: str) -> None:
    """Check that the address answers.

    A dead address keeps wandb for a minute and more; a socket knows at once. A proxy has addresses of its own.
    """
    parts = urlsplit(url)
    if parts.hostname is None or urllib.request.getproxies():
        return
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConfigError(_KEY, f"online, but {url} does not answer ({_said(error)}); {_OTHERWISE}") from None


def _said(error: BaseException) -> str:
    return one_line(error).rstrip(".")
