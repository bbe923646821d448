"""Silent groups, whose images all score alike and teach nothing, and new prompts in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from flowalign.run.previews import join_previews
from flowalign.run.protocols import Backend, Collected, Count, Run
from flowalign.samples.joined import cat_scores, join_batches
from flowalign.types import PromptBatch, SamplingPlan, Scores, task_of


def silent_groups(batch: PromptBatch, scores: Scores) -> dict[int, str]:
    """Return the groups that teach nothing, with the task of each, in the order of their ids.

    Those are the groups whose valid images all have the same total, and of each reward that is trained on the same
    score; a group with fewer than two valid images among them.
    """
    trained = [scores.total, *(own for name, own in scores.by_reward.items() if name in scores.weights)]
    values = torch.stack([own.double().nan_to_num(nan=torch.inf) for own in trained], 1)
    groups = torch.tensor(batch.group_ids)
    found: dict[int, str] = {}
    for group in groups.unique().tolist():
        places = (groups == group).nonzero().flatten()
        valid = places[scores.valid[places]]
        if not (values[valid] != values[valid[:1]]).any():
            found[group] = task_of(batch.metadata[int(places[0])])
    return found


def joined(first: Collected, more: Collected) -> Collected:
    """Join what was collected of two batches of one iteration, with one plan and by one policy."""
    return Collected(
        batch=join_batches([first.batch, more.batch]),
        scores=cat_scores([first.scores, more.scores]),
        preview=join_previews([first.preview, more.preview]),
        trajectories=[*first.trajectories, *more.trajectories],
        rollout_s=first.rollout_s + more.rollout_s,
        score_s=first.score_s + more.score_s,
    )


def refilled(
    collected: Collected, run: Run, backend: Backend, plan: SamplingPlan, iteration: int, doing: Callable[[str], Count]
) -> tuple[Collected, dict[str, float]]:
    """Draw new prompts for the silent groups of an iteration, until none is lacking or ``run.refill`` draws were made.

    A group that is silent again is drawn for again. Nothing is left out: an algorithm learns nothing of silent groups
    by itself. Which prompts are drawn is a function of the run's seed, the iteration and the scores.

    ``doing`` is told of each draw, and returns what counts its chunks.

    Return what was collected in all, and the metrics ``refill/silent``, the share of the first draw's groups that were
    silent, ``refill/draws`` and ``refill/groups`` beside the first, and ``refill/lacking``, the groups that are silent
    still. Raise as ``backend.collect`` does.
    """
    lacking = silent_groups(collected.batch, collected.scores)
    first = len(set(collected.batch.group_ids))
    silent, drawn, groups, made = len(lacking) / first, set(collected.batch.prompts), 0, 0
    while lacking and made < run.refill:
        batch = run.sampler.refill(iteration, made + 1, list(lacking.values()), drawn)
        if not len(batch):  # no task of theirs has a prompt left
            break
        made, drawn = made + 1, drawn | set(batch.prompts)
        more = backend.collect(batch, plan, seed=run.seed, count=doing(f"rollout, draw {made + 1}"))
        own = len(set(batch.group_ids))
        groups += own
        still = silent_groups(more.batch, more.scores)
        lacking = {**dict(_without_a_prompt(lacking, batch)), **still}
        collected = joined(collected, more)
    facts = {"silent": silent, "draws": made, "groups": groups, "lacking": len(lacking)}
    return collected, {f"refill/{name}": float(value) for name, value in facts.items()}


def _without_a_prompt(lacking: Mapping[int, str], batch: PromptBatch) -> list[tuple[int, str]]:
    """Return the groups that no group of ``batch`` was drawn for, since their task has no other prompts."""
    tasks = [task_of(batch.metadata[batch.group_ids.index(group)]) for group in dict.fromkeys(batch.group_ids)]
    left: list[tuple[int, str]] = []
    for group, task in lacking.items():
        if task in tasks:
            tasks.remove(task)
        else:
            left.append((group, task))
    return left
