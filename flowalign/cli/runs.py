"""Run directories as commands see them: begun, continued, looked up."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flowalign.cli.terminal import plain, print_rows
from flowalign.config.run import RunConfig
from flowalign.intake.paths import shipped_names
from flowalign.intake.resolved import read_resolved, recorded_versions
from flowalign.record.disk import filled, write_text
from flowalign.record.kinds import check_kinds
from flowalign.record.metrics import read_metrics
from flowalign.record.textfiles import finite

if TYPE_CHECKING:
    from flowalign.measure.evaluate import EvaluationResult


def report_of(run_dir: Path) -> Path:
    """Write the run's report.html."""
    config = read_resolved(run_dir)
    check_kinds(run_dir)
    from flowalign.report import write_report

    return write_report(run_dir, config, recorded_versions(run_dir))


def stop_of(run_dir: Path, config: RunConfig) -> tuple[dict[str, str], list[str]]:
    """Return sentences about a run that an alarm stopped, and the commands to go on with.

    Another run gets what still rings.
    """
    from flowalign.safety.collapse import stopped_by_alarm

    stopped = stopped_by_alarm(run_dir, config.limits)
    if stopped is None:
        held = [key for key, value in last_metrics(run_dir).items() if key.startswith("alarm/") and value]
        return ({"ended": f"while {', '.join(held)} rang; see docs/safety.md"} if held else {}), []
    said = {"stopped": f"after iteration {stopped.iteration} by alarm/{stopped.cause}"}
    file = shlex.quote(str(run_dir / "config.yaml"))
    advice = ["to go on all the same:", f"  flowalign align {file} safety.stop=false"]
    if stopped.last_good is None:
        nothing = "none; the alarm is older than every checkpoint, so the base model is the last good one"
        return {**said, "last_good": nothing}, advice
    source, to = shlex.quote(str(stopped.last_good)), shlex.quote(str(run_dir / "last_good_model"))
    gentler = f"learner.optimizer.learning_rate={config.learner.optimizer.learning_rate / 2:g}"
    anew = f"  flowalign align {file} name={config.name}-2 model.path={to} {gentler}"
    export = ["to use the last good checkpoint:", f"  flowalign export {source} --to {to}"]
    return {**said, "last_good": str(stopped.last_good)}, [*export, "to go on from that model:", anew, *advice]


def next_of(run_dir: Path, config: RunConfig) -> list[str]:
    """Return the commands that usually follow a run that has ended, under a heading.

    A run that was judged is compared with its base, which takes its own prompts and judge; another is looked at. There
    is no export of a network that diffusers has no class for.
    """
    model, run = config.model, shlex.quote(str(run_dir))
    judged = config.evaluation.every > 0 and config.evaluation.judge is not None
    base = Path(shipped_names(model.path))
    with suppress(FileNotFoundError, ValueError):  # lies elsewhere, or Ray has deleted a job's working directory
        base = base.relative_to(Path.cwd())
    known = model.transformer is None or model.transformer.architecture == "mmdit"
    looked = f"sample {run} --num-images 4 --prompt 'a photo of a dog'"
    commands = [f"compare {shlex.quote(str(base))} {run}" if judged and model.transformer is None else looked]
    if known:
        kind, to = ("--as lora", "lora") if model.lora is not None else ("--as pipeline", "model")
        commands.append(f"export {run} --to {shlex.quote(f'{config.name}-{to}')} {kind}")
    return ["next:", *(f"  flowalign {command}" for command in commands)]


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """Return the last row of metrics.jsonl; empty where there is none."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return rows[-1] if rows else {}


def say_profile(out: Console, run_dir: Path) -> None:
    """Print where the time of each process of a profiled run went, and what of it was no pass of a model."""
    from flowalign.run.profiling import FOLDER, not_the_model, profile_rows, read_profile

    found = read_profile(run_dir)
    for name, process in found.items():
        table = Table(title=f"{name}: seconds of an iteration", title_justify="left", box=None)
        for column, justify in (("phase", "left"), ("part", "left"), ("seconds", "right"), ("share", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for phase, part, seconds, share in profile_rows(process):
            table.add_row(phase, part, f"{seconds:.3f}", f"{share:.1%}")
        out.print(table)
        seconds, share = not_the_model(process)
        out.print(f"not a pass of a model: {seconds:.3f} s, {share:.1%}")
    out.print(f"traces for Perfetto: {run_dir / FOLDER}" if found else "no profile: a run of five iterations has one")


def say_evaluation(out: Console, result: EvaluationResult) -> None:
    """Print the findings of an evaluation: each value with its standard error, of how many samples, made how."""
    from flowalign.measure.evaluated import said_error, text

    say = plain(out)
    say(text(result.made))
    for note in result.notes:
        say(note)
    rows = []
    for key, value in result.metrics.items():
        name = key.removeprefix("eval/")
        of = result.num_samples.get(f"num_samples/{name}")
        error = said_error(f"standard_error/{name}", result.standard_errors, 4, of)
        rows.append((key, f"{value:.4f}{error}", f"{len(result.rows) if of is None else of} samples"))
    print_rows(out, rows)


def write_evaluation(result: EvaluationResult, out: Path) -> None:
    """Write the images, where they are not in a folder already, GenEval's results.jsonl and metrics.json."""
    from flowalign.measure.evaluate import write_results_jsonl
    from flowalign.samples.sampled import save_images

    with filled(out) as draft:
        if len(result.images):
            save_images(draft, [row["filename"] for row in result.rows], result.images)
        write_results_jsonl(result.rows, draft / "results.jsonl")
        write_text(draft / "metrics.json", json.dumps(finite(result.summary), indent=1) + "\n")
