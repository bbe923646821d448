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

from flowalign.algorithms import build_algorithm
from flowalign.config.run import RunConfig
from flowalign.engine import process_group
from flowalign.engine.average import Averages
from flowalign.engine.base import EngineSettings
from flowalign.engine.build import build_engine
from flowalign.engine.convert import load
from flowalign.measure.validation import validation_of
from flowalign.models.activation_checkpointing import checkpoint_activations
from flowalign.models.adapters import AdapterError
from flowalign.models.build import bind_weights, buffers_hash, count_parameters, load_network, load_policy
from flowalign.models.encoders import Encoders
from flowalign.models.guided import guided
from flowalign.models.inspect import own_schedule
from flowalign.record.checkpoint import CheckpointError, content_hash
from flowalign.record.spans import span
from flowalign.run.collecting import Request
from flowalign.run.encoded import rollout_embeddings
from flowalign.run.learner import Learner
from flowalign.run.offloaded import offload_of
from flowalign.run.previews import preview_of
from flowalign.run.profiling import profiler_of
from flowalign.run.roles import precise, roles_of
from flowalign.run.second import is_second, restore_second, second_settings, second_state
from flowalign.run.source import Rollouts, source_of
from flowalign.run.teachers import Teacher
from flowalign.samples.offers import EVALUATION, of_images
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
    Preview,
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
    """Holds a policy and makes chunks of samples with the weights it was last given.

    ``texts`` are all that it will be asked to condition samples on, where it holds no text encoders.

    Raises:
        ConfigError, ModelError, DiskError, EncodingFailed: see `encoded.rollout_embeddings`.
        ModelError: the kernel of ``model.attention`` does not run here.
    """

    def __init__(self, config: RunConfig, name: str = "rollout-0", texts: Sequence[str] = ()) -> None:
        self.config, self.name = config, name
        with torch_threads(config.threads):
            own: dict[str, Any] = {"text": config.rollout.keeps_text_encoders}
            own["embeddings"] = rollout_embeddings(config, texts)
            self.policy = load_policy(config.model, device=config.device, begin=False, **own)
            self.policy.network.refuse_missing_kernel(config.device, config.precisions)
            if config.rollouts_compile:
                self.policy.network.compile()
        self.version = -1

    def bind(self, weights: dict[str, Tensor], version: int) -> BindReceipt:
        """Take over trainable weights; answers with what the network holds afterwards."""
        bind_weights(self.policy.network.module, weights)
        held = dict(self.policy.network.module.named_parameters())
        self.version = version
        return BindReceipt(self.name, version, len(weights), content_hash({k: held[k] for k in weights}))

    def rollout(self, asked: Request) -> tuple[Pictures, Trajectories, Preview]:
        """Make one chunk; return also what the driver sees of it. Refuse to work with weights of another version."""
        if asked.version != self.version:
            raise RuntimeError(f"{self.name} holds policy version {self.version}, asked for {asked.version}")
        began = time.monotonic()
        if (profiler := profiler_of(self.config, self.name)) is not None:
            profiler.at(asked.version)
        with torch_threads(self.config.threads), span("rollout"):
            made = rollout(
                self.policy,
                asked.batch,
                asked.plan,
                seed=asked.seed,
                policy_version=asked.version,
                length=self.config.model_as_trained.max_sequence_length,
                height=self.config.model.height,
                width=self.config.model.width,
                decode_batch_size=self.config.rollout.decode_batch_size,
                geometry=self.config.rollout.chunk_size,
            )
        pictures, trajectories = made
        if not asked.latents:
            pictures = replace(pictures, final_NCHW=None)
        return pictures, trajectories, preview_of(made, asked.looked_at, time.monotonic() - began)


