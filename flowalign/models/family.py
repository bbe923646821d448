"""The contract of a model family: what a kind of pipeline directory is, and how its halves are loaded."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from flowalign.flow.schedule import PipelineSchedule
from flowalign.models.base import ModelError
from flowalign.models.encoders import Encoders, TextPart
from flowalign.models.network import Network
from rewards.usercode.loading import load_module


class LoadNetwork(Protocol):
    def __call__(self, directory: Path, *, dtype: torch.dtype) -> Network: ...


class LoadEncoders(Protocol):
    def __call__(self, directory: Path, *, dtype: torch.dtype, text: bool = True) -> Encoders: ...


@dataclass(frozen=True)
class ModelFamily:
    """One family, the value ``FAMILY`` of its module. All functions raise ModelError where a directory does not fit.

    ``check`` looks at a directory's small files, in milliseconds. ``load_network`` reads the network and small files
    alone, ``load_encoders`` all else, without ``text`` the autoencoder alone; both put nothing on a device.
    ``latent_shape``, ``schedule`` and ``text_parts`` tell from small files what the loaded halves would.
    ``encoder_parts`` are the folders that decide what prompts and pictures are encoded to.
    """

    name: str
    check: Callable[[Path], None]
    load_network: LoadNetwork
    load_encoders: LoadEncoders
    latent_shape: Callable[[Path, int | None, int | None], tuple[int, int, int]]
    schedule: Callable[[Path, int | None, int | None], PipelineSchedule]
    text_parts: Callable[[Path], dict[str, TextPart]]
    encoder_parts: tuple[str, ...]
    lora_targets: tuple[str, ...] = ()


def known_families() -> list[str]:
    """Return the names of the families that ship with the package."""
    folder = Path(__file__).parent / "families"
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def family_of(name: str) -> ModelFamily:
    """Return the ``FAMILY`` of ``flowalign/models/families/<name>``, or of the module that a dotted path names.

    Raises:
        ModelError: there is no such module, it does not import, or holds no ``FAMILY``.
    """
    module_name = name if "." in name else f"flowalign.models.families.{name}"
    try:
        module = load_module(module_name) if "." in name else importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything
        raise ModelError(f"model.type: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    found = getattr(module, "FAMILY", None)
    if not isinstance(found, ModelFamily):
        raise ModelError(f"model.type: {module_name} holds no FAMILY, a flowalign.models.family.ModelFamily")
    return found
