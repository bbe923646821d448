"""A tiny, randomly initialised Mask2Former, saved as transformers saves it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from rewards.geneval.detectors.palette import SHAPES


def tiny_config(queries: int = 12) -> Mask2FormerConfig:
    backbone = SwinConfig(
        image_size=64, patch_size=4, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],  # type: ignore[call-arg]
    )  # fmt: skip
    return Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=3, num_attention_heads=2, dim_feedforward=32, num_queries=queries,
        id2label=dict(enumerate(SHAPES)),
    )  # fmt: skip


def save_tiny_mask2former(directory: Path) -> Path:
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(tiny_config()).save_pretrained(directory)
    Mask2FormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32, ignore_index=255, do_reduce_labels=False
    ).save_pretrained(directory)
    return directory
