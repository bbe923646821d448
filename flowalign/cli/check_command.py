"""``flowalign check``, and ``--dry-run`` of the commands that run: all that can be known before a run starts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.examples import examples
from flowalign.cli.options import AcceptChanged, ConfigFile, Json, Overrides, TakeOver
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import opening, print_json, print_sections, print_verdict, sentence


class Run(StrEnum):
    """The commands that run a configuration."""

    align = "align"
    pretrain = "pretrain"
    distill = "distill"


@examples(
    "flowalign check configs/shapes/quickstart.yaml",
    "flowalign check run.yaml cluster.backend=local --as align",
)
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    run_as: Annotated[Run | None, typer.Option("--as", help="the command it is for; default: told by its keys")] = None,
    take_over: TakeOver = False,
    accept_changed: AcceptChanged = None,
    as_json: Json = False,
) -> None:
    """Say whether a configuration of align, pretrain or distill can start here, and what would run. It starts nothing.

    It is what these commands look at before they start: keys, files, model, prompts, rewards, disk, device, places of
    the actors, and what the run goes on from. Exit code 0, or 2 with the reason.
    """
    command = None if run_as is None else run_as.value
    look(command, config, overrides or (), tuple(accept_changed or ()), take_over, as_json, said=f"check {config}")


def look(
    command: str | None,
    config: Path,
    overrides: Sequence[str],
    keys: tuple[str, ...],
    take_over: bool,
    as_json: bool,
    *,
    said: str | None = None,
) -> None:
    """Say what would run, or why it does not."""
    console = make_console(as_json)
    opening(console, said or f"{command} {config}")
    from flowalign.intake.ready import looked_at

    notes: list[str] = []

    def tell(line: str) -> None:
        console.print(line)
        notes.append(line)

    try:
        own, prepared = looked_at(command, config, overrides, keys, take_over=take_over, say=tell)
        if prepared is None:
            print_json(as_json, {"ready": True, "command": own.command, "run": str(own.run_dir), "said": notes})
            return
        from flowalign.intake.outlook import outlook

        found = outlook(own, prepared)
    except Exception as error:
        if (reason := sentence(error)) is not None and as_json:
            print_json(as_json, {"ready": False, "reason": reason, "said": notes})
        raise
    console.print("")
    print_sections(console, [("What would run", found.rows)])
    for note in found.notes:
        console.print(f"note: {note}")
    print_verdict(console, f"ready: {shlex.join(['flowalign', own.command, str(config), *overrides])}", True)
    print_json(as_json, {"ready": True, **found.as_dict(), "said": notes})
