"""A diffusers pipeline for Stable Diffusion 3 transformers that take a second time or a guidance scale as an input.

This file needs diffusers, torch and safetensors only. Beside a pipeline's folders, as ``pipeline.py``:

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=f"{folder}/pipeline.py", trust_remote_code=True, text_encoder_3=None, tokenizer_3=None
    )
    image = pipe("a photo of a red circle", num_inference_steps=2).images[0]

(leave the two None out where the folder holds a T5). The transformer's ``config.json`` lists its inputs as
``extra_inputs``: "r", the time that a step leads to, for average velocities (MeanFlow, arXiv:2505.13447), and
"guidance", the scale of a guidance that needs no second evaluation (arXiv:2210.03142).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.embeddings import TimestepEmbedding
from safetensors import safe_open
from torch import Tensor, nn

SCALES = {"r": 1000.0, "guidance": 100.0}  # columns behind the pooled text, in this order
PREFIX = "time_text_embed.inputs."


class ConditioningWithInputs(nn.Module):
    """Embedding of time, pooled text and a column for each further input: t - r, and the guidance scale - 1."""

    def __init__(self, base: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.time_proj, self.timestep_embedder = base.time_proj, base.timestep_embedder
        self.text_embedder = base.text_embedder
        first = base.timestep_embedder.linear_1
        self.inputs = nn.ModuleDict({n: TimestepEmbedding(first.in_features, first.out_features) for n in names})
        self.inputs.to(first.weight.device, first.weight.dtype).requires_grad_(False)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        count = len(self.inputs)
        text, columns = pooled[:, :-count].to(self.text_embedder.linear_1.weight.dtype), pooled[:, -count:].unbind(1)
        embedded = self.timestep_embedder(self.time_proj(timestep).to(text.dtype)) + self.text_embedder(text)
        for (name, embedder), column in zip(self.inputs.items(), columns, strict=True):
            embedded = embedded + embedder(self.time_proj(SCALES[name] * column).to(text.dtype))
        return embedded


class FewStepPipeline(StableDiffusion3Pipeline):
    """``StableDiffusion3Pipeline``, its transformer's further inputs read from its folder and given at every step."""

    _inputs: tuple[str, ...] = ()

    def register_modules(self, **kwargs: Any) -> None:
        """Called once the parts are loaded; diffusers has read the transformer without the weights of its inputs.

        Raises:
            ValueError: an input that is unknown, or whose weights are missing.
        """
        super().register_modules(**kwargs)
        transformer = kwargs.get("transformer")
        if transformer is None:
            return
        listed = transformer.config.get("extra_inputs") or ()
        unknown = sorted(set(listed) - set(SCALES))
        if unknown:
            raise ValueError(f"this pipeline knows the inputs {', '.join(SCALES)}, not {unknown[0]!r}; get a newer one")
        self._inputs = tuple(name for name in SCALES if name in listed)
        if self._inputs and not hasattr(transformer.time_text_embed, "inputs"):
            embed = ConditioningWithInputs(transformer.time_text_embed, self._inputs)
            _read(embed.inputs, Path(transformer.config["_name_or_path"]))
            transformer.time_text_embed = embed.eval()

    @torch.no_grad()
    def __call__(self, prompt: Any = None, *, num_inference_steps: int = 4, guidance_scale: float = 1.0, **kwargs: Any):
        """As of ``StableDiffusion3Pipeline``; ``guidance_scale`` goes to the network where it takes one as an input."""
        network_scale = guidance_scale
        if "guidance" in self._inputs:
            guidance_scale = 1.0
        hook = self.transformer.register_forward_pre_hook(self._columns(network_scale), with_kwargs=True)
        try:
            return super().__call__(
                prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **kwargs
            )
        finally:
            hook.remove()

    def _columns(self, guidance_scale: float) -> Any:
        """A hook that appends the inputs' columns to the pooled text of a call at one of the scheduler's times."""

        def append(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            pooled, time = kwargs["pooled_projections"], kwargs["timestep"][0]
            times, sigmas = self.scheduler.timesteps, self.scheduler.sigmas
            step = int((times.to(time.device) - time).abs().argmin())
            values = {"r": float(sigmas[step]) - float(sigmas[step + 1]), "guidance": guidance_scale - 1}
            columns = [torch.full((len(pooled), 1), values[name], device=pooled.device) for name in self._inputs]
            return args, {**kwargs, "pooled_projections": torch.cat([pooled, *columns], 1)}

        return append


def _read(inputs: nn.ModuleDict, folder: Path) -> None:
    wanted = {f"{PREFIX}{name}": parameter for name, parameter in inputs.named_parameters()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in wanted.keys() & set(file.keys()):
                wanted.pop(name).data.copy_(file.get_tensor(name))
    if wanted:
        raise ValueError(f"{folder} has no weights {min(wanted)}; its export is incomplete")
