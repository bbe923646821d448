"""How much ``gpu.py`` measures: all of it on a GPU, or as little as runs every line on one thread of a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

PUBLISHED = ("sd3.5-medium", "flux.1", "qwen-image")


class Compiled(NamedTuple):
    """What is compiled, which takes long: networks that are ``replayed``, with their dtype, and those that are
    ``timed``, with what is trained of them."""

    replayed: tuple[tuple[str, str], ...]
    timed: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Size:
    """How much is measured: `FULL` is for a GPU, `SMALL` for one thread of a CPU.

    ``pixels`` are a side of the images of the published models, ``trust_pixels`` where only bits are compared;
    ``text`` is the number of tokens of their texts. ``group``, ``chunk``, ``steps`` and ``window`` are those of a
    rollout, ``rolled`` and ``micro`` the samples of one pass of a rollout and of a learner. ``compiler`` is the
    backend of torch.compile, ``compiled`` says what is compiled. ``updates`` are made by each engine, ``iterations``
    of so many ``images`` by each run that is broken off. ``kills`` says whether these are processes, and are killed.
    ``pace`` is the share of the seconds that a figure takes of those at full size.
    """

    name: str
    pace: float
    pixels: int
    trust_pixels: int
    text: int
    group: int
    chunk: int
    steps: int
    window: int
    rolled: int
    micro: int
    matmul: int
    warmups: int
    repeats: int
    compiler: str
    compiled: Compiled
    updates: int
    iterations: int
    images: int
    kills: bool
    quickstart: Mapping[str, Any]
    tiny: bool = False


FULL = Size(
    name="full",
    pace=1.0,
    pixels=1024,
    trust_pixels=512,
    text=256,
    group=4,
    chunk=16,
    steps=10,
    window=3,
    rolled=8,
    micro=4,
    matmul=8192,
    warmups=2,
    repeats=10,
    compiler="inductor",
    compiled=Compiled(
        replayed=(("shapes", "bfloat16"), ("sd3.5-medium", "bfloat16"), ("shapes", "float32")),
        timed=tuple((name, kind) for kind in ("LoRA", "all weights") for name in PUBLISHED),
    ),
    updates=10,
    iterations=8,
    images=64,
    kills=True,
    quickstart={"iterations": 20, "evaluation.every": 20, "evaluation.num_samples": 96},
)
SMALL = Size(
    name="small",
    pace=0.0,
    pixels=64,
    trust_pixels=64,
    text=8,
    group=2,
    chunk=4,
    steps=4,
    window=2,
    rolled=2,
    micro=1,
    matmul=128,
    warmups=1,
    repeats=2,
    compiler="eager",  # dynamo alone: inductor compiles for minutes on one thread
    compiled=Compiled(replayed=(("flux.1", "float32"),), timed=(("flux.1", "all weights"),)),
    updates=2,
    iterations=2,
    images=4,
    kills=False,
    quickstart={
        "iterations": 1,
        "evaluation.every": 0,
        "data.groups_per_iteration": 2,
        "algorithm.group_size": 2,
        "rollout.chunk_size": 4,
        "learner.micro_batch_size": 4,
    },
    tiny=True,
)
SIZES = {size.name: size for size in (FULL, SMALL)}
