"""The networks that ``gpu.py`` measures: the shipped model, and blocks of published ones with random weights.

Blocks have the published width, heads and tokens, and fewer layers; at the small size nothing is as published but the
kind of the blocks. They come from diffusers' own classes, by the families' own facts.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_bench import Absent, Bench
from torch import Tensor

from flowalign.algorithm import LossOutput
from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.config.updates import OptimizerConfig
from flowalign.engine.base import EngineSettings
from flowalign.engine.build import build_engine
from flowalign.engine.offload import Offload
from flowalign.models.build import add_lora, load_policy
from flowalign.models.directory import Directory, open_directory
from flowalign.models.encoders import Encoders
from flowalign.models.family import family_of
from flowalign.models.loading import transformer_of
from flowalign.models.network import Network
from flowalign.models.scheduler import SCHEDULER
from flowalign.types import Condition, TrainBatch

SHAPES = "shapes"
PROMPTS = ("a photo of a red circle", "a photo of two blue squares", "a photo of a green triangle left of a red star")


@dataclass(frozen=True)
class Blocks:
    """A published model of ``family`` whose network has fewer layers, and what makes it ``tiny``.

    ``autoencoder`` is its class, whose geometry says what a latent is; it is not made.
    """

    family: str
    published: str
    autoencoder: str
    reduced: dict[str, Any]
    tiny: dict[str, Any]


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32}
_ROPE = {"axes_dims_rope": (4, 6, 6)}
MODELS = {
    "sd3.5-medium": Blocks(
        "sd3",
        "stable-diffusion-3.5-medium",
        "AutoencoderKL",
        {"num_layers": 4, "dual_attention_layers": [0, 1]},  # of 24 layers 13 have a second attention
        {
            **_HEADS,
            "num_layers": 2,
            "dual_attention_layers": [0],
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "sample_size": 8,
            "pos_embed_max_size": 8,
        },
    ),
    "flux.1": Blocks(
        "flux",
        "flux.1-dev",
        "AutoencoderKL",
        {"num_layers": 1, "num_single_layers": 2},  # as 19 to 38
        {**_HEADS, **_ROPE, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 32},
    ),
    "qwen-image": Blocks(
        "qwen_image",
        "qwen-image",
        "AutoencoderKLQwenImage",
        {"num_layers": 2},  # of 60
        {**_HEADS, **_ROPE, "num_layers": 1},
    ),
}


@dataclass(frozen=True)
class Measured:
    """A network on the device, and the condition of samples by the number of each one's prompt.

    ``pixels`` are a side of its images, None being the model's own. Blocks have no ``encoders``.
    """

    network: Network
    condition: Callable[[Sequence[int]], Condition]
    pixels: int | None = None
    encoders: Encoders | None = None


def shaped(bench: Bench, name: str, pixels: int, **changes: Any) -> ModelConfig:
    """Return the configuration of a reduced model, whose small files are written first; weights there are none.

    Raises:
        Absent: this checkout does not know the model.
    """
    wanted, folder = MODELS[name], bench.folder / name
    family = family_of(wanted.family)
    if (known := family.published.get(wanted.published)) is None:
        raise Absent(f"{wanted.published} is not among the published models of the family {wanted.family}")
    network = {**known.parts["transformer"], **(wanted.tiny if bench.size.tiny else wanted.reduced)}
    classes = {"transformer": family.network, "vae": wanted.autoencoder, "scheduler": SCHEDULER}
    index = {part: ["diffusers", name] for part, name in classes.items()}
    files = {
        "model_index.json": {"_class_name": family.pipeline, **index},
        "transformer/config.json": {**network, "_class_name": family.network},
        "vae/config.json": known.parts.get("vae", {}),
        "scheduler/scheduler_config.json": known.parts["scheduler"],
        "tokenizer/tokenizer_config.json": {"model_max_length": 77},
    }
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content))
    own = {"height": pixels, "width": pixels, "max_sequence_length": bench.size.text}
    return ModelConfig.model_validate({"path": str(folder), **own, **changes})


# What is trained, by the words of a model's configuration.
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"dtype": "bfloat16", "lora": {"rank": 32, "alpha": 64}},
    "all weights": {"dtype": "bfloat16"},
}


def blocks(bench: Bench, model: ModelConfig) -> Measured:
    """Make the network of `shaped` files with random weights, as a run would hold it: what is trained in float32."""
    own = open_directory(model)
    config = {key: value for key, value in own.config("transformer").items() if not key.startswith("_")}
    torch.manual_seed(0)
    with bench.device:
        module: Any = transformer_of(own.family)(**config)
    dtype = getattr(torch, model.dtype)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.to(bench.device).eval()
    network = Network(own.family, module, own.scheduler, own.geometry, mixed=dtype == torch.bfloat16)
    if model.lora is not None:
        add_lora(network, model.lora)
        module.to(bench.device)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    condition = _random_text(bench, own, model.max_sequence_length, dtype)
    return Measured(network, condition, model.height)


def _random_text(bench: Bench, own: Directory, length: int, dtype: torch.dtype) -> Callable[[Sequence[int]], Condition]:
    """Return conditions of random texts of the full length, the last row being the empty one's."""
    draw, count, rows = torch.Generator().manual_seed(1), len(PROMPTS) + 1, {}
    for name, shape in own.family.full_text(own, length).items():
        drawn = torch.randn(count, *shape, generator=draw).to(dtype)
        rows[name] = (torch.ones_like(drawn, dtype=torch.bool) if name == "mask" else drawn).to(bench.device)
    text, null = ({name: row[part] for name, row in rows.items()} for part in (slice(None, -1), slice(-1, None)))

    def condition(prompts: Sequence[int]) -> Condition:
        index = torch.tensor([prompt % len(PROMPTS) for prompt in prompts], device=bench.device)
        return Condition(text, null, index, torch.zeros_like(index))

    return condition


