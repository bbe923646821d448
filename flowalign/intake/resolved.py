"""The config.yaml of a run directory: every key, with what ran it, and what its paths held."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flowalign import __version__
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.config.training import PretrainConfig
from flowalign.intake.file import RESOLVED, read_yaml, record, validate
from flowalign.intake.paths import resolve_run, shipped_names
from flowalign.record.checkpoint import has_any
from flowalign.record.contents import digests
from flowalign.record.disk import write_text, writing
from flowalign.record.yamlfiles import dump_yaml, plain, read_mapping
from rewards.missing import hint

PACKAGES = ("torch", "diffusers", "transformers", "peft", "deepspeed", "ray")


def write_resolved(config: RunConfig, run_dir: Path, accepted: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write ``run_dir/config.yaml``: every key, with the versions of what runs it and the seeds.

    It is replaced atomically.

    Beside them stand ``run_dir`` and, by key, digests of what the paths hold, so that the run can be moved; and the
    changes of these that were ``accepted``, now and before. Raises DiskError.
    """
    seeds = {"run": config.seed, "evaluation": config.evaluation.seed}
    content = config.model_dump(mode="json")
    # What a run that is continued was begun with stays on record.
    goes_on = has_any(run_dir / "checkpoints")
    began = recorded_contents(run_dir) if goes_on else {}
    changed = {change["key"] for change in accepted}
    contents = {key: digest if key in changed else began.get(key, digest) for key, digest in digests(content).items()}
    earlier = plain(_recorded(run_dir, "accepted_changes", list) or []) if goes_on else []
    changes = [*(change for change in earlier if change not in accepted), *map(dict, accepted)]
    values = shipped_names(content) | {"versions": versions(), "seeds": seeds}
    values |= {"run_dir": os.path.abspath(run_dir), "contents": contents}
    values |= {"accepted_changes": changes} if changes else {}
    with writing(str(run_dir), run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    return write_text(run_dir / RESOLVED, dump_yaml(values))


def versions() -> dict[str, str]:
    """Return the versions of python and of the packages that a run depends on."""
    found = {"python": platform.python_version(), "flowalign": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def recorded_contents(run_dir: Path) -> dict[str, str]:
    """Return the digests of what the run's paths held when it was begun, by key; empty where version 0.1 began it."""
    return _recorded(run_dir, "contents", dict) or {}


def _recorded(run_dir: Path, key: str, kind: type) -> Any:
    path = run_dir / RESOLVED
    return record(read_mapping(path), key, kind) if path.is_file() else None


def recorded_versions(run_dir: Path) -> dict[str, str]:
    """Return the versions that ``run_dir`` was last written with."""
    path = run_dir / RESOLVED
    return plain(read_mapping(path).get("versions") or {})


def read_resolved(run_dir: Path, *, or_pipeline: bool = False) -> AlignConfig | PretrainConfig:
    """Return the configuration that a run directory was made with.

    Raise ConfigError where there is none; ``or_pipeline`` tells whether a pipeline might have been given as well.
    """
    path = run_dir / RESOLVED
    if not path.is_file():
        absent = f"does not exist{hint(run_dir)}"
        what = f"has no {RESOLVED}" if run_dir.is_dir() else "is no directory" if run_dir.exists() else absent
        if (run_dir / "model_index.json").is_file():
            what = "is a pipeline, and no run"
        of = "of a run, such as runs/NAME" + (", or of a pipeline" if or_pipeline else "")
        raise ConfigError("", f"{run_dir} {what}; give the directory {of}")
    raw = read_yaml(path)
    if "latents" in raw:
        return resolve_run(validate(PretrainConfig, raw), run_dir)
    return resolve_run(validate(AlignConfig, raw), run_dir)
