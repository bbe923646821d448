"""The algorithm-blind update: shuffle items, share them among ranks, annotate the own ones, step the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowalign.algorithm import Algorithm, Call, LossOutput, Models, VelocityModel
from flowalign.config.run import Passes
from flowalign.engine.average import Averages
from flowalign.engine.base import Engine
from flowalign.flow.randomness import Stream, seeded
from flowalign.models.fixed_geometry import fixed_geometry
from flowalign.record.destroyed import naming
from flowalign.record.spans import span
from flowalign.run.share import Cut, MicroBatches, RankItems, Said, asked_of, kinds_of
from flowalign.types import Condition, Credit, Max, Mean, Scores, TrainBatch, Trajectories, Update

Loss = Callable[[Models, TrainBatch], LossOutput]


class Learner:
    """One rank of the learner; every rank knows the batch, and takes its share of the items."""

    def __init__(
        self,
        algorithm: Algorithm,
        models: Mapping[str, VelocityModel],
        engine: Engine,
        *,
        passes: Passes,
        seed: int = 0,
        ema: Averages | None = None,
        device: str = "cpu",
        second: Engine | None = None,
    ) -> None:
        self.algorithm, self.needs, self.engine, self.second = algorithm, algorithm.needs, engine, second
        self.micro_batch_size = self.needs.whole(passes.micro_batch_size)
        self.passes = passes
        size = self.micro_batch_size
        networks, self.models = self.needs.roles if passes.padded else (), dict(models)
        self.models |= {role: fixed_geometry(model, size) for role, model in models.items() if role in networks}
        self.seed, self.device = seed, device
        self.version = 0
        self._kinds: dict[str, type] = {}  # of each metric of the loss: how it is put together
        self.ema = ema

    def update(self, batch: Any, scores: Scores | None, iteration: int) -> Update:
        """Learn from one batch in the ``passes``, each split into ``updates`` optimizer steps.

        The metrics are means over the steps, except those that are a `Max`, which are the first step's: there the
        policy is still the one that rolled out.

        Raises:
            NonFiniteUpdate: before weights were touched. DestroyedState: after that; nothing of it may be used.
        """
        with naming(f"iteration {iteration + 1}"):
            return self._update(batch, self.algorithm.credit(batch, scores), iteration)

    def _update(self, batch: Any, credit: Credit, iteration: int) -> Update:
        parts = list(self._parts(len(credit), iteration))
        kinds = kinds_of(batch, credit)
        cuts = [self._cut(own, kinds) for part in parts for own in self._item_sets(part)]
        share = self._annotated(batch, credit, cuts, kinds)
        history = []
        for part in parts:
            second = self._second_steps(share, part)
            history.append({**self._step(share, part), **second})
        self.version += 1
        done = {"learner/updates": float(len(history)), "learner/transitions": float(len(credit))}
        return Update(self.version, {**credit.metrics, **_summary(history, self._kinds), **done})

    def _parts(self, count: int, iteration: int) -> Iterator[Tensor]:
        """Yield the items of each update of the policy: in every epoch all ``count``, shuffled where that is asked."""
        for epoch in range(self.passes.epochs):
            order = torch.arange(count)
            if self.passes.shuffled:
                order = torch.randperm(count, generator=seeded(self.seed, Stream.SHUFFLE, iteration, epoch))
            yield from (part for part in order.tensor_split(self.passes.updates) if part.numel())

    def _item_sets(self, part: Tensor) -> list[Tensor]:
        """Return the items of each update that ``part`` is for: those of the second network, if there is one, and all
        for the policy."""
        second = 0 if self.needs.second is None else self.needs.second.updates
        return [*(own for own in part.tensor_split(max(1, second)) if second and own.numel()), part]

    def _cut(self, items: Tensor, kinds: Tensor | None) -> Cut:
        return Cut(items, self.micro_batch_size // self.needs.item_samples, self.engine.world_size, kinds)

    def _annotated(self, batch: Any, credit: Credit, cuts: Sequence[Cut], kinds: Tensor | None) -> RankItems:
        """Let the algorithm annotate the items that this rank will learn from, without gradients."""
        networks = self.needs.roles
        models = {role: self._in_micro_batches(model) for role, model in self.models.items() if role in networks}
        if self.needs.rollout:
            models["rollout"] = models.pop("policy")
        models = self._named(models, self.algorithm.network_calls.annotate)
        by_kind, place = {}, (self.engine.rank, self.engine.world_size)
        with torch.no_grad(), self._rollout_weights_bound():
            for kind in [None] if kinds is None else kinds.unique().tolist():
                part = batch.of_kind(kind or 0) if isinstance(batch, Trajectories) else batch
                own, asked = asked_of(cuts, *place, kind)
                by_kind[kind or 0] = Said(own, self.algorithm.annotate(models, part, credit.take(asked)), part)
        return RankItems(self.algorithm, credit, by_kind, kinds, self.device)

    def _in_micro_batches(self, model: VelocityModel) -> VelocityModel:
        """Return ``model`` over any number of samples from the CPU and back, in the geometry and precision of a
        step."""

        def call(x: Tensor, t: Tensor, condition: Condition, **options: Any) -> Tensor:
            condition = condition.to(self.device)
            parts = [torch.empty_like(x[:0], device="cpu")]
            for begin in range(0, len(x), self.micro_batch_size):
                part = slice(begin, begin + self.micro_batch_size)
                with self.engine.autocast():
                    made = model(x[part].to(self.device), t[part].to(self.device), condition.take(part), **options)
                parts.append(made.to("cpu", x.dtype))
            return torch.cat(parts)

        return call

    @contextmanager
    def _rollout_weights_bound(self) -> Iterator[None]:
        """Bind inside the weights that `weights` gives to rollouts, if that is asked for.

        Afterwards the network holds its own again.

        Where the policy itself rolled out there is nothing to do.
        """
        if not self.needs.rollout or self.needs.rollout_weights != "ema" or self.ema is None:
            yield
            return
        with self.ema.bound():
            yield

    def _step(self, share: RankItems, part: Tensor) -> dict[str, float]:
        metrics = self._learn(self.engine, self.algorithm.loss, share, part, self.passes.updates, share.credit.total)
        if self.ema is not None:
            with span("average"):
                self.ema.update()
        return metrics

    def _second_steps(self, share: RankItems, part: Tensor) -> dict[str, float]:
        """Make the updates of the second network, if there is one, by the items of one of the policy's.

        Return means of metrics.
        """
        if self.second is None:
            return {}
        loss, steps = self.algorithm.second_loss, self._item_sets(part)[:-1]
        made = [self._learn(self.second, loss, share, own, 1, own.numel(), "second/") for own in steps]
        return _summary(made, self._kinds)

    def _learn(
        self, engine: Engine, loss: Loss, share: RankItems, items: Tensor, updates: int, total: int, prefix: str = ""
    ) -> dict[str, float]:
        """Make one of the ``updates`` that ``total`` items are for, by ``items`` of them.

        ``prefix`` begins its metrics.
        """
        models = {**self.models}
        if self.second is not None:  # a network's gradients belong to its own loss
            other = "policy" if engine is self.second else "second"
            models[other] = _without_gradients(models[other])
        calls = self.algorithm.network_calls
        models = self._named(models, calls.second_loss if engine is self.second else calls.loss)

        def keeping_kinds(minibatch: TrainBatch) -> LossOutput:
            output = loss(models, minibatch)
            self._kinds |= {prefix + name: type(metric) for name, metric in output.metrics.items()}
            return output

        cut = self._cut(items, share.kinds)
        weights = [count * updates / total for count in cut.counts()]
        own = MicroBatches(share, cut.of(engine.rank))
        metrics = engine.step(keeping_kinds, own, weights[engine.rank :: engine.world_size])
        metrics, covered = {prefix + name: value for name, value in metrics.items()}, sum(weights)
        return {k: v / covered if self._kinds.get(k) is Mean else v for k, v in metrics.items()}

    def _named(self, models: Models, calls: Sequence[Call]) -> dict[str, VelocityModel]:
        """Leave out the networks that the algorithm says it does not ask: a plan would count too few passes."""
        asked = {call.role for call in calls} if self.algorithm.says_calls else self.needs.roles
        return {role: model for role, model in models.items() if role in asked or role not in self.needs.roles}

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that rollout workers bind next: policy or EMA weights, as the algorithm declares."""
        if self.needs.rollout_weights == "ema" and self.ema is not None:
            return self.ema.weights()
        return self.engine.weights()


def _without_gradients(model: VelocityModel) -> VelocityModel:
    @torch.no_grad()
    def call(x: Tensor, t: Tensor, condition: Condition, **options: Any) -> Tensor:
        return model(x, t, condition, **options)

    return call


def _summary(history: list[dict[str, float]], kinds: Mapping[str, type]) -> dict[str, float]:
    if not history:
        return {}
    mean = {key: sum(step[key] for step in history) / len(history) for key in history[0]}
    first = {key: history[0][key] for key in history[0] if kinds.get(key) is Max}
    return {**mean, **first}
