"""Checks of the levels that a run walks, and the one name of them that has changed since version 0.1."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign.algorithm import Algorithm, AlgorithmConfig, Needs
from flowalign.config.guidance import GuidanceKeys
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig, SamplingConfig
from flowalign.flow.schedule import PipelineSchedule
from flowalign.intake.paths import Config
from flowalign.models.checked import check_guidance
from flowalign.models.directory import network_inputs, open_directory
from flowalign.models.errors import ModelError
from flowalign.models.inspect import own_schedule
from flowalign.samples.cache import check_sampling
from flowalign.types import LatentBatch, PreferencePairs

OLD_GRID = "diffusers"
SECTIONS = ("algorithm", "evaluation")


def refuse_old_grid(raw: Mapping[str, Any], overrides: Sequence[str], recorded: bool) -> None:
    """Raise ConfigError where a user writes the old name; in a file that a run ``recorded`` it is 0.1's own grid."""
    changed = {assignment.partition("=")[0] for assignment in overrides}
    for section in SECTIONS:
        values = raw.get(section)
        ours = recorded and not changed & {section, f"{section}.grid"}
        if isinstance(values, Mapping) and values.get("grid") == OLD_GRID and not ours:
            raise ConfigError(
                f"{section}.grid",
                "diffusers is called pipeline now, the levels that the model's own pipeline walks; write pipeline, "
                "or leave it out",
            )


def schedule_of(model: ModelConfig, require_files: bool = True) -> PipelineSchedule:
    """Return the model's own walk; without ``require_files`` a default one where the files do not say it."""
    try:
        return own_schedule(model)
    except ModelError as error:
        if not require_files:
            return PipelineSchedule()
        raise ConfigError("model.path", str(error).removeprefix("model.path: ")) from error


def filled(config: AlgorithmConfig, model: ModelConfig, own: PipelineSchedule) -> dict[str, Any]:
    """Return all keys of the algorithm; ``shift`` null becomes the model's own, but stays null beside a dynamic one."""
    values: dict[str, Any] = config.model_dump(mode="json")
    if "shift" in values and values["shift"] is None and not own.dynamic and Path(model.path).exists():
        values["shift"] = own.named_shift
    return values


def check_walks(
    model: ModelConfig, algorithm: Algorithm, own: PipelineSchedule, section: str, sampling: SamplingConfig
) -> None:
    """Check that the algorithm's levels exist, those of ``sampling``, the section of that name, and its solver."""
    check_sampling(section, sampling)
    check_guidance(f"{section}.", sampling, model)
    if isinstance(algorithm.config, GuidanceKeys):
        check_guidance("algorithm.", algorithm.config, model)
    check_told(model, algorithm.needs)
    algorithm.schedule = own
    try:
        algorithm.check_schedule()
    except ValueError as error:
        raise _keyed("algorithm", error) from error
    if model.family not in (None, "rf"):
        return
    try:
        own.levels(sampling.num_steps, grid=sampling.grid)
    except ValueError as error:
        raise _keyed(section, error) from error
    if model.lora is not None and sampling.grid == "paper" and own.converts is not None:
        raise ConfigError(
            f"{section}.grid",
            f"paper cannot be sampled with a LoRA beside {own.converts} of the model's scheduler, which would make "
            "other levels of it; write pipeline",
        )


def renamed_grids(old: Config, new: Config, run_dir: Path) -> Config:
    """Return ``old`` with 0.1's name of a grid replaced by today's in ``new``, which the model's scheduler walks alike.

    Raises:
        ConfigError: it does not, so that the run would go on along other levels.
    """
    renamed = [section for section in SECTIONS if _grid(old, section) == OLD_GRID and _grid(new, section) == "pipeline"]
    if not renamed:
        return old
    if not schedule_of(new.model).is_static:
        raise ConfigError(
            f"{renamed[0]}.grid",
            f"{run_dir} was begun by version 0.1 on a static grid, which this model's scheduler does not walk; "
            f"continue it with its own {run_dir / 'config.yaml'}, or give this run another name",
        )
    update: dict[str, Any] = {}
    for section in renamed:
        values = getattr(old, section)
        now = {"grid": "pipeline"}
        update[section] = {**values, **now} if isinstance(values, dict) else values.model_copy(update=now)
    return old.model_copy(update=update)


def _grid(config: Any, section: str) -> Any:
    values = getattr(config, section, None)
    return values.get("grid") if isinstance(values, dict) else getattr(values, "grid", None)


def _keyed(section: str, error: ValueError) -> ConfigError:
    named = re.match(r"^(num_steps|shift|grid): (.*)$", str(error), re.DOTALL)
    return ConfigError(f"{section}.{named[1]}", named[2]) if named else ConfigError(section, str(error))


def check_told(model: ModelConfig, needs: Needs) -> None:
    """Check that a guidance for latents that are there already is told to a network that takes one."""
    if needs.batch not in (LatentBatch, PreferencePairs) or needs.guidance_scale == 1:
        return
    try:
        title, takes = open_directory(model).family.title, "guidance" in network_inputs(model)
    except ModelError:  # of a model that is not there, which is said elsewhere
        return
    if not takes:
        raise ConfigError(
            "algorithm.guidance_scale",
            f"the network of this {title} takes no guidance as an input; leave it out (that of pictures is "
            "evaluation.guidance_scale)",
        )
