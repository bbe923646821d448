"""What the workers are asked for to collect a batch, and what comes of it: the same on Ray and in one process."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowalign.config.run import RunConfig
from flowalign.run.previews import join_previews, looked_at
from flowalign.run.protocols import Collected
from flowalign.samples.joined import cat_scores, scored_together
from flowalign.types import CacheRule, Preview, PromptBatch, SamplingPlan, Scores


@dataclass(frozen=True)
class Request:
    """What a rollout worker is asked for: a chunk of prompts, how it is walked, and what is wanted of it.

    ``version`` is that of the weights. The pictures have ``latents`` where a reward needs them. ``looked_at`` are the
    positions of the images that the driver sees whole.
    """

    batch: PromptBatch
    plan: SamplingPlan
    seed: int
    version: int
    latents: bool = False
    looked_at: Sequence[int] = ()


def requests_of(
    config: RunConfig,
    batch: PromptBatch,
    plan: SamplingPlan,
    cache: CacheRule | None,
    *,
    seed: int,
    version: int,
    needs: Collection[str],
    evaluation: bool,
) -> tuple[list[Request], list[range]]:
    """Return a request for each chunk of ``batch``, and which chunks are scored as one, as the scorers' ``needs`` say.

    The ``cache`` is that of rollouts: an evaluation's plan has its own.
    """
    plan = plan if evaluation else replace(plan, cache=cache)
    chunks = batch.chunks(config.rollout.chunk_size)
    seen = looked_at(chunks, plan, config.limits, evaluation)
    latents = "latents" in needs
    requests = [Request(chunk, plan, seed, version, latents, own) for chunk, own in zip(chunks, seen, strict=True)]
    return requests, scored_together(chunks, "group" in needs)


def collected(
    batch: PromptBatch,
    plan: SamplingPlan,
    previews: Sequence[Preview],
    scores: Sequence[Scores],
    trajectories: Sequence[Any],
    score_s: float,
    *,
    workers: tuple[int, int] = (1, 1),
) -> Collected:
    """Join what was made of the chunks of ``batch`` by so many rollout and reward ``workers``."""
    preview = join_previews(previews)
    return Collected(
        batch=batch.take(plan.branching.samples_of_images(len(batch))),
        scores=cat_scores(scores),
        preview=preview,
        trajectories=trajectories,
        rollout_s=preview.seconds / workers[0],
        score_s=score_s / workers[1],
    )
