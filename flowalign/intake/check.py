"""Checks of a configuration, in the user's words, some of which span several of its keys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from flowalign.config.alignment import AlignConfig
from flowalign.config.largest import IMAGES
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig, RewardConfig
from flowalign.config.teachers import TeacherConfig
from flowalign.config.training import PretrainConfig
from rewards.interface import Offers

if TYPE_CHECKING:  # torch is loaded where an algorithm is, not before
    from flowalign.algorithm import Algorithm, Needs
    from flowalign.models.family import ModelFamily

Key = tuple[str | int, ...]
CORES_PROMISED = 2
LONGEST = 600  # characters of a reason
COMMANDS = {"Trajectories": "align", "PreferencePairs": "align", "LatentBatch": "pretrain or distill"}


def dotted(key: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in key)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean …?``, or all that is known."""
    choices = list(known)
    near = get_close_matches(name, choices, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(choices)}"


def explain(error: ValidationError, model: type[BaseModel], prefix: Key = ()) -> ConfigError:
    """Return one sentence about pydantic's first finding; the others are counted, and named where all are missing."""
    found = error.errors(include_url=False)
    # An unknown key is the likelier cause of a missing one than the other way round.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    key, reason = _sentence(first, model, prefix)
    others = [e for e in found if e is not first]
    if lacking := [dotted((*prefix, *e["loc"])) for e in others if e["type"] == first["type"] == "missing"]:
        reason += f", and so {'is' if len(lacking) == 1 else 'are'} {', '.join(lacking)}"
    reason = reason if len(reason) <= LONGEST else f"{reason[: LONGEST - 1]}…"
    if rest := len(others) - len(lacking):
        reason += f" ({rest} more after this)"
    return ConfigError(key, reason)


def _sentence(error: Any, model: type[BaseModel], prefix: Key) -> tuple[str, str]:
    loc: Key = tuple(part for part in error["loc"] if part != "[key]")  # pydantic's mark where the key itself is wrong
    key = dotted((*prefix, *loc))
    if error["type"] == "extra_forbidden":
        return key, f"unknown key; {_hint(str(loc[-1]), _section(model, loc[:-1]), model, prefix)}"
    if error["type"] == "missing":
        return key, f"is missing{_example(model, loc)}"
    if error["type"] == "value_error":
        return _own_words(str(error["ctx"]["error"]), model, (*prefix, *loc))
    if error["type"] == "string_pattern_mismatch":
        return key, f"got {_shown(error['input'])}; write letters, digits, '.', '_' and '-', a letter or digit first"
    reason = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        if near := get_close_matches(str(error["input"]), choices, n=1):
            reason += f"; did you mean {near[0]}?"
    if isinstance(error["input"], str) and re.fullmatch(r"[-+]?\d+,\d+", error["input"].strip()):
        whole = error["type"].startswith("int")
        text = error["input"].strip().replace(",", "" if whole else ".")
        reason += f"; write it {'without a comma' if whole else 'with a point'}: {text}"
    return key, f"got {_shown(error['input'])}, {reason}"


def _example(model: type[BaseModel], loc: Key) -> str:
    """Return an example of what is written under a required key of ``model``, where the key says so."""
    field = model.model_fields.get(str(loc[0])) if len(loc) == 1 else None
    return f"; write such as {field.examples[0]}" if field is not None and field.examples else ""


def _own_words(text: str, model: type[BaseModel], where: Key) -> tuple[str, str]:
    """Return the key and the words of one of our validators, which names its key itself or one of the section's
    fields."""
    named = re.match(r"^([a-z_]+(?:\.[a-z_]+)*): (.*)$", text, re.DOTALL)
    if named:
        return dotted((*where, named[1])), named[2]
    words = re.findall(r"[a-z_]+", text.replace("noisy steps in a row", "window"))
    field = next((word for word in words if word in model.model_fields), None)
    return dotted(where if field is None else (*where, field)), text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _hint(name: str, section: type[BaseModel] | None, model: type[BaseModel], prefix: Key) -> str:
    known = list(section.model_fields) if section is not None else []
    if get_close_matches(name, known, n=1, cutoff=0.75):
        return nearest(name, known)
    elsewhere = [path for path in [*_leaves(model), *_algorithm_leaves()] if path.rpartition(".")[2] == name]
    if elsewhere and not prefix:
        return f"did you mean {elsewhere[0]}?"
    return nearest(name, known)


def _section(model: type[BaseModel], loc: Key) -> type[BaseModel] | None:
    """Return the section that a path of keys and list indices leads to.

    Names in a mapping of sections are the user's.
    """
    found: type[BaseModel] | None = model
    named = False
    for part in (part for part in loc if isinstance(part, str)):
        if named:
            named = False
            continue
        field = found.model_fields.get(part) if found is not None else None
        found = None if field is None else _model_in(field.annotation)
        named = field is not None and get_origin(field.annotation) is dict
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _leaves(inner, f"{prefix}{name}.")


def _algorithm_leaves() -> list[str]:
    from flowalign.algorithms import algorithm_class, known_algorithms

    return [leaf for name in known_algorithms() for leaf in _leaves(algorithm_class(name).Config, "algorithm.")]


