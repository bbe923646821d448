"""What a preference set that was interrupted needs to go on: its options, and how far its last file reached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowalign.config.section import ConfigError
from flowalign.record.disk import folder_for, write_text
from flowalign.record.textfiles import read_object

WORK = ".preferences"


class Continued:
    """The notes in a hidden folder of ``out``, which `done` removes. ``asked`` is all that decides the set's content.

    Raises:
        ConfigError: ``out`` holds a finished set, or one that was begun with other options.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any]) -> None:
        self._folder, self._asked = out / WORK, json.loads(json.dumps(asked))
        self._options, self._reached = self._folder / "options.json", self._folder / "reached.json"
        if self._options.is_file():
            check_same("--out", out, read_object(self._options), self._asked)
        elif any(out.glob("*.parquet")):
            raise ConfigError("--out", f"{out} holds parquet files already; name another directory")

    @property
    def reached(self) -> dict[str, Any]:
        """What `reach` said last; empty at the beginning."""
        begun = self._options.is_file() and self._reached.is_file()
        return dict(read_object(self._reached)) if begun else {}

    def begin(self) -> None:
        """Keep the options; before the first file, which would else be taken for another set's."""
        if not self._options.is_file():
            with folder_for(self._folder):
                write_text(self._options, json.dumps(self._asked) + "\n")

    def reach(self, state: Mapping[str, Any]) -> None:
        """Say how far what lies on the disk reaches."""
        write_text(self._reached, json.dumps(state) + "\n")

    def done(self) -> None:
        """Forget how the set came about."""
        if self._folder.is_dir():
            shutil.rmtree(self._folder)


def check_same(key: str, folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError that names ``key`` where what lies in ``folder`` was begun with other options."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        was, wanted = (json.dumps(own.get(changed[0]), ensure_ascii=False) for own in (before, now))
        raise ConfigError(
            key,
            f"{folder} was begun with {changed[0]} {was}, now it is {wanted}; give the same options to continue, or "
            "name another directory",
        )