class RewardWorker:
    """Holds the scorers of a run and scores chunks; ``hosted`` makes those that need an environment of their own."""

    def __init__(self, config: RunConfig, base_dir: Path, hosted: Hosted | None = None) -> None:
        self.config = config
        with torch_threads(config.cluster.reward_threads):
            trained = of_images(config.trained_rewards, base_dir)
            self.training = load_scorers(trained, base_dir, config.reward_device, hosted)
            self.evaluation = load_scorers(config.evaluation.judges, base_dir, config.reward_device, hosted, EVALUATION)

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
            with (
                span("score"),
                scorer.apart,
            ):  # apart here and not in the thread: it ends even where the scorer does not
                parts.append(self._answers(scorer, asked))
        weights = {name: weight for scorer in scorers for name, weight in scorer.weights.items()}
        return merge(parts, weights), time.monotonic() - began

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
    """One learner rank: networks by role, source, engine and the algorithm-blind learner; ``teachers`` live elsewhere.

    It holds no text encoders: what it learns from is encoded by ``encoders``, which somebody else in this process
    holds, or apart. ``first_here`` says whether it is the first rank of its machine.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int = 0,
        world_size: int = 1,
        port: int = 0,
        host: str = "127.0.0.1",
        teachers: Mapping[str, Teacher] | None = None,
        encoders: Encoders | None = None,
        first_here: bool | None = None,
    ) -> None:
        self.config = config
        torch.set_num_threads(config.threads)
        self._unread: AdapterError | None = None
        self._noted = False
        try:
            network = load_network(config.model)
        except AdapterError as error:  # a run that goes on has its weights, and its start, in the checkpoint
            network, self._unread = load_network(config.model, begin=False), error
        network.refuse_missing_kernel(config.device, config.precisions)
        checkpoint_activations(network.module, config.learner.activation_checkpointing)
        if config.rollouts_compile:
            network.compile()
        self.network = network
        self.parameters, self.buffers = count_parameters(network.module), buffers_hash(network.module)
        algorithm = build_algorithm(config.algorithm, own_schedule(config.model))
        needs, device = algorithm.needs, config.device
        self.roles = roles = roles_of(config, network, needs, teachers, compares=rank == 0)
        here: dict[str, Any] = {"rank": rank, "world_size": world_size}
        given = source_of(config, needs, encoders, **here, first_here=first_here)
        self.rollouts = given if isinstance(given, Rollouts) else None
        self.source = algorithm.source(given)
        place: dict[str, Any] = {**here, "master_port": port, "master_addr": host, "device": device}
        settings = engine_settings(config)
        engine, second = build_engine(network.module, settings, **place), None
        if roles.second is not None and needs.second is not None:
            second = build_engine(roles.second.module, second_settings(settings, needs.second), **place)
        self.source.meet()
        with process_group.failing_together():
            self.validation = validation_of(config)
        self._profiler = profiler_of(config, f"learner-{rank}")
        own, ema = config.learner, None
        if own.ema_decays:
            kept: dict[str, Any] = {"every": own.ema_every, "warmup": own.ema_warmup, "offload": settings.offload}
            ema = Averages(engine, own.ema_decays, **kept)
        self.learner = Learner(
            algorithm,
            roles.models,
            engine,
            passes=config.passes,
            seed=config.seed,
            ema=ema,
            device=device,
            second=second,
        )

    def update(self, chunks: Sequence[Trajectories], scores: Scores | None, iteration: int) -> Update:
        """Learn from the iteration's batch: its trajectories, or, where none were made, what the source has on disk."""
        self._refuse_unread()
        if self._profiler is not None:
            self._profiler.at(iteration)
        if self.rollouts is not None:
            self.rollouts.take(chunks)
        with torch_threads(self.config.threads), span("learn"):
            update = self.learner.update(self.source.batch(iteration), scores, iteration)
            for follower in self.roles.followers:
                follower.follow(self.learner, iteration)
            self._note_graphs()
            return replace(update, metrics={**update.metrics, **self.source.metrics})

    def validate(self) -> dict[str, float]:
        """Return the validation loss of the weights and of their average; a collective call."""
        self._refuse_unread()
        if self.validation is None:
            return {}
        with torch_threads(self.config.threads):
            velocity = precise(guided(self.network), self.config.network_dtype, self.config.device)
            losses = self.validation.losses(velocity, "validation")
            if self.learner.ema is not None:
                with self.learner.ema.bound():
                    losses |= self.validation.losses(velocity, "validation_ema")
            return losses

    def weights(self, evaluation: bool = False) -> dict[str, Tensor]:
        """Return the weights that rollouts bind next, or those that ``evaluation.weights`` names."""
        self._refuse_unread()
        if evaluation and self.config.evaluation.weights == "ema" and self.learner.ema is not None:
            return self.learner.ema.weights()
        return self.learner.weights()

    def version(self) -> int:
        return self.learner.version

    def state(self) -> dict[str, Any]:
        """Return everything a checkpoint needs from this rank; a collective call."""
        learner, reference = self.learner, self.roles.reference
        tensors, facts = learner.engine.optimizer_state()
        held = {} if reference is None else reference.weights()
        tensors = {**tensors, **{REFERENCE + name: weight for name, weight in held.items()}}
        if learner.second is not None:
            own, own_facts = second_state(learner.second)
            tensors, facts = {**tensors, **own}, {**facts, "second": own_facts}
        return {
            "model": learner.engine.weights(),
            "ema": None if learner.ema is None else learner.ema.weights(),
            "averages": {} if learner.ema is None else learner.ema.others(),
            "optimizer": (tensors, facts),
            "version": learner.version,
        }

    def restore(
        self,
        model: dict[str, Tensor],
        ema: dict[str, Tensor] | None,
        averages: Mapping[str, Mapping[str, Tensor]],
        optimizer: tuple[Mapping[str, Tensor], Mapping[str, Any]],
        version: int,
    ) -> str | None:
        """Continue bitwise where ``state`` was taken, or where another engine's was (`convert.load`).

        Raises:
            CheckpointError: an average of the configuration was not kept. ResumeRefused: see `convert.load`.
        """
        learner = self.learner
        tensors, facts = optimizer
        held = {name.removeprefix(REFERENCE): t for name, t in tensors.items() if name.startswith(REFERENCE)}
        own = {name: t for name, t in tensors.items() if not (name.startswith(REFERENCE) or is_second(name))}
        lines = [load(learner.engine, model, (own, facts))]
        if learner.second is not None:
            lines.append(restore_second(learner.second, tensors, facts.get("second")))
        if learner.ema is not None and ema is not None:
            try:
                learner.ema.load(ema, averages)
            except ValueError as error:
                raise CheckpointError(str(error)) from None
        learner.version = version
        self._unread = None
        if self.roles.reference is not None:
            self.roles.reference.take(held)
        for follower in self.roles.followers:
            if follower is not self.roles.reference:
                follower.follow(learner, learner.engine.steps - 1)
        return "; ".join(line for line in lines if line is not None) or None

    def _note_graphs(self) -> None:
        """Note once, after an update, that torch's cache of this machine holds the graphs of a compiled run."""
        if self.config.learner.compiles and not self._noted:
            from flowalign.run.compiled import remember

            remember(self.config)
        self._noted = True

    def _refuse_unread(self) -> None:
        """Raise AdapterError where the adapter to begin from could not be had, and nothing was restored either."""
        if self._unread is not None:
            raise self._unread

    def close(self) -> None:
        if self._profiler is not None:
            self._profiler.close()
        self.learner.engine.close()
        if self.learner.second is not None:
            self.learner.second.close()


def engine_settings(config: RunConfig) -> EngineSettings:
    learner = config.learner
    return EngineSettings(
        type=learner.engine,
        zero_stage=learner.zero_stage,  # type: ignore[arg-type]
        dtype=config.engine_dtype,
        optimizer=learner.optimizer,
        compile=learner.compiles and not config.rollouts_compile,  # which the worker has done
        schedule=config.learning_rate_at,
        offload=offload_of(config),
    )
