"""Builds the engine that a run's settings name."""

from __future__ import annotations

import torch
from torch import nn

from flowalign.engine import process_group
from flowalign.engine.base import Engine, EngineSettings


def build_engine(
    network: nn.Module,
    settings: EngineSettings,
    *,
    rank: int = 0,
    world_size: int = 1,
    master_port: int = 0,
    master_addr: str = "127.0.0.1",
    device: torch.device | str = "cpu",
) -> Engine:
    """Build an engine over ``network``, which it moves to ``device`` and whose trainable part it keeps in float32.

    With more than one rank this is a collective call: rank 0 listens on ``master_addr:master_port``.

    Raises:
        ValueError: settings that contradict each other.
    """
    device = torch.device(device)
    if settings.type != "deepspeed" and settings.zero_stage:
        raise ValueError(
            f"engine.zero_stage: ZeRO stage {settings.zero_stage} needs engine.type=deepspeed, not {settings.type}; "
            "set zero_stage=0 or change the engine"
        )
    if settings.compile and (settings.zero_stage == 3 or settings.type == "fsdp"):
        what = "FSDP" if settings.type == "fsdp" else "ZeRO stage 3"
        raise ValueError(f"engine.compile: {what} cannot run a compiled network; turn one of them off")
    if settings.type == "torch":
        from flowalign.engine.single import TorchEngine

        if world_size > 1:
            raise ValueError(f"engine.type: torch is one process, and there are {world_size} ranks; use fsdp")
        return TorchEngine(network, settings, device=device)
    process_group.join(rank, world_size, master_port, device, master_addr)
    if settings.type == "fsdp":
        from flowalign.engine.fsdp import ShardedEngine

        return ShardedEngine(network, settings, device=device)
    from flowalign.engine.zero import DeepSpeedEngine

    return DeepSpeedEngine(network, settings, rank=rank, world_size=world_size, device=device)
