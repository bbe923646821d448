"""Stable Diffusion 3 / 3.5 as a policy, over the diffusers classes.

Shapes: N samples, P prompts, C H W latents, L text tokens, D joint width, E pooled width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.flow import families
from flowalign.flow.guidance import cfg, cfg_norm_preserving, guides
from flowalign.flow.schedule import PipelineSchedule, resolution_shift
from flowalign.models.base import ModelError
from flowalign.models.customcode import refuse_custom_code
from flowalign.models.scheduler import FlowScheduler, check_scheduler, checked_options
from flowalign.record.files import stays_below
from flowalign.record.libraries import UNREAD_INPUTS, silence
from flowalign.record.textfiles import TextError, read_object
from flowalign.types import Condition, TextPart
from rewards.missing import hint

CACHED_PROMPTS = 512
# File and class of the pipeline that an export of ours names where a plain one would sample wrongly.
OWN_PIPELINE = ("pipeline", "FlowalignPipeline")
SHORT = 128  # tokens
LORA_TARGETS = [
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
]


def check_directory(directory: Path) -> None:
    """Raise ModelError, in milliseconds, unless ``directory`` looks like a StableDiffusion3Pipeline on disk."""
    if not directory.is_dir():
        raise ModelError(
            f"model.path: {directory} is not a directory{hint(directory)}; give a StableDiffusion3Pipeline directory"
        )
    index = directory / "model_index.json"
    if not index.is_file():
        raise ModelError(f"model.path: {directory} has no model_index.json; give a StableDiffusion3Pipeline directory")
    try:
        name = read_object(index).get("_class_name")
    except TextError as error:
        raise ModelError(f"model.path: {error}") from error
    if name not in ("StableDiffusion3Pipeline", list(OWN_PIPELINE)):
        raise ModelError(f"model.path: {directory} holds a {name}; models of type sd3 need a StableDiffusion3Pipeline")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"):
        if not (directory / part).is_dir():
            raise ModelError(f"model.path: {directory} has no folder {part}; the download or export is incomplete")
    for index in sorted(directory.glob("*/*.safetensors.index.json")):
        _check_shards(index)
    refuse_custom_code(directory)
    check_scheduler(directory)


def _check_shards(index: Path) -> None:
    """The files that an index names lie beside it."""
    try:
        named = read_object(index).get("weight_map")
    except TextError as error:
        raise ModelError(f"model.path: {error}") from error
    if not isinstance(named, dict):
        raise ModelError(f"model.path: {index} has no weight_map; the download or export is incomplete")
    if outside := [name for name in named.values() if not stays_below(name) or Path(name).name != name]:
        raise ModelError(f"model.path: {index} names {outside[0]}; the files of a part lie beside its index")


def pipeline_schedule(directory: Path, height: int | None, width: int | None) -> PipelineSchedule:
    """The walk of the pipeline in ``directory`` at an image size in pixels, None being its own; reads small files.

    Raises:
        ModelError: see `check_scheduler`; or the size does not fit.
    """
    from flowalign.models.inspect import image_tokens

    return walk_of(check_scheduler(directory), image_tokens(directory, height, width), image_tokens(directory))


def walk_of(options: Mapping[str, Any], tokens: int, own_tokens: int) -> PipelineSchedule:
    """What StableDiffusion3Pipeline hands its scheduler: a number of steps and, where it asks for it, this ``mu``."""
    mu = None
    if options["use_dynamic_shifting"]:
        base, most = options["base_image_seq_len"], options["max_image_seq_len"]
        slope = (options["max_shift"] - options["base_shift"]) / (most - base)
        mu = tokens * slope + (options["base_shift"] - slope * base)
    return FlowScheduler(options, mu).schedule(resolution_shift(tokens, own_tokens))


def _attention(device: str, length: int) -> AbstractContextManager[Any]:
    """The kernel of attention over ``length`` tokens; torch's own choice but for short bfloat16 sequences on a CPU.

    There its flash kernel's backward pass is so slow that plain products win (``scripts/benchmarks/kernels.py``).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device == "cpu" and length <= SHORT and torch.is_autocast_enabled("cpu"):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@contextmanager
