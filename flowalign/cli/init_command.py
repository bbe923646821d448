"""``flowalign init``: a configuration to begin with, from flags or from answers."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowalign.cli.examples import examples
from flowalign.cli.options import Json, finite, image_size, model_directory
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import opening, print_json

if TYPE_CHECKING:
    from flowalign.making.recipe import Asked

FLAGS = {"algorithm.guidance_scale": "--guidance-scale", "evaluation.guidance_scale": "--guidance-scale"}
FLAGS |= {
    "model.lora": "--lora",
    "model": "--model",
    "evaluation.prompts": "--prompts",
    "data.prompts": "--prompts",
    "rewards": "--reward",
    "algorithm": "--algorithm",
}
_IMPLIED = ("path", "prompts", "type", "0", "guidance_scale", "lora", "rank")  # parts of keys that the options say
ALGORITHM = "flow_grpo"


@examples(
    "flowalign init --shapes --to run.yaml",
    "flowalign init --model models/sd3.5 --prompts prompts.jsonl --reward my_reward.py:bright --hours 8 --to run.yaml",
)
def init(
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="configuration to write")] = Path("run.yaml"),
    model: Annotated[str | None, typer.Option(metavar="DIR", help="pipeline directory, or shapes")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="prompts to learn from, as docs/prompts.md has them")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="a scorer, with options 'pickscore path=…'; may be repeated"),
    ] = None,
    algorithm: Annotated[str, typer.Option(metavar="NAME", help="see docs/algorithms.md")] = ALGORITHM,
    size: Annotated[
        Any,
        typer.Option(
            metavar="HEIGHTxWIDTH", parser=image_size, help="of the images in pixels; default: the model's own"
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="most that one GPU, or this process, may hold; default: all")
    ] = None,
    hours: Annotated[float | None, typer.Option(metavar="H", min=0.01, callback=finite, help="of the run")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(metavar="G", min=0, callback=finite, help="default: the model's, or none")
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            metavar="RANK|DIR",
            help="of a LoRA, 0 for all weights, or an adapter to begin from, PEFT's or diffusers'; default: a LoRA "
            "where the network is large",
        ),
    ] = None,
    shapes: Annotated[bool, typer.Option("--shapes", help="the quickstart, on the model of the package")] = False,
    as_json: Json = False,
) -> None:
    """Write a small configuration with comments, one that `flowalign check` accepts on this machine.

    What is not given is asked for in a terminal. What fits in memory, and how many iterations the hours hold, is
    counted as `flowalign plan` does.
    """
    from flowalign.record.outputs import check_file

    console = make_console(as_json)
    opening(console, f"init {to}")
    given = {"--model": model, "--prompts": prompts, "--reward": reward, "--size": size, "--memory": memory}
    given |= {"--hours": hours, "--guidance-scale": guidance_scale, "--lora": lora}
    given |= {"--algorithm": None if algorithm == ALGORITHM else algorithm}
    _check_new(to, shapes, [option for option, value in given.items() if value not in (None, [])])
    check_file("--to", to)
    if shapes:
        from flowalign.making.quickstart import quickstart

        text = quickstart(to)
    else:
        from flowalign.making.recipe import recipe
        from flowalign.plan.devices import gpus_here

        asked = _asked(model, prompts, reward or [], algorithm, size, memory, hours, guidance_scale, lora)
        gpus = gpus_here()
        console.print("counting what fits, and how long it takes")
        try:
            _check_model_there(asked.model)
            text = recipe(asked, to, gpus)
        except Exception as error:
            raise _flagged(error) from error
    _write_checked(to, text)
    console.print(
        f"written to {to}, which `flowalign check` accepts; begin with: flowalign align {shlex.quote(str(to))}"
    )
    print_json(as_json, {"file": str(to)})


def _check_new(to: Path, shapes: bool, given: list[str]) -> None:
    from flowalign.config.section import ConfigError
    from flowalign.record.textfiles import is_there

    if is_there(to):
        raise ConfigError("--to", f"{to} exists; name another file, or move that one away")
    if shapes and given:
        raise ConfigError("--shapes", f"is the quickstart as it is; leave out {', '.join(given)}")


def _check_model_there(model: str) -> None:
    """Refuse a model that is not on this machine: a name of the hub, of which `plan` knows enough to count."""
    from flowalign.config.section import ConfigError
    from flowalign.models.directory import check_there
    from flowalign.models.errors import ModelError

    try:
        check_there(model_directory(os.path.expanduser(model)).absolute())
    except ModelError as error:
        raise ConfigError("model.path", str(error).removeprefix("model.path: ")) from error


def _asked(
    model: str | None,
    prompts: str | None,
    rewards: list[str],
    algorithm: str,
    size: tuple[int, int] | None,
    memory: str | None,
    hours: float | None,
    guidance_scale: float | None,
    lora: str | None,
) -> Asked:
    """Return what was given, and what is asked for in a terminal. Raise ConfigError where nobody can be asked."""
    from flowalign.making.recipe import Asked
    from flowalign.plan.devices import bytes_of

    asks = sys.stdin.isatty() and sys.stdout.isatty()
    lacking = model is None or prompts is None or not rewards
    model = model or _answer(asks, "--model", "Pipeline directory of the model, or shapes", "shapes")
    known = "shapes:train" if model == "shapes" else None
    prompts = prompts or _answer(asks, "--prompts", "File of prompts", known)
    if not rewards:
        rewards = [_answer(asks, "--reward", "Reward, such as my_reward.py:brightness", "geneval" if known else None)]
        while asks and (more := typer.prompt("Another reward (empty: none)", default="", show_default=False)):
            rewards.append(more)
    if asks and lacking:
        memory = memory or typer.prompt("Memory that it may take, such as 24GiB (empty: all)", "", show_default=False)
        if hours is None:
            said = typer.prompt("Hours (empty: 160 iterations)", "", show_default=False, value_proc=_hours)
            hours = said
    most = bytes_of(memory) if memory else None
    adapter_or_rank = int(lora) if lora is not None and lora.isascii() and lora.isdigit() else lora
    return Asked(model, prompts, rewards, algorithm, most, hours, guidance_scale, size, adapter_or_rank)


def _hours(text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{text} is no number of hours")
    return value


def _answer(asks: bool, option: str, question: str, default: str | None) -> str:
    if asks:
        return typer.prompt(question, default)
    from flowalign.config.section import ConfigError

    raise ConfigError(option, "is missing; give --model, --prompts and --reward, or --shapes for the quickstart")


def _flagged(error: Exception) -> Exception:
    """Return an error about a key with the option that the key is from."""
    from flowalign.config.section import ConfigError

    if not isinstance(error, ConfigError):
        return error
    option = next((flag for key, flag in FLAGS.items() if error.key.startswith(key)), None)
    further = ".".join(part for part in error.key.split(".")[1:] if part not in _IMPLIED)
    return error if option is None else ConfigError(option, f"{further}: {error.reason}" if further else error.reason)


def _write_checked(to: Path, text: str) -> None:
    """Write what `flowalign check` accepts, beside it first. Raise as that does; then nothing is left."""
    from flowalign.intake.ready import looked_at
    from flowalign.record.disk import draft_of, folder_for

    told: list[Any] = []
    try:
        with folder_for(to.parent), draft_of(to) as draft:
            draft.write_text(text, encoding="utf-8")
            looked_at("align", draft, say=told.append)
    except Exception as error:
        raise _flagged(error) from error
