"""``flowalign <command>``. Heavy modules are imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowalign import __version__
from flowalign.cli.caption_command import caption
from flowalign.cli.check_command import check
from flowalign.cli.compare_command import compare
from flowalign.cli.doctor_command import doctor
from flowalign.cli.examples import App, epilog_of, examples
from flowalign.cli.exits import Commands
from flowalign.cli.init_command import init
from flowalign.cli.making_commands import calibrate_cache, make_pairs, make_preferences
from flowalign.cli.measure import measure
from flowalign.cli.model_commands import (
    evaluate,
    export,
    merge,
    report,
    sample,
)
from flowalign.cli.options import AcceptChanged, ConfigFile, Json, Overrides, finite, token_of
from flowalign.cli.plan_command import plan
from flowalign.cli.precompute_command import precompute
from flowalign.cli.prompts_command import prompts
from flowalign.cli.run_commands import align, distill, pretrain, stop_run
from flowalign.cli.schema_command import schema
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import print_json
from rewards.printable import printable

app = App(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"flowalign {__version__}")
        raise typer.Exit


@app.callback(epilog=epilog_of(("flowalign init --shapes --to run.yaml", "flowalign align run.yaml iterations=10")))
def flowalign(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="say which version this is")
    ] = False,
) -> None:
    """Align flow-matching image models with reinforcement learning on Ray clusters."""


app.command()(init)
app.command()(align)
app.command()(pretrain)
app.command()(distill)
app.command()(check)
app.command()(schema)
app.command("stop")(stop_run)
app.command()(caption)
app.command()(precompute)
app.command("make-pairs")(make_pairs)
app.command("make-preferences")(make_preferences)
app.command("calibrate-cache")(calibrate_cache)


app.command()(evaluate)
app.command()(compare)
app.command()(measure)
app.command()(sample)
app.command()(export)
app.command()(merge)
app.command()(report)
app.command()(plan)
app.command()(prompts)


@app.command("serve-reward")
@examples(
    "flowalign serve-reward geneval mode=partial --port 8000",
    "flowalign serve-reward my_reward.py:brightness --host 0.0.0.0 --token-env REWARD_TOKEN",
)
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
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="a line for each request on standard error")
    ] = False,
) -> None:
    """Serve one reward over HTTP until interrupted; at the end it says how much it scored."""
    from flowalign.config.sections import RewardConfig
    from flowalign.intake.overrides import scalar_options
    from flowalign.intake.paths import resolve_reward
    from rewards.serving.batching import Batching
    from rewards.serving.doors import MIB, Doors
    from rewards.serving.requestlog import log_requests as log
    from rewards.serving.server import serve

    log(log_requests)
    token = token_of(token_env)
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
@examples(
    "flowalign try-reward my_reward.py:brightness --images samples",
    "flowalign try-reward geneval mode=strict --images samples --prompts prompts.jsonl",
)
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
    from flowalign.engine.device import check_device
    from flowalign.intake.overrides import scalar_options
    from flowalign.intake.paths import resolve_reward
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
@examples(
    "flowalign launch configs/shapes/flow_grpo.yaml --cluster configs/cluster/example.yaml",
    "flowalign launch run.yaml iterations=400 --cluster cluster.yaml --accept-changed data.prompts",
)
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


app.command()(doctor)
