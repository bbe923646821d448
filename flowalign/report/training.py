"""The page of a training run on latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from flowalign.config.guidance import guidance_facts, said_guidance
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PhaseConfig, PretrainConfig, TrainingLearnerConfig, ValidationConfig
from flowalign.report import figures
from flowalign.report.evaluations import Evaluations
from flowalign.report.metrics import WINDOW, Row, done, finite, iterations, known, mean, wall_s
from flowalign.report.page import (
    Change,
    Chart,
    Headline,
    Page,
    SmallCurves,
    Tile,
    duration,
    number,
    significant,
    small_curves,
)
from flowalign.report.samples import read_gallery

VALIDATED = {"validation": "weights", "validation_ema": "average"}
NOTHING = "No iteration has finished yet"
ON_THE_WAY = 3  # sets of samples between the first and the last
MOST_TIMES = 8  # curves of the validation loss at one time each
CURVES = {
    "learning_rate": ("Learning rate", "Of the iteration's update."),
    "grad_norm": ("Gradient norm", "Before clipping."),
    "throughput/samples_per_s": ("Throughput", "Latents a second, since the row before."),
}


def page_of(config: PretrainConfig, rows: Sequence[Row], run_dir: Path) -> Page:
    """Return what the page says of the run: its loss, and what validation and evaluations measured, where it has
    them."""
    trained = [row for row in rows if row["iteration"] > 0]
    evaluations = Evaluations(rows, config.evaluation.judge)
    settings = _settings(config)
    curves = small_curves(trained, CURVES)
    how = "The optimizer and the speed, row by row of the metrics."
    return Page(
        kind="training",
        about=_about(config, settings),
        done=done(trained),
        total=config.total,
        headline=_headline(config, trained, evaluations),
        tiles=_tiles(config, rows, trained),
        learned="The loss is that of single iterations, each with its own latents, noises and times, so it scatters. "
        "Validation has latents, noises and times of its own, the same each time.",
        charts=_charts(config, trained, evaluations),
        scores=evaluations.scores(settings.get("Evaluation", "")),
        gallery=read_gallery(run_dir, evaluations.main, between=ON_THE_WAY),
        curves=SmallCurves("How it went", how, curves) if curves else None,
        settings=settings,
    )


def _about(config: PretrainConfig, settings: Mapping[str, str]) -> str:
    taught = f", taught by {settings['Teacher']}" if config.teacher is not None else ""
    return f"{settings['Model']}, trained with {settings['Algorithm']} on {settings['Latents']}{taught}."


def _headline(config: PretrainConfig, trained: Sequence[Row], evaluations: Evaluations) -> Headline:
    later = "" if done(trained) >= config.total else " yet"
    held = [row for row in trained if any(finite(row.get(f"{name}/loss")) is not None for name in VALIDATED)]
    validated = [_change(f"validation, {of}", trained, f"{name}/loss", 1) for name, of in VALIDATED.items()]
    others = [change for change in validated if change.after is not None] + evaluations.changes(later)
    since = [f"validated after {_span(held[:1])} and {_span(held[-1:])} iterations"] if len(held) > 1 else []
    since += [f"evaluated {evaluations.since()}"] if evaluations.since() else []
    return Headline(_change("Training loss", trained, "loss", WINDOW), others, "; ".join(since))


def _change(name: str, rows: Sequence[Row], key: str, most: int) -> Change:
    """Return the mean of the first values of ``key`` against that of the last, of ``most`` each; less is better."""
    held = [row for row in rows if finite(row.get(key)) is not None]
    values, count = known(held, key), min(most, len(held) // 2)
    if not held:
        return Change(name, None, None, said=NOTHING if not rows else "not in the metrics")
    if not count:
        return Change(name, None, significant(values[0]), said=f"at iteration {held[0]['iteration']}")
    before, after = (sum(part) / count for part in (values[:count], values[-count:]))
    first, last = _span(held[:count]), _span(held[-count:])
    said = f"means of iterations {first} and {last}" if count > 1 else f"iterations {first} and {last}"
    gain = significant(after - before, "+")
    return Change(name, significant(before), significant(after), gain, after <= before, said if most > 1 else "")


def _span(rows: Sequence[Row]) -> str:
    """Say of which iterations rows are."""
    first, last = rows[0]["iteration"], rows[-1]["iteration"]
    return str(first) if first == last else f"{first} to {last}"


def _tiles(config: PretrainConfig, rows: Sequence[Row], trained: Sequence[Row]) -> list[Tile]:
    return [
        Tile(str(done(trained)), f"iterations of {config.total}"),
        Tile(f"{config.learner.batch_size * done(trained):,}", "latents learned from"),
        Tile(duration(wall_s(rows)), "wall time"),
        Tile(number(mean(known(trained, "throughput/samples_per_s")), 1), "latents per second"),
    ]


def _charts(config: PretrainConfig, trained: Sequence[Row], evaluations: Evaluations) -> list[Chart]:
    validation, by_time = _validation_chart(trained), _chart_by_time(trained)
    scores = [evaluations.chart(wide=validation is not None)] if evaluations.rows else []
    if validation is None and not scores:
        every = config.validation
        why = "This run has no validation." if every is None else f"It validates every {every.every} iterations."
        validation = Chart("Validation loss", None, why)
    return [_loss_chart(trained), *filter(None, (validation, by_time)), *scores]


def _loss_chart(trained: Sequence[Row]) -> Chart:
    """Draw the loss and its parts, without those that are equal to the whole."""
    series = _series(trained, {"loss": "loss"})
    parts = sorted({key for row in trained for key in row if key.startswith("loss/")})
    found = _series(trained, {key.removeprefix("loss/"): key for key in parts})
    series |= {name: values for name, values in found.items() if values not in series.values()}
    bold = "loss" if len(series) > 1 else None
    label = "loss of an iteration"
    figure = figures.lines(iterations(trained), series, bold=bold, label=label, steep=True) if series else None
    return Chart("Loss while training", figure, f"{NOTHING}.")


def _validation_chart(trained: Sequence[Row]) -> Chart | None:
    """Draw the loss on the validation's own latents; None where there is none."""
    named = {of: f"{name}/loss" for name, of in VALIDATED.items()}
    figure = _sparse(trained, named, "loss on the same latents, noises and times")
    return None if figure is None else Chart("Validation loss", figure)