def algorithm_of(raw: dict[str, Any]) -> Algorithm:
    """Return the configured algorithm. Raise ConfigError where there is none of the name or its options are wrong."""
    from flowalign.algorithms import UnknownAlgorithm, algorithm_class, known_algorithms

    try:
        cls = algorithm_class(str(raw["type"]))
    except UnknownAlgorithm as error:
        reason = str(error).removeprefix("algorithm.type: ")
        named, known = str(raw["type"]), known_algorithms()
        near = get_close_matches(named, known, n=1) or [name for name in known if len(named) > 1 and named in name]
        raise ConfigError("algorithm.type", f"{reason}; did you mean {near[0]}?" if near else reason) from error
    try:
        return cls(cls.Config.model_validate(raw))
    except ValidationError as error:
        raise explain(error, cls.Config, ("algorithm",)) from error


def parse_algorithm(raw: dict[str, Any], batch: str) -> Algorithm:
    """Return the algorithm as `algorithm_of`; it must belong to the command of those that learn from a ``batch``."""
    algorithm = algorithm_of(raw)
    learns_from = algorithm.needs.batch.__name__
    command = COMMANDS.get(learns_from)
    if command != COMMANDS[batch]:
        advice = f"use `flowalign {command}`" if command else "no command makes that"
        raise ConfigError("algorithm.type", f"{raw['type']} learns from {learns_from}; {advice}")
    return algorithm


def model_family(name: str) -> ModelFamily:
    """Return the family behind ``model.type``."""
    from flowalign.models.base import ModelError
    from flowalign.models.family import family_of, known_families

    families = known_families()
    if "." not in name and name not in families:
        raise ConfigError("model.type", f"no model family {name!r}; {nearest(name, families)}")
    try:
        return family_of(name)
    except ModelError as error:
        raise ConfigError("model.type", str(error).removeprefix("model.type: ")) from error


def check_model(config: AlignConfig | PretrainConfig, needs: Needs) -> None:
    """Check that the model directory exists, is of the family's kind, and takes the image size.

    So do those of the algorithm's teachers; the preference pairs, where there are some, have their columns.
    """
    shape = check_pipeline("model.path", Path(config.model.path), config.model)
    own_teacher = config.teacher if isinstance(config, PretrainConfig) else None
    if own_teacher is not None and check_pipeline("teacher.path", Path(own_teacher.path), own_teacher) != shape:
        raise ConfigError("teacher.path", f"{own_teacher.path} has latents of another shape than the model's {shape}")
    for name, teacher in needs.teachers.items():
        key = f"algorithm.teachers.{name}"
        own = _checked_teacher(key, teacher, config.model)
        if own is not None and own != shape:
            raise ConfigError(f"{key}.path", f"{teacher.path} has latents of {own}, the model's are {shape}")
    if isinstance(config, AlignConfig) and config.data.preferences is not None:
        from flowalign.data.preferences import PreferencesError, check_source

        try:
            check_source(Path(config.data.preferences))
        except PreferencesError as error:
            raise ConfigError("data.preferences", str(error).removeprefix("data.preferences: ")) from error


def check_pipeline(key: str, path: Path, model: ModelConfig) -> tuple[int, int, int]:
    """Return the shape of a pipeline's latents without loading it."""
    if any((path / name).exists() for name in ("checkpoints", "MANIFEST.json")):
        raise ConfigError(
            key,
            f"{path} is a run or a checkpoint; a run starts from a pipeline, so make one: flowalign export {path} "
            "--to DIR, with --as ema for its averaged weights",
        )
    family = model_family(model.type)
    try:
        family.check(path)
        return family.latent_shape(path, model.height, model.width)
    except ValueError as error:
        reason = str(error).removeprefix("model.path: ")
        given = next((name for name in ("height", "width") if getattr(model, name) is not None), None)
        sized = key.endswith("path") and reason.startswith("image size") and given is not None
        raise ConfigError(f"{key.removesuffix('path')}{given}" if sized else key, reason) from error


def _checked_teacher(key: str, teacher: TeacherConfig, model: ModelConfig) -> tuple[int, int, int] | None:
    """Return the shape of a teacher's latents, None for a run.

    A teacher is a pipeline, or a run or checkpoint of this very model, whose latents are the model's.
    """
    from flowalign.record.checkpoint import CheckpointError, find

    path = Path(teacher.path)
    if (path / "model_index.json").is_file():
        if teacher.weights != "model":
            raise ConfigError(f"{key}.weights", f"{path} is a pipeline, which has one set of weights; leave it out")
        return check_pipeline(f"{key}.path", path, model)
    try:
        find(path, None)
    except CheckpointError as error:
        raise ConfigError(f"{key}.path", str(error)) from error
    return None


def check_reward(key: str, reward: RewardConfig, base_dir: Path, offers: Offers) -> None:
    """Check that the reward can be made of its options, and needs nothing that is not offered to it."""
    from rewards.interface import ScorerError
    from rewards.resolve import check

    try:
        check({"type": reward.spec, **reward.options}, base_dir, offers)
    except ScorerError as error:
        raise ConfigError(key, str(error)) from error


