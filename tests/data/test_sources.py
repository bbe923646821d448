"""Prompts from every form that people have them in: the same rows, the same order, and what is wrong by its place."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from flowalign.config.prompts import PromptsConfig
from flowalign.data.prompts import GroupSampler, evaluation_batch
from flowalign.data.promptsets import PromptsError, load_prompts, placed_prompts

ROWS: list[dict[str, str]] = [
    {"prompt": 'a "red" dog,\nasleep', "task": "colors", "negative_prompt": "blurry", "note": "7"},
    {"prompt": "NA", "task": "counting", "note": "7"},
    {"prompt": "naïve 猫 \U0001f600", "task": "colors"},
    {"prompt": "two  cats", "task": "counting", "negative_prompt": "bad text", "note": "nan"},
]
COLUMNS: tuple[str, ...] = ("prompt", "task", "negative_prompt", "note")


def write_table(path: Path, separator: str = ",", end: str = "\n", mark: str = "") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        table = csv.writer(file, delimiter=separator, lineterminator=end)
        table.writerows([COLUMNS, *([row.get(name, "") for name in COLUMNS] for row in ROWS)])
    return path


def arrow() -> pyarrow.Table:
    pictures = pyarrow.array([b"\x89PNG"] * len(ROWS), pyarrow.binary())
    columns = {name: pyarrow.array([row.get(name) for row in ROWS]) for name in COLUMNS}
    return pyarrow.table({**columns, "picture": pictures, "embedding": [[0.5, 1.5]] * len(ROWS)})


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(arrow(), path)
    return path


def write_folder(path: Path) -> Path:
    """A repository of a data set as the hub lays it out: two pieces of one split, and another split."""
    (path / "data").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    for number, piece in enumerate((arrow().slice(0, 3), arrow().slice(3))):
        pyarrow.parquet.write_table(piece, path / "data" / f"train-{number:05}-of-00002.parquet")
    pyarrow.parquet.write_table(arrow().slice(0, 1), path / "data" / "test-00000-of-00001.parquet")
    return path


def write_saved(path: Path) -> Path:
    from datasets import ClassLabel, Dataset, DatasetDict

    rows = Dataset(arrow()).cast_column("task", ClassLabel(names=["counting", "colors"]))
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(path))
    return path


FORMS: dict[str, Callable[[Path], Path]] = {
    "rows.csv": write_table,
    "excel.csv": lambda path: write_table(path, end="\r\n", mark="\ufeff"),
    "rows.tsv": lambda path: write_table(path, "\t"),
    "rows.parquet": write_parquet,
    "repository": write_folder,
    "saved": write_saved,
}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def drawn(prompts: str | PromptsConfig) -> list[str]:
    sampler = GroupSampler(load_prompts(prompts), groups=2, group_size=1, seed=3)
    return [prompt for iteration in range(6) for prompt in sampler.batch(iteration).prompts]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows_and_the_same_draws(name: str, tmp_path: Path, lines: Path) -> None:
    source = str(FORMS[name](tmp_path / name))
    assert load_prompts(source) == load_prompts(str(lines)) == ROWS
    assert drawn(source) == drawn(str(lines))
    for seed in range(3):
        shuffled = [load_prompts(PromptsConfig(source=own, shuffle=seed)) for own in (source, str(lines))]
        assert shuffled[0] == shuffled[1]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes('\ufeff a red dog \r\n\r\n"quoted", {odd} # all of it\r\n猫'.encode())
    assert load_prompts(str(path)) == [
        {"prompt": "a red dog"},
        {"prompt": '"quoted", {odd} # all of it'},
        {"prompt": "猫"},
    ]
    assert [str(place) for place, _ in placed_prompts(str(path))] == [f"{path}, line {n}" for n in (1, 3, 4)]
    path.write_text('{"prompt": "a row all the same", "tag": "colors"}\n')
    assert load_prompts(str(path)) == [{"prompt": "a row all the same", "tag": "colors"}]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A data set that was downloaded before: in the cache of ``datasets``, with the hub out of reach."""
    import datasets.config

    cache, repository = tmp_path / "cache", write_folder(tmp_path / "repository")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    built = datasets.load_dataset(str(repository / "data"), cache_dir=str(cache))
    folder = Path(built["train"].cache_files[0]["filename"]).parent  # type: ignore[index]
    known = cache / "owner___name" / "default" / "0.0.0" / ("0123456789" * 4)
    shutil.copytree(folder, known)
    for file in known.glob("*.arrow"):
        file.rename(file.with_name(f"name-{file.name.split('-', 1)[1]}"))
    yield "hub:owner/name"


