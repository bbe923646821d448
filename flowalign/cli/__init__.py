"""``flowalign <command>``. Heavy modules are imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.exits import Commands
from flowalign.cli.making_commands import calibrate_cache, make_pairs, make_preferences
from flowalign.cli.measure import Clip, Extractor, Reference, measure
from flowalign.cli.options import (
    AcceptChanged,
    ConfigFile,
    Guidance,
    Json,
    Kind,
    Like,
    Model,
    NumSamples,
    Overrides,
    Overwrite,
    Seed,
    Solver,
    Source,
    Steps,
    Suite,
    Weights,
    check_text,
    finite,
    model_directory,
    storable,
)
from flowalign.cli.precompute_command import precompute
from flowalign.cli.run_commands import align, distill, pretrain, stop_run
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import plain, print_json, print_rows, progress
from flowalign.making.measuring import SHIPPED_CLIP, reference_metrics
from rewards.printable import printable

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Aligns flow-matching image models with reinforcement learning on Ray clusters.",
)


app.command()(align)
app.command()(pretrain)
app.command()(distill)
app.command("stop")(stop_run)
app.command()(precompute)
app.command("make-pairs")(make_pairs)
app.command("make-preferences")(make_preferences)
app.command("calibrate-cache")(calibrate_cache)


@app.command()
def evaluate(
    checkpoint: Source,
    num_samples: NumSamples = None,
    num_steps: Steps = None,
    guidance_scale: Guidance = None,
    solver: Solver = None,
    prompts: Annotated[str | None, typer.Option(help="shapes:train, shapes:eval or a GenEval jsonl file")] = None,
    seed: Annotated[int | None, typer.Option(min=0, callback=storable)] = None,
    weights: Annotated[str | None, typer.Option(metavar="NAME", help="default: as the run evaluates")] = None,
    suite: Annotated[Suite | None, typer.Option(help="geneval: official verdicts, 4 images a prompt")] = None,
    detector: Annotated[str | None, typer.Option(help="of the suite: a name or its options as JSON")] = None,
    reference: Reference = None,
    extractor: Extractor = SHIPPED_CLIP,
    clip: Clip = SHIPPED_CLIP,
    out: Annotated[Path | None, typer.Option(help="directory for images, results.jsonl and metrics.json")] = None,
    config: Like = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Sample the evaluation prompts and score them, as the run itself does."""
    from flowalign.cli.runs import say_evaluation, write_evaluation
    from flowalign.intake.recorded import config_of
    from flowalign.record.outputs import check_out

    if out is not None:
        check_out("--out", out)
    own = config_of(checkpoint, config, model)
    if suite is not None or detector is not None:
        from flowalign.intake.suite import geneval_suite

        own, num_samples = geneval_suite(own, detector, prompts, num_samples)
    from flowalign.intake.check_prompts import check_judged_tasks, check_prompts
    from flowalign.intake.file import DEFAULT_JUDGE
    from flowalign.measure.evaluate import evaluate_checkpoint, evaluation_rewards

    key, source = ("--prompts", prompts) if prompts else ("evaluation.prompts", own.evaluation.prompts)
    default = "" if own.evaluation.scorer else f"{DEFAULT_JUDGE}; a configuration given with --config may"
    check_prompts(key, source, evaluation_rewards(own), Path.cwd(), advice=default)
    check_judged_tasks(own.evaluation, source, Path.cwd())
    count, console = num_samples or own.evaluation.num_samples, make_console(as_json)
    against = reference and reference_metrics(reference, count, extractor, clip, own.cluster.device, console.print)
    result = evaluate_checkpoint(
        checkpoint,
        config=own,
        num_samples=num_samples,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        solver=None if solver is None else solver.value,
        prompts=prompts,
        seed=seed,
        which=weights,
        progress=progress(console, "samples"),
    )
    if against:
        result.metrics.update(against(result))
    say_evaluation(console, result)
    summary = {"checkpoint": str(checkpoint), "iteration": result.iteration, "metrics": result.metrics}
    summary |= {"standard_errors": result.standard_errors, "made": result.made, "notes": result.notes}
    try:
        if out is not None:
            write_evaluation(result, out, summary)
            console.print(f"written to {out}")
    finally:  # what took so long to find is not lost with a disk
        print_json(as_json, summary)


