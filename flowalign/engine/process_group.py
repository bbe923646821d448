"""Joins the ranks of one learner; a group lives as long as its process."""

from __future__ import annotations

import atexit
from contextlib import suppress

import torch
import torch.distributed as dist


def join(rank: int, world_size: int, master_port: int, device: torch.device, master_addr: str = "127.0.0.1") -> None:
    """Make this process ``rank`` of ``world_size`` over gloo (CPU) or nccl (CUDA); a collective call.

    A world of one needs no port. Joining again with the same numbers does nothing.

    Raises:
        RuntimeError: this process already belongs to another group.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise RuntimeError(
                f"this process is rank {dist.get_rank()} of {dist.get_world_size()} and cannot become rank {rank} "
                f"of {world_size}: start the engine in a process of its own"
            )
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        address = f"tcp://{master_addr}:{master_port}"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):  # the other ranks may be gone
            dist.destroy_process_group()
