"""The rewards of a run as one function of pixels, with a gradient: what a learner that walks by itself asks.

Shapes: N samples, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowalign.config.sections import RewardConfig
from flowalign.samples.offers import LEARNER
from flowalign.samples.scoring import load_scorers
from flowalign.types import PromptBatch
from rewards.interface import Asked, InvalidScores, Scorer, ask, blamed, check_inputs, main_key, needs_of


class PixelRewards:
    """The weighted total of the rewards that are trained on; what they hold of networks learns nothing here.

    Raises:
        ScorerError: a reward cannot be had, or needs what no learner offers.
    """

    def __init__(self, configs: Sequence[RewardConfig], base_dir: Path, device: str) -> None:
        self._scorers = [own for own in load_scorers(configs, base_dir, device, offers=LEARNER) if own.weight]
        for own in self._scorers:
            for value in getattr(own.scorer, "__dict__", {}).values():
                if isinstance(value, nn.Module):
                    value.requires_grad_(False).eval()

    def __call__(self, pixels_NCHW: Tensor, batch: PromptBatch) -> Tensor:
        """Return the totals (N,) of pixels (N, 3, H, W) in [0, 1], differentiable in them.

        Raises:
            InvalidScores: a reward answers no tensor (N,), or one without a gradient.
        """
        images = pixels_NCHW.detach().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
        asked = Asked(images.contiguous().numpy(), list(batch.prompts), [], pixels=pixels_NCHW)
        total = pixels_NCHW.new_zeros(len(batch))
        for own in self._scorers:
            asked = replace(asked, metadata=[dict(row) for row in batch.metadata])
            with own.apart:
                total = total + own.weight * differentiable_score(own.name, own.scorer, asked)
        return total


def differentiable_score(name: str, scorer: Scorer, asked: Asked) -> Tensor:
    """Return the score of the reward ``name``, a tensor (N,) that is differentiable by ``asked.pixels``.

    Raises:
        ScorerFailed: the scorer raises. InvalidScores: it answers no such tensor, or one without the gradient that the
            pixels ask for.
    """
    check_inputs(asked)
    with blamed(name):
        scores = ask(scorer, asked.only(name, needs_of(name, scorer)))
    if not isinstance(scores, Mapping) or not scores:
        raise InvalidScores(f"reward {name!r} returned {type(scores).__name__}; return a dict of one tensor a reward")
    score = scores[main_key(name, getattr(scorer, "name", None), list(scores))]
    shape = tuple(getattr(score, "shape", ()))
    if not hasattr(score, "requires_grad") or shape != (len(asked),):
        got = f"{type(score).__name__} of shape {shape}"
        raise InvalidScores(f"reward {name!r} returned a {got}; return a torch tensor of shape ({len(asked)},)")
    if asked.pixels.requires_grad and not score.requires_grad:
        raise InvalidScores(
            f"reward {name!r} gives no gradient by asked.pixels; compute it by torch from these alone, without numpy, "
            "rounding, detach and no_grad"
        )
    return score
