"""Notes on settings that a run may have and the user hardly meant."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from flowalign.config.alignment import AlignConfig
from flowalign.config.pathfamilies import canonical
from flowalign.config.prompts import HUB, SHAPES, source_of
from flowalign.config.run import RunConfig
from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.config.updates import OptimizerConfig
from flowalign.intake.check_scores import notes_of_scores
from flowalign.intake.notes_of_walks import notes_of_walks
from flowalign.intake.paths import shipped_names
from flowalign.models.recorded import recorded_model
from flowalign.record.textfiles import is_there

MAX_RATE = 0.1  # beyond which a learning rate of AdamW hardly was meant
MAX_DECAY = 0.1  # the same of weight decay times learning rate
OF_ACTORS = (  # without reward_gpus, by which one process scores on its device as well
    "address",
    "rollout_workers",
    "reward_workers",
    "rollout_gpus",
    "learner_gpus",
)


def notes_of(config: RunConfig) -> list[str]:
    """Return a sentence for each setting that a run may have and the user hardly meant."""
    of_all = [*_unused_evaluation(config), *_unused_cluster(config), *_no_host(config)]
    if isinstance(config, AlignConfig):
        return [*_notes_of_alignment(config), *of_all]
    return [*_notes_of_training(config), *of_all] if isinstance(config, PretrainConfig) else of_all


def _unused_evaluation(config: RunConfig) -> list[str]:
    """Note what is asked of evaluations in a run that makes none."""
    evaluation, kept = config.evaluation, config.checkpoint
    if evaluation.every:
        return []
    notes = []
    meant = "keep_best" in kept.model_fields_set or evaluation.scorer is not None
    if kept.keep_best and kept.best_metric is None and meant:
        notes.append(
            f"checkpoint.keep_best: {kept.keep_best}, and evaluation.every is 0, so that nothing says which are best; "
            "no best checkpoint is kept"
        )
    prompts = None if evaluation.prompts is None else source_of(evaluation.prompts)
    if prompts is not None and not prompts.startswith((SHAPES, HUB)) and not is_there(Path(prompts)):
        notes.append(f"evaluation.prompts: {prompts} does not exist; evaluation.every is 0, and nothing reads it")
    return notes


def _evaluated_by_default(config: AlignConfig) -> list[str]:
    """Note evaluations on the prompts of the embedded world that nobody named, of another model with other data."""
    evaluation, data = config.evaluation, config.data
    own = data.preferences is not None or not source_of(data.prompts).startswith(SHAPES)
    if not own or not evaluation.every or "prompts" in evaluation.model_fields_set:
        return []
    if Path(config.model.path) == SHIPPED / "pipeline":
        return []
    judge = "" if evaluation.judge is None else f", judged by {evaluation.judge.label}"
    return [
        f"evaluation.prompts: nothing is given, so evaluations draw {evaluation.num_samples} samples of the embedded "
        f"world's prompts{judge}; give evaluation.prompts and evaluation.scorer, or evaluation.every: 0"
    ]


def _unused_cluster(config: RunConfig) -> list[str]:
    """Note the keys of Ray's actors that are set where no actor is started."""
    cluster = config.cluster
    if cluster.backend != "local":
        return []
    given = [name for name in OF_ACTORS if getattr(cluster, name) != type(cluster).model_fields[name].default]
    if not given:
        return []
    named = ", ".join(f"cluster.{name}" for name in given)
    return [f"{named}: of Ray's actors; with cluster.backend=local there are none, and nothing reads it"]


def _no_host(config: RunConfig) -> list[str]:
    """Note pinned memory where there is no other."""
    if config.learner.offload != "host" or config.device != "cpu":
        return []
    return ["learner.offload: host is memory beside a GPU's, and on a CPU the same as none; disk takes less"]


def _notes_of_alignment(config: AlignConfig) -> list[str]:
    updates = config.iterations * config.learner.updates_per_iteration
    notes = [*_recorded_length(config.model), *_other_family("model", config.model)]
    notes += notes_of_walks(config)
    optimizer = config.learner.optimizer
    notes += _rates("learner.optimizer", optimizer.learning_rate, optimizer.final_learning_rate)
    decayed = max(optimizer.learning_rate, optimizer.final_learning_rate)
    notes += _decay("learner.optimizer.weight_decay", optimizer.weight_decay, decayed)
    notes += _warm_up("learner.optimizer.warmup_steps", config.learner.optimizer.warmup_steps, updates, "updates")
    notes += _ends_learning(config.learner.optimizer, updates)
    notes += [*_evaluated_by_default(config), *_keeps_no_best(config), *notes_of_scores(config)]
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
    steps, learner = config.total, config.learner
    notes = [*_text_length(config), *_other_family("model", config.model)]
    notes += [] if config.teacher is None else _other_family("teacher", config.teacher)
    for i, phase in enumerate(config.phases):
        notes += _rates(f"phases.{i}", phase.learning_rate, phase.final_learning_rate)
    if not config.phases:
        notes += _rates("learner.optimizer", learner.optimizer.learning_rate, learner.optimizer.final_learning_rate)
        notes += _ends_learning(learner.optimizer, steps)
    rates = [rate for phase in config.stretches for rate in (phase.learning_rate, phase.final_learning_rate)]
    notes += _decay("learner.optimizer.weight_decay", learner.optimizer.weight_decay, max(rates))
    notes += _warm_up("learner.optimizer.warmup_steps", learner.optimizer.warmup_steps, steps, "iterations")
    if not config.evaluation.every and config.validation is None:  # which have rows of their own
        notes += _only_last("logging.every", config.logging.every, steps, "iterations", "is logged")
    if "every" in config.checkpoint.model_fields_set:
        notes += _only_last("checkpoint.every", config.checkpoint.every, steps, "iterations", "is saved")
    if config.validation is not None:
        notes += _only_last("validation.every", config.validation.every, steps, "iterations", "is validated")
    if learner.ema_every > steps:
        notes.append(
            f"learner.ema_every: {learner.ema_every} of {steps} iterations; the average stays what the run begins with"
        )
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