def check_reward_names(key: str, rewards: Sequence[RewardConfig]) -> None:
    """Check that no two rewards answer to one name."""
    from rewards.composite import Named, check_names
    from rewards.interface import ScorerError

    try:
        check_names([Named(reward.label, reward.spec, reward.name is not None) for reward in rewards], key)
    except ScorerError as error:
        raise ConfigError(key, str(error).removeprefix(f"{key}: ")) from error


def check_numbers(config: AlignConfig, algorithm: Algorithm) -> None:
    """Check counts that must fit together, and settings that need another one."""
    needs = algorithm.needs
    _check_pairs_wanted(config, needs)
    if needs.scores and not config.rewards:
        raise ConfigError("rewards", f"{config.algorithm['type']} needs at least one reward")
    if config.learner.ema_decay is None:
        for key, value in (
            ("algorithm.rollout_weights", needs.rollout_weights),
            ("evaluation.weights", config.evaluation.weights),
        ):
            if value == "ema":
                raise ConfigError(key, "ema needs learner.ema_decay, such as 0.99")
    plan = algorithm.plan(0, config.seed)
    _check_plan(config.algorithm["type"], needs, plan, config.rollout.cache is not None)
    images = config.data.groups_per_iteration * needs.group_size
    if images > IMAGES:
        raise ConfigError(
            "data.groups_per_iteration",
            f"{config.data.groups_per_iteration:,} groups of {needs.group_size:,} are "
            f"{images:,} images an iteration; at most {IMAGES:,} are possible",
        )
    items = images * (1 if plan is None else max(1, plan.noise.num_steps)) // needs.item_samples
    updates = config.learner.updates_per_iteration
    if needs.second is not None and updates * needs.second.updates > items:
        raise ConfigError(
            "learner.updates_per_iteration",
            f"{updates} updates, before each of which the second network makes {needs.second.updates}, need as many "
            f"transitions; an iteration has {items}",
        )
    if updates * config.learner.ranks > items:
        raise ConfigError(
            "learner.updates_per_iteration",
            f"{updates} updates on {config.learner.ranks} ranks need as many transitions; an iteration has {items}",
        )


def _check_plan(name: str, needs: Needs, plan: Any, cached: bool) -> None:
    """Check that an SDE has noisy steps, and that they lie on the schedule.

    An algorithm of the user's may plan anything.
    """
    if plan is None:
        if needs.batch.__name__ == "Trajectories":
            raise ConfigError(
                "algorithm.type",
                f"{name} learns from Trajectories and plans none; define plan(self, iteration, seed), which returns a "
                "SamplingPlan",
            )
        return
    noise = plan.noise
    begin, end = noise.window
    if not 0 <= begin <= end <= plan.num_steps:
        raise ConfigError("algorithm", f"{name} plans noise in steps [{begin}, {end}) of {plan.num_steps}")
    if cached and end - begin == plan.num_steps:
        raise ConfigError(
            "rollout.cache", f"{name} makes noise in every step, and no such step may be cached; leave the cache out"
        )
    if noise.kind != "ode" and begin == end:
        raise ConfigError("algorithm", f"{name} plans no step of kind {noise.kind}, so that it could learn nothing")


def _check_pairs_wanted(config: AlignConfig, needs: Needs) -> None:
    """Check that preference pairs are given where the algorithm learns from them, and nowhere else."""
    from flowalign.types import PreferencePairs

    wanted, given = needs.batch is PreferencePairs, config.data.preferences is not None
    if wanted and not given:
        raise ConfigError(
            "data.preferences",
            "is missing; give a parquet file or a folder, such as `flowalign make-preferences` writes",
        )
    if given and not wanted:
        raise ConfigError("data.preferences", f"{config.algorithm['type']} learns from what it rolls out; leave it out")


def check_device(key: str, device: str, here: bool = True) -> None:
    """Check that torch knows the device, and that this machine has it if the run starts ``here``."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(key, f"got {device!r}; write cpu, cuda or cuda:N")
    if here and device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(key, f"{device}, but torch sees no GPU here; set {key}=cpu")


def check_cores(config: AlignConfig, needs: Needs) -> None:
    """Check that the actors fit on this machine; they take turns, so its cores may be promised twice."""
    c, cores = config.cluster, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = {
        "cluster.rollout_cpus": c.rollout_workers * c.rollout_cpus,
        "cluster.reward_cpus": c.reward_workers * c.reward_cpus,
        "cluster.learner_cpus": config.learner.ranks * c.learner_cpus,
        "cluster.teacher_cpus": len(needs.teachers) * c.teacher_cpus * c.has_teacher_actors,
    }
    if sum(asked.values()) > CORES_PROMISED * cores:
        key = max(asked, key=lambda name: asked[name])
        raise ConfigError(
            key,
            f"all actors together need {sum(asked.values()):g} CPUs, this machine has {cores} cores, "
            f"and at most {CORES_PROMISED * cores} may be asked for; lower it or the number of actors",
        )
