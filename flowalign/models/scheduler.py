"""The scheduler of a pipeline directory: what it makes of a number of steps.

What is not reproduced is refused by name.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowalign.flow import schedule
from flowalign.flow.schedule import PipelineSchedule
from flowalign.models.errors import ModelError
from flowalign.record.textfiles import TextError, read_object

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
FILE = "scheduler_config.json"
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}
# Each makes levels of its own from the first and the last of those that it is given.
CONVERSIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal")
_POSITIVE = ("shift", "base_image_seq_len", "max_image_seq_len")


def to_one_nth(num_steps: int) -> list[float]:
    """Return the levels from 1 to 1/N, evenly spaced, which most pipelines that hand over levels hand over."""
    return np.linspace(1.0, 1 / num_steps, num_steps).tolist()


def check_scheduler(directory: Path, title: str = "pipelines") -> dict[str, Any]:
    """Return the options of a pipeline's scheduler, those that its file leaves out included; in milliseconds.

    Raises:
        ModelError: the file is missing or unreadable, names another scheduler, or an option that is unknown, malformed
            or not reproduced. A consistency student of ours may have ``stochastic_sampling``, which its solver takes
            the place of.
    """
    index = _read(directory / "model_index.json")
    named = index.get("scheduler") or [None, None]
    written = _read(directory / "scheduler" / FILE)
    for found in (named[-1], written.get("_class_name")):
        if found not in (None, SCHEDULER):
            raise ModelError(
                f"model.path: {directory} has a {found}; {title} is walked as {SCHEDULER} walks, so give the pipeline "
                f"that scheduler"
            )
    try:
        return checked_options(written, noises=_is_consistency_student(directory))
    except ModelError as error:
        raise ModelError(f"model.path: {directory / 'scheduler' / FILE}: {error}") from error


def checked_options(written: Mapping[str, Any], *, noises: bool = True) -> dict[str, Any]:
    """Return every option of a scheduler, checked.

    ``noises`` allows ``stochastic_sampling``. Raise ModelError for others.
    """
    own = {key: value for key, value in written.items() if not key.startswith("_")}
    unknown = sorted(set(own) - set(DEFAULTS))
    if unknown:
        raise ModelError(f"the option {unknown[0]} is none of {SCHEDULER}, so its walk is not known; leave it out")
    options = {**DEFAULTS, **own}
    for name, value in options.items():
        _check_value(name, value, options)
    if options["invert_sigmas"]:
        raise ModelError("invert_sigmas walks from data to noise, which is not reproduced here")
    if options["stochastic_sampling"] and not noises:
        raise ModelError(
            "stochastic_sampling noises every step anew, which is reproduced for consistency students of flowalign "
            "alone (known by their flowalign.json); set it to false"
        )
    if options["use_dynamic_shifting"] and options["base_image_seq_len"] == options["max_image_seq_len"]:
        raise ModelError("base_image_seq_len and max_image_seq_len are one number, between which no shift can grow")
    if sum(bool(options[name]) for name in CONVERSIONS[:3]) > 1:
        raise ModelError("only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be true")
    return options


def _check_value(name: str, value: Any, options: Mapping[str, Any]) -> None:
    wanted = ""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(DEFAULTS[name], bool):
        wanted = "" if isinstance(value, bool) else "true or false"
    elif name == "time_shift_type":
        wanted = "" if value in ("exponential", "linear") else "exponential or linear"
    elif name == "shift_terminal":
        wanted = "" if value is None or (number and 0 <= value < 1) else "null or a number from 0 to below 1"
    elif name == "num_train_timesteps":
        wanted = "" if type(value) is int and 1 <= value <= 10**6 else "a whole number from 1 to 1000000"
    elif name in _POSITIVE:
        wanted = "" if number and value > 0 else "a number above 0"
    elif options["use_dynamic_shifting"]:
        wanted = "" if number else "a number"
    if wanted:
        raise ModelError(f"{name} is {value!r}; write {wanted}")


@dataclass(frozen=True)
class FlowScheduler:
    """A scheduler of flow levels with its options, and what the pipeline hands it.

    ``mu`` belongs to an image size; it is None where the shift is static. ``given`` makes the levels that it is handed
    for a number of steps; None: it is handed the number.
    """

    options: Mapping[str, Any]
    mu: float | None = None
    given: Callable[[int], Sequence[float]] | None = None

    def schedule(self, resolution: float = 1.0) -> PipelineSchedule:
        """Return the walk of the pipeline; ``resolution`` is the root of the size asked for over the model's own."""
        own, shift = self.options, float(self.options["shift"])
        if self.mu is not None:
            # e^mu / (e^mu + 1 / t - 1) is the shift by e^mu, and its linear form that by mu.
            shift = math.exp(min(self.mu, 700)) if own["time_shift_type"] == "exponential" else self.mu
        return PipelineSchedule(
            shift=shift,
            resolution=resolution,
            dynamic=self.mu is not None,
            converts=next((name for name in CONVERSIONS if own[name]), None),
            named_shift=float(own["shift"]),
            num_train_timesteps=int(own["num_train_timesteps"]),
            is_given=self.given is not None,
            make=self.levels,
        )

    def levels(self, num_steps: int, shift: float | None = None) -> Tensor:
        """Return the levels, float32 (num_steps + 1,), falling from exactly 1 to 0.

        A ``shift`` is static, in the place of its own.

        Raises ValueError where the scheduler makes no such levels.
        """
        own = self.options
        dynamic = self.mu is not None and shift is None
        if not dynamic and self.given is None and not any(own[name] for name in CONVERSIONS):
            static = float(own["shift"]) if shift is None else shift
            return schedule.sigmas(num_steps, static, "diffusers", int(own["num_train_timesteps"]))
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        replaced = {} if shift is None else {"use_dynamic_shifting": False, "shift": shift}
        scheduler = FlowMatchEulerDiscreteScheduler(**{**own, **replaced})
        # Rounded to float32, a shifted 1 may be 0.99999988 or 1.0000001.
        scheduler.sigma_max = 1.0
        with np.errstate(all="ignore"):  # what is no number is refused below
            handed = {"num_inference_steps": num_steps} if self.given is None else {"sigmas": self.given(num_steps)}
            scheduler.set_timesteps(**handed, mu=self.mu if dynamic else None)  # type: ignore[arg-type]
        levels = torch.as_tensor(scheduler.sigmas, dtype=torch.float32)
        return schedule.checked_levels(levels, f"the walk of {num_steps} steps of the model's scheduler")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"model.path: {path} is missing; the download or export is incomplete")
    try:
        marked, content = path.read_bytes().startswith(codecs.BOM_UTF8), read_object(path)
    except (OSError, TextError) as error:
        raise ModelError(f"model.path: {error}") from error
    if marked:  # diffusers would end in a traceback
        raise ModelError(f"model.path: {path} begins with a byte order mark, which JSON has not; save it without one")
    return content


def _is_consistency_student(directory: Path) -> bool:
    record = directory / "flowalign.json"
    sampling = _read(record).get("sampling") if record.is_file() else None
    return isinstance(sampling, dict) and sampling.get("solver") == "consistency"
