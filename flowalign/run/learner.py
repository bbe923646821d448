"""The algorithm-blind update: prepare once, shuffle transitions, pack micro-batches, step the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowalign.algorithm import Algorithm, LossOutput, Models, VelocityModel
from flowalign.engine.average import Average
from flowalign.engine.base import Engine
from flowalign.flow.randomness import Stream, seeded
from flowalign.models.fixed_geometry import fixed_geometry
from flowalign.record.destroyed import naming
from flowalign.types import Condition, Max, Mean, Scores, TrainBatch, Update

Loss = Callable[[Models, TrainBatch], LossOutput]


class Learner:
    """One rank of the learner; every rank gets the same batch and takes its share of micro-batches."""

    def __init__(
        self,
        algorithm: Algorithm,
        models: Mapping[str, VelocityModel],
        engine: Engine,
        *,
        micro_batch_size: int,
        updates_per_iteration: int = 1,
        epochs: int = 1,
        seed: int = 0,
        ema_decay: float | None = None,
        device: str = "cpu",
        second: Engine | None = None,
    ) -> None:
        self.algorithm, self.needs, self.engine, self.second = algorithm, algorithm.needs, engine, second
        self.micro_batch_size = self.needs.whole(micro_batch_size)
        self.updates, self.epochs = updates_per_iteration, epochs
        self.models = {role: fixed_geometry(model, self.micro_batch_size) for role, model in models.items()}
        self.seed, self.device = seed, device
        self.version = 0
        self._kinds: dict[str, type] = {}  # of each metric of the loss: how it is put together
        self.ema = None if ema_decay is None else Average(engine, ema_decay)

    def update(self, batch: Any, scores: Scores | None, iteration: int) -> Update:
        """Learn from one batch: ``epochs`` passes, each split into ``updates_per_iteration`` optimizer steps.

        The metrics are means over the steps, except those that are a `Max`, which are the first step's: there the
        policy is still the one that rolled out.

        Raises:
            NonFiniteUpdate: before weights were touched. DestroyedState: after that; nothing of it may be used.
        """
        with naming(f"iteration {iteration + 1}"):
            return self._update(self._prepare(batch, scores), iteration)

    def _update(self, train: TrainBatch, iteration: int) -> Update:
        # Once, not with every micro-batch: each of those refers to all prompts of the iteration.
        train = replace(train, condition=train.condition.to(self.device))
        history = []
        for epoch in range(self.epochs):
            order = torch.randperm(len(train), generator=seeded(self.seed, Stream.SHUFFLE, iteration, epoch))
            for part in order.tensor_split(self.updates):
                if part.numel():
                    second = self._second_steps(train, part)
                    history.append({**self._step(train, part), **second})
        self.version += 1
        done = {"learner/updates": float(len(history)), "learner/transitions": float(len(train))}
        return Update(self.version, {**train.metrics, **_summary(history, self._kinds), **done})

    def _prepare(self, batch: Any, scores: Scores | None) -> TrainBatch:
        """Call the algorithm's ``prepare``, without gradients; every rank computes all of it."""
        models = {role: self._in_micro_batches(model) for role, model in self.models.items()}
        if self.needs.rollout:
            models["rollout"] = models.pop("policy")
        with torch.no_grad(), self._rollout_weights_bound():
            return self.algorithm.prepare(batch, scores, models)

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
        if not self.needs.rollout or self.needs.rollout_weights == "policy" or self.ema is None:
            yield
            return
        with self.ema.bound():
            yield

    def _step(self, train: TrainBatch, order: Tensor) -> dict[str, float]:
        metrics = self._learn(self.engine, self.algorithm.loss, train, order, self.updates, train.total)
        if self.ema is not None:
            self.ema.update()
        return metrics

    def _second_steps(self, train: TrainBatch, order: Tensor) -> dict[str, float]:
        """Make the updates of the second network, if there is one, by the items of one of the policy's.

        Return means of metrics.
        """
        if self.second is None or self.needs.second is None:
            return {}
        loss, shares = self.algorithm.second_loss, order.tensor_split(self.needs.second.updates)
        made = [self._learn(self.second, loss, train, own, 1, own.numel(), "second/") for own in shares if own.numel()]
        return _summary(made, self._kinds)

    def _learn(
        self, engine: Engine, loss: Loss, train: TrainBatch, order: Tensor, updates: int, total: int, prefix: str = ""
    ) -> dict[str, float]:
        """Make one of the ``updates`` that ``total`` items are for, by ``order`` of them.

        ``prefix`` begins its metrics.
        """
        models = {**self.models}
        if self.second is not None:  # a network's gradients belong to its own loss
            other = "policy" if engine is self.second else "second"
            models[other] = _without_gradients(models[other])

        def keeping_kinds(minibatch: TrainBatch) -> LossOutput:
            output = loss(models, minibatch)
            self._kinds |= {prefix + name: type(metric) for name, metric in output.metrics.items()}
            return output

        shares = list(order.split(self.micro_batch_size // self.needs.item_samples))
        weights = [share.numel() * updates / total for share in shares]
        while len(shares) % engine.world_size:
            shares.append(shares[-1])
            weights.append(0.0)
        mine = slice(engine.rank, None, engine.world_size)
        micro_batches = [_to(train.take(share), self.device) for share in shares[mine]]
        metrics = {prefix + k: v for k, v in engine.step(keeping_kinds, micro_batches, weights[mine]).items()}
        covered = sum(weights)
        return {k: v / covered if self._kinds.get(k) is Mean else v for k, v in metrics.items()}

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


def _to(batch: TrainBatch, device: str) -> TrainBatch:
    if device == "cpu":
        return batch
    tensors = {k: v.to(device, non_blocking=True) for k, v in batch.tensors.items()}
    return TrainBatch(tensors, batch.condition.to(device), batch.total, batch.shared)


def _summary(history: list[dict[str, float]], kinds: Mapping[str, type]) -> dict[str, float]:
    if not history:
        return {}
    mean = {key: sum(step[key] for step in history) / len(history) for key in history[0]}
    first = {key: history[0][key] for key in history[0] if kinds.get(key) is Max}
    return {**mean, **first}
