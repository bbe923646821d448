"""Evaluations on demand: by the run's own judge, or by a public benchmark's official verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowalign.config.sampled import Sampled
from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig


def asked_evaluation(
    config: Sampled, suite: bool, detector: str | None, prompts: str | None, num_samples: int | None
) -> tuple[Sampled, int]:
    """Return the configuration of an evaluation that is asked for, and its number of samples. It can judge its prompts.

    ``suite`` or a ``detector`` asks for `geneval_suite`.

    Raises:
        ConfigError: the prompts cannot be read, or what judges them cannot judge these.
    """
    if suite or detector is not None:
        config, num_samples = geneval_suite(config, detector, prompts, num_samples)
    from flowalign.intake.check_prompts import check_judged_tasks, check_prompts
    from flowalign.intake.file import DEFAULT_JUDGE

    key, source = ("--prompts", prompts) if prompts else ("evaluation.prompts", config.evaluation.prompts)
    default = "" if config.evaluation.scorer else f"{DEFAULT_JUDGE}; a configuration given with --config may"
    check_prompts(key, source, config.evaluation.judges, advice=default)
    check_judged_tasks(config.evaluation, source)
    return config, num_samples or config.evaluation.num_samples


def geneval_suite(
    config: Sampled, detector: str | None, prompts: str | None, num_samples: int | None
) -> tuple[Sampled, int]:
    """Return the configuration with the public benchmark's official verdicts, and its number of samples: 4 a prompt.

    ``detector`` is a name or JSON options; by default that of the run's own geneval reward, else the palette.

    Raises:
        ConfigError: the detector cannot be built, or the prompts are not in GenEval's format.
    """
    from flowalign.data.prompts import load_prompts
    from flowalign.intake.check_prompts import check_prompts
    from flowalign.intake.paths import resolve_reward
    from flowalign.samples.offers import EVALUATION, check_reward

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
    check_reward("--detector", scorer, here, EVALUATION)
    check_prompts("--prompts", source, [scorer])
    evaluation = config.evaluation.model_copy(update={"scorer": scorer})
    return config.model_copy(update={"evaluation": evaluation}), num_samples or 4 * len(load_prompts(source))
