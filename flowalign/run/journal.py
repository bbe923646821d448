"""The journal of a run: metrics, same-seed samples, checkpoints, a line of progress."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console

from flowalign.config.run import RunConfig
from flowalign.measure.evaluate import best_metric, evaluation_metrics
from flowalign.measure.evaluated import counts, said_error, skipped, standard_errors
from flowalign.record.checkpoint import BUFFERS, steps
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.disk import on_disk, swept, writing
from flowalign.record.lock import RunLock
from flowalign.record.metrics import MetricsWriter, read_metrics
from flowalign.record.mirror import samples_of
from flowalign.record.progress import Progress, duration, iteration_text
from flowalign.record.stop import StopRequest
from flowalign.run.made import MadeOf
from flowalign.run.protocols import Backend, Collected, Count
from flowalign.safety.collapse import CollapseAlarm
from flowalign.safety.hacking import ALARM, HackingAlarm
from flowalign.safety.signals import CollapseSignals
from flowalign.safety.silent import SilentScores
from flowalign.samples.opened import torch_threads
from flowalign.samples.scoring import faults, unscored
from flowalign.types import Scores, judged_task

RESTARTS = "learner/restarts"
CURRICULUM = "curriculum"  # in a checkpoint's state


def due(config: RunConfig, what: str, iteration: int) -> bool:
    """Tell whether a ``checkpoint``, an ``evaluation``, a ``validation`` or a ``row`` comes after ``iteration``."""
    every = {
        "checkpoint": config.checkpoint.every,
        "evaluation": config.evaluation.every,
        "validation": config.validates_every,
        "row": config.row_every,
    }[what]
    return every > 0 and (iteration == config.total or iteration % every == 0)


class RunJournal:
    """Implements ``flowalign.run.protocols.Journal`` over the run directory that ``lock`` holds, as long as it does."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        console: Console,
        *,
        start: int,
        wall_s: float,
        made: MadeOf,
        lock: RunLock,
        stop: StopRequest,
        restarts: int | None = None,
    ) -> None:
        """Open the files after iteration ``start``.

        ``restarts`` of the learner there were in this run so far; by default as many as the last row says.
        """
        self.config, self.run_dir, self.console = config, run_dir, console
        self._lock, self._stop, self._made = lock, stop, made
        self._began = time.monotonic() - wall_s
        self._start, self._first = start, time.monotonic()
        each = config.row_every == 1
        facts = config.model_dump(mode="json")
        self.metrics = MetricsWriter(
            run_dir, config.name, config.logging, keep_until=start or None, each=each, facts=facts
        )
        gold = [reward.label for reward in config.trained_rewards if reward.gold]
        known = read_metrics(self.metrics.path) if start else []
        self.restarts = int((known[-1].get(RESTARTS) if known else 0) or 0) if restarts is None else restarts
        self.at = start + 1  # the iteration under way
        safety = config.limits
        judged = {"window": safety.window, "standard_errors": safety.standard_errors}
        self._alarm, self._ringing = HackingAlarm(gold, known, **judged), False
        self._collapse, self._signals = CollapseAlarm(safety, known), CollapseSignals(safety)
        policy = config.checkpoint
        self._best = best_metric(config)
        self._writer = CheckpointWriter(run_dir / "checkpoints", policy.keep_last, policy.keep_best, self._best)
        self._steps = [step for step in steps(self._writer.root) if step <= start]
        self._mark_good()
        self._progress = Progress(console, config.total, start, command=config.command)
        self._samples, self._learning_s = 0, 0.0  # since the last row
        self._masked: dict[str, int] = {}
        self._silent, self._unscored_said = (
            SilentScores(min(safety.window, config.total or safety.window), known),
            False,
        )
        self._best_said = not policy.keep_best

    def wall_s(self) -> float:
        return time.monotonic() - self._began

    def due(self, what: str, iteration: int) -> bool:
        return due(self.config, what, iteration)

    def begin(self) -> None:
        self._stop.begin()

    def iteration(self, iteration: int, metrics: dict[str, float], collected: Collected | None) -> None:
        self._lock.check()
        self._made.check()
        self._stop.done = iteration
        if collected is not None:
            self.say_faults(f"iteration {iteration}", collected.scores)
            self._say_unscored(iteration, collected.scores, metrics)
            metrics = metrics | self._measure(collected)
        metrics = metrics | self._alarm.update(metrics)
        self._warn(iteration, [key.rpartition("/")[2] for key, on in metrics.items() if key.startswith(ALARM) and on])
        metrics = metrics | self._watch(iteration, metrics)
        metrics = metrics | self._speed(metrics) | ({RESTARTS: float(self.restarts)} if self.restarts else {})
        row = any(self.due(what, iteration) for what in ("row", "evaluation", "validation"))
        if row:
            self.metrics.write(iteration, metrics, wall_s=self.wall_s())
            self._samples, self._learning_s = 0, 0.0
        self.at = iteration + 1
        per_iteration = (time.monotonic() - self._first) / (iteration - self._start)
        left = per_iteration * (self.config.total - iteration)
        if row:
            self._progress.show(iteration, iteration_text(metrics), left)
        else:
            self._progress.move(iteration, left)

    def _speed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the samples a second of the iterations since the last row, where the configuration says how many."""
        if self.config.batch_size is None:
            return {}
        self._samples += self.config.batch_size
        self._learning_s += metrics["time/iteration_s"]
        return {"throughput/samples_per_s": round(self._samples / max(self._learning_s, 1e-9), 1)}

    def doing(self, what: str, begun: int | None = None) -> Count:
        return self._progress.doing(what, begun)

    def say_faults(self, when: str, scores: Scores) -> None:
        """Say each outage that retries made up for, and masked images where they are more than were said before."""
        for name, (masked, said) in faults(scores).items():
            if scores.retries.get(name) or masked > self._masked.get(name, 0):
                self._progress.say(f"reward {name} in {when}: {said}")
            self._masked[name] = max(masked, self._masked.get(name, 0))

    def _say_unscored(self, iteration: int, scores: Scores, metrics: Mapping[str, float]) -> None:
        """Say once that images have no total since no score applies to them, and which scores never came."""
        said = unscored(scores)
        if said and not self._unscored_said:
            self._progress.say(f"warning at iteration {iteration}: {said}; they have no total reward")
        self._unscored_said = self._unscored_said or bool(said)
        for name in self._silent.update(metrics, scores.weights):
            self._progress.say(
                f"warning at iteration {iteration}: {name} is trained on, and was NaN on every image so far, so that "
                "its weight does nothing; see why its reward answers none, or leave it out"
            )

    def _say_best_unknown(self, measured: Iterable[str]) -> None:
        """Say once that no checkpoint can be the best, since what tells it is not measured."""
        key = self._best
        if not self._best_said and key not in measured:
            near = get_close_matches(key, list(measured), n=1)
            self._progress.say(
                f"warning: checkpoint.best_metric: {key} is not measured, so no best checkpoint is kept"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        self._best_said = True

    def _warn(self, iteration: int, falling: list[str]) -> None:
        if falling and not self._ringing:
            self._progress.say(
                f"warning at iteration {iteration}: the trained reward rises while {', '.join(falling)} falls; "
                "the policy may be exploiting the reward (alarm/reward_hacking in metrics.jsonl)"
            )
        self._ringing = bool(falling)

    def _measure(self, collected: Collected) -> dict[str, float]:
        """Measure the signals of a collapse and what they cost.

        It takes as many threads as any worker, so that bits agree.
        """
        began = time.monotonic()
        with torch_threads(self.config.cluster.threads):
            measured = self._signals(collected.batch.group_ids, collected.preview, collected.scores)
        return {**measured, "time/safety_s": time.monotonic() - began}

    def _watch(self, iteration: int, metrics: dict[str, float]) -> dict[str, float]:
        """Return the alarms of a collapse.

        Say of each that it rings, and that the run ends where it has rung long enough.
        """
        before = {found.cause for found in self._collapse.found}
        alarms = self._collapse.update(iteration, metrics)
        for found in self._collapse.found:
            if found.cause not in before:
                self._progress.say(
                    f"warning at iteration {iteration}: {found.sentence} (alarm/{found.cause} in metrics.jsonl)"
                )
        self._mark_good()
        if self.stopped:
            self._progress.say(
                f"stopping after iteration {iteration}: alarm/{self._collapse.stopping()} has held for "
                f"{self.config.limits.patience} blocks of {self.config.limits.window} iterations (safety.stop)"
            )
        return alarms

    def _mark_good(self) -> None:
        """Let ``last_good`` name the newest checkpoint from a time when nothing rang."""
        good = [step for step in self._steps if step <= self._collapse.good_until]
        self._writer.mark_good(good[-1] if good else None)

    def evaluation(self, iteration: int, collected: Collected, seconds: float) -> dict[str, float]:
        """Return the metrics of an evaluation that took ``seconds``; its images go to ``samples/iteration_<n>``."""
        self._lock.check()
        metadata, prompts = collected.batch.metadata, collected.batch.prompts
        metrics = evaluation_metrics(collected.scores, metadata)
        errors = standard_errors(collected.scores, metadata, prompts)
        self.say_faults(f"the evaluation at iteration {iteration}", collected.scores)
        samples = samples_of(self.run_dir, iteration)
        _write_samples(samples, collected)
        self.metrics.pictures(samples, iteration)
        overall = {key.split("/")[1]: value for key, value in metrics.items() if key.endswith("/overall")}
        spread = {name: said_error(f"standard_error/{name}/overall", errors, 3) for name in overall}
        said = ", ".join(f"{name} {value:.3f}{spread[name]}" for name, value in overall.items())
        metrics |= errors | counts(collected.scores, metadata)
        metrics |= {"eval/num_samples": float(len(prompts)), "eval/num_prompts": float(len(set(prompts)))}
        metrics |= {"eval/seed": self.config.evaluation.seed, "time/evaluation_s": seconds}
        cached = ""
        if collected.preview.computed:
            metrics["eval/skipped_steps"] = skipped([collected.preview])
            cached = f", {metrics['eval/skipped_steps']:.0%} of the steps skipped"
        if iteration == 0:
            self.metrics.write(0, metrics, wall_s=self.wall_s())
        made = f"{len(prompts)} samples of {len(set(prompts))} prompts, seed {self.config.evaluation.seed}{cached}"
        found = f"{said} over {made}" if said else f"{made}, in {samples}"
        self._progress.say(f"evaluation at iteration {iteration}: {found}; {duration(seconds)}")
        if self._best.startswith("eval/"):
            self._say_best_unknown(metrics)
        return metrics

    def checkpoint(self, iteration: int, backend: Backend, metrics: dict[str, float], drawn: Mapping[str, Any]) -> None:
        self.at = iteration
        self.save(iteration, backend.state(), metrics, drawn)

    def save(
        self,
        iteration: int,
        states: Sequence[Mapping[str, Any]],
        metrics: Mapping[str, float],
        drawn: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint of what the learner's ranks hold, and of what the prompts are ``drawn`` by."""
        late = self._best.startswith("validation") and not self.due("validation", iteration)
        if not (self._best.startswith("eval/") or late):
            self._say_best_unknown(metrics)
        self._lock.check()
        self._writer.save(
            iteration,
            model=states[0]["model"],
            ema=states[0]["ema"],
            averages=states[0]["averages"],
            optimizer_by_rank={rank: state["optimizer"] for rank, state in enumerate(states)},
            state={
                "iteration": iteration,
                "version": states[0]["version"],
                "seed": self.config.seed,
                "world_size": len(states),
                "zero_stage": self.config.learner.zero_stage,
                "base_hash": self._made.base_hash(),
                BUFFERS: states[0][BUFFERS],
                "wall_s": self.wall_s(),
                "metrics": {k: v for k, v in metrics.items() if v == v},
                **({CURRICULUM: drawn} if drawn else {}),
                **({"config": json.loads(self.config.model_dump_json())} if self.config.command != "align" else {}),
                **self._made.facts(),
            },
        )
        self.at = iteration + 1
        self._steps.append(iteration)
        self._mark_good()

    def close(self) -> None:
        self._progress.close()
        self.metrics.close()

    @property
    def stopping(self) -> bool:
        return self._stop.asked or self.stopped

    @property
    def stopped(self) -> bool:
        """An alarm asked for the end."""
        return self._collapse.stopping() is not None


def _write_samples(directory: Path, collected: Collected) -> None:
    """Write the first images with their scores, all of them or none. Raise DiskError."""
    from PIL import Image

    batch, scores = collected.batch, collected.scores
    index, files = [], {}
    for i, image in sorted(collected.preview.images.items()):
        name, png = f"{i:04d}.png", io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        files[name] = png.getvalue()
        own = {k: float(v[i]) for k, v in scores.by_reward.items() if float(v[i]) == float(v[i])}
        tag = judged_task(batch.metadata[i])
        index.append({"file": name, "prompt": batch.prompts[i], "tag": tag, "scores": own})
    files["index.json"] = (json.dumps(index, indent=1) + "\n").encode()
    draft = directory.with_name(f".{directory.name}.part")
    with writing(f"samples {directory}", directory, on_disk(map(len, files.values()))), swept(draft):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for name, content in files.items():
            (draft / name).write_bytes(content)
        if directory.is_symlink():  # to where somebody has moved it
            directory.unlink()
        elif directory.exists():
            shutil.rmtree(directory)
        draft.rename(directory)
