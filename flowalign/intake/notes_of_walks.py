"""Notes on how a run walks: guidance, negative prompts, sizes and chunks that were hardly meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from flowalign.config.alignment import AlignConfig
from flowalign.config.guidance import SCALES
from flowalign.config.prompts import NEGATIVE
from flowalign.data.promptsets import PromptsError, placed_prompts
from flowalign.models.directory import Directory, network_inputs, open_directory
from flowalign.models.errors import ModelError


def notes_of_walks(config: AlignConfig) -> list[str]:
    """Return a sentence for each such setting. A model that is not there is said elsewhere."""
    notes = [*_evaluated_otherwise(config), *_filled_up(config)]
    try:
        directory = open_directory(config.model)
        return [*notes, *_forgotten(config, directory), *_led_nowhere(config), *_sized(config, directory)]
    except ModelError:
        return notes


def _evaluated_otherwise(config: AlignConfig) -> list[str]:
    """Note evaluations that are guided otherwise than rollouts by their default alone."""
    algorithm, evaluation = config.algorithm, config.evaluation
    return [
        f"evaluation.{key}: {getattr(evaluation, key):g}, the default, while algorithm.{key} is {algorithm[key]:g}; "
        "evaluations, `sample` and `evaluate` take that of evaluation"
        for key in SCALES
        if key not in evaluation.model_fields_set and algorithm.get(key, 1) != getattr(evaluation, key)
    ]


def _filled_up(config: AlignConfig) -> list[str]:
    """Note a chunk that no iteration fills: every chunk costs as much as a full one, which keeps a sample's bits."""
    size, group = config.rollout.chunk_size, config.algorithm.get("group_size")
    if not isinstance(group, int) or config.data.preferences is not None:
        return []
    images = config.data.groups_per_iteration * group
    if size <= images:
        return []
    return [
        f"rollout.chunk_size: {size}, and an iteration makes {images} images; a chunk is filled up and takes the time "
        f"and the memory of {size}"
    ]


def _forgotten(config: AlignConfig, directory: Directory) -> list[str]:
    """Note that a network which its family always hands a guidance is handed 1."""
    takes = directory.family.takes_guidance(directory.config("transformer"))
    if not takes or config.algorithm.get("guidance_scale") != 1:
        return []
    return [
        "algorithm.guidance_scale: 1; the network takes it as an input, where 1 is a number like any other and not "
        "none (docs/models.md names the usual one)"
    ]


def _led_nowhere(config: AlignConfig) -> Iterator[str]:
    """Note negative prompts where nothing is guided away from them."""
    if (scale := unguided(config)) is None:
        return
    if config.model.negative_prompt is not None:
        yield (
            f"model.negative_prompt: nothing leads away from it, since no {scale} is above 1; set algorithm.{scale}, "
            "or leave this out"
        )
    if config.data.preferences is None:
        with suppress(PromptsError):  # which is said where the prompts are checked
            led = [place for place, row in placed_prompts(config.data.prompts) if row.get(NEGATIVE) is not None]
            if led:
                yield (
                    f"data.prompts: nothing leads away from the negative prompt of {led[0]} ({len(led)} rows have "
                    f"one), since no {scale} is above 1; set algorithm.{scale}, or leave it out by "
                    f"columns: {{{NEGATIVE}: null}}"
                )


def unguided(config: AlignConfig) -> str | None:
    """Return the scale that must be above 1 for a negative prompt to be read; None where one is.

    Raises:
        ModelError: the model's directory cannot be read.
    """
    scale = "true_guidance_scale" if "guidance" in network_inputs(config.model) else "guidance_scale"
    scales = [*_found(scale, config.algorithm), getattr(config.evaluation, scale)]
    if scale == "guidance_scale":
        scales += _found("update_guidance_scale", config.algorithm)
    return None if max(scales) > 1 else scale


def _sized(config: AlignConfig, directory: Directory) -> list[str]:
    """Note evaluations at a size that the run does not learn from."""
    if not config.data.sizes or not config.evaluation.every:
        return []
    _, *sides = directory.latent_shape(config.model.height, config.model.width)
    height, width = (side * directory.geometry.factor for side in sides)
    if (height, width) in config.data.image_sizes:
        return []
    return [
        f"data.sizes: evaluations make images of {height}x{width}, that of model, which is none of these; set "
        "model.height and model.width"
    ]


def _found(key: str, within: Any) -> Iterator[float]:
    """Yield the numbers that stand under ``key`` in an algorithm's options, however deep: teachers have their own."""
    parts = within.items() if isinstance(within, Mapping) else enumerate(within) if isinstance(within, list) else ()
    for name, value in parts:
        if name == key and isinstance(value, int | float):
            yield value
        yield from _found(key, value)
