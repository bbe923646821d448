"""``flowalign plan``: what a run asks for, and whether given GPUs have it."""

from __future__ import annotations

from typing import Annotated

import typer

from flowalign.cli.examples import examples
from flowalign.cli.options import ConfigFile, Json, Overrides, finite
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import print_json, print_sections, print_verdict


@examples(
    "flowalign plan configs/sd3/flow_grpo_geneval.yaml --gpus 8xH100",
    "flowalign plan run.yaml model.path=FLUX.1-dev --gpus 4 --memory 48GiB",
)
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[str | None, typer.Option(metavar="GPUS", help="8xH100, or a number beside --memory")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="what one GPU holds, such as 80GiB")] = None,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, callback=finite, help="share of the GPUs' peak that is reached; unasked 0.3"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a run of align, pretrain or distill asks for: passes, FLOPs, memory, disk. It starts nothing.

    It needs no weights. With --gpus it ends with whether the run fits, the largest micro-batch, what would make it fit,
    and how long it takes.
    """
    from flowalign.plan.devices import GpusError, gpus_of

    given = gpus_of(gpus, memory)
    if mfu is not None and (given is None or given.name is None):
        raise GpusError("--mfu: is a share of the peak of known GPUs; name them, as in --gpus 8xH100")
    from flowalign.intake.file import load_run

    loaded = load_run(config, overrides or ())
    from flowalign.plan import make_plan, plan_sections
    from flowalign.plan.answer import MFU
    from flowalign.plan.rows import answer_sections, verdict

    made = make_plan(loaded.config, loaded.missing, gpus=given, mfu=MFU if mfu is None else mfu)
    console = make_console(as_json)
    print_sections(console, plan_sections(made))
    notes = [*loaded.chosen, *made.notes]
    if notes:
        console.print("")
    for note in notes:
        console.print(f"note: {note}")
    if made.answer is not None:
        console.print("")
        print_sections(console, answer_sections(made.answer))
        print_verdict(console, verdict(made.answer), made.answer.fits)
    print_json(as_json, made.as_dict())
