"""Trainings on latents of every algorithm, family, density and architecture, and what commands make of them."""

from __future__ import annotations

from typing import Any

from samebits.case import SAMPLE, Case, Content, Line, merged

LENGTH = {"path": "{inputs}/model", "max_sequence_length": 4}

BANK = "{side}/banks/plain"

RF = {"type": "rectified_flow"}

FAMILIES = ("eps/linear", "v/cos", "v/linear", "edm")

DENSITIES: dict[str, Content] = {
    "uniform": {},
    "mode": {"density_params": {"s": 1.29}},
    "cosmap": {},
    "u_shaped": {"density_params": {"a": 4.0}},
}


def training(algorithm: Content, **changes: Any) -> Content:
    """Four steps of eight latents; ``changes`` are merged into it."""
    own: Content = {
        "name": "run",
        "runs_dir": ".",
        "model": LENGTH,
        "latents": BANK,
        "algorithm": algorithm,
        "phases": [
            {"iterations": 4, "learning_rate": 2e-3, "final_learning_rate": 1e-3, "max_sequence_lengths": {4: 1.0}}
        ],
        "learner": {"batch_size": 8, "optimizer": {"warmup_steps": 1}, "ema_decay": 0.9, "dtype": "float32"},
        "cluster": {"threads": 1},
        "logging": {"every": 1},
        "checkpoint": {"every": 2},
    }
    return merged(own, changes)


def pretrain(content: Content, *more: Line, command: str = "pretrain") -> Case:
    return Case(((command, "config.yaml"), *more), {"config.yaml": content})


def student(algorithm: Content, *more: Line, **changes: Any) -> Case:
    return pretrain(training(algorithm, **{"teacher": LENGTH, **changes}), *more, command="distill")


OF_MODEL: Line = ("sample", "run", *SAMPLE, "--weights", "ema", "--out", "sampled")

EXPORT: Line = ("export", "run", "--as", "ema", "--to", "exported")


def of(solver: str) -> Line:
    return ("sample", "run", *SAMPLE, "--solver", solver, "--out", solver)


def trainings() -> dict[str, Case]:
    source = ("precompute", "{inputs}/pictures.parquet", "--model", "{inputs}/model", "--resolution", "64")
    banks: tuple[Line, ...] = (
        (*source, "--to", "plain", "--batch-size", "4", "--shard-size", "6"),
        (*source, "--to", "captions", "--caption", "original=caption", "--caption", "synthetic=alt",
         "--embeddings", "float32", "--max-sequence-length", "4", "--flip"),
        (*source, "--to", "sparse", "--limit", "9", "--deduplicate", "0.999", "--clip", "shapes:open_clip"),
        ("make-pairs", "{inputs}/model", "--to", "pairs", "--pairs", "12", "--shard-size", "6", "--solver", "heun",
         "--num-steps", "3", "--guidance-scale", "1.5"),
    )  # fmt: skip
    validation = {"latents": BANK, "every": 2, "num_samples": 6, "num_times": 3}
    cases = {
        "banks": Case(banks),
        "rectified_flow": pretrain(
            training(RF, learner={"ema_decay": [0.9, 0.99], "ema_every": 2, "micro_batch_size": 3},
                     validation=validation),
            OF_MODEL, of("euler"), of("heun"), of("dpmpp_2m"), EXPORT,
            ("export", "run", "--as", "ema_0.99", "--to", "exported_099"),
            ("pretrain", "config.yaml", "checkpoint.resume=step_000002"),
        ),
        "rectified_flow, captions": pretrain(
            training(RF, latents="{side}/banks/captions", captions={"original": 1.0, "synthetic": 2.0},
                     encoder_dropout={"clip_l": 0.5, "clip_g": 0.3}),
        ),
        "rectified_flow, two lengths": pretrain(
            training(RF, phases=[
                {"iterations": 2, "learning_rate": 2e-3, "max_sequence_lengths": {4: 1.0, 16: 1.0}},
                {"iterations": 2, "learning_rate": 1e-3, "final_learning_rate": 1e-4,
                 "max_sequence_lengths": {16: 1.0}},
            ]),
        ),
        "rectified_flow, bfloat16": pretrain(training(RF, learner={"dtype": "bfloat16"})),
        "rectified_flow, deepspeed": pretrain(training(RF, learner={"engine": "deepspeed"})),
        "reflow": pretrain(training({"type": "reflow"}, latents="{side}/banks/pairs"), OF_MODEL),
        "reflow, real data": pretrain(
            training({"type": "reflow"}, latents="{side}/banks/pairs", real_data={"latents": BANK, "fraction": 0.3}),
        ),
        "reflow, lpips": pretrain(training({"type": "reflow", "loss": "lpips_huber"}, latents="{side}/banks/pairs")),
        "progressive": student(
            {"type": "progressive", "num_steps": 2}, EXPORT, evaluation={"num_steps": 2, "grid": "paper"}
        ),
        "consistency": student(
            {"type": "consistency", "num_steps": 10, "skip": 2, "guidance_scale": 1.5},
            OF_MODEL, of("consistency"), EXPORT,
            evaluation={"num_steps": 2, "solver": "consistency", "grid": "paper"},
        ),
        "consistency, no teacher": pretrain(
            training({"type": "consistency", "num_steps": 10, "skip": 1, "teacher": "none", "loss": "squared"}),
        ),
        "meanflow": pretrain(
            training({"type": "meanflow", "equal_fraction": 0.5, "kappa": 0.5, "omega": 1.5},
                     model={"inputs": ["r"]}, evaluation={"num_steps": 1, "grid": "paper"}),
            OF_MODEL, EXPORT,
        ),
        "guidance_distill": student({"type": "guidance_distill", "guidance_scale": 3.0}, OF_MODEL, EXPORT),
        "guidance_distill, range": student(
            {"type": "guidance_distill", "guidance_range": [1, 5]}, OF_MODEL, EXPORT, model={"inputs": ["guidance"]},
        ),
    }  # fmt: skip
    for family in FAMILIES:
        own = {"type": "rectified_flow", "family": family, "density": "uniform"}
        content = training(own, model={"family": family})
        cases[f"family {family}"] = pretrain(content, of("euler"), of("dpmpp_2m"), of("ddpm"))
    for density, params in DENSITIES.items():
        own = {**RF, "density": density, **params}
        cases[f"density {density}"] = pretrain(training(own, learner={"ema_decay": 0.5}))
    for weighting in ("noise", "data"):
        cases[f"weighting {weighting}"] = pretrain(training({**RF, "weighting": weighting, "shift": 3.0}))
    for architecture in ("mmdit", "concat", "cross", "uvit"):
        network = {"architecture": architecture, "num_layers": 3, "num_heads": 1}
        cases[f"architecture {architecture}"] = pretrain(training(RF, model={"transformer": network}), OF_MODEL)
    return cases


def ranks() -> dict[str, Case]:
    """Two processes of torchrun, and the bank that they learn from, in the lane of clusters."""
    bank = (
        "precompute",
        "{inputs}/pictures.parquet",
        "--model",
        "{inputs}/model",
        "--resolution",
        "64",
        "--to",
        "plain",
    )
    cases = {"bank": Case((bank,), lane="ray")}
    for name, stage in {"": 0, ", zero 2": 2}.items():
        learner = {"micro_batch_size": 2, "engine": "deepspeed", "zero_stage": stage}
        content = training(RF, latents="{side}/bank/plain", learner=learner)
        line = ("torchrun", "2", "pretrain", "config.yaml")
        cases[f"torchrun, two ranks{name}"] = Case((line,), {"config.yaml": content}, "ray")
    return cases
