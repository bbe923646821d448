"""Checks of the models that a configuration names, from small files alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from flowalign.config.guidance import GUIDANCE_KEYS, GuidanceKeys, guidance_facts
from flowalign.config.section import ConfigError, nearest
from flowalign.config.sections import ModelConfig
from flowalign.config.teachers import TeacherConfig
from flowalign.models.attention import lacking_kernel
from flowalign.models.directory import (
    Directory,
    check_directory,
    family_of_model,
    is_pipeline,
    network_inputs,
    open_directory,
)
from flowalign.models.errors import ModelError
from flowalign.models.family import ModelFamily, family_of, known_families
from flowalign.models.weights import check_whole
from flowalign.record.checkpoint import CheckpointError, find


def model_family(name: str) -> ModelFamily:
    """Return the family behind ``model.type``."""
    families = known_families()
    if "." not in name and name not in families:
        raise ConfigError("model.type", f"no model family {name!r}; {nearest(name, families)}")
    try:
        return family_of(name)
    except ModelError as error:
        raise ConfigError("model.type", str(error).removeprefix("model.type: ")) from error


def check_pipeline(key: str, path: Path, model: ModelConfig) -> tuple[int, int, int]:
    """Return the shape of a pipeline's latents without loading it."""
    if any((path / name).exists() for name in ("checkpoints", "MANIFEST.json")):
        raise ConfigError(
            key,
            f"{path} is a run or a checkpoint; a run starts from a pipeline, so make one: flowalign export {path} "
            "--to DIR, with --as ema for its averaged weights",
        )
    if model.type is not None:
        model_family(model.type)
    try:
        family = family_of_model(model.model_copy(update={"path": str(path)}))
        check_directory(family, path)
        return Directory(family, path).latent_shape(model.height, model.width)
    except ValueError as error:
        reason = str(error).removeprefix("model.path: ")
        given = next((name for name in ("height", "width") if getattr(model, name) is not None), None)
        sized = key.endswith("path") and reason.startswith("image size") and given is not None
        raise ConfigError(f"{key.removesuffix('path')}{given}" if sized else key, reason) from error


def check_weights(key: str, model: ModelConfig, parts: Sequence[str]) -> None:
    """Check that the weights of those ``parts`` of a pipeline that it has are there and whole, by their headers alone.

    Raises:
        ConfigError: some are not. A model that is not there is said elsewhere.
    """
    try:
        directory = open_directory(model)
        if directory.published is not None:
            return
        for part in filter(directory.has, parts):
            check_whole(directory.path / part)
    except ModelError as error:
        raise ConfigError(key, str(error).removeprefix("model.path: ")) from error


def check_guidance(section: str, own: GuidanceKeys, model: ModelConfig, keys: Sequence[str] = GUIDANCE_KEYS) -> None:
    """Raise ConfigError for a key of guidance, those among ``keys``, that a model has no use for.

    ``section`` stands before the key. A model that is not there is said elsewhere.
    """
    try:
        family, takes = open_directory(model).family, "guidance" in network_inputs(model)
    except ModelError:
        return
    given = [key for key in guidance_facts(own) if key in keys]
    if "true_guidance_scale" in given and not takes:
        raise ConfigError(
            f"{section}true_guidance_scale",
            f"the network of this {family.title} takes no guidance as an input, so that guidance_scale is that of two "
            "passes; set guidance_scale, and leave this out",
        )
    named = "true_guidance_scale" if takes else "guidance_scale"
    scale = max(getattr(own, named), 0.0 if takes else getattr(own, "update_guidance_scale", None) or 0.0)
    for key in ("guidance_norm_cap", "guidance_until"):
        if key in given and scale <= 1:
            raise ConfigError(
                f"{section}{key}", f"{named} is {scale:g}, so that there are no two passes; set that, or leave this out"
            )
    if "guidance_norm_cap" in given and (getattr(own, "norm_preserving", False) or family.guidance_norm == "token"):
        whose = "norm_preserving" if family.guidance_norm == "none" else f"guidance of {family.title}"
        raise ConfigError(
            f"{section}guidance_norm_cap", f"{whose} keeps the length of every token already; leave this out"
        )


def check_cached(key: str, model: ModelConfig) -> None:
    """Raise ConfigError, under ``key``, where a model's network has no blocks that a step cache may skip.

    A model that is not there is said elsewhere.
    """
    try:
        family = family_of_model(model)
    except ModelError:
        return
    if not family.cached:
        raise ConfigError(key, f"the networks of {family.title} have no blocks that a cache knows how to skip")


def check_kernel(key: str, model: ModelConfig, device: str, precisions: Collection[str]) -> None:
    """Raise ConfigError, under ``key``, where a device of this name cannot have the kernel of a model's attention.

    A model that is not there is said elsewhere.
    """
    try:
        masked = open_directory(model).family.masked
    except ModelError:
        return
    if (reason := lacking_kernel(model.attention, device, precisions, masked)) is not None:
        raise ConfigError(key, reason)


def check_blocks(key: str, model: ModelConfig) -> None:
    """Raise ConfigError, under ``key``, where a model's network names no blocks whose activations are computed anew.

    A model that is not there is said elsewhere.
    """
    from flowalign.models.activation_checkpointing import block_classes
    from flowalign.models.loading import transformer_of

    try:
        family = family_of_model(model)
    except ModelError:
        return
    if not block_classes(transformer_of(family)):
        raise ConfigError(key, f"{family.network} names no blocks that could be computed anew; write none")


def teacher_model(teacher: TeacherConfig, student: ModelConfig) -> ModelConfig:
    """Return the model that a teacher's network is of: its own pipeline, or that of the student, whose run it is."""
    if not is_pipeline(Path(teacher.path)):
        return student
    return student.model_copy(update={"path": teacher.path, "type": None, "inputs": None})


def check_teacher(key: str, teacher: TeacherConfig, model: ModelConfig) -> tuple[int, int, int] | None:
    """Return the shape of a teacher's latents, None for a run.

    A teacher is a pipeline, or a run or checkpoint of this very model, whose latents are the model's.
    """
    path = Path(teacher.path)
    if is_pipeline(path):
        if teacher.weights != "model":
            raise ConfigError(f"{key}.weights", f"{path} is a pipeline, which has one set of weights; leave it out")
        shape = check_pipeline(f"{key}.path", path, model)
        check_guidance(f"{key}.", teacher, teacher_model(teacher, model))
        return shape
    check_guidance(f"{key}.", teacher, model)
    try:
        find(path, None)
    except CheckpointError as error:
        raise ConfigError(f"{key}.path", str(error)) from error
    return None
