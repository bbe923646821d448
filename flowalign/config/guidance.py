"""The keys of guidance, wherever a walk or a velocity has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Scale = Annotated[float, Field(ge=0)]


class GuidanceKeys(BaseModel):
    """How far a velocity leads away from that of the negative prompt."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    guidance_scale: Scale = 1.0
    """Guidance; 1 or less is none, unless the network takes it as an input."""
    true_guidance_scale: Scale = 1.0
    """Guidance by two passes of a network that takes ``guidance_scale`` as an input; 1 or less is none."""
    guidance_norm_cap: Annotated[float, Field(gt=0)] | None = None
    """Most that guidance by two passes may make of a velocity's length, as a multiple of the prompt's own; null: any.
    """
    guidance_until: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Part of the walk, as 1 - t, after which two passes become one."""


SCALES = ("guidance_scale", "true_guidance_scale")
GUIDANCE_KEYS = tuple(GuidanceKeys.model_fields)


def guidance_facts(own: GuidanceKeys) -> dict[str, Any]:
    """Return the scale, and those of the other keys that say something: what a record says of guidance."""
    values = {key: getattr(own, key) for key in GUIDANCE_KEYS}
    usual = {key: field.default for key, field in GuidanceKeys.model_fields.items() if key != "guidance_scale"}
    return {key: value for key, value in values.items() if key not in usual or value != usual[key]}


def said_guidance(facts: Mapping[str, Any]) -> str:
    """Write the facts of guidance for people: ``guidance 3.5, true guidance 2``."""
    said = f"guidance {facts['guidance_scale']:g}"
    if facts.get("true_guidance_scale", 1) > 1:
        said += f", true guidance {facts['true_guidance_scale']:g}"
    if facts.get("guidance_norm_cap") is not None:
        said += f" with {facts['guidance_norm_cap']:g} times the length at most"
    if facts.get("guidance_until", 1) < 1:
        said += f" until 1 - t = {facts['guidance_until']:g}"
    return said
