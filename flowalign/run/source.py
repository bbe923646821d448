"""The sources of what a learner's rank learns from: rollouts, preference pairs, prompts alone, latents on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from flowalign.algorithm import Needs, Source
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.training import PhaseConfig, PretrainConfig
from flowalign.data.banks.cache import EncodedCache
from flowalign.data.feed import Feed
from flowalign.data.preferences import check_shared
from flowalign.engine import process_group
from flowalign.flow.randomness import Stream, seeded
from flowalign.models.directory import open_directory
from flowalign.models.embeddings import EmbeddingStore
from flowalign.models.encoders import Encoders
from flowalign.run.encoded import encode_captions, encode_texts, pairs_of
from flowalign.samples.arrange import with_negatives
from flowalign.samples.joined import join_trajectories
from flowalign.samples.texts import group_sampler, texts_of
from flowalign.types import EncodedPrompts, LatentBatch, PreferencePairs, PromptBatch, Trajectories


class Rollouts:
    """What the rollout workers have made; the backend hands it over before each iteration."""

    metrics: Mapping[str, float] = {}

    def __init__(self) -> None:
        self._chunks: Sequence[Trajectories] = ()

    def meet(self) -> None:
        """Do nothing: there is nothing to read."""

    def take(self, chunks: Sequence[Trajectories]) -> None:
        """Hold the chunks of the next iteration, where they lie."""
        self._chunks = chunks

    def batch(self, iteration: int) -> Trajectories:
        """Return them joined, and let them go."""
        chunks, self._chunks = self._chunks, ()
        return join_trajectories(chunks)


class Pairs:
    """Preference pairs on disk, which every rank draws alike; see `pairs_of`."""

    def __init__(self, config: AlignConfig, encoders: Encoders | None, rank: int, world_size: int) -> None:
        self._pairs = pairs_of(config, encoders, rank=rank, world_size=world_size)
        self.metrics = self._pairs.metrics

    def meet(self) -> None:
        """Raise PreferencesError unless all ranks hold the same pairs; a collective call."""
        check_shared(self._pairs)

    def batch(self, iteration: int) -> PreferencePairs:
        return self._pairs.batch(iteration)


class PromptsAlone:
    """The prompts that rollouts would be asked for, encoded: what is made of them is the learner's own walk."""

    metrics: Mapping[str, float] = {}

    def __init__(self, config: AlignConfig, needs: Needs, encoders: Encoders | None, first_here: bool) -> None:
        self._config, self._encoders, self._first_here = config, encoders, first_here
        self._sampler = group_sampler(config, needs)
        self._latent_shape = open_directory(config.model).latent_shape(config.model.height, config.model.width)

    def _batch(self, iteration: int) -> PromptBatch:
        return with_negatives(self._sampler.batch(iteration), self._config.model)

    def meet(self) -> None:
        """Encode the prompts of the run that are not on disk yet, once on each machine; a collective call.

        Raises:
            DiskError, ModelError: see `EmbeddingStore`. EncodingFailed: the process that encodes has died.
            OtherRankFailed: another rank could not do it.
        """
        config = self._config
        with process_group.failing_together():
            if self._first_here:
                texts = texts_of(self._sampler.rows(config.total), config.model)
                store = EmbeddingStore(config.embeddings, config.model, config.device)
                encode_texts(config, store, texts, self._encoders)
        self._cache = EncodedCache(config.embeddings, None, config.model, config.device)

    def batch(self, iteration: int) -> EncodedPrompts:
        """Return the samples that a rollout of the iteration would make."""
        batch = self._batch(iteration)
        keys = ([self._cache.caption(text) for text in texts] for texts in (batch.prompts, batch.negatives))
        condition = self._cache.condition(*keys)
        return EncodedPrompts(batch, condition, self._latent_shape, self._config.seed)


class Latents:
    """Latents of a bank, drawn by (seed, iteration), with texts of a length that the phase draws."""

    metrics: Mapping[str, float] = {}

    def __init__(self, config: PretrainConfig, first_here: bool) -> None:
        self._config, self._first_here = config, first_here

    def meet(self) -> None:
        """Encode the captions that are not on disk yet, once on each machine, and open the banks; a collective call.

        Raises:
            LatentsError, NotEncoded, ConfigError: see `Feed`. EncodingFailed: the process that encodes has died.
            OtherRankFailed: another rank could not do it.
        """
        with process_group.failing_together():
            if self._first_here:
                encode_captions(self._config)
        with process_group.failing_together():
            self._feed = Feed(self._config)

    def batch(self, iteration: int) -> LatentBatch:
        phase, _ = self._config.phase_at(iteration)
        return self._feed.batch(iteration, text_length(phase, self._config.seed, iteration))


def text_length(phase: PhaseConfig, seed: int, step: int) -> int:
    """Return the T5-part length of a step, drawn by the phase's weights."""
    lengths = sorted(phase.max_sequence_lengths)
    weights = torch.tensor([phase.max_sequence_lengths[length] for length in lengths])
    return lengths[int(torch.multinomial(weights, 1, generator=seeded(seed, Stream.TEXT_LENGTH, step)))]


def source_of(
    config: RunConfig,
    needs: Needs,
    encoders: Encoders | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    first_here: bool | None = None,
) -> Source:
    """Return the source of the batches that an algorithm ``needs``; its `meet` comes before its first batch.

    ``first_here`` says whether this rank is the first of its machine.

    Raises:
        PreferencesError, DiskError, ModelError, EncodingFailed: see `pairs_of`. PromptsError: there are none.
    """
    first = rank == 0 if first_here is None else first_here
    if needs.batch is EncodedPrompts:
        assert isinstance(config, AlignConfig)
        return PromptsAlone(config, needs, encoders, first)
    if needs.batch is PreferencePairs:
        assert isinstance(config, AlignConfig)
        return Pairs(config, encoders, rank, world_size)
    if needs.batch is LatentBatch:
        assert isinstance(config, PretrainConfig)
        return Latents(config, first)
    return Rollouts()
