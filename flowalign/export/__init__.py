"""Exports for diffusers and PEFT: each is reloaded with the public library and compared before it is kept."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flowalign.config.guidance import GUIDANCE_KEYS, guidance_facts
from flowalign.config.sampled import Sampled
from flowalign.config.sections import SamplingConfig, weights_name
from flowalign.export.card import write_card
from flowalign.export.verify import PROBE_GUIDANCE, PROBE_STEPS, TOLERANCE, Errors, explained, probe
from flowalign.export.writing import SHARD_SIZE, write_lora, write_pipeline
from flowalign.models.base import Policy
from flowalign.models.loading import transformer_of
from flowalign.record import checkpoint
from flowalign.record.checkpoint import content_hash
from flowalign.record.earlier import iteration_of
from flowalign.record.files import give_usual_modes
from flowalign.record.outputs import RECORD as RECORD
from flowalign.record.outputs import check_place, draft_beside, take_place
from flowalign.samples.opened import Which, open_policy, torch_threads
from flowalign.samples.sampled import evaluated_weights

KINDS = ("pipeline", "lora")
Dtype = Literal["float32", "bfloat16", "float16"]


class ExportError(RuntimeError):
    """An export that cannot be made, or that does not compute what the policy computes; nothing was left behind."""


@dataclass(frozen=True)
class ExportResult:
    """The export's path, and the largest differences found after reloading it: see `share`.

    ``iteration`` is a training run's step. ``num_latents`` were compared, whose ``largest_difference`` stands beside
    their ``largest_value``. ``rounding`` is how far a rounding of the noise moves the reloaded files' own latents, 0
    where these differ too little to ask. ``base_deviation`` is the norm of the difference between the velocity on the
    base as it is published and on the base of ``base_dtype`` that a LoRA was trained on, as a share of the former.
    """

    path: Path
    kind: str
    weights: Which
    checkpoint: Path
    iteration: int
    content_hash: str
    velocity_error: float
    latents_error: float
    num_latents: int
    largest_difference: float
    largest_value: float
    rounding: float = 0.0
    base_dtype: str | None = None
    base_deviation: float | None = None

    @property
    def compared(self) -> str:
        """One sentence on what was compared and how close it was."""
        said = (
            f"compared {self.num_latents} latents of {PROBE_STEPS} steps, guidance "
            f"{' and '.join(f'{g:g}' for g in PROBE_GUIDANCE)}, of the reloaded files with the policy's: largest "
            f"difference {self.largest_difference:.1e} of {self.largest_value:.2g}"
        )
        if self.rounding:
            said += f"; the last digit of the noise moves the same latents by up to {self.rounding:.1e} of it"
        return said

    @property
    def on_other_base(self) -> str | None:
        """One sentence on a base that was stored smaller while the LoRA learned; None: it was not."""
        if self.base_deviation is None:
            return None
        return (
            f"exported against the base as it is published, where its velocity differs by {self.base_deviation:.2%} "
            f"from that on the {self.base_dtype} base that the LoRA was trained on"
        )


def export(
    source: Path,
    to: Path,
    *,
    kind: str = "pipeline",
    weights: Which | None = None,
    config: Sampled,
    dtype: Dtype = "float32",
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    shard_size: str = SHARD_SIZE,
) -> ExportResult:
    """Write ``source`` (a run directory or a checkpoint) to the directory ``to``.

    ``pipeline``: a pipeline of the family with full weights, a LoRA merged in. One whose network takes more inputs, or
    is of another family than ``rf``, has a ``pipeline.py`` beside it, without which diffusers refuses to load it.
    ``lora``: the adapter in PEFT's and in diffusers' layout. ``weights`` are ``model``, ``ema`` or another average such
    as ``ema_0.99``, by default those that the run evaluates: what is exported has the scores that were reported. Such a
    name as ``kind`` is a pipeline of those weights. ``dtype`` is a pipeline's transformer's: other than float32, it is
    compared with our policy of equally rounded weights. All else is float32, and the base of a LoRA is as published,
    whatever it was trained on. ``shard_size``, such as ``5GB``, is the
    most that a file of weights takes.

    Raises:
        ExportError: the kind does not fit the run, or a reloaded export differs by more than ``tolerance`` of the
            largest value, and its latents by more than roundings explain.
        DirectoryTaken: ``to`` holds something; ``overwrite`` replaces an earlier export, and nothing else.
        CheckpointError, ModelError: the checkpoint or the base model cannot be read.
    """
    kind, weights = _asked(kind, weights)
    _check(kind, config, dtype)
    weights = weights or evaluated_weights(source, config)
    found, to = checkpoint.find(Path(source), weights), Path(to)
    check_place(to, overwrite)
    stored = _in_float32(config, config.model.base_dtype)
    config = _in_float32(config, None)
    with draft_beside(to) as draft:
        with torch_threads(config.threads):
            policy, state = _opened(found, config, weights)
            trained = {name: p for name, p in policy.network.module.named_parameters() if p.requires_grad}
            digest = content_hash(trained)
            deviation = None if stored == config else _deviation(policy, found, stored, weights)
            errors = _write(policy, draft, config, kind, dtype, shard_size)
        _refuse_difference(errors, tolerance, to)
        base = (stored.model.base_dtype, deviation)
        result = ExportResult(to, kind, weights, found, int(iteration_of(state) or 0), digest, *errors, *base)
        _keep(draft, to, result, stored, state, policy.network.path_family)
    return result


def _in_float32(config: Sampled, base_dtype: str | None) -> Sampled:
    changes = {"dtype": "float32", "base_dtype": base_dtype}
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def _deviation(policy: Policy, found: Path, stored: Sampled, which: str) -> float:
    """Return how far the velocity of a checkpoint is from that on the base of the configuration ``stored``."""
    exact, own = (probe(each, stored).velocity_NCHW for each in (policy, open_policy(found, stored, which)[0]))
    return float((own - exact).norm() / exact.norm())


def _asked(kind: str, weights: Which | None) -> tuple[str, Which | None]:
    """Return kind and weights, where the kind may be a name of weights."""
    named = weights_name(kind)
    if named != "model" and not re.fullmatch(r"ema(_[\d.]+)?", named):
        return kind, weights
    if weights not in (None, named):
        raise ExportError(f"a pipeline of {named} and of {weights} weights was asked for; name one of them")
    return "pipeline", named


def _check(kind: str, config: Sampled, dtype: Dtype) -> None:
    if kind not in KINDS:
        raise ExportError(
            f"{kind!r} is no kind of export; there are {' and '.join(KINDS)}, or weights such as model, ema, ema_0.99"
        )
    if kind == "lora" and config.model.lora is None:
        raise ExportError("this run trained all weights and has no LoRA to export; export it as pipeline")
    if kind == "lora" and dtype != "float32":
        raise ExportError(f"LoRA files are written in float32, not {dtype}; leave dtype out")


def _opened(found: Path, config: Sampled, which: str) -> tuple[Policy, dict[str, Any]]:
    """Return the policy of a checkpoint and its state.json. Refuse a policy that diffusers has no class for."""
    policy, state = open_policy(found, config, which)
    module = policy.network.module
    if type(module) is not transformer_of(policy.network.family):
        raise ExportError(f"diffusers has no class for a {type(module).__name__}; evaluate the run itself")
    return policy, state


def _write(policy: Policy, draft: Path, config: Sampled, kind: str, dtype: Dtype, shard_size: str) -> Errors:
    if kind == "lora":
        return write_lora(policy, draft, config)
    return write_pipeline(policy, draft, config, getattr(torch, dtype), shard_size)


def _refuse_difference(errors: Errors, tolerance: float, to: Path) -> None:
    if not errors.shown <= tolerance:
        raise ExportError(
            f"the export to {to}, reloaded, differs from the policy by {errors.velocity:.3g} in velocity and "
            f"{errors.latents:.3g} "
            f"in {PROBE_STEPS}-step latents, as a share of their largest value (allowed: {tolerance:g}"
            f"{f', of latents {explained(errors.rounding):.1e} more' if errors.rounding else ''}); "
            "nothing was written"
        )


def _keep(
    draft: Path, to: Path, result: ExportResult, config: Sampled, state: dict[str, Any], path_family: str
) -> None:
    """Write card and record, then rename once; an earlier export is replaced."""
    write_card(draft, config, state, kind=result.kind, weights=result.weights, run_dir=result.checkpoint.parent.parent)
    record = {**asdict(result), "path": to.name, "checkpoint": "/".join(result.checkpoint.parts[-3:])}
    record |= {"max_sequence_length": config.model.max_sequence_length, "family": path_family}
    record["sampling"] = _sampling(config.evaluation)
    if result.kind != "lora" and config.evaluation.grid == "diffusers":
        record["sampling"]["grid"] = "pipeline"  # the scheduler beside it walks so, see `_walking`
    give_usual_modes(draft)
    take_place(draft, to, record)


def _sampling(own: SamplingConfig) -> dict[str, Any]:
    """Return the way of sampling that an export records; of guidance what says something."""
    how = own.model_dump(include=set(SamplingConfig.model_fields) - {"cache", *GUIDANCE_KEYS})
    return how | guidance_facts(own)
