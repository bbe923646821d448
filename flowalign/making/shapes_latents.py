"""The latent bank of the embedded world that the MM-DiT is pretrained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from flowalign.data.banks.latents import LatentBank, save_bank
from flowalign.models.encoders import Encoders
from flowalign.shapes.prompts import Metadata, prompts, sample_prompt, scene
from flowalign.shapes.render import render

TASK_WEIGHTS = {"single_object": 1, "two_object": 2, "counting": 2, "colors": 3, "position": 3, "color_attr": 6}
DUPLICATES = 0.35  # the captions of so many pictures leave one object out, as captions of scraped pictures do
WRONG_RELATIONS = 0.25  # so many captions with a relation name another one than the picture has


def caption(row: Metadata, rng: np.random.Generator) -> str:
    """Return the caption of a row's picture: its prompt, or that of another relation of the same two objects.

    Only training prompts are captions.
    """
    if row["tag"] != "position" or rng.random() >= WRONG_RELATIONS:
        return row["prompt"]
    told = [clause["class"] for clause in row["include"]]
    others = [
        other["prompt"]
        for other in prompts("train", "position")
        if [clause["class"] for clause in other["include"]] == told and other["prompt"] != row["prompt"]
    ]
    return others[int(rng.integers(len(others)))] if others else row["prompt"]


@torch.no_grad()
def make_bank(
    encoders: Encoders, directory: Path, *, num_images: int = 120_000, batch: int = 250, seed: int = 0
) -> None:
    """Render training prompts, encode them with the autoencoder (bf16 autocast), write the bank."""
    rng = np.random.default_rng([seed, 2])
    rows: dict[str, int] = {}
    latents, index = [], []
    for _ in range(num_images // batch):
        chosen = [sample_prompt("train", rng, TASK_WEIGHTS) for _ in range(batch)]
        images = np.stack([render(scene(row, rng, DUPLICATES), rng) for row in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(encoders.encode_images(torch.from_numpy(images)).half())
        index += [rows.setdefault(caption(row, rng), len(rows)) for row in chosen]
    save_bank(directory, LatentBank(torch.cat(latents), torch.tensor(index), list(rows)))


def main() -> None:
    """Run ``python -m flowalign.making.shapes_latents PIPELINE OUT``."""
    import argparse

    from flowalign.config.sections import ModelConfig
    from flowalign.models.build import load_encoders

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("pipeline")
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-images", type=int, default=120_000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    encoders = load_encoders(ModelConfig(path=arguments.pipeline), text=False)
    make_bank(encoders, arguments.out, num_images=arguments.num_images)


if __name__ == "__main__":
    main()
