"""Checks of what a model is trained on, and how."""

from __future__ import annotations

import os
from pathlib import Path

from flowalign.algorithm import Algorithm, Needs
from flowalign.config.pathfamilies import formulation, may_learn
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.config.updates import UpdatesConfig
from flowalign.models.directory import network_inputs, open_directory
from flowalign.models.errors import ModelError
from flowalign.record.textfiles import TextError, read_object


def check_rollouts(model: ModelConfig) -> None:
    """Check that a model's noise reaches t = 1, where rollouts begin."""
    path_family = model.family or "rf"
    if not formulation(path_family).begins_with_noise:
        advice = "train it on as rf first (flowalign pretrain with algorithm.family=rf)"
        raise ConfigError(
            "model.family",
            f"is {path_family}, whose noise ends before t = 1 where rollouts begin; "
            + (advice if may_learn(path_family, "rf") else "align a model of rf or v/cos"),
        )


def check_banks(config: PretrainConfig) -> None:
    """Check that the latents are there."""
    banks = {"latents": config.latents}
    banks |= {} if config.real_data is None else {"real_data.latents": config.real_data.latents}
    banks |= {} if config.validation is None else {"validation.latents": config.validation.latents}
    for key, bank in banks.items():
        whole = (Path(bank) / "manifest.json").is_file() or (Path(bank) / "latents.safetensors").is_file()
        if not whole or not (Path(bank) / "prompts.json").is_file():
            raise ConfigError(key, f"{bank} holds no latents; make them first, with flowalign precompute or make-pairs")


def check_training(config: PretrainConfig, needs: Needs) -> None:
    """Check that algorithm, network and teacher fit together."""
    if not config.total:
        raise ConfigError("iterations", "is missing; give it, or phases with their own")
    _check_captions(config)
    name = config.algorithm["type"]
    if needs.second is not None:
        raise ConfigError("algorithm.type", f"{name} trains a second network, which `flowalign align` alone does")
    if needs.reward:
        raise ConfigError("algorithm.type", f"{name} learns by rewards, which `flowalign align` alone has")
    if needs.teacher and config.teacher is None:
        raise ConfigError("teacher", f"is missing; {name} learns from one, give teacher.path")
    if config.teacher is not None and not needs.teacher:
        raise ConfigError("teacher", f"{name} learns from none; leave it out")
    _check_inputs(config.model, needs, name)
    network, learned = config.model.family or "rf", needs.path_family
    if not may_learn(network, learned):
        raise ConfigError("model.family", f"is {network}, which cannot learn {learned}; name the same in both")
    check_signed_time(config.model, needs, name)
    _check_best(config)


def _check_inputs(model: ModelConfig, needs: Needs, name: str) -> None:
    """Check that the network takes the numbers that an algorithm tells it: by ``model.inputs``, or by its class."""
    given = model.inputs or ()
    if not (lacking := [key for key in needs.inputs if key not in given]):
        return
    try:
        family, takes = open_directory(model).family, network_inputs(model)
    except ModelError:  # of a model that is not there, which is said elsewhere
        return
    if not (lacking := [key for key in lacking if key not in takes]):
        return
    if family.inputs is None:
        raise ConfigError(
            "model.path",
            f"{name} with these options needs a network that takes {lacking[0]}, and that of this {family.title} takes "
            "none and can be given none; name another model, or leave the option out",
        )
    raise ConfigError("model.inputs", f"{name} needs a network that takes {lacking[0]}; add it to the list")


def _check_captions(config: PretrainConfig) -> None:
    """Check that the bank has the kinds of captions that are asked for, where its manifest lists them."""
    manifest = Path(config.latents) / "manifest.json"
    try:
        has = (
            [str(kind) for kind in read_object(manifest)["captions"]] if config.captions and manifest.is_file() else []
        )
    except (TextError, KeyError, TypeError):
        return  # which loading the bank says more of
    if unknown := sorted(config.captions.keys() - set(has)) if has else []:
        raise ConfigError(f"captions.{unknown[0]}", f"{config.latents} has no such captions; it has {', '.join(has)}")


def check_ranks(config: PretrainConfig) -> None:
    """Check that the processes which learn are those that the configuration speaks of."""
    learner, started = config.learner, int(os.environ.get("WORLD_SIZE", "1"))
    if learner.engine == "torch" and started > 1:
        raise ConfigError("learner.engine", f"torch is one process, and torchrun has started {started}; use fsdp")
    if config.cluster.backend == "ray" and started > 1:
        raise ConfigError("cluster.backend", f"ray starts its own ranks, and torchrun has started {started}; use local")
    torchrun = f", or torchrun --nproc-per-node={learner.ranks}"
    if (lacking := config.lacking_for_ranks(started, torchrun)) is not None:
        raise ConfigError("learner.ranks", lacking)


def _check_best(config: PretrainConfig) -> None:
    """Check that what chooses the best checkpoints is measured, where any are kept."""
    kept, judge = config.checkpoint, config.evaluation.judge
    if not kept.keep_best:
        return
    if kept.best_metric is None and (judge is None or not config.evaluation.every):
        lacking = "evaluation.scorer" if config.evaluation.every else "evaluation.every"
        raise ConfigError(
            "checkpoint.keep_best",
            f"is {kept.keep_best}, and nothing says which are best; give {lacking}, or checkpoint.best_metric such as "
            "validation/loss",
        )
    metric = kept.best_metric or ""
    if metric.startswith("eval/") and not config.evaluation.every:
        raise ConfigError("checkpoint.best_metric", f"{metric} is not measured; give evaluation.every")
    if metric.startswith(("validation/", "validation_ema/")) and config.validation is None:
        raise ConfigError("checkpoint.best_metric", f"{metric} is not measured; give validation.latents")


def check_signed_time(model: ModelConfig, needs: Needs, name: str) -> None:
    """Refuse times below 0 on any family but the straight path, which alone has them."""
    if needs.signed_time and model.family not in (None, "rf"):
        raise ConfigError("model.family", f"is {model.family}, which has no times below 0, and {name} asks for them")


def check_derivatives(learner: UpdatesConfig, algorithm: Algorithm) -> None:
    """Refuse ZeRO stage 3 to an algorithm that takes the derivative of a network along a direction."""
    calls = algorithm.network_calls
    taken = any(call.derivative for call in (*calls.annotate, *calls.loss, *calls.second_loss))
    if taken and learner.zero_stage == 3:
        raise ConfigError(
            "learner.zero_stage",
            f"is 3, whose linear layers have no derivative forward, which {algorithm.config.type} takes; write 2, or "
            "learner.engine: fsdp",
        )
