"""A tiny Mask2Former of the embedded world: the real detector's code on weights that fit into the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from flowalign.shapes.build.pickscore import degrade
from flowalign.shapes.build.progress import train
from flowalign.shapes.prompts import sample_prompt, scene
from flowalign.shapes.render import Thing, render_with_masks
from rewards.geneval.detectors.palette import COLORS, SHAPES

_MEAN, _STD = [0.5] * 3, [0.5] * 3
_CELLS = [(r, c) for r in range(2) for c in range(2)]


def new_detector() -> Mask2FormerForUniversalSegmentation:
    """Make a Swin backbone of patch 2 and four blocks, eight queries; about a million parameters."""
    backbone = SwinConfig(
        image_size=64,
        patch_size=2,
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=8,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],  # type: ignore[call-arg]
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,  # its group norms have 32 groups
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=128,
        encoder_layers=1,
        decoder_layers=4,
        num_attention_heads=4,
        dim_feedforward=128,
        num_queries=8,
        feature_strides=[2, 4, 8, 16],
        common_stride=2,
        train_num_points=512,
        id2label=dict(enumerate(SHAPES)),
    )
    return Mask2FormerForUniversalSegmentation(config)


def examples(step: int, batch: int, seed: int) -> tuple[np.ndarray, list[torch.Tensor], list[torch.Tensor]]:
    """Return images uint8 (batch, 64, 64, 3), their objects' masks (M, 64, 64) and class indices (M,).

    Half the scenes are prompts', half up to four objects at random, so that counts beyond any prompt occur; a quarter
    is made dirtier, as samples of an imperfect model are.
    """
    rng = np.random.default_rng([seed, 6, step])
    images, masks, classes = [], [], []
    for _ in range(batch):
        things = scene_for_training(rng)
        image, coverage = render_with_masks(things, rng)
        images.append(degrade(image, rng) if rng.random() < 0.25 else image)
        masks.append(torch.from_numpy((coverage >= 0.5).astype(np.float32)))
        classes.append(torch.tensor([SHAPES.index(thing.shape) for thing in things]))
    return np.stack(images), masks, classes


def scene_for_training(rng: np.random.Generator) -> list[Thing]:
    """Return a prompt's scene, or one to four objects at random."""
    if rng.random() >= 0.5:
        return scene(sample_prompt("train", rng), rng)
    cells = rng.permutation(4)[: int(rng.integers(1, 5))]
    colors = list(COLORS)
    return [
        Thing(SHAPES[int(rng.integers(len(SHAPES)))], colors[int(rng.integers(len(colors)))], _CELLS[int(c)])
        for c in cells
    ]


def train_detector(
    work_dir: Path, *, steps: int, batch: int = 16, seed: int = 0
) -> Mask2FormerForUniversalSegmentation:
    """Train by Mask2Former's loss: matched class, mask and dice terms after every decoder layer (arXiv:2112.01527)."""
    torch.manual_seed(seed)
    model = new_detector()

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        torch.manual_seed(seed * 1_000_003 + step)  # the loss samples points of the masks
        images, masks, classes = examples(step, batch, seed)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        output = model(pixel_values=pixels, mask_labels=masks, class_labels=classes)
        return output.loss.mean(), {}

    train("detector", model, loss_at, work_dir=work_dir, steps=steps, learning_rate=1e-3)
    return model


def save_detector(model: Mask2FormerForUniversalSegmentation, directory: Path) -> None:
    """Write a transformers directory with its image processor, weights in half precision."""
    model.half().save_pretrained(directory)
    model.float()
    processor = Mask2FormerImageProcessor(
        size={"height": 64, "width": 64}, size_divisor=0, image_mean=_MEAN, image_std=_STD, ignore_index=255
    )
    processor.save_pretrained(directory)
