"""Evaluations on demand: by the run's own judge, or by a public benchmark's official verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowalign.config.prompts import Prompts
from flowalign.config.sampled import Sampled
from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig
from flowalign.intake.file import validate
from flowalign.intake.paths import resolve_reward
from flowalign.samples.offers import EVALUATION, FOLDER, check_judge, check_reward
from rewards.interface import Offers


def asked_evaluation(
    config: Sampled,
    suite: bool,
    detector: str | None,
    prompts: Prompts | None,
    num_samples: int | None,
    *,
    scorer: str | None = None,
    num_images: int | None = None,
) -> tuple[Sampled, int]:
    """Return the configuration of an evaluation that is asked for, and its number of samples. It can judge its prompts.

    ``suite`` or a ``detector`` asks for `geneval_suite`, ``scorer`` for another judge, see `given_scorer`.
    ``num_images`` are those of each prompt, in the place of a number of samples.

    Raises:
        ConfigError: the prompts cannot be read, what judges them cannot judge these, or two things are asked for.
    """
    if num_images is not None and num_samples is not None:
        raise ConfigError("--num-images", "counts the images of each prompt, and --num-samples all of them; give one")
    if suite or detector is not None:
        if scorer is not None:
            raise ConfigError("--scorer", "is another judge than GenEval's, which --suite and --detector ask for")
        config, num_samples = geneval_suite(config, detector, prompts, num_samples, num_images)
    elif scorer is not None:
        config = _judged_by(config, given_scorer(scorer, EVALUATION))
    from flowalign.data.prompts import load_prompts
    from flowalign.intake.check_prompts import check_judged_tasks, check_prompts
    from flowalign.intake.file import DEFAULT_JUDGE

    key, source = ("--prompts", prompts) if prompts else ("evaluation.prompts", config.evaluation.prompts)
    default = "" if config.evaluation.scorer else f"{DEFAULT_JUDGE}; give another one: --scorer NAME"
    check_prompts(key, source, config.evaluation.judges, advice=default)
    check_judged_tasks(config.evaluation, source)
    if num_images is not None:
        num_samples = num_images * len(load_prompts(source))
    return config, num_samples or config.evaluation.num_samples


def folder_judges(suite: bool, detector: str | None, scorer: str | None, geneval: bool) -> list[RewardConfig]:
    """Return what judges pictures that are there: ``scorer``, else GenEval's official verdicts.

    Raises:
        ConfigError: none is named and the folder is not in GenEval's layout, or it cannot be built.
    """
    if scorer is not None:
        if suite or detector is not None:
            raise ConfigError("--scorer", "is another judge than GenEval's, which --suite and --detector ask for")
        return [given_scorer(scorer, FOLDER)]
    if not (suite or detector is not None or geneval):
        raise ConfigError("--folder", "is not in GenEval's layout; say what judges its pictures: --scorer NAME")
    return [_official("palette" if detector is None else _detector(detector), FOLDER)]


def given_scorer(text: str, offers: Offers) -> RewardConfig:
    """Return the judge that a command line names: a spec, or a section of ``evaluation.scorer`` as JSON.

    Raises:
        ConfigError: it is no JSON, or the judge cannot be built.
    """
    judge, here = validate(RewardConfig, _json("--scorer", text) if _is_json(text) else {"spec": text}), Path.cwd()
    judge = resolve_reward(judge, here, "--scorer")
    check_judge("--scorer", judge, here, offers)
    return judge


def geneval_suite(
    config: Sampled,
    detector: str | None,
    prompts: Prompts | None,
    num_samples: int | None,
    num_images: int | None = None,
) -> tuple[Sampled, int]:
    """Return the configuration with the public benchmark's official verdicts, and its number of samples: 4 a prompt.

    ``detector`` is a name or JSON options; by default that of the run's own geneval reward, else the palette.

    Raises:
        ConfigError: the detector cannot be built, or the prompts are not in GenEval's format.
    """
    from flowalign.data.prompts import load_prompts
    from flowalign.intake.check_prompts import check_prompts

    source = prompts or config.evaluation.prompts
    configured = [config.evaluation.scorer, *config.rewards]
    own = [reward.options.get("detector") for reward in configured if reward is not None and reward.spec == "geneval"]
    chosen: Any = next((known for known in own if known is not None), "palette")
    scorer = _official(chosen if detector is None else _detector(detector), EVALUATION)
    check_prompts("--prompts", source, [scorer])
    return _judged_by(config, scorer), num_samples or (num_images or 4) * len(load_prompts(source))


def _official(detector: Any, offers: Offers) -> RewardConfig:
    here, scorer = Path.cwd(), RewardConfig(spec="geneval", options={"mode": "official", "detector": detector})
    scorer = resolve_reward(scorer, here, "--detector")
    check_reward("--detector", scorer, here, offers)
    return scorer


def _judged_by(config: Sampled, judge: RewardConfig) -> Sampled:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"scorer": judge})})


def _detector(text: str) -> Any:
    return _json("--detector", text) if _is_json(text) else text


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def _json(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        example = '{"spec": …, "options": …}' if key == "--scorer" else '{"type": …}'
        raise ConfigError(key, f"is not JSON ({error}); write a name or {example}") from error
