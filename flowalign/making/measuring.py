"""Measures a folder of images: references, extractors, and what a reader of the numbers must know."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from flowalign.measure.evaluate import EvaluationResult
    from flowalign.measure.features import FeatureExtractor
    from flowalign.measure.imageset import Pictures
    from rewards.models.openclip import OpenClip

NEAREST_SAID = 3  # of the images that are most like a training image
FEW = 100  # images of which KID tells little
METRICS = ("fid", "kid", "precision", "recall", "clip")
TRUE_SCENES = "shapes:eval"
SHIPPED_CLIP = "shapes:open_clip"
Show = Callable[[str], Callable[[int, int], None]]


@dataclass
class Measured:
    """The findings about a folder: a value a metric, what was left out of which set, and notes for its reader."""

    metrics: dict[str, float]
    content: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    left_out: Mapping[str, Pictures] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """The set that a folder is compared with, and the models by which.

    ``metrics`` is a list of `METRICS` with commas; None takes all that can be had. ``prompts`` are by default the
    folder's own; ``num_reference`` true scenes, as many as images. ``memorised`` are training images: a folder, or a
    bank that ``model`` decodes; ``sheet`` is where the most similar pairs are drawn.
    """

    reference: str | None = None
    metrics: str | None = None
    prompts: Path | None = None
    extractor: str = SHIPPED_CLIP
    clip: str = SHIPPED_CLIP
    num_reference: int | None = None
    seed: int = 0
    device: str = "cpu"
    memorised: Path | None = None
    model: Path | None = None
    sheet: Path | None = None


def measure_folder(generated: Path, options: Options, show: Show) -> Measured:
    """Compare the images of ``generated`` with a reference, and with their prompts.

    ``show("images")`` answers with what is told how many of how many are done.

    Raises:
        ConfigError: names the option that asks for what cannot be had.
    """
    from flowalign.config.section import ConfigError
    from flowalign.engine.device import check_device
    from flowalign.measure.imagefolder import image_files, own_prompts, prompt_rows
    from flowalign.measure.imageset import folder_of
    from flowalign.record.outputs import check_file

    check_device("--device", options.device)
    for option, value in (("--model", options.model), ("--sheet", options.sheet)):
        if value is not None and options.memorised is None:
            raise ConfigError(option, "is of --memorised TRAINING; give that too, or leave it out")
    if options.sheet is not None:
        check_file("--sheet", options.sheet)
    files = image_files(generated, "GENERATED")
    source, reference = options.prompts or own_prompts(generated), options.reference
    wanted = _wanted(options.metrics, reference, source, bare=options.memorised is not None)
    texts = [row["prompt"] for row in prompt_rows(files, source)] if source and "clip" in wanted else None
    pictures = folder_of(files, "GENERATED")
    values: dict[str, float] = {}
    content: dict[str, Any] = {"generated": str(generated), "metrics": values}
    notes, left_out = list[str](), {"generated": pictures}
    if reference is not None and wanted != ["clip"]:
        other = reference_of(reference, options.num_reference or pictures.count, options.seed)
        left_out["reference"] = other
        distances, notes = _distances(pictures, other, wanted, options, show)
        values |= distances
        content |= {"reference": reference, "reference_images": other.count, "extractor": options.extractor}
    if texts is not None:
        scores = _clip_scores(pictures, texts, clip_of(options.clip, options.device))
        values["clip"] = float(scores.mean())
        names = [pictures.names[place] for place in pictures.kept]
        content |= {"clip": options.clip, "files": names, "clip_scores": scores.tolist()}
    if options.memorised is not None:
        known, rows, training = _memorised(generated, pictures, options, show)
        left_out["training"] = training
        content |= {"memorised": str(options.memorised), "nearest": rows}
        wanted, values = [*wanted, *known], {**values, **known}
        content["metrics"] = values
        notes = [*notes, *map(_said_nearest, rows[:NEAREST_SAID])]
    content |= {"images": pictures.count, "left_out": {key: images.reasons for key, images in left_out.items()}}
    return Measured({name: values[name] for name in wanted}, {**content, "notes": notes}, notes, left_out)


def _memorised(
    generated: Path, pictures: Pictures, options: Options, show: Show
) -> tuple[dict[str, float], list[dict[str, Any]], Pictures]:
    """Return numbers, the nearest training image of each generated one, and the training images."""
    from flowalign.config.section import ConfigError
    from flowalign.making.memorised import found_of, training_of, write_sheet

    assert options.memorised is not None
    training = training_of(Path(os.path.expanduser(options.memorised)), options.model)
    model = extractor_of(options.extractor, options.device)
    features = _features(model, pictures, show("images")), _features(model, training.pictures, show("training images"))
    if len(features[1]) < 2:
        raise ConfigError("--memorised", f"{options.memorised} holds one image; nearness is told from at least two")
    rows, values = found_of(pictures, training, features)
    if options.sheet is not None:
        write_sheet(options.sheet, generated, training, rows)
    return values, rows, training.pictures


def _said_nearest(row: Mapping[str, Any]) -> str:
    of = f" ({row['caption']})" if "caption" in row else ""
    nearer = "" if row["authentic"] else ", nearer to it than any other training image is"
    return f"{row['file']} is most like {row['nearest']}{of}, cosine {row['cosine']:.3f}{nearer}"


def _distances(
    pictures: Pictures, other: Pictures, wanted: list[str], options: Options, show: Show
) -> tuple[dict[str, float], list[str]]:
    """Return the metrics that compare two sets, and notes that a reader of them must know."""
    from flowalign.measure.distances import compare

    _check_counts(pictures.count, other.count, wanted)
    model = extractor_of(options.extractor, options.device)
    found = [_features(model, images, show("images")) for images in (pictures, other)]
    _check_counts(pictures.count, other.count, wanted)
    return compare(*found, metrics=wanted), notes_of(min(map(len, found)), found[0].shape[1], wanted)


def reference_metrics(
    reference: str, count: int, extractor: str, clip: str, device: str, say: Callable[[str], None]
) -> Callable[[EvaluationResult], dict[str, float]]:
    """Open what ``flowalign evaluate`` compares ``count`` samples with; all that can be wrong is found before they are
    made. Returns what measures them.

    Raises:
        ConfigError: the reference, the extractor or the CLIP model is not there, or there are too few images.
    """
    from flowalign.measure.evaluate import image_metrics

    other = reference_of(reference, count)
    _check_counts(count, other.count, ["precision", "recall"])
    model, scorer = extractor_of(extractor, device), clip_of(clip, device)
    features = _features(model, other, lambda done, total: None)
    _check_counts(count, len(features), ["precision", "recall"])
    notes = notes_of(min(count, other.count), features.shape[1], ["fid"])
    for line in [*other.lines(), *map("note: {}".format, notes)]:
        say(line)
    return lambda result: image_metrics(result, features, model, scorer)


def reference_of(reference: str, count: int, seed: int = 0) -> Pictures:
    """Return the images of a folder, all of them, or ``count`` true scenes of the evaluation prompts."""
    from flowalign.config.section import ConfigError
    from flowalign.measure.imagefolder import image_files
    from flowalign.measure.imageset import Pictures, folder_of

    if reference == TRUE_SCENES:
        from flowalign.measure.features import batches_of

        images = true_scenes(count, seed)
        return Pictures(reference, [str(place) for place in range(count)], partial(batches_of, images))
    if reference.startswith("shapes:"):
        raise ConfigError("--reference", f"no {reference!r}; write {TRUE_SCENES} or a folder")
    return folder_of(image_files(Path(os.path.expanduser(reference)), "--reference"), "--reference")


def true_scenes(count: int, seed: int) -> np.ndarray:
    """Draw what the first ``count`` evaluation prompts ask for, uint8 (count, 64, 64, 3), a function of the seed."""
    import numpy as np

    from flowalign.shapes.prompts import evaluation_set, scene
    from flowalign.shapes.render import render

    rng = np.random.default_rng(seed)
    return np.stack([render(scene(row, rng), rng) for row in evaluation_set(count)])


def extractor_of(text: str, device: str) -> FeatureExtractor:
    """Parse ``inception``, ``file.py:function``, an open_clip directory, or ``{"type": …}``."""
    from flowalign.measure.features import resolve_extractor

    options = _options(text, "--extractor")
    if "type" not in options:
        own = text == "inception" or (":" in text and not text.startswith("shapes:"))
        options = {"type": text} if own else {"type": "open_clip", **options}
    return resolve_extractor(options, device=device, base_dir=Path.cwd())


def clip_of(text: str, device: str) -> OpenClip:
    """Parse an open_clip directory, or ``{"model": …, "checkpoint": …}``."""
    from flowalign.config.section import ConfigError
    from rewards.models.openclip import OpenClip

    try:
        model = OpenClip("--clip", **_options(text, "--clip"))
    except TypeError as error:
        said = str(error).removeprefix("OpenClip.__init__() ")
        raise ConfigError("--clip", f"{said}; write model and checkpoint, or path") from error
    model.setup(device)
    return model


def notes_of(count: int, width: int, metrics: list[str]) -> list[str]:
    """Return the notes that a reader of the numbers must know; ``count`` is the size of the smaller set."""
    from flowalign.measure.distances import rank_deficient

    notes = list[str]()
    if "fid" in metrics and rank_deficient(count, width):
        notes.append(
            f"fid: {count} images for {width} features leave the covariance rank-deficient and the distance too large; "
            "compare it only between sets of the same size, or take kid"
        )
    if "kid" in metrics and count < FEW:
        notes.append(
            f"kid: of {count} images it is right on average and scatters widely, below 0 as well; compare it with more"
        )
    return notes


def _wanted(metrics: str | None, reference: str | None, prompts: Path | None, bare: bool) -> list[str]:
    """Return the metrics in the order of `METRICS`; without ``metrics`` all that can be measured, which may be none
    where something else is: ``bare``."""
    from flowalign.config.section import ConfigError, nearest

    possible = [m for m in METRICS if (prompts if m == "clip" else reference) is not None]
    if metrics is None and not possible and not bare:
        raise ConfigError("--reference", "is missing, and so are prompts; give one of the two")
    asked = possible if metrics is None else [name.strip() for name in metrics.split(",")]
    for name in asked:
        if name not in METRICS:
            raise ConfigError("--metrics", f"no metric {name!r}; {nearest(name, METRICS)}")
        if name not in possible:
            missing, what = ("--prompts", "jsonl or text file") if name == "clip" else ("--reference", "folder")
            raise ConfigError(missing, f"is missing, and {name} needs it; give a {what}")
    return [name for name in METRICS if name in asked]


def _check_counts(generated: int, reference: int, metrics: list[str]) -> None:
    from flowalign.config.section import ConfigError
    from flowalign.measure.distances import NEIGHBOURS

    fewest = NEIGHBOURS + 1 if {"precision", "recall"} & set(metrics) else 2
    if min(generated, reference) < fewest:
        counts = f"{generated} generated images and {reference} of the reference"
        raise ConfigError("--reference", f"{counts}; {', '.join(metrics)} need at least {fewest} of each")


def _options(text: str, key: str) -> dict[str, Any]:
    """Parse JSON as it is, anything else as a ``path``; shipped names and files become absolute paths."""
    from flowalign.config.section import ConfigError
    from flowalign.config.sections import RewardConfig
    from flowalign.intake.paths import resolve_reward

    try:
        options = json.loads(text) if text.lstrip().startswith("{") else {"path": text}
    except ValueError as error:
        raise ConfigError(key, f'is not JSON ({error}); write {{"model": …, "checkpoint": …}}') from error
    return resolve_reward(RewardConfig(spec="clip", options=options), Path.cwd(), key).options


def _features(model: FeatureExtractor, images: Pictures, show: Callable[[int, int], None]) -> np.ndarray:
    """Return a row for each image that could be read, in their order."""
    from flowalign.measure.features import extract

    told = 0

    def done(count: int) -> None:
        nonlocal told
        told += count
        show(told, images.count)

    return extract(model, images.batches(), len(images.names), done)[images.kept]


def _clip_scores(images: Pictures, prompts: list[str], clip: OpenClip) -> np.ndarray:
    """Return a score for each image that could be read, in their order."""
    import numpy as np

    from flowalign.measure.distances import clip_scores

    scores = np.empty(len(images.names))
    for places, pictures in images.batches():
        scores[list(places)] = clip_scores(pictures, [prompts[i] for i in places], clip)
    return scores[images.kept]
