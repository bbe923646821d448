"""Loads the halves of a pipeline, and puts them together again."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flowalign.models.base import Policy
from flowalign.models.directory import OWN_PIPELINE, Directory, check_directory
from flowalign.models.encoders import Encoders
from flowalign.models.errors import ModelError
from flowalign.models.family import ModelFamily
from flowalign.models.network import Network
from flowalign.record.cycles import importing
from flowalign.record.libraries import UNREAD_INPUTS, silence


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


def plain_pipeline(family: ModelFamily, directory: Path, **options: Any) -> Any:
    """Load a plain pipeline of what lies in ``directory``; ``options`` replace parts, or name them as absent.

    The code that an export of ours has for diffusers is not run. What the directory lacks is named, as diffusers wants.
    """
    public = pipeline_of(family)
    own = Directory(family, directory)
    absent = dict.fromkeys(part for part in family.optional if not own.has(part))

    class Plain(public):
        @classmethod
        def load_config(cls, *args: Any, **kwargs: Any) -> Any:
            found: Any = super().load_config(*args, **kwargs)
            return {**found, "_class_name": family.pipeline}

    options = {"local_files_only": True, **absent, **options}
    return public(**Plain.from_pretrained(str(directory), trust_remote_code=False, **options).components)


def pipeline_of(family: ModelFamily) -> Any:
    """Return the diffusers class of the family's pipelines."""
    import diffusers

    return getattr(diffusers, family.pipeline)


def own_pipeline(family: ModelFamily) -> Any:
    """Return the pipeline of ours that samples what a plain one would sample wrongly.

    Raises:
        ModelError: the family has none.
    """
    if family.own_pipeline is None:
        raise ModelError(f"{family.title} has no pipeline for networks with further inputs or of another path")
    return getattr(importlib.import_module(family.own_pipeline), OWN_PIPELINE[1])


def transformer_of(family: ModelFamily) -> Any:
    """Return the diffusers class of the family's networks."""
    import diffusers

    return getattr(diffusers, family.network)


def load_network(family: ModelFamily, directory: Path, *, dtype: torch.dtype = torch.float32) -> Network:
    """Load the network of a pipeline directory, on the CPU; its other parts are not read.

    Raises:
        ModelError: the directory is missing, incomplete or holds another pipeline.
    """
    check_directory(family, directory)
    own = Directory(family, directory)
    silence(UNREAD_INPUTS)
    with importing():
        kind = transformer_of(family)
    with _telling(directory):
        module: Any = kind.from_pretrained(
            str(directory / "transformer"), torch_dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    if family.inputs is not None:
        from flowalign.models.inputs import restore_inputs

        restore_inputs(module, directory / "transformer")
    return Network(family, module.eval(), own.scheduler, own.geometry, mixed=dtype == torch.bfloat16)


def load_encoders(
    family: ModelFamily, directory: Path, *, dtype: torch.dtype = torch.float32, text: bool = True
) -> Encoders:
    """Load text encoders and autoencoder of a pipeline directory, on the CPU; without ``text`` the autoencoder alone.

    Raises:
        ModelError: the directory is missing, incomplete or holds another pipeline.
    """
    check_directory(family, directory)
    absent: dict[str, Any] = {} if text else dict.fromkeys(family.text)
    with importing():
        kind, _ = transformer_of(family), pipeline_of(family)
    with _telling(directory):
        with torch.device("meta"):  # a pipeline may ask it for widths
            shell: Any = kind.from_config(kind.load_config(str(directory / "transformer"), local_files_only=True))
        pipeline = plain_pipeline(family, directory, dtype=dtype, transformer=shell, **absent)
    return Encoders(family, pipeline)


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
    """Return the pipeline of both halves, as it is saved."""
    network, encoders = policy.network, policy.encoders
    return pipeline_of(network.family)(**{**encoders.pipeline.components, "transformer": network.module})
