"""Data sets of ``datasets``: saved in a folder, on the hub, or in its cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowalign.config.prompts import HUB, PromptsConfig
from flowalign.data.sources.folder import chosen_split
from flowalign.data.sources.place import Read, Source
from flowalign.data.sources.tables import BATCH, plain_columns, rows_of, unread_columns
from flowalign.record.textfiles import TextError

SAVED, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"  # of `save_to_disk`
_PATIENCE = 3.0  # seconds


def is_saved(path: Path) -> bool:
    """Tell whether ``datasets`` has saved a folder."""
    return any((path / name).is_file() for name in (SAVED, SAVED_SPLITS))


def read_saved(path: Path, split: str | None) -> Source:
    """Read one split of a folder that ``datasets`` has saved. Raise TextError where it cannot be."""
    return _of_dataset(saved_split(path, split), str(path))


def read_hub(asked: PromptsConfig) -> Source:
    """Read one split of a data set on the hub. Raise TextError where it cannot be had."""
    return _of_dataset(_from_hub(asked), asked.source)


def _of_dataset(dataset: Any, name: str) -> Source:
    """Return the rows of a data set of ``datasets``; classes are their names."""
    features = dataset.features
    schema = features.arrow_schema
    kept = plain_columns(schema)
    names: dict[str, Callable[[int], str]] = {
        column: features[column].int2str for column in kept if hasattr(features[column], "int2str")
    }
    rows: list[Read] = []
    for place, row in rows_of(name, dataset.select_columns(kept).with_format("arrow").iter(BATCH)):
        for column in names.keys() & row.keys():
            row[column] = names[column](row[column]) if row[column] >= 0 else ""  # -1 is none of the classes
        rows.append((place, row))
    if not rows:
        raise TextError(f"{name} has no rows")
    return Source(rows, kept, None if name.startswith(HUB) else Path(name), unread_columns(schema))


def saved_split(path: Path, split: str | None) -> Any:
    """Return one split of what ``datasets`` has saved, itself a data set. Raise TextError where it cannot be."""
    from datasets import DatasetDict, load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        found = load_from_disk(str(path))
    except (DatasetsError, OSError, ValueError, KeyError) as error:
        raise TextError(f"{path} cannot be read as a saved data set ({_said(error)})") from error
    if isinstance(found, DatasetDict):
        return found[chosen_split(str(path), map(str, found), split)]
    if split is not None:
        raise TextError(f"{path} is one data set, which has no splits; leave `split` out")
    return found


def _from_hub(asked: PromptsConfig) -> Any:
    """Return one split of a data set on the hub, or of its copy in the cache of ``datasets`` where that is offline."""
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name, split = asked.source.removeprefix(HUB), asked.split
    _check_name(asked.source)
    if not HF_HUB_OFFLINE:
        _check_reachable(asked)
    try:
        if split is None and HF_HUB_OFFLINE:
            found = load_dataset(name, asked.subset, revision=asked.revision)
            return found[chosen_split(asked.source, map(str, found), None)]  # type: ignore[index]
        if split is None:
            names = get_dataset_split_names(name, asked.subset, revision=asked.revision)
            split = chosen_split(asked.source, names, None)
        return load_dataset(name, asked.subset, split=split, revision=asked.revision)
    except (DatasetsError, OSError, ValueError) as error:
        cached = "; HF_HUB_OFFLINE is set, and it is not in the cache of datasets" if HF_HUB_OFFLINE else ""
        raise TextError(f"{asked.source} cannot be read ({_said(error)}){cached}") from error


def _check_name(source: str) -> None:
    """Raise TextError for what is no name of a data set, such as a path, which ``datasets`` would read."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source.removeprefix(HUB))
    except HFValidationError as error:
        raise TextError(f"{source} is no name of a data set; write hub:owner/name") from error


def _check_reachable(asked: PromptsConfig) -> None:
    """Raise TextError where the hub does not answer at once, or has no such data set; ``datasets`` tries for long."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(asked.source.removeprefix(HUB), revision=asked.revision, timeout=_PATIENCE)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        wrong = {
            GatedRepoError: "is open only to who asked for it there; ask, and log in by `hf auth login`",
            RevisionNotFoundError: f"has no revision {asked.revision!r}",
        }
        said = wrong.get(
            type(error), "is not on the hub, or is private; correct the name, or log in by `hf auth login`"
        )
        raise TextError(f"{asked.source} {said}") from error
    except Exception as error:  # of whichever HTTP library that one is made with
        raise TextError(
            f"{asked.source} cannot be had: the hub does not answer ({_said(error)}); give a file, or set "
            "HF_HUB_OFFLINE=1 where the data set is in the cache"
        ) from error


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
