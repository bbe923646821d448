"""Commands on a checkpoint or a run: ``evaluate``, ``sample``, ``export``, ``merge``, ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flowalign.cli.examples import examples
from flowalign.cli.measure import Clip, Extractor, Reference
from flowalign.cli.options import (
    PROMPTS_HELP,
    SOURCE,
    Changes,
    Json,
    Kind,
    Model,
    NumSamples,
    Overwrite,
    Seed,
    ShardSize,
    Source,
    Suite,
    Weights,
    check_text,
    finite,
    model_directory,
    storable,
)
from flowalign.cli.sampling import Sampling, takes_sampling
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import plain, print_json, progress
from flowalign.making.measuring import SHIPPED_CLIP, reference_metrics


@examples(
    "flowalign evaluate runs/quickstart --prompts mine.jsonl --num-images 4 --scorer pickscore",
    "flowalign evaluate --folder outputs --suite geneval --out scores",
)
@takes_sampling
def evaluate(
    sampling: Sampling,
    checkpoint: Annotated[Path | None, SOURCE] = None,
    overrides: Changes = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="score the pictures that are there, such as in GenEval's layout")
    ] = None,
    num_samples: NumSamples = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="images of each prompt, in place of --num-samples")
    ] = None,
    prompts: Annotated[str | None, typer.Option(metavar="SOURCE", help=PROMPTS_HELP)] = None,
    seed: Annotated[int | None, typer.Option(min=0, callback=storable)] = None,
    weights: Weights = None,
    scorer: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help='another judge: clip, file.py:function, {"spec": …, "options": …}'),
    ] = None,
    suite: Annotated[Suite | None, typer.Option(help="geneval: official verdicts, 4 images a prompt")] = None,
    detector: Annotated[str | None, typer.Option(help="of the suite: a name or its options as JSON")] = None,
    reference: Reference = None,
    extractor: Extractor = SHIPPED_CLIP,
    clip: Clip = SHIPPED_CLIP,
    out: Annotated[Path | None, typer.Option(help="directory for images, results.jsonl and metrics.json")] = None,
    as_json: Json = False,
) -> None:
    """Sample the evaluation prompts and score them, as the run itself does; or score a folder of pictures."""
    from flowalign.cli.runs import say_evaluation, write_evaluation
    from flowalign.config.section import ConfigError
    from flowalign.intake.given_prompts import given_prompts, named
    from flowalign.intake.suite import asked_evaluation, folder_judges
    from flowalign.record.outputs import check_out

    if out is not None:
        check_out("--out", out)
    console = make_console(as_json)
    if folder is not None:
        given = {"checkpoint": checkpoint, "num-samples": num_samples, "num-images": num_images, "seed": seed}
        given |= {"weights": weights, "reference": reference} | sampling.given
        if wrong := [name for name, value in given.items() if value is not None and name != "device"]:
            raise ConfigError("--folder", f"scores pictures that are there; leave out {' and '.join(wrong)}")
        from flowalign.measure.folder import evaluate_folder, is_geneval

        judges = folder_judges(suite is not None, detector, scorer, is_geneval(folder))
        device, shown = sampling.checked_device or "cpu", progress(console, "pictures")
        source = None if prompts is None else given_prompts(prompts)
        if isinstance(source, str) and Path(source).is_file():  # which may be one that a command wrote beside pictures
            source = Path(source)
        with named("--prompts"):
            result = evaluate_folder(folder, judges, prompts=source, device=device, progress=shown)
    elif checkpoint is None:
        raise ConfigError("CHECKPOINT", "is missing; name a run, a checkpoint or a pipeline, or give --folder DIR")
    else:
        own, taken = sampling.config_of(checkpoint, overrides), None if prompts is None else given_prompts(prompts)
        own, num_samples = asked_evaluation(
            own, suite is not None, detector, taken, num_samples, scorer=scorer, num_images=num_images
        )
        from flowalign.measure.evaluate import evaluate_checkpoint

        against = reference and reference_metrics(reference, num_samples, extractor, clip, own.device, console.print)
        model = sampling.model_of(checkpoint, own, weights=weights, seed=seed)
        shown = progress(console, "samples")
        kept = out is not None or reference is not None
        result = evaluate_checkpoint(model, num_samples=num_samples, prompts=taken, progress=shown, keep_images=kept)
        if against:
            result.metrics.update(against(result))
    say_evaluation(console, result)
    try:
        if out is not None:
            write_evaluation(result, out)
            console.print(f"written to {out}")
    finally:  # what took so long to find is not lost with a disk
        print_json(as_json, result.summary)


@examples(
    "flowalign sample shapes --prompt 'a photo of a red circle' --num-images 4",
    "flowalign sample runs/quickstart --prompts mine.jsonl --latents noise.safetensors --device cuda --batch 4",
)
@takes_sampling
def sample(
    checkpoint: Source,
    sampling: Sampling,
    overrides: Changes = None,
    prompt: Annotated[list[str] | None, typer.Option(help="may be given several times")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="SOURCE", help=PROMPTS_HELP)] = None,
    num_images: Annotated[int, typer.Option(min=1, max=100_000, help="images a prompt")] = 1,
    seed: Seed = 0,
    weights: Weights = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="noise that the images begin with, of --save-latents or of a diffusers script"
        ),
    ] = None,
    save_latents: Annotated[bool, typer.Option("--save-latents", help="save noise and final latents too")] = False,
    out: Path = Path("samples"),
    as_json: Json = False,
) -> None:
    """Draw images from a checkpoint."""
    from flowalign.record.outputs import check_out

    check_out("--out", out)
    rows = _rows(prompt or [], prompts)
    own = sampling.config_of(checkpoint, overrides)
    from flowalign.measure.evaluated import made_with
    from flowalign.models.textlength import prompt_note
    from flowalign.samples.sampled import note_of_pipeline, sample_checkpoint

    console = make_console(as_json)
    source = sampling.model_of(checkpoint, own, weights=weights, seed=seed)
    shown = progress(console, "images")
    files = sample_checkpoint(
        source, rows, out, num_images=num_images, noise=latents, save_latents=save_latents, progress=shown
    )
    if note := prompt_note(own.model, [row["prompt"] for row in rows]):
        plain(console)(f"of the prompts {note}")
    if note := note_of_pipeline(source, sampling.chosen(overrides)):
        plain(console)(f"note: {note}")
    how = source.made_with if latents is None else {**source.made_with, "noise": latents}
    plain(console)(f"{len(files)} image{'s' * (len(files) > 1)} in {out}; {made_with(how)}")
    print_json(as_json, {"out": str(out), "files": [str(file) for file in files]})


def _rows(texts: Sequence[str], source: str | None) -> list[dict[str, Any]]:
    """Return the prompts of a command line, and after them those of a file. Raise ConfigError where there is none."""
    for text in texts:
        check_text("--prompt", text)
    from flowalign.config.section import ConfigError
    from flowalign.data.promptsets import load_prompts
    from flowalign.intake.given_prompts import given_prompts, named

    if not texts and source is None:
        raise ConfigError("--prompt", 'is missing; write --prompt "a red dog", or --prompts FILE')
    with named("--prompts"):
        return [{"prompt": text} for text in texts] + ([] if source is None else load_prompts(given_prompts(source)))


@examples(
    "flowalign export runs/mine --to aligned",
    "flowalign export runs/mine/checkpoints/step_000080 --to lora --as lora",
)
def export(
    run: Annotated[Path, typer.Argument(help="a run directory or one of its checkpoints")],
    to: Annotated[Path, typer.Option("--to", help="directory to write")],
    kind: Kind = "pipeline",
    weights: Weights = None,
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Write files that diffusers and PEFT load as they are, reloaded and compared before it says done."""
    from dataclasses import asdict

    from flowalign.intake.recorded import config_of
    from flowalign.record.outputs import check_place

    check_place(to, overwrite)
    own = config_of(run, None, model)
    from flowalign.export import export as write_export

    result = write_export(run, to, kind=kind, weights=weights, config=own, overwrite=overwrite, shard_size=shard_size)
    say = plain(make_console(as_json))
    say(result.compared)
    if result.on_other_base is not None:
        say(result.on_other_base)
    say(f"exported to {to} ({result.kind}, weights: {result.weights}, iteration {result.iteration})")
    print_json(as_json, asdict(result))


