"""Fixtures of more than one package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)  # a loaded machine is no fault of an example
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real StableDiffusion3Pipeline directory, random and with one block."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from flowalign.shapes.build.autoencoder import new_autoencoder
    from flowalign.shapes.build.pipeline import new_transformer
    from flowalign.shapes.build.text import new_text_encoder, new_tokenizer

    torch.manual_seed(0)
    tokenizer, absent = new_tokenizer(), None
    encoders = [new_text_encoder(tokenizer, 64, activation) for activation in ("quick_gelu", "gelu")]
    vae = new_autoencoder()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    parts: dict[str, Any] = {
        "transformer": new_transformer(128, 128, num_layers=1, num_heads=1),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
        "vae": vae,
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "text_encoder_2": encoders[1],
        "tokenizer_2": tokenizer,
        "text_encoder_3": absent,
        "tokenizer_3": absent,
    }
    directory = tmp_path_factory.mktemp("pipeline")
    StableDiffusion3Pipeline(**parts).save_pretrained(str(directory))
    return directory
