"""The same loop in one process, without Ray: same workers, same chunk geometry, same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowalign.config.alignment import AlignConfig
from flowalign.record.checkpoint import content_hash
from flowalign.run.loop import Collected, Count
from flowalign.run.previews import join_previews, looked_at
from flowalign.run.sync import SyncGuard, has_learned
from flowalign.run.workers import BindReceipt, LearnerWorker, RewardWorker, RolloutWorker
from flowalign.samples.cache import cache_rule
from flowalign.samples.children import end_children
from flowalign.samples.joined import cat_scores, scored_together
from flowalign.types import PromptBatch, SamplingPlan, Scores, Trajectories, Update


class LocalBackend:
    """One rollout worker, one reward worker and one learner rank in this process."""

    def __init__(self, config: AlignConfig, base_dir: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.config = config
        say(f"local: one process, {config.cluster.threads} thread{'s' * (config.cluster.threads > 1)}")
        self.rollouts = RolloutWorker(config)
        self.rewards = RewardWorker(config, base_dir)
        self.learner = LearnerWorker(config, encoders=self.rollouts.policy.encoders)
        self._guard = SyncGuard()
        self._learned = True
        self._cache = cache_rule(config.rollout.cache)

    def collect(
        self, batch: PromptBatch, plan: SamplingPlan, *, seed: int, evaluation: bool = False, count: Count | None = None
    ) -> Collected:
        made, scored = [], []
        plan = plan if evaluation else replace(plan, cache=self._cache)
        chunks = batch.chunks(self.config.rollout.chunk_size)
        whole = looked_at(chunks, plan, self.config.safety, evaluation)
        needs, version = self.rewards.needs(evaluation), self.rollouts.version
        for unit in scored_together(chunks, "group" in needs):
            own = [self.rollouts.rollout(chunks[i], plan, seed, version, "latents" in needs, whole[i]) for i in unit]
            scored.append(self.rewards.score([pictures for pictures, *_ in own], evaluation))
            made += [part for _, *part in own]  # the pictures have had their use
            if count is not None:
                count(len(made), len(chunks))
        preview = join_previews([seen for _, seen in made])
        return Collected(
            batch=batch.take(plan.branching.samples_of_images(len(batch))),
            scores=cat_scores([part for part, _ in scored]),
            preview=preview,
            trajectories=[walked for walked, _ in made],
            rollout_s=preview.seconds,
            score_s=sum(seconds for _, seconds in scored),
        )

    def update(self, trajectories: Sequence[Trajectories] | None, scores: Scores | None, iteration: int) -> Update:
        update = self.learner.update(trajectories or (), scores, iteration)
        self._learned = has_learned(update)
        return update

    def sync(self, evaluation: bool = False) -> None:
        weights, version = self.learner.weights(evaluation), self.learner.version()
        receipt = self.rollouts.bind(weights, version)
        sent = BindReceipt("learner", version, len(weights), content_hash(weights))
        self._guard.check_receipts(sent, [receipt], self._learned, evaluation)

    def parameters(self) -> tuple[int, int]:
        """Return the number of trained parameters, and of all."""
        return self.learner.parameters

    def state(self) -> list[dict[str, Any]]:
        """Return the learner's state, one entry a rank."""
        return [self.learner.state()]

    def restore(self, states: list[dict[str, Any]]) -> str | None:
        return self.learner.restore(**states[0])

    def close(self) -> None:
        self.learner.close()
        end_children()
