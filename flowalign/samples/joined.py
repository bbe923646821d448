"""Chunks of one iteration: which of them are scored as one, and all of them joined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowalign.rows import Rows
from flowalign.types import Condition, Conditions, PromptBatch, Scores, Trajectories
from rewards.composite import one_owner


def scored_together(chunks: Sequence[PromptBatch], whole_groups: bool) -> list[range]:
    """Return which chunks in a row are scored as one: each by itself, or ``whole_groups`` of as few chunks as hold
    them."""
    if not whole_groups:
        return [range(i, i + 1) for i in range(len(chunks))]
    last = {group: i for i, chunk in enumerate(chunks) for group in chunk.group_ids}
    found, begin, end = [], 0, 0
    for i, chunk in enumerate(chunks):
        end = max(end, *(last[group] for group in chunk.group_ids))
        if i == end:
            found.append(range(begin, i + 1))
            begin = end = i + 1
    return found


def join_trajectories(parts: Sequence[Trajectories]) -> Trajectories:
    """Join chunks of one iteration, in the order given; they must share plan, seed and policy version.

    States, means, latents and embeddings are not copied.
    """
    keys = {(p.plan, p.seed, p.policy_version) for p in parts}
    if len(keys) != 1:
        raise ValueError(f"chunks of one rollout disagree: {sorted((s, v) for _, s, v in keys)} (seed, policy version)")
    if len(parts) == 1:
        return parts[0]
    batch = join_batches([p.batch for p in parts])
    means = [p.means_NSCHW for p in parts if p.means_NSCHW is not None]
    return replace(
        parts[0],
        batch=batch,
        condition=Conditions(tuple(one for p in parts for one in _conditions(p.condition))),
        states_NSCHW=Rows([p.states_NSCHW for p in parts]),
        log_prob_NS=torch.cat([p.log_prob_NS for p in parts]),
        final_NCHW=Rows([p.final_NCHW for p in parts]),
        means_NSCHW=Rows(means) if means else None,
        computed=sum(p.computed for p in parts),
        reused=sum(p.reused for p in parts),
    )


def join_batches(parts: Sequence[PromptBatch]) -> PromptBatch:
    """Join the samples of consecutive chunks."""
    names = PromptBatch.__dataclass_fields__
    return PromptBatch(*(tuple(x for part in parts for x in getattr(part, name)) for name in names))


def _conditions(condition: Condition | Conditions) -> tuple[Condition, ...]:
    return condition.parts if isinstance(condition, Conditions) else (condition,)


def cat_scores(parts: Sequence[Scores]) -> Scores:
    """Join the scores of consecutive chunks; raises InvalidScores as ``merge`` does."""
    causes: dict[str, int] = {}
    for part in parts:
        for cause, count in part.causes.items():
            causes[cause] = causes.get(cause, 0) + count
    retries: dict[str, Counter[str]] = {}
    for name, counts in (item for part in parts for item in part.retries.items()):
        retries.setdefault(name, Counter()).update(counts)
    names = dict.fromkeys(name for part in parts for name in part.by_reward)
    nothing = [torch.full_like(part.total, float("nan")) for part in parts]
    owners = one_owner(part.owners for part in parts)
    applies = {name: torch.cat([_applies(part, name, owners.get(name, name)) for part in parts]) for name in names}
    return Scores(
        by_reward={k: torch.cat([p.by_reward.get(k, n) for p, n in zip(parts, nothing, strict=True)]) for k in names},
        total=torch.cat([p.total for p in parts]),
        valid=torch.cat([p.valid for p in parts]),
        causes=causes,
        weights=parts[0].weights,
        retries={name: dict(counts) for name, counts in retries.items()},
        applies={name: own for name, own in applies.items() if not own.all()},
        owners=owners,
    )


def _applies(part: Scores, name: str, owner: str) -> Tensor:
    """Return which samples of a chunk a score is for; where the chunk has none of it, those that its reward is for.

    A scorer that is for none of a chunk's tasks is not asked, so that nobody knows there which further scores it has.
    """
    asked = name if name in part.by_reward else owner
    return part.applies.get(asked, torch.ones_like(part.valid))
