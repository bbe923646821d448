"""The tiny colour classifier of the embedded world: its open_clip model, tuned on objects that are cut out.

GenEval names an object's colour by CLIP on a crop with a grey ground, which the model has not seen in whole pictures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from flowalign.shapes.build.detector import scene_for_training
from flowalign.shapes.build.pickscore import degrade
from flowalign.shapes.build.progress import train
from flowalign.shapes.build.text import tokenize
from flowalign.shapes.render import Thing, render_with_masks
from rewards.geneval.colors import TEMPLATES, crop
from rewards.geneval.detectors.palette import COLORS, SHAPES
from rewards.models.openclip import OpenClip

_PHRASES = [(color, shape) for shape in SHAPES for color in COLORS]


def objects(step: int, batch: int, seed: int) -> tuple[list[np.ndarray], list[Thing]]:
    """Cut out objects, uint8 (h, w, 3) each, and say what they are.

    A quarter is of dirtied images, masks a little off.
    """
    rng = np.random.default_rng([seed, 8, step])
    crops: list[np.ndarray] = []
    things: list[Thing] = []
    while len(crops) < batch:
        scene = scene_for_training(rng)
        image, coverage = render_with_masks(scene, rng)
        image = degrade(image, rng) if rng.random() < 0.25 else image
        for thing, covered in zip(scene, coverage, strict=True):
            mask = covered > rng.uniform(0, 0.95)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            crops.append(crop(image, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), mask))
            things.append(thing)
    return crops[:batch], things[:batch]


def train_colors(
    work_dir: Path, open_clip: Path, tokenizer: CLIPTokenizer, *, steps: int, batch: int = 64, seed: int = 0
) -> nn.Module:
    """Train by cross-entropy of each object over its shape's phrases, one a colour, in one GenEval template a step."""
    torch.manual_seed(seed)
    clip = OpenClip("colors", path=str(open_clip))
    clip.setup("cpu")
    model: nn.Module = clip.loaded

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        crops, things = objects(step, batch, seed)
        template = TEMPLATES[step % len(TEMPLATES)]
        ids = tokenize(tokenizer, [template.format(color=color, thing=shape) for color, shape in _PHRASES])
        image = model.encode_image(torch.cat([clip.pixels(one[None]) for one in crops]), normalize=True)  # type: ignore[operator]
        text = model.encode_text(ids, normalize=True)  # type: ignore[operator]
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T  # type: ignore[operator]
        by_color = logits.view(len(crops), len(SHAPES), len(COLORS))
        own = by_color[torch.arange(len(crops)), torch.tensor([SHAPES.index(thing.shape) for thing in things])]
        wanted = torch.tensor([list(COLORS).index(thing.color) for thing in things])
        return F.cross_entropy(own, wanted), {"right": round((own.argmax(1) == wanted).float().mean().item(), 3)}

    train("colors", model, loss_at, work_dir=work_dir, steps=steps, learning_rate=3e-4, save_every=100)
    return model
