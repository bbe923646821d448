"""Looks for the training image that is nearest to each generated one, in a folder or in a bank of latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.data.banks.latents import LatentsError, load_bank
from flowalign.data.images import ORIGINAL
from flowalign.measure.features import BATCH
from flowalign.measure.imagefolder import image_files, pixels
from flowalign.measure.imageset import Pictures, folder_of
from flowalign.measure.memorised import nearest
from flowalign.models.build import load_encoders
from flowalign.models.errors import ModelError
from flowalign.models.fingerprint import encoder_hash
from flowalign.record.disk import draft_of, folder_for

if TYPE_CHECKING:
    from rewards.interface import Images

KEY = "--memorised"
SHOWN, SIDE, EDGE = 12, 128, 2  # pairs on a sheet, pixels of an image's longer side there and between the two
BANK_FILES = ("manifest.json", "latents.safetensors")


@dataclass(frozen=True)
class Training:
    """What a model has learned from: pictures by place, each of them alone, and its caption where it has one."""

    pictures: Pictures
    one: Callable[[int], Images]
    caption: Callable[[int], str | None]


def training_of(source: Path, model: Path | None) -> Training:
    """Open training images: a folder of files, or a bank of latents, which the autoencoder of ``model`` decodes.

    Raises:
        ConfigError: there is no such folder, no image in it can be read, a bank is damaged, was encoded by another
            model, or no model is given for it.
    """
    if not any((source / name).is_file() for name in BANK_FILES):
        files = image_files(source, KEY)
        return Training(folder_of(files, KEY), lambda place: pixels(files[place]), lambda place: None)
    if model is None:
        raise ConfigError("--model", f"is missing, and {source} holds latents; name the model that encoded them")
    try:
        bank = load_bank(source, verify=False)
        config = ModelConfig(path=str(model))
        if bank.encoder is not None and bank.encoder != encoder_hash(config):
            raise ConfigError("--model", f"{model} is not what encoded {source}; name the model that did")
        encoders = load_encoders(config, text=False)
    except (LatentsError, ModelError) as error:
        raise ConfigError(KEY, str(error)) from error
    places = [(shard, row) for shard in bank.shards for row in range(len(shard))]

    def decoded(begin: int, end: int) -> Images:
        rows = [shard.latents[row].float() for shard, row in places[begin:end]]
        return encoders.decode(torch.stack(rows)).numpy()

    def batches() -> Iterator[tuple[list[int], Images]]:
        begin = 0
        while begin < len(places):
            end = begin + 1
            while end < min(begin + BATCH, len(places)) and places[end][0] is places[begin][0]:
                end += 1
            yield list(range(begin, end)), decoded(begin, end)
            begin = end

    def caption(place: int) -> str | None:
        shard, row = places[place]
        return bank.prompts[int(shard.rows[ORIGINAL][row])] if ORIGINAL in shard.rows else None

    names = [f"latent {place}" for place in range(len(places))]
    return Training(Pictures(str(source), names, batches), lambda place: decoded(place, place + 1)[0], caption)


def found_of(
    generated: Pictures, training: Training, features: tuple[np.ndarray, np.ndarray]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the nearest training images by the ``features`` of both sets, a row an image, the most similar first, and
    the numbers: the mean and the largest cosine, and the share of authentic images."""
    near = nearest(*features)
    own, theirs = generated.kept, training.pictures.kept
    rows = []
    for i in np.argsort(-near.cosine_N, kind="stable").tolist():
        place = theirs[int(near.place_N[i])]
        row = {
            "file": generated.names[own[i]],
            "nearest": training.pictures.names[place],
            "cosine": float(near.cosine_N[i]),
            "authentic": bool(near.authentic_N[i]),
        }
        caption = training.caption(place)
        rows.append(row if caption is None else {**row, "caption": caption})
    values = {"nearest_mean": float(near.cosine_N.mean()), "nearest_max": float(near.cosine_N.max())}
    return rows, {**values, "authentic": float(near.authentic_N.mean())}


def write_sheet(path: Path, folder: Path, training: Training, rows: list[dict[str, Any]]) -> None:
    """Write the most similar pairs as one PNG: generated images on the left, the training image of each on the right.

    Raises:
        DiskError: it cannot be written.
    """
    from PIL import Image, ImageOps

    places = {name: place for place, name in enumerate(training.pictures.names)}
    shown = rows[:SHOWN]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    gap = SIDE // 8
    width, height = 2 * SIDE + EDGE + gap, SIDE + gap
    sheet = Image.new("RGB", (columns * width - gap, lines * height - gap), "white")
    for number, row in enumerate(shown):
        left, top = number % columns * width, number // columns * height
        pair = (pixels(folder / row["file"]), training.one(places[row["nearest"]]))
        for place, picture in enumerate(pair):
            small = ImageOps.contain(Image.fromarray(picture), (SIDE, SIDE))
            sheet.paste(small, (left + place * (SIDE + EDGE), top))
    with folder_for(path.parent), draft_of(path) as draft:
        sheet.save(draft, format="PNG")
