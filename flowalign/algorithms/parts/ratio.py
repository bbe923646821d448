"""Ratios of new to old probabilities, and how far they may go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_serializer, model_validator

from flowalign.config.section import Section


class ClipRange(Section):
    """The distances that the ratio may fall below and rise above 1. One number stands for both."""

    stands_for: ClassVar = {"type": "number", "exclusiveMinimum": 0}
    low: float = Field(gt=0)
    """Distance below 1."""
    high: float = Field(gt=0)
    """Distance above 1 (DAPO, arXiv:2503.14476, sec. 3.1)."""

    @model_validator(mode="before")
    @classmethod
    def _from_one_number(cls, value: Any) -> Any:
        return value if isinstance(value, (Mapping, ClipRange)) else {"low": value, "high": value}

    @model_serializer
    def _to_one_number(self) -> float | dict[str, float]:
        return self.low if self.low == self.high else {"low": self.low, "high": self.high}