app.command()(measure)


@app.command()
def sample(
    checkpoint: Source,
    prompt: Annotated[list[str], typer.Option(help="may be given several times")],
    num_images: Annotated[int, typer.Option(min=1, max=100_000, help="images a prompt")] = 1,
    num_steps: Steps = None,
    guidance_scale: Guidance = None,
    solver: Solver = None,
    seed: Seed = 0,
    weights: Weights = "model",
    latents: Annotated[bool, typer.Option("--latents", help="also save noise and final latents")] = False,
    out: Path = Path("samples"),
    config: Like = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Draw images from a checkpoint."""
    from flowalign.intake.recorded import config_of
    from flowalign.record.outputs import check_out

    check_out("--out", out)
    for text in prompt:
        check_text("--prompt", text)
    own = config_of(checkpoint, config, model)
    from flowalign.measure.evaluated import made_with
    from flowalign.models.textlength import prompt_note
    from flowalign.samples.opened import asked, sample_checkpoint

    console = make_console(as_json)
    files = sample_checkpoint(
        checkpoint,
        prompt,
        config=own,
        out_dir=out,
        num_images=num_images,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        solver=None if solver is None else solver.value,
        seed=seed,
        which=weights,
        save_latents=latents,
        progress=progress(console, "images"),
    )
    made = asked(own.evaluation, num_steps, guidance_scale, solver and solver.value).model_dump()
    how = made_with({**made, "seed": seed, "weights": weights})
    if note := prompt_note(Path(own.model.path), prompt):
        plain(console)(f"of the prompts {note}")
    plain(console)(f"{len(files)} image{'s' * (len(files) > 1)} in {out}; {how}")
    print_json(as_json, {"out": str(out), "files": [str(file) for file in files]})


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run directory or one of its checkpoints")],
    to: Annotated[Path, typer.Option("--to", help="directory to write")],
    kind: Kind = "pipeline",
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

    result = write_export(run, to, kind=kind, config=own, overwrite=overwrite)
    say = plain(make_console(as_json))
    say(result.compared)
    say(f"exported to {to} ({kind}, iteration {result.iteration})")
    print_json(as_json, asdict(result))


@app.command()
def merge(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="CHECKPOINT...", help="runs, checkpoints, pipelines or shapes", parser=model_directory),
    ],
    to: Annotated[Path, typer.Option("--to", help="directory to write")],
    weight: Annotated[
        list[float] | None, typer.Option(callback=finite, help="of each model, in their order; default: all alike")
    ] = None,
    weights: Weights = "model",
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


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run directory")]) -> None:
    """Write report.html, one self-contained file: curves, tables, images before and after."""
    from flowalign.cli.runs import report_of

    make_console().print(f"report: {report_of(run)}")


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Geometry, parameters, FLOPs and memory of an alignment; starts nothing, needs no weights.

    It takes alignments only: of a pretrain or distill configuration it can say nothing.
    """
    from flowalign.intake.file import load_align

    loaded = load_align(config, overrides or (), require_files=False)
    from flowalign.plan import make_plan, plan_rows

    made = make_plan(loaded.config, loaded.missing)
    console = make_console(as_json)
    print_rows(console, plan_rows(made))
    for note in made.notes:
        console.print(f"note: {note}")
    print_json(as_json, made.as_dict())


@app.command("serve-reward")
def serve_reward(
    scorer: Annotated[str, typer.Argument(help="geneval, path/to/file.py:reward, package.module:reward, …")],
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="options of the scorer")] = None,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    device: str = "cpu",
    token_env: Annotated[str | None, typer.Option(help="variable that holds the token clients must send")] = None,
    max_batch_images: Annotated[int, typer.Option(min=1, help="images of merged requests; 1 merges none")] = 64,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, callback=finite, help="how long a request waits for others")
    ] = 5.0,
    allow_host: Annotated[list[str] | None, typer.Option(metavar="NAME", help="a further name of the server")] = None,
    max_held_mib: Annotated[
        int, typer.Option(min=1, help="MiB of requests held at once, and as many of decoded pictures; more wait")
    ] = 512,
    log_requests: Annotated[bool, typer.Option(help="a line for each request on standard error")] = False,
) -> None:
    """Serve one reward over HTTP until interrupted; at the end it says how much it scored."""
    from flowalign.config.section import ConfigError
    from flowalign.config.sections import RewardConfig
    from flowalign.intake.paths import resolve_reward, scalar_options
    from rewards.serving.batching import Batching
    from rewards.serving.doors import MIB, Doors
    from rewards.serving.requestlog import log_requests as log
    from rewards.serving.server import serve

    log(log_requests)
    token = os.environ.get(token_env) if token_env else None
    if token_env and not token:
        raise ConfigError("--token-env", f"the variable {token_env} is empty; set it to the token")
    reward = resolve_reward(RewardConfig(spec=scorer, options=scalar_options(options or ())), Path.cwd(), scorer)
    serve(
        {"type": reward.spec, **reward.options},
        host,
        port,
        device=device,
        token=token,
        batching=Batching(max_images=max_batch_images, max_wait_s=max_wait_ms / 1000),
        doors=Doors(held_bytes=max_held_mib * MIB, allow_hosts=tuple(allow_host or ())),
        announce=lambda line: typer.echo(printable(line)),
    )


