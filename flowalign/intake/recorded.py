"""The configuration that belongs to what there is already: a run, a checkpoint, a pipeline directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flowalign.config.alignment import AlignConfig
from flowalign.config.sampled import Sampled, SampledConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import SamplingConfig
from flowalign.config.training import PretrainConfig
from flowalign.intake.explain import explain
from flowalign.intake.file import load_align
from flowalign.intake.resolved import read_resolved, recorded_contents
from flowalign.models.checked import check_pipeline
from flowalign.models.recorded import recorded_model
from flowalign.record.checkpoint import CheckpointError, find, verify
from flowalign.record.contents import base_hash, base_of
from flowalign.record.log import LOG
from flowalign.run.made.base import changed_base


def config_of(source: Path, file: Path | None, model: Path | None = None) -> Sampled:
    """Return the configuration that belongs to a run, to one of its checkpoints, or to a bare pipeline directory.

    ``model`` stands in for the base model of a run that is not at its place any more.

    Raises:
        ConfigError: there is none, its base model is not there, or ``model`` is another one than it needs.
    """
    if file is None and (source / "model_index.json").is_file():
        if model is not None:
            raise ConfigError("--model", f"{source} is a whole pipeline, which needs no other; leave --model out")
        recorded = recorded_model(source)
        sampling = recorded.pop("sampling", {})
        return _sampled(model={"path": str(source), **recorded}, evaluation=sampling)
    run_dir = next((d for d in (source, *source.resolve().parents[:2]) if (d / "config.yaml").is_file()), source)
    own = load_align(file, require_files=False).config if file is not None else read_resolved(run_dir, or_pipeline=True)
    config = own if isinstance(own, AlignConfig) else of_training(own)
    if file is not None and (source / "model_index.json").is_file():
        _check_family(config, source)
    if model is not None:
        config = _with_model(config, source, run_dir, model)
    if not Path(config.model.path).is_dir() and not (source / "model_index.json").is_file():
        raise ConfigError(
            "model.path",
            f"{config.model.path}, which {source} was trained from, is not there; say where it is now: --model DIR",
        )
    if model is None and not (source / "model_index.json").is_file():
        _check_base(config, source)
    return config


def _check_base(config: Sampled, source: Path) -> None:
    """Refuse a base model that has changed since a checkpoint was written: its pictures would be another model's."""
    try:
        found = find(source, None, lambda text: None)
        state = _state(found)
    except CheckpointError:
        return  # whoever opens it says so
    if changed := changed_base(state, Path(config.model.path), weights_too=config.model.lora is not None):
        raise ConfigError(
            "model.path",
            f"{changed} since {found.name} was written, which was trained with what was there then; say where that is: "
            "--model DIR" + ("" if config.model.lora else f" (--model {config.model.path} takes what is there now)"),
        )


def _state(found: Path) -> dict[str, Any]:
    return json.loads((found / "state.json").read_bytes()) if verify(found, ("state.json",)) else {}


def _check_family(config: Sampled, source: Path) -> None:
    """Refuse to read a pipeline that says what its output means as something else."""
    own = recorded_model(source).get("family", config.model.family)
    if own != config.model.family:
        raise ConfigError(
            "--config",
            f"its model is of {config.model.family} and {source} of {own}; write model.family: {own} there, or leave "
            "--config out",
        )


def _with_model(config: Sampled, source: Path, run_dir: Path, model: Path) -> Sampled:
    """Return the configuration with ``model`` for its base. A LoRA needs the base as it was."""
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(model.absolute())})})
    check_pipeline("--model", model, config.model)
    found = find(source, None)
    state = _state(found)
    wanted, given = state.get("base_hash") or base_of(recorded_contents(run_dir).get("model.path")), base_hash(model)
    if config.model.lora is not None and wanted not in (None, given):
        raise ConfigError(
            "--model",
            f"{model} is another model than {found} was trained from (transformer files {given[:12]}, not "
            f"{wanted[:12]}); a LoRA fits its own base alone",
        )
    if changed := changed_base(state, model, weights_too=True):
        LOG.warning(f"--model: {changed} since {found} was trained; all but the transformer's weights is of {model}")
    elif wanted not in (None, given):  # of version 0.1, which recorded the transformer's weights alone
        LOG.warning(f"--model: {model} is another model than {found} was trained from; all but the transformer is its")
    return config


def of_training(config: PretrainConfig) -> SampledConfig:
    """Return the way in which what was trained on latents is sampled; judged as the run itself judges, if it does."""
    own = None if config.evaluation.every else {*SamplingConfig.model_fields, "weights"}
    how = {name: value for name, value in config.evaluation.model_dump(include=own).items() if value is not None}
    sections = {"model": config.model_as_trained, "rollout": config.rollout, "evaluation": how}
    return _sampled(name=config.name, threads=config.threads, device=config.device, **sections)


def _sampled(**sections: Any) -> SampledConfig:
    try:
        return SampledConfig.model_validate(sections)
    except ValidationError as error:
        raise explain(error, SampledConfig) from error
