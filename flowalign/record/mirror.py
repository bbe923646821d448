"""The mirror of a run's metrics and pictures in its trackers: nothing that goes wrong there may end a run."""

from __future__ import annotations

import json
import os
import secrets
import socket
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flowalign.config.logging import LoggingConfig
from flowalign.config.section import ConfigError
from flowalign.record.disk import DiskError, write_text
from flowalign.record.installed import is_installed
from flowalign.record.log import LOG
from flowalign.record.trackers import TRACKERS, Picture, Record, Tracker
from rewards.errors import one_line

FILE = "trackers.json"
_CONNECT_S, _VERIFY_S = 3.0, 5
_LONGEST_NAME = 50  # of a run, in the id of a record; wandb takes 64 in all
_KEY = "logging.wandb"
_OTHERWISE = "write logging.wandb=offline (`wandb sync` sends such a run later) or disabled"


def check_trackers(config: LoggingConfig) -> None:
    """Ask whether the trackers are installed, and whether wandb would take a run that is to be logged online.

    Raises:
        ConfigError: one is not installed, there is no key, it is refused, or no server answers; within seconds.
    """
    for name in config.trackers:
        if not is_installed(name):
            raise ConfigError("logging.trackers", f"{name} is not installed; pip install {name}, or leave it out")
    if config.wandb == "offline" and not is_installed("wandb"):
        _wandb()
    if config.wandb == "online":
        _check_online()


def _check_online() -> None:
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
    """Hands what is logged to the trackers; what fails there is said once, and the run goes on without that one."""

    def __init__(
        self,
        run_dir: Path,
        name: str,
        config: LoggingConfig,
        *,
        kept: Sequence[Mapping[str, Any]] = (),
        recorded: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the trackers of a run that goes on after the rows ``kept``, and had written some up to ``recorded``.

        A tracker that has nothing of this record gets these rows and their pictures first. ``facts`` is the run's
        configuration.
        """
        self._open: dict[str, Tracker] = {}
        self._most, self._begun = config.pictures, max((row["iteration"] for row in kept), default=-1)
        wanted = [*(() if config.wandb == "disabled" else ("wandb",)), *config.trackers]
        if not wanted:
            return
        record_id, known = _record_of(run_dir, name) if kept else (_new_id(name), [])
        for tracker in wanted:
            own = recorded if tracker in known else None
            record = Record(run_dir, name, record_id, config.wandb_project, config.wandb, facts or {}, self._begun, own)
            self._start(tracker, record)
        try:
            write_text(
                run_dir / FILE, json.dumps({"record": record_id, "trackers": sorted({*known, *self._open})}) + "\n"
            )
        except DiskError as error:
            LOG.warning("%s; a run that goes on from here begins another record", error)
        self._catch_up(run_dir, kept)

    def log(self, row: Mapping[str, Any], step: int, only: Collection[str] | None = None) -> None:
        values = {key: value for key, value in row.items() if value is not None}
        self._each("log", step, lambda tracker: tracker.row(values, step), only)

    def pictures(self, folder: Path, step: int, only: Collection[str] | None = None) -> None:
        """Show the first pictures of an evaluation, as they lie in ``folder``."""
        if self._open and self._most:
            shown = pictures_of(folder)[: self._most]
            self._each("show pictures", step, lambda tracker: tracker.pictures(shown, step), only)

    def close(self) -> None:
        self._each("finish", None, lambda tracker: tracker.close())
        self._open = {}

    def _start(self, name: str, record: Record) -> None:
        try:
            self._open[name] = TRACKERS[name](record)
        except Exception as error:  # theirs to raise what they like
            offline = name == "wandb" and record.mode == "online"
            LOG.warning(
                "%s cannot start (%s); %s",
                name,
                _said(error),
                "this run is logged offline for `wandb sync`" if offline else "metrics.jsonl goes on without it",
            )
            if offline:
                self._start(name, replace(record, mode="offline"))

    def _catch_up(self, run_dir: Path, kept: Sequence[Mapping[str, Any]]) -> None:
        """Give the rows that a run goes on after, and their pictures, to those that have nothing of its record."""
        behind = [name for name, tracker in self._open.items() if tracker.after is None]
        for row in kept if behind else ():
            step = row["iteration"]
            if (folder := samples_of(run_dir, step)).is_dir():
                self.pictures(folder, step, behind)
            self.log(row, step, behind)

    def _each(
        self, what: str, step: int | None, work: Callable[[Tracker], Any], only: Collection[str] | None = None
    ) -> None:
        """Make a call of each tracker, or of those ``only``, that does not have ``step``.

        Its own process may die, its socket break, its disk fill up: any error of its is said, none is raised.
        """
        for name, tracker in list(self._open.items()):
            has = step is not None and tracker.after is not None and step <= tracker.after
            if has or name not in (self._open if only is None else only):
                continue
            try:
                work(tracker)
            except Exception as error:
                LOG.warning("%s cannot %s (%s); metrics.jsonl goes on without it", name, what, _said(error))
                del self._open[name]
                if name == "wandb":
                    with suppress(Exception):  # else it prints the same as a traceback when Python ends
                        _wandb().teardown()


def samples_of(run_dir: Path, iteration: int) -> Path:
    """Return the folder of the pictures of an evaluation."""
    return run_dir / "samples" / f"iteration_{iteration:06d}"


def pictures_of(folder: Path) -> list[Picture]:
    """Return the pictures of an evaluation from its ``index.json``; none where that cannot be read."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        return [Picture(folder / one["file"], Path(one["file"]).stem, one["prompt"]) for one in index]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _record_of(run_dir: Path, name: str) -> tuple[str, list[str]]:
    """Return the id of a run's record, and the trackers that have some of it."""
    try:
        found = json.loads((run_dir / FILE).read_bytes())
        return str(found["record"]), [str(tracker) for tracker in found["trackers"]]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = any(run_dir.glob(f"wandb/*run-*-{name}"))  # before there was such a file
        return (name, ["wandb"]) if earlier else (_new_id(name), [])


def _new_id(name: str) -> str:
    return f"{name[:_LONGEST_NAME]}-{secrets.token_hex(3)}"


def _wandb() -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(_KEY, f"wandb does not import ({_said(error)}); install it, or write disabled") from None
    return wandb


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