@app.command("try-reward")
def try_reward(
    scorer: Annotated[str, typer.Argument(help="geneval, path/to/file.py:reward, url:http://…, …")],
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="options of the scorer")] = None,
    images: Annotated[Path, typer.Option(help="a folder of image files")] = ...,  # type: ignore[assignment]
    prompts: Annotated[Path | None, typer.Option(help="jsonl or text, one an image; default: the folder's")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    as_json: Json = False,
) -> None:
    """Score a folder of images with one reward and print a table; needs no cluster."""
    from flowalign.config.sections import RewardConfig
    from flowalign.intake.check import check_device
    from flowalign.intake.paths import resolve_reward, scalar_options
    from flowalign.making.tried import lines_of
    from flowalign.making.tried import try_reward as run
    from flowalign.measure.imagefolder import image_files, own_prompts

    check_device("--device", device)
    reward = resolve_reward(RewardConfig(spec=scorer, options=scalar_options(options or ())), Path.cwd(), scorer)
    console = make_console(as_json)
    if prompts is None and image_files(images, "--images") and own_prompts(images) is None:
        console.out(f"{images} has no index.json and no --prompts was given: every prompt is empty")
        console.out("")
    tried = run({"type": reward.spec, **reward.options}, reward.label, images, prompts, device=device)
    for line in lines_of(tried, console.width if console.is_terminal else None):
        console.out(line)
    for note in tried.notes:
        console.out(note)
    scores = {name: [float(value) for value in values] for name, values in tried.scores.items()}
    found = {"files": tried.files, "prompts": tried.prompts, "scores": scores, "causes": tried.causes}
    print_json(as_json, {**found, "left_out": tried.left_out})
    tried.check_judged()


@app.command()
def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    cluster: Annotated[Path, typer.Option(help="a launch file, see configs/cluster/")] = ...,  # type: ignore[assignment]
    accept_changed: AcceptChanged = None,
) -> None:
    """Submit the run to an existing Ray cluster as a job, and follow its log."""
    from flowalign.intake.file import load_align

    load_align(config, overrides or (), require_files=False)
    from flowalign.cluster.launch import launch as submit
    from flowalign.record.contents import ACCEPT

    accepted = [word for key in accept_changed or () for word in (ACCEPT, key)]
    raise typer.Exit(submit(config, cluster, [*(overrides or ()), *accepted]))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, compiler, memory, GPU, shipped files. Exit code 1 if something needed fails."""
    from dataclasses import asdict

    from flowalign.doctor import examine

    findings = examine()
    print_rows(make_console(as_json), [(f.status, f.what, f.found, f.advice) for f in findings])
    print_json(as_json, {"findings": [asdict(f) for f in findings]})
    raise typer.Exit(int(any(f.status == "fail" for f in findings)))
