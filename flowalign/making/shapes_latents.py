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


def caption(row: Metadata, rng: np.random.Generator, wrong_relations: float = WRONG_RELATIONS) -> str:
    """Return the caption of a row's picture: its prompt, or that of another relation of the same two objects.

    Only training prompts are captions. ``wrong_relations`` is the probability of another relation, in [0, 1].
    """
    if row["tag"] != "position" or rng.random() >= wrong_relations:
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
    encoders: Encoders,
    directory: Path,
    *,
    num_images: int = 120_000,
    batch: int = 250,
    seed: int = 0,
    duplicates: float = DUPLICATES,
    wrong_relations: float = WRONG_RELATIONS,
) -> None:
    """Render training prompts, encode them with the autoencoder (bf16 autocast), write the bank.

    What a base learns to do wrong is in [0, 1]: ``duplicates`` is the share of pictures with room in which one object
    stands there twice, ``wrong_relations`` the share of captions with a relation that name another one. Raise
    ValueError where one is outside, or without an image.
    """
    if num_images < 1 or not 0 <= duplicates <= 1 or not 0 <= wrong_relations <= 1:
        found = f"{num_images} images, duplicates {duplicates}, wrong relations {wrong_relations}"
        raise ValueError(f"got {found}; a bank has 1 image or more, and shares are in [0, 1]")
    rng = np.random.default_rng([seed, 2])
    rows: dict[str, int] = {}
    latents, index = [], []
    for begin in range(0, num_images, batch):
        chosen = [sample_prompt("train", rng, TASK_WEIGHTS) for _ in range(min(batch, num_images - begin))]
        images = np.stack([render(scene(row, rng, duplicates), rng) for row in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(encoders.encode_images(torch.from_numpy(images)).half())
        index += [rows.setdefault(caption(row, rng, wrong_relations), len(rows)) for row in chosen]
    save_bank(directory, LatentBank(torch.cat(latents), torch.tensor(index), list(rows)))


def main() -> None:
    """Run ``python -m flowalign.making.shapes_latents PIPELINE OUT``."""
    import argparse

    from flowalign.config.sections import ModelConfig
    from flowalign.models.build import load_encoders
    from flowalign.models.errors import ModelError

    parser = argparse.ArgumentParser(
        prog="python -m flowalign.making.shapes_latents",
        description="Render scenes of the embedded world and write them as a bank that `flowalign pretrain` reads.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("pipeline", help="whose autoencoder encodes them: a pipeline directory")
    parser.add_argument("out", type=Path, help="the bank's directory")
    parser.add_argument("--num-images", type=int, default=120_000, help="so many scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--duplicates", type=float, default=DUPLICATES, help="share with one object twice, untold")
    parser.add_argument("--wrong-relations", type=float, default=WRONG_RELATIONS, help="share of false relations")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        encoders = load_encoders(ModelConfig(path=arguments.pipeline), text=False)
        make_bank(
            encoders,
            arguments.out,
            num_images=arguments.num_images,
            seed=arguments.seed,
            duplicates=arguments.duplicates,
            wrong_relations=arguments.wrong_relations,
        )
    except (ModelError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
