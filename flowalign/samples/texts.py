"""Texts that a run is conditioned on: prompts of its rollouts and evaluations, and what guidance leads away from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flowalign.algorithm import Algorithm, Needs
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.latents import load_bank
from flowalign.data.curriculum import CurriculumSampler
from flowalign.data.prompts import GroupSampler, evaluation_batch, load_prompts
from flowalign.models.directory import family_of_model
from flowalign.samples.arrange import negative_of
from flowalign.types import EncodedPrompts, PromptBatch


def texts_of_run(config: RunConfig, algorithm: Algorithm) -> list[str]:
    """Return every text that rollouts, walks in the learner and evaluations of a run are conditioned on, each once.

    Raises:
        PromptsError, LatentsError: the prompts cannot be read.
    """
    rows: list[Mapping[str, Any]] = []
    walks = algorithm.plan(0, config.seed) is not None or algorithm.needs.batch is EncodedPrompts
    if isinstance(config, AlignConfig) and walks:
        sampler = group_sampler(config, algorithm.needs)
        rows += sampler.all_rows() if config.data.refill else sampler.rows(config.total)
    if config.evaluation.every:
        rows += evaluated(config).metadata
    return texts_of(rows, config.model_as_trained)


def texts_of(rows: Iterable[Mapping[str, Any]], model: ModelConfig) -> list[str]:
    """Return the prompts of ``rows``, and the negative prompt of each, all once.

    That of a row is its own, else the model's, else its family's, which is read along with every prompt.
    """
    own = family_of_model(model).negative or ""
    found: dict[str, None] = {}
    for row in rows:
        given = negative_of(row, model)
        found |= dict.fromkeys((row["prompt"], own if given is None else given, own))
    return list(found)


def group_sampler(config: AlignConfig, needs: Needs) -> GroupSampler:
    """Return what draws the prompts of each iteration. Raise PromptsError where there are none."""
    data = config.data
    by_rate = None if data.curriculum is None else partial(CurriculumSampler, curriculum=data.curriculum)
    return (by_rate or GroupSampler)(
        load_prompts(data.prompts),
        groups=data.groups_per_iteration,
        group_size=needs.group_size,
        seed=config.seed,
        task_weights=data.task_weights,
    )


def evaluated(config: RunConfig) -> PromptBatch:
    """Return the samples of an evaluation. Raise PromptsError or LatentsError where there are none."""
    e = config.evaluation
    if e.prompts is None and isinstance(config, PretrainConfig):
        captions = list(dict.fromkeys(load_bank(Path(config.latents), verify=False).prompts))
        return _of_captions(captions, e.num_samples)
    return evaluation_batch(e.prompts, e.num_samples)


def _of_captions(captions: list[str], count: int) -> PromptBatch:
    """Return ``count`` samples of captions that lie evenly apart in their list."""
    rows = [{"prompt": captions[i * len(captions) // count % len(captions)]} for i in range(count)]
    ids = tuple(range(count))
    return PromptBatch(tuple(row["prompt"] for row in rows), ids, ids, tuple(rows))
