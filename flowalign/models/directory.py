"""A pipeline directory's small files: what they say of a model, and whether it is one that its family can load.

Nothing here imports diffusers or reads weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flowalign.config.sections import ModelConfig
from flowalign.flow.schedule import PipelineSchedule, resolution_shift
from flowalign.models.customcode import refuse_custom_code
from flowalign.models.errors import ModelError
from flowalign.models.family import Geometry, ModelFamily, Published, TextPart, family_of, known_families
from flowalign.models.mistaken import another_pipeline, no_pipeline, of_the_hub
from flowalign.models.scheduler import FlowScheduler, check_scheduler, checked_options
from flowalign.record.files import stays_below
from flowalign.record.textfiles import TextError, read_object
from rewards.missing import hint

INDEX = "model_index.json"
# File and class of the pipeline that an export of ours names where a plain one would sample wrongly.
OWN_PIPELINE = ("pipeline", "FlowalignPipeline")
SIZE, LAYERS = 1_000_000, 1_000
_REPEATED = (
    *("num_layers", "num_single_layers", "num_hidden_layers", "num_decoder_layers", "layers_per_block"),
    *("n_layers", "n_refiner_layers", "num_res_blocks", "depth"),
)


@dataclass(frozen=True)
class Directory:
    """The small files of a pipeline of ``family``: those at ``path``, or what is ``published`` of a model that is not
    there."""

    family: ModelFamily
    path: Path
    published: Published | None = None

    @property
    def source(self) -> str:
        """What the sizes are of."""
        if self.published is not None:
            size = self.published.file_bytes
            files = "" if size is None else f", whose files take {size / 1e9:.1f} GB"
            return f"built-in configuration of {self.published.source}{files}"
        return str(self.path)

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """What ``model_index.json`` says."""
        return _read(self.path / INDEX)

    def has(self, part: str) -> bool:
        """Tell whether the pipeline has a part; an optional one that is left out is named as null."""
        if self.published is not None:
            return part in self.published.parts or part in self.published.parameters
        return any(self.index.get(part) or [])

    def class_of(self, part: str) -> tuple[str, str]:
        """Return the library and the class of a part, as the index or the part's own published file names them."""
        if self.published is None:
            library, name = self.index[part]
            return library, name
        own = self.published.parts[part]
        return ("diffusers", own["_class_name"]) if "_class_name" in own else ("transformers", own["architectures"][0])

    def config(self, part: str) -> Mapping[str, Any]:
        """Return the sizes that a part's own file states.

        Raises:
            ModelError: it cannot be read, or states a size that no network has.
        """
        if self.published is not None:
            return self.published.parts.get(part, {})
        return read_sizes(self.path / part / "config.json")

    @property
    def geometry(self) -> Geometry:
        """Return the geometry of the latents. Raise ModelError where the files do not say it."""
        transformer, vae = self.config("transformer"), self.config("vae")
        try:
            return self.family.geometry(transformer, vae)
        except (KeyError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"holds no number where one is wanted ({error})"
            file = self.path / "transformer" / "config.json"
            raise ModelError(f"model.path: {file} {what}; give the directory of a whole pipeline") from error

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """Return the options of the scheduler, see `check_scheduler`."""
        if self.published is not None:
            return checked_options(self.published.parts["scheduler"])
        return check_scheduler(self.path, self.family.title)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return (C, h, w) of an image size in pixels, None being the model's own.

        Raises:
            ModelError: the size is not a multiple of what autoencoder and patches need.
        """
        return sized(self.geometry, height, width)

    def image_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """Return the number of tokens of an image size in pixels. Raise ModelError as `latent_shape`."""
        return tokens_of(self.geometry, height, width)

    def schedule(self, height: int | None = None, width: int | None = None) -> PipelineSchedule:
        """Return the walk of the pipeline at an image size in pixels.

        Raises:
            ModelError: see `check_scheduler`; or the size does not fit.
        """
        return walk_of(self.family, self.scheduler, self.geometry, height, width)


def open_directory(model: ModelConfig) -> Directory:
    """Return the small files of the model that a configuration names; where they are absent, what is published of it.

    Raises:
        ModelError: there is no such directory, and nothing is known of it.
    """
    path = Path(model.path)
    family = family_of_model(model)
    if path.exists():
        return Directory(family, path)
    if (known := family.published.get(path.name.lower())) is not None:
        return Directory(family, path, known)
    raise _absent(path, [family])


def family_of_model(model: ModelConfig) -> ModelFamily:
    """Return the family that ``model.type`` names; without one that of the pipeline at ``model.path``.

    Raises:
        ModelError: it names none, or no family is of that pipeline.
    """
    if model.type is not None:
        return family_of(model.type)
    path = Path(model.path)
    families = [family_of(name) for name in known_families()]
    if not path.exists():
        found = [family for family in families if path.name.lower() in family.published]
        if found:
            return found[0]
        raise _absent(path, families)
    name = pipeline_class(path)
    own = next((family for family in families if family.network == _network_class(path)), None)
    if own is not None and name in (own.pipeline, OWN_PIPELINE[1]):
        return own
    for family in families:
        if family.pipeline == name:
            return family
    if own is not None:
        _refuse_another_pipeline(path, own)
    known = ", ".join(f"{family.pipeline} ({family.name})" for family in families)
    raise ModelError(f"model.path: {path} holds a {name}, which no family here loads; known: {known}")


def check_there(path: Path) -> None:
    """Raise ModelError where there is nothing at ``path``, of which all may be known that can be counted."""
    if not path.exists():
        raise _absent(path, [family_of(name) for name in known_families()])


def _absent(path: Path, families: Sequence[ModelFamily]) -> ModelError:
    known = ", ".join(name for family in families for name in family.published)
    plan = (f", or plan one whose sizes are known: {known}" if known else "") + of_the_hub(path)
    return ModelError(f"model.path: {path} is not a directory{hint(path)}; give a pipeline directory{plan}")


def text_parts(model: ModelConfig) -> dict[str, TextPart]:
    """Return the places of the single encoders of a model's text; none where they are not told apart."""
    directory = open_directory(model)
    return {} if directory.family.text_parts is None else directory.family.text_parts(directory)


def refuse_absent(family: ModelFamily, model: ModelConfig) -> None:
    """Raise ModelError, by key, for what a configuration asks of a model whose family has it not."""
    if model.transformer is not None and family.fresh is None:
        raise ModelError(f"model.transformer: {family.title} has no networks that begin anew; leave it out")
    if model.inputs and family.inputs is None:
        raise ModelError(f"model.inputs: the networks of {family.title} take no further inputs; leave them out")
    if model.family not in (None, "rf") and family.own_pipeline is None:
        raise ModelError(f"model.family: {family.title} is of the straight path alone; write rf, or leave it out")


def is_pipeline(path: Path) -> bool:
    """Tell whether a directory says that it is a pipeline; a run or a checkpoint does not."""
    return (path / INDEX).is_file()


def pipeline_class(directory: Path) -> str:
    """Return the class that a directory's ``model_index.json`` names. Raise ModelError where there is none."""
    if (reason := no_pipeline(directory)) is not None:
        raise ModelError(f"model.path: {reason}")
    name = _read(directory / INDEX).get("_class_name")
    return str(name[-1] if isinstance(name, list) and name else name)


def _network_class(directory: Path) -> str | None:
    """Return the class that a directory's index names for the network."""
    named = _read(directory / INDEX).get("transformer")
    return named[-1] if isinstance(named, list) and named else None


def _refuse_another_pipeline(directory: Path, family: ModelFamily) -> None:
    """Raise ModelError where a directory names another pipeline of diffusers' over a network of the family."""
    name = _read(directory / INDEX).get("_class_name")
    if isinstance(name, str) and _network_class(directory) == family.network:
        raise ModelError(f"model.path: {another_pipeline(directory, name, family.title, family.pipeline)}")


def check_directory(family: ModelFamily, directory: Path) -> None:
    """Raise ModelError, in milliseconds, unless ``directory`` looks like the family's pipeline on disk."""
    name = pipeline_class(directory)
    of_ours = family.own_pipeline is not None and _read(directory / INDEX).get("_class_name") == list(OWN_PIPELINE)
    if name != family.pipeline and not of_ours:
        _refuse_another_pipeline(directory, family)
        raise ModelError(
            f"model.path: {directory} holds a {name}; models of type {family.name} need a {family.pipeline}"
        )
    own = Directory(family, directory)
    for part in dict.fromkeys((*family.required_parts, *filter(own.has, family.text))):
        if not (directory / part).is_dir():
            raise ModelError(f"model.path: {directory} has no folder {part}; the download or export is incomplete")
    for index in sorted(directory.glob("*/*.safetensors.index.json")):
        _check_shards(index)
    refuse_custom_code(directory)
    check_scheduler(directory, family.title)


def _check_shards(index: Path) -> None:
    """Check that the files that an index names lie beside it."""
    named = _read(index).get("weight_map")
    if not isinstance(named, dict):
        raise ModelError(f"model.path: {index} has no weight_map; the download or export is incomplete")
    if outside := [name for name in named.values() if not stays_below(name) or Path(name).name != name]:
        raise ModelError(f"model.path: {index} names {outside[0]}; the files of a part lie beside its index")
    absent = sorted({name for name in named.values() if not (index.parent / name).exists()})
    if absent and index.name.count(".") == 3:  # others are of a variant, which is not read
        raise ModelError(
            f"model.path: {index.parent / absent[0]} is not there, which {index.name} names; the download or export is "
            "incomplete"
        )


def walk_of(
    family: ModelFamily,
    options: Mapping[str, Any],
    geometry: Geometry,
    height: int | None = None,
    width: int | None = None,
) -> PipelineSchedule:
    """Return the walk that a pipeline's scheduler makes of what it is handed at an image size in pixels: a number of
    steps or levels, perhaps a ``mu``. Raise ModelError where the size does not fit."""
    tokens = tokens_of(geometry, height, width)
    scheduler = scheduler_of(options, tokens, family.levels)
    return scheduler.schedule(resolution_shift(tokens, tokens_of(geometry)))


def scheduler_of(
    options: Mapping[str, Any], tokens: int, levels: Callable[[int], Sequence[float]] | None = None
) -> FlowScheduler:
    """Return a scheduler with what a pipeline hands it for an image of so many tokens: a ``mu`` where it shifts by it,
    and ``levels`` in the place of a number of steps."""
    mu = None
    if options["use_dynamic_shifting"]:
        base, most = options["base_image_seq_len"], options["max_image_seq_len"]
        slope = (options["max_shift"] - options["base_shift"]) / (most - base)
        mu = tokens * slope + (options["base_shift"] - slope * base)
    return FlowScheduler(options, mu, levels)


def tokens_of(geometry: Geometry, height: int | None = None, width: int | None = None) -> int:
    """Return the number of tokens of an image size in pixels. Raise ModelError as `sized`."""
    _, rows, columns = sized(geometry, height, width)
    return rows * columns // geometry.patch**2


def sized(geometry: Geometry, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Return (C, h, w) of an image size in pixels, None being the model's own.

    Raises:
        ModelError: it does not divide into tokens, or has more of them on a side than the table of positions.
    """
    size = [geometry.size if pixels is None else pixels for pixels in (height, width)]
    multiple = geometry.factor * geometry.patch
    if any(pixels % multiple or pixels < multiple for pixels in size):
        raise ModelError(f"image size {size[0]}x{size[1]}: both sides must be multiples of {multiple}")
    if geometry.table and max(size) > geometry.table * multiple:
        raise ModelError(
            f"image size {size[0]}x{size[1]}: the model's table of positions ends at {geometry.table * multiple} "
            "pixels a side"
        )
    return geometry.channels, size[0] // geometry.factor, size[1] // geometry.factor


def network_inputs(model: ModelConfig) -> tuple[str, ...]:
    """Return the numbers that a model's network takes beside the time, from its small files: those that it was given,
    or its family's. Raise ModelError where there are no files."""
    directory = open_directory(model)
    config = directory.config("transformer")
    added = model.inputs if model.inputs is not None else config.get("extra_inputs")
    return tuple(added or ()) or (("guidance",) if directory.family.takes_guidance(config) else ())


def read_sizes(path: Path) -> dict[str, Any]:
    """Return the sizes that a part's own file states. Raise ModelError for a size that no network has."""
    content = _read(path)
    for key, value in content.items():
        most = LAYERS if key in _REPEATED else SIZE
        sizes = value if isinstance(value, list) else [value]
        if any(isinstance(size, int) and abs(size) > most for size in sizes):
            raise ModelError(f"model.path: {path}: {key} is beyond {most:,}, which no network has; the file is damaged")
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except TextError as error:
        raise ModelError(f"model.path: {error}") from error
