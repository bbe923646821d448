"""Alignments of every algorithm, their engines and clusters, and what commands make of them."""

from __future__ import annotations

from typing import Any

from samebits.case import SAMPLE, Case, Content, Line, merged

MODEL = {"path": "{inputs}/model", "max_sequence_length": 16}

BRIGHT = {"spec": "{inputs}/bright.py:reward"}

RED = {"spec": "{inputs}/bright.py:red"}

GRPO: Content = {"type": "flow_grpo", "group_size": 3, "num_steps": 4, "clip_range": 1e-2}

FIXED = {"window": {"kind": "fixed", "start": 1, "size": 2}}

FORWARD: Content = {"group_size": 3, "num_steps": 3, "timesteps": 2}

DPO: Content = {"type": "diffusion_dpo", "beta": 500}

OFFLINE: Content = {
    "rewards": [],
    "data": {
        "preferences": "{inputs}/pairs.parquet",
        "preferences_cache": "{side}/pairs_cache",
        "groups_per_iteration": 4,
    },
}

OPD: Content = {"type": "opd", "num_steps": 3, "group_size": 3}

TEACHERS = {
    "round": {"path": "{inputs}/teacher", "tasks": ["one"]},
    "other": {"path": "{inputs}/teacher2", "guidance_scale": 2.0, "norm_preserving": True},
}

TASKS: Content = {"data": {"prompts": "{inputs}/prompts.jsonl", "groups_per_iteration": 3}}

RAY: Content = {
    "cluster": {"backend": "ray", "threads": 1, "rollout_workers": 2, "rollout_cpus": 0.25, "reward_cpus": 0.25,
                "learner_cpus": 0.25, "teacher_cpus": 0.25},
}  # fmt: skip

EVALUATED = {
    "learner": {"ema_decay": 0.9},
    "evaluation": {"every": 2, "num_samples": 5, "num_steps": 3, "guidance_scale": 1.5, "scorer": BRIGHT, "gold": [RED],
                   "weights": "ema"},
    "checkpoint": {"every": 1, "keep_last": 2, "keep_best": 1},
}  # fmt: skip

LORA = {"model": {"lora": {"rank": 4, "alpha": 6}}}

COMMANDS: tuple[Line, ...] = (
    ("sample", "run", *SAMPLE, "--guidance-scale", "2", "--out", "sampled"),
    ("sample", "run", *SAMPLE, "--weights", "ema", "--solver", "heun", "--out", "heun"),
    ("sample", "run", *SAMPLE, "--solver", "dpmpp_2m", "--out", "dpmpp_2m"),
    ("evaluate", "run", "--num-samples", "4", "--num-steps", "2", "--out", "evaluated", "--json"),
    ("export", "run", "--to", "exported"),
    ("export", "run", "--as", "ema", "--to", "exported_ema"),
    ("sample", "exported", *SAMPLE, "--out", "of_export"),
    ("merge", "run", "{inputs}/teacher", "--weight", "0.7", "--weight", "0.3", "--to", "merged"),
    ("align", "config.yaml", "iterations=4"),
)


def alignment(algorithm: Content, **sections: Any) -> Content:
    """Three iterations of two groups of three; ``sections`` are merged into it."""
    own: Content = {
        "name": "run",
        "runs_dir": ".",
        "iterations": 3,
        "model": MODEL,
        "data": {"groups_per_iteration": 2},
        "algorithm": algorithm,
        "rewards": [BRIGHT],
        "rollout": {"chunk_size": 2},  # which no number of samples turns into another
        "learner": {"engine": "torch", "micro_batch_size": 2, "optimizer": {"learning_rate": 1e-3}},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 3, "keep_best": 0},
        "logging": {"wandb": "disabled"},
    }
    return merged(own, sections)


def align(content: Content, *more: Line, lane: str = "local") -> Case:
    return Case((("align", "config.yaml"), *more), {"config.yaml": content}, lane)


