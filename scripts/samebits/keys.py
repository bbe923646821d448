"""Cases by the keys of a run that an algorithm's own case leaves alone: how prompts are drawn, how a rank computes, and
what it holds. `tests/scripts/test_same_bits.py` names the keys that no case sets, each with its reason."""

from __future__ import annotations

from typing import Any

from samebits.alignments import (
    DPO,
    EVALUATED,
    FIXED,
    FORWARD,
    GRPO,
    LORA,
    OFFLINE,
    RAY,
    TASKS,
    align,
    alignment,
)
from samebits.case import SAMPLE, Case, Content, Line, merged
from samebits.trainings import BANK, EXPORT, LENGTH, OF_MODEL, RF, pretrain

# Two images of a group score alike half of the time; a part does not apply to some images.
EVEN = """
import numpy as np
def even(images, prompts, metadata):
    return 1.0 - images.reshape(len(images), -1).astype(int).sum(1) % 2
def parts(images, prompts, metadata):
    bright = images.reshape(len(images), -1).mean(1) / 255.0
    other = [row.get("tag") == "position" for row in metadata]
    return {"parts": bright, "red": np.where(other, np.nan, images[..., 0].mean((1, 2)) / 255.0)}
"""

TABLE = """caption,theme,score
a photo of a red circle,one,7
a photo of a blue square,two,8
,two,9
a photo of a red circle,one,7
a photo of a green star,two,9
a photo of a white cross,one,2
"""

PAIRED: Content = {**GRPO, **FIXED, "group_size": 2, "beta": 0.02}

Change = tuple[Content, Content]


def drawn() -> dict[str, Case]:
    """How prompts, sizes and rewards of an iteration come about."""
    even = {"spec": "even.py:even"}
    source = {"source": "table.csv", "columns": {"prompt": "caption", "task": "theme"}}
    rows = {**source, "where": {"score": {"min": 5}}, "drop": ["empty", "duplicates"], "shuffle": 3}
    clauses = {"spec": "geneval", "name": "judge", "weight": 0, "options": {"clauses": True, "detector": "palette"},
               "parts": {"geneval_objects": 1.0, "geneval_counts": 1.0, "geneval_colors": 2.0}}  # fmt: skip
    curriculum = {"score": "total", "threshold": 1.0, "floor": 0.2}
    many: dict[str, Change] = {
        "refill": (PAIRED, {"data": {"groups_per_iteration": 4, "refill": 2}, "rewards": [even], "seed": 5}),
        "curriculum": (PAIRED, merged(TASKS, {"data": {"curriculum": curriculum}, "rewards": [even]})),
        "curriculum, refill": (
            PAIRED, {"data": {"groups_per_iteration": 4, "curriculum": curriculum, "refill": 1}, "rewards": [even]},
        ),
        "sizes": (PAIRED, {"data": {"groups_per_iteration": 4, "sizes": ["64x64", "64x96"]}}),
        "height and width": (PAIRED, {"model": {"height": 96, "width": 64}}),
        "prompts of a table": (
            PAIRED,
            {"data": {"prompts": {**rows, "skip": 1}, "groups_per_iteration": 2},
             "evaluation": {"every": 3, "prompts": {**rows, "limit": 1}, "num_samples": 2, "num_steps": 2, "seed": 9,
                            "solver": "ab2", "grid": "paper", "scorer": {**even, "tasks": ["one"]},
                            "gold": [{"spec": "jpeg", "name": "size"}]}},
        ),
        "parts": (
            {**PAIRED, "normalize": "per_reward"},
            {"rewards": [{"spec": "even.py:parts", "parts": {"red": 0.5}}, {"spec": "jpeg", "gold": True}]},
        ),
        "clauses": ({**PAIRED, "normalize": "per_reward"}, {"rewards": [clauses]}),
        "safety": (
            PAIRED,
            {"safety": {"clip": "shapes:open_clip", "clip_images": 4, "window": 3, "min_diversity": 0.9,
                        "max_saturation_shift": 0.01, "max_reward_drop": 0.1, "max_invalid": 0.0,
                        "standard_errors": 1.0, "patience": 1, "stop": False}},
        ),
    }  # fmt: skip
    files = {"even.py": EVEN, "table.csv": TABLE}
    return {
        name: Case((("align", "config.yaml"),), {"config.yaml": alignment(own, **more), **files})
        for name, (own, more) in many.items()
    }


