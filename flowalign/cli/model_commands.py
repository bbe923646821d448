"""Commands on a checkpoint or a run: ``evaluate``, ``sample``, ``export``, ``merge``, ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.examples import examples
from flowalign.cli.measure import Clip, Extractor, Reference
from flowalign.cli.options import (
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
    "flowalign evaluate runs/mine --weights ema",
    "flowalign evaluate aligned --prompts prompts.jsonl --num-samples 600 --out evaluated",
)
@takes_sampling
def evaluate(
    checkpoint: Source,
    sampling: Sampling,
    num_samples: NumSamples = None,
    prompts: Annotated[str | None, typer.Option(help="shapes:train, shapes:eval or a GenEval jsonl file")] = None,
    seed: Annotated[int | None, typer.Option(min=0, callback=storable)] = None,
    weights: Weights = None,
    suite: Annotated[Suite | None, typer.Option(help="geneval: official verdicts, 4 images a prompt")] = None,
    detector: Annotated[str | None, typer.Option(help="of the suite: a name or its options as JSON")] = None,
    reference: Reference = None,
    extractor: Extractor = SHIPPED_CLIP,
    clip: Clip = SHIPPED_CLIP,
    out: Annotated[Path | None, typer.Option(help="directory for images, results.jsonl and metrics.json")] = None,
    as_json: Json = False,
) -> None:
    """Sample the evaluation prompts and score them, as the run itself does."""
    from flowalign.cli.runs import say_evaluation, write_evaluation
    from flowalign.intake.suite import asked_evaluation
    from flowalign.record.outputs import check_out

    if out is not None:
        check_out("--out", out)
    own = sampling.config_of(checkpoint)
    own, num_samples = asked_evaluation(own, suite is not None, detector, prompts, num_samples)
    from flowalign.measure.evaluate import evaluate_checkpoint

    console = make_console(as_json)
    against = reference and reference_metrics(reference, num_samples, extractor, clip, own.device, console.print)
    source = sampling.model_of(checkpoint, own, weights=weights, seed=seed)
    shown = progress(console, "samples")
    result = evaluate_checkpoint(source, num_samples=num_samples, prompts=prompts, progress=shown)
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
    "flowalign sample shapes --prompt 'a photo of a red star'",
    "flowalign sample aligned --prompt 'a red star' --prompt 'two hearts' --seed 7 --latents --out drawn",
)
@takes_sampling
def sample(
    checkpoint: Source,
    prompt: Annotated[list[str], typer.Option(help="may be given several times")],
    sampling: Sampling,
    num_images: Annotated[int, typer.Option(min=1, max=100_000, help="images a prompt")] = 1,
    seed: Seed = 0,
    weights: Weights = None,
    latents: Annotated[bool, typer.Option("--latents", help="also save noise and final latents")] = False,
    out: Path = Path("samples"),
    as_json: Json = False,
) -> None:
    """Draw images from a checkpoint."""
    from flowalign.record.outputs import check_out

    check_out("--out", out)
    for text in prompt:
        check_text("--prompt", text)
    own = sampling.config_of(checkpoint)
    from flowalign.measure.evaluated import made_with
    from flowalign.models.textlength import prompt_note
    from flowalign.samples.sampled import sample_checkpoint

    console = make_console(as_json)
    source = sampling.model_of(checkpoint, own, weights=weights, seed=seed)
    shown = progress(console, "images")
    files = sample_checkpoint(source, prompt, out, num_images=num_images, save_latents=latents, progress=shown)
    if note := prompt_note(own.model, prompt):
        plain(console)(f"of the prompts {note}")
    plain(console)(f"{len(files)} image{'s' * (len(files) > 1)} in {out}; {made_with(source.made_with)}")
    print_json(as_json, {"out": str(out), "files": [str(file) for file in files]})


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
