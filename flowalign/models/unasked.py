"""What a pipeline's own call takes of its accord, as this project writes it."""

from __future__ import annotations

import inspect
from typing import Any

from flowalign.config.sections import ModelConfig
from flowalign.models.directory import Directory
from flowalign.models.loading import pipeline_of
from flowalign.types import Guidance

_SHOWN = Guidance(4.0)  # a scale that guides in every family, to see where the pipeline is given it


def unasked(directory: Directory, model: ModelConfig) -> dict[str, Any]:
    """Return ``num_steps``, ``guidance_scale`` and ``max_sequence_length`` of a call that names none of them.

    The guidance is a scale of ours; 1, none, where the pipeline guides with a negative prompt alone and ``model``
    has none. A value that the pipeline does not have is left out.
    """
    family, defaults = directory.family, inspect.signature(pipeline_of(directory.family).__call__).parameters
    call = family.guidance_call(directory.config("transformer"), _SHOWN)
    shown = _SHOWN.scale - family.guidance_offset
    scale = next((defaults[name].default + family.guidance_offset for name, own in call.items() if own == shown), 1.0)
    led = "negative_prompt" not in call or model.negative_prompt is not None
    found = {"num_steps": "num_inference_steps", "max_sequence_length": "max_sequence_length"}
    own = {name: defaults[theirs].default for name, theirs in found.items() if theirs in defaults}
    return own | {"guidance_scale": max(float(scale), 1.0) if led else 1.0}