@examples(
    "flowalign merge runs/one runs/other --to merged",
    "flowalign merge runs/one shapes --to merged --weight 0.7 --weight 0.3",
)
def merge(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="CHECKPOINT...", help="runs, checkpoints, pipelines or shapes", parser=model_directory),
    ],
    to: Annotated[Path, typer.Option("--to", help="directory to write")],
    weight: Annotated[
        list[float] | None, typer.Option(callback=finite, help="of each model, in their order; default: all alike")
    ] = None,
    weights: Weights = None,
    overwrite: Overwrite = False,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Average models of one architecture into a pipeline directory, from which a run may start."""
    from flowalign.record.outputs import check_place

    check_place(to, overwrite)
    from flowalign.making.merge import merge as write_merge

    record = write_merge(sources, to, weights=weight or (), which=weights, model=model, overwrite=overwrite)
    say = plain(make_console(as_json))
    say("compared every tensor of the reloaded files with the average: equal")
    say(f"merged {len(sources)} models into {to}")
    print_json(as_json, {**record, "path": str(to)})


@examples(
    "flowalign report runs/mine",
    "flowalign report runs/mine/set_aside/1",
)
def report(run: Annotated[Path, typer.Argument(help="a run directory, finished or not")]) -> None:
    """Write report.html, one self-contained file: curves, tables, images before and after."""
    from flowalign.cli.runs import report_of

    make_console().print(f"report: {report_of(run)}")
