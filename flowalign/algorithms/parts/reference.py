"""The reference: a frozen network that a policy began as, or that follows it, and that holds the policy near."""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithm import AlgorithmConfig, Call, LossOutput, Models, Reference
from flowalign.flow import objectives
from flowalign.types import TrainBatch

Refresh = Annotated[int, Field(ge=1)] | None


class ReferenceConfig(AlgorithmConfig):
    """Options of a KL to the reference."""

    beta: float = Field(0.0, ge=0)
    """Weight of the KL to the reference; 0: none."""
    reference_refresh: Refresh = None
    """Iterations after which the reference takes the policy's weights, time and again (ProRL, arXiv:2505.24864, where
    the optimizer begins anew too); null: never.
    """

    @model_validator(mode="after")
    def _refreshes_something(self) -> Self:
        if self.reference_refresh is not None and self.beta == 0:
            raise ValueError("reference_refresh: without a KL there is no reference; set beta, or leave it out")
        return self

    @property
    def reference(self) -> Reference | None:
        """The reference that is needed, if one is."""
        return Reference(self.reference_refresh) if self.beta > 0 else None


def with_kl(output: LossOutput, beta: float, kl: objectives.Term) -> LossOutput:
    """Add ``beta`` times the term ``kl`` to a loss, and its metrics."""
    term, metrics = kl
    return LossOutput(output.loss + beta * term, {**output.metrics, **metrics})


def velocity_kl_calls(beta: float) -> tuple[Call, ...]:
    """Say what a loss asks about a point that asks the policy once and ends with `with_velocity_kl`."""
    return (Call("policy", learns=True), *(Call("reference"),) * (beta > 0))


def with_velocity_kl(
    output: LossOutput, beta: float, velocity: Tensor, models: Models, minibatch: TrainBatch
) -> LossOutput:
    """Add ``beta mean |v - v_ref|²`` at a minibatch's points ``x`` (M, C, H, W) and ``t`` (M,); ``velocity`` as ``x``.

    With ``beta`` 0 the output stays as it is and the reference is not asked.
    """
    if beta == 0:
        return output
    item = minibatch.tensors
    with torch.no_grad():
        reference = models["reference"](item["x"], item["t"], minibatch.condition)
    return with_kl(output, beta, objectives.reference_kl(velocity, reference))
