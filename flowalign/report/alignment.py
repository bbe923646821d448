"""The page of an alignment run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowalign.algorithms import shipped_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.guidance import guidance_facts, said_guidance
from flowalign.config.sections import RewardConfig
from flowalign.report import alarms, figures
from flowalign.report.evaluations import Evaluations, geneval_mode
from flowalign.report.metrics import WINDOW, Row, done, iterations, known, mean, wall_s
from flowalign.report.page import (
    Change,
    Chart,
    Headline,
    Page,
    SmallCurves,
    Tile,
    Times,
    digits_of,
    duration,
    number,
    signed,
    small_curves,
)
from flowalign.report.samples import read_gallery
from flowalign.safety.collapse import stopped_by_alarm
from flowalign.shapes.prompts import TASKS

PHASES = ("rollout", "score", "learn", "sync", "idle")
HEALTH = {
    "replay/max_abs_dlogp": (
        "Replay error",
        "Largest difference between the log-prob of the rollout and the learner's own, at the first update. "
        "0 means that the learner sees exactly what was sampled.",
    ),
    "ratio/mean": ("Mean ratio", "New over old probability of a step; stays close to 1."),
    "ratio/clip_fraction": ("Clipped", "Share of steps whose ratio hit the clip range."),
    "zero_std_fraction": ("Equal-reward groups", "Share of groups that teach nothing, as all their rewards are equal."),
    "dpo/implicit_accuracy": ("Pairs ranked right", "Share whose winner the policy prefers, against the reference."),
    "dpo/margin": ("Margin", "By how much, as a log-odds."),
    "loss/kl": ("KL to the reference", "How far the policy has moved from where it began."),
    "grad_norm": ("Gradient norm", "Before clipping."),
    "collapse/diversity": ("Diversity", "Mean distance between the images of a group."),
    "collapse/best_of_group": ("Best of a group", "Mean over the groups of the best reward in each."),
    "collapse/saturation": ("Colour saturation", "Mean over the pixels of all images, 0 to 1."),
    "reward/invalid_fraction": ("Invalid rewards", "Share of samples whose reward was masked, never counted as 0."),
}


def page_of(config: AlignConfig, rows: Sequence[Row], run_dir: Path) -> Page:
    """Return what the page says of the run: the reward that it was trained on beside what its evaluations measured."""
    trained = [row for row in rows if row["iteration"] > 0]
    evaluations = Evaluations(rows, config.evaluation.judge, config.rewards)
    settings = _settings(config)
    rewarded = f" on {_trained_terms(config)}" if config.rewards else ""
    measured = "Training reward is measured on each iteration's own images, noise and all; the" if rewarded else "The"
    health = small_curves(trained, HEALTH)
    trust = "What goes wrong first in this kind of training, iteration by iteration."
    return Page(
        kind="alignment",
        about=f"{settings['Model']}, aligned with {settings['Algorithm']} ({settings['Trained']}){rewarded}.",
        done=done(trained),
        total=config.total,
        headline=_headline(config, trained, evaluations),
        tiles=_tiles(config, rows, trained),
        learned=f"{measured} evaluation has {_prompts_of_evaluations(config)}, fixed seeds and a sampler without "
        "noise, before, during and after.",
        charts=[_training_chart(config, trained), evaluations.chart(), *_curriculum_charts(trained)],
        scores=evaluations.scores(settings["Evaluation"]),
        gallery=read_gallery(run_dir, evaluations.main),
        times=_times(trained),
        curves=SmallCurves("Can it be trusted?", trust, health) if health else None,
        settings=settings,
        hacked=alarms.hacked(trained),
        collapsed=alarms.collapsed(trained, config.safety),
        stopped=stopped_by_alarm(run_dir, config.safety),
    )


def _prompts_of_evaluations(config: AlignConfig) -> str:
    same = config.evaluation.prompts == config.data.prompts
    return "prompts that are trained on" if same else "its own prompts"


def _headline(config: AlignConfig, trained: Sequence[Row], evaluations: Evaluations) -> Headline:
    later = "" if done(trained) >= config.total else " yet"
    reward = trained_reward(config, trained)
    if reward is None:
        return Headline(evaluations.main_change(later))
    before, gain = reward["before"], reward["gain"]
    digits = digits_of(gain)
    main = Change(
        f"Trained on: {reward['name']}",
        None if before is None else number(before, digits),
        number(reward["after"], digits),
        "" if gain is None else signed(gain, digits),
        (gain or 0) >= 0,
        f"on its own images, {reward['over']}",
    )
    return Headline(main, evaluations.changes(later), evaluations.since() if evaluations.rows else "not evaluated")


def trained_reward(config: AlignConfig, trained: Sequence[Row]) -> dict[str, Any] | None:
    """Return the means of ``reward/total/mean`` over the first and the last iterations.

    It is None where nothing is rewarded.
    """
    values = known(trained, "reward/total/mean")
    terms = [
        (_trained_on(reward, score), weight) for reward in config.rewards for score, weight in reward.terms.items()
    ]
    if not terms or not values:
        return None
    plain = len(terms) == 1 and terms[0][1] == 1
    name = " + ".join(score + ("" if plain else f" × {weight:g}") for score, weight in terms)
    count = min(WINDOW, len(values) // 2)
    if not count:
        return {"name": name, "before": None, "after": values[0], "gain": None, "over": "one iteration"}
    parts = values[:count], values[-count:]
    before, after = (sum(part) / count for part in parts)
    over = "first and last iteration"
    if count > 1:  # iterations draw prompts of their own, so that their means are independent
        errors = " and ".join(f"± {statistics.stdev(part) / math.sqrt(count):.3f}" for part in parts)
        over = f"means of the first and last {count} iterations, {errors}"
    return {"name": name, "before": before, "after": after, "gain": after - before, "over": over}


def _trained_on(reward: RewardConfig, score: str) -> str:
    main = score == reward.label and reward.spec == "geneval"
    return f"{score}, {geneval_mode(reward)}" if main else score


def _weighted(reward: RewardConfig) -> list[str]:
    """Return the scores that are trained on with their weights, then the main score where it is measured alone."""
    kind = "gold" if reward.gold else "measured only"
    measured = [] if reward.label in reward.terms else [f"{reward.label} ({kind})"]
    return [f"{score} × {weight:g}" for score, weight in reward.terms.items()] + measured


def _trained_terms(config: AlignConfig) -> str:
    """Return what is trained on: each score with its weight, and that they are normalized alone where they are."""
    terms = [f"{score} × {weight:g}" for reward in config.rewards for score, weight in reward.terms.items()]
    alone = len(terms) > 1 and _normalize(config) == "per_reward"
    return ", ".join(terms) + (", each normalized alone" if alone else "")


def _normalize(config: AlignConfig) -> str | None:
    """Return which of several rewards' advantages are normalized; None where the algorithm has no such option."""
    algorithm = shipped_algorithm(config.algorithm)
    found = config.algorithm.get("normalize")
    return found if algorithm is None else getattr(algorithm.config, "normalize", None)


