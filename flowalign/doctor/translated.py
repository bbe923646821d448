"""How a model's guidance and noise levels are written here, in its own pipeline's words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from flowalign.doctor.checks import Check
from flowalign.doctor.files import Size
from flowalign.models.directory import Directory
from flowalign.models.loading import pipeline_of
from flowalign.types import Guidance

SHOWN_SCALE = 4.0
STEPS = 4


def guidance(directory: Directory) -> Iterator[Check]:
    """Say what a guidance scale of ours is to the pipeline."""
    family = directory.family
    network = directory.config("transformer")
    takes = family.takes_guidance(network)
    call = family.guidance_call(network, Guidance(SHOWN_SCALE))
    ours = f"guidance_scale {SHOWN_SCALE:g} here is {_written(call)} of the pipeline"
    how = ["an input of the network" if takes else "two passes, null + g (cond - null), none up to g = 1"]
    if family.guidance_offset:
        how.append(f"g is {family.guidance_offset:g} above the pipeline's number")
    if takes:
        how.append("true_guidance_scale is two passes on top")
    if family.negative is None:
        how.append("the pipeline makes two passes with a negative prompt alone, which may be empty")
    if family.guidance_norm != "none":
        how.append(f"each {family.guidance_norm} keeps the length of its conditional velocity")
    figures = {
        "call": call,
        "is_input": takes,
        "offset": family.guidance_offset,
        "negative": family.negative,
        "norm": family.guidance_norm,
    }
    yield Check("fact", "guidance", f"{ours}: {'; '.join(how)}", figures=figures)


def _written(call: dict[str, Any]) -> str:
    words = (f"{key}={value!r}" if isinstance(value, str) else f"{key}={value:g}" for key, value in call.items())
    return ", ".join(words) or "no argument"


def levels(directory: Directory, size: Size) -> Iterator[Check]:
    """Say what the pipeline hands its scheduler, and the noise levels of four steps and of its own number of steps."""
    walk, options = directory.schedule(*size), directory.scheduler
    handed = "levels from 1 to 1/N" if walk.is_given else "the number of steps"
    shift = f"dynamic, {walk.shift:.4g} at {size[0]}x{size[1]}" if walk.dynamic else f"static, {walk.shift:g}"
    said = f"the scheduler is handed {handed}; shift {shift}"
    if walk.converts is not None:
        said += f"; {walk.converts} {options[walk.converts]}"
    own = int(inspect.signature(pipeline_of(directory.family).__call__).parameters["num_inference_steps"].default)
    made = {count: walk.levels(count).tolist() for count in dict.fromkeys((STEPS, own))}
    shown = "; ".join(f"{count} steps: {_ends(values)}" for count, values in made.items())
    figures = {"given": walk.is_given, "dynamic": walk.dynamic, "shift": walk.shift, "converts": walk.converts}
    figures |= {"default_steps": own, "levels": {str(count): values for count, values in made.items()}}
    yield Check("fact", "levels", f"{said}; {shown}", figures=figures)


def _ends(values: list[float]) -> str:
    shown = [f"{value:.4g}" for value in values]
    return " ".join(shown if len(shown) <= STEPS + 1 else [*shown[:2], "…", *shown[-2:]])
