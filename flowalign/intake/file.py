"""Configuration files: YAML plus ``key=value`` overrides in, a checked and resolved configuration out.

Everything wrong is a ``ConfigError``. What needs no torch is looked at first, and nothing heavier is imported.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic

from pydantic import ValidationError

from flowalign.algorithm import Algorithm, Needs
from flowalign.config.alignment import AlignConfig
from flowalign.config.fields import untagged
from flowalign.config.guidance import SCALES
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig, RewardConfig, SamplingConfig
from flowalign.config.training import PretrainConfig
from flowalign.engine.device import check_device
from flowalign.intake import check as checks
from flowalign.intake import check_prompts as promptcheck
from flowalign.intake import check_scores as scorecheck
from flowalign.intake.adapters import with_adapters
from flowalign.intake.begun import compiled_as_begun
from flowalign.intake.check_training import (
    check_banks,
    check_derivatives,
    check_ranks,
    check_rollouts,
    check_signed_time,
    check_training,
)
from flowalign.intake.check_walk import check_walks, filled, refuse_old_grid, schedule_of
from flowalign.intake.evened import evened
from flowalign.intake.explain import explain
from flowalign.intake.notes import notes_of
from flowalign.intake.overrides import override
from flowalign.intake.paths import AnySection, Config, resolve_run
from flowalign.models.checked import teacher_model
from flowalign.record.checkpoint import has_any
from flowalign.record.contents import put, relocated
from flowalign.record.earlier import is_of_0_1, moved_keys, training_of_0_1
from flowalign.record.log import say_once
from flowalign.record.textfiles import is_there
from flowalign.record.yamlfiles import check_finite, differences, plain, read_mapping
from flowalign.samples.cache import check_cache
from flowalign.samples.offers import EVALUATION, TRAINING, check_gradient, check_judge, check_reward, check_reward_names

RESOLVED = "config.yaml"
DEFAULT_JUDGE = "; geneval is the judge where evaluation.scorer names no other"
_RECORDED = ("versions", "seeds", "run_dir", "contents", "accepted_changes")


@dataclass(frozen=True)
class Loaded(Generic[Config]):
    """A resolved configuration, the directory its relative paths start from, and what this machine lacks for it.

    ``overridden`` lists what differs from the file, ``chosen`` what the run has chosen in its place, ``notes`` what
    hardly was meant.
    """

    config: Config
    base_dir: Path
    missing: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a file, without what ``write_resolved`` records beside the configuration.

    A run's own ``config.yaml`` means this run: its files are looked for around the run directory where they are not at
    their old places, and ``runs_dir`` and ``name`` are those of the directory that it lies in.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], bool]:
    """Return the mapping as `read_yaml`, and whether `write_resolved` wrote the file.

    To others the keys that it records are unknown.
    """
    raw = read_mapping(path)
    versions = raw.get("versions")
    if not isinstance(versions, dict) or "flowalign" not in versions:
        return raw, False
    recorded = {key: raw.pop(key) for key in _RECORDED if key in raw}
    raw = training_of_0_1(raw) if is_of_0_1(raw) else raw
    _refuse_edited_seeds(raw, recorded.get("seeds"))
    return (_of_run(raw, recorded, path.resolve().parent) if path.name == RESOLVED else raw), True


def _refuse_edited_seeds(raw: Mapping[str, Any], seeds: Any) -> None:
    """Refuse a change in a run's record of its seeds: nothing is read from it, so a change would have no effect."""
    if not isinstance(seeds, dict):
        return
    evaluation = raw.get("evaluation")
    own = {"run": raw.get("seed"), "evaluation": evaluation.get("seed") if isinstance(evaluation, dict) else None}
    for name, key in (("run", "seed"), ("evaluation", "evaluation.seed")):
        if name in seeds and own[name] is not None and seeds[name] != own[name]:
            raise ConfigError(
                f"seeds.{name}", f"is {seeds[name]}, and {key} is {own[name]}; set {key}, seeds only records it"
            )


