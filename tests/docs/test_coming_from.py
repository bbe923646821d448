"""The pages for those who come from other projects name keys that exist, and the files that they speak of."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from flowalign.algorithms import algorithm_class
from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import RewardConfig
from flowalign.config.training import PretrainConfig
from flowalign.intake.file import load_align, load_pretrain
from rewards.interface import Asked, score_batch
from rewards.resolve import builtin_names, resolve
from scripts.key_tables import rows, slug

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/coming_from").glob("*.md"))}
WHOLE = {"align": AlignConfig, "pretrain": PretrainConfig}
TABLE = re.compile(r"<!-- their keys: (\w+) (\w+) -->\n(.*?)<!-- end of keys -->", re.S)
NONE = "—"


@cache
def keys_of(command: str, algorithm: str) -> frozenset[str]:
    """All keys of a configuration whose ``algorithm.type`` is that one, by their dots."""
    own = rows(algorithm_class(algorithm).Config, {}, "algorithm.")
    return frozenset(row.key for row in (*rows(WHOLE[command], {}), *own)) | {"algorithm.type"}


def unknown(page: str) -> list[str]:
    """What a page's tables have as keys of ours that are none, and rows without one."""
    found = []
    for command, algorithm, table in TABLE.findall(page):
        keys = keys_of(command, algorithm)
        for line in table.splitlines()[2:]:
            _, _, ours, *_ = re.split(r"(?<!\\)\|", line)
            named = re.findall(r"`([^`]+)`", ours)
            found += [key for key in named if key not in keys]
            found += [] if named or ours.strip() == NONE else [f"a row without a key: {line}"]
    return found


def test_there_is_a_page_for_each_of_the_four() -> None:
    assert set(PAGES) == {"flow_grpo", "flow_factory", "diffusers", "trl"}
    assert all(TABLE.search(page) for page in PAGES.values())


@pytest.mark.parametrize("name", PAGES)
def test_every_key_of_ours_in_a_table_is_one_of_the_schema(name: str) -> None:
    assert unknown(PAGES[name]) == []


def test_a_key_that_is_none_and_a_row_without_one_are_found() -> None:
    marker = "<!-- their keys: align flow_grpo -->\n| a | b | c |\n| --- | --- | --- |\n"
    table = f"{marker}| `x` | `algorithm.groupsize`, `seed` | y |\n| `x` | nothing | a \\| b |\n<!-- end of keys -->"
    assert unknown(table) == ["algorithm.groupsize", "a row without a key: | `x` | nothing | a \\| b |"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_which_files_of_which_commit_were_read_and_what_to_expect(name: str) -> None:
    assert re.search(r"^Read: .*?[\w-]+/[\w.-]+\s+at [0-9a-f]{7}", PAGES[name], re.M | re.S)
    expected = re.search(r"^## What to expect\n(.*?)^## ", PAGES[name], re.M | re.S)
    assert expected is not None and 3 <= len(re.findall(r"^- ", expected[1], re.M)) <= 5


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_to_a_heading(name: str) -> None:
    for file, anchor in re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]*))?\)", PAGES[name]):
        headings = re.findall(r"^#+ .+$", (ROOT / "docs/coming_from" / file).read_text(encoding="utf-8"), re.M)
        assert not anchor or anchor in {slug(heading) for heading in headings}, f"{file}#{anchor}"


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("name", PAGES)
def test_a_command_of_a_page_runs_a_file_that_is_there_and_a_configuration_that_is_accepted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGES[name], re.M | re.S):
        (tmp_path / code[0]).write_text(code[1])
    monkeypatch.chdir(tmp_path)
    for words in commands(PAGES[name]):
        assert words[0] in ("flowalign", "python")
        files = [word for word in words if word.startswith(("configs/", "scripts/"))]
        assert all((ROOT / file).is_file() for file in files), words
        if words[1] in ("align", "plan") and files:
            load_align(ROOT / files[0], words[3:], require_files=False)


def test_a_configuration_on_a_page_is_accepted(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", PAGES["diffusers"], re.M | re.S)
    (tmp_path / "mine.yaml").write_text(example)
    loaded = load_pretrain(tmp_path / "mine.yaml", ["model.path=shapes"], require_files=False)
    assert loaded.config.total == 500 and loaded.notes == ()


def test_a_reward_of_a_page_scores_images(tmp_path: Path) -> None:
    for page in ("flow_grpo", "trl"):
        (code,) = re.findall(r"^```python\n# my_reward\.py\n(.*?)^```$", PAGES[page], re.M | re.S)
        (tmp_path / f"{page}.py").write_text(code)
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, ..., 0], images[1] = 255, 51
    scores = {
        name: score_batch(name, resolve(f"{page}.py:{name}", tmp_path), Asked(images, ["a", "b"], [{}, {}]))
        for page, name in (("flow_grpo", "red"), ("trl", "brightness"))
    }
    assert scores["red"].scores["red"].tolist() == pytest.approx([1, 0])
    assert scores["brightness"].scores["brightness"].tolist() == pytest.approx([1 / 3, 0.2])
    (rewards,) = re.findall(r"^```yaml\n(rewards:.*?)^```$", PAGES["flow_grpo"], re.M | re.S)
    assert RewardConfig.model_validate(yaml.safe_load(rewards)["rewards"][0]).spec == "my_reward.py:red"


def test_every_reward_of_a_page_is_a_scorer() -> None:
    table = PAGES["flow_grpo"].partition("| `reward_fn` | `spec` |")[2].partition("\n\n")[0].splitlines()[2:]
    named = {name for line in table for name in re.findall(r"`([^`]+)`", line.split("|")[2])}
    assert {"imagereward", "hpsv3", "hps"} <= named <= set(builtin_names())
