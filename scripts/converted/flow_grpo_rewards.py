"""The rewards of Flow-GRPO (its rewards.py) as scorers of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converted.flow_grpo_keys import ConvertError, Theirs
from converted.written import Line

COLOURS = {"model": "ViT-L-14-quickgelu", "checkpoint": "openai"}
# Their name: ours, what their number is of ours, the options, and what to know.
KNOWN: dict[str, tuple[str, float, dict[str, Any], str]] = {
    "geneval": (
        "geneval",
        1.0,
        {"mode": "partial", "detector": {"type": "mask2former", "path": "mask2former", "clip": COLOURS}},
        "",
    ),
    "pickscore": (
        "pickscore",
        1.0,
        {"path": "./PickScore_v1", "processor": "./CLIP-ViT-H-14", "scale": "/26"},
        "PickScore: theirs too divides by 26",
    ),
    "ocr": ("ocr", 1.0, {}, "ocr: read by RapidOCR, theirs by PaddleOCR"),
    "clipscore": ("clip", 100 / 30, COLOURS, "clip: a cosine; theirs is 100/30 of it, which the weight makes up for"),
    "aesthetic": ("aesthetic", 1.0, {"head": "aesthetic.safetensors", **COLOURS}, ""),
    "imagereward": ("imagereward", 1.0, {"path": "ImageReward"}, ""),
    "hpsv2_score": ("hps", 1.0, {"checkpoint": "HPS_v2.1_compressed.pt"}, "hps: the cosine of v2.1, as theirs"),
    "image_similarity": (
        "image_similarity",
        1.0,
        {"path": "clip-vit-large-patch14"},
        "image_similarity: each row of the prompts names its reference in `image`",
    ),
    "jpeg_compressibility": ("jpeg", 1 / 500, {}, "jpeg: in kB; theirs divides by 500"),
}
HPSV3 = (
    "hpsv3",
    1.0,
    {"path": "HPSv3", "dtype": "bfloat16"},
    "hpsv3: the mean as the model gives it; their repository has no such function, and a copy's may divide it",
)
KNOWN |= dict.fromkeys(("hpsv3", "hpsv3_score"), HPSV3)
JUDGED = "`vlm_judge` asks such a model, with a question of yours"
UNKNOWN = {
    "unifiedreward": JUDGED,
    "qwenvl": JUDGED,
    "seedscore": JUDGED,
    "deqa": "`clip_iqa` judges quality without a prompt too",
    "video_ocr": "it reads videos",
}


def rewards_of(theirs: Theirs) -> list[Line]:
    """Return the line of the rewards, and tell ``theirs`` of those that are left out; ConvertError without any."""
    found = theirs.need("reward_fn")
    lost = [_lost(name, weight) for name, weight in found.items() if name not in KNOWN]
    if len(lost) == len(found):
        raise ConvertError("; ".join(lost) or "reward_fn names no reward")
    for why in lost:
        theirs.lose(why)
    known = [name for name in found if name in KNOWN]
    why = [*(KNOWN[name][3] for name in known if KNOWN[name][3]), *(f"Left out: {why}" for why in lost)]
    return [Line("rewards", [reward_of(name, found[name]) for name in known], ". ".join(why))]


def _lost(name: str, weight: float) -> str:
    instead = UNKNOWN.get(name, "docs/rewards.md has how a function of your own is one")
    return f"the reward {name}, of weight {weight:g}, has no scorer here; {instead}"


def reward_of(name: str, weight: float) -> dict[str, Any]:
    """Return one of `KNOWN` as a reward of ours."""
    spec, scale, options, _ = KNOWN[name]
    own = {} if weight * scale == 1 else {"weight": float(f"{weight * scale:.6g}")}
    return {"spec": spec, **own, **({"options": _copied(options)} if options else {})}


def judges_of(theirs: Theirs) -> list[dict[str, Any]]:
    """Return what evaluates: every known reward of theirs, without a weight, and GenEval by its official verdict."""
    judges = [reward_of(name, 1 / KNOWN[name][1]) for name in theirs("reward_fn") if name in KNOWN]
    for judge in judges:
        if judge["spec"] == "geneval":
            judge["options"]["mode"] = "official"
    return judges


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in options.items()}
