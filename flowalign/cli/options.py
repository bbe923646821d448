"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML configuration, see configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. learner.epochs=2")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on the last line")]
Source = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="a run, a checkpoint or a pipeline directory")]
Like = Annotated[Path | None, typer.Option("--config", help="configuration to use with a pipeline directory")]
Steps = Annotated[int | None, typer.Option(min=1, help="ODE steps; default: as the run evaluates")]
Weights = Annotated[str, typer.Option(metavar="NAME", help="model, ema, or another average such as ema_0.99")]
Guidance = Annotated[float | None, typer.Option(min=0, help="1 is none; default: as the run evaluates")]


class SolverName(StrEnum):
    euler = "euler"
    heun = "heun"
    dpmpp_2m = "dpmpp_2m"
    ddpm = "ddpm"
    consistency = "consistency"


Solver = Annotated[SolverName | None, typer.Option(help="default: as the run evaluates")]


class Kind(StrEnum):
    pipeline = "pipeline"
    lora = "lora"
    ema = "ema"


class Suite(StrEnum):
    geneval = "geneval"
