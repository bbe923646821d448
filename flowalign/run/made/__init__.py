"""Holds a run to what it is made of: hashed at its start, kept in its checkpoints, compared when it goes on.

``state.json`` of a checkpoint has ``made_of``, a hash by key and file, and ``accepted_changes``, what the user was told
of and took all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flowalign.config.fields import MayBeAccepted, marked
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.record.accepted import ACCEPTED
from flowalign.record.checkpoint import Checkpoint, Say
from flowalign.record.contents import ACCEPT, base_hash_of
from flowalign.run.made.hashing import Hashes, Unsteady, holds
from flowalign.run.made.ingredients import Part, is_manifest, parts_of
from flowalign.run.made.late import Expected
from flowalign.run.made.records import UNREADABLE, Record, pipeline_difference, record_of, said_of, stamp_of

RECORD = "made_of"
_PUT_BACK = "put back what was there, and the same command goes on from the last checkpoint"
SMALL = 16 * 2**20
_TRANSFORMER = re.compile(r"transformer/([^/]+\.safetensors)")


@dataclass
class Accepted:
    """Keys whose content may differ from what the run was made of, and the differences that were found there.

    Of learning rates, which are compared where configurations are, ``rates`` has both values where they differ.
    """

    keys: Sequence[str] = ()
    rates: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)


class MadeOf:
    """The files that a run is made of, as they are when this is made: before anything of them is loaded.

    Files are hashed in the background; whoever asks for a hash waits for it.
    """

    def __init__(self, config: RunConfig, base_dir: Path, accepted: Accepted | None = None) -> None:
        self._config, self._base_dir = config, base_dir
        self._accepted = accepted or Accepted()
        self._earlier: list[dict[str, Any]] = []
        self._carried: Record = {}
        self._parts = tuple(parts_of(config, base_dir))
        self._banks = {
            part: found
            for part in self._parts
            if part.key.endswith("latents") and not is_manifest(part) and (found := stamp_of(part)) is not None
        }
        self._hashes = Hashes({part.path for part in self._parts if part.path is not None and part.known is None})

    def refuse_changes(self, saved: Checkpoint, say: Say, *, small: bool = False) -> None:
        """Compare with what ``saved`` records; with ``small`` only what takes no time, before anything is loaded.

        Raises:
            ConfigError: names what has changed and was not accepted.
        """
        recorded = saved.state.get(RECORD)
        own = dict.fromkeys(part.key for part in self._parts)
        if not isinstance(recorded, dict):
            self._check_accepted([*own])
            if small:
                say(_uncompared(saved.path, own))
            contents = (key for key in self._accepted.keys if not self._is_setting(key))
            self._accepted.changes = [{"key": key, "after": saved.step, "files": {}} for key in contents]
            self._accepted.changes += self._other_rates(saved.step)
            return
        self._check_accepted([*own, *recorded])
        known = [key for key in own if key in recorded]
        if small:
            if new := [key for key in own if key not in recorded]:
                say(f"{saved.path} does not record {', '.join(new)}: not compared")
            known = [key for key in known if self._is_small(key)]
        found = {key: self._difference(key, recorded[key]) for key in known}
        found = {key: files for key, files in found.items() if files}
        refused = [key for key in found if key not in self._accepted.keys]
        if refused:
            raise ConfigError(refused[0], self._sentence(refused, found, saved))
        if small:
            return
        self._earlier = list(saved.state.get(ACCEPTED, ()))
        self._carried = {key: files for key, files in recorded.items() if key not in own}
        self._accepted.changes = [{"key": key, "after": saved.step, "files": found[key]} for key in found]
        self._accepted.changes += self._other_rates(saved.step)
        for key, files in found.items():
            say(f"{key}: {self._said(key, files)} since {saved.path.name} was written; accepted, and kept on record")

    def _other_rates(self, step: int) -> list[dict[str, Any]]:
        return [
            {"key": key, "after": step, "files": {f"{was} before, {now} then": [str(was), str(now)]}}
            for key, (was, now) in self._accepted.rates.items()
        ]

    def check_steady(self) -> None:
        """Raise ConfigError where something that was loaded has changed since this was made."""
        before, now = set(self._parts), set(parts_of(self._config, self._base_dir))
        for part in (*self._parts, *now):
            if part not in now or part not in before or self._moved(part):
                raise _unsteady(part)
        self.check()

    def check(self) -> None:
        """Raise ConfigError where a file has changed before it could be hashed; takes no time."""
        changed = self._hashes.unsteady()
        if changed is not None:
            raise _unsteady(next(part for part in self._parts if part.path == changed))

    def facts(self) -> dict[str, Any]:
        """Return the facts that a checkpoint keeps of this; waits for the hashes.

        Raises:
            ConfigError: a bank, which is read all the time, has been written to.
        """
        for part, before in self._banks.items():
            now = stamp_of(part)
            if now is None or now == before or now[:2] != before[:2]:  # what lies in its place is not what is read
                continue
            if part.path is None or now.size != before.size or not holds(part.path, self._hash(part)):
                raise ConfigError(part.key, f"{part} was written to while the run read it; {_PUT_BACK}")
            self._banks[part] = now
        made = {**self._carried, **record_of(self._parts, self._hash)}
        changes = [*self._earlier, *self._accepted.changes]
        return {RECORD: made, **({ACCEPTED: changes} if changes else {})}

    def base_hash(self) -> str:
        """Return ``contents.base_hash`` of the model's directory; waits for the hashes."""
        parts = sorted(self._of("model.path"), key=lambda part: part.name)
        weights = [(found[1], self._hash(part)) for part in parts if (found := _TRANSFORMER.fullmatch(part.name))]
        return base_hash_of((name, known) for name, known in weights if known != UNREADABLE)

    def has_accepted(self, key: str) -> bool:
        return key in self._accepted.keys

    @property
    def complete(self) -> bool:
        """True where nobody would have to wait."""
        return self._hashes.complete()

    def expected(self, *sections: str) -> Expected:
        """Return the hashes that a worker that starts late must find under the keys of ``sections``; waits for them."""
        parts = [part for part in self._parts if part.key.startswith(sections)]
        hashed = {part.path: self._hash(part) for part in parts if part.path is not None and part.known is None}
        states = {path: (self._hashes.stamps[path], known) for path, known in hashed.items() if self._trusts(path)}
        return Expected(self._base_dir, record_of(parts, self._hash), states)

    def close(self) -> None:
        self._hashes.close()

    def _of(self, key: str) -> list[Part]:
        return [part for part in self._parts if part.key == key]

    def _hash(self, part: Part) -> str:
        if part.known is not None or part.path is None:
            return part.known or ""
        try:
            return self._hashes.of(part.path)
        except Unsteady:
            raise _unsteady(part) from None
        except OSError:
            return UNREADABLE

    def _is_small(self, key: str) -> bool:
        stamps = self._hashes.stamps
        return all(part.path not in stamps or stamps[part.path].size <= SMALL for part in self._of(key))

    def _trusts(self, path: Path) -> bool:
        return path in self._hashes.settled

    def _moved(self, part: Part) -> bool:
        before = None if part.path is None else self._hashes.stamps.get(part.path)
        if part.path is None or before is None or stamp_of(part) == before:
            return False
        return not holds(part.path, self._hash(part))

    def _difference(self, key: str, recorded: Mapping[str, str]) -> dict[str, list[str | None]]:
        return pipeline_difference(key, recorded, self._of(key), self._hash)

    def _check_accepted(self, known: Sequence[str]) -> None:
        for key in self._accepted.keys:
            if key not in known and not self._is_setting(key):
                near = get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it is made of {', '.join(dict.fromkeys(known))}"
                raise ConfigError(ACCEPT, f"{key} is nothing that this run is made of; {hint}")

    def _is_setting(self, key: str) -> bool:
        """Tell whether a key is no path but a setting, which is compared where configurations are."""
        return marked(type(self._config), key, MayBeAccepted)

    def _said(self, key: str, files: Mapping[str, Any]) -> str:
        return said_of(self._of(key), files)

    def _sentence(self, refused: Sequence[str], found: Mapping[str, Mapping[str, Any]], saved: Checkpoint) -> str:
        others = "; ".join(f"{key}: {self._said(key, found[key])}" for key in refused[1:])
        more = f" (and {others})" if others else ""
        said = f"{self._said(refused[0], found[refused[0]])} since {saved.path.name} was written"
        flags = " ".join(f"{ACCEPT} {key}" for key in refused)
        advice = "put back what was there, give the run another name, or go on with what is there now"
        return f"{said}{more}; {advice}: {flags}"


def _unsteady(part: Part) -> ConfigError:
    return ConfigError(part.key, f"{part} was changed while the run was starting; start it again once it is finished")


def _uncompared(path: Path, keys: Iterable[str]) -> str:
    return (
        f"{path} is of a version that did not record what a run is made of; not compared in full: {', '.join(keys)}. "
        "From its next checkpoint on they are"
    )