def test_a_data_set_of_the_hub_is_read_from_the_cache_where_the_hub_is_out_of_reach(hub: str, lines: Path) -> None:
    assert load_prompts(hub) == load_prompts(str(lines))
    assert load_prompts(PromptsConfig(source=hub, split="test")) == ROWS[:1]
    assert str(placed_prompts(hub)[1][0]) == "hub:owner/name, row 2"
    with pytest.raises(PromptsError, match=r"hub:owner/other cannot be read .*HF_HUB_OFFLINE is set"):
        load_prompts("hub:owner/other")


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PromptsError, match=r"^data\.prompts: hub:nobody/there cannot be had: the hub does not answer"):
        load_prompts("hub:nobody/there")


def section(path: Path, **keys: Any) -> PromptsConfig:
    return PromptsConfig(source=str(path), **keys)


def test_columns_are_named_and_an_old_name_means_nothing_any_more(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("text,kind,prompt,negative_prompt\na dog,animals,summary,blurry\n")
    asked = section(path, columns={"prompt": "text", "task": "kind", "negative_prompt": None})
    assert load_prompts(asked) == [{"prompt": "a dog", "task": "animals"}]
    twice = section(path, columns={"prompt": "text", "text": "text"})
    assert load_prompts(twice) == [{"prompt": "a dog", "text": "a dog", "kind": "animals", "negative_prompt": "blurry"}]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"score": 5}, "a"),
        ({"score": ["5", 6.5]}, "ab"),
        ({"score": {"min": 6}}, "bc"),
        ({"score": {"min": 5, "max": 6.5}, "kind": "x"}, "a"),
        ({"kind": None}, "d"),
        ({"good": True}, "ac"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_filter_keeps_the_same_rows_of_numbers_and_of_texts(
    where: Any, kept: str, ending: str, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "a", "score": 5, "kind": "x", "good": True},
        {"prompt": "b", "score": 6.5, "kind": "y", "good": False},
        {"prompt": "c", "score": 7, "kind": "x", "good": True},
        {"prompt": "d"},
    ]
    path = tmp_path / f"p.{ending}"
    if ending == "csv":
        path.write_text("prompt,score,kind,good\na,5,x,true\nb,6.5,y,false\nc,7,x,true\nd,,,\n")
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        scores = pyarrow.array([str(row["score"]) if "score" in row else None for row in rows])
        others = {name: pyarrow.array([row.get(name) for row in rows]) for name in ("prompt", "kind", "good")}
        pyarrow.parquet.write_table(pyarrow.table({**others, "score": scores}), path)
    assert "".join(row["prompt"] for row in load_prompts(section(path, where=where))) == kept


def test_a_shuffle_depends_on_the_rows_alone_and_parts_of_it_are_disjoint(tmp_path: Path) -> None:
    path, other = tmp_path / "p.txt", tmp_path / "other.txt"
    names = [f"prompt {number}" for number in range(40)]
    path.write_text("\n".join(names))
    other.write_text("\n".join(reversed(names)))
    shuffled = [row["prompt"] for row in load_prompts(section(path, shuffle=5))]
    assert shuffled == [row["prompt"] for row in load_prompts(section(other, shuffle=5))]
    assert sorted(shuffled) == sorted(names) and shuffled not in (names, names[::-1])
    held_out = evaluation_batch(section(path, shuffle=5, limit=10), 10).prompts
    learned = [row["prompt"] for row in load_prompts(section(path, shuffle=5, skip=10))]
    assert [*held_out, *learned] == shuffled


