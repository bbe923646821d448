"""Rows of prompts as people have them: text, tables, JSON Lines, parquet, folders of these, data sets of ``datasets``.

The same rows come out of each form, in the order in which they stand: a text, a number, true or false under the name of
its column, and no key where a table has nothing. torch is not needed for that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flowalign.config.prompts import HUB, PromptsConfig
from flowalign.data.captiontable import split_of
from flowalign.data.images import visible
from flowalign.record.csvfiles import read_csv
from flowalign.record.textfiles import TextError, is_there, json_rows, lines_of, parse_json, read_text
from rewards.missing import hint

Row = dict[str, Any]
EXAMPLE = (
    '{"prompt": "a red dog"}, for the reward geneval {"prompt": "a red dog", "tag": "colors", '
    '"include": [{"class": "dog", "count": 1, "color": "red"}]}'
)
SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
FORMS = "a .txt, .csv, .tsv, .jsonl or .parquet file, a folder of such files, or hub:owner/name"
HEADS = ("prompt", "caption", "text")  # of a table's column of prompts, as a text file's first line betrays one
SAVED, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"  # of `save_to_disk`
TRAIN = "train"
_EMPTY = {
    ".txt": "is empty; write a prompt a line",
    **dict.fromkeys(SEPARATORS, "has no rows below its header; write a prompt a line"),
    ".parquet": "has no rows",
}
_UNREAD = ("readme", "license", "licence", "requirements", "notice")
_PATIENCE = 3.0  # seconds
_BATCH = 4096  # rows of a table that are Python objects at once


class Place(NamedTuple):
    """Where a row stands: line or row ``number``, from 1, of a file or a data set."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, {self.short}"

    @property
    def short(self) -> str:
        """The line or row alone."""
        return f"{self.unit} {self.number}"


Read = tuple[Place, "Row | TextError"]


class Source(NamedTuple):
    """What a source holds: its rows, or in the place of one what is wrong with it; the names of all its columns, and
    the folder that paths in a row start from, where it has one."""

    rows: list[Read]
    columns: list[str]
    folder: Path | None = None


def read_source(asked: PromptsConfig) -> Source:
    """Read all rows of a source, whatever of them is asked for.

    Raises:
        TextError: there is no such source, it is empty, or it cannot be read.
    """
    if asked.source.startswith(HUB):
        return _of_dataset(_from_hub(asked), asked.source)
    path = Path(asked.source)
    if asked.subset is not None or asked.revision is not None:
        name = "revision" if asked.subset is None else "subset"
        raise TextError(
            f"{path} has no {name}, which only a data set on the hub has; leave it out, or give hub:owner/name"
        )
    if not is_there(path):
        raise TextError(f"{path} does not exist{hint(path)}; give shapes:train, shapes:eval, {FORMS}")
    if path.is_dir() and any((path / name).is_file() for name in (SAVED, SAVED_SPLITS)):
        return _of_dataset(_saved(path, asked.split), str(path))
    files = files_of(path, asked.split)
    rows = [read for file in files for read in read_file(file)]
    if not rows:
        raise TextError(f"{path} {_EMPTY.get(files[0].suffix.lower(), f'is empty; write a row a line: {EXAMPLE}')}")
    columns = dict.fromkeys(name for _, row in rows if not isinstance(row, TextError) for name in row)
    header = _header(files[0]) if files[0].suffix.lower() in SEPARATORS else []
    return Source(rows, list(dict.fromkeys((*header, *columns))), path if path.is_dir() else path.parent)


def state_of(source: str) -> tuple[Any, ...]:
    """Return what changes when the files of a source do; of one on the hub nothing that is known here."""
    path = Path(source)
    if source.startswith(HUB) or not is_there(path):
        return ()
    files = [path] if path.is_file() else visible(path, "*")
    states = [(str(file), file.stat()) for file in files]
    return tuple((name, state.st_mtime_ns, state.st_size, state.st_ino) for name, state in states)


def files_of(path: Path, split: str | None) -> list[Path]:
    """Return the files of prompts that a path leads to: itself, or those of a split in a folder, in the order of names.

    Folders, and files whose names begin so, that are called train, validation or test say which split; all others
    belong to train.

    Raises:
        TextError: there are none, they are of several kinds, or there is no such split.
    """
    if not path.is_dir():
        if split is not None:
            raise TextError(f"{path} is one file, which has no splits; leave `split` out")
        return [path]
    known = (".txt", *SEPARATORS, *JSON_LINES, ".parquet")
    files = [file for file in visible(path, "*") if file.suffix.lower() in known and file.stem.lower() not in _UNREAD]
    if not files:
        raise TextError(f"{path} is a directory without prompts; it needs {FORMS.split(' file')[0]} files")
    if len(kinds := list(dict.fromkeys(file.suffix.lower() for file in files))) > 1:
        named = " and ".join(next(file.name for file in files if file.suffix.lower() == kind) for kind in kinds[:2])
        raise TextError(f"{path} holds files of several kinds, {named}; give one of them")
    of = {file: _split_of(file.relative_to(path)) for file in files}
    wanted = chosen_split(str(path), list(dict.fromkeys(of.values())), split)
    return [file for file, own in of.items() if own == wanted]


