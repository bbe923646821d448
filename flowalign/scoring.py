"""Images to Scores: several scorers, masked failures, one weighted total.

Shapes: N samples, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowalign.config import RewardConfig
from flowalign.types import Scores
from rewards.composite import combine
from rewards.interface import Checked, InvalidScores, Scorer, SpecError, score_batch, set_up
from rewards.resolve import resolve


class TooManyInvalid(RuntimeError):
    """Fewer samples than ``min_valid_fraction`` got a usable score; nothing was updated."""


@dataclass(frozen=True)
class NamedScorer:
    """A scorer, the name its score goes by, and its weight in the total."""

    name: str
    weight: float
    scorer: Scorer


def load_scorer(config: RewardConfig, base_dir: Path, device: str = "cpu") -> NamedScorer:
    """Resolve and set up one configured reward."""
    scorer = resolve({"type": config.spec, **config.options}, base_dir)
    set_up(scorer, device)
    return NamedScorer(config.label, config.weight, scorer)


def load_scorers(configs: Sequence[RewardConfig], base_dir: Path, device: str = "cpu") -> list[NamedScorer]:
    """Every configured reward; raises SpecError where two go by one name, of which one would be lost."""
    names = [config.label for config in configs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"rewards: two rewards go by the name {twice!r}; give each its own `name`")
    return [load_scorer(config, base_dir, device) for config in configs]


def score_images(
    named: NamedScorer, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Checked:
    """One scorer on uint8 images (N, H, W, 3); its main score is renamed to the configured name."""
    checked = score_batch(
        named.name, named.scorer, np.ascontiguousarray(images.numpy()), list(prompts), [dict(m) for m in metadata]
    )
    main = _main_key(named, list(checked.scores))
    rename = {key: named.name if key == main else key for key in checked.scores}
    return Checked(
        {rename[k]: v for k, v in checked.scores.items()},
        {rename[k]: v for k, v in checked.valid.items()},
        {rename[k]: v for k, v in checked.causes.items()},
    )


def _main_key(named: NamedScorer, keys: list[str]) -> str:
    candidates = [named.name, getattr(named.scorer, "name", None)]
    found = next((key for key in candidates if key in keys), keys[0] if len(keys) == 1 else None)
    if found is None:
        raise InvalidScores(
            f"reward {named.name!r} returned {', '.join(keys)}; the weighted one must be called {named.name!r}"
        )
    return found


def merge(parts: Sequence[Checked], weights: Mapping[str, float]) -> Scores:
    """Scores of one batch from its scorers: a sample is valid where every weighted reward is."""
    scores = {k: v for part in parts for k, v in part.scores.items()}
    valid = {k: v for part in parts for k, v in part.valid.items()}
    total, every = combine(scores, weights, valid)
    causes = {f"{name}/{cause}": n for part in parts for name, c in part.causes.items() for cause, n in c.items()}
    return Scores(
        by_reward={k: torch.from_numpy(v).float() for k, v in scores.items()},
        total=torch.from_numpy(total).float(),
        valid=torch.from_numpy(every),
        causes=causes,
    )


def cat_scores(parts: Sequence[Scores]) -> Scores:
    """Join the scores of consecutive chunks."""
    causes: dict[str, int] = {}
    for part in parts:
        for cause, count in part.causes.items():
            causes[cause] = causes.get(cause, 0) + count
    return Scores(
        by_reward={k: torch.cat([p.by_reward[k] for p in parts]) for k in parts[0].by_reward},
        total=torch.cat([p.total for p in parts]),
        valid=torch.cat([p.valid for p in parts]),
        causes=causes,
    )


def require_valid(scores: Scores, fraction: float) -> None:
    """Raise TooManyInvalid below ``fraction`` of valid samples, naming the causes."""
    share = scores.valid.float().mean().item()
    if share < fraction:
        why = ", ".join(f"{cause}: {count}" for cause, count in sorted(scores.causes.items())) or "no cause recorded"
        raise TooManyInvalid(
            f"only {share:.0%} of {len(scores.valid)} samples have a usable reward, "
            f"min_valid_fraction is {fraction:.0%} ({why}); nothing was updated"
        )


def reward_metrics(scores: Scores) -> dict[str, float]:
    """``reward/<name>/mean`` over valid samples, the total, and the counts of masked ones."""
    metrics = {}
    for name, values in {**scores.by_reward, "total": scores.total}.items():
        usable = values[torch.isfinite(values)]
        metrics[f"reward/{name}/mean"] = float(usable.double().mean()) if usable.numel() else float("nan")
    metrics["reward/invalid_fraction"] = 1 - scores.valid.double().mean().item()
    metrics |= {f"reward/invalid/{cause}": float(count) for cause, count in scores.causes.items()}
    return metrics
