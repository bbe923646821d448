"""The validation loss: velocity of the straight path on latents, noises and times that never change."""

from __future__ import annotations

from pathlib import Path

import torch

from flowalign.algorithm import VelocityModel
from flowalign.config.run import RunConfig
from flowalign.config.training import PretrainConfig, ValidationConfig
from flowalign.data.feed import Captioned, check_channels, spare_of
from flowalign.flow import path
from flowalign.flow.forward import velocity_error
from flowalign.flow.randomness import Stream, seeded
from flowalign.models.fingerprint import encoder_hash


def validation_of(config: RunConfig) -> Validation | None:
    """Return the validation of a run, if it has one. Raise LatentsError where its bank cannot be read."""
    return Validation(config) if isinstance(config, PretrainConfig) and config.validation is not None else None


class Validation:
    """The fixed points of a run's validation.

    Raises:
        LatentsError: the bank cannot be read.
    """

    def __init__(self, config: PretrainConfig) -> None:
        assert config.validation is not None
        own: ValidationConfig = config.validation
        length = config.model_as_trained.max_sequence_length
        captioned = Captioned(Path(own.latents), config.model, length, encoder_hash(config.model), spare_of(config))
        check_channels(own.latents, captioned.bank, config.model)
        drawn = captioned.bank.draw(0, own.num_samples, own.seed, {})
        stratum = torch.arange(own.num_samples) % own.num_times
        t = (stratum + 0.5) / own.num_times
        noise = torch.randn(drawn.latents.shape, generator=seeded(own.seed, Stream.VALIDATION_NOISE))
        self._strata = [(stratum == k).nonzero().flatten() for k in range(min(own.num_times, own.num_samples))]
        self._t, self._size, self._device = (
            t,
            config.learner.micro_batch_size or config.learner.batch_size,
            config.device,
        )
        self._x, self._target = path.interpolate(drawn.latents, noise, t), path.velocity_target(drawn.latents, noise)
        self._condition = captioned.condition(drawn.rows, length).to(config.device)

    @torch.no_grad()
    def losses(self, velocity: VelocityModel, name: str) -> dict[str, float]:
        """Return ``<name>/loss`` over all points and ``<name>/loss_t0.06`` of each time, of a straight path's velocity.

        Families other than rectified flow are judged alike, by the velocity they convert to.
        """
        errors = []
        for part in torch.arange(len(self._t)).split(self._size):
            x, t = self._x[part].to(self._device), self._t[part].to(self._device)
            made = velocity(x, t, self._condition.take(part.to(self._device)))
            errors.append(velocity_error(made.cpu(), self._target[part]))
        error = torch.cat(errors)
        by_time = {f"{name}/loss_t{float(self._t[rows[0]]):.2f}": float(error[rows].mean()) for rows in self._strata}
        return {f"{name}/loss": float(error.mean()), **by_time}