def alignments() -> dict[str, Case]:
    grpo = {
        "plain": ({}, {}),
        "fixed": (FIXED, {}),
        "sliding": (
            {"window": {"kind": "sliding", "size": 1, "every": 1, "decay": 0.5, "decay_start": 1, "stop": 3}},
            {},
        ),
        "random": ({"window": {"kind": "random", "size": 2, "stop": 3}}, {}),
        "guard": (
            {"ratio": "guard", **FIXED, "clip_range": 2e-6},
            {"learner": {"updates_per_iteration": 2, "epochs": 2}},
        ),
        "granularities": (
            {"window": {"kind": "random", "size": 1, "stop": 2}, "granularities": [1, 2], "initial_noise": "group",
             "share_prefix": True},
            {},
        ),
        "granularities, per_reward, keep": (
            {**FIXED, "num_steps": 6, "granularities": [1, 2], "normalize": "per_reward",
             "keep": {"best": 1, "worst": 1}},
            {"rewards": [BRIGHT, {**RED, "weight": 0.5}]},
        ),
        "update_guidance_scale": (
            {"guidance_scale": 3.0, "update_guidance_scale": 1.5, "norm_preserving": True, **FIXED, "ratio": "guard"},
            {},
        ),
        "guided": ({"guidance_scale": 2.5, **FIXED}, {}),
        "reference_refresh": ({"beta": 0.04, "reference_refresh": 2}, {}),
        "kl of velocities, lora": ({"beta": 0.04, "kl": "velocity"}, LORA),
        "batch std": ({"std": "batch"}, {}),
        "no std, unnormalised": ({"std": "none", "log_prob": "unnormalised"}, {}),
        "cps": ({"kind": "cps", "noise_level": 0.5}, {}),
        "dance": ({"kind": "dance", "noise_level": 0.3, "initial_noise": "group"}, {}),
        "per_reward": ({"normalize": "per_reward"}, {"rewards": [BRIGHT, {**RED, "weight": 2.0}]}),
        "keep": ({"keep": {"best": 1, "worst": 1}, "clip_range": {"low": 1e-3, "high": 2e-3}}, {}),
        "train_steps": ({"train_steps": 2}, {}),
        "train_steps by iteration": ({"train_steps": 2, "train_steps_by": "iteration"}, {}),
        "ema rolls out": ({"rollout_weights": "ema"}, {"learner": {"ema_decay": 0.5}}),
        "paper grid": ({"grid": "paper"}, {}),
        "shift": ({"shift": 2.0}, {}),
        "bfloat16": (FIXED, {"model": {"dtype": "bfloat16"}, "learner": {"ema_decay": 0.9}}),
        "bfloat16, lora": ({"beta": 0.01}, merged(LORA, {"model": {"dtype": "bfloat16"}})),
        "masked": ({}, {"rewards": [BRIGHT, {"spec": "{inputs}/bright.py:gaps"}], "min_valid_fraction": 0.1}),
        "routed": (
            {},
            merged(TASKS, {"rewards": [{**BRIGHT, "tasks": ["one"]}, {**RED, "tasks": ["two"]}],
                            "data": {"task_weights": {"two": 2}}}),
        ),
        "schedule": (
            {},
            {"learner": {"optimizer": {"warmup_steps": 2, "decay_steps": 4, "final_learning_rate": 1e-4,
                                       "weight_decay": 0.1, "betas": [0.8, 0.95], "max_grad_norm": 0.01}}},
        ),
        "fresh concat": ({}, {"model": {"transformer": {"architecture": "concat", "num_layers": 2}}}),
    }  # fmt: skip
    cases = {f"flow_grpo, {name}": align(alignment({**GRPO, **own}, **more)) for name, (own, more) in grpo.items()}
    others: dict[str, tuple[Content, Content]] = {
        "dpo online": (
            {**DPO, "group_size": 3, "num_steps": 2, "reference_refresh": 2, "weighting": "noise", "timesteps": 2}, {},
        ),
        "dpo offline": ({**DPO, "source": "offline", "winner_weight": 1.5, "sft_weight": 0.1}, OFFLINE),
        "dpo offline, lora": ({**DPO, "source": "offline", "density_shift": 3.0}, {**OFFLINE, **LORA}),
        "nft": ({"type": "nft", **FORWARD, "kl_beta": 0.01}, {"learner": {"ema_decay": 0.9}}),
        "nft uniform": (
            {"type": "nft", **FORWARD, "weighting": "uniform", "normalize": "per_reward"},
            {"learner": {"ema_decay": 0.9}, "rewards": [BRIGHT, RED]},
        ),
        "sft": ({"type": "sft", **FORWARD, "beta": 0.1}, {}),
        "sft rwr": ({"type": "sft", **FORWARD, "select": "rwr"}, {}),
        "awm": (
            {"type": "awm", **FORWARD, "beta": 0.01, "reference_refresh": 2},
            {"learner": {"updates_per_iteration": 2}},
        ),
        "awm ghuber": ({"type": "awm", **FORWARD, "clip_range": None, "weighting": "ghuber"}, {}),
        "opd ode": ({**OPD, "teachers": {"all": {"path": "{inputs}/teacher"}}}, {"rewards": []}),
        "opd sde, two teachers": (
            {**OPD, "kind": "flow", "noise_level": 0.7, "teachers": TEACHERS},
            {"rewards": [], **TASKS},
        ),
        "opd advantage": (
            {**OPD, "kind": "flow", "noise_level": 0.7, "distillation": "advantage", "reward_weight": 0.5,
             "window": {"kind": "random", "size": 1, "stop": 2}, "teachers": TEACHERS, "guidance_scale": 1.5},
            TASKS,
        ),
    }  # fmt: skip
    cases |= {name: align(alignment(own, **more)) for name, (own, more) in others.items()}
    return cases