def _of_run(raw: dict[str, Any], recorded: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return the configuration that the run in ``run_dir`` recorded, wherever the directory was moved to."""
    found = relocated(raw, run_dir, record(recorded, "run_dir", str), record(recorded, "contents", dict) or {})
    if found:
        say_once(f"{run_dir} was moved; {', '.join(f'{key} is now {value}' for key, value in found.items())}")
    named = Path(os.path.expanduser(str(raw.get("runs_dir", "runs")))) / str(raw.get("name"))
    if (run_dir / "checkpoints").is_dir() and named.resolve() != run_dir:
        put(raw, ["runs_dir"], str(run_dir.parent))
        put(raw, ["name"], run_dir.name)
    return raw


def record(recorded: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return the record beside a configuration; None where version 0.1 wrote it, or somebody else."""
    return recorded.get(key) if isinstance(recorded.get(key), kind) else None


def load_align(path: Path, overrides: Sequence[str] = (), *, require_files: bool = True) -> Loaded[AlignConfig]:
    """Read, override, resolve and check a run; raises ConfigError. Without ``require_files`` what this machine lacks
    is listed, not refused."""
    return _load(path, overrides, lambda raw, base: _checked_align(raw, base, require_files))


def load_pretrain(
    path: Path, overrides: Sequence[str] = (), *, command: str = "pretrain", require_files: bool = True
) -> Loaded[PretrainConfig]:
    """Load a training run on latents, as `load_align` does; the ``command`` `distill` is for those with a teacher."""
    return _load(path, overrides, lambda raw, base: _checked_pretrain(raw, base, command, require_files))


def load_run(
    path: Path, overrides: Sequence[str] = (), command: str | None = None, *, require_files: bool = False
) -> Loaded[AlignConfig] | Loaded[PretrainConfig]:
    """Load a run of ``command``, by default that of its content, as `load_align` does."""
    command = command or command_of(path, overrides)
    if command == "align":
        return load_align(path, overrides, require_files=require_files)
    return load_pretrain(path, overrides, command=command, require_files=require_files)


def command_of(path: Path, overrides: Sequence[str] = ()) -> str:
    """Return the command that a configuration is for: one that names ``latents`` is a training on them, with a
    ``teacher`` a distillation. Raise ConfigError where it cannot be read."""
    raw = _read(path)[0]
    override(raw, overrides)
    if "latents" not in raw:
        return "align"
    return "distill" if raw.get("teacher") else "pretrain"


def _load(
    path: Path, overrides: Sequence[str], check: Callable[[dict[str, Any], Path], Loaded[Config]]
) -> Loaded[Config]:
    """Return what ``check`` makes of the file and its overrides.

    Where a text is wanted, YAML's date or boolean is the text that was written.
    """
    (raw, recorded), base = _read(path), path.resolve().parent
    before = copy.deepcopy(raw)
    override(raw, overrides)
    refuse_old_grid(raw, overrides, recorded=recorded)
    overridden = tuple(differences(before, raw))
    while True:
        try:
            loaded = check(raw, base)
            return replace(loaded, overridden=overridden, notes=tuple(notes_of(loaded.config)))
        except ConfigError as error:
            if not (isinstance(error.__cause__, ValidationError) and _take_texts(raw, error.__cause__)):
                raise _with_remedy(raw, base, error) from error.__cause__


def _with_remedy(raw: dict[str, Any], base: Path, error: ConfigError) -> ConfigError:
    """Return the error; where it speaks of a path that a run was begun with and that is gone, add what to do."""
    keys, run_dir = error.key.split("."), Path(str(raw.get("runs_dir", "runs"))) / str(raw.get("name"))
    given = _at(raw, keys)
    if not isinstance(given, str) or not is_there(run_dir / RESOLVED) or not has_any(run_dir / "checkpoints"):
        return error
    places = [os.path.normpath(folder / given) for folder in (base, Path.cwd())]
    was = _at(read_mapping(run_dir / RESOLVED), keys)
    if was not in places or any(is_there(Path(place)) for place in places):
        return error
    remedy = f"{run_dir} was begun with {was}; say where it is now: {error.key}=NEW"
    return ConfigError(error.key, f"{error.reason}; {remedy}")


def _take_texts(raw: dict[str, Any], error: ValidationError) -> bool:
    """Put what was written in the place of what YAML made of it, where a text is wanted; whether there was any."""
    root = raw if error.title in (AlignConfig.__name__, PretrainConfig.__name__) else raw.get("algorithm")
    taken = False
    for found in error.errors(include_url=False):
        if found["type"] not in ("string_type", "literal_error", "list_type"):
            continue
        *path, key = untagged(found["loc"])
        container = _at(root, path)
        text = getattr(container, "texts", {}).get(key)
        if text is not None and not isinstance(container[key], str):
            container[key] = text
            taken = True
    return taken


def _at(value: Any, path: Sequence[str | int]) -> Any:
    """Return the value at a path of keys and indices; None where nothing lies there."""
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _checked_align(raw: dict[str, Any], base: Path, require_files: bool) -> Loaded[AlignConfig]:
    if "latents" in raw:
        raise ConfigError("latents", "belongs to a training run on latents, for `flowalign pretrain` or `distill`")
    config = resolve_run(validate(AlignConfig, raw), base, code=True)
    algorithm = checks.parse_algorithm(config.algorithm, "Trajectories")
    missing = _lacking(_reward_checks(config, base, algorithm.needs), require_files)
    missing += _lacking(_run_checks(config, base, algorithm.needs), require_files)
    config, lacking = _adapted(config, require_files)
    missing += lacking
    config = _walked(config, algorithm, "evaluation", config.evaluation, require_files)
    checks.check_numbers(config, algorithm)
    check_signed_time(config.model, algorithm.needs, config.algorithm["type"])
    check_derivatives(config.learner, algorithm)
    missing += _lacking([partial(promptcheck.check_embedded, config, algorithm)], require_files)
    config, chosen = evened(config, algorithm)
    config, compiled = compiled_as_begun(config)
    return Loaded(config, base, tuple(missing), chosen=(*chosen, *compiled))


def _lacking(checked: Iterable[Callable[[], None]], require_files: bool) -> list[str]:
    """Return the things that this machine lacks for a run, a sentence each.

    With ``require_files`` the first is raised.
    """
    missing = []
    for check in checked:
        try:
            check()
        except ConfigError as error:
            if require_files:
                raise
            missing.append(str(error))
    return missing


def _adapted(config: Config, require_files: bool = True) -> tuple[Config, list[str]]:
    """Return ``config`` as `with_adapters`; without ``require_files`` also what this machine lacks for it."""
    try:
        return with_adapters(config), []
    except ConfigError as error:
        if require_files:
            raise
        return config, [str(error)]


def _reward_checks(config: AlignConfig, base: Path, needs: Needs) -> Iterator[Callable[[], None]]:
    """Yield the checks that every reward and every judge can be had."""
    for i, reward in enumerate(config.rewards):
        if needs.reward:
            yield partial(check_gradient, f"rewards.{i}", reward, base, config.algorithm["type"])
        else:
            yield partial(check_reward, f"rewards.{i}", reward, base, TRAINING)
    yield partial(check_reward_names, "rewards", config.rewards)
    yield from _judge_checks(config, base)
    if config.safety.clip is not None:
        clip = RewardConfig(spec="clip", options={"path": config.safety.clip})
        yield partial(check_reward, "safety.clip", clip, base, EVALUATION)


def _judge_checks(config: RunConfig, base: Path) -> Iterator[Callable[[], None]]:
    """Yield the checks that every judge can be had."""
    if config.evaluation.scorer is not None:
        yield partial(check_judge, "evaluation.scorer", config.evaluation.scorer, base)
    for i, reward in enumerate(config.evaluation.gold):
        yield partial(check_judge, f"evaluation.gold.{i}", reward, base)
    yield partial(check_reward_names, "evaluation", config.evaluation.judges)


def _evaluation_checks(config: RunConfig, base: Path) -> Iterator[Callable[[], None]]:
    """Yield checks that an evaluation on the way can be had, where there is one."""
    evaluation = config.evaluation
    yield partial(check_cache, "evaluation.cache", evaluation.cache, config.model)
    if not evaluation.every:
        return
    for key in SCALES:
        guided = f"evaluation.{key}", getattr(evaluation, key)
        yield partial(promptcheck.check_guided, *guided, config.model, evaluation.prompts)
    if isinstance(config, PretrainConfig):
        yield from _judge_checks(config, base)
    if evaluation.prompts is None:
        yield partial(promptcheck.check_captions, evaluation)
    else:
        key, advice = "evaluation.prompts", DEFAULT_JUDGE if evaluation.judge != evaluation.scorer else ""
        yield partial(promptcheck.check_prompts, key, evaluation.prompts, evaluation.judges, advice=advice)
        yield partial(promptcheck.check_judged_tasks, evaluation, evaluation.prompts)


def _run_checks(config: AlignConfig, base: Path, needs: Needs) -> Iterator[Callable[[], None]]:
    """Yield checks that model and prompts are there and fit what learns and judges, and the machine holds the run."""
    prompts = config.data.prompts
    yield partial(checks.check_model, config, needs)
    yield partial(check_cache, "rollout.cache", config.rollout.cache, config.model)
    yield partial(check_rollouts, config.model)
    yield partial(promptcheck.check_prompts, "data.prompts", prompts, config.rewards)
    yield partial(promptcheck.check_negatives_read, config)
    yield partial(promptcheck.check_images_taken, config, base)
    yield partial(promptcheck.check_task_weights, config.data.task_weights, prompts)
    yield partial(promptcheck.check_reward_tasks, config.rewards, prompts)
    yield partial(scorecheck.check_every_prompt_scored, config, needs)
    yield partial(scorecheck.check_curriculum, config, needs)
    yield partial(scorecheck.check_refill, config, needs)
    yield partial(promptcheck.check_tasks_taught, config, needs)
    for key, scale, model in _scales(config, needs):
        yield partial(promptcheck.check_guided, key, scale, model, prompts)
    yield from _evaluation_checks(config, base)
    here = config.cluster.backend == "local" or config.cluster.address is None
    yield partial(check_device, "cluster.device", config.cluster.device, here)
    yield partial(config.cluster.check_cores, config.learner.ranks, len(needs.teachers))


def _scales(config: AlignConfig, needs: Needs) -> Iterator[tuple[str, float, ModelConfig]]:
    """Give the scales of guidance of an algorithm and of its teachers by their keys, and the model that each is of."""
    for name, value in config.algorithm.items():
        if name.endswith("guidance_scale") and isinstance(value, int | float):
            yield f"algorithm.{name}", value, config.model
    for name, teacher in needs.teachers.items():
        own = teacher_model(teacher, config.model)
        yield from ((f"algorithm.teachers.{name}.{key}", getattr(teacher, key), own) for key in SCALES)


def _checked_pretrain(
    raw: dict[str, Any], base: Path, command: str, require_files: bool = True
) -> Loaded[PretrainConfig]:
    if "rewards" in raw and "latents" not in raw:
        raise ConfigError("rewards", "belongs to an alignment, for `flowalign align`")
    if moved := moved_keys(raw):
        (old, new), *others = moved.items()
        also = ", ".join(f"{was} is {now}" for was, now in others)
        raise ConfigError(old, f"is {new} now" + (also and f"; {also}"))
    config = resolve_run(validate(PretrainConfig, raw), base, code=True)
    algorithm = checks.parse_algorithm(config.algorithm, "LatentBatch")
    if command == "distill" and config.teacher is None and not algorithm.needs.teacher:
        name = config.algorithm["type"]
        raise ConfigError("algorithm.type", f"{name} learns from no teacher; use `flowalign pretrain`")
    check_training(config, algorithm.needs)
    check_derivatives(config.learner, algorithm)
    missing = _lacking(_training_checks(config, algorithm.needs), require_files)
    config, lacking = _adapted(config, require_files)
    missing += lacking + _lacking(_evaluation_checks(config, base), require_files)
    config = _walked(config, algorithm, "evaluation", config.evaluation, require_files)
    missing += _lacking([partial(promptcheck.check_embedded, config, algorithm)], require_files)
    config, compiled = compiled_as_begun(config)
    return Loaded(config, base, tuple(missing), chosen=compiled)


def _training_checks(config: PretrainConfig, needs: Needs) -> Iterator[Callable[[], None]]:
    """Yield checks that latents and model are there, and that the machine holds the run."""
    yield partial(check_banks, config)
    yield partial(checks.check_model, config, needs)
    yield partial(check_ranks, config)
    here = config.cluster.backend == "local" or config.cluster.address is None
    yield partial(check_device, "cluster.device", config.device, here)
    yield partial(config.cluster.check_cores, config.learner.ranks, 0, makes_images=config.makes_images)


def _walked(
    config: Config, algorithm: Algorithm, section: str, sampling: SamplingConfig, require_files: bool = True
) -> Config:
    """Return ``config`` with all keys of its algorithm. Its levels exist, as those of ``sampling`` do."""
    check_finite(algorithm.config.model_dump(), "algorithm")
    own = schedule_of(config.model, require_files)
    check_walks(config.model, algorithm, own, section, sampling)
    return config.model_copy(update={"algorithm": filled(algorithm.config, config.model, own)})


def validate(model: type[AnySection], raw: Mapping[str, Any]) -> AnySection:
    check_finite(raw)
    try:
        config = model.model_validate(plain(raw))
    except ValidationError as error:
        raise explain(error, model) from error
    check_finite(config.model_dump())
    return config
