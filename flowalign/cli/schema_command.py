"""``flowalign schema``: what an editor needs to complete and underline a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.check_command import Run
from flowalign.cli.examples import examples
from flowalign.cli.terminal import console as make_console


@examples(
    "flowalign schema align --to align.json",
    "flowalign schema pretrain",
)
def schema(
    command: Annotated[Run, typer.Argument(help="the command that reads the configuration")] = Run.align,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="file to write; default: print it")] = None,
) -> None:
    """Print the JSON schema of a configuration, by which an editor completes keys and underlines wrong ones.

    An editor with a YAML language server takes it from a comment in the configuration:
    # yaml-language-server: $schema=FILE
    """
    from flowalign.intake.schema import schema_text
    from flowalign.record.disk import folder_for, write_text
    from flowalign.record.outputs import check_file

    if to is not None:
        check_file("--to", to)
    text = schema_text(command.value)
    if to is None:
        typer.echo(text, nl=False)
        return
    with folder_for(to.parent):
        write_text(to, text)
    make_console().print(f"written to {to}")
