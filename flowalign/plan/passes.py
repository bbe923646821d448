"""Bytes and FLOPs of the passes that a run makes, counted once for each way of making them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import torch

from flowalign.config.run import RunConfig
from flowalign.config.sections import ModelConfig
from flowalign.models.directory import open_directory
from flowalign.models.inspect import empty_autoencoder, empty_network
from flowalign.models.traced import Device, Held, Line, decoding, held_by


@dataclass(frozen=True)
class Passes:
    """What N rows of a batch hold: in the learner, in a rollout's pass, and while N images are decoded.

    ``decode_flops`` are those of one image; without a file that says what the autoencoder is both are 0.
    """

    learned: Line
    rolled: Line
    decoded: Line
    decode_flops: int


NOTHING = Passes(Line(0, 0), Line(0, 0), Line(0, 0), 0)


def passes_of(config: RunConfig, model: ModelConfig, device: Device) -> Passes:
    """Count for a run over ``model``, whose size of images and texts are the largest of the run.

    Raises:
        ModelError: its small files do not say what it is.
    """
    learner = "bfloat16" if "bfloat16" in (model.dtype, config.engine_dtype, config.network_dtype) else "float32"
    files = _files(model)
    learned = _held(_key(model), files, learner == "bfloat16", device, config.learner.activation_checkpointing)
    rolled = learned if learner == model.dtype else _held(_key(model), files, model.dtype == "bfloat16", device, "none")
    return Passes(learned.learned, rolled.rolled, *_decoded(_key(model), files))


def _key(model: ModelConfig) -> str:
    return model.model_dump_json()


def _files(model: ModelConfig) -> str:
    """Return what the files say of network and autoencoder, which may change while a process lives."""
    directory = open_directory(model)
    return json.dumps([dict(directory.config(part)) for part in ("transformer", "vae")], default=str)


@lru_cache(maxsize=64)
def _held(model: str, files: str, half: bool, device: Device, checkpointing: str) -> Held:
    own = ModelConfig.model_validate_json(model)
    directory = open_directory(own)
    return held_by(
        empty_network(own),
        directory.latent_shape(own.height, own.width),
        directory.family.full_text(directory, own.max_sequence_length),
        half=half,
        lora=own.lora,
        device=device,
        checkpointing=checkpointing,
    )


@lru_cache(maxsize=64)
def _decoded(model: str, files: str) -> tuple[Line, int]:
    own = ModelConfig.model_validate_json(model)
    directory = open_directory(own)
    autoencoder = empty_autoencoder(own)
    if autoencoder is None:
        return Line(0, 0), 0
    shape = directory.latent_shape(own.height, own.width)
    return decoding(directory.family.decode, autoencoder, shape, getattr(torch, own.dtype))