def computed() -> dict[str, Case]:
    """How a rank walks, learns and holds what it learns."""
    plain = {**GRPO, **FIXED, "beta": 0.02}
    led = {"guidance_scale": 2.5, "guidance_norm_cap": 1.1, "guidance_until": 0.6}
    many: dict[str, Change] = {
        "negative prompt": (
            {**plain, **led},
            merged(EVALUATED, {"model": {"negative_prompt": "a green star"},
                               "evaluation": {"guidance_norm_cap": 1.1, "guidance_until": 0.6}}),
        ),
        "embeddings": (
            plain, {"rollout": {"text_encoders": "drop", "embeddings": "embeddings", "decode_batch_size": 3}},
        ),
        "math attention": (plain, {"model": {"attention": "math"}}),
        "compiled": ({**GRPO, **FIXED}, {"learner": {"compile": True}}),
        "checkpointing, blocks": (plain, {"learner": {"activation_checkpointing": "blocks"}}),
        "checkpointing, selective, lora": (plain, merged(LORA, {"learner": {"activation_checkpointing": "selective"}})),
        "offload": (plain, {"learner": {"offload": "disk", "offload_dir": "offloaded", "ema_decay": 0.9}}),
        "averages": (
            PAIRED,
            {"learner": {"ema_decay": [0.5, 0.9], "ema_every": 2, "ema_warmup": True, "updates_per_iteration": 2,
                         "optimizer": {"decay": "cosine", "decay_steps": 4, "final_learning_rate": 1e-4, "eps": 1e-6}},
             "evaluation": {"every": 3, "num_samples": 2, "num_steps": 2, "scorer": {"spec": "jpeg"}},
             "checkpoint": {"best_metric": "eval/jpeg/overall", "keep_best": 1}},
        ),
        "lora, 8 bits": (
            plain, {"model": {"base_dtype": "int8", "lora": {"rank": 4, "targets": ["attn.to_q", "ff.net.2"]}}},
        ),
        "fresh mmdit": (
            plain, {"model": {"transformer": {"num_layers": 2, "num_heads": 1, "qk_norm": False, "seed": 4}}},
        ),
        "sliding back": (
            {**GRPO, "advantage_clip": 1.0,
             "window": {"kind": "sliding", "size": 1, "every": 1, "stride": 2, "stop": 3, "wrap": True}}, {},
        ),
        "nft, ab2": (
            {"type": "nft", **FORWARD, "solver": "ab2", "beta": 0.5, "density": "grid", "std": "group"},
            {"learner": {"ema_decay": 0.9}},
        ),
        "sft, density": (
            {"type": "sft", **FORWARD, "best_of_group": 2, "solver": "dpmpp_2m", "density": "logit_normal",
             "density_params": {"m": 0.5}, "shift": 2.0}, {},
        ),
        "sft rwr, temperature": ({"type": "sft", **FORWARD, "select": "rwr", "temperature": 0.05}, {}),
        "awm ghuber, power": (
            {"type": "awm", **FORWARD, "clip_range": None, "weighting": "ghuber", "ghuber_power": 0.5}, {},
        ),
        "dpo offline, offload": ({**DPO, "source": "offline"}, merged(OFFLINE, {"learner": {"offload": "disk"}})),
    }  # fmt: skip
    cases = {name: align(alignment(own, **more)) for name, (own, more) in many.items()}
    fsdp = {"engine": "fsdp", "ranks": 2, "ema_decay": 0.9}
    cases["ray, two ranks, fsdp"] = align(alignment(plain, **merged(RAY, {"learner": fsdp})), lane="ray")
    return cases | {"lora from an adapter": _continued()}


def _continued() -> Case:
    """An alignment's LoRA, exported, that another one begins from."""
    first = alignment({**GRPO, **FIXED}, **LORA, name="first")
    own = alignment({**GRPO, **FIXED, "beta": 0.02}, model={"lora": {"path": "adapter"}})
    lines: tuple[Line, ...] = (
        ("align", "first.yaml"),
        ("export", "first", "--as", "lora", "--to", "adapter"),
        ("align", "config.yaml"),
        ("sample", "run", *SAMPLE, "--out", "sampled"),
    )
    return Case(lines, {"first.yaml": first, "config.yaml": own})


def trained() -> dict[str, Case]:
    """Trainings on latents by the keys that they share with alignments."""
    optimizer = {"learning_rate": 2e-3, "decay": "cosine", "decay_steps": 4, "final_learning_rate": 1e-4,
                 "warmup_steps": 1, "eps": 1e-6, "betas": [0.8, 0.95], "weight_decay": 0.1,
                 "max_grad_norm": 0.5}  # fmt: skip

    def rectified(algorithm: Content = RF, **changes: Any) -> Content:
        own: Content = {
            "name": "run",
            "runs_dir": ".",
            "seed": 3,
            "model": LENGTH,
            "latents": BANK,
            "algorithm": algorithm,
            "iterations": 4,
            "learner": {"batch_size": 8, "optimizer": optimizer, "ema_decay": 0.9, "dtype": "float32"},
            "cluster": {"threads": 1},
            "logging": {"every": 1},
            "checkpoint": {"every": 2},
        }
        return merged(own, changes)

    jpeg = {"every": 2, "num_samples": 2, "num_steps": 2, "scorer": {"spec": "jpeg"}, "weights": "ema"}
    return {
        "rectified_flow, cosine": pretrain(
            rectified(validation={"latents": BANK, "every": 2, "num_samples": 6, "num_times": 3, "seed": 7}),
            OF_MODEL,
            EXPORT,
        ),
        "rectified_flow, evaluated": pretrain(
            rectified({**RF, "condition_dropout": 0.5}, evaluation=jpeg, learner={"ema_warmup": True})
        ),
        "rectified_flow, lora": pretrain(rectified(model={"lora": {"rank": 4, "alpha": 6}})),
        "rectified_flow, offload": pretrain(rectified(learner={"offload": "disk"})),
        "rectified_flow, checkpointing": pretrain(rectified(learner={"activation_checkpointing": "selective"})),
        "rectified_flow, compiled": pretrain(rectified(learner={"compile": True})),
        "meanflow, power": pretrain(
            rectified({"type": "meanflow", "adaptive_power": 0.5, "c": 0.01}, model={"inputs": ["r"]})
        ),
        "family v/cos, ddpm": pretrain(
            rectified(
                {**RF, "family": "v/cos", "density": "uniform"},
                model={"family": "v/cos"},
                evaluation={**jpeg, "solver": "ddpm", "eta": 0.5},
            )
        ),
    }
