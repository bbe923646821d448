"""A diffusers pipeline for transformers that a plain ``StableDiffusion3Pipeline`` would sample wrongly.

This file needs diffusers, torch and safetensors only. Beside a pipeline's folders, as ``pipeline.py``:

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=f"{folder}/pipeline.py", trust_remote_code=True, text_encoder_3=None, tokenizer_3=None
    )
    image = pipe("a photo of a red circle", num_inference_steps=2).images[0]

(leave the two None out where the folder holds a T5). The transformer's ``config.json`` says what it is:

- ``extra_inputs``: "r", the time that a step leads to, for average velocities (MeanFlow, arXiv:2505.13447), and
  "guidance", the scale of a guidance that needs no second evaluation (arXiv:2210.03142).
- ``_flow_family``: its output is not the velocity of the straight path ``x = (1 - s) x0 + s noise``. It is the noise
  (``eps/…``), v (``v/…``) or EDM's F (``edm…``) of the path ``z = a x0 + b noise = (a + b) x`` at the noise level ``s =
  b / (a + b)``; the steps are those of the straight path all the same (arXiv:2403.03206, sec. 2 and 3).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors import safe_open
from torch import Tensor, nn

SCALES = {"r": 1000.0, "guidance": 100.0}  # columns behind the pooled text, in this order
PREFIX = "time_text_embed.inputs."
FAMILY = "_flow_family"
SIGMAS = (0.002, 80.0)  # EDM's lowest and highest b / a
SIGMA_DATA = 0.5
# A scheduler that walks the levels it is given as they are.
AS_GIVEN = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "invert_sigmas": False}
AS_GIVEN |= {f"use_{kind}_sigmas": False for kind in ("karras", "exponential", "beta")}


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


class Family:
    """The meaning of a network's output, by a name such as ``v/cos`` or ``edm(0.0, 0.6)``; numbers are float64.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        self.kind, _, self.path = name.partition("/")
        self.p_mean, self.p_std = -1.2, 1.2
        if name.startswith("edm("):
            self.kind, (self.p_mean, self.p_std) = "edm", map(float, name[4:-1].split(","))
        known = {"eps": ("linear", "cos"), "v": ("linear", "cos"), "edm": ("", "rf", "cos")}
        if self.path not in known.get(self.kind, ()):
            raise ValueError(f"this pipeline does not know the family {name!r} of its transformer; get a newer one")

    def own_time(self, s: Tensor) -> Tensor:
        """Return the time in [0, 1] that the network is told at the level s."""
        if self.path == "cos":
            return torch.atan2(s, 1 - s) * 2 / math.pi
        if self.path == "rf":
            return s
        if self.path == "linear":
            knots, target = _log_alpha_bar().to(s.device), -torch.log1p((s / (1 - s)).square())
            right = torch.searchsorted(-knots, -target).clamp(1, 1000)
            above, below = knots[right - 1], knots[right]
            return ((right - 1 + (target - above) / (below - above)) / 1000).clamp(0, 1)
        return torch.special.erfc((self.p_mean - torch.logit(s)) / self.p_std / math.sqrt(2)) / 2

    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a, b, p and q of ``z = a x0 + b noise`` and ``output = p x0 + q noise`` at the level s."""
        if self.kind == "edm":
            b = s / (1 - s)
            root = torch.sqrt(b * b + SIGMA_DATA**2)
            return torch.ones_like(s), b, b / (SIGMA_DATA * root), -SIGMA_DATA / root
        length = torch.hypot(s, 1 - s)
        a, b = (1 - s) / length, s / length
        return (a, b, -b, a) if self.kind == "v" else (a, b, torch.zeros_like(s), torch.ones_like(s))

    def levels(self, num_steps: int, shift: float) -> list[float]:
        """Return the noise levels s of so many steps, without the last, which is 0."""
        count = max(num_steps - 1, 1) if self.kind == "edm" else num_steps
        place = torch.arange(num_steps, dtype=torch.float64) / count
        place = shift * (1 - place) / (1 + (shift - 1) * (1 - place))
        if self.kind == "edm":
            low, high = (sigma ** (1 / 7) for sigma in (SIGMAS[0], self._highest()))
            sigma = (low + place * (high - low)) ** 7
        elif self.path == "linear":
            position = place * 1000
            left = position.floor().clamp(0, 999).long()
            above, below = _log_alpha_bar()[left], _log_alpha_bar()[left + 1]
            sigma = torch.expm1(-(above + (position - left) * (below - above))).sqrt()
        else:
            first = 1.0 if self.kind == "v" else math.atan(SIGMAS[1]) * 2 / math.pi
            angle = math.pi / 2 * first * place
            return (torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))).float().tolist()
        return (sigma / (1 + sigma)).float().tolist()

    def _highest(self) -> float:
        """Return EDM's highest sigma, or the highest that a narrower density was trained on."""
        drawn = torch.special.ndtri(torch.tensor(1 - 2.0**-24, dtype=torch.float64))
        return SIGMAS[1] if self.path else min(SIGMAS[1], math.exp(self.p_mean + self.p_std * float(drawn)))


