"""Whether compiling a network pays back within a run: what ``learner.compile: auto`` is decided by, before it begins.

Saved is a share of the seconds of the network's passes, which are measured here. Lost are the seconds in which graphs
are compiled, by their number. Share and seconds are those of the shipped network on one core, see
``scripts/benchmarks/compiled.py`` and ``compiled_passes.py``; of a GPU nobody knows them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from flowalign.algorithm import Needs
from flowalign.algorithms import build_algorithm
from flowalign.conditions import Condition
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.engine.accumulate import autocast
from flowalign.models.blocks import blocks_of
from flowalign.models.build import load_network
from flowalign.models.compiling import has_compiler
from flowalign.models.directory import open_directory
from flowalign.models.inspect import own_schedule
from flowalign.models.network import Network
from flowalign.plan.estimate import largest
from flowalign.plan.geometry import Geometry, plan_geometry
from flowalign.plan.rows import count_text
from flowalign.record.progress import duration
from flowalign.run.ranks import Rank
from flowalign.samples.opened import torch_threads

SAVED = 0.2  # of the seconds of passes: 0.57 of 2.8 in an iteration of configs/shapes/grpo_guard.yaml
OF_A_KIND = 21.0  # seconds for blocks of a kind, in rollouts and learner together
OF_A_BLOCK = 14.0  # seconds for a block of a network that is compiled whole, as trainings on latents do
CACHED = 0.05  # of these seconds where torch's cache holds the graphs


def decided(config: RunConfig) -> tuple[bool, str]:
    """Decide whether the run of ``config`` compiles its network, and say why; it measures a few passes on a CPU.

    Raises:
        ModelError: the network cannot be loaded.
    """
    algorithm = build_algorithm(config.algorithm, own_schedule(config.model))
    if (reason := hindrance(config, algorithm.needs)) is not None:
        return False, reason
    geometry, network = plan_geometry(config, algorithm), load_network(config.model, begin=False)
    samples = min(geometry.micro_batch_size, geometry.transitions_per_step)
    seconds = [taken / samples for taken in pass_seconds(network, config, samples)]
    passes_s = _of_an_iteration(config, geometry, *seconds)
    return pays_back(config.total, passes_s, compiling_s(network, config, algorithm.needs), is_cached(config))


def _of_an_iteration(config: RunConfig, counts: Geometry, forward_s: float, learn_s: float) -> float:
    """Return the seconds of an iteration's passes, of which those of one sample are given; workers share them."""
    forward, learn = counts.learner_forward_passes - counts.learner_backward_passes, counts.learner_backward_passes
    passes_s = (forward * forward_s + learn * learn_s) / config.learner.ranks
    if isinstance(config, AlignConfig):  # whose rollouts are compiled too
        workers, every = config.cluster.rollout_workers, config.evaluation.every
        rolled = counts.rollout_passes + (counts.evaluation_passes / every if every else 0)
        passes_s += rolled * forward_s / (workers if config.cluster.backend == "ray" else 1)
    return passes_s


def hindrance(config: RunConfig, needs: Needs) -> str | None:
    """Say why the network of a run is not compiled whatever it would save; None: nothing speaks against it."""
    if (reason := config.learner.hinders_compiling) is not None:
        return reason.partition(": ")[2]
    if config.device != "cpu":
        return "what it saves on a GPU has not been measured; write true where you know it"
    if not has_compiler():
        return "there is no C++ compiler"
    if config.command != "align" and not Rank.of_environment().alone:
        return "several processes would each decide by what they measure"
    return "its loss takes a derivative of the network" if "r" in needs.inputs else None


def pays_back(iterations: int, passes_s: float, compiling_s: float, cached: bool = False) -> tuple[bool, str]:
    """Tell whether so many iterations, each with ``passes_s`` seconds of passes, save more than ``compiling_s``."""
    saved, lost = SAVED * passes_s * iterations, compiling_s * (CACHED if cached else 1)
    where = ", which torch's cache holds" if cached else ""
    return saved > lost, (
        f"{count_text(iterations, 'iteration')} would save {duration(saved)} of passes, and compiling takes about "
        f"{duration(lost)}{where}"
    )


