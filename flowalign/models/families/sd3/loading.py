"""Loads the halves of a StableDiffusion3Pipeline, and puts them together again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flowalign.models.base import ModelError, Policy
from flowalign.models.families.sd3.encoders import SD3Encoders
from flowalign.models.families.sd3.files import PIPELINE, check_directory, has_t5, vae_scale_factor
from flowalign.models.families.sd3.network import SD3Network
from flowalign.models.scheduler import check_scheduler
from flowalign.record.libraries import UNREAD_INPUTS, silence

TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


@contextmanager
def uncollected() -> Iterator[None]:
    """Search for no cycles meanwhile: imports make a million objects that stay, and each search walks over all of them.

    A process that loads its first pipeline is so ready in four fifths of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the bars of libraries that load or save files for seconds: a run says itself what it loads."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    hidden = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in hidden:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in hidden:
            library.enable_progress_bar()


def plain_pipeline(directory: str, **options: Any) -> Any:
    """Load a plain pipeline of what lies in ``directory``.

    The code that an export of ours has for diffusers is not run.
    """
    from diffusers import StableDiffusion3Pipeline

    class Plain(StableDiffusion3Pipeline):
        @classmethod
        def load_config(cls, *args: Any, **kwargs: Any) -> Any:
            found: Any = super().load_config(*args, **kwargs)
            return {**found, "_class_name": PIPELINE}

    return StableDiffusion3Pipeline(**Plain.from_pretrained(directory, trust_remote_code=False, **options).components)


@uncollected()
def load_network(directory: Path, *, dtype: torch.dtype = torch.float32) -> SD3Network:
    """Load the network of a pipeline directory, on the CPU; its other parts are not read.

    Raises:
        ModelError: the directory is missing, incomplete or holds another pipeline.
    """
    from diffusers import SD3Transformer2DModel

    from flowalign.models.architectures.inputs import restore_inputs

    check_directory(directory)
    silence(UNREAD_INPUTS)
    with _telling(directory):
        module: Any = SD3Transformer2DModel.from_pretrained(
            str(directory / "transformer"), torch_dtype=dtype, local_files_only=True
        )
    restore_inputs(module, directory / "transformer")
    return SD3Network(
        module.eval(), check_scheduler(directory), vae_scale_factor(directory), mixed=dtype == torch.bfloat16
    )


@uncollected()
def load_encoders(directory: Path, *, dtype: torch.dtype = torch.float32, text: bool = True) -> SD3Encoders:
    """Load text encoders and autoencoder of a pipeline directory, on the CPU; without ``text`` the autoencoder alone.

    Raises:
        ModelError: the directory is missing, incomplete or holds another pipeline.
    """
    from diffusers import SD3Transformer2DModel

    check_directory(directory)
    absent: dict[str, Any] = {} if text else dict.fromkeys(TEXT)
    if not has_t5(directory):  # diffusers wants a dropped T5 to be named: text_encoder_3 is not an optional component
        absent |= {"text_encoder_3": None, "tokenizer_3": None}
    with _telling(directory):
        with torch.device("meta"):  # diffusers asks it for widths
            config: Any = SD3Transformer2DModel.load_config(str(directory / "transformer"), local_files_only=True)
            shell: Any = SD3Transformer2DModel.from_config(config)
        pipeline = plain_pipeline(str(directory), dtype=dtype, local_files_only=True, transformer=shell, **absent)
    return SD3Encoders(pipeline)


@contextmanager
def _telling(directory: Path) -> Iterator[None]:
    """Turn whatever a damaged file leads the libraries to raise into a ModelError."""
    try:
        with quietly():
            yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"model.path: {directory} cannot be loaded ({reason}); is it whole?") from error


def assembled(policy: Policy) -> Any:
    """Return the StableDiffusion3Pipeline of both halves, as it is saved."""
    from diffusers import StableDiffusion3Pipeline

    encoders, network = policy.encoders, policy.network
    assert isinstance(encoders, SD3Encoders)
    return StableDiffusion3Pipeline(**{**encoders.pipeline.components, "transformer": network.module})