def _group_size(config: AlignConfig) -> int | None:
    """Return the images of a group.

    For an algorithm of the user's, whose code a report does not run, its options say it.
    """
    algorithm, written = shipped_algorithm(config.algorithm), config.algorithm.get("group_size")
    if algorithm is not None:
        return algorithm.needs.group_size
    return None if written is None else int(written)


def _tiles(config: AlignConfig, rows: Sequence[Row], trained: Sequence[Row]) -> list[Tile]:
    groups = sum(config.data.groups_per_iteration + int(row.get("refill/groups") or 0) for row in trained)
    images = 0 if config.data.preferences is not None else groups * (_group_size(config) or 1)
    return [
        Tile(str(done(trained)), f"iterations of {config.total}"),
        Tile(f"{images:,}", f"images made{' and scored' if config.rewards else ' for training'}"),
        Tile(duration(wall_s(rows)), "wall time"),
        Tile(number(mean(known(trained, "throughput/images_per_s")), 1), "images per second"),
    ]


def _training_chart(config: AlignConfig, trained: Sequence[Row]) -> Chart:
    """Draw each reward and their total; where nothing is rewarded, the losses."""
    title = "Reward while training" if config.rewards else "Losses while training"
    keys = sorted({key for row in trained for key in row if key.startswith("reward/") and key.endswith("/mean")})
    if len(keys) == 2 and "reward/total/mean" in keys:
        keys.remove("reward/total/mean")
    # A name may have slashes, as that of a server is its address.
    named = {key.removeprefix("reward/").removesuffix("/mean"): key for key in keys}
    label = "mean reward of an iteration's images"
    if not named:
        losses = sorted({key for row in trained for key in row if key.startswith("loss/")})
        named, label = {key.removeprefix("loss/"): key for key in losses}, "mean loss of an iteration"
    curves = {name: [row.get(key) for row in trained] for name, key in named.items()}
    bold = "total"
    if alone := [name for name, values in curves.items() if name != bold and values == curves.get(bold)]:
        curves.pop(bold)  # it would lie on the curve of the one reward that is trained on
        bold = alone[0]
    figure = figures.lines(iterations(trained), curves, bold=bold, label=label) if curves else None
    return Chart(title, figure, "No iteration has finished yet.")


