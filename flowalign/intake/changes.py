"""Changes that a continued run may have against the run that was begun, and the refusal of everything else."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign.config.alignment import AlignConfig
from flowalign.config.fields import MayBeAccepted, MayChange, MayGrow, marked, marker
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.intake.check import algorithm_of
from flowalign.intake.check_walk import renamed_grids
from flowalign.intake.paths import resolve_run
from flowalign.intake.resolved import recorded_contents
from flowalign.record.contents import ACCEPT, digests, has_digest, leaves, located, may_hold_other, same
from flowalign.record.log import say_once
from flowalign.record.manifest import manifests

Config = RunConfig


def resume_differences(old: Config, new: Config) -> list[str]:
    """Return the keys that differ though a resumed run must keep them, as the new configuration has them."""
    before, after = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    keys = [*after, *(key for key in before if key not in after)]
    grown = tuple(
        f"{name}.{i}."
        for name, field in type(new).model_fields.items()
        if marker(field, MayGrow) is not None
        for i in range(len(getattr(old, name, ())), len(getattr(new, name)))
    )
    return [
        key
        for key in keys
        if before.get(key) != after.get(key) and not marked(type(new), key, MayChange) and not key.startswith(grown)
    ]


def _may_be_accepted(config: Config, key: str, before: Any, after: Any) -> bool:
    return marked(type(config), key, MayBeAccepted) or may_hold_other(before, after)


def changed_rates(old: Config, new: Config, accepted: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Return the ``accepted`` learning rates that differ, as they were and are."""
    before, after = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    keys = (key for key in accepted if marked(type(new), key, MayBeAccepted) and before.get(key) != after.get(key))
    return {key: (before.get(key), after.get(key)) for key in keys}


def refuse_changes(old: Config, new: Config, run_dir: Path, accepted: Collection[str] = ()) -> None:
    """Raise ConfigError, with key, old and new value, if ``new`` cannot continue the run in ``run_dir``.

    Paths may differ where they hold the same, and those whose keys are ``accepted`` where they do not. What lies at a
    path that is the same is compared by `flowalign.run.made`; here it is for a run of a version that did not record it.
    """
    if type(old) is not type(new):
        raise ConfigError("name", f"{run_dir} holds a run of another command; choose another name")
    later = old.model_copy(update={"algorithm": _with_later_options(old.algorithm)})
    old = resolve_run(later, run_dir, code=True)  # type: ignore[type-var]
    old = _measured_alone(renamed_grids(old, new, run_dir))  # type: ignore[type-var]
    held = recorded_contents(run_dir)
    was, now = (leaves(config.model_dump(mode="json")) for config in (old, new))
    changed = [
        key
        for key in resume_differences(old, new)
        if not same(was.get(key), now.get(key), held.get(key), run_dir)
        and not (key in accepted and _may_be_accepted(new, key, was.get(key), now.get(key)))
    ]
    if changed:
        raise _changed(new, changed, was, now, run_dir)
    if not _records_what_it_is_made_of(run_dir):
        _refuse_other_contents(new, was, now, run_dir, accepted)


def _changed(
    new: Config, keys: Sequence[str], was: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path
) -> ConfigError:
    """Say of the first of ``keys`` how it has changed, and name the others."""
    key, others = keys[0], ", ".join(keys[1:])
    before, after = (f"with {found[key]!r}" if key in found else "without it" for found in (was, now))
    may = _may_be_accepted(new, key, was.get(key), now.get(key))
    accept = f", or go on with it all the same: {ACCEPT} {key}" if may else ""
    return ConfigError(
        key,
        f"{run_dir} was begun {before} and cannot go on {after}; "
        f"set it back ({run_dir / 'config.yaml'} has the run as it was begun), or give the run another name{accept}"
        f"{f' (changed as well: {others})' if others else ''}",
    )


def _refuse_other_contents(
    new: Config,
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    run_dir: Path,
    accepted: Collection[str],
) -> None:
    """Raise ConfigError where a file holds something else than when the run was begun; of a folder it is said once."""
    held = recorded_contents(run_dir)
    evaluates = not isinstance(new, AlignConfig) or new.evaluation.every > 0
    for key, digest in digests(new.model_dump(mode="json")).items():
        if key.startswith("evaluation.") and not evaluates:
            continue
        if was.get(key) != now.get(key) or held.get(key, digest) == digest or key in accepted:
            continue
        if (place := located(now[key])) is not None and has_digest(place[0], held[key]):
            continue
        said = f"{now[key]} holds something else than when {run_dir} was begun"
        if digest.startswith("file:"):
            raise ConfigError(
                key,
                f"{said}; put back what was there, give the run another name, or go on with what is there now: "
                f"{ACCEPT} {key}",
            )
        say_once(f"{key}: {said}; it is used all the same")


def _measured_alone(old: Config) -> Config:
    """Return an earlier run without the weights of its evaluations' scorers, which did nothing and are refused now."""
    evaluation, unused = old.evaluation, {"weight": 1.0, "parts": {}}
    scorer = None if evaluation.scorer is None else evaluation.scorer.model_copy(update={**unused, "gold": False})
    gold = [judge.model_copy(update=unused) for judge in evaluation.gold]
    return old.model_copy(update={"evaluation": evaluation.model_copy(update={"scorer": scorer, "gold": gold})})


def _records_what_it_is_made_of(run_dir: Path) -> bool:
    known = manifests(run_dir / "checkpoints")
    return bool(known) and "made_of" in list(known.values())[-1]


def _with_later_options(algorithm: dict[str, Any]) -> dict[str, Any]:
    """Return the algorithm of an earlier run, with the defaults of options that did not exist then."""
    try:
        parsed = algorithm_of(algorithm)
    except ConfigError:
        return algorithm  # said of the new configuration, if it still is so there
    return {**algorithm, **parsed.config.model_dump(mode="json")}
