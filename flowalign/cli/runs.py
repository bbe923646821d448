"""Run directories as commands see them: begun, continued, looked up."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from flowalign.checkpoint import LOG, find, has_any, verify
from flowalign.cli.terminal import finite, plain, print_rows
from flowalign.config import AlignConfig, ConfigError, RewardConfig
from flowalign.configchanges import changed_rates, refuse_changes
from flowalign.configcheck import check_pipeline, explain
from flowalign.configfile import (
    load_align,
    read_resolved,
    recorded_contents,
    recorded_versions,
    write_resolved,
)
from flowalign.configpaths import recorded_model
from flowalign.contents import base_hash, base_of
from flowalign.made import Accepted
from flowalign.metrics import read_metrics
from flowalign.mirror import check_wandb
from flowalign.outputs import unwritable
from flowalign.pretrainconfig import PretrainConfig
from flowalign.record.disk import filled, write_text
from flowalign.record.kinds import check_kinds
from flowalign.textfiles import is_there


def check_run(config: AlignConfig | PretrainConfig, accepted: Collection[str] = ()) -> Path:
    """The run's directory, untouched: it can be written, and if it is continued, it fits what it was begun with, but
    for what lies at the paths of the ``accepted`` keys.

    Raises:
        RunDirectoryError: it holds what a run cannot write to. ConfigError: it cannot be written, or does not fit.
    """
    run_dir = Path(config.runs_dir) / config.name
    if os.path.lexists(run_dir):
        check_kinds(run_dir)
    if reason := unwritable(run_dir):
        raise ConfigError("runs_dir", f"{run_dir} cannot be written ({reason}); {_other(run_dir)}")
    resume = config.resume if isinstance(config, PretrainConfig) else config.checkpoint.resume
    if resume != "never" and has_any(run_dir / "checkpoints") and (run_dir / "config.yaml").is_file():
        refuse_changes(read_resolved(run_dir), config, run_dir, accepted)
    check_wandb(config.logging)
    return run_dir


def _other(run_dir: Path) -> str:
    """What to do about a directory that cannot be written."""
    return "make it writable, which continues the run, or choose another" if is_there(run_dir) else "choose another"


def begin_run(config: AlignConfig | PretrainConfig, accepted: Accepted | None = None) -> Path:
    """Record the configuration in the run directory, once all that the run needs stands: a refused one leaves none.

    So are the changes that were accepted. Raises DiskError.
    """
    run_dir = check_run(config, () if accepted is None else accepted.keys)
    write_resolved(config, run_dir, () if accepted is None else accepted.changes)
    return run_dir


def accepted_of(config: AlignConfig | PretrainConfig, keys: Collection[str]) -> Accepted:
    """What ``keys`` allow to differ from the run that ``config`` continues."""
    run_dir = Path(config.runs_dir) / config.name
    if not keys or not has_any(run_dir / "checkpoints") or not (run_dir / "config.yaml").is_file():
        return Accepted(tuple(keys))
    return Accepted(tuple(keys), changed_rates(read_resolved(run_dir), config, keys))


def config_of(source: Path, file: Path | None, model: Path | None = None) -> AlignConfig:
    """The configuration that belongs to a run, to one of its checkpoints, or to a bare pipeline directory.

    ``model`` stands in for the base model of a run that is not at its place any more.

    Raises:
        ConfigError: there is none, its base model is not there, or ``model`` is another one than it needs.
    """
    if file is None and (source / "model_index.json").is_file():
        if model is not None:
            raise ConfigError("--model", f"{source} is a whole pipeline, which needs no other; leave --model out")
        recorded = recorded_model(source)
        sampling = recorded.pop("sampling", {})
        return _bare({"path": str(source), **recorded}, evaluation=sampling)
    run_dir = next((d for d in (source, *source.resolve().parents[:2]) if (d / "config.yaml").is_file()), source)
    config = load_align(file, require_files=False).config if file is not None else read_resolved(run_dir)
    if isinstance(config, PretrainConfig):
        cluster = {"threads": config.threads, "device": config.device}
        config = _bare(config.model_as_trained, cluster=cluster, evaluation=config.sampling.model_dump())
    if file is not None and (source / "model_index.json").is_file():
        _check_family(config, source)
    if model is not None:
        config = _with_model(config, source, run_dir, model)
    if not Path(config.model.path).is_dir() and not (source / "model_index.json").is_file():
        raise ConfigError(
            "model.path",
            f"{config.model.path}, which {source} was trained from, is not there; say where it is now: --model DIR",
        )
    return config


def _check_family(config: AlignConfig, source: Path) -> None:
    """A pipeline that says what its output means is not read as something else."""
    own = recorded_model(source).get("family", config.model.family)
    if own != config.model.family:
        raise ConfigError(
            "--config",
            f"its model is of {config.model.family} and {source} of {own}; write model.family: {own} there, or leave "
            "--config out",
        )


def _with_model(config: AlignConfig, source: Path, run_dir: Path, model: Path) -> AlignConfig:
    """The configuration with ``model`` for its base, which a LoRA needs as it was."""
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(model.absolute())})})
    check_pipeline("--model", model, config.model)
    found = find(source, None)
    state = json.loads((found / "state.json").read_bytes()) if verify(found, ("state.json",)) else {}
    wanted, given = state.get("base_hash") or base_of(recorded_contents(run_dir).get("model.path")), base_hash(model)
    if wanted in (None, given):
        return config
    if config.model.lora is not None:
        raise ConfigError(
            "--model",
            f"{model} is another model than {found} was trained from (transformer files {given[:12]}, not "
            f"{wanted[:12]}); a LoRA fits its own base alone",
        )
    LOG.warning(f"--model: {model} is another model than {found} was trained from; all but the transformer is its")
    return config


def _bare(model: Any, **sections: Any) -> AlignConfig:
    """Enough of a configuration to sample and evaluate a model that no alignment run made."""
    values = {"name": "pipeline", "iterations": 1, "model": model, "algorithm": {"type": "flow_grpo"}, "rewards": []}
    try:
        return AlignConfig.model_validate({**values, **sections})
    except ValidationError as error:
        raise explain(error, AlignConfig) from error


def geneval_suite(
    config: AlignConfig, detector: str | None, prompts: str | None, num_samples: int | None
) -> tuple[AlignConfig, int]:
    """The configuration with the public benchmark's official verdicts, and its number of samples: 4 a prompt.

    ``detector`` is a name or JSON options; by default that of the run's own geneval reward, else the palette.

    Raises:
        ConfigError: the detector cannot be built, or the prompts are not in GenEval's format.
    """
    from flowalign.configcheck import check_reward
    from flowalign.configpaths import resolve_reward
    from flowalign.data.prompts import load_prompts
    from flowalign.promptcheck import check_prompts

    here, source = Path.cwd(), prompts or config.evaluation.prompts
    configured = [config.evaluation.scorer, *config.rewards]
    own = [reward.options.get("detector") for reward in configured if reward is not None and reward.spec == "geneval"]
    chosen: Any = next((known for known in own if known is not None), "palette")
    if detector is not None:
        try:
            chosen = json.loads(detector) if detector.lstrip().startswith("{") else detector
        except (ValueError, RecursionError) as error:
            raise ConfigError("--detector", f'is not JSON ({error}); write a name or {{"type": …}}') from error
    scorer = RewardConfig(spec="geneval", options={"mode": "official", "detector": chosen})
    scorer = resolve_reward(scorer, here, "--detector")
    check_reward("--detector", scorer, here)
    check_prompts("--prompts", source, [scorer], here)
    evaluation = config.evaluation.model_copy(update={"scorer": scorer})
    return config.model_copy(update={"evaluation": evaluation}), num_samples or 4 * len(load_prompts(source))


def report_of(run_dir: Path) -> Path:
    """Write the run's report.html."""
    config = read_resolved(run_dir)
    if not isinstance(config, AlignConfig):
        raise ConfigError("", f"{run_dir} is a pretraining run; reports are of alignment runs")
    check_kinds(run_dir)
    from flowalign.report import write_report

    return write_report(run_dir, config, recorded_versions(run_dir))


