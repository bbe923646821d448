"""A model's files, looked at before any weight is loaded: what it is, and what of it cannot be reproduced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.doctor.checks import Check
from flowalign.models.checked import check_pipeline
from flowalign.models.directory import Directory, family_of_model, pipeline_class
from flowalign.models.errors import ModelError
from flowalign.models.weights import Weights, read_weights
from flowalign.record.disk import size_text

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Files:
    """The small files of a pipeline, and the weight files of its parts by their folders."""

    directory: Directory
    weights: Mapping[str, Weights]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.weights.values())


def look_at(path: Path, size: Size | None) -> Files:
    """Return the files of the pipeline at ``path``, whose pictures may be of that ``size``.

    Raises:
        ModelError: it is no pipeline of a known family, is not whole, or has what is not reproduced here.
    """
    try:
        pipeline_class(path)
        height, width = size or (None, None)
        model = ModelConfig(path=str(path), height=height, width=width)
        check_pipeline("path", path, model)
        directory = Directory(family_of_model(model), path)
        parts = [part for part in directory.family.required_parts if part != "scheduler"]
        parts += [part for part in directory.family.optional if part.startswith("text_encoder") and directory.has(part)]
        return Files(directory, {part: read_weights(path / part) for part in parts})
    except ConfigError as error:
        raise ModelError(error.reason) from error
    except ModelError as error:
        raise ModelError(str(error).removeprefix("model.path: ")) from error


def told(files: Files) -> Iterator[Check]:
    """Say which family a pipeline is of, and the sizes of its parts."""
    directory, family = files.directory, files.directory.family
    name = str(directory.index["_class_name"])
    yield Check("fact", "family", f"{family.title} ({family.name}), a {name}", figures={"name": family.name})
    for part, weights in files.weights.items():
        dtypes = " and ".join(weights.dtypes)
        said = f"{directory.class_of(part)[1]}, {weights.parameters:,} parameters, {size_text(weights.bytes)}, {dtypes}"
        if weights.variants:
            said += f"; beside it, not read: {', '.join(weights.variants)}"
        figures = {"class": directory.class_of(part)[1], "parameters": weights.parameters, "bytes": weights.bytes}
        yield Check("fact", part, said, figures=figures | {"dtypes": weights.dtypes, "variants": weights.variants})
