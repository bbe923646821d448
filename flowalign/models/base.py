"""Both halves of a model."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.models.encoders import Encoders
from flowalign.models.network import Network


@dataclass
class Policy:
    """A network with the encoders that it learned with; who needs one half never loads the other."""

    network: Network
    encoders: Encoders