def commands() -> dict[str, Case]:
    """Runs with an evaluation, and what the commands make of them."""
    lora = ("export", "run", "--as", "lora", "--to", "exported_lora")
    guided = {**GRPO, **FIXED, "guidance_scale": 2.0}
    calibrate = ("calibrate-cache", "{inputs}/model", "--to", "cache.json", "--num-samples", "6", "--num-steps", "6")
    cached = {"calibration": "cache.json", "threshold": 0.5}
    content = alignment(
        {**guided, "num_steps": 6},
        rollout={"cache": cached},
        evaluation={"every": 2, "num_samples": 4, "num_steps": 6, "scorer": BRIGHT, "cache": cached},
    )
    preferences = ("make-preferences", "{inputs}/model", "--reward", "{inputs}/bright.py:reward", "--pairs", "3",
                   "--group-size", "3", "--num-steps", "2", "--out", "made")  # fmt: skip
    return {
        "commands": align(alignment(guided, **EVALUATED), *COMMANDS),
        "commands, lora": align(alignment(guided, **merged(EVALUATED, LORA)), lora, *COMMANDS),
        "commands, bfloat16": align(
            alignment(guided, **merged(EVALUATED, {"model": {"dtype": "bfloat16"}})), *COMMANDS[:1], COMMANDS[4]
        ),
        "resume goes back": align(
            alignment({**GRPO, "beta": 0.04, "reference_refresh": 2}, **EVALUATED),
            ("align", "config.yaml", "checkpoint.resume=step_000002"),
        ),
        "caches": Case((calibrate, ("align", "config.yaml")), {"config.yaml": content}),
        "make-preferences": Case((preferences,)),
    }


def engines() -> dict[str, Case]:
    plain = {**GRPO, **FIXED, "beta": 0.02}
    cases = {
        f"zero {stage}": align(
            alignment(plain, learner={"engine": "deepspeed", "zero_stage": stage, "ema_decay": 0.9}),
            ("align", "config.yaml", "iterations=4"),
            lane="deepspeed",
        )
        for stage in range(4)
    }
    cases["zero 2, bfloat16, lora"] = align(
        alignment(plain, learner={"engine": "deepspeed", "zero_stage": 2},
                  **merged(LORA, {"model": {"dtype": "bfloat16"}})),
        lane="deepspeed",
    )  # fmt: skip
    return cases


def clusters() -> dict[str, Case]:
    plain = {**GRPO, **FIXED, "beta": 0.02, "reference_refresh": 2}
    # With DeepSpeed: checkouts before FSDP2 had another engine of several ranks.
    two = {"engine": "deepspeed", "ranks": 2, "micro_batch_size": 2, "ema_decay": 0.9}
    cases = {
        "ray": align(alignment(plain, **merged(EVALUATED, RAY)), lane="ray"),
        "ray, two ranks": align(alignment(plain, **merged(RAY, {"learner": two})), lane="ray"),
        "ray, two ranks, opd": align(
            alignment({**OPD, "kind": "flow", "noise_level": 0.7, "teachers": TEACHERS},
                      **merged(merged(RAY, TASKS), {"rewards": [], "learner": two})),
            lane="ray",
        ),
        "ray, two ranks, nft": align(
            alignment({"type": "nft", **FORWARD}, **merged(RAY, {"learner": two})), lane="ray",
        ),
        "ray, two ranks, offline": align(
            alignment({**DPO, "source": "offline"}, **merged(merged(RAY, OFFLINE), {"learner": two})), lane="ray",
        ),
    }  # fmt: skip
    for stage in range(1, 4):
        learner = {**two, "zero_stage": stage}
        cases[f"ray, two ranks, zero {stage}"] = align(
            alignment(plain, **merged(RAY, {"learner": learner})), lane="ray"
        )
    return cases