def test_empty_rows_and_duplicates_are_left_out_where_that_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,task\na,x\n"",x\n  ,y\na,y\nb,\n')
    with pytest.raises(PromptsError, match=r'p\.csv, line 3: "prompt" is missing.*drop: \[empty\] \(1 more row is'):
        load_prompts(str(path))
    assert [row["prompt"] for row in load_prompts(section(path, drop=["empty"]))] == ["a", "a", "b"]
    assert [row["prompt"] for row in load_prompts(section(path, drop=["empty", "duplicates"]))] == ["a", "b"]


def test_a_pass_draws_a_row_as_often_as_its_weight_says(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,times\na,3\nb,1\nc,0\n")
    rows = load_prompts(section(path, columns={"weight": "times"}))
    assert rows == [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}]
    sampler = GroupSampler(rows, groups=4, group_size=1, seed=0)
    assert [sorted(sampler.batch(iteration).prompts) for iteration in (0, 1)] == [["a", "a", "a", "b"]] * 2


def test_a_folder_is_one_set_of_files_of_one_kind_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "test"):
        (tmp_path / f"{name}.txt").write_text(f"of {name}\n")
    (tmp_path / "LICENSE.txt").write_text("all rights")
    (tmp_path / ".hidden.txt").write_text("not this")
    assert [row["prompt"] for row in load_prompts(str(tmp_path))] == ["of a", "of b"]
    assert [row["prompt"] for row in load_prompts(section(tmp_path, split="test"))] == ["of test"]
    (tmp_path / "c.csv").write_text("prompt\nof c\n")
    with pytest.raises(PromptsError, match=r"holds files of several kinds, a\.txt and c\.csv; give one of them"):
        load_prompts(str(tmp_path))


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    for text in ("one", "another"):
        (tmp_path / "a.txt").write_text(text)
        assert [row["prompt"] for row in load_prompts(section(tmp_path, shuffle=1))] == [text]


