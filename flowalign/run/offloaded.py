"""What a learner's rank keeps off its device, as ``learner.offload`` says, beside what its engine keeps so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from flowalign.config.run import RunConfig
from flowalign.engine.frozen_blocks import offload_blocks
from flowalign.engine.offload import Offload
from flowalign.models.build import bind_weights, frozen_copy, load_encoders
from flowalign.models.encoders import Encoders
from flowalign.models.guided import frozen
from flowalign.models.network import Network


def offload_of(config: RunConfig) -> Offload | None:
    """Return where a rank keeps what is seldom at work; None: on its device, as on a CPU with ``host``."""
    learner = config.learner
    if learner.offload == "none" or (learner.offload == "host" and config.device == "cpu"):
        return None
    return Offload(learner.offload, Path(learner.offload_dir or Path(config.runs_dir, config.name)))


class OffloadedCopy:
    """A frozen copy of a network whose blocks lie where ``offload`` says; None: on ``device``."""

    def __init__(self, network: Network, offload: Offload | None, device: str) -> None:
        own = frozen_copy(network)
        self._module, self.velocity = own.module, frozen(own)
        self._blocks = offload_blocks(own.module, offload, device)
        own.module.to(device)

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into it by name."""
        if self._blocks is None:
            bind_weights(self._module, dict(weights))
        else:
            self._blocks.bind(weights)

    def held(self) -> dict[str, Tensor]:
        """Return its parameters, by name, where they are kept."""
        return dict(self._module.named_parameters()) if self._blocks is None else self._blocks.held()


def load_decoder(config: RunConfig, offload: Offload | None) -> Encoders:
    """Load the autoencoder alone, to the run's device."""
    encoders = load_encoders(config.model, text=False)
    offload_blocks(encoders.vae, offload, config.device)
    return encoders.to(config.device)
