"""The same loop in one process, without Ray: same workers, same chunk geometry, same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowalign.config.run import RunConfig
from flowalign.engine import process_group
from flowalign.record.checkpoint import BUFFERS, content_hash
from flowalign.record.spans import span
from flowalign.run.collecting import collected, requests_of
from flowalign.run.fixed import texts_without_encoders
from flowalign.run.profiling import profiler_of
from flowalign.run.protocols import NOTHING, Collected, Count
from flowalign.run.ranks import Rank
from flowalign.run.sync import SyncGuard, has_learned
from flowalign.run.workers import BindReceipt, LearnerWorker, RewardWorker, RolloutWorker
from flowalign.samples.cache import cache_rule
from flowalign.samples.children import end_children
from flowalign.types import PromptBatch, SamplingPlan, Scores, Trajectories, Update


class LocalBackend:
    """One rollout worker, one reward worker and one learner rank in this process.

    Of several processes, as torchrun starts them, the first alone rolls out and scores, where anything is.
    """

    def __init__(
        self,
        config: RunConfig,
        base_dir: Path,
        say: Callable[[str], None] = lambda text: None,
        rank: Rank = Rank(),  # noqa: B008 - a value
    ) -> None:
        self.config = config
        processes = "one process" if rank.alone else f"{rank.world_size} processes"
        say(f"local: {processes}, {config.threads} thread{'s' * (config.threads > 1)}{' each' * (not rank.alone)}")
        profiler_of(config, "local")  # which all workers here share
        rolls_out = config.makes_images and not rank.index
        self.rollouts = RolloutWorker(config, texts=texts_without_encoders(config)) if rolls_out else None
        self.rewards = RewardWorker(config, base_dir) if self.rollouts is not None else None
        encoders = None if self.rollouts is None else self.rollouts.policy.encoders
        encoders = encoders if encoders is not None and encoders.text_encoders else None
        place = (rank.index, rank.world_size, rank.port, rank.host)
        self.learner = LearnerWorker(config, *place, encoders=encoders, first_here=rank.local == 0)
        self._guard = SyncGuard()
        self._learned = True
        self._cache = cache_rule(config.rollout.cache)

    def collect(
        self, batch: PromptBatch, plan: SamplingPlan, *, seed: int, evaluation: bool = False, count: Count | None = None
    ) -> Collected:
        """Roll out and score ``batch``; a collective call, which makes `NOTHING` but in the first process."""
        with process_group.failing_together():
            rollouts, rewards = self.rollouts, self.rewards
            if rollouts is None or rewards is None:
                return NOTHING
            needs, version = rewards.needs(evaluation), rollouts.version
            requests, units = requests_of(
                self.config, batch, plan, self._cache, seed=seed, version=version, needs=needs, evaluation=evaluation
            )
            made, scored = [], []
            for unit in units:
                own = [rollouts.rollout(requests[i]) for i in unit]
                scored.append(rewards.score([pictures for pictures, *_ in own], evaluation))
                made += [part for _, *part in own]  # the pictures have had their use
                if count is not None:
                    count(len(made), len(requests))
            walked, previews = zip(*made, strict=True)
            scores, seconds = zip(*scored, strict=True)
            return collected(batch, plan, previews, scores, list(walked), sum(seconds))

    def update(self, trajectories: Sequence[Trajectories] | None, scores: Scores | None, iteration: int) -> Update:
        update = self.learner.update(trajectories or (), scores, iteration)
        self._learned = has_learned(update)
        return update

    def validate(self) -> dict[str, float]:
        return self.learner.validate()

    def sync(self, evaluation: bool = False) -> None:
        if not self.config.makes_images:
            return
        with span("sync"), process_group.failing_together():
            weights, version = self.learner.weights(evaluation), self.learner.version()
            if self.rollouts is not None:
                receipt = self.rollouts.bind(weights, version)
                sent = BindReceipt("learner", version, len(weights), content_hash(weights))
                self._guard.check_receipts(sent, [receipt], self._learned, evaluation)

    def parameters(self) -> tuple[int, int]:
        """Return the number of trained parameters, and of all."""
        return self.learner.parameters

    def state(self) -> list[dict[str, Any]]:
        """Return the learner's state, one entry a rank, in the first process; a collective call."""
        own = {**self.learner.state(), BUFFERS: self.learner.buffers}
        return [{**own, "optimizer": gathered} for gathered in process_group.gather(*own["optimizer"]).values()]

    def restore(self, states: list[dict[str, Any]]) -> str | None:
        own = states[self.learner.learner.engine.rank]
        return self.learner.restore(**{name: value for name, value in own.items() if name != BUFFERS})

    def restart_learner(self) -> None:
        raise ValueError("the only rank of the learner is this process")

    def close(self) -> None:
        self.learner.close()
        end_children()