TABLE = "prompt,task,score\na dog,x,5\n"
WRONG: list[tuple[str, str | bytes, dict[str, Any], str]] = [
    ("p.csv", "text,id\na dog,1\n", {}, r"p\.csv has no column 'prompt'; it has text, id; .*columns: {prompt: text}"),
    (
        "p.csv",
        TABLE,
        {"columns": {"prompt": "promt"}},
        r"\.columns\.prompt: .*p\.csv has no column 'promt'; did you",
    ),
    (
        "p.csv",
        TABLE,
        {"where": {"kind": "x"}},
        r"\.where\.kind: .*p\.csv has no column 'kind'; it has prompt, task",
    ),
    (
        "p.csv",
        TABLE,
        {"where": {"task": "y"}},
        r"\.where\.task: none of the 1 rows of .* has 'y' there; it has x",
    ),
    ("p.csv", TABLE, {"where": {"task": "x", "score": 6}}, r"\.where\.score: none of the 1 rows"),
    ("p.csv", TABLE, {"where": {"task": {"min": 1}}}, r"p\.csv, line 2: 'task' is 'x', which is no number"),
    ("p.csv", TABLE, {"skip": 1}, r"\.skip: 1 leaves nothing of the 1 rows of .*p\.csv"),
    ("p.csv", TABLE, {"split": "test"}, r"p\.csv is one file, which has no splits; leave `split` out"),
    ("p.csv", TABLE, {"revision": "main"}, r"p\.csv has no revision, which only a data set on the hub has"),
    ("p.csv", TABLE, {"columns": {"weight": "task"}}, r"p\.csv, line 2: the weight is 'x'; write a whole number"),
    (
        "p.csv",
        "prompt,n\na,0\n",
        {"columns": {"weight": "n"}},
        r"\.columns\.weight: all 1 rows of .* have weight 0",
    ),
    ("p.csv", TABLE, {"columns": {"image": "task"}}, r'p\.csv, line 2: "task": .*/x does not exist'),
    ("p.csv", 'prompt,task\n"a\nb",x\n,y\n', {}, r'p\.csv, line 4: "prompt" is missing; write a text'),
    ("p.csv", 'prompt\n"a\nb"\n"c\n', {}, r"p\.csv, line 4 is not CSV .*is a quotation mark missing"),
    ("p.csv", "prompt\na dog, asleep\n", {}, r"p\.csv, line 2 has 2 cells, and the header has 1; .*in quotes"),
    ("p.csv", "prompt;task\na;x\n", {}, r"p\.csv has its cells separated by semicolons .*save it with commas"),
    ("p.csv", "prompt,prompt\na,b\n", {}, r"p\.csv has the column 'prompt' twice"),
    ("p.csv", "prompt,task\n", {}, r"p\.csv has no rows below its header"),
    ("p.csv", "", {}, r"p\.csv is empty"),
    (
        "p.csv",
        "prompt\ncaf\u00e9\n".encode("latin-1"),
        {},
        r"p\.csv, line 2 is not UTF-8: the byte 0xe9 looks",
    ),
    ("p.csv", "prompt\na\n".encode("utf-16"), {}, r"p\.csv looks like UTF-16 text; save it as UTF-8"),
    ("p.csv", b"PK\x03\x04...", {}, r"p\.csv is a zip archive, such as a spreadsheet"),
    ("p.tsv", TABLE, {}, r"p\.tsv has no column 'prompt'; it has prompt,task,score"),
    ("p.txt", "", {}, r"p\.txt is empty; write a prompt a line"),
    ("p.txt", "\n \n", {}, r"p\.txt is empty; write a prompt a line"),
    ("p.txt", "prompt,task\na,x\n", {}, r"p\.txt, line 1 is the head of a table; give the file the ending \.csv"),
    ("p.txt", "a red dog\na\x00b", {}, r"p\.txt, line 2 holds a NUL byte"),
    ("p.jsonl", '{"text": "a"}\n', {}, r"p\.jsonl has no column 'prompt'; it has text; .*columns: {prompt: text}"),
    (
        "p.jsonl",
        '{"x": "a"}\n{"x": 3}',
        {"columns": {"prompt": "x"}},
        r'p\.jsonl, line 2: "x" is a number',
    ),
    ("p.txt", "a red dog\ra cat\r", {}, r"p\.txt has lines that end in a carriage return alone"),
    ("p.txt", "a\n" + "b" * 131_073, {}, r'p\.txt, line 2: "prompt" has 131,073 characters, and at most 131,072'),
    (
        "p.jsonl",
        '{"prompt": 5}\n{"prompt": ""}\n{"prompt": null}\n',
        {"drop": ["empty"]},
        r'p\.jsonl, line 1: "prompt" is a number; write a text$',
    ),
    ("p.jsonl", r'{"prompt": "a", "negative_prompt": "\u0000"}', {}, r'line 1: "negative_prompt" holds a NUL'),
    ("p.jsonl", r'{"prompt": "a", "tag": "b\u0000"}', {}, r'line 1: "tag" holds a NUL'),
    ("p.parquet", b"PAR1 and no more", {}, r"p\.parquet cannot be read as parquet"),
    ("p.parquet", "prompt\na\n", {}, r"p\.parquet cannot be read as parquet"),
]


