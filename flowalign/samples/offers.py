"""Offers of our ways to ask a scorer, beside images, prompts and metadata."""

from __future__ import annotations

from rewards.interface import Offers

_ELSEWHERE = "name it under `rewards` of a run, or take one without that need"
TRAINING = Offers("a run", frozenset({"group", "latents"}))
EVALUATION = Offers("an evaluation", frozenset({"latents"}), _ELSEWHERE)
PREFERENCES = Offers("make-preferences", frozenset({"group"}), _ELSEWHERE)
TRY_REWARD = Offers("try-reward", frozenset(), _ELSEWHERE)
