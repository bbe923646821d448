"""Samples of a command: the model and the way it samples, and the samples as image files.

Shapes: N samples, C H W latents.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.config.alignment import AlignConfig
from flowalign.config.guidance import GUIDANCE_KEYS, SCALES, guidance_facts
from flowalign.config.sampled import Sampled
from flowalign.config.section import ConfigError
from flowalign.config.sections import SamplingConfig
from flowalign.models.base import Policy
from flowalign.models.checked import check_cached, check_guidance
from flowalign.models.directory import is_pipeline, open_directory
from flowalign.models.errors import ModelError
from flowalign.models.recorded import recorded_model
from flowalign.models.unasked import unasked
from flowalign.record.disk import filled, on_disk, write_text, writing
from flowalign.record.files import save_tensors
from flowalign.rows import Rows
from flowalign.samples.arrange import arranged, check_negatives
from flowalign.samples.noisefile import read_noise
from flowalign.samples.opened import (
    Progress,
    Which,
    asked,
    model_of,
    open_policy,
    policy_plan,
    roll,
    silent,
    torch_threads,
)
from flowalign.samples.rollout import SampleNoise
from flowalign.types import PromptBatch, SamplingPlan

_NAMES_A_PICTURE = ("filename", "file_name", "file", "image")


@dataclass(frozen=True)
class SampledModel:
    """A model that is sampled from, and how: ``path`` is a run, a checkpoint or a pipeline directory, ``config`` its
    configuration; ``which`` weights are taken. See `sampled_model`."""

    path: Path
    config: Sampled
    which: Which
    seed: int
    sampling: SamplingConfig

    @contextmanager
    def opened(self, batch: PromptBatch | None = None) -> Iterator[tuple[Policy, dict[str, Any], SamplingPlan]]:
        """Yield the policy, its state.json and how it is sampled; inside, torch has as many threads as in the run.

        ``batch``, as it was `arranged`, is all that is asked of it, where that is known.

        Raises:
            CheckpointError, ModelError: as `open_policy` does.
        """
        with torch_threads(self.config.threads):
            policy, state = open_policy(self.path, self.config, self.which, batch)
            if not is_pipeline(self.path) and isinstance(self.config, AlignConfig) and self.config.rollouts_compile:
                policy.network.compile()
            yield policy, state, policy_plan(policy, self.sampling, self.config.model)

    def arranged(self, batch: PromptBatch) -> PromptBatch:
        """Return ``batch`` as `arrange.arranged` does. Raise ConfigError as `check_led`."""
        self.check_led(batch.metadata)
        return arranged(batch, self.config.model)

    def check_led(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise ConfigError where guidance of the prompts ``rows`` has nothing to lead away from."""
        for key in SCALES:
            try:
                scale, true = getattr(self.sampling, key), key == "true_guidance_scale"
                check_negatives(self.config.model, scale, rows, true=true, key="--negative-prompt")
            except ModelError as error:
                raise ConfigError(f"--{key.replace('_', '-')}", str(error)) from error

    @property
    def made_with(self) -> dict[str, Any]:
        """The record, beside each sample, of how it was made."""
        own, negative = set(SamplingConfig.model_fields) - set(GUIDANCE_KEYS), self.config.model.negative_prompt
        how = self.sampling.model_dump(include=own, exclude_none=True) | guidance_facts(self.sampling)
        led = {} if negative is None else {"negative_prompt": negative}
        return (how | led) | {
            "max_sequence_length": self.config.model.max_sequence_length,
            "weights": self.which,
            "seed": self.seed,
        }


def evaluated_weights(path: Path, config: Sampled) -> Which:
    """Return the weights whose scores a run reports, which are taken where none are named; of a pipeline ``model``."""
    return "model" if is_pipeline(Path(path)) else config.evaluation.weights


def sampled_model(
    path: Path,
    config: Sampled,
    *,
    which: Which | None = None,
    seed: int | None = None,
    negative_prompt: str | None = None,
    **changes: Any,
) -> SampledModel:
    """Return the model at ``path`` with what a caller asks for; what is not given is as in ``config.evaluation``.

    ``changes`` are keys of `SamplingConfig`; None asks for nothing.

    Raises:
        ConfigError: the solver has no such option, or its steps cannot be cached; or there is no such guidance.
    """
    own, path = config.evaluation, Path(path)
    if negative_prompt is not None:
        model = config.model.model_copy(update={"negative_prompt": negative_prompt})
        config = config.model_copy(update={"model": model})
    which = which or evaluated_weights(path, config)
    seed = own.seed if seed is None else seed
    if own.cache is not None:
        check_cached("evaluation.cache", model_of(path, config))
    given = {key: value for key, value in changes.items() if value is not None}
    sampling = asked(own, **given)
    try:
        check_guidance("", sampling, model_of(path, config), list(given))
    except ConfigError as error:
        raise ConfigError(f"--{error.key.replace('_', '-')}", error.reason) from error
    return SampledModel(path, config, which, seed, sampling)


