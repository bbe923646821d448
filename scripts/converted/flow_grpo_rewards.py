"""The rewards of Flow-GRPO (its rewards.py) as scorers of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converted.flow_grpo_keys import ConvertError, Theirs
from converted.written import Line

MASK2FORMER = {"type": "mask2former", "path": "mask2former"}
COLOURS = {"model": "ViT-L-14-quickgelu", "checkpoint": "openai"}
PICKSCORE = {"path": "./PickScore_v1", "processor": "./CLIP-ViT-H-14"}


def rewards_of(theirs: Theirs) -> list[Line]:
    found = [reward_of(name, weight) for name, weight in theirs.need("reward_fn").items()]
    known, lost = [reward for reward, _ in found if reward], [why for reward, why in found if not reward]
    if not known:
        raise ConvertError("; ".join(lost))
    why = ". ".join([*(why for reward, why in found if reward and why), *(f"Left out: {why}" for why in lost)])
    return [Line("rewards", known, why)]


def reward_of(name: str, weight: float) -> tuple[dict[str, Any] | None, str]:
    """Return one of their rewards as ours, and what to know of it; None where there is no scorer for it."""
    if name == "geneval":
        detector = {**MASK2FORMER, "clip": COLOURS}
        return _reward("geneval", weight, {"mode": "partial", "detector": detector}), ""
    if name == "pickscore":
        return _reward("pickscore", weight, {**PICKSCORE, "scale": "/26"}), "PickScore: theirs too divides by 26"
    if name == "ocr":
        return _reward("ocr", weight), "ocr: read by RapidOCR, theirs by PaddleOCR"
    if name == "clipscore":
        why = "clip: a cosine; theirs is 100/30 of it, which the weight makes up for"
        return _reward("clip", weight * 100 / 30, COLOURS), why
    if name == "aesthetic":
        return _reward("aesthetic", weight, {"head": "aesthetic.safetensors", **COLOURS}), ""
    if name == "jpeg_compressibility":
        return _reward("jpeg", weight / 500), "jpeg: in kB; theirs divides by 500"
    return None, f"the reward {name} has no scorer of that name: a file of your own or a server, see docs/rewards.md"


def _reward(spec: str, weight: float, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    own = {} if weight == 1 else {"weight": float(f"{weight:.6g}")}
    return {"spec": spec, **own, **({"options": dict(options)} if options else {})}
