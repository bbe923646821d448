"""``flowalign measure``: FID, KID, precision, recall and CLIP score of a folder of images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowalign.cli.options import Json
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import print_json, print_rows, progress

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from flowalign.cli.imageset import Pictures
    from flowalign.evaluate import EvaluationResult
    from flowalign.features import FeatureExtractor
    from rewards.openclip import OpenClip

FEW = 100  # images of which KID tells little
METRICS = ("fid", "kid", "precision", "recall", "clip")
TRUE_SCENES = "shapes:eval"
SHIPPED_CLIP = "shapes:open_clip"

Reference = Annotated[str | None, typer.Option(help="a folder of images, or shapes:eval: true scenes, freshly drawn")]
Extractor = Annotated[
    str, typer.Option(help="features: an open_clip directory, inception, file.py:function, or options as JSON")
]
Clip = Annotated[str, typer.Option(help="of the CLIP score: an open_clip directory, or options as JSON")]


def measure(
    generated: Annotated[Path, typer.Argument(help="a folder of image files")],
    reference: Reference = None,
    metrics: Annotated[str | None, typer.Option(help=f"of {','.join(METRICS)}; default: all that can be had")] = None,
    prompts: Annotated[Path | None, typer.Option(help="jsonl or text, one an image; default: the folder's")] = None,
    extractor: Extractor = SHIPPED_CLIP,
    clip: Clip = SHIPPED_CLIP,
    num_reference: Annotated[int | None, typer.Option(min=1, help="true scenes; default: as many as images")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the true scenes")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    as_json: Json = False,
) -> None:
    """Compare a folder of images with a reference, and with its prompts: FID, KID, precision, recall, CLIP score."""
    from flowalign.cli.imagefolder import image_files, own_prompts, prompt_rows
    from flowalign.cli.imageset import folder_of
    from flowalign.configcheck import check_device

    check_device("--device", device)
    files = image_files(generated, "GENERATED")
    source = prompts or own_prompts(generated)
    wanted = _wanted(metrics, reference, source)
    texts = [row["prompt"] for row in prompt_rows(files, source)] if source and "clip" in wanted else None
    console, pictures = make_console(as_json), folder_of(files, "GENERATED")
    values: dict[str, float] = {}
    content: dict[str, Any] = {"generated": str(generated), "metrics": values}
    notes, left_out = list[str](), {"generated": pictures}
    if reference is not None and wanted != ["clip"]:
        from flowalign.imagemetrics import compare

        other = left_out["reference"] = reference_of(reference, num_reference or pictures.count, seed)
        _check_counts(pictures.count, other.count, wanted)
        model = extractor_of(extractor, device)
        found = [_features(model, images, progress(console, "images")) for images in (pictures, other)]
        _check_counts(pictures.count, other.count, wanted)
        values |= compare(*found, metrics=wanted)
        content |= {"reference": reference, "reference_images": other.count, "extractor": extractor}
        notes = notes_of(min(map(len, found)), found[0].shape[1], wanted)
    if texts is not None:
        scores = _clip_scores(pictures, texts, clip_of(clip, device))
        values["clip"] = float(scores.mean())
        names = [pictures.names[place] for place in pictures.kept]
        content |= {"clip": clip, "files": names, "clip_scores": scores.tolist()}
    print_rows(console, [(name, f"{values[name]:.4f}") for name in wanted])
    say_notes(console, notes)
    for images in left_out.values():
        say_left_out(console, images)
    content |= {"images": pictures.count, "left_out": {key: images.reasons for key, images in left_out.items()}}
    print_json(as_json, {**content, "notes": notes})


def reference_metrics(
    reference: str, count: int, extractor: str, clip: str, device: str, console: Console
) -> Callable[[EvaluationResult], dict[str, float]]:
    """What ``flowalign evaluate`` adds for ``count`` samples; all that can be wrong is found before they are made."""
    from flowalign.evaluate import image_metrics

    other = reference_of(reference, count)
    _check_counts(count, other.count, ["precision", "recall"])
    model, scorer = extractor_of(extractor, device), clip_of(clip, device)
    features = _features(model, other, lambda done, total: None)
    _check_counts(count, len(features), ["precision", "recall"])
    say_left_out(console, other)
    say_notes(console, notes_of(min(count, other.count), features.shape[1], ["fid"]))
    return lambda result: image_metrics(result, features, model, scorer)


def reference_of(reference: str, count: int, seed: int = 0) -> Pictures:
    """The images of a folder, all of them, or ``count`` true scenes of the evaluation prompts."""
    from flowalign.cli.imagefolder import image_files
    from flowalign.cli.imageset import Pictures, folder_of
    from flowalign.config import ConfigError

    if reference == TRUE_SCENES:
        from flowalign.features import batches_of

        images = true_scenes(count, seed)
        return Pictures(reference, [str(place) for place in range(count)], partial(batches_of, images))
    if reference.startswith("shapes:"):
        raise ConfigError("--reference", f"no {reference!r}; write {TRUE_SCENES} or a folder")
    return folder_of(image_files(Path(os.path.expanduser(reference)), "--reference"), "--reference")


def true_scenes(count: int, seed: int) -> np.ndarray:
    """What the first ``count`` evaluation prompts ask for, uint8 (count, 64, 64, 3), a function of the seed."""
    import numpy as np

    from flowalign.shapes.prompts import evaluation_set, scene
    from flowalign.shapes.render import render

    rng = np.random.default_rng(seed)
    return np.stack([render(scene(row, rng), rng) for row in evaluation_set(count)])


def extractor_of(text: str, device: str) -> FeatureExtractor:
    """``inception``, ``file.py:function``, an open_clip directory, or ``{"type": …}``."""
    from flowalign.features import resolve_extractor

    options = _options(text, "--extractor")
    if "type" not in options:
        own = text == "inception" or (":" in text and not text.startswith("shapes:"))
        options = {"type": text} if own else {"type": "open_clip", **options}
    return resolve_extractor(options, device=device, base_dir=Path.cwd())


def clip_of(text: str, device: str) -> OpenClip:
    """An open_clip directory, or ``{"model": …, "checkpoint": …}``."""
    from flowalign.config import ConfigError
    from rewards.openclip import OpenClip

    try:
        model = OpenClip("--clip", **_options(text, "--clip"))
    except TypeError as error:
        said = str(error).removeprefix("OpenClip.__init__() ")
        raise ConfigError("--clip", f"{said}; write model and checkpoint, or path") from error
    model.setup(device)
    return model


def notes_of(count: int, width: int, metrics: list[str]) -> list[str]:
    """What a reader of the numbers must know; ``count`` is the size of the smaller set."""
    from flowalign.imagemetrics import rank_deficient

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


def say_notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(f"note: {note}")


def say_left_out(console: Console, images: Pictures) -> None:
    for line in images.lines():
        console.print(line)


def _wanted(metrics: str | None, reference: str | None, prompts: Path | None) -> list[str]:
    """The metrics in the order of `METRICS`; without ``metrics`` all that can be measured."""
    from flowalign.config import ConfigError
    from flowalign.configcheck import nearest

    possible = [m for m in METRICS if (prompts if m == "clip" else reference) is not None]
    if metrics is None and not possible:
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
    from flowalign.config import ConfigError
    from flowalign.imagemetrics import NEIGHBOURS

    fewest = NEIGHBOURS + 1 if {"precision", "recall"} & set(metrics) else 2
    if min(generated, reference) < fewest:
        counts = f"{generated} generated images and {reference} of the reference"
        raise ConfigError("--reference", f"{counts}; {', '.join(metrics)} need at least {fewest} of each")


def _options(text: str, key: str) -> dict[str, Any]:
    """JSON as it is, anything else as a ``path``; shipped names and files as absolute paths."""
    from flowalign.config import ConfigError, RewardConfig
    from flowalign.configpaths import resolve_reward

    try:
        options = json.loads(text) if text.lstrip().startswith("{") else {"path": text}
    except ValueError as error:
        raise ConfigError(key, f'is not JSON ({error}); write {{"model": …, "checkpoint": …}}') from error
    return resolve_reward(RewardConfig(spec="clip", options=options), Path.cwd(), key).options


def _features(model: FeatureExtractor, images: Pictures, show: Callable[[int, int], None]) -> np.ndarray:
    """A row for each image that could be read, in their order."""
    from flowalign.features import extract

    told = 0

    def done(count: int) -> None:
        nonlocal told
        told += count
        show(told, images.count)

    return extract(model, images.batches(), len(images.names), done)[images.kept]


def _clip_scores(images: Pictures, prompts: list[str], clip: OpenClip) -> np.ndarray:
    """A score for each image that could be read, in their order."""
    import numpy as np

    from flowalign.imagemetrics import clip_scores

    scores = np.empty(len(images.names))
    for places, pictures in images.batches():
        scores[list(places)] = clip_scores(pictures, [prompts[i] for i in places], clip)
    return scores[images.kept]