def _split_of(path: Path) -> str:
    first = re.split(r"[-._\s\d]+", path.stem)[0]
    return split_of(path.parent) or split_of(Path(first)) or TRAIN


def chosen_split(source: str, known: Iterable[str], split: str | None) -> str:
    """Return the split that is asked for: by default train, or the only one. Raise TextError where there is none."""
    there = sorted(known)
    if split is None and (TRAIN in there or len(there) == 1):
        return TRAIN if TRAIN in there else there[0]
    if split in there:
        return str(split)
    which = f"has no split {split!r}" if split is not None else "has several splits and none is called train"
    raise TextError(f"{source} {which}; name one as `split`: {', '.join(there)}")


def read_file(path: Path) -> Iterator[Read]:
    """Yield the rows of one file by the ending of its name; what has none of those known is JSON Lines.

    Raises:
        TextError: the file cannot be read, or is something else as a whole.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _of_parquet(path)
    elif suffix in SEPARATORS:
        yield from _of_table(path)
    elif suffix == ".txt" and not _is_json_lines(path):
        yield from _of_lines(path)
    else:
        yield from ((Place(str(path), "line", number), row) for number, row in json_rows(path, EXAMPLE))


def _is_json_lines(path: Path) -> bool:
    """Tell whether a text file holds rows all the same; older versions read every file so."""
    first = next((line for _, line in lines_of(read_text(path))), "").lstrip()
    if not first.startswith("{"):
        return False
    try:
        return isinstance(parse_json(first, ""), dict)
    except TextError:
        return False


def _of_lines(path: Path) -> Iterator[Read]:
    for place, (number, line) in enumerate(lines_of(read_text(path))):
        if place == 0:
            refuse_head(line, f"{path}, line {number}")
        yield Place(str(path), "line", number), {"prompt": line.strip()}


def refuse_head(line: str, where: str) -> None:
    """Raise TextError for a first line that is no prompt, but the head of a table."""
    columns = [name.strip().strip("\"'").casefold() for name in re.split(r"[,;\t|]", line)]
    if any(name in HEADS for name in columns) and "" not in columns:
        raise TextError(
            f"{where} is the head of a table; give the file the ending .csv (.tsv with tabs), or drop the line"
        )


def _header(path: Path) -> list[str]:
    return [name for name in next(read_csv(path, SEPARATORS[path.suffix.lower()]))[1] if name]


def _of_table(path: Path) -> Iterator[Read]:
    rows = read_csv(path, SEPARATORS[path.suffix.lower()])
    _, header = next(rows)
    for line, cells in rows:
        row = {name: cell for name, cell in zip(header, cells, strict=True) if name and cell.strip()}
        yield Place(str(path), "line", line), row


def _of_parquet(path: Path) -> Iterator[Read]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            kept = [field.name for field in file.schema_arrow if _is_plain(field.type)]
            number = 0
            for batch in file.iter_batches(_BATCH, columns=kept):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(str(path), "row", number), _filled(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} cannot be read as parquet ({' '.join(str(error).split())})") from error


def _is_plain(kind: Any) -> bool:
    """Tell whether a column is carried along: not pictures, sounds and embeddings, which fill the memory."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return not types.is_floating(kind.value_type) and _is_plain(kind.value_type)
    plain = (types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating)
    return any(is_kind(kind) for is_kind in plain)


def _filled(row: Mapping[str, Any]) -> Row:
    """Return a row of a table without what is nothing: null, and a number that is none."""
    return {
        name: value
        for name, value in row.items()
        if not (value is None or (type(value) is float and math.isnan(value)))
    }


def _of_dataset(dataset: Any, name: str) -> Source:
    """Return the rows of a data set of ``datasets``; classes are their names."""
    features = dataset.features
    kept = [field.name for field in features.arrow_schema if _is_plain(field.type)]
    names: dict[str, Callable[[int], str]] = {
        column: features[column].int2str for column in kept if hasattr(features[column], "int2str")
    }
    rows: list[Read] = []
    for batch in dataset.select_columns(kept).with_format("arrow").iter(_BATCH):
        for row in batch.to_pylist():
            filled = _filled(row)
            for column in names.keys() & filled.keys():
                filled[column] = names[column](filled[column]) if filled[column] >= 0 else ""
            rows.append((Place(name, "row", len(rows) + 1), filled))
    if not rows:
        raise TextError(f"{name} has no rows")
    return Source(rows, list(dataset.column_names), None if name.startswith(HUB) else Path(name))


def _saved(path: Path, split: str | None) -> Any:
    """Return one split of what ``datasets`` has saved."""
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


def _check_reachable(asked: PromptsConfig) -> None:
    """Raise TextError where the hub does not answer at once, or has no such data set; ``datasets`` tries for long."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(asked.source.removeprefix(HUB), revision=asked.revision, timeout=_PATIENCE)
    except (GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        wrong = {
            GatedRepoError: "is open only to who asked for it there; ask, and log in by `hf auth login`",
            HFValidationError: "is no name of a data set; write hub:owner/name",
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
