"""One self-contained page about a run: what it gained, how it got there, whether it can be trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import resources
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from flowalign.algorithms import shipped_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.record.accepted import changes_of
from flowalign.record.checkpoint import CheckpointError, latest
from flowalign.record.disk import write_text
from flowalign.record.metrics import read_damaged, read_metrics
from flowalign.report import alarms, figures, headline
from flowalign.report.samples import Gallery, inside, read_gallery
from flowalign.safety.collapse import stopped_by_alarm
from flowalign.shapes.prompts import TASKS
from rewards.printable import printable

if TYPE_CHECKING:
    from jinja2 import Template

Row = dict[str, Any]
MOST_ITERATIONS = 10**12
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


def write_report(run_dir: Path, config: AlignConfig, versions: Mapping[str, str]) -> Path:
    """Write ``report.html`` into the run directory, finished or not, and return its path.

    It needs no network. What the run does not have yet (an evaluation, samples, metrics) is said, not drawn.
    """
    run_dir = Path(run_dir)
    by_iteration = {row["iteration"]: row for row in _metrics(run_dir)}
    rows = [by_iteration[iteration] for iteration in sorted(by_iteration)]
    trained = [row for row in rows if row["iteration"] > 0]
    name = headline.main_score(config, rows)
    evaluations = [row for row in rows if f"eval/{name}/overall" in row]
    gallery = read_gallery(run_dir, name)
    html = _template().render(
        config=config,
        settings=_settings(config),
        full_config=list(_yaml(config.model_dump(mode="json"))),
        versions=dict(versions),
        metric=name,
        done=trained[-1]["iteration"] if trained else 0,
        label=headline.named(name, config),
        reward=headline.trained_reward(config, trained),
        evaluated=headline.evaluated(config, name, evaluations),
        facts=_facts(config, rows, trained),
        table=_table(name, evaluations),
        evaluations=evaluations,
        gallery=gallery,
        tally=_tally(gallery),
        **_figures(name, trained, evaluations),
        phases=_phases(trained),
        health=_health(trained),
        hacked=alarms.hacked(trained),
        collapsed=alarms.collapsed(trained, config.safety),
        stopped=stopped_by_alarm(run_dir, config.safety),
        damage=read_damaged(metrics)[1] if inside(metrics := run_dir / "metrics.jsonl", run_dir) else None,
        changes=_changes(run_dir),
    )
    return write_text(run_dir / "report.html", html)


def _template() -> Template:
    """Return the page's template, which marks no text from outside as safe.

    `_shown` writes out what is invisible or turns it around.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
    environment.filters |= {"number": _number, "signed": _signed, "duration": _duration}
    page = resources.files("flowalign.report").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(page)


def _shown(value: Any) -> Any:
    return printable(value) if type(value) is str else value


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows with an iteration, and of them the numbers and nulls: the run may be somebody else's."""
    path = run_dir / "metrics.jsonl"
    if not inside(path, run_dir):
        return []
    rows = [row for row in read_metrics(path) if isinstance(row, dict)]
    whole = [row for row in rows if type(row.get("iteration")) is int and 0 <= row["iteration"] < MOST_ITERATIONS]
    return [{key: value for key, value in row.items() if _may_be_shown(value)} for row in whole]


def _may_be_shown(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST_ITERATIONS)


def _changes(run_dir: Path) -> list[str]:
    """Return the changes between two starts of the run that were accepted."""
    with suppress(CheckpointError, OSError, ValueError):
        newest = latest(run_dir / "checkpoints")
        return [] if newest is None else changes_of(json.loads((newest / "state.json").read_bytes()))
    return []


def _table(name: str, evaluations: list[Row]) -> list[dict[str, Any]]:
    """Return the rows task, before, after, difference; the overall last. Empty where nothing was evaluated."""
    if not evaluations:
        return []
    prefix = f"eval/{name}/"
    held = {key.removeprefix(prefix) for row in evaluations for key in row if key.startswith(prefix)}
    tasks = [task for task in TASKS if task in held] + sorted(held - {*TASKS, "overall"})
    first, last = evaluations[0], evaluations[-1]
    table = []
    for task in [*tasks, "overall"]:
        before = _finite(first.get(prefix + task))
        after = _finite(last.get(prefix + task)) if len(evaluations) > 1 else None
        gain = None if before is None or after is None else after - before
        table.append({"task": task.replace("_", " "), "before": before, "after": after, "gain": gain})
    return table


def _group_size(config: AlignConfig) -> int | None:
    """Return the images of a group.

    For an algorithm of the user's, whose code a report does not run, its options say it.
    """
    algorithm, written = shipped_algorithm(config.algorithm), config.algorithm.get("group_size")
    if algorithm is not None:
        return algorithm.needs.group_size
    return None if written is None else int(written)


def _facts(config: AlignConfig, rows: list[Row], trained: list[Row]) -> dict[str, Any]:
    per_iteration = config.data.groups_per_iteration * (_group_size(config) or 1)
    if config.data.preferences is not None:
        per_iteration = 0
    speeds = [s for row in trained if (s := _finite(row.get("throughput/images_per_s"))) is not None]
    wall = [w for row in rows if (w := _finite(row.get("wall_s"))) is not None]
    return {
        "images": per_iteration * len(trained),
        "wall_s": max(wall, default=None),
        "images_per_s": sum(speeds) / len(speeds) if speeds else None,
    }


