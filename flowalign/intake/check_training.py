"""Checks of a training run on latents, and of the caches that skip steps of a rollout."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from flowalign.algorithm import Needs
from flowalign.config.alignment import AlignConfig
from flowalign.config.pathfamilies import canonical, formulation, may_learn
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig, OptimizerConfig
from flowalign.config.training import PretrainConfig
from flowalign.intake.paths import recorded_model, shipped_names
from flowalign.samples.cache import cache_rule

MAX_RATE = 0.1  # beyond which a learning rate of AdamW hardly was meant
MAX_DECAY = 0.1  # the same of weight decay times learning rate


def check_caches(config: AlignConfig) -> None:
    """Check that the calibrations by which steps are skipped can be read.

    Rolling out needs noise that reaches t = 1.
    """
    for key, cache in (("rollout.cache", config.rollout.cache), ("evaluation.cache", config.evaluation.cache)):
        try:
            cache_rule(cache)
        except ConfigError as error:
            raise ConfigError(f"{key}.calibration", error.reason) from error
    path_family = config.model.family or "rf"
    if not formulation(path_family).begins_with_noise:
        advice = "train it on as rf first (flowalign pretrain with algorithm.family=rf)"
        raise ConfigError(
            "model.family",
            f"is {path_family}, whose noise ends before t = 1 where rollouts begin; "
            + (advice if may_learn(path_family, "rf") else "align a model of rf or v/cos"),
        )


def check_training(config: PretrainConfig, needs: Needs) -> None:
    """Check that the latents are there, and that algorithm, network and teacher fit together."""
    if not config.phases:
        raise ConfigError("phases", "is empty; give at least one phase of training")
    banks = {"latents": config.latents}
    banks |= {} if config.real_data is None else {"real_data.latents": config.real_data.latents}
    banks |= {} if config.validation is None else {"validation.latents": config.validation.latents}
    for key, bank in banks.items():
        whole = (Path(bank) / "manifest.json").is_file() or (Path(bank) / "latents.safetensors").is_file()
        if not whole or not (Path(bank) / "prompts.json").is_file():
            raise ConfigError(key, f"{bank} holds no latents; make them first, with flowalign precompute or make-pairs")
    name = config.algorithm["type"]
    if needs.second is not None:
        raise ConfigError("algorithm.type", f"{name} trains a second network, which `flowalign align` alone does")
    if needs.teacher and config.teacher is None:
        raise ConfigError("teacher", f"is missing; {name} learns from one, give teacher.path")
    if config.teacher is not None and not needs.teacher:
        raise ConfigError("teacher", f"{name} learns from none; leave it out")
    lacking = [key for key in needs.inputs if key not in (config.model.inputs or ())]
    if lacking:
        raise ConfigError("model.inputs", f"{name} needs a network that takes {lacking[0]}; add it to the list")
    network, learned = config.model.family or "rf", needs.path_family
    if not may_learn(network, learned):
        raise ConfigError("model.family", f"is {network}, which cannot learn {learned}; name the same in both")
    check_signed_time(config.model, needs, name)
    if config.zero_stage == 3 and config.compile:
        raise ConfigError("compile", "ZeRO stage 3 cannot run a compiled network; turn one of them off")


def check_signed_time(model: ModelConfig, needs: Needs, name: str) -> None:
    """Refuse times below 0 on any family but the straight path, which alone has them."""
    if needs.signed_time and model.family not in (None, "rf"):
        raise ConfigError("model.family", f"is {model.family}, which has no times below 0, and {name} asks for them")


def notes_of(config: AlignConfig | PretrainConfig) -> list[str]:
    """Return a sentence for each setting that a run may have and the user hardly meant."""
    return _notes_of_alignment(config) if isinstance(config, AlignConfig) else _notes_of_training(config)


def _notes_of_alignment(config: AlignConfig) -> list[str]:
    updates = config.iterations * config.learner.updates_per_iteration
    notes = [*_recorded_length(config.model), *_other_family("model", config.model)]
    optimizer = config.learner.optimizer
    notes += _rates("learner.optimizer", optimizer.learning_rate, optimizer.final_learning_rate)
    decayed = max(optimizer.learning_rate, optimizer.final_learning_rate)
    notes += _decay("learner.optimizer.weight_decay", optimizer.weight_decay, decayed)
    notes += _warm_up("learner.optimizer.warmup_steps", config.learner.optimizer.warmup_steps, updates, "updates")
    notes += _ends_learning(config.learner.optimizer, updates)
    notes += _keeps_no_best(config)
    if "every" in config.checkpoint.model_fields_set:
        notes += _only_last("checkpoint.every", config.checkpoint.every, config.iterations, "iterations", "is saved")
    return notes


def _ends_learning(optimizer: OptimizerConfig, updates: int) -> list[str]:
    decay = optimizer.decay_steps
    if decay is None or decay >= updates or optimizer.final_learning_rate:
        return []
    return [
        f"learner.optimizer.decay_steps: {decay} of {updates} updates; after them the learning rate is "
        "final_learning_rate, 0, and nothing is learned"
    ]


def _keeps_no_best(config: AlignConfig) -> list[str]:
    """Note a metric of evaluations in a run without any; the first of them tells which ones they measure."""
    metric = config.checkpoint.best_metric
    if metric is None or not metric.startswith("eval/") or config.evaluation.every or not config.checkpoint.keep_best:
        return []
    return [f"checkpoint.best_metric: {metric} is not measured (evaluation.every: 0); no best checkpoint is kept"]


def _notes_of_training(config: PretrainConfig) -> list[str]:
    steps = sum(phase.steps for phase in config.phases)
    notes = [*_text_length(config), *_other_family("model", config.model)]
    notes += [] if config.teacher is None else _other_family("teacher", config.teacher)
    for i, phase in enumerate(config.phases):
        notes += _rates(f"phases.{i}", phase.learning_rate, phase.final_learning_rate)
    rates = [rate for phase in config.phases for rate in (phase.learning_rate, phase.final_learning_rate)]
    notes += _decay("weight_decay", config.weight_decay, max(rates))
    notes += _warm_up("warmup_steps", config.warmup_steps, steps, "steps")
    notes += _only_last("log_every", config.log_every, steps, "steps", "is logged")
    if "checkpoint_every" in config.model_fields_set:
        notes += _only_last("checkpoint_every", config.checkpoint_every, steps, "steps", "is saved")
    if config.validation is not None:
        notes += _only_last("validation.every", config.validation.every, steps, "steps", "is validated")
    if config.ema_every > steps:
        notes.append(f"ema_every: {config.ema_every} of {steps} steps; the average stays what the run begins with")
    return notes


def _other_family(key: str, model: ModelConfig) -> list[str]:
    """Note a network that was trained as one family and is read as another.

    A fresh one is of the family that it is given.
    """
    own = str(recorded_model(Path(model.path), f"{key}.path").get("family", "rf"))
    with suppress(ValueError):  # a family of another version of this project is another one
        own = canonical(own)
    if model.transformer is not None or model.family in (None, own):
        return []
    return [
        f"{key}.family: {shipped_names(model.path)} is a model of {own}; its output is read as {model.family}"
        + (", for which a fresh network (model.transformer) is the usual beginning" if key == "model" else "")
    ]


def _recorded_length(model: ModelConfig) -> list[str]:
    """Note that the default text length is not the one that the directory records."""
    own = recorded_model(Path(model.path)).get("max_sequence_length", model.max_sequence_length)
    if "max_sequence_length" in model.model_fields_set or own == model.max_sequence_length:
        return []
    return [
        f"model.max_sequence_length: {model.max_sequence_length}, the default; {shipped_names(model.path)} was made "
        f"for {own}"
    ]


def _text_length(config: PretrainConfig) -> list[str]:
    """Note a text length that was written and that the last phase never draws."""
    asked, taken = config.model.max_sequence_length, config.model_as_trained.max_sequence_length
    if asked == taken or "max_sequence_length" not in config.model.model_fields_set:
        return []
    return [
        f"model.max_sequence_length: {asked} is no length that the last phase trains (max_sequence_lengths); the model "
        f"is validated, sampled and exported with {taken}"
    ]


def _rates(section: str, rate: float, final: float) -> list[str]:
    moves = "AdamW moves every weight by about as much in one update, where 1e-5 to 1e-3 is usual"
    rates = {"learning_rate": rate} | ({"final_learning_rate": final} if final != rate else {})
    return [f"{section}.{key}: {value:g}; {moves}" for key, value in rates.items() if value > MAX_RATE]


def _decay(key: str, decay: float, rate: float) -> list[str]:
    said = f"{key}: {decay:g}; at learning rate {rate:g} AdamW takes {decay * rate:.2g} of every weight in one update"
    return [said] if decay * rate > MAX_DECAY else []


def _warm_up(key: str, warmup: int, run: int, unit: str) -> list[str]:
    said = f"{key}: {warmup} of {run} {unit}; the learning rate never gets beyond its warm-up"
    return [said] if warmup >= run > 0 and warmup > 1 else []


def _only_last(key: str, every: int, run: int, unit: str, what: str) -> list[str]:
    return [f"{key}: {every} of {run} {unit}; only the last of them {what}"] if every >= run > 1 else []
