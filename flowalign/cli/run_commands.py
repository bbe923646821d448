"""The commands that work in a run directory: ``align``, ``pretrain``, ``distill``, and ``stop``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flowalign.cli.exits import ExitCode
from flowalign.cli.options import AcceptChanged, ConfigFile, Json, Overrides, PhaseOverrides, TakeOver
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import opening, print_json
from flowalign.record.cycles import importing


def align(
    config: ConfigFile,
    overrides: Overrides = None,
    take_over: TakeOver = False,
    accept_changed: AcceptChanged = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="say where the time of iterations 2 and 3 goes, and trace the fourth")
    ] = False,
    as_json: Json = False,
) -> None:
    """Align a model with reinforcement learning; the same command continues an interrupted run.

    Exit code 3 says that an alarm stopped it (safety.stop), 75 that it ended early and can be continued.
    """
    from flowalign.cli.running import conduct, held

    console = make_console(as_json)
    phases = opening(console, f"align {config}")
    with conduct(as_json, phases) as stop:
        with importing():
            from flowalign.cli.runs import report_of, say_profile, stop_of
            from flowalign.intake.file import load_align
            from flowalign.intake.run_directory import accepted_of, begin_run

        loaded = load_align(config, [*(overrides or ()), *(["logging.profile=true"] if profile else ())])
        _say_configured(loaded, console)
        with held(loaded.config, stop, console, take_over, accept_changed or ()) as lock:
            from flowalign.intake.check_teachers import check_runs_that_teach

            loaded = _decided(loaded, console)
            check_runs_that_teach(loaded.config)
            accepted = accepted_of(loaded.config, accept_changed or ())
            begin = partial(begin_run, loaded.config, accepted)
            asked = {"lock": lock, "stop": stop, "accepted": accepted}
            run_dir = _drive(loaded, console, begin, phases, **asked)
            stopped, advice = stop_of(run_dir, loaded.config)
            if loaded.config.logging.profile:
                say_profile(console, run_dir)
            _finish(run_dir, as_json, phases, report=report_of(run_dir), **stopped)
    for line in advice:
        console.print(line)
    if "stopped" in stopped:
        raise typer.Exit(ExitCode.ALARM)


def _training(command: str, told: str) -> Callable[..., None]:
    """Make the command that trains on latents under the name ``command``; ``told`` is its help."""

    def run(
        config: ConfigFile,
        overrides: PhaseOverrides = None,
        take_over: TakeOver = False,
        accept_changed: AcceptChanged = None,
        as_json: Json = False,
    ) -> None:
        _train(command, config, overrides or (), take_over, tuple(accept_changed or ()), as_json)

    run.__name__, run.__doc__ = command, told
    return run


CONTINUED = "the same command continues an interrupted run."
pretrain = _training("pretrain", f"Train a base model on precomputed latents, or straighten one; {CONTINUED}")
distill = _training("distill", f"Train a student of a teacher, for guidance or few steps; {CONTINUED}")


def _train(
    command: str, config: Path, overrides: Sequence[str], take_over: bool, keys: tuple[str, ...], as_json: bool
) -> None:
    from flowalign.cli.running import conduct, following, held

    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    console = make_console(as_json)
    phases = opening(console, f"{command} {config}", quiet=not first)
    with conduct(as_json, phases) as stop:
        with importing():
            from flowalign.cli.runs import report_of
            from flowalign.intake.file import load_pretrain
            from flowalign.intake.run_directory import accepted_of, begin_run

        loaded = load_pretrain(config, overrides, command=command)
        if first:
            _say_configured(loaded, console)
        with held(loaded.config, stop, console, take_over, keys) if first else following(stop) as lock:
            loaded = _decided(loaded, console, quiet=not first)
            accepted = accepted_of(loaded.config, keys)
            begin = partial(begin_run, loaded.config, accepted)
            asked = {"lock": lock, "stop": stop, "accepted": accepted}
            run_dir = _drive(loaded, console, begin, phases, **asked)
            if first:
                _finish(run_dir, as_json, phases, report=report_of(run_dir))


def _decided(loaded: Any, console: Any, quiet: bool = False) -> Any:
    """Return ``loaded`` with what is left to the run, ``learner.compile: auto``, decided and said."""
    learner = loaded.config.learner
    if learner.compile != "auto":
        return loaded
    from flowalign.run.compiled import decided

    compiles, why = decided(loaded.config)
    if not quiet:
        console.print(f"learner.compile: auto is {str(compiles).lower()}; {why}")
    update = {"learner": learner.model_copy(update={"compile": compiles})}
    return replace(loaded, config=loaded.config.model_copy(update=update))


def _drive(loaded: Any, console: Any, begin: Any, phases: Any, **asked: Any) -> Path:
    """Run on the backend that the configuration names."""
    from flowalign.run.drive import drive, local_backend

    backend: Any = local_backend
    if loaded.config.cluster.backend == "ray":
        from flowalign.cluster.ray_backend import RayBackend as backend
    return drive(loaded.config, loaded.base_dir, console, begin, phases, backend=backend, **asked)


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


def _say_configured(loaded: Any, console: Any) -> None:
    """Say what differs from the file, what the run has chosen, and which settings the user hardly meant."""
    lines = [f"overrides: {'; '.join(loaded.overridden)}"] if loaded.overridden else []
    for line in [*lines, *loaded.chosen, *(f"warning: {note}" for note in loaded.notes)]:
        console.print(line)


def _finish(run_dir: Path, as_json: bool, phases: Any, **files: Path | str) -> None:
    from flowalign.cli.running import lying, say_end
    from flowalign.cli.runs import last_metrics

    named: dict[str, Path | str] = {**lying(run_dir), **files}
    metrics = named.pop("metrics", run_dir / "metrics.jsonl")
    say_end(make_console(as_json), phases, {**named, "metrics": metrics})
    print_json(as_json, {**{what: str(path) for what, path in named.items()}, "metrics": last_metrics(run_dir)})
