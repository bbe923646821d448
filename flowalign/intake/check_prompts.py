"""Checks of a run's prompts: rows that a reward cannot judge, tasks that no row or no teacher has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowalign.algorithm import Algorithm, Needs
from flowalign.config.alignment import AlignConfig
from flowalign.config.prompts import NEGATIVE, Prompts, PromptsConfig
from flowalign.config.run import EvaluationConfig, RunConfig
from flowalign.config.section import ConfigError, nearest
from flowalign.config.sections import ModelConfig, RewardConfig
from flowalign.models.directory import family_of_model
from flowalign.models.errors import ModelError

if TYPE_CHECKING:
    from flowalign.data.sources.place import Place

NO_TASKS = "they have no tasks, which a column `task` names; leave this out"


def check_prompts(key: str, source: Prompts, rewards: Sequence[RewardConfig], *, advice: str = "") -> None:
    """Check that the prompts load, and that every reward can judge every row that it is for.

    The first wrong row is said, and how many more there are; ``advice`` where it is a reward that cannot judge it.
    """
    from flowalign.record.textfiles import and_more
    from flowalign.samples.references import check_reference
    from flowalign.types import task_of
    from rewards.interface import InputError, ScorerError
    from rewards.resolve import check, row_check

    rows, wrong = _placed(key, source)
    for reward in rewards:
        try:
            judges = [row_check(spec := {"type": reward.spec, **reward.options})]
            # What is installed in another environment cannot be looked at.
            compares = reward.runtime_env is None and "references" in check(spec)
        except ScorerError:
            continue  # check_reward says it
        judges += [check_reference] if compares else []
        for place, (where, row) in rows.items() if any(judges) else ():
            if reward.tasks is None or task_of(row) in reward.tasks:
                try:
                    for judge in filter(None, judges):
                        judge(row)
                except InputError as error:
                    wrong.setdefault(place, f"{where}: {str(error).removeprefix('metadata: ')}{advice}")
    if wrong:
        raise ConfigError(key, wrong[min(wrong)] + and_more(len(wrong) - 1))


def check_guided(key: str, scale: float, model: ModelConfig, source: Prompts | None) -> None:
    """Check that there is something that guidance leads away from: of the model, or of every row of the prompts."""
    from flowalign.data.prompts import PromptsError, load_prompts
    from flowalign.samples.arrange import check_negatives

    try:
        family_of_model(model)
        rows = [{}] if source is None else load_prompts(source)
    except (ModelError, PromptsError):
        return  # check_model and check_prompts say it
    try:
        check_negatives(model, scale, rows, true=key.endswith("true_guidance_scale"))
    except ModelError as error:
        raise ConfigError(key, str(error)) from error


def check_negatives_read(config: AlignConfig) -> None:
    """Check that something is guided away from the negative prompts of a column that is named as theirs."""
    from flowalign.intake.notes_of_walks import unguided

    for key, source in _sources(config).items():
        column = source.columns.get(NEGATIVE) if isinstance(source, PromptsConfig) else None
        try:
            scale = None if column is None else unguided(config)
        except ModelError:
            return  # check_model says it
        if scale is not None:
            raise ConfigError(
                f"{key}.columns.{NEGATIVE}",
                f"nothing leads away from the column {column!r}, since no {scale} is above 1; set algorithm.{scale}, "
                "or leave this out",
            )


def check_images_taken(config: AlignConfig, base_dir: Path) -> None:
    """Check that a reward takes the reference pictures of a column that is named as theirs."""
    from rewards.interface import ScorerError
    from rewards.resolve import check

    asked = {"data.prompts": config.rewards, "evaluation.prompts": config.evaluation.judges}
    for key, source in _sources(config).items():
        column = source.columns.get("image") if isinstance(source, PromptsConfig) else None
        if column is None or any(reward.runtime_env is not None for reward in asked[key]):
            continue  # what is installed in another environment cannot be looked at
        try:
            needs = [check({"type": reward.spec, **reward.options}, base_dir) for reward in asked[key]]
        except ScorerError:
            return  # check_reward says it
        if not any("references" in own for own in needs):
            whose = "reward" if key == "data.prompts" else "scorer of an evaluation"
            raise ConfigError(
                f"{key}.columns.image",
                f"no {whose} takes the reference pictures of the column {column!r}; leave it out, or name one that "
                "needs `references`",
            )


def _sources(config: AlignConfig) -> dict[str, Prompts]:
    """Return the prompts that a run reads, by their keys."""
    data, evaluation = config.data, config.evaluation
    found: dict[str, Prompts] = {} if data.preferences is not None else {"data.prompts": data.prompts}
    return found | ({"evaluation.prompts": evaluation.prompts} if evaluation.every else {})


def check_embedded(config: RunConfig, algorithm: Algorithm) -> None:
    """Check that every prompt has an embedding on disk where nothing may encode one."""
    from flowalign.data.banks.bank import LatentsError
    from flowalign.data.prompts import PromptsError
    from flowalign.models.embeddings import EmbeddingStore
    from flowalign.run.encoded import refuse_missing
    from flowalign.samples.opened import torch_threads
    from flowalign.samples.texts import texts_of_run

    if config.rollout.text_encoders != "never":
        return
    try:
        with torch_threads(config.threads):
            embeddings = EmbeddingStore(config.embeddings, config.model, config.device)
            refuse_missing(config, embeddings, texts_of_run(config, algorithm))
    except (PromptsError, LatentsError, ModelError):
        return  # check_prompts, check_model and the run say it


def check_captions(evaluation: EvaluationConfig) -> None:
    """Check that judges can do with the captions of a bank, which have neither tags nor anything else beside them."""
    from rewards.interface import InputError, ScorerError
    from rewards.resolve import row_check

    advice = "give evaluation.prompts, such as shapes:eval"
    scorers = {} if evaluation.scorer is None else {"evaluation.scorer": evaluation.scorer}
    scorers |= {f"evaluation.gold.{i}": reward for i, reward in enumerate(evaluation.gold)}
    for key, reward in scorers.items():
        if reward.tasks:
            raise ConfigError(f"{key}.tasks", f"the bank's captions, which are evaluated, have no tasks; {advice}")
        try:
            judges = row_check({"type": reward.spec, **reward.options})
            if judges is not None:
                judges({"prompt": "a caption"})
        except InputError as error:
            said = str(error).removeprefix("metadata: ")
            raise ConfigError(
                key, f"cannot judge the bank's captions, which are evaluated: one {said}; {advice}"
            ) from None
        except ScorerError:
            continue  # check_reward says it


def _placed(key: str, source: Prompts) -> tuple[dict[int, tuple[Place, dict[str, Any]]], dict[int, str]]:
    """Return the rows with where they stand, and the faults of others, both by their number in the source."""
    from flowalign.data.promptsets import BadPrompts, placed_prompts
    from flowalign.intake.given_prompts import named

    with named(key):
        try:
            return dict(enumerate(placed_prompts(source))), {}
        except BadPrompts as error:
            return error.rows, dict(error.wrong)


def check_task_weights(weights: Mapping[str, int], source: Prompts) -> None:
    """Check that every weighted task occurs in the prompts, and that something is left to draw."""
    from flowalign.data.prompts import PromptsError, load_prompts, task_cycle

    try:
        rows = load_prompts(source)
    except PromptsError:
        return  # check_prompts says it
    try:
        task_cycle(rows, weights)
    except PromptsError as error:
        raise ConfigError("data.task_weights", str(error).removeprefix("data.task_weights: ")) from error


def check_reward_tasks(rewards: Sequence[RewardConfig], source: Prompts) -> None:
    """Check that every task of a reward occurs in the prompts, and every prompt has a reward that is trained on."""
    found = _tasks_of(source)
    if not found:
        return
    for i, reward in enumerate(rewards):
        _check_tasks_there(f"rewards.{i}", reward, source, found)
    trained = [reward for reward in rewards if reward.terms]
    if trained and all(reward.tasks is not None for reward in trained):
        covered = {task for reward in trained for task in reward.tasks or ()}
        if left := [task for task in found if task not in covered]:
            raise ConfigError("rewards", f"none is for the task {left[0]!r} of {source}; add one, or drop a `tasks`")


def check_judged_tasks(evaluation: EvaluationConfig, source: Prompts) -> None:
    """Check that every task that a scorer of an evaluation is for occurs in its prompts."""
    scorers = {} if evaluation.scorer is None else {"evaluation.scorer": evaluation.scorer}
    scorers |= {f"evaluation.gold.{i}": reward for i, reward in enumerate(evaluation.gold)}
    if any(reward.tasks for reward in scorers.values()):
        found = _tasks_of(source)
        for key, reward in scorers.items() if found else ():
            _check_tasks_there(key, reward, source, found)


def _tasks_of(source: Prompts) -> list[str]:
    """Return the tasks of the prompts in their order; none where they cannot be read, which `check_prompts` says."""
    from flowalign.data.prompts import PromptsError, load_prompts
    from flowalign.types import task_of

    try:
        return list(dict.fromkeys(map(task_of, load_prompts(source))))
    except PromptsError:
        return []


def _check_tasks_there(key: str, reward: RewardConfig, source: Prompts, found: Sequence[str]) -> None:
    if unknown := [task for task in reward.tasks or () if task not in found]:
        known = nearest(unknown[0], found) if any(found) else NO_TASKS
        raise ConfigError(f"{key}.tasks", f"no prompt of {source} has the task {unknown[0]!r}; {known}")


def check_tasks_taught(config: AlignConfig, needs: Needs) -> None:
    """Check that every task of the prompts has its teacher."""
    from flowalign.data.prompts import PromptsError, load_prompts
    from flowalign.types import task_of

    if needs.teacher_of is None:
        return
    try:
        rows = load_prompts(config.data.prompts)
    except PromptsError:
        return  # check_prompts says it
    weights = config.data.task_weights
    try:
        for row in rows:
            if weights.get(task_of(row), 1):
                needs.teacher_of(row)
    except ValueError as error:
        raise ConfigError("algorithm.teachers", str(error).removeprefix("algorithm.teachers: ")) from error