def quietly() -> Iterator[None]:
    """Without the bars of libraries that load or save files for seconds: a run says itself what it loads."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    hidden = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in hidden:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in hidden:
            library.enable_progress_bar()


def plain_pipeline(directory: str, **options: Any) -> Any:
    """A plain pipeline of what lies in ``directory``; the code that an export of ours has for diffusers is not run."""
    from diffusers import StableDiffusion3Pipeline

    class Plain(StableDiffusion3Pipeline):
        @classmethod
        def load_config(cls, *args: Any, **kwargs: Any) -> Any:
            found: Any = super().load_config(*args, **kwargs)
            return {**found, "_class_name": "StableDiffusion3Pipeline"}

    return StableDiffusion3Pipeline(**Plain.from_pretrained(directory, trust_remote_code=False, **options).components)


class SD3Policy:
    """A ``StableDiffusion3Pipeline`` taken apart: ``network`` learns, the rest is frozen and in eval mode.

    ``max_sequence_length`` is the length of the T5 part of the text; without a T5 encoder diffusers
    appends as many zero tokens, unmasked, so the number is part of the model's configuration.
    """

    def __init__(self, pipeline: object, *, max_sequence_length: int, device: str = "cpu", family: str = "rf") -> None:
        from diffusers import StableDiffusion3Pipeline

        if not isinstance(pipeline, StableDiffusion3Pipeline):
            raise ModelError(f"expected a StableDiffusion3Pipeline, got {type(pipeline).__name__}")
        self.pipeline = pipeline.to(device)
        self.network: nn.Module = pipeline.transformer
        self.vae = pipeline.vae.to(memory_format=torch.channels_last)  # faster convolutions on a CPU
        self.device = device
        self.max_sequence_length = max_sequence_length
        self._scheduler = checked_options(pipeline.scheduler.config)
        self._told = int(self._scheduler["num_train_timesteps"])  # of t, by the pipeline and so here
        self.family = family
        for part in (self.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            if part is not None:
                part.requires_grad_(False).eval()
        self.network.eval()
        self._mixed = self.vae.dtype == torch.bfloat16
        self._encode = lru_cache(maxsize=CACHED_PROMPTS)(self._encode_one)

    @classmethod
    def load(
        cls, directory: Path, *, max_sequence_length: int, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> SD3Policy:
        """Load a pipeline directory; text encoders and autoencoder share ``dtype`` with the transformer.

        Raises:
            ModelError: the directory is missing, incomplete or holds another pipeline.
        """
        check_directory(Path(directory))
        silence(UNREAD_INPUTS)
        index = json.loads((Path(directory) / "model_index.json").read_text())
        # diffusers wants a dropped T5 to be named: text_encoder_3 is not an optional component.
        absent = {k: None for k in ("text_encoder_3", "tokenizer_3") if not any(index.get(k) or [])}
        try:
            with quietly():
                pipeline = plain_pipeline(str(directory), dtype=dtype, local_files_only=True, **absent)
        except Exception as error:  # the libraries raise whatever a damaged file leads them to
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelError(f"model.path: {directory} cannot be loaded ({reason}); is it whole?") from error
        from flowalign.models.architectures.inputs import restore_inputs

        restore_inputs(pipeline.transformer, Path(directory) / "transformer")
        return cls(pipeline, max_sequence_length=max_sequence_length, device=device)

    def use_network(self, network: nn.Module) -> None:
        """Another transformer in the place of the pipeline's own."""
        self.network = network.to(self.device).eval()
        self.pipeline.transformer = network  # type: ignore[assignment]

    @property
    def inputs(self) -> tuple[str, ...]:
        from flowalign.models.architectures.inputs import inputs_of

        return inputs_of(self.network)

    def keep_network(self) -> None:
        del self.pipeline, self.vae, self._encode

    @property
    def lora_targets(self) -> list[str]:
        return list(LORA_TARGETS)

    @property
    def text_parts(self) -> dict[str, TextPart]:
        """The CLIP encoders lie side by side in the first tokens, T5 behind them; only CLIP has a pooled part."""
        clip = [self.pipeline.text_encoder.config, self.pipeline.text_encoder_2.config]
        tokens, width = int(self.pipeline.tokenizer_max_length), [int(c.hidden_size) for c in clip]
        pooled = [int(c.projection_dim) for c in clip]
        parts = {
            "clip_l": TextPart((0, tokens), (0, width[0]), (0, pooled[0])),
            "clip_g": TextPart((0, tokens), (width[0], sum(width)), (pooled[0], sum(pooled))),
        }
        if self.pipeline.text_encoder_3 is not None:
            joint = int(self.pipeline.transformer.config["joint_attention_dim"])
            parts["t5"] = TextPart((tokens, None), (0, joint), (0, 0))
        return parts

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Each distinct prompt is encoded once, alone, so that its embedding never depends on its batch."""
        rows = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        encoded = [self._encode(prompt, self.max_sequence_length) for prompt in [*rows, ""]]
        return Condition(
            tokens_PLD=torch.cat([tokens for tokens, _ in encoded[:-1]]),
            pooled_PE=torch.cat([pooled for _, pooled in encoded[:-1]]),
            index_N=torch.tensor([rows[prompt] for prompt in prompts], device=self.device),
            null_LD=encoded[-1][0][0],
            null_E=encoded[-1][1][0],
        )

    def _encode_one(self, prompt: str, max_sequence_length: int) -> tuple[Tensor, Tensor]:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompt,
            prompt_2=prompt,
            prompt_3=prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=torch.device(self.device),
        )
        assert tokens is not None and pooled is not None
        return tokens, pooled

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        guidance: float | Tensor | None = None,
        norm_preserving: bool = False,
    ) -> Tensor:
        """Velocity (N, C, H, W), float32; guided where ``guidance`` is above 1, in one batched call.

        A network that takes the guidance as an input is handed it as it is, and called once. One that takes ``r``
        gives the average velocity between ``t`` and ``r``, by default ``t`` itself.
        """
        if r is not None and "r" not in self.inputs:
            raise ModelError("this network takes no second time r; give it one with model.inputs: [r]")
        tokens, pooled = condition.expand()
        if "guidance" in self.inputs:
            return self._forward(x, t, tokens, pooled, r, guidance)
        if guidance is None or not guides(guidance):
            return self._forward(x, t, tokens, pooled, r)
        count = x.shape[0]
        both = self._forward(
            torch.cat([x, x]),
            torch.cat([t, t]),
            torch.cat([condition.null_LD.expand(count, -1, -1), tokens]),
            torch.cat([condition.null_E.expand(count, -1), pooled]),
            None if r is None else torch.cat([r, r]),
        )
        null, conditional = both.chunk(2)
        if not norm_preserving:
            return cfg(conditional, null, guidance)
        patch = int(self.network.config["patch_size"])  # type: ignore[index]
        return cfg_norm_preserving(conditional, null, guidance, patch_size=patch)

    def _forward(
        self,
        x: Tensor,
        t: Tensor,
        tokens: Tensor,
        pooled: Tensor,
        r: Tensor | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        if self.inputs:
            from flowalign.models.architectures.inputs import pooled_with_inputs

            dtype = next(self.network.parameters()).dtype
            pooled = pooled_with_inputs(pooled.to(dtype), t, r, guidance, self.inputs)
        network = partial(self._output, tokens=tokens, pooled=pooled)
        return (
            network(x, t) if self.family == "rf" else families.rf_velocity(families.family(self.family), network)(x, t)
        )

    def _output(self, x: Tensor, t: Tensor, *, tokens: Tensor, pooled: Tensor) -> Tensor:
        """What the network itself says, float32: of the straight path its velocity, else see ``flow.families``."""
        # Trainable parameters are float32 whatever the base's dtype: rollout and learner both need autocast, or
        # they would not compute the same function.
        dtype = next(self.network.parameters()).dtype
        # (`enabled=False` would not do: it switches off the autocast that a caller, such as pretraining, is in.)
        device = torch.device(self.device).type
        patch = int(self.network.config["patch_size"])  # type: ignore[index]
        length = tokens.shape[1] + x.shape[-1] * x.shape[-2] // patch**2
        with torch.autocast(device, torch.bfloat16) if self._mixed else nullcontext(), _attention(device, length):
            out = self.network(
                hidden_states=x.to(dtype),
                encoder_hidden_states=tokens.to(dtype),
                pooled_projections=pooled if self.inputs else pooled.to(dtype),  # columns of times stay float32
                timestep=t * self._told,
                return_dict=False,
            )[0]
        return out.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.decode_pixels(latents)
        return pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) about [0, 1], float32, differentiable in the latents (N, C, h, w)."""
        config = self.vae.config
        z = latents / config["scaling_factor"] + (config["shift_factor"] or 0.0)
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float() / 2 + 0.5

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        config = self.vae.config
        pixels = images.permute(0, 3, 1, 2).to(self.vae.dtype).div(127.5).sub(1)
        mean = self.vae.encode(pixels).latent_dist.mean.float()
        return (mean - (config["shift_factor"] or 0.0)) * config["scaling_factor"]

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of an image size in pixels.

        Raises:
            ModelError: the size is not a multiple of what autoencoder and patches need, or beyond their positions.
        """
        from flowalign.models.inspect import check_size

        config = self.network.config
        factor = self.pipeline.vae_scale_factor
        default = int(config["sample_size"]) * factor  # type: ignore[index]
        multiple = factor * int(config["patch_size"])  # type: ignore[index]
        size = [default if pixels is None else pixels for pixels in (height, width)]
        check_size(size, multiple, int(config["pos_embed_max_size"] or 0))  # type: ignore[index]
        return int(config["in_channels"]), size[0] // factor, size[1] // factor  # type: ignore[index]

    def schedule(self, height: int | None = None, width: int | None = None) -> PipelineSchedule:
        """The noise levels that the pipeline walks at an image size in pixels, None being the model's own.

        Raises:
            ModelError: as of `latent_shape`.
        """
        tokens = [h * w // int(self.network.config["patch_size"]) ** 2 for _, h, w in self._shapes(height, width)]  # type: ignore[index]
        return walk_of(self._scheduler, *tokens)

    def _shapes(self, height: int | None, width: int | None) -> list[tuple[int, int, int]]:
        return [self.latent_shape(height, width), self.latent_shape()]
