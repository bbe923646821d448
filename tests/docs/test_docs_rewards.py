"""``docs/rewards.md`` says what is: its examples run, its configurations load, its cards fit the code."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import rewards.scorers
from flowalign.intake.file import load_align
from flowalign.samples.differentiable import differentiable_score
from flowalign.samples.offers import EVALUATION, LEARNER, PREFERENCES, TRAINING, TRY_REWARD
from rewards.geneval.detectors.mask2former import Mask2formerDetector
from rewards.geneval.detectors.palette import PaletteDetector
from rewards.http.client import HttpScorer
from rewards.interface import Asked, score_batch
from rewards.question import NEEDS
from rewards.resolve import builtin_names, check, resolve
from rewards.serving.app import OFFERS
from rewards.serving.batching import Batching
from rewards.serving.doors import SPARE_FILES, Doors
from rewards.serving.room import PACE
from rewards.wire import Limits
from tests.rewards.conftest import Server

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
QUICKSTART = ROOT / "configs" / "shapes" / "flow_grpo.yaml"
CARDS = {title: text for title, text in re.findall(r"^### `(\w+)`\n(.*?)(?=^### |\Z)", PAGE, re.M | re.S)}
# What the examples name and this repository does not have, as far as a check without loading looks.
NEEDED = (
    "mask2former/config.json",
    "PickScore_v1/config.json",
    "PickScore_v1/preprocessor_config.json",
    "HPS_v2.1_compressed.pt",
    "aesthetic.safetensors",
    *(f"ImageReward/{name}" for name in ("ImageReward.pt", "med_config.json", "vocab.txt")),
    *(f"HPSv3/{name}" for name in ("HPSv3.safetensors", "config.json", "preprocessor_config.json")),
    *("HPSv3/tokenizer_config.json", "HPSv3/instruction.txt"),
)
WORDS = {"HPSv3/instruction.txt": "{text_prompt} <|Reward|>"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def python(name: str) -> str:
    """The example whose first line is a comment that begins with ``name``."""
    return next(block for block in blocks("python") if block.startswith(f"# {name}"))


def commands(part: str) -> list[list[str]]:
    """Command lines of the page that contain ``part``, as words."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if part in line]


@pytest.fixture
def author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the page's first example and a folder of drawn pictures where it has its samples."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text(python("my_reward.py"))
    (tmp_path / "before").mkdir()
    for index, level in enumerate((0, 51, 102)):
        Image.new("RGB", (16, 16), (level,) * 3).save(tmp_path / "before" / f"{index:04d}.png")
    return tmp_path


def test_the_page_begins_with_at_most_ten_lines_a_function_of_four_and_the_commands_to_try_and_train_it() -> None:
    first, second = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)[:2]
    assert (first[0], second[0]) == ("python", "bash") and first[1] == python("my_reward.py")
    assert first[1].count("\n") == 4 and first[1].count("\n") + second[1].count("\n") <= 10


