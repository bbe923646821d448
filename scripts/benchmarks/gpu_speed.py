"""The share of a GPU's ceiling that rollout and learner reach, in bfloat16, at the shapes of published blocks.

FLOPs are those that `flowalign plan` counts of one forward pass of one sample; a pass that learns costs three times as
much, and with a LoRA on a frozen base twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_bench import Bench, Figure
from gpu_ceiling import product
from gpu_models import KINDS, MODELS, Measured, blocks, inputs, shaped, updating
from gpu_models import compiled as compiled_copy

from flowalign.models.inspect import inspect_model

MORE = 4  # micro-batches of the larger of the two updates, beyond the one of the smaller


def mfu(bench: Bench) -> Iterator[Figure]:
    """Seconds, TFLOP/s and the share of the ceiling, eager: velocities of a rollout, and updates of a learner."""
    for kind in KINDS:
        for name in MODELS:
            yield Figure(f"{name} rollout, {kind}", 6, partial(_rolls_out, bench, name, kind))
    for kind in KINDS:
        for name in MODELS:
            yield Figure(f"{name} learner, {kind}", 8, partial(_learns, bench, name, kind))


def compiled(bench: Bench) -> Iterator[Figure]:
    """The same with the network compiled, and the seconds of the first call beside the others."""
    for name, kind in bench.size.compiled.timed:
        yield Figure(f"{name} rollout, {kind}", 25, partial(_rolls_out, bench, name, kind, fast=True))
        yield Figure(f"{name} learner, {kind}", 45, partial(_learns, bench, name, kind, fast=True))


def _rolls_out(bench: Bench, name: str, kind: str, *, fast: bool = False) -> dict[str, Any]:
    """Measure a velocity without gradients, a step of a rollout."""
    model = shaped(bench, name, bench.size.pixels, **KINDS[kind])
    own, samples = _made(bench, blocks(bench, model), fast), bench.size.rolled
    x, t, condition = inputs(bench, own, samples)

    @torch.no_grad()
    def velocity() -> None:
        own.network.velocity(x, t, condition)

    first, found = _first(bench, velocity), bench.timed(velocity)
    flops = inspect_model(model).flops * samples
    return {"samples": samples, **found, **_reached(bench, found["seconds"], flops), **first}


def _learns(bench: Bench, name: str, kind: str, *, fast: bool = False) -> dict[str, Any]:
    """Measure updates of one micro-batch and of more.

    The difference is passes forward and backward; what is left of the smaller one is the optimizer's and its guards'.
    """
    model = shaped(bench, name, bench.size.pixels, **KINDS[kind])
    own, samples = _made(bench, blocks(bench, model), fast), bench.size.micro
    update = updating(bench, own, samples)
    first = _first(bench, lambda: update(1))
    one, more = (bench.timed(partial(update, count))["least"] for count in (1, 1 + MORE))
    seconds = (more - one) / MORE
    flops = inspect_model(model).flops * samples * (3 if model.lora is None else 2)
    found = {"samples": samples, "seconds": seconds, "update_beside_it_s": one - seconds}
    return {**found, **_reached(bench, seconds, flops), **first}


def _made(bench: Bench, own: Measured, fast: bool) -> Measured:
    return compiled_copy(bench, own) if fast else own


def _first(bench: Bench, call: Callable[[], object]) -> dict[str, float]:
    """Measure the first call, which compiles where something is compiled, and otherwise warms up."""
    began = time.perf_counter()
    call()
    bench.synchronize()
    return {"first_call_s": time.perf_counter() - began}


def _reached(bench: Bench, seconds: float, flops: int) -> dict[str, float]:
    tflops = flops / seconds / 1e12
    return {"flops": flops, "tflops": tflops, "share_of_ceiling": tflops / product(bench, "bfloat16")["tflops"]}