def shipped(bench: Bench, dtype: str) -> Measured:
    """Load the shipped model and encode the prompts."""
    model = ModelConfig.model_validate({"path": str(SHIPPED / "pipeline"), "dtype": dtype, "max_sequence_length": 2})
    policy = load_policy(model, device=str(bench.device))

    def condition(prompts: Sequence[int]) -> Condition:
        texts = [PROMPTS[prompt % len(PROMPTS)] for prompt in prompts]
        return policy.encoders.encode_prompts(texts, model.max_sequence_length)

    return Measured(policy.network, condition, encoders=policy.encoders)


def measured(bench: Bench, name: str, dtype: str) -> Measured:
    """Return the shipped model, or the blocks of a published one at the size of which bits are compared."""
    if name == SHAPES:
        return shipped(bench, dtype)
    return blocks(bench, shaped(bench, name, bench.size.trust_pixels, dtype=dtype))


def compiled(bench: Bench, own: Measured) -> Measured:
    """Return the same weights in a network that is compiled, as `learner.compile` does it, when it is first called.

    A run has one size of micro-batches: each is compiled for itself.
    """
    torch._dynamo.reset()
    module = copy.deepcopy(own.network.module)
    module.compile(backend=bench.size.compiler, dynamic=False)
    return replace(own, network=own.network.with_module(module))


def inputs(bench: Bench, own: Measured, samples: int) -> tuple[Tensor, Tensor, Condition]:
    """Return random latents, times and texts of so many samples on the device."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(samples, *own.network.latent_shape(own.pixels, own.pixels), generator=draw)
    return x.to(bench.device), torch.rand(samples, generator=draw).to(bench.device), own.condition(range(samples))


def updating(bench: Bench, own: Measured, samples: int, offload: Offload | None = None) -> Callable[[int], object]:
    """Return what makes an update of so many micro-batches of ``samples``, by the engine `torch` in bfloat16."""
    x, t, condition = inputs(bench, own, samples)
    optimizer = OptimizerConfig(learning_rate=1e-6)
    settings = EngineSettings("torch", dtype="bfloat16", optimizer=optimizer, offload=offload)
    engine = build_engine(own.network.module, settings, device=bench.device)
    batch = TrainBatch({"x": x, "t": t}, condition)

    def loss(micro: TrainBatch) -> LossOutput:
        velocity = own.network.velocity(micro.tensors["x"], micro.tensors["t"], micro.condition)
        return LossOutput((velocity - micro.tensors["x"]).square().mean())

    return lambda count: engine.step(loss, [batch] * count, [1 / count] * count)
