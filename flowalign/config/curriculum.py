"""The curriculum of a run in its configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flowalign.config.section import Section


class CurriculumConfig(Section):
    """Prompts that the policy passes about half of the time are drawn more often than those it passes always or never.

    A prompt's weight is that of p (1 - p), where p is its estimated pass rate. (arXiv:2502.12272, arXiv:2504.03380)
    """

    score: Annotated[str, Field(min_length=1)]
    """Score that tells whether an image passes: ``total``, or one of the rewards', such as ``geneval_strict``."""
    threshold: float = 1.0
    """Least score of an image that passes, above the least that the score can be and not beyond the largest."""
    floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Weight of a prompt that is passed always or never, beside 1 of one that is passed half of the time."""
