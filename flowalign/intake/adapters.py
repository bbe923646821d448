"""The LoRA of a run: its targets are those of layers, and what it begins from says rank, alpha and targets."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flowalign.config.section import ConfigError
from flowalign.config.sections import LoraConfig, ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.intake.paths import Config
from flowalign.models.errors import ModelError
from flowalign.record.checkpoint import has_any
from flowalign.record.textfiles import is_there
from flowalign.record.yamlfiles import plain, read_mapping


def with_adapters(config: Config) -> Config:
    """Return ``config`` with rank, alpha and targets of each LoRA that begins from an adapter.

    A run that goes on has its own, whether the adapter is there still or not.

    Raises:
        ConfigError: a target is of no layer; or the adapter is not there, is of another model, or contradicts what is
            configured.
    """
    update: dict[str, Any] = {"model": _checked("model", config.model, _recorded(config))}
    if isinstance(config, PretrainConfig) and config.teacher is not None:
        update["teacher"] = _checked("teacher", config.teacher, None)
    return config.model_copy(update=update)


def _recorded(config: Config) -> LoraConfig | None:
    """Return the LoRA that the run in the configuration's directory was begun with; None where this begins one."""
    run_dir = Path(config.runs_dir) / config.name
    if config.checkpoint.resume == "never" or not has_any(run_dir / "checkpoints"):
        return None
    recorded = run_dir / "config.yaml"
    model = read_mapping(recorded).get("model") if recorded.is_file() else None
    lora = model.get("lora") if isinstance(model, dict) else None
    with suppress(ValidationError):  # which is said where the two configurations are compared
        return None if lora is None else LoraConfig.model_validate(plain(lora))
    return None


def _checked(key: str, model: ModelConfig, began: LoraConfig | None) -> ModelConfig:
    lora = model.lora
    if lora is None or (lora.path is None and lora.targets is None):
        return model
    if lora.path is not None and began is not None and began.path is not None and began.is_settled:
        kept = {name: getattr(began, name) for name in ("rank", "alpha", "targets")}
        given = {name: getattr(lora, name) for name in kept.keys() & lora.model_fields_set}
        given = {name: value for name, value in given.items() if value is not None}
        # One that is gone lies nowhere beside the configuration; it is the one that the run has begun from.
        gone = not is_there(Path(lora.path)) and Path(lora.path).name == Path(began.path).name
        given |= {"path": began.path} if gone else {}
        return model.model_copy(update={"lora": lora.model_copy(update={**kept, **given})})
    from flowalign.models.adapters import read_adapter
    from flowalign.models.adapting import check_targets, settled
    from flowalign.models.directory import family_of_model
    from flowalign.models.inspect import bare_network

    if model.transformer is not None:
        if lora.path is None:
            return model  # whose layers are known once it is made
        raise ConfigError(f"{key}.lora.path", f"{lora.path} fits no fresh network; leave it out, or {key}.transformer")
    try:
        network = bare_network(model)
        check_targets(network, lora.targets or ())
        if lora.path is not None:
            lora = settled(lora, read_adapter(family_of_model(model), Path(lora.path)), network)
    except ModelError as error:
        where, _, reason = str(error).partition(": ")
        raise ConfigError(where.replace("model", key, 1), reason) from error
    return model.model_copy(update={"lora": lora})