def stop_of(run_dir: Path, config: AlignConfig) -> tuple[dict[str, str], list[str]]:
    """What to say of a run that an alarm stopped, and the commands to go on with; of another what still rings."""
    from flowalign.collapse import stopped_by_alarm

    stopped = stopped_by_alarm(run_dir, config.safety)
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


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """The last row of metrics.jsonl; empty where there is none."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return rows[-1] if rows else {}


def say_evaluation(out: Console, result: Any) -> None:
    """What an evaluation found, each value with its standard error, of how many samples, made how."""
    from flowalign.evaluated import text

    say = plain(out)
    say(text(result.made))
    for note in result.notes:
        say(note)
    rows = []
    for key, value in result.metrics.items():
        error = result.standard_errors.get(key.replace("eval/", "standard_error/", 1))
        rows.append((key, f"{value:.4f}" + ("" if error is None or error != error else f" ± {error:.4f}")))
    print_rows(out, rows)


def write_evaluation(result: Any, out: Path, summary: dict[str, Any]) -> None:
    """Images, GenEval's results.jsonl and metrics.json."""
    from flowalign.evaluate import write_results_jsonl
    from flowalign.sample import save_images

    with filled(out) as draft:
        save_images(draft, [row["filename"] for row in result.rows], result.images)
        write_results_jsonl(result.rows, draft / "results.jsonl")
        write_text(draft / "metrics.json", json.dumps(finite(summary), indent=1) + "\n")
