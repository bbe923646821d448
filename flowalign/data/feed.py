"""Batches of training steps: latents of a bank with the embeddings of their captions, a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowalign.conditions import cat_conditions, take_rows
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.bank import shortened
from flowalign.data.banks.captions import CaptionTable
from flowalign.data.banks.latents import Drawn, LatentBank, LatentsError, load_bank
from flowalign.flow.randomness import Stream, seeded
from flowalign.models.directory import open_directory, text_parts
from flowalign.models.family import TextPart
from flowalign.models.fingerprint import encoder_hash
from flowalign.types import Condition, LatentBatch


class Captioned:
    """A bank with the embeddings of its captions: those it was precomputed with, else those of a `CaptionTable`.

    ``encoder`` is the hash of what encodes images and texts for the model.
    """

    def __init__(self, directory: Path, model: ModelConfig, length: int, encoder: str, spare: Path) -> None:
        self.bank: LatentBank = load_bank(directory)
        if self.bank.encoder is not None and self.bank.encoder != encoder:
            raise LatentsError(
                f"latents: {directory} was encoded by another autoencoder or other text encoders than the model's; "
                "precompute it again with model.path"
            )
        self._length = length
        if self.bank.embeddings is None:
            self._table = CaptionTable(directory, self.bank.prompts, model, length, encoder, spare).read()
        else:
            self._table = self.bank.embeddings.condition(length)

    def condition(self, rows: Tensor, length: int) -> Condition:
        """Return the captions ``rows`` (N,) of one batch, each once, with their text ``length`` long.

        Raises:
            LatentsError: the file of the embeddings was cut off.
        """
        if self.bank.embeddings is not None and self.bank.embeddings.file is not None:
            self.bank.embeddings.file.check()
        return shortened(self._table, self._length - length).take(rows).used()


def check_channels(directory: str, bank: LatentBank, model: ModelConfig) -> None:
    """Raise LatentsError where the latents of the bank in ``directory`` have other channels than the model's."""
    channels = open_directory(model).geometry.channels
    found = {shard.latents.shape[1] for shard in bank.shards}
    if found != {channels}:
        there = " and ".join(map(str, sorted(found)))
        raise LatentsError(
            f"latents: {directory} holds latents of {there} channels, the model's have {channels}; precompute it with "
            "model.path"
        )


def longest_text(config: PretrainConfig) -> int:
    return max(length for phase in config.stretches for length in phase.max_sequence_lengths)


def spare_of(config: PretrainConfig) -> Path:
    """Return the folder for embeddings of captions that cannot lie beside their bank."""
    return Path(config.runs_dir) / config.name / "captions"


def tables(config: PretrainConfig) -> list[CaptionTable]:
    """Return the tables of all captions that a run learns from or validates with, except those of banks that have their
    own."""
    asked = [(config.latents, longest_text(config))]
    asked += [] if config.real_data is None else [(config.real_data.latents, longest_text(config))]
    own = config.model_as_trained.max_sequence_length
    asked += [] if config.validation is None else [(config.validation.latents, own)]
    banks = [(Path(place), load_bank(Path(place), verify=False), length) for place, length in asked]
    lacking = [(place, bank.prompts, length) for place, bank, length in banks if bank.embeddings is None]
    encoder = encoder_hash(config.model) if lacking else ""
    spare = spare_of(config)
    return [CaptionTable(place, prompts, config.model, length, encoder, spare) for place, prompts, length in lacking]


class Feed:
    """The batches of a run.

    Raises:
        LatentsError: a bank cannot be read, has other captions than the run asks for, or no noise to mix with.
        NotEncoded: its captions have no embeddings on disk.
    """

    def __init__(self, config: PretrainConfig) -> None:
        longest, model = longest_text(config), config.model
        self._config = config
        self._parts = text_parts(model)
        encoder = encoder_hash(model)
        self._main = Captioned(Path(config.latents), model, longest, encoder, spare_of(config))
        check_channels(config.latents, self._main.bank, model)
        real = config.real_data
        self._real = None
        if real is not None:
            self._real = Captioned(Path(real.latents), model, longest, encoder, spare_of(config))
        if self._real is not None and not self._main.bank.has_noise:
            raise LatentsError(f"real_data: {config.latents} has no noise of its own; it is real data itself")

    def batch(self, step: int, length: int) -> LatentBatch:
        """Return the batch of a step, with texts of ``length``, on the configured device."""
        config = self._config
        fraction = 0.0 if config.real_data is None else config.real_data.fraction
        real = round(config.learner.batch_size * fraction)
        drawn = self._main.bank.draw(step, config.learner.batch_size - real, config.seed, config.captions)
        condition = self._main.condition(drawn.rows, length)
        latents, noise = drawn.latents, drawn.noise
        if self._real is not None:
            more = self._real.bank.draw(step, real, config.seed + 1, {})
            latents = torch.cat([latents, _fitting(more, latents, config)])
            fresh = torch.randn(more.latents.shape, generator=seeded(config.seed, Stream.FRESH_NOISE, step))
            noise = None if noise is None else torch.cat([noise, fresh])
            condition = cat_conditions([condition, self._real.condition(more.rows, length)])
        if config.encoder_dropout:
            chances = torch.tensor([config.encoder_dropout.get(name, 0.0) for name in self._parts])
            drawn_NE = torch.rand(
                len(condition), len(chances), generator=seeded(config.seed, Stream.TEXT_DROPOUT, step)
            )
            condition = without_encoders(condition, list(self._parts.values()), drawn_NE < chances)
        return LatentBatch(
            latents.to(config.device),
            condition.to(config.device),
            _batch_seed(config.seed, step),
            None if noise is None else noise.to(config.device),
        )


def without_encoders(condition: Condition, parts: Sequence[TextPart], dropped_NE: Tensor) -> Condition:
    """Return ``condition`` with the output of single encoders replaced by that of the empty text.

    ``dropped_NE`` (N, E) says which.

    Rows of the result are the distinct pairs of prompt and encoders left.
    """
    pairs = torch.cat([condition.index_N[:, None].cpu(), dropped_NE.long()], 1)
    chosen, index = torch.unique(pairs, dim=0, return_inverse=True)
    text, null = take_rows(condition.text, chosen[:, 0]), take_rows(condition.null, condition.null_N[0])
    tokens, pooled = text["tokens"].clone(), text["pooled"].clone()
    for e, part in enumerate(parts):
        rows = chosen[:, 1 + e].nonzero().flatten()
        place, width, features = slice(*part.tokens), slice(*part.features), slice(*part.pooled)
        tokens[rows, place, width] = null["tokens"][place, width]
        pooled[rows, features] = null["pooled"][features]
    return replace(condition, text={"tokens": tokens, "pooled": pooled}, index_N=index)


def _fitting(real: Drawn, latents: Tensor, config: PretrainConfig) -> Tensor:
    if real.latents.shape[1:] != latents.shape[1:]:
        name = "" if config.real_data is None else config.real_data.latents
        raise LatentsError(
            f"real_data: {name} holds latents of {tuple(real.latents.shape[1:])}, {config.latents} of "
            f"{tuple(latents.shape[1:])}; precompute both with the same sizes"
        )
    return real.latents


def _batch_seed(seed: int, step: int) -> int:
    return seed * 1_000_003 + step
