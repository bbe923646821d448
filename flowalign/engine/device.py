"""The device of a configuration: whether torch knows it, and this machine has it."""

from __future__ import annotations

import re

from flowalign.config.section import ConfigError


def check_device(key: str, device: str, here: bool = True) -> None:
    """Check that torch knows the device, and that this machine has it if the run starts ``here``."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(key, f"got {device!r}; write cpu, cuda or cuda:N")
    if here and device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(key, f"{device}, but torch sees no GPU here; set {key}=cpu")
