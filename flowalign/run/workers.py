"""Workers that run inside an actor, free of Ray: rollout, reward and learner workers of every backend.

Each sets its own thread count around its work, so that all backends compute the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.algorithm import VelocityModel
from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.data.pairsampler import PairSampler
from flowalign.data.preferences import check_shared
from flowalign.engine.base import Engine, EngineSettings
from flowalign.engine.build import build_engine
from flowalign.engine.convert import load
from flowalign.measure.evaluate import evaluation_rewards
from flowalign.models.build import (
    bind_weights,
    count_parameters,
    frozen_copy,
    load_network,
    load_policy,
    reference_velocity,
)
from flowalign.models.encoders import Encoders
from flowalign.models.guided import frozen, guided
from flowalign.models.inspect import own_schedule
from flowalign.models.network import Network
from flowalign.record.checkpoint import content_hash
from flowalign.run.encoded import pairs_of
from flowalign.run.learner import Learner
from flowalign.run.previews import preview_of
from flowalign.run.second import is_second, restore_second, second_network, second_settings, second_state
from flowalign.run.teachers import Teacher, load_teachers
from flowalign.samples.joined import join_trajectories
from flowalign.samples.offers import EVALUATION
from flowalign.samples.opened import torch_threads
from flowalign.samples.rollout import rollout
from flowalign.samples.scoring import (
    Hosted,
    NamedScorer,
    bounded,
    load_scorers,
    merge,
    question,
    score_images,
    together,
)
from flowalign.types import (
    Pictures,
    PreferencePairs,
    Preview,
    PromptBatch,
    SamplingPlan,
    Scores,
    Trajectories,
    Update,
)
from rewards.interface import Asked, Checked
from rewards.question import joined

REFERENCE = "reference."  # in the optimizer's part of a checkpoint: what a refreshed reference holds


@dataclass(frozen=True)
class BindReceipt:
    """The acknowledgement of a weight sync: what an actor bound."""

    worker: str
    version: int
    tensors: int
    content_hash: str


class RolloutWorker:
    """Holds a policy and makes chunks of samples with the weights it was last given."""

    def __init__(self, config: AlignConfig, name: str = "rollout-0") -> None:
        self.config, self.name = config, name
        with torch_threads(config.cluster.threads):
            self.policy = load_policy(config.model, device=config.cluster.device)
        self.version = -1

    def bind(self, weights: dict[str, Tensor], version: int) -> BindReceipt:
        """Take over trainable weights; answers with what the network holds afterwards."""
        bind_weights(self.policy.network.module, weights)
        held = dict(self.policy.network.module.named_parameters())
        self.version = version
        return BindReceipt(self.name, version, len(weights), content_hash({k: held[k] for k in weights}))

    def rollout(
        self,
        batch: PromptBatch,
        plan: SamplingPlan,
        seed: int,
        version: int,
        latents: bool = False,
        looked_at: Sequence[int] = (),
    ) -> tuple[Pictures, Trajectories, Preview]:
        """Make one chunk; return also what the driver sees of it, the images ``looked_at`` whole.

        The pictures have ``latents`` where a reward needs them. Refuse to work with weights of another version.
        """
        if version != self.version:
            raise RuntimeError(f"{self.name} holds policy version {self.version}, asked for {version}")
        began = time.monotonic()
        with torch_threads(self.config.cluster.threads):
            made = rollout(
                self.policy,
                batch,
                plan,
                seed=seed,
                policy_version=version,
                length=self.config.model.max_sequence_length,
                height=self.config.model.height,
                width=self.config.model.width,
                decode_batch_size=self.config.rollout.decode_batch_size,
                geometry=self.config.rollout.chunk_size,
            )
        pictures, trajectories = made
        if not latents:
            pictures = replace(pictures, final_NCHW=None)
        return pictures, trajectories, preview_of(made, looked_at, time.monotonic() - began)


class RewardWorker:
    """Holds the scorers of a run and scores chunks; ``hosted`` makes those that need an environment of their own."""

    def __init__(self, config: AlignConfig, base_dir: Path, hosted: Hosted | None = None) -> None:
        self.config = config
        with torch_threads(config.cluster.reward_threads):
            self.training = load_scorers(config.rewards, base_dir, config.reward_device, hosted)
            self.evaluation = load_scorers(
                evaluation_rewards(config), base_dir, config.reward_device, hosted, EVALUATION
            )

    def needs(self, evaluation: bool = False) -> frozenset[str]:
        """Return what the rewards need beside images, prompts and metadata."""
        scorers = self.evaluation if evaluation else self.training
        return frozenset().union(*(scorer.needs for scorer in scorers))

    def score(self, chunks: Sequence[Pictures], evaluation: bool = False) -> tuple[Scores, float]:
        """Score chunks that are scored as one (`joined.scored_together`).

        Return the scores and the seconds they took.
        """
        began = time.monotonic()
        scorers = self.evaluation if evaluation else self.training
        if not scorers:
            count = sum(map(len, chunks))
            return Scores({}, torch.zeros(count), torch.ones(count, dtype=torch.bool)), 0.0
        asked = [question(chunk) for chunk in chunks]
        parts = []
        for scorer in scorers:
            with scorer.apart:  # here and not in the thread, so that it ends even where the scorer does not
                parts.append(self._answers(scorer, asked))
        return merge(parts, {s.name: s.weight for s in scorers}), time.monotonic() - began

    def _answers(self, scorer: NamedScorer, asked: Sequence[Asked]) -> Checked:
        """Ask a scorer of groups about the chunks joined; any other about one by one, the batches of any other run."""
        seconds = self.config.cluster.reward_deadline_s
        if "group" in scorer.needs:
            whole = joined(asked)
            return bounded(scorer.name, partial(self._score, scorer, whole), seconds * len(set(whole.groups or ())))
        parts: list[tuple[range, Checked]] = []
        begin = 0
        for part in asked:
            answer = bounded(scorer.name, partial(self._score, scorer, part), seconds)
            parts.append((range(begin, begin := begin + len(part)), answer))
        return together(parts, begin)

    def _score(self, scorer: NamedScorer, asked: Asked) -> Checked:
        # Thread counts belong to threads: set in the one that scores.
        with torch_threads(self.config.cluster.reward_threads):
            return score_images(scorer, asked)


class LearnerWorker:
    """One learner rank: network, reference, engine and the algorithm-blind learner; ``teachers`` live elsewhere.

    It holds no encoders: pairs are encoded by ``encoders``, which somebody else in this process holds, or apart.
    """

    def __init__(
        self,
        config: AlignConfig,
        rank: int = 0,
        world_size: int = 1,
        port: int = 0,
        host: str = "127.0.0.1",
        teachers: Mapping[str, Teacher] | None = None,
        encoders: Encoders | None = None,
    ) -> None:
        self.config = config
        torch.set_num_threads(config.cluster.threads)
        self.network = network = load_network(config.model)
        self.parameters = count_parameters(network.module)
        algorithm = build_algorithm(config.algorithm, own_schedule(config.model))
        needs, device = algorithm.needs, config.cluster.device
        models: dict[str, VelocityModel] = {"policy": guided(network)}
        models |= load_teachers(config, needs.teachers, network, teachers, compares=rank == 0)
        self.reference: RefreshedReference | None = None
        if needs.reference is not None and needs.reference.refresh is not None:
            self.reference = RefreshedReference(network, needs.reference.refresh, device)
            models["reference"] = self.reference.velocity
        elif needs.reference is not None:
            models["reference"] = reference_velocity(network, device)
        second = None if needs.second is None else second_network(network)
        if second is not None:
            models["second"] = guided(second)
        self.pairs: PairSampler | None = None
        if needs.batch is PreferencePairs:
            self.pairs = pairs_of(config, encoders, rank=rank, world_size=world_size)
        place: dict[str, Any] = {"rank": rank, "world_size": world_size, "master_port": port, "master_addr": host}
        place["device"] = device
        engine = build_engine(network.module, engine_settings(config), **place)
        own: Engine | None = None
        if second is not None and needs.second is not None:
            own = build_engine(second.module, second_settings(engine_settings(config), needs.second), **place)
        if self.pairs is not None:
            check_shared(self.pairs)
        learner = config.learner
        self.learner = Learner(
            algorithm,
            models,
            engine,
            micro_batch_size=learner.micro_batch_size,
            updates_per_iteration=learner.updates_per_iteration,
            epochs=learner.epochs,
            seed=config.seed,
            ema_decay=learner.ema_decay,
            device=config.cluster.device,
            second=own,
        )

    def update(self, chunks: Sequence[Trajectories], scores: Scores | None, iteration: int) -> Update:
        """Learn from the iteration's trajectories, or, where it makes none, from its preference pairs."""
        with torch_threads(self.config.cluster.threads):
            if self.pairs is None:
                update = self.learner.update(join_trajectories(chunks), scores, iteration)
            else:
                update = self.learner.update(self.pairs.batch(iteration), None, iteration)
                update = replace(update, metrics={**update.metrics, **self.pairs.metrics})
            if self.reference is not None and self.reference.due(iteration):
                self.reference.take(self.learner.engine.weights())
            return update

    def weights(self, evaluation: bool = False) -> dict[str, Tensor]:
        """Return the weights that rollouts bind next, or those that ``evaluation.weights`` names."""
        if evaluation and self.config.evaluation.weights == "ema" and self.learner.ema is not None:
            return self.learner.ema.weights()
        return self.learner.weights()

    def version(self) -> int:
        return self.learner.version

    def state(self) -> dict[str, Any]:
        """Return everything a checkpoint needs from this rank; a collective call."""
        learner = self.learner
        tensors, facts = learner.engine.optimizer_state()
        held = {} if self.reference is None else self.reference.weights()
        tensors = {**tensors, **{REFERENCE + name: weight for name, weight in held.items()}}
        if learner.second is not None:
            own, own_facts = second_state(learner.second)
            tensors, facts = {**tensors, **own}, {**facts, "second": own_facts}
        return {
            "model": learner.engine.weights(),
            "ema": None if learner.ema is None else learner.ema.weights(),
            "optimizer": (tensors, facts),
            "version": learner.version,
        }

    def restore(
        self,
        model: dict[str, Tensor],
        ema: dict[str, Tensor] | None,
        optimizer: tuple[Mapping[str, Tensor], Mapping[str, Any]],
        version: int,
    ) -> str | None:
        """Continue bitwise where ``state`` was taken, or where another engine's was (`convert.load`)."""
        learner = self.learner
        tensors, facts = optimizer
        held = {name.removeprefix(REFERENCE): t for name, t in tensors.items() if name.startswith(REFERENCE)}
        own = {name: t for name, t in tensors.items() if not (name.startswith(REFERENCE) or is_second(name))}
        lines = [load(learner.engine, model, (own, facts))]
        if self.reference is not None:
            self.reference.take(held)
        if learner.second is not None:
            lines.append(restore_second(learner.second, tensors, facts.get("second")))
        if learner.ema is not None and ema is not None:
            learner.ema.load(ema)
        learner.version = version
        return "; ".join(line for line in lines if line is not None) or None

    def close(self) -> None:
        self.learner.engine.close()
        if self.learner.second is not None:
            self.learner.second.close()


class RefreshedReference:
    """A frozen copy of the network, LoRA included, that takes the policy's weights every ``every`` iterations."""

    def __init__(self, network: Network, every: int, device: str | torch.device | None = None) -> None:
        self.every = every
        self._trained = [name for name, p in network.module.named_parameters() if p.requires_grad]
        own = frozen_copy(network, device)
        self._module, self.velocity = own.module, frozen(own)

    def due(self, iteration: int) -> bool:
        """Tell whether iteration ``iteration``, counted from 0, ends with a refresh."""
        return (iteration + 1) % self.every == 0

    def take(self, weights: Mapping[str, Tensor]) -> None:
        bind_weights(self._module, dict(weights))

    def weights(self) -> dict[str, Tensor]:
        held = dict(self._module.named_parameters())
        return {name: held[name].detach().to("cpu", copy=True) for name in self._trained}


def engine_settings(config: AlignConfig) -> EngineSettings:
    learner = config.learner
    return EngineSettings(
        type=learner.engine,
        zero_stage=learner.zero_stage,  # type: ignore[arg-type]
        dtype=config.model.dtype,
        optimizer=learner.optimizer,
    )