_WRITTEN = {
    "num_steps": "--num-steps {:g}",
    "guidance_scale": "--guidance-scale {:g}",
    "max_sequence_length": "model.max_sequence_length={:g}",
}


def note_of_pipeline(model: SampledModel, given: Collection[str]) -> str | None:
    """Say what would sample as a published pipeline does by itself, for a caller who chose none but the keys ``given``.

    None where nothing differs, and of a model that is no pipeline or records how it is sampled.
    """
    if not is_pipeline(model.path) or recorded_model(model.path):
        return None
    own = model.config.model
    directory = open_directory(own)
    now = {name: getattr(model.sampling, name, None) or getattr(own, name, None) for name in _WRITTEN}
    differ = {
        name: value for name, value in unasked(directory, own).items() if value != now[name] and name not in given
    }
    words = " ".join(_WRITTEN[name].format(differ[name]) for name in _WRITTEN if name in differ)
    return f"a {directory.family.pipeline} that is told nothing draws as with {words}" if differ else None


def sample_checkpoint(
    model: SampledModel,
    prompts: Sequence[str | Mapping[str, Any]],
    out_dir: Path,
    *,
    num_images: int = 1,
    noise: Path | None = None,
    save_latents: bool = False,
    progress: Progress = silent,
) -> list[Path]:
    """Save ``num_images`` PNGs a prompt and ``index.json``, which says how they were made.

    A prompt is a text or a row of a file of prompts, which may have a ``negative_prompt`` of its own. ``noise`` is a
    file of what the images begin with, see `read_noise`. With ``save_latents`` also ``latents.safetensors`` with
    ``noise`` and ``latents``, float32 (N, C, H, W): the same noise in diffusers gives the same latents
    (docs/sampling.md).

    Raises:
        ConfigError: ``noise`` is none of these images.
    """
    rows = [{"prompt": own} if isinstance(own, str) else dict(own) for own in prompts for _ in range(num_images)]
    groups = tuple(group for group in range(len(prompts)) for _ in range(num_images))
    texts, ids = tuple(row["prompt"] for row in rows), tuple(range(len(rows)))
    batch, size = model.arranged(PromptBatch(texts, groups, ids, tuple(rows))), model.config.model
    directory = open_directory(model_of(model.path, model.config))
    pixels = size.height, size.width
    given = None if noise is None else read_noise(noise, len(rows), pixels, directory)
    names, how = [f"{i:04d}.png" for i in ids], model.made_with | ({} if noise is None else {"noise": str(noise)})
    index = [
        {"file": names[i], "prompt": texts[i], "sample_id": i, **how, **_beside(row)} for i, row in enumerate(rows)
    ]
    latents = []
    with model.opened(batch) as (policy, _, plan), filled(out_dir) as draft:
        for pictures, trajectories in roll(policy, batch, plan, model.config, model.seed, progress, given):
            left = len(rows) - sum(map(len, latents)) - len(pictures)
            save_images(draft, [names[i] for i in pictures.batch.sample_ids], pictures.images, to_come=left)
            latents.append(trajectories.final_NCHW)
        write_text(draft / "index.json", json.dumps(index, indent=1) + "\n")
        if save_latents:
            begun = SampleNoise(model.seed, ids, directory.latent_shape(*pixels)).draw() if given is None else given
            order = torch.tensor(batch.sample_ids).argsort()
            save_tensors({"noise": begun, "latents": Rows(latents)[order]}, draft / "latents.safetensors")
    return [out_dir / name for name in names]


def _beside(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row has beside its prompt, under a key of its own; what names a picture there is not this one."""
    own = {key: value for key, value in row.items() if key not in ("prompt", *_NAMES_A_PICTURE)}
    negative = {"negative_prompt": own["negative_prompt"]} if own.get("negative_prompt") is not None else {}
    return negative | ({"metadata": own} if own else {})


def save_images(folder: Path, names: Sequence[str], images: Tensor, to_come: int = 0) -> None:
    """Write PNG files of uint8 (N, H, W, 3), before as many more as are ``to_come``.

    Raise DiskError, which takes those to come to be as large as the one that failed.
    """
    from PIL import Image

    left = len(names) + to_come
    for count, (name, image) in enumerate(zip(names, images, strict=True)):
        png = io.BytesIO()
        Image.fromarray(image.numpy()).save(png, format="PNG")
        with writing(f"image {folder.parent / name}", folder.parent, on_disk([png.tell()] * (left - count))):
            (folder / name).write_bytes(png.getvalue())
