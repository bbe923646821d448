"""What other trainers call a key of ours: diffusers' scripts, TRL, flow_grpo, Flow-Factory and their kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_RECOMPUTED = ("learner.activation_checkpointing",)
_RATE, _TOTAL, _SAVED = ("learner.optimizer.learning_rate",), ("iterations",), ("checkpoint.every",)
_KEPT, _MODEL, _RANKS = ("checkpoint.keep_last",), ("model.path",), ("learner.ranks",)
_SEED, _PROMPTS, _SIZE = ("seed",), ("latents", "data.prompts"), ("model.height", "model.width")
_GROUP, _STEPS, _CLIP = ("algorithm.group_size",), ("algorithm.num_steps",), ("algorithm.clip_range",)
_DTYPE, _EVALUATED, _LOGGED = ("learner.dtype", "model.dtype"), ("evaluation.every",), ("logging.every",)
_BATCH, _AT_ONCE, _BETAS = ("learner.batch_size",), ("learner.micro_batch_size",), ("learner.optimizer.betas",)
_CURRICULUM = ("data.curriculum",)
_WARMUP, _DECAY, _NORM = (
    ("learner.optimizer.warmup_steps",),
    ("learner.optimizer.decay", "learner.optimizer.decay_steps"),
    ("learner.optimizer.max_grad_norm",),
)

# Keys of ours by another name, in lower case and without signs; where several fit, a run has the first that it knows.
KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "learning_rate", "base_lr", "peak_lr", "initial_lr"), _RATE),
    **dict.fromkeys(("max_steps", "max_train_steps", "num_train_steps", "train_steps", "total_steps"), _TOTAL),
    **dict.fromkeys(("num_steps_total", "num_iterations", "max_iterations", "steps", "num_updates"), _TOTAL),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "max_epochs", "epochs_total", "train_iters"), _TOTAL),
    **dict.fromkeys(("num_inner_epochs", "inner_epochs", "ppo_epochs"), ("learner.epochs",)),
    **dict.fromkeys(("batch_size", "train_batch_size", "global_batch_size", "total_batch_size"), _BATCH),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_batch_size", "per_gpu_batch_size"), _AT_ONCE),
    **dict.fromkeys(("mini_batch_size", "minibatch_size", "microbatch_size", "micro_batch"), _AT_ONCE),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum", "grad_accumulation_steps"), _AT_ONCE),
    **dict.fromkeys(("num_generations", "num_image_per_prompt", "num_images_per_prompt"), _GROUP),
    **dict.fromkeys(("samples_per_prompt", "images_per_prompt", "num_samples_per_prompt"), _GROUP),
    **dict.fromkeys(("num_batches_per_epoch", "unique_sample_num_per_epoch"), ("data.groups_per_iteration",)),
    **dict.fromkeys(("prompts_per_iteration", "num_prompts"), ("data.groups_per_iteration",)),
    **dict.fromkeys(("num_inference_steps", "sampling_steps", "num_sampling_steps"), _STEPS),
    **dict.fromkeys(("eval_num_steps", "eval_num_inference_steps"), ("evaluation.num_steps",)),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "guidance_scale"), ("algorithm.guidance_scale",)),
    **dict.fromkeys(("eval_guidance_scale",), ("evaluation.guidance_scale",)),
    **dict.fromkeys(("true_cfg_scale", "true_cfg"), ("algorithm.true_guidance_scale",)),
    **dict.fromkeys(("cfg_normalization", "cfg_norm"), ("algorithm.guidance_norm_cap",)),
    **dict.fromkeys(("cfg_truncation",), ("algorithm.guidance_until",)),
    **dict.fromkeys(("beta", "kl_beta", "kl_coef", "kl_coeff", "kl_weight", "kl_loss_coef"), ("algorithm.beta",)),
    **dict.fromkeys(("clip_epsilon", "clip_eps", "epsilon", "cliprange", "ppo_clip"), _CLIP),
    **dict.fromkeys(("sde_noise", "noise_scale", "sde_noise_level"), ("algorithm.noise_level",)),
    **dict.fromkeys(("sde_window_size", "sde_window", "window_size"), ("algorithm.window.size",)),
    "sde_window_range": ("algorithm.window.start",),
    **dict.fromkeys(("algo", "algorithm_name", "method", "loss_type", "trainer_type"), ("algorithm.type",)),
    **dict.fromkeys(("random_seed", "manual_seed", "global_seed", "rng_seed", "train_seed"), _SEED),
    **dict.fromkeys(("eval_seed", "validation_seed"), ("evaluation.seed",)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_betas", "beta1", "beta2"), _BETAS),
    **dict.fromkeys(("adam_epsilon", "adam_eps", "optimizer_eps", "optimizer.epsilon"), ("learner.optimizer.eps",)),
    **dict.fromkeys(("lr_warmup_steps", "warmup", "warmup_ratio", "num_warmup_steps"), _WARMUP),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler_type", "lr_schedule"), _DECAY),
    **dict.fromkeys(("min_lr", "final_lr", "end_lr"), ("learner.optimizer.final_learning_rate",)),
    **dict.fromkeys(("gradient_clipping", "grad_clip", "clip_grad_norm", "clip_grad", "max_norm"), _NORM),
    **dict.fromkeys(("use_ema", "ema", "ema_rate", "ema_beta"), ("learner.ema_decay",)),
    **dict.fromkeys(("use_compile", "torch_compile"), ("learner.compile",)),
    **dict.fromkeys(("cpu_offload", "offload_optimizer", "offload_param", "fsdp_offload"), ("learner.offload",)),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing", "ac_mode"), _RECOMPUTED),
    **dict.fromkeys(("attn_implementation", "attention_backend", "attn_mode"), ("model.attention",)),
    **dict.fromkeys(("use_flash_attn", "flash_attention", "use_flash_attention"), ("model.attention",)),
    **dict.fromkeys(("mixed_precision", "bf16", "fp16", "precision", "torch_dtype", "autocast"), _DTYPE),
    **dict.fromkeys(("num_gpus", "num_processes", "world_size", "nproc_per_node", "n_gpus", "gpus"), _RANKS),
    **dict.fromkeys(("deepspeed_stage", "zero"), ("learner.zero_stage",)),
    **dict.fromkeys(("strategy", "distributed_type", "deepspeed", "fsdp"), ("learner.engine",)),
    **dict.fromkeys(("num_workers", "num_rollout_workers", "rollouts"), ("cluster.rollout_workers",)),
    "ray_address": ("cluster.address",),
    **dict.fromkeys(("pretrained_model_name_or_path", "model_name_or_path", "model_name"), _MODEL),
    **dict.fromkeys(("pretrained_model", "pretrained", "model_path", "model_id", "base_model"), _MODEL),
    **dict.fromkeys(("teacher_model", "teacher_path", "teacher_model_name_or_path"), ("teacher.path",)),
    **dict.fromkeys(("use_lora", "lora", "finetune_type", "lora_config", "peft"), ("model.lora",)),
    **dict.fromkeys(("load_in_8bit", "quantize_base", "quantization", "base_quantization"), ("model.base_dtype",)),
    **dict.fromkeys(("lora_rank", "lora_r"), ("model.lora.rank",)),
    "lora_alpha": ("model.lora.alpha",),
    **dict.fromkeys(("lora_path", "adapter_path", "adapter_name_or_path", "lora_weights"), ("model.lora.path",)),
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_targets"), ("model.lora.targets",)),
    **dict.fromkeys(("resolution", "image_size"), _SIZE),
    **dict.fromkeys(("max_length", "max_text_length", "text_length"), ("model.max_sequence_length",)),
    **dict.fromkeys(("reward_fn", "reward_funcs", "reward_model", "reward", "reward_function"), ("rewards",)),
    **dict.fromkeys(("reward_weights", "reward_weight"), ("rewards.weight",)),
    **dict.fromkeys(("dataset", "dataset_name", "dataset_dir", "train_data_dir", "data_dir"), _PROMPTS),
    **dict.fromkeys(("prompt_fn", "prompt_file", "prompts_file", "train_prompts", "prompt_path"), _PROMPTS),
    "curriculum_learning": _CURRICULUM,
    **dict.fromkeys(("dynamic_sampling", "dynamic_sample", "filter_groups"), ("data.refill",)),
    **dict.fromkeys(("output_dir", "save_dir", "logdir", "log_dir", "exp_dir"), ("runs_dir",)),
    **dict.fromkeys(("run_name", "experiment_name", "exp_name"), ("name",)),
    **dict.fromkeys(("save_steps", "save_freq", "save_every", "save_interval", "checkpointing_steps"), _SAVED),
    **dict.fromkeys(("checkpoint_every", "checkpoint_freq", "save_strategy"), _SAVED),
    **dict.fromkeys(("save_total_limit", "checkpoints_total_limit", "num_checkpoint_limit"), _KEPT),
    **dict.fromkeys(("resume_from_checkpoint", "resume_from", "resume"), ("checkpoint.resume",)),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), ("checkpoint.best_metric",)),
    "load_best_model_at_end": ("checkpoint.keep_best",),
    **dict.fromkeys(("eval_steps", "eval_freq", "eval_every", "eval_interval", "eval_strategy"), _EVALUATED),
    **dict.fromkeys(("evaluation_steps", "evaluation_strategy"), _EVALUATED),
    **dict.fromkeys(("validation_steps", "validation_epochs", "val_every"), ("validation.every", "evaluation.every")),
    **dict.fromkeys(("eval_prompts", "validation_prompt", "validation_prompts"), ("evaluation.prompts",)),
    **dict.fromkeys(("logging_steps", "log_every", "log_freq", "log_interval", "logging.every"), _LOGGED),
    **dict.fromkeys(("report_to", "logging_backend", "logger"), ("logging.trackers", "logging.wandb")),
    **dict.fromkeys(("use_wandb", "wandb_mode"), ("logging.wandb",)),
    **dict.fromkeys(("use_tensorboard", "use_swanlab", "use_mlflow"), ("logging.trackers",)),
    **dict.fromkeys(("project_name", "tracker_project_name", "wandb_project", "project"), ("logging.wandb_project",)),
    **dict.fromkeys(("caption_dropout", "uncond_prob", "cfg_dropout"), ("algorithm.condition_dropout",)),
    **dict.fromkeys(("weighting_scheme", "timestep_sampling", "density"), ("algorithm.density",)),
}  # fmt: skip

# What stands for a key where a run has none of those.
_ROW = "an alignment writes a row of metrics after each iteration; leave it out"
_IMAGES = (
    "an iteration has data.groups_per_iteration prompts of algorithm.group_size images each, and "
    "learner.micro_batch_size of them are learned from at once"
)
WORDS: dict[str, str] = {
    **{name: _ROW for name, keys in KEYS.items() if keys == _LOGGED},
    **{name: _IMAGES for name, keys in KEYS.items() if keys == _BATCH},
    **dict.fromkeys(("optimizer_type", "optim", "use_8bit_adam"), "AdamW is the one optimizer; leave it out"),
}
# Beside a key, where its value has another meaning than that of the name.
BESIDE: dict[str, str] = {
    **dict.fromkeys(
        ("dynamic_sampling", "dynamic_sample", "filter_groups"),
        "it draws prompts by pass rate, before they are rolled out; none is rolled out in the place of another",
    ),
    **dict.fromkeys(("resolution", "image_size"), "and model.width"),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accum", "grad_accumulation_steps"),
        "gradients are accumulated over an update's micro-batches by themselves",
    ),
}


def hint_for(name: str, known: Collection[str]) -> tuple[str | None, str | None]:
    """Return the key of ``known`` that another trainer calls ``name``, and a sentence about it; None for what is not.

    ``name`` is a dotted key, of which the last two parts or the last one count.
    """
    parts = name.lower().replace("-", "_").split(".")
    for said in (".".join(parts[-2:]), parts[-1]):
        key = next((key for key in KEYS.get(said, ()) if key in known), None)
        if key is not None:
            return key, BESIDE.get(said)
        if said in WORDS:
            return None, WORDS[said]
    return None, None


def keys_inside(name: str, value: Any, known: Collection[str]) -> dict[str, str]:
    """Return our keys for those of a section ``name`` that only another trainer has, such as ``train.beta``."""
    inner = value if isinstance(value, Mapping) else {}
    found = {f"{name}.{key}": hint_for(f"{name}.{key}", known)[0] or _same(str(key), known) for key in inner}
    return {theirs: ours for theirs, ours in found.items() if ours is not None}


def _same(name: str, known: Collection[str]) -> str | None:
    return next((key for key in known if key.rpartition(".")[2] == name), None)
