"""The commands that work in a run directory: ``align``, ``pretrain``, ``distill``, and ``stop``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowalign.cli.check_command import look
from flowalign.cli.examples import examples
from flowalign.cli.exits import ExitCode
from flowalign.cli.options import AcceptChanged, ConfigFile, DryRun, Json, Overrides, PhaseOverrides, TakeOver
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import opening, plain, print_json
from flowalign.record.cycles import importing

if TYPE_CHECKING:
    from flowalign.intake.ready import Ready


@examples(
    "flowalign align configs/shapes/quickstart.yaml",
    "flowalign align configs/shapes/nft.yaml name=mine learner.optimizer.learning_rate=5e-5 --dry-run",
)
def align(
    config: ConfigFile,
    overrides: Overrides = None,
    take_over: TakeOver = False,
    accept_changed: AcceptChanged = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="say where the time of iterations 2 and 3 goes, and trace the fourth")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Align a model with reinforcement learning; the same command continues an interrupted run.

    Exit code 3 says that an alarm stopped it (safety.stop), 75 that it ended early and can be continued.
    """
    from flowalign.cli.running import conduct, held

    console, keys = make_console(as_json), tuple(accept_changed or ())
    given = [*(overrides or ()), *(["logging.profile=true"] if profile else ())]
    if dry_run:
        look("align", config, given, keys, take_over, as_json)
        return
    phases = opening(console, f"align {config}")
    with conduct(as_json, phases) as stop:
        with importing():
            from flowalign.cli.runs import next_of, report_of, say_profile, stop_of
            from flowalign.intake.ready import ready

        own = ready("align", config, given, keys, take_over=take_over, say=console.print)
        with held(own.config, own.run_dir, stop, console, take_over) as lock:
            own = _decided(own, console)
            run_dir = _drive(own, console, phases, lock, stop)
            stopped, advice = stop_of(run_dir, own.config)
            if own.config.logging.profile:
                say_profile(console, run_dir)
            _finish(run_dir, as_json, phases, report=report_of(run_dir), **stopped)
            for line in advice or next_of(run_dir, own.config):
                plain(console)(line)
    if "stopped" in stopped:
        raise typer.Exit(ExitCode.ALARM)


def _training(command: str, told: str) -> Callable[..., None]:
    """Make the command that trains on latents under the name ``command``; ``told`` is its help."""

    def run(
        config: ConfigFile,
        overrides: PhaseOverrides = None,
        take_over: TakeOver = False,
        accept_changed: AcceptChanged = None,
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        given = (command, config, overrides or (), tuple(accept_changed or ()), take_over, as_json)
        if dry_run:
            look(*given)
        else:
            _train(*given)

    run.__name__, run.__doc__ = command, told
    return run


CONTINUED = "the same command continues an interrupted run."
pretrain = examples(
    "flowalign pretrain configs/shapes/pretrain.yaml model.path=untrained latents=runs/bank",
    "flowalign pretrain configs/shapes/reflow.yaml latents=runs/pairs phases.0.iterations=400",
)(_training("pretrain", f"Train a base model on precomputed latents, or straighten one; {CONTINUED}"))
distill = examples(
    "flowalign distill configs/shapes/guidance_distill.yaml latents=runs/bank teacher.path=shapes",
    "flowalign distill configs/shapes/consistency.yaml latents=runs/bank --dry-run",
)(_training("distill", f"Train a student of a teacher, for guidance or few steps; {CONTINUED}"))


def _train(
    command: str, config: Path, overrides: Sequence[str], keys: tuple[str, ...], take_over: bool, as_json: bool
) -> None:
    from flowalign.cli.running import conduct, following, held

    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    console = make_console(as_json)
    phases = opening(console, f"{command} {config}", quiet=not first)
    with conduct(as_json, phases) as stop:
        with importing():
            from flowalign.cli.runs import next_of, report_of
            from flowalign.intake.ready import ready

        if not first:
            with following(stop):
                own = _decided(ready(command, config, overrides, keys, first=False), console, quiet=True)
                _drive(own, console, phases, None, stop)
            return
        own = ready(command, config, overrides, keys, take_over=take_over, say=console.print)
        with held(own.config, own.run_dir, stop, console, take_over) as lock:
            own = _decided(own, console)
            run_dir = _drive(own, console, phases, lock, stop)
            _finish(run_dir, as_json, phases, report=report_of(run_dir))
            for line in next_of(run_dir, own.config):
                plain(console)(line)


def _decided(own: Ready, console: Any, quiet: bool = False) -> Ready:
    """Return ``own`` with what is left to the run, ``learner.compile: auto``, decided and said."""
    learner = own.config.learner
    if learner.compile != "auto":
        return own
    from flowalign.run.compiled import decided

    compiles, why = decided(own.config)
    if not quiet:
        console.print(f"learner.compile: auto is {str(compiles).lower()}; {why}")
    update = {"learner": learner.model_copy(update={"compile": compiles})}
    return replace(own, loaded=replace(own.loaded, config=own.config.model_copy(update=update)))  # type: ignore[arg-type]


def _drive(own: Ready, console: Any, phases: Any, lock: Any, stop: Any) -> Path:
    """Run on the backend that the configuration names."""
    from flowalign.intake.run_directory import begin_run
    from flowalign.run.drive import drive, local_backend

    config, backend = own.config, local_backend
    if config.cluster.backend == "ray":
        from flowalign.cluster.ray_backend import RayBackend as backend
    asked = {"lock": lock, "stop": stop, "accepted": own.accepted, "backend": backend}
    return drive(config, own.loaded.base_dir, console, partial(begin_run, config, own.accepted), phases, **asked)


@examples(
    "flowalign stop runs/shapes-flow-grpo",
    "flowalign stop /shared/runs/mine",
)
def stop_run(
    run: Annotated[Path, typer.Argument(help="the directory of a run that is going on, on whatever machine")],
    as_json: Json = False,
) -> None:
    """Ask a run to end after the iteration or step under way, with a checkpoint; the same command continues it."""
    from dataclasses import asdict

    from flowalign.record.stop import ask_to_stop

    asked = ask_to_stop(run)
    make_console(as_json).print(
        f"asked {asked} to end {run} after what it is at, with a checkpoint", highlight=False, soft_wrap=True
    )
    print_json(as_json, {"run": run, "holder": asdict(asked)})


def _finish(run_dir: Path, as_json: bool, phases: Any, **files: Path | str) -> None:
    from flowalign.cli.running import lying, say_end
    from flowalign.cli.runs import last_metrics

    named: dict[str, Path | str] = {**lying(run_dir), **files}
    metrics = named.pop("metrics", run_dir / "metrics.jsonl")
    say_end(make_console(as_json), phases, {**named, "metrics": metrics})
    print_json(as_json, {**{what: str(path) for what, path in named.items()}, "metrics": last_metrics(run_dir)})