def _chart_by_time(trained: Sequence[Row]) -> Chart | None:
    """Draw the validation loss of the average at some times apart; None where there is none."""
    prefix = "validation_ema/loss_t"
    keys = sorted({key for row in trained for key in row if key.startswith(prefix)})
    named = {f"t = {key.removeprefix(prefix)}": key for key in keys[:: math.ceil(len(keys) / MOST_TIMES) or 1]}
    label = "loss of the average; t = 0: the image, t = 1: the noise"
    figure = _sparse(trained, named, label, wide=True)
    return None if figure is None else Chart("Validation loss by time", figure, wide=True)


def _sparse(trained: Sequence[Row], named: Mapping[str, str], label: str, *, wide: bool = False) -> Markup | None:
    """Draw values that only some rows have, over those; None where none has."""
    rows = [row for row in trained if any(key in row for key in named.values())]
    series = _series(rows, named)
    return figures.lines(iterations(rows), series, label=label, wide=wide, steep=True) if series else None


def _series(rows: Sequence[Row], named: Mapping[str, str]) -> dict[str, list[float | None]]:
    """Return the values of each key by its name, where it has any."""
    found = {name: [finite(row.get(key)) for row in rows] for name, key in named.items()}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def _settings(config: PretrainConfig) -> dict[str, str]:
    """Return the settings that a reader asks for first."""
    learner, validation = config.learner, config.validation
    at_once = f", {learner.micro_batch_size} at once" if learner.micro_batch_size else ""
    shown = {
        "Algorithm": str(config.algorithm["type"]),
        "Model": _model(config.model),
        "Teacher": "" if config.teacher is None else _model(config.teacher),
        "Latents": _latents(config),
        "Batch": f"{learner.batch_size} latents{at_once}",
        "Learning rate": "; ".join(map(_phase, config.phases)) or _rate(config),
        "Average": "decay " + ", ".join(f"{decay:g}" for decay in learner.ema_decays),
        "Validation": "" if validation is None else _validation(validation),
        "Evaluation": _evaluation(config),
        "Seed": str(config.seed),
        "Backend": f"{config.cluster.backend}, {_engine(learner)} on {config.device}",
    }
    return {name: value for name, value in shown.items() if value}


def _engine(learner: TrainingLearnerConfig) -> str:
    ranks = f" of {learner.ranks} ranks" if learner.ranks > 1 else ""
    return f"{learner.engine} learner{ranks}, {learner.dtype}{', compiled' if learner.compiles else ''}"


def _model(model: ModelConfig) -> str:
    fresh = model.transformer
    began = "" if fresh is None else f", a fresh {fresh.architecture} of {fresh.num_layers} layers"
    return " · ".join(filter(None, [model.type, f"{Path(model.path).name}{began}"]))


def _latents(config: PretrainConfig) -> str:
    real = config.real_data
    mixed = "" if real is None else f" with {real.fraction:.0%} of {Path(real.latents).name}"
    return f"{Path(config.latents).name}{mixed}"


def _phase(phase: PhaseConfig) -> str:
    falls = phase.final_learning_rate != phase.learning_rate
    to = f" → {phase.final_learning_rate:g}" if falls else ""
    return f"{phase.learning_rate:g}{to} in {phase.iterations} iterations"


def _rate(config: PretrainConfig) -> str:
    own = config.learner.optimizer
    falls = f", {own.decay} to {own.final_learning_rate:g} in {own.decay_steps} iterations" if own.decay_steps else ""
    return f"{own.learning_rate:g}{falls}"


def _validation(own: ValidationConfig) -> str:
    return f"{own.num_samples} latents of {Path(own.latents).name}, every {own.every} iterations"


def _evaluation(config: PretrainConfig) -> str:
    own = config.evaluation
    prompts = "captions of the latents" if own.prompts is None else own.prompts
    how = f"{own.num_steps} steps, {said_guidance(guidance_facts(own))}, seed {own.seed}"
    return f"{own.num_samples} samples of {prompts}, every {own.every} iterations, {how}" if own.every else ""
