"""How a command samples from a model: the options that all such commands have, and what is made of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from flowalign.cli.options import Model, check_text, finite, image_size
from flowalign.config.largest import LARGEST
from flowalign.config.solvers import solver_names, spelled

if TYPE_CHECKING:
    from flowalign.config.sampled import Sampled
    from flowalign.samples.sampled import SampledModel

Like = Annotated[
    Path | None, typer.Option("--config", help="an alignment's configuration, instead of the one recorded there")
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1, max=int(LARGEST["num_steps"]), help="ODE steps; default: as the run evaluates, 10 for a pipeline"
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="what guidance leads away from; default: as the run or the model has it"),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=LARGEST["guidance_scale"],
        callback=finite,
        help="1 is none; default: as the run evaluates, 1 for a pipeline",
    ),
]
TrueGuidance = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=LARGEST["true_guidance_scale"],
        callback=finite,
        help="of two passes, where the network takes --guidance-scale as an input; 1 is none; default: as the run "
        "evaluates",
    ),
]
NormCap = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        max=LARGEST["guidance_norm_cap"],
        callback=finite,
        help="most times its length that guidance makes of a velocity; default: as the run evaluates",
    ),
]
Until = Annotated[
    float | None,
    typer.Option(min=0, max=1, callback=finite, help="1 - t at which guidance ends; default: as the run evaluates"),
]


Size = Annotated[
    Any,
    typer.Option(
        metavar="HEIGHTxWIDTH",
        parser=image_size,
        help="of the images in pixels; default: as the run or the model has it",
    ),
]


def known_solver(text: str) -> str:
    """Return the solver's name with its options, as it is kept."""
    try:
        return spelled(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Solver = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help=f"{', '.join(solver_names())}; default: as the run evaluates", parser=known_solver
    ),
]


Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: as the run has it, cpu for a pipeline")]
Dtype = Annotated[
    str | None, typer.Option(metavar="NAME", help="float32 or bfloat16; default: as the run has it, float32")
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=int(LARGEST["chunk_size"]),
        help="images of one pass, which fewer are filled up to; default: as the run has it, 48 for a pipeline",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="of calibrate-cache: steps that hardly change are skipped; none; default: as the run"
    ),
]


@dataclass(frozen=True)
class Sampling:
    """What a command is given of how it samples; each field is an option of it, see `takes_sampling`."""

    num_steps: Steps = None
    guidance_scale: Guidance = None
    negative_prompt: NegativePrompt = None
    true_guidance_scale: TrueGuidance = None
    guidance_norm_cap: NormCap = None
    guidance_until: Until = None
    solver: Solver = None
    size: Size = None
    device: Device = None
    dtype: Dtype = None
    batch: Batch = None
    cache: Cache = None
    config: Like = None
    model: Model = None

    def config_of(self, checkpoint: Path, overrides: Sequence[str] | None = None) -> Sampled:
        """Return the configuration that belongs to a checkpoint, with ``overrides``, key=value.

        Raises:
            ConfigError: there is none, or it cannot be as it is asked for.
        """
        from flowalign.intake.recorded import config_of
        from flowalign.intake.sampled import changed

        check_text("--negative-prompt", self.negative_prompt or "")
        device, own = self.checked_device, config_of(checkpoint, self.config, self.model)
        own = own if device is None else own.on(device)
        own = changed(own, checkpoint, [*(overrides or ()), *self._keys()])
        return own if self.size is None else _sized(checkpoint, own, self.size)

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, by their names."""
        values = {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def chosen(self, overrides: Sequence[str] | None) -> set[str]:
        """Return the keys of a walk and of a text that were given, by an option or by key=value."""
        keys = (assignment.partition("=")[0].strip().rpartition(".")[2] for assignment in overrides or ())
        return {name.replace("-", "_") for name in self.given} | set(keys)

    @property
    def checked_device(self) -> str | None:
        """The device that was given, None where none was. Raise ConfigError where it is none, or not here."""
        from flowalign.engine.device import check_device

        if self.device is not None:
            check_device("--device", self.device)
        return self.device

    def _keys(self) -> list[str]:
        """Return the options that stand for a key each, as key=value."""
        cache = self.cache if self.cache in (None, "none") else json.dumps(self.cache)
        given = {"model.dtype": self.dtype, "rollout.chunk_size": self.batch, "evaluation.cache": cache}
        return [f"{key}={'null' if value == 'none' else value}" for key, value in given.items() if value is not None]

    def model_of(self, checkpoint: Path, own: Sampled, *, weights: str | None, seed: int | None) -> SampledModel:
        """Return the model that is sampled from, and how; ``own`` is its configuration. Raise as `sampled_model`."""
        from flowalign.samples.sampled import sampled_model

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in _TAKEN:
            del given[name]
        return sampled_model(checkpoint, own, which=weights, seed=seed, **given)


_TAKEN = ("config", "model", "size", "device", "dtype", "batch", "cache")  # by `Sampling.config_of`


def _sized(checkpoint: Path, own: Sampled, size: tuple[int, int]) -> Sampled:
    """Return the configuration with images of ``size``. Raise ConfigError where the model makes none such."""
    from flowalign.config.section import ConfigError
    from flowalign.models.directory import open_directory
    from flowalign.models.errors import ModelError
    from flowalign.samples.opened import model_of

    height, width = size
    try:
        open_directory(model_of(checkpoint, own)).latent_shape(height, width)
    except ModelError as error:
        raise ConfigError("--size", str(error).removeprefix("model.path: ")) from error
    return own.model_copy(update={"model": own.model.model_copy(update={"height": height, "width": width})})


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Sampling` in the place of its parameter ``sampling``."""
    own, hints = inspect.signature(command, eval_str=True), get_type_hints(Sampling, include_extras=True)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    options = [
        inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
        for field in fields(Sampling)
    ]
    taken = [part for name, one in own.parameters.items() for part in (options if name == "sampling" else [one])]

    @wraps(command)
    def called(**given: Any) -> None:
        command(sampling=Sampling(**{field.name: given.pop(field.name) for field in fields(Sampling)}), **given)

    called.__signature__ = own.replace(parameters=taken)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return called
