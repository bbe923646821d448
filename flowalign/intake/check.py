"""Checks that span a configuration and what its algorithm asks of a run."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from flowalign.config.alignment import AlignConfig
from flowalign.config.largest import IMAGES
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.config.training import PretrainConfig
from flowalign.intake.explain import explain
from flowalign.models.checked import check_blocks, check_kernel, check_pipeline, check_teacher
from flowalign.models.directory import open_directory, text_parts
from flowalign.models.errors import ModelError
from flowalign.types import Trajectories

if TYPE_CHECKING:  # torch is loaded where an algorithm is, not before
    from flowalign.algorithm import Algorithm, Needs

COMMANDS = {
    "Trajectories": "align",
    "PreferencePairs": "align",
    "EncodedPrompts": "align",
    "LatentBatch": "pretrain or distill",
}


def algorithm_of(raw: dict[str, Any]) -> Algorithm:
    """Return the configured algorithm. Raise ConfigError where there is none of the name or its options are wrong."""
    from flowalign.algorithms import UnknownAlgorithm, algorithm_class, known_algorithms

    try:
        cls = algorithm_class(str(raw["type"]))
    except UnknownAlgorithm as error:
        reason = str(error).removeprefix("algorithm.type: ")
        named, known = str(raw["type"]), known_algorithms()
        near = get_close_matches(named, known, n=1) or [name for name in known if len(named) > 1 and named in name]
        raise ConfigError("algorithm.type", f"{reason}; did you mean {near[0]}?" if near else reason) from error
    try:
        return cls(cls.Config.model_validate(raw))
    except ValidationError as error:
        raise explain(error, cls.Config, ("algorithm",)) from error


def parse_algorithm(raw: dict[str, Any], batch: str) -> Algorithm:
    """Return the algorithm as `algorithm_of`; it must belong to the command of those that learn from a ``batch``."""
    algorithm = algorithm_of(raw)
    learns_from = algorithm.needs.batch.__name__
    command = COMMANDS.get(learns_from)
    if command != COMMANDS[batch]:
        advice = f"use `flowalign {command}`" if command else "no command makes that"
        raise ConfigError("algorithm.type", f"{raw['type']} learns from {learns_from}; {advice}")
    return algorithm


def check_model(config: RunConfig, needs: Needs) -> None:
    """Check that the model directory exists, is of the family's kind, and takes the image size.

    So do those of the algorithm's teachers; the preference pairs, where there are some, have their columns.
    """
    shape = check_pipeline("model.path", Path(config.model.path), config.model)
    check_kernel("model.attention", config.model, config.device, config.precisions)
    if config.learner.activation_checkpointing != "none":
        check_blocks("learner.activation_checkpointing", config.model)
    _check_dropped(config)
    _check_sizes(config, needs)
    own_teacher = config.teacher if isinstance(config, PretrainConfig) else None
    if own_teacher is not None and check_pipeline("teacher.path", Path(own_teacher.path), own_teacher) != shape:
        raise ConfigError("teacher.path", f"{own_teacher.path} has latents of another shape than the model's {shape}")
    if own_teacher is not None:
        check_kernel("teacher.attention", own_teacher, config.device, config.precisions)
    for name, teacher in needs.teachers.items():
        key = f"algorithm.teachers.{name}"
        own = check_teacher(key, teacher, config.model)
        if own is not None and own != shape:
            raise ConfigError(f"{key}.path", f"{teacher.path} has latents of {own}, the model's are {shape}")
    if isinstance(config, AlignConfig) and config.data.preferences is not None:
        from flowalign.data.preferences import PreferencesError, check_source

        try:
            check_source(Path(config.data.preferences))
        except PreferencesError as error:
            raise ConfigError("data.preferences", str(error).removeprefix("data.preferences: ")) from error


def _check_sizes(config: RunConfig, needs: Needs) -> None:
    """Check that the model takes every image size that a run makes, and that the run makes images."""
    if not isinstance(config, AlignConfig) or not config.data.sizes:
        return
    if needs.batch is not Trajectories:
        raise ConfigError(
            "data.sizes", "are those of rolled out images, and this algorithm learns from none; leave it out"
        )
    directory = open_directory(config.model)
    for i, size in enumerate(config.data.image_sizes):
        try:
            directory.latent_shape(*size)
        except ModelError as error:
            raise ConfigError(f"data.sizes.{i}", str(error)) from error


def _check_dropped(config: RunConfig) -> None:
    """Check that the text encoders that are to be dropped at times are there."""
    if not isinstance(config, PretrainConfig) or not config.encoder_dropout:
        return
    there = list(text_parts(config.model))
    if unknown := sorted(set(config.encoder_dropout) - set(there)):
        raise ConfigError(f"encoder_dropout.{unknown[0]}", f"the model has no such encoder; it has {', '.join(there)}")


def check_numbers(config: AlignConfig, algorithm: Algorithm) -> None:
    """Check counts that must fit together, and settings that need another one."""
    needs = algorithm.needs
    _check_pairs_wanted(config, needs)
    if (needs.scores or needs.reward) and not config.rewards:
        raise ConfigError("rewards", f"{config.algorithm['type']} needs at least one reward")
    if config.learner.ema_decay is None and needs.rollout_weights == "ema":
        raise ConfigError("algorithm.rollout_weights", "ema needs learner.ema_decay, such as 0.99")
    plan = algorithm.plan(0, config.seed)
    _check_plan(config.algorithm["type"], needs, plan, config.rollout.cache is not None)
    images = config.data.groups_per_iteration * needs.group_size
    if images > IMAGES:
        raise ConfigError(
            "data.groups_per_iteration",
            f"{config.data.groups_per_iteration:,} groups of {needs.group_size:,} are "
            f"{images:,} images an iteration; at most {IMAGES:,} are possible",
        )
    items = images * (1 if plan is None else max(1, plan.noise.num_steps)) // needs.item_samples
    updates = config.learner.updates_per_iteration
    if needs.second is not None and updates * needs.second.updates > items:
        raise ConfigError(
            "learner.updates_per_iteration",
            f"{updates} updates, before each of which the second network makes {needs.second.updates}, need as many "
            f"transitions; an iteration has {items}",
        )
    if updates * config.learner.ranks > items:
        raise ConfigError(
            "learner.updates_per_iteration",
            f"{updates} updates on {config.learner.ranks} ranks need as many transitions; an iteration has {items}",
        )


def _check_plan(name: str, needs: Needs, plan: Any, cached: bool) -> None:
    """Check that an SDE has noisy steps, and that they lie on the schedule.

    An algorithm of the user's may plan anything.
    """
    if plan is None:
        if needs.batch.__name__ == "Trajectories":
            raise ConfigError(
                "algorithm.type",
                f"{name} learns from Trajectories and plans none; define plan(self, iteration, seed), which returns a "
                "SamplingPlan",
            )
        return
    noise = plan.noise
    begin, end = noise.window
    if not 0 <= begin <= end <= plan.num_steps:
        raise ConfigError("algorithm", f"{name} plans noise in steps [{begin}, {end}) of {plan.num_steps}")
    if cached and end - begin == plan.num_steps:
        raise ConfigError(
            "rollout.cache", f"{name} makes noise in every step, and no such step may be cached; leave the cache out"
        )
    if noise.kind != "ode" and begin == end:
        raise ConfigError("algorithm", f"{name} plans no step of kind {noise.kind}, so that it could learn nothing")


def _check_pairs_wanted(config: AlignConfig, needs: Needs) -> None:
    """Check that preference pairs are given where the algorithm learns from them, and nowhere else."""
    from flowalign.types import PreferencePairs

    wanted, given = needs.batch is PreferencePairs, config.data.preferences is not None
    if wanted and not given:
        raise ConfigError(
            "data.preferences",
            "is missing; give a parquet file or a folder, such as `flowalign make-preferences` writes",
        )
    if given and not wanted:
        instead = "write algorithm.source: offline, or " if config.algorithm.get("source") == "online" else ""
        raise ConfigError(
            "data.preferences", f"{config.algorithm['type']} learns from what it rolls out; {instead}leave it out"
        )