def test_the_first_example_scores_a_folder_of_pictures(author: Path) -> None:
    arguments = commands("flowalign try-reward")[0]
    done = subprocess.run(
        [sys.executable, "-m", "flowalign.cli", *arguments[1:], "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["scores"] == {"brightness": [0.0, 0.2, 0.4]}


def test_the_first_example_s_override_makes_the_quickstart_train_on_it(author: Path) -> None:
    _, command, config, *overrides = commands("flowalign align")[0]
    assert (command, ROOT / config) == ("align", QUICKSTART)
    loaded = load_align(QUICKSTART, overrides).config
    assert [(reward.spec, reward.label) for reward in loaded.rewards] == [
        (f"{author / 'my_reward.py'}:brightness", "brightness")
    ]
    assert loaded.iterations == 10 and loaded.name in PAGE.replace(" ".join(overrides), "")


def test_the_picture_of_the_first_example_is_there_and_small() -> None:
    shown = re.findall(r"!\[.*?\]\((.*?)\)", PAGE)
    assert shown
    for name in shown:
        with Image.open(ROOT / "docs" / name) as picture:
            assert picture.width <= 1200
        assert (ROOT / "docs" / name).stat().st_size < 150_000


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda text: text.splitlines()[-1].strip()[:40])
def test_every_configuration_of_the_page_passes_the_check_of_a_run(author: Path, block: str) -> None:
    for name in NEEDED:
        (author / name).parent.mkdir(exist_ok=True)
        (author / name).write_text(WORDS.get(name, "{}"))
    raw = yaml.safe_load(QUICKSTART.read_text())
    given = yaml.safe_load(block)
    algorithm = {**raw["algorithm"], **given.pop("algorithm", {})}
    (author / "run.yaml").write_text(yaml.safe_dump({**raw, **given, "algorithm": algorithm}))
    loaded = load_align(author / "run.yaml").config
    assert len(loaded.rewards) == len(given["rewards"])


def test_the_class_of_the_page_is_a_reward_by_its_file_and_takes_its_option(author: Path) -> None:
    (author / "sharpness.py").write_text(python("sharpness.py"))
    flat, striped = np.zeros((2, 8, 8, 3), np.uint8)
    striped[:, ::2] = 2
    scorer = resolve({"type": "sharpness.py:Sharpness", "power": 3}, author)
    assert scorer.score(np.stack([flat, striped]), ["", ""], [{}, {}])["sharpness"].tolist() == [0.0, 8.0]


def test_the_class_with_needs_of_the_page_is_asked_for_a_group_and_a_run_takes_it(author: Path) -> None:
    (author / "variety.py").write_text(python("variety.py"))
    check("variety.py:Variety", author, TRAINING)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[3] = 8
    asked = Asked(images, [""] * 4, [{}] * 4, groups=[5] * 4)
    scores = score_batch("Variety", resolve("variety.py:Variety", author, TRAINING), asked).scores
    assert scores["variety"].tolist() == [2.0, 2.0, 2.0, 6.0]


def test_the_table_of_needs_is_all_that_is_known_and_says_who_offers_each() -> None:
    rows = {row[0]: row[2] for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", PAGE, re.M) if row[0] in NEEDS}
    assert tuple(rows) == ("group", "latents", "references", "gradient") and set(rows) == set(NEEDS)
    for offers, words in ((TRAINING, "rewards` of a run"), (EVALUATION, "evaluations"), (PREFERENCES, "make-pref")):
        assert {need for need, who in rows.items() if words in who} == offers.needs
    assert not OFFERS.needs and not TRY_REWARD.needs
    assert {need for need, who in rows.items() if "a learner" in who} == LEARNER.needs


def test_the_reward_with_a_gradient_of_the_page_is_asked_for_one(author: Path) -> None:
    (author / "warm.py").write_text(python("warm.py"))
    check("warm.py:Warm", author, LEARNER)
    pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
    asked = Asked(np.zeros((2, 4, 4, 3), np.uint8), [""] * 2, [{}] * 2, pixels=pixels)
    score = differentiable_score("Warm", resolve("warm.py:Warm", author, LEARNER), asked)
    (grad,) = torch.autograd.grad(score.sum(), pixels)
    assert torch.equal(grad[:, :, 0, 0], torch.tensor([[1.0, 0.0, -1.0]] * 2) / 16)


def test_the_entry_point_of_the_page_names_that_class_in_the_group_that_is_looked_in() -> None:
    from rewards.resolve import ENTRY_POINTS

    (snippet,) = blocks("toml")
    assert snippet.count("\n") <= 3
    points = tomllib.loads(snippet)["project"]["entry-points"]
    assert list(points) == [ENTRY_POINTS] and points[ENTRY_POINTS]["sharpness"].endswith(":Sharpness")


def test_the_conversion_of_the_aesthetic_head_makes_a_head_that_loads(
    author: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    from rewards.models.linear import chain

    layers = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise((768, 1024, 128, 64, 16, 1))))
    weights = {f"layers.{key}": value for key, value in layers.state_dict().items()}
    torch.save(weights, "sac+logos+ava1-l14-linearMSE.pth")
    exec(python("Once"), {})
    assert len(chain("aesthetic", "aesthetic.safetensors", load_file("aesthetic.safetensors"))) == 5


def test_the_words_of_hpsv3_are_read_from_its_package_and_none_of_its_code_runs(author: Path) -> None:
    source = 'raise SystemExit\nINSTRUCTION = """Rate\n{text_prompt}"""\nprompt_with_special_token = "<|Reward|>\\n"\n'
    with zipfile.ZipFile("hpsv3-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("hpsv3/dataset/data_collator_qwen.py", source)
    Path("HPSv3").mkdir()
    exec(python("Words"), {})
    assert Path("HPSv3/instruction.txt").read_text() == "Rate\n{text_prompt}<|Reward|>\n"


@pytest.fixture
def served(author: Path) -> Iterator[Server]:
    server = Server(f"{author / 'my_reward.py'}:brightness")
    yield server
    server.kill()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_form_of_the_page_is_answered_as_it_says(served: Server) -> None:
    (arguments,) = commands("curl")
    arguments = [re.sub(r"http://127\.0\.0\.1:\d+", served.url, argument) for argument in arguments]
    answer = json.loads(subprocess.run([*arguments, "-sS"], capture_output=True, text=True, check=True).stdout)
    assert answer == {"scores": {"brightness": [0.0, 0.2]}}
    assert list(json.loads(re.search(r'`(\{"scores".*?\})`', PAGE)[1])["scores"]) == ["brightness"]  # type: ignore[index]


def test_the_servers_of_the_page_have_options_that_exist() -> None:
    from typer.testing import CliRunner

    from flowalign.cli import app

    known = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve-reward", "--help"]).output
    used = {part for command in commands("flowalign serve-reward") for part in command if part.startswith("--")}
    used |= set(re.findall(r"`(--max-[\w-]+)`", PAGE))
    assert len(used) >= 4 and all(option in known for option in used)


def test_the_limits_of_the_page_are_the_server_s() -> None:
    limits, batching, text = Limits(), Batching(), " ".join(PAGE.split())
    line = next(line for line in PAGE.splitlines() if line.startswith("- Limits:"))
    side = int(limits.max_pixels**0.5)
    assert [int(number) for number in re.findall(r"\d+", line.replace(",", ""))] == [
        limits.max_bytes >> 20, limits.max_count, side, side, limits.min_side, limits.max_decoded_pixels // 10**6,
    ]  # fmt: skip
    doors = Doors()
    for words in (
        f"head has {doors.head_s:g} s, its body {doors.body_s:g} s",
        f"Up to {doors.held_bytes >> 20} MiB of requests are held",
        f"More wait for {doors.wait_s:g} s at most",
        f"slower than {PACE >> 10} KiB/s",
        f"There are {doors.connections:,} at most, and {SPARE_FILES} fewer",
    ):
        assert words in text
    assert f"`--max-wait-ms` ({batching.max_wait_s * 1000:g})" in text
    assert f"`--max-batch-images` ({batching.max_images}" in text


def said(text: str, bullet: str) -> dict[str, str]:
    """Options and what the page has as their defaults, of a bullet such as ``Options of `palette```."""
    found = re.search(rf"^- \*\*{re.escape(bullet)}\*\*: (.*?)(?=^- |^$|\Z)", text, re.M | re.S)
    assert found is not None, f"no {bullet}"
    return dict(re.findall(r"`(\w+)` \(([^),;]*)", " ".join(found[1].split())))


def real(constructor: Any, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Options of a constructor and their defaults, as the page writes them."""
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(constructor).parameters
    return {name: written(parameter.default) for name, parameter in parameters.items() if name not in without}


def written(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, str):
        return default if len(default) <= 40 else "built in"
    return f"{default:g}"


def test_every_scorer_has_a_card_and_every_card_a_scorer() -> None:
    assert sorted(CARDS) == builtin_names()


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_card_says_what_where_from_on_what_with_which_weights_and_options(name: str) -> None:
    bullets = re.findall(r"^- \*\*([\w -]+)\*\*: \S", CARDS[name], re.M)
    assert bullets[:5] == ["Score", "Source", "Runs on", "Weights", "Options"]


@pytest.mark.parametrize("name", builtin_names())
def test_a_card_has_every_option_of_its_scorer_with_its_default_and_no_other(name: str) -> None:
    import importlib

    module = importlib.import_module(f"{rewards.scorers.__name__}.{name}")
    cls = next(value for key, value in vars(module).items() if key == f"{name.title().replace('_', '')}Scorer")
    assert inspect.signature(cls).parameters["device"].default == "cpu"
    assert said(CARDS[name], "Options") == real(cls, without=("device",))


@pytest.mark.parametrize(
    ("text", "bullet", "constructor", "without"),
    [
        (CARDS["geneval"], "Options of `palette`", PaletteDetector, ()),
        (CARDS["geneval"], "Options of `mask2former`", Mask2formerDetector, ()),
        (PAGE, "Options of `url:`", HttpScorer, ("url",)),
    ],
    ids=["palette", "mask2former", "url"],
)
def test_detectors_and_the_client_are_listed_the_same_way(
    text: str, bullet: str, constructor: Any, without: tuple[str, ...]
) -> None:
    assert said(text, bullet) == real(constructor, without=without)