def _figures(name: str, trained: list[Row], evaluations: list[Row]) -> dict[str, Markup | None]:
    rewards = sorted({key for row in trained for key in row if key.startswith("reward/") and key.endswith("/mean")})
    if len(rewards) == 2 and "reward/total/mean" in rewards:
        rewards.remove("reward/total/mean")
    losses = sorted({key for row in trained for key in row if key.startswith("loss/")})
    x = [row["iteration"] for row in trained]
    drawn = {
        key.removeprefix("reward/").removesuffix("/mean"): [row.get(key) for row in trained] for key in rewards
    }  # a name may have slashes, as that of a server is its address
    tasks = [task["task"] for task in _table(name, evaluations)]
    curves = {
        task: [row.get(f"eval/{name}/{task.replace(' ', '_')}") for row in evaluations] for task in ["overall", *tasks]
    }
    label = "share of images judged correct" if name in ("geneval", "geneval_strict") else f"mean {name}"
    times = {phase: [row.get(f"time/{phase}_s") for row in trained] for phase in PHASES}
    said = "mean reward of an iteration's images" if drawn else "mean loss of an iteration"
    drawn = drawn or {key.removeprefix("loss/"): [row.get(key) for row in trained] for key in losses}
    return {
        "rewards": figures.lines(x, drawn, bold="total", label=said) if drawn else None,
        "curves": figures.lines([row["iteration"] for row in evaluations], curves, bold="overall", label=label)
        if len(evaluations) > 1
        else None,
        "times": figures.stacked(x, times, label="seconds an iteration") if trained else None,
    }


def _phases(trained: list[Row]) -> list[dict[str, Any]]:
    """Return the mean seconds and share of each phase."""
    means = {phase: _mean(row.get(f"time/{phase}_s") for row in trained) for phase in PHASES}
    total = sum(mean for mean in means.values() if mean is not None)
    return [
        {"name": phase, "seconds": mean, "share": mean / total, "color": color}
        for (phase, mean), color in zip(means.items(), figures.COLORS, strict=False)
        if mean is not None and total > 0
    ]


def _health(trained: list[Row]) -> list[dict[str, Any]]:
    shown = []
    for (key, (title, meaning)), color in zip(HEALTH.items(), cycle(figures.COLORS), strict=False):
        values = [_finite(row.get(key)) for row in trained]
        known = [value for value in values if value is not None]
        if not known:
            continue
        figure = figures.small([row["iteration"] for row in trained], values, color=color, title=title)
        always = known[0] if len(set(known)) == 1 and len(known) > 1 else None
        shown.append(
            {"key": key, "title": title, "meaning": meaning, "figure": figure, "last": known[-1], "always": always}
        )
    return shown


def _settings(config: AlignConfig) -> dict[str, str]:
    """Return the settings that a reader asks for first."""
    algorithm, lora, e = config.algorithm, config.model.lora, config.evaluation
    group, pairs = _group_size(config), config.data.preferences
    optimizer = config.learner.optimizer
    return {
        "Algorithm": str(algorithm["type"]),
        "Model": f"{config.model.type} · {Path(config.model.path).name}",
        "Trained": "all transformer weights" if lora is None else f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}",
        "Rewards": ", ".join(f"{r.label} (gold)" if r.gold else f"{r.label} × {r.weight:g}" for r in config.rewards),
        "Batch": f"{config.data.groups_per_iteration} "
        + ("pairs" if pairs else "groups" + (f" of {group} images" if group else "")),
        "Learning rate": f"{optimizer.learning_rate:g}",
        **({"Training pairs": Path(pairs).name} if pairs else {"Training prompts": config.data.prompts}),
        "Evaluation": f"{e.num_samples} samples of {e.prompts}, {e.num_steps} steps, guidance {e.guidance_scale:g}",
        "Seed": str(config.seed),
        "Backend": f"{config.cluster.backend}, {config.learner.engine} learner on {config.cluster.device}",
    }


def _tally(gallery: Gallery | None) -> dict[str, int]:
    """Return how many of the shown pairs were and became right; empty where verdicts or a second set are missing."""
    if gallery is None or gallery.after is None:
        return {}
    pairs = [(pair.before.right, pair.after.right) for pair in gallery.pairs if pair.after is not None]
    names = {(False, True): "newly right", (True, True): "right both times", (True, False): "newly wrong"}
    names |= {(False, False): "wrong both times"}
    counts = {name: sum(pair == verdicts for pair in pairs) for verdicts, name in names.items()}
    return counts if sum(counts.values()) else {}


def _yaml(value: Any, indent: str = "") -> Iterable[str]:
    """Write nested settings as indented lines."""
    items = value.items() if isinstance(value, Mapping) else (("-", item) for item in value)
    for key, item in items:
        head = f"{indent}-" if key == "-" else f"{indent}{key}:"
        if isinstance(item, (Mapping, list)) and item:
            yield head
            yield from _yaml(item, indent + "  ")
        else:
            yield f"{head} {'null' if item is None else item}"


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _mean(values: Iterable[Any]) -> float | None:
    known = [v for value in values if (v := _finite(value)) is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
