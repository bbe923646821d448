"""Whether a GPU's bits can be trusted: replay, a sample by itself, engines against each other, exported LoRA.

A figure is made for the shipped model and for blocks of published ones, whose kernels are those of large models.

Shapes: N samples, S steps of the window, C H W latents.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench, Figure, difference
from gpu_models import MODELS, SHAPES, Measured, compiled, measured, shipped
from torch import Tensor

from flowalign.algorithm import Algorithm
from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import Passes
from flowalign.config.sections import SHIPPED, LoraConfig
from flowalign.config.updates import OptimizerConfig
from flowalign.engine.base import EngineSettings
from flowalign.engine.build import build_engine
from flowalign.engine.offload import Offload
from flowalign.export.writing import write_lora
from flowalign.flow.randomness import seeded
from flowalign.models.build import add_lora, load_policy
from flowalign.models.guided import guided
from flowalign.run.learner import Learner
from flowalign.samples.rollout import SampleNoise, integrate
from flowalign.types import LatentBatch, PromptBatch, Scores, Trajectories

SOURCES = (SHAPES, *MODELS)
DTYPES = ("float32", "bfloat16")
STILL = 1e-30  # a learning rate at which no weight moves, so that one network serves many replays
ENGINES = {"torch again": ("torch", 0), "fsdp": ("fsdp", 0), "deepspeed": ("deepspeed", 0), "ZeRO-2": ("deepspeed", 2)}
RATE = 1e-4


def replay(bench: Bench) -> Iterator[Figure]:
    """How far the learner's log-probs are from the rollout's, with the weights and the precision of both the same."""
    for name in SOURCES:
        for dtype in DTYPES:
            yield Figure(f"{name} {dtype}", 10, partial(_replayed, bench, name, dtype))
    for name, dtype in bench.size.compiled.replayed:
        yield Figure(f"{name} {dtype} compiled", 45, partial(_replayed_compiled, bench, name, dtype))


def _replayed(bench: Bench, name: str, dtype: str) -> dict[str, Any]:
    """Replay in the micro-batch that was rolled out, in half of it, and one by one."""
    own, chunk = measured(bench, name, dtype), bench.size.chunk
    walked = _walked(bench, own, range(chunk), chunk)
    return {"rollout eager": [_deviation(bench, own, walked, micro, dtype) for micro in (chunk, chunk // 2, 1)]}


def _replayed_compiled(bench: Bench, name: str, dtype: str) -> dict[str, Any]:
    """Replay by a compiled learner what was rolled out eagerly, as `learner.compile` does, and compiled too."""
    own, chunk = measured(bench, name, dtype), bench.size.chunk
    fast = compiled(bench, own)
    walks = {"rollout eager": _walked(bench, own, range(chunk), chunk)}
    walks["rollout compiled"] = _walked(bench, fast, range(chunk), chunk)
    return {
        what: [_deviation(bench, fast, walked, micro, dtype) for micro in (chunk, chunk // 2)]
        for what, walked in walks.items()
    }


def _algorithm(bench: Bench, own: Measured) -> Algorithm:
    size = bench.size
    window = {"kind": "fixed", "start": 1, "size": size.window}
    config = {"type": "flow_grpo", "group_size": size.group, "num_steps": size.steps, "window": window}
    return build_algorithm(config, own.network.schedule(own.pixels, own.pixels))


def _walked(bench: Bench, own: Measured, ids: Sequence[int], geometry: int) -> Trajectories:
    """Roll samples out, the network being called with ``geometry`` of them, as a rollout worker does."""
    plan = _algorithm(bench, own).plan(0, 0)
    assert plan is not None
    network, groups = own.network, tuple(i // bench.size.group for i in ids)
    condition, noise = own.condition(groups), SampleNoise(0, ids, network.latent_shape(own.pixels, own.pixels))
    made = integrate(guided(network), condition, noise, plan, bench.device, geometry=geometry)
    states, log_probs, final = (tensor.cpu() for tensor in made[:3])
    count = len(ids)
    batch = PromptBatch(("",) * count, groups, tuple(ids), ({},) * count)
    return Trajectories(batch, condition.to("cpu"), plan, states, log_probs, final, seed=0, policy_version=0)


def _deviation(bench: Bench, own: Measured, walked: Trajectories, micro: int, dtype: str) -> dict[str, Any]:
    """Let a learner replay in micro-batches of ``micro``; of the log-probs, the largest difference of any."""
    still = EngineSettings("torch", optimizer=OptimizerConfig(learning_rate=STILL), dtype=dtype)  # type: ignore[arg-type]
    engine = build_engine(own.network.module, still, device=bench.device)
    policy, passes = {"policy": guided(own.network)}, Passes(micro)
    learner = Learner(_algorithm(bench, own), policy, engine, passes=passes, device=str(bench.device))
    total = torch.randn(len(walked), generator=torch.Generator().manual_seed(2))
    scores = Scores({"drawn": total}, total, torch.ones(len(walked), dtype=torch.bool))
    metrics = learner.update(walked, scores, 0).metrics
    engine.close()
    return {"micro_batch": micro, "max_abs_dlogp": metrics["replay/max_abs_dlogp"]}


def alone(bench: Bench) -> Iterator[Figure]:
    """Whether a sample is the same by itself, in a batch, and among others in another order."""
    for name in SOURCES:
        for dtype in DTYPES:
            yield Figure(f"{name} {dtype}", 8, partial(_alone, bench, name, dtype))


def _alone(bench: Bench, name: str, dtype: str) -> dict[str, Any]:
    own, chunk, which = measured(bench, name, dtype), bench.size.chunk, 1
    batch = _walked(bench, own, range(chunk), chunk)
    others = {
        "padded to the batch": _walked(bench, own, [which], chunk),  # what a run does with a chunk that is short
        "by itself": _walked(bench, own, [which], 1),
        "in another order": _walked(bench, own, range(chunk)[::-1], chunk),
    }
    found: dict[str, Any] = {}
    for what, walked in others.items():
        place = walked.batch.sample_ids.index(which)
        found[what] = difference(_latents(walked)[place], _latents(batch)[which])
        found[what]["log_probs"] = difference(walked.log_prob_NS[place], batch.log_prob_NS[which])
    if own.encoders is not None:
        final = _latents(batch).to(bench.device)
        one, all_of_them = own.encoders.decode(final[which : which + 1])[0], own.encoders.decode(final)[which]
        found["picture, grey levels"] = int((one.int() - all_of_them.int()).abs().max())
    return found


def _latents(walked: Trajectories) -> Tensor:
    assert isinstance(walked.final_NCHW, Tensor)
    return walked.final_NCHW


def engines(bench: Bench) -> Iterator[Figure]:
    """Losses and weights of some updates by every engine, against those of the engine `torch`."""
    for dtype in DTYPES:
        for name, (kind, stage) in ENGINES.items():
            yield Figure(f"{name} {dtype}", 10, partial(_against_torch, bench, kind, stage, dtype))
        for what, lora in (("all weights", False), ("LoRA", True)):
            yield Figure(f"offload host, {what} {dtype}", 12, partial(_offloaded, bench, dtype, lora))


def _against_torch(bench: Bench, kind: str, stage: int, dtype: str) -> dict[str, Any]:
    begun = {name: p.detach().cpu() for name, p in _learns(bench, dtype).network.module.named_parameters()}
    plain = bench.once(f"torch {dtype}", lambda: _updated(bench, "torch", 0, dtype))
    return _beside(begun, plain, _updated(bench, kind, stage, dtype))


def _offloaded(bench: Bench, dtype: str, lora: bool) -> dict[str, Any]:
    """Compare ``learner.offload: host`` with none; bits are to be the same."""
    host = Offload("host", bench.folder)
    plain, kept = (_updated(bench, "torch", 0, dtype, offload=offload, lora=lora) for offload in (None, host))
    found = _beside({name: torch.zeros_like(weight) for name, weight in plain[1].items()}, plain, kept)
    del found["share_of_the_distance_moved"]  # which begins at a network that nobody has kept
    return found


def _beside(
    begun: dict[str, Tensor], plain: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]
) -> dict[str, Any]:
    (losses, expected), (found, weights) = plain, other
    gap, moved = (
        float(torch.stack([(to[name] - at[name]).double().norm() for name in expected]).norm())
        for to, at in ((weights, expected), (expected, begun))
    )
    return {
        "bitwise": all(torch.equal(weights[name], expected[name]) for name in expected),
        "share_of_the_distance_moved": gap / moved,
        "max_abs": max(float((weights[name] - expected[name]).abs().max()) for name in expected),
        "losses": found,
        "max_loss_difference": max(abs(a - b) for a, b in zip(found, losses, strict=True)),
    }


def _learns(bench: Bench, dtype: str) -> Measured:
    return bench.once(f"learns {dtype}", lambda: shipped(bench, dtype))


def _updated(
    bench: Bench, kind: str, stage: int, dtype: str, *, offload: Offload | None = None, lora: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of an engine's updates on random latents, and the weights after them."""
    own, chunk = _learns(bench, dtype), bench.size.chunk
    network = own.network.with_module(copy.deepcopy(own.network.module))
    if lora:
        add_lora(network, LoraConfig(rank=4))
    own_settings: dict[str, Any] = {"zero_stage": stage, "dtype": dtype, "offload": offload}
    settings = EngineSettings(kind, optimizer=OptimizerConfig(learning_rate=RATE), **own_settings)  # type: ignore[arg-type]
    engine = build_engine(network.module, settings, device=bench.device)
    algorithm, passes = build_algorithm({"type": "rectified_flow"}), Passes(chunk // 2)
    learner = Learner(algorithm, {"policy": guided(network)}, engine, passes=passes, device=str(bench.device))
    losses = []
    for update in range(bench.size.updates):
        latents = torch.randn(chunk, *network.latent_shape(), generator=seeded(3, update))
        batch = LatentBatch(latents, own.condition(range(chunk)).to("cpu"), seed=update)
        losses.append(learner.update(batch, None, update).metrics["loss"])
    weights = engine.weights()
    engine.close()
    return losses, weights


def lora(bench: Bench) -> Iterator[Figure]:
    """A LoRA as it is exported, loaded by diffusers and by PEFT, against the policy: shares of the largest value."""
    yield Figure(f"{SHAPES} float32", 20, partial(_exported, bench))


def _exported(bench: Bench) -> dict[str, float]:
    model = {"path": str(SHIPPED / "pipeline"), "max_sequence_length": 2, "lora": LoraConfig(rank=8, alpha=16)}
    cluster = {"device": str(bench.device), "backend": "local"}
    own = {"name": "lora", "iterations": 1, "algorithm": {"type": "flow_grpo"}, "model": model, "cluster": cluster}
    config = AlignConfig.model_validate(own)
    policy = load_policy(config.model, device=config.device)
    draw = torch.Generator().manual_seed(4)
    for name, parameter in policy.network.module.named_parameters():
        if ".lora_B." in name:  # 0 at first, so that it would change nothing
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        return write_lora(policy, Path(folder), config)._asdict()
