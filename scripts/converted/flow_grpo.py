"""What a configuration of Flow-GRPO (github.com/yifan123/flow_grpo) is here; docs/coming_from/flow_grpo.md has a table.

Much of such a run is in its scripts and not in its configuration: the LoRA's size, the average of the weights, the
length of texts. That is filled in as `scripts/train_*.py` have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converted.flow_grpo_data import data_of, evaluation_of
from converted.flow_grpo_keys import ConvertError, Theirs
from converted.flow_grpo_models import Family, family_of, model_of
from converted.flow_grpo_rewards import rewards_of
from converted.written import Line

NEVER = 1_000_000  # updates: their reference that is never refreshed has ten times as many
ENDLESS = 100_000  # epochs: their runs go on until they are stopped
HERE = Path()


@dataclass(frozen=True)
class Converted:
    """Our keys, what of theirs has no key here, and what of the run is lost by that."""

    lines: list[Line]
    left: list[str]
    lost: list[str]


def convert(
    values: Mapping[str, Any], name: str, gpus: int | None, iterations: int | None = None, root: Path = HERE
) -> Converted:
    """Convert the resolved ``values`` of theirs.

    ``gpus`` is the number of processes that they are launched with, which the size of an epoch depends on; their
    prompts are looked for in ``root``. Raises ConvertError.
    """
    theirs = Theirs(values)
    _refuse(theirs)
    family = family_of(theirs.need("pretrained.model"))
    if gpus is None:
        raise ConvertError("the number of GPUs is not in the file; say it: --gpus 8")
    dpo = theirs("train.algorithm") == "dpo"
    lines = [Line("name", name), Line("seed", theirs("seed", 0)), *_length(theirs, iterations)]
    lines += model_of(theirs, family)
    lines += data_of(theirs, gpus, root)
    lines += _dpo(theirs, family) if dpo else _grpo(theirs, family)
    lines += rewards_of(theirs)
    lines += _learner(theirs, family, gpus, dpo)
    lines += _cluster(gpus)
    lines += evaluation_of(theirs, root, dpo)
    return Converted(lines, theirs.left(), theirs.lost)


def _refuse(theirs: Theirs) -> None:
    """Raise ConvertError for what is another method."""
    algorithm = theirs("train.algorithm")
    if algorithm == "sft":
        raise ConvertError(
            "train.algorithm is sft, whose script makes one step of many epochs; nothing here does that: begin from"
            " configs/shapes/sft.yaml"
        )
    if algorithm not in (None, "dpo"):
        raise ConvertError(f"train.algorithm is {algorithm}, which is not here; docs/algorithms.md has what is")
    for key in ("sample.train_num_steps", "sample.mini_num_image_per_prompt"):
        if theirs(key) is not None:
            raise ConvertError(
                f"{key} is of a script that their repository no longer has; say sample.sde_window_size,"
                " sde_window_range and sde_type, as its pickscore_sd3_fast_nocfg does"
            )


def _length(theirs: Theirs, iterations: int | None) -> list[Line]:
    epochs = theirs("num_epochs", ENDLESS)
    if iterations is None and epochs < ENDLESS:
        return [Line("iterations", epochs)]
    return [Line("iterations", iterations or 2000, "their code runs until it is stopped")]


def _grpo(theirs: Theirs, family: Family) -> list[Line]:
    steps, cps = theirs.need("sample.num_steps"), theirs("sample.sde_type") == "cps"
    guidance = theirs.need("sample.guidance_scale")
    fast = family.windows or theirs("sample.sde_type") is not None  # the scripts that draw a window
    lines = [
        Line("algorithm.type", "flow_grpo"),
        Line("algorithm.group_size", theirs("sample.num_image_per_prompt")),
        Line("algorithm.kind", "cps" if cps else "flow"),
        Line("algorithm.noise_level", theirs("sample.noise_level", 0.7)),
        Line("algorithm.num_steps", steps),
        _window(theirs, steps, fast),
        Line("algorithm.guidance_scale", guidance),
    ]
    if cps:
        lines.append(Line("algorithm.log_prob", "unnormalised", "as theirs for cps"))
    if theirs("sample.same_latent"):
        why = "one noise a group; theirs is one for the images of a prompt in one batch of all GPUs"
        lines.append(Line("algorithm.initial_noise", "group", why))
    if not theirs("train.cfg", True) and guidance > 1 and family.name == "sd3":
        why = "train.cfg = False. Old log-probs are computed anew, so that a ratio begins at 1; theirs does not"
        lines.append(Line("algorithm.update_guidance_scale", 1.0, why))
    if theirs("rationorm"):
        lines.append(Line("algorithm.ratio", "guard", "rationorm"))
    lines += [
        Line(
            "algorithm.clip_range", theirs("train.clip_range", 1e-4), "of ratios of log-probs that are means, as theirs"
        ),
        Line("algorithm.advantage_clip", float(theirs("train.adv_clip_max", 5))),
        Line("algorithm.std", "batch" if theirs("sample.global_std", True) else "group", "sample.global_std"),
        _kl(theirs, steps, cps),
    ]
    return lines


def _window(theirs: Theirs, steps: int, fast: bool) -> Line:
    if fast:
        size, (start, stop) = theirs("sample.sde_window_size", 0), theirs("sample.sde_window_range", (0, steps))
        if size == 0:
            return Line("algorithm.window", {"kind": "fixed", "start": 0, "size": steps - 1})
        window = {"kind": "random", "start": start, "size": size, "stop": min(stop, steps)}
        return Line("algorithm.window", window, "drawn for each iteration; theirs on each GPU for each of its batches")
    fraction = theirs("train.timestep_fraction", 1.0)
    trained = int(steps * fraction)
    if trained == steps:
        return Line("algorithm.window", {"kind": "full"})
    why = f"{fraction} of {steps} steps. Theirs has noise in the others too, here they are deterministic"
    return Line("algorithm.window", {"kind": "fixed", "start": 0, "size": trained}, why)


def _kl(theirs: Theirs, steps: int, cps: bool) -> Line:
    beta = float(theirs("train.beta", 0.0))
    if beta == 0 or cps:
        return Line("algorithm.beta", beta)
    why = f"train.beta = {beta}. Their KL leaves |Δ| of a step out, which is 1/{steps} on average"
    return Line("algorithm.beta", float(f"{beta / steps:.6g}"), why)


def _dpo(theirs: Theirs, family: Family) -> list[Line]:
    steps, refresh = theirs.need("sample.num_steps"), theirs("train.ref_update_step", NEVER)
    times = int(steps * theirs("train.timestep_fraction", 1.0))
    for key in ("sample.noise_level", "sample.global_std", "train.adv_clip_max", "train.clip_range"):
        theirs(key)  # of images by the SDE, and of advantages, which a pair has none of
    lines = [
        Line("algorithm.type", "diffusion_dpo"),
        Line("algorithm.source", "online"),
        Line("algorithm.group_size", theirs("sample.num_image_per_prompt"), "a pair is the best and the worst of them"),
        Line("algorithm.num_steps", steps, "by the ODE and of the policy; theirs by the SDE and of the reference"),
        Line("algorithm.guidance_scale", theirs.need("sample.guidance_scale"), "of the images; the loss has none"),
        Line("algorithm.beta", float(theirs.need("train.beta"))),
        Line("algorithm.timesteps", times, "times of a pair in an update: their loop over the steps draws each anew"),
        Line("algorithm.density", "logit_normal"),
        Line("algorithm.density_shift", 3.0, "they draw on the grid of the model's scheduler, whose shift is 3"),
    ]
    if refresh < NEVER:
        lines.append(Line("algorithm.reference_refresh", refresh, "theirs counts updates"))
    return lines


def _learner(theirs: Theirs, family: Family, gpus: int, dpo: bool) -> list[Line]:
    batch, batches = theirs.need("train.batch_size"), theirs("sample.num_batches_per_epoch")
    gathered = max(1, theirs("train.gradient_accumulation_steps", 1))
    micro = max(1, batch // 2) if dpo else batch
    lines = [
        Line("rollout.chunk_size", theirs("sample.train_batch_size")),
        Line("rollout.decode_batch_size", theirs("sample.train_batch_size")),
        Line("learner.engine", family.engine if gpus > 1 else "torch"),
        *([Line("learner.zero_stage", 2)] if family.engine == "deepspeed" and gpus > 1 else []),
        Line("learner.ranks", _places(gpus)[0]),
        Line("learner.micro_batch_size", micro, "pairs: each is two images" if dpo else ""),
        Line("learner.updates_per_iteration", max(1, batches // gathered)),
        Line("learner.epochs", theirs("train.num_inner_epochs", 1)),
        Line("learner.optimizer.learning_rate", theirs("train.learning_rate", 3e-4)),
        Line("learner.optimizer.betas", [theirs("train.adam_beta1", 0.9), theirs("train.adam_beta2", 0.999)]),
        Line("learner.optimizer.eps", theirs("train.adam_epsilon", 1e-8)),
        Line("learner.optimizer.weight_decay", theirs("train.adam_weight_decay", 1e-4)),
        Line("learner.optimizer.max_grad_norm", float(theirs("train.max_grad_norm", 1.0))),
    ]
    if theirs("activation_checkpointing"):
        lines.append(Line("learner.activation_checkpointing", "blocks"))
    if theirs("fsdp_optimizer_offload"):
        lines.append(Line("learner.offload", "host"))
    if theirs("train.ema"):
        times = 1 if dpo else gathered
        why = f"0.9 at every 8th update, {times} times at each: once for each batch of an update" if times > 1 else ""
        lines += [
            Line("learner.ema_decay", float(f"{0.9**times:.4g}"), why),
            Line("learner.ema_every", 8),
            Line("learner.ema_warmup", True, "it begins low there too, and rises by updates; here by averages"),
        ]
    return lines


def _places(gpus: int) -> tuple[int, int, int]:
    """Share GPUs, which theirs all sample and learn in turn: ranks that learn, reward workers, rollout workers."""
    learn, score = max(1, gpus // 4), max(1, gpus // 16)
    return learn, score, max(1, gpus - learn - score)


def _cluster(gpus: int) -> list[Line]:
    if gpus == 1:
        return [Line("cluster.backend", "local"), Line("cluster.device", "cuda")]
    learn, score, roll = _places(gpus)
    fits = learn + score + roll <= gpus
    return [
        Line("cluster.backend", "ray"),
        Line("cluster.device", "cuda"),
        Line("cluster.rollout_workers", roll, f"{gpus} GPUs: some sample, some learn; other numbers change no sample"),
        Line("cluster.rollout_gpus", 1),
        Line("cluster.learner_gpus", 1),
        Line("cluster.reward_workers", score),
        Line("cluster.reward_gpus", 1 if fits else 0),
    ]
