"""A bank of precomputed latents and their prompts: safetensors plus a prompt list.

``<dir>/latents.safetensors`` holds ``latents`` float16 (M, C, H, W) and ``prompt`` int64 (M,);
``<dir>/prompts.json`` lists the distinct prompts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.algorithm import seeded


class LatentsError(ValueError):
    """A latent bank that is missing or inconsistent."""


@dataclass(frozen=True)
class LatentBank:
    """M clean latents, (M, C, H, W) float16, and for each the row of its prompt."""

    latents_MCHW: Tensor
    prompt_M: Tensor
    prompts: list[str]

    def __len__(self) -> int:
        return int(self.prompt_M.shape[0])

    def draw(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Latents float32 and prompt rows of a step: a function of seed and step alone."""
        index = torch.randint(len(self), (batch_size,), generator=seeded(seed, 2, step))
        return self.latents_MCHW[index].float(), self.prompt_M[index]


def save_bank(directory: Path, bank: LatentBank) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {"latents": bank.latents_MCHW.contiguous(), "prompt": bank.prompt_M}, str(directory / "latents.safetensors")
    )
    (directory / "prompts.json").write_text(json.dumps(bank.prompts) + "\n")


def load_bank(directory: Path) -> LatentBank:
    """Read a bank.

    Raises:
        LatentsError: files are missing or the prompts do not cover the latents.
    """
    weights, names = directory / "latents.safetensors", directory / "prompts.json"
    for path in (weights, names):
        if not path.is_file():
            raise LatentsError(f"latents: {path} is missing; make the bank first (scripts/build_shapes.sh latents)")
    tensors = load_file(str(weights))
    prompts = json.loads(names.read_text())
    if int(tensors["prompt"].max()) >= len(prompts):
        raise LatentsError(f"latents: {names} has {len(prompts)} prompts, {weights} refers to more")
    return LatentBank(tensors["latents"], tensors["prompt"], prompts)
