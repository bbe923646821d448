"""The engine over FSDP2: parameters, gradients and moments in shards, one a rank; over gloo or nccl.

Frozen parameters are sharded like the trained ones: of a LoRA they are nearly all there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from flowalign.engine.base import EngineSettings
from flowalign.engine.shards import Layout, rows
from flowalign.engine.single import TorchEngine
from flowalign.models.blocks import blocks_of


class ShardedEngine(TorchEngine):
    """Engine of one of several ranks; the default process group must exist (``build_engine`` sees to it).

    The optimizer steps the shards themselves, as plain tensors.
    """

    name: ClassVar[str] = "fsdp"

    def __init__(self, network: nn.Module, settings: EngineSettings, *, device: torch.device | str = "cpu") -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        super().__init__(network, settings, device=device)

    def _take(self, trained: Mapping[str, nn.Parameter]) -> tuple[Layout, dict[str, Tensor]]:
        with torch.no_grad():
            for tensor in self.network.state_dict().values():
                dist.broadcast(tensor, 0)
        shapes = {name: tuple(p.shape) for name, p in trained.items()}
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for module in [*blocks_of(self.network), self.network]:
            # The root too: a shard that an average or a checkpoint replaces is seen by the next pass.
            sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
            if hasattr(sharded, "set_reduce_scatter_unused_params"):  # later than torch 2.10
                sharded.set_reduce_scatter_unused_params(True, recurse=False)
        self._shards = {name: p for name, p in self.network.named_parameters() if name in shapes}
        return rows(shapes, self.rank, self.world_size), {name: _local(p) for name, p in self._shards.items()}

    def _offload_frozen(self, network: nn.Module) -> None:
        """Do nothing: what is frozen is in shards, which FSDP2 holds on the device."""

    def _forget_gradients(self) -> None:
        super()._forget_gradients()
        for shard in self._shards.values():
            shard.grad = None

    def _reduce_gradients(self, last: bool) -> None:
        assert isinstance(self.network, FSDPModule)
        self.network.set_requires_gradient_sync(last)

    def _clipped_norm(self) -> float:
        for name, shard in self._shards.items():
            self._held[name].grad = None if shard.grad is None else _local(shard.grad)
        return super()._clipped_norm()

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        square = super()._norm([gradient for gradient in gradients if gradient.numel()]).to(self.device).square()
        dist.all_reduce(square)
        return square.sqrt()


def _local(tensor: Any) -> Tensor:
    """Return this rank's part of a sharded tensor, which shares its memory."""
    return tensor.detach().to_local()