class FlowalignPipeline(StableDiffusion3Pipeline):
    """``StableDiffusion3Pipeline``; its transformer gives velocities of the straight path, and its further inputs, read
    from its folder, are given at every step."""

    _inputs: tuple[str, ...] = ()
    _family: Family | None = None
    _first_level = 1.0

    def register_modules(self, **kwargs: Any) -> None:
        """Register the parts once they are loaded.

        diffusers has read the transformer without the weights of its inputs.

        Raises:
            ValueError: an input or a family that is unknown, or an input whose weights are missing.
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
        name = transformer.config.get(FAMILY) or "rf"
        if name != "rf":
            self._family = Family(name)
            raw = getattr(transformer, "raw_forward", transformer.forward)
            transformer.raw_forward, transformer.forward = raw, self._velocity(raw, self._family)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        sigmas: list[float] | None = None,
        **kwargs: Any,
    ):
        """Sample as ``StableDiffusion3Pipeline`` does.

        ``guidance_scale`` goes to the network where it takes one as an input.

        ``sigmas`` of a family are levels of the straight path as they are; by default they are the family's own.
        """
        network_scale, scheduler = guidance_scale, self.scheduler
        if "guidance" in self._inputs:
            guidance_scale = 1.0
        num_inference_steps = num_inference_steps or (4 if self._inputs else 28)
        if self._family is not None:
            sigmas = sigmas or self._family.levels(num_inference_steps, float(scheduler.config["shift"]))
            self.scheduler, self._first_level = type(scheduler).from_config(scheduler.config, **AS_GIVEN), sigmas[0]
        hook = self.transformer.register_forward_pre_hook(self._columns(network_scale), with_kwargs=True)
        more = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "sigmas": sigmas}
        try:
            return super().__call__(prompt, **more, **kwargs)
        finally:
            hook.remove()
            self.scheduler, self._first_level = scheduler, 1.0

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return noise of the first level's size, drawn or given."""
        return super().prepare_latents(*args, **kwargs) * self._first_level

    def _columns(self, guidance_scale: float) -> Any:
        """Return a hook that appends the inputs' columns to the pooled text of a call at a time of the scheduler."""

        def append(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if not self._inputs:
                return args, kwargs
            pooled, time = kwargs["pooled_projections"], kwargs["timestep"][0]
            times, sigmas = self.scheduler.timesteps, self.scheduler.sigmas
            step = int((times.to(time.device) - time).abs().argmin())
            values = {"r": float(sigmas[step]) - float(sigmas[step + 1]), "guidance": guidance_scale - 1}
            columns = [torch.full((len(pooled), 1), values[name], device=pooled.device) for name in self._inputs]
            return args, {**kwargs, "pooled_projections": torch.cat([pooled, *columns], 1)}

        return append

    def _velocity(self, raw: Any, family: Family) -> Any:
        """Return a transformer's forward that takes x and 1000 s and answers the velocity; its own takes z."""

        def forward(
            hidden_states: Tensor, *args: Any, timestep: Tensor, return_dict: bool = True, **kwargs: Any
        ) -> Any:
            s = self._level(timestep).clamp(0, 1 - 2**-53) if family.kind == "edm" else self._level(timestep)
            shape = (-1, *(1,) * (hidden_states.ndim - 1))
            exact = [value.reshape(shape) for value in family.coefficients(s)]
            scale, c_in = exact[0] + exact[1], torch.rsqrt(exact[1] ** 2 + SIGMA_DATA**2)
            a, b, p, q = (value.float() for value in exact)
            z = hidden_states.float() * scale.float()
            seen = z * c_in.float() if family.kind == "edm" else z
            told = self.scheduler.config["num_train_timesteps"] * family.own_time(s).float()
            output = raw(seen.to(hidden_states.dtype), *args, timestep=told, return_dict=False, **kwargs)[0].float()
            velocity = (((a + b) * output - (p + q) * z) / (a * q - b * p)).to(hidden_states.dtype)
            return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

        return forward

    def _level(self, timestep: Tensor) -> Tensor:
        """Return the level s of ``timestep`` (N,), mostly 1000 s, float64.

        One of the scheduler's times has exactly its own level.
        """
        times, sigmas = (value.to(timestep.device) for value in (self.scheduler.timesteps, self.scheduler.sigmas))
        same = times[None] == timestep[:, None]
        exact = sigmas[same.int().argmax(1)].double()
        return torch.where(same.any(1), exact, timestep.double() / self.scheduler.config["num_train_timesteps"])


def _log_alpha_bar() -> Tensor:
    """Return 0, then ``log alpha_bar`` of the 1,000 steps of latent diffusion's schedule, linear in sqrt(beta)."""
    root_beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-root_beta.square()).cumsum(0)])


def _read(inputs: nn.ModuleDict, folder: Path) -> None:
    wanted = {f"{PREFIX}{name}": parameter for name, parameter in inputs.named_parameters()}
    # A variant, such as fp16, has one dot more in its name: where the plain files lie beside it, they come first.
    for path in sorted(folder.glob("*.safetensors"), key=lambda path: (path.name.count("."), path.name)):
        with safe_open(str(path), "pt") as file:
            for name in wanted.keys() & set(file.keys()):
                wanted.pop(name).data.copy_(file.get_tensor(name))
    if wanted:
        raise ValueError(f"{folder} has no weights {min(wanted)}; its export is incomplete")