@pytest.mark.parametrize(("name", "content", "keys", "said"), WRONG)
def test_what_cannot_be_read_or_is_not_there_is_said_with_its_place(
    name: str, content: str | bytes, keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    inside = "" if said.startswith(r"\.") else ": .*"  # of the section
    with pytest.raises(PromptsError, match=rf"^data\.prompts{inside}{said}"):
        load_prompts(section(tmp_path / name, **keys))


@pytest.mark.parametrize("saved", [False, True])
def test_days_and_exact_numbers_of_arrow_are_read_and_what_json_cannot_tell_is_nothing(
    saved: bool, tmp_path: Path
) -> None:
    table = pyarrow.table(
        {
            "prompt": pyarrow.array(["a", "b"], pyarrow.large_string()),
            "often": [Decimal("3"), Decimal("0")],
            "on": [date(2020, 1, 2), None],
            "score": [math.inf, 6.0],
            "known": [{"x": math.nan}, {"x": 1.0}],
        }
    )
    path = tmp_path / "p.parquet"
    if saved:
        datasets.Dataset(table).save_to_disk(path)
    else:
        pyarrow.parquet.write_table(table, path)
    rows = [{"prompt": "a", "on": "2020-01-02", "known": {"x": None}}] * 3
    assert load_prompts(section(path, columns={"weight": "often"})) == rows
    assert load_prompts(section(path, columns={"weight": "often"}, where={"on": "2020-01-02"})) == rows
    assert [row["prompt"] for row in load_prompts(section(path, where={"score": 6}))] == ["b"]


@pytest.mark.parametrize("saved", [False, True])
def test_a_column_of_arrow_that_is_not_read_is_said_where_it_is_asked_for(saved: bool, tmp_path: Path) -> None:
    path = (write_saved if saved else write_parquet)(tmp_path / "p.parquet")
    said = r"has binary in the column 'picture', which is not read; save it as texts or numbers"
    for key, asked in (("columns", {"image": "picture"}), ("where", {"picture": "x"})):
        with pytest.raises(PromptsError, match=rf"^data\.prompts\.{key}\.\w+: .*{said}"):
            load_prompts(section(path, **{key: asked}))


def test_two_columns_of_one_name_are_refused_of_parquet_as_of_a_table(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "p.parquet")
    with pytest.raises(PromptsError, match=r"p\.parquet has the column 'prompt' twice"):
        load_prompts(section(tmp_path / "p.parquet"))


def test_a_filter_finds_what_python_and_its_tables_make_of_a_whole_number_and_of_true(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"n": 6.0}, {"n": 6}, {"n": "6"}, {"n": 6.5}, {"n": True}, {"n": "True"}, {"n": "true"}]
    path.write_text("".join(json.dumps({"prompt": str(at), **row}) + "\n" for at, row in enumerate(rows)))
    kept = {wanted: load_prompts(section(path, where={"n": wanted})) for wanted in (6, True)}
    assert [[row["prompt"] for row in found] for found in kept.values()] == [["0", "1", "2"], ["4", "5", "6"]]


def test_what_is_no_name_of_a_source_is_refused() -> None:
    for source, said in (("", "no source is named"), (" ", "no source"), ("hub:", "no name"), ("hub:../a", "no name")):
        with pytest.raises(PromptsError, match=said):
            load_prompts(source)


def test_a_table_of_no_rows_and_a_row_without_a_prompt_are_said_of_arrow_too(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(PromptsError, match=r"p\.parquet has no rows"):
        load_prompts(str(path))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None]}), path)
    with pytest.raises(PromptsError, match=r'p\.parquet, row 2: "prompt" is missing'):
        load_prompts(str(path))
    write_saved(tmp_path / "saved")
    with pytest.raises(PromptsError, match=r"saved has no split 'dev'; name one as `split`: test, train"):
        load_prompts(section(tmp_path / "saved", split="dev"))
    os.remove(tmp_path / "saved" / "train" / "state.json")
    with pytest.raises(PromptsError, match=r"saved cannot be read as a saved data set"):
        load_prompts(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"where": {"a": {"low": 1}}}, r"a: got {'low': 1}; write a range as"),
        ({"where": {"a": {"min": math.nan}}}, r"a: got {'min': nan}; write a range as"),
        ({"where": {"a": []}}, r"a: the list is empty"),
        ({"where": {"a": [[1]]}}, r"a: got \[\[1\]\]; write a value"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"drop": ["long"]}, "'empty' or 'duplicates'"),
    ],
)
def test_a_section_that_asks_for_nothing_that_there_is_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PromptsConfig(source="p.csv", **keys)


def test_a_reference_picture_beside_the_source_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"")
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "image": "0.png"}\n{"prompt": "b", "image": "elsewhere.png"}\n{"prompt": "c"}\n')
    assert [row.get("image") for row in load_prompts(str(path))] == [str(tmp_path / "0.png"), "elsewhere.png", None]
    named = PromptsConfig(source=str(path), columns={"image": "image"})
    with pytest.raises(PromptsError, match=r'p\.jsonl, line 2: "image": .*elsewhere\.png does not exist'):
        load_prompts(named)
