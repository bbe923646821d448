"""Exports for diffusers and PEFT: each is reloaded with the public library and compared before it is kept."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import SamplingConfig
from flowalign.export import pipeline as own_pipeline
from flowalign.export.card import base_name, write_card
from flowalign.models.architectures.inputs import CONFIG_KEY
from flowalign.models.build import has_lora
from flowalign.models.customcode import refuse_custom_code
from flowalign.models.scheduler import CONVERSIONS, DEFAULTS
from flowalign.models.sd3 import OWN_PIPELINE, SD3Policy, plain_pipeline, quietly
from flowalign.record import checkpoint
from flowalign.record.checkpoint import content_hash
from flowalign.record.disk import on_disk, require_room
from flowalign.record.files import give_usual_modes, save_tensors
from flowalign.record.outputs import RECORD as RECORD
from flowalign.record.outputs import check_place, draft_beside, take_place
from flowalign.samples.opened import open_policy, policy_spec, torch_threads
from flowalign.samples.rollout import SampleNoise, integrate

Kind = str  # pipeline, lora, ema, or another average such as ema_0.99
Dtype = Literal["float32", "bfloat16", "float16"]
PROBE_PROMPTS = ("a photo of a red circle", "a photo of two dogs")
PROBE_STEPS = 4
PROBE_TIME = 0.6
PROBE_GUIDANCE = (1.0, 3.0)


class ExportError(RuntimeError):
    """An export that cannot be made, or that does not compute what the policy computes; nothing was left behind."""


class Errors(NamedTuple):
    """What a reloaded export was found to differ by: shares of the largest value, see `_share`, and plain numbers."""

    velocity: float
    latents: float
    num_latents: int
    largest_difference: float
    largest_value: float


@dataclass(frozen=True)
class ExportResult:
    """Where the export lies, and the largest differences found after reloading it: see `_share`.

    ``iteration`` is a training run's step. ``num_latents`` were compared, whose ``largest_difference`` stands beside
    their ``largest_value``.
    """

    path: Path
    kind: Kind
    checkpoint: Path
    iteration: int
    content_hash: str
    velocity_error: float
    latents_error: float
    num_latents: int
    largest_difference: float
    largest_value: float

    @property
    def compared(self) -> str:
        """What was compared and how close it was."""
        return (
            f"compared {self.num_latents} latents of {PROBE_STEPS} steps, guidance "
            f"{' and '.join(f'{g:g}' for g in PROBE_GUIDANCE)}, of the reloaded files with the policy's: largest "
            f"difference {self.largest_difference:.1e} of {self.largest_value:.2g}"
        )


@dataclass(frozen=True)
class Probe:
    """What our own policy answers to fixed noise: one velocity and, by guidance scale, latents after four steps."""

    noise_NCHW: Tensor
    velocity_NCHW: Tensor
    latents: dict[float, Tensor]


def export(
    source: Path,
    to: Path,
    *,
    kind: Kind = "pipeline",
    config: AlignConfig,
    dtype: Dtype = "float32",
    tolerance: float = 1e-5,
    overwrite: bool = False,
) -> ExportResult:
    """Write ``source`` (a run directory or a checkpoint) to the directory ``to``.

    ``pipeline``: a StableDiffusion3Pipeline with full weights, a LoRA merged in; ``ema``: the same of the averaged
    weights (``ema_0.99``: of another average). One whose network takes more inputs, or is of another family than
    ``rf``, has a ``pipeline.py`` beside it, without which diffusers refuses to load it. ``lora``: the adapter in
    PEFT's and in diffusers' layout. ``dtype`` is a pipeline's transformer's: other than float32, it is compared with
    our policy of equally rounded weights. All else is float32.

    Raises:
        ExportError: the kind does not fit the run, or a reloaded export differs by more than ``tolerance`` of the
            largest value.
        DirectoryTaken: ``to`` holds something; ``overwrite`` replaces an earlier export, and nothing else.
        CheckpointError, ModelError: the checkpoint or the base model cannot be read.
    """
    which = kind if kind.startswith("ema") else "model"
    found, to = checkpoint.find(Path(source), which), Path(to)
    _check(kind, config, dtype)
    check_place(to, overwrite)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    with draft_beside(to) as draft:
        with torch_threads(config.cluster.threads):
            policy, state = open_policy(found, config, which)
            if not isinstance(policy, SD3Policy):
                raise ExportError(f"export knows models of type sd3, not {config.model.type}")
            if type(policy.network) is not SD3Transformer2DModel:
                raise ExportError(
                    f"diffusers has no class for a {type(policy.network).__name__}; evaluate the run itself"
                )
            trained = {name: p for name, p in policy.network.named_parameters() if p.requires_grad}
            digest = content_hash(trained)
            if kind == "lora":
                errors = _write_lora(policy, draft, config)
            else:
                errors = _write_pipeline(policy, draft, config, getattr(torch, dtype))
        _refuse_difference(errors, tolerance, to)
        result = ExportResult(
            to, kind, found, int(state["iteration"] if "iteration" in state else state["step"]), digest, *errors
        )
        _keep(draft, to, result, config, state, policy.family)
    return result


def _check(kind: Kind, config: AlignConfig, dtype: Dtype) -> None:
    if kind not in ("pipeline", "lora") and not re.fullmatch(r"ema(_[\d.]+)?", kind):
        raise ExportError(f"{kind!r} is no kind of export; there are pipeline, lora, ema and averages such as ema_0.99")
    if kind == "lora" and config.model.lora is None:
        raise ExportError("this run trained all weights and has no LoRA to export; export it as pipeline")
    if kind == "lora" and dtype != "float32":
        raise ExportError(f"LoRA files are written in float32, not {dtype}; leave dtype out")


def _refuse_difference(errors: Errors, tolerance: float, to: Path) -> None:
    if not _largest([errors.velocity, errors.latents]) <= tolerance:
        raise ExportError(
            f"the export to {to}, reloaded, differs from the policy by {errors.velocity:.3g} in velocity and "
            f"{errors.latents:.3g} "
            f"in {PROBE_STEPS}-step latents, as a share of their largest value (allowed: {tolerance:g}); "
            "nothing was written"
        )


def _keep(draft: Path, to: Path, result: ExportResult, config: AlignConfig, state: dict[str, Any], family: str) -> None:
    """Card and record, then one rename; an earlier export is replaced."""
    write_card(draft, config, state, kind=result.kind, run_dir=result.checkpoint.parent.parent)
    record = {**asdict(result), "path": to.name, "checkpoint": "/".join(result.checkpoint.parts[-3:])}
    record |= {"max_sequence_length": config.model.max_sequence_length, "family": family}
    record["sampling"] = config.evaluation.model_dump(include=set(SamplingConfig.model_fields) - {"cache"})
    if result.kind != "lora" and config.evaluation.grid == "diffusers":
        record["sampling"]["grid"] = "pipeline"  # the scheduler beside it walks so, see `_walking`
    give_usual_modes(draft)
    take_place(draft, to, record)


def _write_pipeline(policy: SD3Policy, directory: Path, config: AlignConfig, dtype: torch.dtype) -> Errors:
    expected = _probe(policy, config)
    network: Any = policy.network
    if has_lora(network):
        network.fuse_lora()
        network.unload_lora()
    if dtype != torch.float32:
        network.to(dtype).float()
        expected = _probe(policy, config)
    network.to(dtype)
    for part in (policy.pipeline.text_encoder, policy.pipeline.text_encoder_2, policy.pipeline.text_encoder_3):
        # transformers loads a half-precision encoder in half precision, whatever dtype the pipeline is loaded in.
        if part is not None:
            part.float()
    policy.pipeline.scheduler = _euler(policy.pipeline.scheduler, **_walking(config.evaluation))
    # By its record our loader knows a consistency student, whose scheduler it would refuse in another directory.
    (directory / RECORD).write_text(json.dumps({"sampling": {"solver": config.evaluation.solver}}), encoding="utf-8")
    save_pipeline(policy, directory)
    return _differences(expected, load_pipeline(directory, config.cluster.device), config)


def _errors(velocity: float, found: dict[float, Tensor], expected: Probe) -> Errors:
    pairs = [(g, found[g], made) for g, made in expected.latents.items()]
    return Errors(
        velocity,
        _largest([_share(f, made) / _amplification(g) for g, f, made in pairs]),
        sum(len(made) for _, _, made in pairs),
        _largest([float((f - made).abs().max()) for _, f, made in pairs]),
        _largest([float(made.abs().max()) for _, _, made in pairs]),
    )


def save_pipeline(policy: SD3Policy, directory: Path) -> None:
    """The pipeline as it is; where a plain one would sample it wrongly, with a file that does so rightly, without which
    diffusers refuses to load it."""
    network: Any = policy.network
    own = bool(policy.inputs) or policy.family != "rf"
    if own or own_pipeline.FAMILY in network.config:
        network.register_to_config(**{own_pipeline.FAMILY: policy.family})
    parts = [part for part in policy.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    sizes = (sum(p.numel() * p.element_size() for p in part.parameters()) for part in parts)
    require_room(f"a pipeline in {directory.parent}", directory.parent, on_disk(sizes))
    with quietly():
        policy.pipeline.save_pretrained(str(directory), safe_serialization=True)
    forget_local_paths(directory)
    if not own:
        return
    shutil.copy(own_pipeline.__file__, directory / f"{OWN_PIPELINE[0]}.py")
    index = directory / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8")) | {"_class_name": list(OWN_PIPELINE)}
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_lora(policy: SD3Policy, directory: Path, config: AlignConfig) -> Errors:
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    network: Any = policy.network
    expected = _probe(policy, config)
    adapter = network.peft_config["default"]
    adapter.base_model_name_or_path = base_name(config.model.path)
    adapter.inference_mode = True
    adapter.target_modules = sorted(adapter.target_modules)  # a set, which PEFT would write in any order
    adapter.save_pretrained(str(directory))
    state = get_peft_model_state_dict(network, save_embedding_layers=False)
    weights = {name: w.detach().to("cpu", torch.float32).contiguous() for name, w in state.items()}
    save_tensors({f"base_model.model.{n}": w for n, w in weights.items()}, directory / "adapter_model.safetensors")
    # Readers without PEFT's metadata take alpha = rank, so alpha / rank goes into B.
    scale = adapter.lora_alpha / adapter.r
    scaled: Any = {n: w * scale if ".lora_B." in n else w for n, w in weights.items()}
    StableDiffusion3Pipeline.save_lora_weights(str(directory), transformer_lora_layers=scaled)
    found = []
    for library in ("diffusers", "peft"):
        pipeline = load_pipeline(Path(config.model.path), config.cluster.device)
        if library == "diffusers":
            pipeline.load_lora_weights(str(directory))
        else:
            PeftModel.from_pretrained(pipeline.transformer, str(directory))
        found.append(_differences(expected, pipeline, config))
    velocity, latents, counts, difference, value = zip(*found, strict=True)
    return Errors(_largest(velocity), _largest(latents), sum(counts), _largest(difference), _largest(value))


def load_pipeline(directory: Path, device: str = "cpu") -> StableDiffusion3Pipeline:
    """A pipeline directory through diffusers alone, in float32; a T5 that was left out is named, as diffusers wants.

    Where the directory has a ``pipeline.py``, it stands for the one of this package, which takes its place: no code of
    a directory is run.

    Raises:
        ModelError: the directory names code of its own.
    """
    refuse_custom_code(directory)
    index = json.loads((directory / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if not any(index.get(name) or [])}
    more: Any = {"dtype": torch.float32, "local_files_only": True, **absent}
    with quietly():
        pipeline: Any = plain_pipeline(str(directory), **more)
        if (directory / "pipeline.py").is_file():
            pipeline = own_pipeline.FlowalignPipeline(**pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@torch.no_grad()
def _probe(policy: SD3Policy, config: AlignConfig) -> Probe:
    shape = policy.latent_shape(config.model.height, config.model.width)
    ids = range(len(PROBE_PROMPTS))
    noise = SampleNoise(0, ids, shape).draw().to(policy.device)
    condition = policy.encode_prompts(PROBE_PROMPTS)
    velocity = policy.velocity(noise, torch.full((len(ids),), PROBE_TIME, device=policy.device), condition)
    latents = {}
    for guidance in PROBE_GUIDANCE:
        sampling = SamplingConfig(num_steps=PROBE_STEPS, guidance_scale=guidance, grid=config.evaluation.grid)
        spec = policy_spec(policy, sampling, config.model)
        latents[guidance] = integrate(policy.velocity, condition, SampleNoise(0, ids, shape), spec, policy.device)[2]
    return Probe(noise, velocity, latents)


@torch.no_grad()
def _differences(expected: Probe, pipeline: Any, config: AlignConfig) -> Errors:
    """Velocity and latents of the public pipeline against the probe: largest differences, see `_share`.

    Those of guided latents are divided by what guidance makes of rounding.
    """
    prompts, noise, length = list(PROBE_PROMPTS), expected.noise_NCHW, config.model.max_sequence_length
    pipeline.scheduler = _euler(pipeline.scheduler, stochastic_sampling=False)
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    extra = len(pipeline.transformer.config.get(CONFIG_KEY) or ())
    # A family walks levels of its own on every grid.
    even = config.evaluation.grid == "paper" and (pipeline.transformer.config.get(own_pipeline.FAMILY) or "rf") == "rf"
    told = pipeline.scheduler.config["num_train_timesteps"]  # of the time
    zeros = torch.zeros(len(prompts), extra, device=pooled.device)  # the velocity at the time itself, unguided
    velocity = pipeline.transformer(
        hidden_states=noise,
        encoder_hidden_states=tokens,
        pooled_projections=torch.cat([pooled, zeros], 1),
        timestep=torch.full((len(prompts),), PROBE_TIME * told, device=noise.device),
        return_dict=False,
    )[0]
    size = {"height": noise.shape[2] * pipeline.vae_scale_factor, "width": noise.shape[3] * pipeline.vae_scale_factor}
    found = {}
    for guidance in expected.latents:
        found[guidance] = pipeline(
            prompts,
            latents=noise,
            num_inference_steps=PROBE_STEPS,
            sigmas=even_levels(PROBE_STEPS) if even else None,
            guidance_scale=guidance,
            max_sequence_length=length,
            output_type="latent",
            **size,
        ).images
    return _errors(_share(velocity, expected.velocity_NCHW), found, expected)


def _walking(sampling: SamplingConfig) -> dict[str, Any]:
    """Options with which the base's scheduler walks the levels that the exported model is sampled along."""
    found: dict[str, Any] = {"stochastic_sampling": sampling.solver == "consistency"}
    if sampling.grid != "pipeline":  # handed over as sigmas, or 0.1's static grid: no conversion, but the shift
        found |= {name: DEFAULTS[name] for name in CONVERSIONS}
    if sampling.grid == "diffusers":
        found["use_dynamic_shifting"] = False
    return found


def even_levels(count: int) -> list[float]:
    """The ``sigmas`` that make diffusers' scheduler walk ``count`` equal steps, which it shifts itself."""
    return [round(1 - k / count, 6) for k in range(count)]


def _euler(like: Any, **changes: Any) -> Any:
    """A scheduler like ``like``; with ``stochastic_sampling`` each step noises the prediction of the image anew."""
    return FlowMatchEulerDiscreteScheduler.from_config(like.config, **changes)


def _share(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest value, which is taken as 1 where it is smaller."""
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def _amplification(guidance: float) -> float:
    """How much guidance magnifies the rounding of the two velocities that it combines: |g| + |1 - g|."""
    return guidance + abs(1 - guidance)


def _largest(errors: Sequence[float]) -> float:
    """Like max, but NaN wins."""
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def forget_local_paths(directory: Path) -> None:
    """Leave out where on this machine the parts came from."""
    for path in directory.glob("**/*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