def _curriculum_charts(trained: Sequence[Row]) -> list[Chart]:
    """Draw each task's pass rate and its share of the groups; nothing without a curriculum."""
    rates, shares = (_by_task(trained, what) for what in ("pass_rate", "share"))
    found = []
    if rates:
        images = {"images of the iteration": [row.get("curriculum/pass_rate") for row in trained]}
        label = "estimated pass rate of a task's prompts"
        figure = figures.lines(iterations(trained), images | rates, bold=next(iter(images)), label=label)
        found.append(Chart("Pass rate by task", figure))
    if shares:
        label = "share of the next iteration's groups"
        found.append(Chart("Share of the groups by task", figures.lines(iterations(trained), shares, label=label)))
    return found


def _by_task(trained: Sequence[Row], what: str) -> dict[str, list[float | None]]:
    """Return the values of ``curriculum/<task>/<what>`` by task; a name may have slashes."""
    head, end = "curriculum/", f"/{what}"
    keys = sorted({key for row in trained for key in row if key.startswith(head) and key.endswith(end)})
    held = {key[len(head) : -len(end)]: key for key in keys if len(key) > len(head) + len(end)}
    tasks = [task for task in TASKS if task in held] + [task for task in held if task not in TASKS]
    return {task.replace("_", " "): [row.get(held[task]) for row in trained] for task in tasks}


def _times(trained: Sequence[Row]) -> Times | None:
    """Return the mean seconds and share of each phase."""
    if not trained:
        return None
    means = {phase: mean(known(trained, f"time/{phase}_s")) for phase in PHASES}
    total = sum(seconds for seconds in means.values() if seconds is not None)
    shares = [
        {"name": phase, "seconds": seconds, "share": seconds / total, "color": color}
        for (phase, seconds), color in zip(means.items(), figures.COLORS, strict=False)
        if seconds is not None and total > 0
    ]
    seconds = {phase: [row.get(f"time/{phase}_s") for row in trained] for phase in PHASES}
    return Times(shares, figures.stacked(iterations(trained), seconds, label="seconds an iteration"))


def _settings(config: AlignConfig) -> dict[str, str]:
    """Return the settings that a reader asks for first."""
    algorithm, lora, e = config.algorithm, config.model.lora, config.evaluation
    group, pairs = _group_size(config), config.data.preferences
    optimizer, guided = config.learner.optimizer, said_guidance(guidance_facts(e))
    normalize, by = _normalize(config), config.data.curriculum
    weights = ", ".join(f"{task} × {weight}" for task, weight in config.data.task_weights.items())
    return {
        "Algorithm": str(algorithm["type"]),
        "Model": " · ".join(filter(None, [config.model.type, Path(config.model.path).name])),
        "Trained": "all transformer weights" if lora is None else lora.described,
        "Rewards": ", ".join(said for reward in config.rewards for said in _weighted(reward)),
        **({"Normalize": str(normalize)} if normalize is not None and config.rewards else {}),
        "Batch": f"{config.data.groups_per_iteration} "
        + ("pairs" if pairs else "groups" + (f" of {group} images" if group else "")),
        "Learning rate": f"{optimizer.learning_rate:g}",
        **({"Training pairs": Path(pairs).name} if pairs else {"Training prompts": str(config.data.prompts)}),
        **({"Task weights": weights} if weights and not pairs else {}),
        **({"Curriculum": f"{by.score} of {by.threshold:g} or more passes, floor {by.floor:g}"} if by else {}),
        "Evaluation": f"{e.num_samples} samples of {e.prompts}, {e.num_steps} steps, {guided}, seed {e.seed}"
        if e.every
        else "none",
        "Seed": str(config.seed),
        "Backend": f"{config.cluster.backend}, {config.learner.engine} learner on {config.cluster.device}",
    }
