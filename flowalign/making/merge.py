"""``flowalign merge``: the average of runs, checkpoints and pipelines, as a pipeline directory."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.config.sampled import Sampled
from flowalign.config.sections import SamplingConfig
from flowalign.export.markdown import code, text
from flowalign.export.verify import load_pipeline
from flowalign.export.writing import save_pipeline, widen_encoders
from flowalign.intake.recorded import config_of
from flowalign.models.base import Policy
from flowalign.models.build import bind_weights
from flowalign.models.directory import is_pipeline
from flowalign.models.encoding import Encoding, encoding
from flowalign.models.loading import assembled
from flowalign.models.merge import MergeError, add, check_architecture, fuse_lora, shares
from flowalign.record.files import give_usual_modes
from flowalign.record.outputs import check_place, draft_beside, take_place
from flowalign.samples.opened import open_policy, torch_threads

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [flowalign, text-to-image, merge]
---

# {name}

A weighted average of transformers, made by `flowalign merge`. All else is that of the first; the weights stay under the
licence of what they derive from.

| share | model |
| --- | --- |
{rows}

Sample with `max_sequence_length={length}`.
"""


@dataclass(frozen=True)
class Source:
    """One model of a merge, its configuration, and the hash of the base that a run of it started from."""

    path: Path
    config: Sampled
    policy: Policy
    base: str | None


def merge(
    sources: Sequence[Path],
    to: Path,
    *,
    weights: Sequence[float] = (),
    which: str | None = None,
    model: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Average transformers of one architecture, a LoRA merged into its own first, into the pipeline directory ``to``.

    Text encoders, autoencoder, scheduler and text length are the first one's. ``which`` weights are taken of a run or
    checkpoint, by default those that it evaluates; a pipeline has one set. ``weights`` are scaled to add up to 1.
    ``model`` is the base of runs whose own was moved. Returns what ``to`` records.

    Raises:
        MergeError: fewer than two models, another architecture, other encoders or another base.
        DirectoryTaken: ``to`` holds something; ``overwrite`` replaces an earlier export, and nothing else.
        CheckpointError, ConfigError, ModelError: a source cannot be read.
    """
    if len(sources) < 2:
        raise MergeError(f"merge: got {len(sources)} model; give two or more runs, checkpoints or pipeline directories")
    if which not in (None, "model") and all(map(is_pipeline, sources)):
        raise MergeError(f"--weights: a pipeline has one set of weights, not {which}; leave it out")
    portions = shares(weights, len(sources))
    check_place(to, overwrite)
    first = _open(sources[0], which, None, model)
    with torch_threads(first.config.threads):
        total = _average(first, sources[1:], portions, which, model)
        bind_weights(first.policy.network.module, total)
    record = _record(first, sources, portions, which or "as evaluated")
    pipeline = assembled(first.policy)
    if pipeline.scheduler.config["stochastic_sampling"]:
        # The first one's scheduler is kept, and by its record a consistency student is known.
        record["sampling"] = first.config.evaluation.model_dump(include=set(SamplingConfig.model_fields) - {"cache"})
    _write(pipeline, first.policy, total, to, record)
    return record


def _record(first: Source, sources: Sequence[Path], portions: Sequence[float], which: str) -> dict[str, Any]:
    """Return the record of what was merged."""
    return {
        "kind": "merge",
        "sources": ["/".join(source.resolve().parts[-2:]) for source in sources],
        "shares": portions,
        "weights": which,
        "max_sequence_length": first.config.model.max_sequence_length,
        "family": first.policy.network.path_family,
    }


def _average(
    first: Source, others: Sequence[Path], portions: Sequence[float], which: str | None, model: Path | None
) -> dict[str, Tensor]:
    """Return the average of models; one model is in memory beside the first and the sum."""
    total: dict[str, Tensor] = {}
    network, length = first.policy.network, first.config.model.max_sequence_length
    add(total, network.module, portions[0])
    own, base, named = encoding(first.policy, length), first.base, first.path
    for path, share in zip(others, portions[1:], strict=True):
        source = _open(path, which, first.config, model)
        its = source.policy.network
        check_architecture(str(path), its.module, str(first.path), network.module)
        if its.path_family != network.path_family:
            raise MergeError(
                f"{path} is of the family {its.path_family} and {first.path} of {network.path_family}: their "
                "outputs mean different things and have no average"
            )
        _check_encoders(path, encoding(source.policy, length), first.path, own)
        if None not in (base, source.base) and base != source.base:
            raise MergeError(
                f"{path} was trained from another base model than {named}; averages of such are of no use. If both "
                f"do descend from one model, merge an export: flowalign export {shlex.quote(str(path))} --to DIR"
            )
        if base is None:
            base, named = source.base, path
        add(total, its.module, share)
    return total


def _open(path: Path, which: str | None, first: Sampled | None, base: Path | None) -> Source:
    """Open a source with full weights in float32; text length and image size are the first one's."""
    config = config_of(path, None, None if is_pipeline(path) else base)
    like = (first or config).model
    sizes = {"max_sequence_length": like.max_sequence_length, "height": like.height, "width": like.width}
    model = config.model.model_copy(update={"dtype": "float32", "base_dtype": None, **sizes})
    # Sums need memory, not speed: a run of a GPU is merged wherever there is room.
    config = config.on("cpu").model_copy(update={"model": model})
    policy, state = open_policy(path, config, "model" if is_pipeline(path) else which or config.evaluation.weights)
    fuse_lora(policy.network)
    return Source(path, config, policy, state.get("base_hash"))


def _check_encoders(path: Path, its: Encoding, first: Path, own: Encoding) -> None:
    if its.latent_shape != own.latent_shape:
        raise MergeError(f"{path} has latents of {its.latent_shape}, those of {first} are {own.latent_shape}")
    if not its.same_encoders(own):
        raise MergeError(
            f"{path} encodes prompts or images otherwise than {first}; networks that learned with other text encoders "
            "or another autoencoder have no average"
        )


def _write(pipeline: Any, policy: Policy, expected: dict[str, Tensor], to: Path, record: dict[str, Any]) -> None:
    """Write the model, reload it with diffusers and compare it before it takes its name.

    An earlier export is replaced.
    """
    network, encoders = policy.network, policy.encoders
    with draft_beside(to) as draft:
        widen_encoders(encoders)
        save_pipeline(pipeline, network, draft)
        held = dict(load_pipeline(draft, family=network.family).transformer.named_parameters())
        if any(not torch.equal(held[name].float(), weight) for name, weight in expected.items()):
            raise MergeError(f"the merge, written to {to} and reloaded, holds other weights; nothing was kept")
        rows = "\n".join(f"| {s:.4g} | {code(n)} |" for s, n in zip(record["shares"], record["sources"], strict=True))
        card = CARD.format(name=text(to.name), rows=rows, length=record["max_sequence_length"])
        (draft / "README.md").write_text(card, encoding="utf-8")
        give_usual_modes(draft)
        take_place(draft, to, record)
