"""Comparison of files by a worker that starts in mid-run, on whatever machine, before and after it loads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.record.hashing import Stamp
from flowalign.run.made.hashing import Unsteady, hash_file, holds
from flowalign.run.made.ingredients import Part, parts_of
from flowalign.run.made.records import UNREADABLE, Record, difference, record_of, said_of, stamp_of


@dataclass(frozen=True)
class Expected:
    """The files that a worker that starts in mid-run must find.

    ``states`` spares it from hashing what nobody has touched.
    """

    base_dir: Path
    record: Record
    states: Mapping[Path, tuple[Stamp, str]]

    @contextmanager
    def held(self, config: RunConfig) -> Iterator[None]:
        """Compare the files before and after they are loaded inside.

        Raises:
            ConfigError: they are not those that the run began with.
        """
        parts = tuple(parts_of(config, self.base_dir, self.record.__contains__))
        stamps = {part: stamp_of(part) for part in parts}
        hashes = {part: self._hash(part, stamps[part]) for part in parts}
        found = record_of(parts, hashes.__getitem__)
        for key, files in self.record.items():
            if changed := difference(files, found.get(key, {})):
                said = said_of([part for part in parts if part.key == key], changed)
                raise ConfigError(key, f"{said} since the run began, and a worker made anew would load it; {_PUT_BACK}")
        yield
        for part in parts:
            if stamp_of(part) != stamps[part] and not (part.path and holds(part.path, hashes[part])):
                raise ConfigError(part.key, f"{part} was changed while a worker loaded it; {_PUT_BACK}")

    def _hash(self, part: Part, now: Stamp | None) -> str:
        if part.known is not None or part.path is None:
            return part.known or ""
        state = self.states.get(part.path)
        if state is not None and state[0] == now:
            return state[1]
        with suppress(Unsteady, OSError):
            return UNREADABLE if now is None else hash_file(part.path, now)
        return UNREADABLE


_PUT_BACK = "put back what was there, and the same command goes on"


@contextmanager
def held(expected: Expected | None, config: RunConfig) -> Iterator[None]:
    """Call ``expected.held``; do nothing for a worker that starts with the run."""
    if expected is None:
        yield
        return
    with expected.held(config):
        yield
