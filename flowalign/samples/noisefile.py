"""The file of noise that images begin with, such as a diffusers script has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowalign.config.section import ConfigError
from flowalign.models.directory import Directory
from flowalign.models.packing import unpacked
from rewards.errors import one_line


def read_noise(path: Path, count: int, size: tuple[int | None, int | None], directory: Directory) -> Tensor:
    """Return the noise that ``count`` images of ``size`` (height, width) in pixels begin with, float32 (N, C, h, w).

    The file is of ``flowalign sample --save-latents``, another .safetensors with a ``noise`` or with one tensor alone,
    or a .npy. Of a family whose pipeline takes latents as rows of tokens it may hold those, (N, tokens, features).

    Raises:
        ConfigError: it cannot be read, or is of other images.
    """
    try:
        noise = _tensor_of(path)
    except (OSError, ValueError, SafetensorError) as error:
        wanted = "write one with safetensors.torch.save_file, or a .npy"
        raise ConfigError("--latents", f"{path} cannot be read ({one_line(error)}); {wanted}") from error
    shape, patch = (count, *directory.latent_shape(*size)), directory.geometry.patch
    tokens = (count, shape[2] * shape[3] // patch**2, shape[1] * patch**2)
    if directory.family.packed and tuple(noise.shape) == tokens:
        noise = unpacked(noise, torch.empty(shape, device="meta"), patch)
    if tuple(noise.shape) != shape:
        found, wanted = (", ".join(map(str, of)) for of in (noise.shape, shape))
        packs = f", or packed ({', '.join(map(str, tokens))})" if directory.family.packed else ""
        reason = f"{path} is of shape ({found}), and the noise of these images of ({wanted}){packs}"
        raise ConfigError("--latents", reason + _instead(noise.shape, shape, directory.geometry.factor))
    return noise.float().contiguous()


def _instead(found: Sequence[int], wanted: Sequence[int], factor: int) -> str:
    """Say how many images of which size the noise is of, where that is all that differs."""
    if len(found) != 4 or found[1] != wanted[1]:
        return ""
    number = "" if found[0] == wanted[0] else f"{found[0]} image{'s' * (found[0] != 1)}"
    size = "" if tuple(found[2:]) == tuple(wanted[2:]) else f"--size {found[2] * factor}x{found[3] * factor}"
    return f"; it is of {' and of '.join(part for part in (number, size) if part)}"


def _tensor_of(path: Path) -> Tensor:
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False))
    found = load_file(path)
    if "noise" not in found and len(found) != 1:
        raise ValueError("it holds several tensors, and none of them is called noise")
    return found["noise"] if "noise" in found else next(iter(found.values()))
