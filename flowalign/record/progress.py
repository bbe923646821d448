"""Progress of a run: plain lines, or on a terminal the same lines above a live bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}  # of Console.print
QUIET_S = 30.0  # without a terminal: at most one line of chunks in this time, and none after a shorter silence


class Phases:
    """The times that a run took to start, to work and to end."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {"start": time.monotonic()}

    def begin(self, phase: str) -> None:
        self._began[phase] = time.monotonic()

    def __str__(self) -> str:
        ends = [*self._began.values(), time.monotonic()][1:]
        took = zip(self._began.items(), ends, strict=True)
        return ", ".join(f"{phase} {duration(end - began)}" for (phase, began), end in took)


class Progress:
    """``total`` iterations, of which ``done`` are done already; both shapes show an ETA."""

    def __init__(self, console: Console, total: int, done: int = 0, *, command: str = "align") -> None:
        self.console, self.total = console, total
        self._done, self._spoke = done, time.monotonic()
        self._bar: Any = None
        if console.is_terminal:
            self._bar = _bar(console, command)
            self._task = self._bar.add_task("", total=total, completed=done, eta="", since=time.monotonic())
            self._bar.start()

    def show(self, done: int, text: str, eta_s: float) -> None:
        """Print a line for what is finished, which stays."""
        self._done, eta = done, f"ETA {duration(eta_s)}"
        self.say(f"iteration {done}/{self.total}  {text}  {eta}")
        self._move(eta)

    def move(self, done: int, eta_s: float) -> None:
        """Move the bar to what is finished, where there is one; no line is printed."""
        self._done = done
        self._move(f"ETA {duration(eta_s)}")

    def _move(self, eta: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description="", eta=eta, since=time.monotonic())

    def doing(self, what: str, begun: int | None = None) -> Callable[[int, int], None]:
        """Say what is under way; the answer is to be called with its finished chunks and their number.

        Without a bar it is said where ``begun`` tells at which iteration it begins.
        """
        self._live(what)
        if self._bar is None and begun is not None:
            self.say(f"{what} at iteration {begun} begins")

        def count(done: int, total: int) -> None:
            self._live(f"{what}, chunk {done}/{total}", restart=False)
            if self._bar is None and done < total and time.monotonic() - self._spoke > QUIET_S:
                self.say(f"{what} after iteration {self._done}/{self.total}: chunk {done} of {total}")

        return count

    def _live(self, text: str, restart: bool = True) -> None:
        if self._bar is not None:
            since = {"since": time.monotonic()} if restart else {}
            self._bar.update(self._task, description=text, refresh=True, **since)

    def say(self, text: str) -> None:
        self._spoke = time.monotonic()
        out = self._bar.console if self._bar is not None else self.console
        out.print(text, **PLAIN)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def iteration_text(metrics: Mapping[str, float]) -> str:
    """Return the line about an iteration: reward and spread, or loss; validation, replay error, speed, seconds."""
    said = []
    loss = next((key for key in sorted(metrics) if key.startswith("loss/")), "loss" if "loss" in metrics else None)
    if "reward/total/mean" in metrics:
        said.append(f"reward {metrics['reward/total/mean']:.4g} ± {metrics.get('reward/total/std', 0.0):.2g}")
    elif loss is not None:
        said.append(f"loss {metrics[loss]:.4g}")
    if "validation/loss" in metrics:
        average = f"average {metrics['validation_ema/loss']:.4f}" if "validation_ema/loss" in metrics else ""
        took = duration(metrics["time/validation_s"]) if "time/validation_s" in metrics else ""
        beside = ", ".join(filter(None, [average, took]))
        said.append(f"validation {metrics['validation/loss']:.4f}{f' ({beside})' * bool(beside)}")
    if "replay/max_abs_dlogp" in metrics:
        said.append(f"replay error {metrics['replay/max_abs_dlogp']:.3g}")
    if metrics.get("throughput/images_per_s"):
        said.append(f"{metrics['throughput/images_per_s']:.3g} img/s")
    if metrics.get("throughput/samples_per_s"):
        said.append(f"{metrics['throughput/samples_per_s']:.4g} samples/s")
    elif "time/iteration_s" in metrics:
        said.append(duration(metrics["time/iteration_s"]))
    return "  ".join(said)


def duration(seconds: float) -> str:
    """Write a duration as ``0.8 s``, ``12 s``, ``3m20s``, ``2h05m``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _bar(console: Console, command: str) -> Any:
    from rich import progress
    from rich.text import Text

    class Now(progress.ProgressColumn):
        """The phase under way and its time: the one thing that moves within a long phase."""

        def render(self, task: progress.Task) -> Text:
            running = duration(time.monotonic() - task.fields["since"])
            parts = [f"{task.description} {running}" if task.description else "", task.fields["eta"]]
            return Text("  ".join(part for part in parts if part))

    columns = (progress.TextColumn(f"[bold]{command}"), progress.BarColumn(24), progress.MofNCompleteColumn(), Now())
    return progress.Progress(*columns, console=console)
