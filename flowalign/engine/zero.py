"""The engine over DeepSpeed (0.19): ZeRO 0 to 3, gloo or nccl, without its pickled checkpoints.

Trainable parameters, gradients and optimizer state are float32 on every stage; bfloat16 is autocast.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowalign.algorithm import LossOutput
from flowalign.engine.accumulate import (
    AdamWEngine,
    MetricSum,
    autocast,
    check_share,
    checked_weights,
    refuse_destroyed,
    refuse_non_finite,
    trainable_parameters,
    weighted,
)
from flowalign.engine.adamw import (
    build_adamw,
    check_facts,
    divided,
    own_share,
    read_state,
    set_learning_rate,
    write_state,
)
from flowalign.engine.base import EngineSettings, LossFn, ResumeRefused
from flowalign.engine.frozen_blocks import offload_blocks
from flowalign.engine.shards import Layout, flat_partitions, parameter_partitions, undivided
from flowalign.record.destroyed import fault, total_norm
from flowalign.record.spans import span
from flowalign.types import TrainBatch

MAX_BUCKET = 100_000_000
PERSISTENT = 100_000  # smaller parameters stay whole on every rank in ZeRO-3


def _quiet_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for ``device`` so that it neither compiles an extension nor logs what it is doing."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    os.environ.setdefault("LOCAL_SIZE", "1")  # or ZeRO-3 on a CPU runs numactl at every reduction
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        import deepspeed
        import deepspeed.ops
    finally:
        logging.disable(before)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # init_distributed would compile deepspeed_shm_comm (80 s; a killed compile leaves a lock on which the
    # next start waits for ever). The table is otherwise filled by running compilers on first access.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed


# DeepSpeed replaces it in the whole process for stage 3, by one that has no derivative forward, and never puts it back.
_LINEAR = nn.functional.linear
_STAGE_3 = weakref.WeakSet["DeepSpeedEngine"]()  # those that are open


class _LossModule(nn.Module):
    """The loss as the module DeepSpeed runs, so that its hooks see all forward passes of a micro-batch as one."""

    def __init__(self, network: nn.Module, device: torch.device, settings: EngineSettings) -> None:
        super().__init__()
        self.network = network
        self._autocast = lambda: autocast(device, settings.dtype)

    def forward(self, loss_fn: LossFn, micro_batch: TrainBatch, weight: float, total: MetricSum, scale: int) -> Tensor:
        with self._autocast():
            output: LossOutput = loss_fn(micro_batch)
        total.add(output, weight)
        return weighted(output.loss, weight * scale)


class DeepSpeedEngine(AdamWEngine):
    """Engine over a DeepSpeed engine; the default process group must exist (``build_engine`` sees to it)."""

    name: ClassVar[str] = "deepspeed"

    def __init__(
        self, network: nn.Module, settings: EngineSettings, *, rank: int, world_size: int, device: torch.device
    ) -> None:
        super().__init__(settings, device)
        deepspeed = _quiet_deepspeed(device)
        if settings.zero_stage == 3:
            _STAGE_3.add(self)
        self.rank, self.world_size = rank, world_size
        self._gathered = deepspeed.zero.GatheredParameters
        self._parameters = trainable_parameters(network.to(device))
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        if settings.compile:
            network.compile()
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=_LossModule(network, device, settings),
            optimizer=build_adamw(self._parameters.values(), settings),
            config=self._deepspeed_config(),
        )
        self._adamw = self._optimizer.optimizer if settings.zero_stage else self._optimizer
        if settings.zero_stage == 3:
            self._clear_padding()
        elif settings.offload is not None:  # after DeepSpeed has sent all weights to all ranks
            offload_blocks(network, settings.offload, device)
        self.layout = self._layout()
        self._began = total_norm(self.held())

    def _deepspeed_config(self) -> dict[str, Any]:
        bucket = min(MAX_BUCKET, sum(p.numel() for p in self._parameters.values()))
        bucket += bucket % 2  # DeepSpeed wants a multiple of its alignment
        zero = {
            "stage": self.settings.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT,
        }
        return {
            "train_micro_batch_size_per_gpu": 1,  # boundaries are set by hand in step()
            "gradient_accumulation_steps": 1,
            # Stage 0 is clipped here, after the guard; DeepSpeed would clip without one.
            "gradient_clipping": self.settings.max_grad_norm if self.settings.zero_stage else 0.0,
            "steps_per_print": None,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": self.settings.offload is not None,  # it knows torch's AdamW by its type
        }

    def _clear_padding(self) -> None:
        """Zero the tail of a last partition, which ZeRO-3 leaves uninitialised: the state is a function of the run."""
        for name, parameter in self._parameters.items():
            partition: Any = vars(parameter)["ds_tensor"]
            before = partition.numel() * self.rank
            partition.data[max(0, math.prod(self._shapes[name]) - before) :].zero_()
        self._optimizer.refresh_fp32_params()

    def _layout(self) -> Layout:
        lengths = {name: tensor.numel() for name, tensor in self.held().items()}
        if self.settings.zero_stage == 0:
            return undivided(self._shapes)
        if self.settings.zero_stage == 3:
            return parameter_partitions(self._shapes, self.rank, self.world_size, lengths)
        return flat_partitions(self._shapes, self.rank, lengths)

    def step(self, loss_fn: LossFn, micro_batches: Sequence[TrainBatch], weights: Sequence[float]) -> dict[str, float]:
        check_share(micro_batches, weights)
        self._forget_gradients()
        total = MetricSum(self.device)
        for i, (micro_batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
            self._engine.set_gradient_accumulation_boundary(i == len(weights) - 1)
            # Times the world size, because DeepSpeed averages over ranks.
            loss = self._engine(loss_fn, micro_batch, weight, total, self.world_size)
            with span("backward"):
                self._engine.backward(loss, scale_wrt_gas=False)
        metrics = total.reduce(self.world_size)
        learning_rate = self.settings.learning_rate_at(self.steps)
        set_learning_rate(self._optimizer, learning_rate)
        if self.settings.zero_stage == 0:
            grad_norm = self._clipped_norm()
            try:
                refuse_non_finite(metrics, grad_norm, self.steps)
            except Exception:
                self._engine.zero_grad()
                raise
            with span("optimizer"):
                self._engine.step()
        else:
            # ZeRO drops an update whose norm is not finite by itself, on all ranks and with its buffers.
            with span("optimizer"):
                self._engine.step()
            applied = self._engine.was_step_applied()
            grad_norm = float(self._engine.get_global_grad_norm() or 0.0) if applied else float("nan")
            refuse_non_finite(metrics, grad_norm, self.steps)
        self.steps += 1
        refuse_destroyed(self._fault(), learning_rate)
        return {**metrics, "grad_norm": grad_norm, "learning_rate": learning_rate}

    def _fault(self) -> str | None:
        """Return a fault of what this rank steps, by the name of the parameter."""
        held = self.held()
        found = fault("the weights", held, began=self._began)
        if found is None:
            return self._fault_of_moments()
        return fault("the weights", self.layout.named(held)) or found

    def _forget_gradients(self) -> None:
        """Start from gradients of zero: ZeRO-3 keeps the last update's for a parameter that this one does not use."""
        if self.settings.zero_stage == 3:
            self._optimizer.grad_partitions_flat_buffer.zero_()

    def _clipped_norm(self) -> float:
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        return self._clip(self._parameters.values(), nn.utils.get_total_norm(grads))

    def weights(self) -> dict[str, Tensor]:
        gathered = {}
        for name, parameter in self._parameters.items():
            with self._gathered([parameter], enabled=self.settings.zero_stage == 3):
                gathered[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        return gathered

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        checked = checked_weights(weights, self._shapes)
        for name, parameter in self._parameters.items():
            with self._gathered([parameter], modifier_rank=0, enabled=self.settings.zero_stage == 3), torch.no_grad():
                parameter.copy_(checked[name])
        if self.settings.zero_stage:
            self._optimizer.refresh_fp32_params()

    def held(self) -> dict[str, Tensor]:
        stage = self.settings.zero_stage
        if stage == 0:
            return dict(self._parameters)
        held = self._optimizer
        flat = held.fp32_partitioned_groups_flat if stage == 3 else held.single_partition_of_fp32_groups
        return {f"partition_{i}": partition for i, partition in enumerate(flat)}

    def optimizer_state(self) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        named = self.held()
        tensors = read_state(self._adamw, named)
        if self.settings.zero_stage:
            tensors.update({f"master/{name}": p.detach().to("cpu", copy=True) for name, p in named.items()})
        return tensors, self.facts()

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        check_facts(facts, self.facts())
        named = self.held()
        moved = divided(facts) != self.layout.divided
        tensors = own_share(tensors, facts, self.facts(), self.layout, named)
        masters = {name: tensors.get(f"master/{name}") for name in named} if self.settings.zero_stage else {}
        for name, master in masters.items():
            if master is None and moved:  # as of an engine without master copies: the weights are the same
                continue
            if master is None or master.shape != named[name].shape:
                raise ResumeRefused(f"optimizer state master/{name} is missing or not of {tuple(named[name].shape)}")
        write_state(self._adamw, named, tensors)
        with torch.no_grad():
            for name, master in masters.items():
                if master is not None:
                    named[name].copy_(master)
        self.publish()
        self.steps = int(facts["steps"])

    def publish(self) -> None:
        """Copy the float32 partitions into the network, as an update does when it ends; a collective call."""
        if self.settings.zero_stage == 0:
            return
        if self.settings.zero_stage < 3:
            self._optimizer.update_lp_params()
            return
        for i in range(len(self._optimizer.fp32_partitioned_groups_flat)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(i)
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def close(self) -> None:
        self._engine.destroy()
        _STAGE_3.discard(self)
        if self.settings.zero_stage == 3 and not _STAGE_3:
            nn.functional.linear = _LINEAR