def compiling_s(network: Network, config: RunConfig, needs: Needs) -> float:
    """Return the seconds in which the graphs of a run are compiled that no cache holds."""
    model, blocks = config.model, list(blocks_of(network.module))
    if isinstance(config, PretrainConfig):
        lengths = {
            length for phase in config.stretches for length, weight in phase.max_sequence_lengths.items() if weight
        }
        short = config.learner.batch_size % config.passes.micro_batch_size > 0
        return OF_A_BLOCK * max(1, len(blocks)) * len(lengths) * (1 + short)
    assert isinstance(config, AlignConfig)
    kinds = {(type(block), tuple(p.shape for p in block.parameters())) for block in blocks}
    padding, sizes = network.family.padding, len(set(config.data.sizes))
    shapes = len({config.rollout.chunk_size, needs.whole(config.learner.micro_batch_size)})
    shapes *= sizes + (config.evaluation.every > 0) if sizes else 1
    shapes *= math.ceil(model.max_sequence_length / padding) if padding else 1
    apart = model.lora is not None and needs.reference is not None  # the network without its adapter
    return OF_A_KIND * max(1, len(kinds)) * shapes * (1 + apart)


def pass_seconds(network: Network, config: RunConfig, samples: int) -> tuple[float, float]:
    """Return the seconds of a pass of so many samples without gradients, and of one with its backward pass."""
    model = largest(config)
    latent, condition = network.latent_shape(model.height, model.width), _texts(model, samples)
    x, t = torch.zeros(samples, *latent), torch.full((samples,), 0.5)
    parameters = [parameter for parameter in network.module.parameters() if parameter.requires_grad]

    def velocity() -> torch.Tensor:
        with autocast("cpu", "bfloat16" if "bfloat16" in config.precisions else "float32"):
            return network.velocity(x, t, condition)

    @torch.no_grad()
    def forward() -> None:
        velocity()

    def learn() -> None:
        velocity().square().mean().backward()
        for parameter in parameters:
            parameter.grad = None

    with torch_threads(config.threads):
        return _least_s(forward), _least_s(learn)


def _least_s(act: Callable[[], None], turns: int = 3) -> float:
    """Return the seconds of the fastest of a few turns: the first allocates, and others may be interrupted."""
    taken = []
    for _ in range(turns):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _texts(model: ModelConfig, samples: int) -> Condition:
    """Return embeddings of zeros of one text of full length, which needs no mask."""
    directory = open_directory(model)
    shapes = directory.family.full_text(directory, model.max_sequence_length)
    rows = {name: torch.zeros(1, *shape) for name, shape in shapes.items() if name != "mask"}
    index = torch.zeros(samples, dtype=torch.long)
    return Condition(rows, rows, index, index)


def remember(config: RunConfig) -> None:
    """Note beside the graphs in torch's cache that those of this run are there."""
    with suppress(OSError):  # a run must not end for a note
        (note := _note(config)).parent.mkdir(parents=True, exist_ok=True)
        note.write_text("compiled\n", encoding="utf-8")


def is_cached(config: RunConfig) -> bool:
    """Tell whether a run with the same graphs has noted that torch's cache of this machine holds them."""
    return _note(config).is_file()


def _note(config: RunConfig) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    model = largest(config)
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": config.threads,
        "network": dict(open_directory(model).config("transformer")),
        "model": model.model_dump(mode="json", exclude={"path", "negative_prompt"}),
        "precisions": sorted(config.precisions),
        "sizes": [config.rollout.chunk_size, config.passes.micro_batch_size],
    }
    if isinstance(config, AlignConfig):
        facts["images"] = sorted(set(config.data.sizes))
    key = hashlib.sha256(json.dumps([config.command, facts], sort_keys=True, default=str).encode()).hexdigest()
    return Path(cache_dir()) / "flowalign" / key
