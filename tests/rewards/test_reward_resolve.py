from __future__ import annotations

import gc
import logging
import subprocess
import sys

import numpy as np
import pytest

from rewards.http.client import HttpScorer
from rewards.interface import Asked, InvalidScores, SpecError, score_batch
from rewards.resolve import builtin_names, check, resolve
from rewards.scorers.geneval import GenevalScorer

USER = """
import numpy as np
LIMIT = 3
def brightness(images, prompts, metadata, *, scale=1.0):
    return scale * images.mean(axis=(1, 2, 3))
def two(images, prompts, metadata):
    return {"a": [0.0] * len(images), "b": [1.0] * len(images)}
class Area:
    def __init__(self, unit=1):
        self.unit = unit
    def score(self, images, prompts, metadata):
        return {"area": [images.shape[1] * images.shape[2] / self.unit] * len(images)}
class NoScore:
    pass
def takes_two(images, prompts):
    return 0
ready = Area(2)
raise_in_call = lambda images, prompts, metadata: 1 / 0
"""


@pytest.fixture
def user(tmp_path):
    (tmp_path / "mine.py").write_text(USER)
    return tmp_path


def test_a_plain_function_of_a_file_is_a_scorer_named_after_it(user, batch, caplog):
    with caplog.at_level(logging.WARNING, logger="rewards"):
        scorer = resolve("mine.py:brightness", user)
        resolve("mine.py:brightness", user)  # as the judge of evaluations
    checked = score_batch("mine.py:brightness", scorer, Asked(*batch))
    np.testing.assert_allclose(checked.scores["brightness"], batch[0].mean(axis=(1, 2, 3)))
    assert caplog.text.count(f"runs user code from {user / 'mine.py'}") == 1


def test_options_reach_functions_and_classes_by_keyword(user, batch):
    doubled = resolve({"type": "mine.py:brightness", "scale": 2.0}, user)
    np.testing.assert_allclose(doubled.score(*batch)["brightness"], 2 * batch[0].mean(axis=(1, 2, 3)))
    assert resolve({"type": "mine.py:Area", "unit": 10}, user).score(*batch)["area"][0] == 12
    assert resolve("mine.py:ready", user).score(*batch)["area"][0] == 60
    assert set(resolve("mine.py:two", user).score(*batch)) == {"a", "b"}


def test_two_files_of_the_same_name_stay_apart(tmp_path, batch):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(
            f"def f(images, prompts, metadata):\n    return [{value}] * len(images)\n"
        )
    first, second = resolve("a/r.py:f", tmp_path), resolve("b/r.py:f", tmp_path)
    assert (first.score(*batch)["f"][0], second.score(*batch)["f"][0]) == (1.0, 2.0)


def test_builtin_names_urls_and_packages_resolve():
    assert {"clip", "geneval", "jpeg", "pickscore"} <= set(builtin_names())
    scorer = resolve({"type": "geneval", "detector": "palette", "mode": "strict"})
    assert isinstance(scorer, GenevalScorer) and scorer.mode == "strict"
    remote = resolve({"type": "url:http://127.0.0.1:9", "retries": 0})
    assert isinstance(remote, HttpScorer) and remote.url == "http://127.0.0.1:9"
    assert resolve("rewards.scorers.jpeg:JpegScorer").score(np.zeros((1, 8, 8, 3), np.uint8), [""], [{}])["jpeg"][0] < 0


def test_an_installed_entry_point_resolves_by_its_name(tmp_path, monkeypatch, batch):
    (tmp_path / "plugged_reward.py").write_text("def f(images, prompts, metadata):\n    return [7.0] * len(images)\n")
    info = tmp_path / "plugged_reward-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-reward\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flowalign.rewards]\nplugged = plugged_reward:f\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check("plugged")
    assert resolve("plugged").score(*batch)["f"][0] == 7.0


BAD = [
    ("genevall", "did you mean 'geneval'"),
    ("nothing_like_it", "known: .*clip"),
    ({"type": "geneval", "mod": "strict"}, "no option 'mod'; did you mean 'mode'"),
    ({"type": "geneval", "mode": "exact"}, "official, strict, partial"),
    ({"type": "geneval", "detector": "pallete"}, "did you mean 'palette'"),
    ({"type": "geneval", "detector": {"type": "palette", "nope": 1}}, "nope"),
    ({"mode": "strict"}, "no `type`"),
    ("missing.py:reward", "missing.py does not exist"),
    ("mine.py:brightnes", "did you mean 'brightness'"),
    ("mine.py", "write mine.py:reward"),
    ("mine.py:", "not path/to/file.py:reward"),
    ("mine.py:LIMIT", "not a function"),
    ("mine.py:NoScore", "score"),
    ("mine.py:takes_two", "images, prompts"),
    ({"type": "mine.py:brightness", "skale": 2}, "skale"),
    ("broken.py:f", "does not parse|did not run"),
    ("no_such_package.rewards:f", "no_such_package"),
    ("http://127.0.0.1:8000", "write url:http"),
    ("url:ftp://x", "not an address"),
    ("url:http://x:port", "bad port"),
    ({"type": "url:http://x", "retry": 1}, "did you mean 'retries'"),
    ({"type": "clip", "path": "/no/such/dir"}, "open_clip_config.json"),
    ({"type": "clip"}, "either `path`"),
    ({"type": "clip", "model": "ViT-B-32"}, "no `checkpoint`"),
    ({"type": "clip", "model": "ViT-B-32", "checkpoint": "/no/such.safetensors"}, "does not exist"),
    ({"type": "pickscore", "path": "/no/such/dir"}, "config.json"),
    ({"type": "pickscore"}, "path"),
    *(
        ({"type": name, "path": "x" * 300}, "holds no")
        for name in ("clip", "clip_iqa", "hpsv3", "imagereward", "pickscore")
    ),
    ({"type": "aesthetic", "head": "x" * 300, "path": "y"}, "does not exist"),
    ("x" * 300 + ".py:f", "does not exist"),
    ({"type": "hpsv3", "path": 5}, "reward 'hpsv3': path is 5; write a text"),
    ({"type": "clip_iqa", "path": "x", "good": 3}, "reward 'clip_iqa': good is 3; write a text"),
    ({"type": "jpeg", "quality": 0}, "quality"),
]


@pytest.mark.parametrize("function", [check, resolve])
@pytest.mark.parametrize(("spec", "said"), BAD, ids=[str(spec) for spec, _ in BAD])
def test_a_wrong_spec_ends_in_one_sentence_that_says_what_to_do(user, spec, said, function):
    (user / "broken.py").write_text("def f(:\n")
    with pytest.raises(SpecError, match=said) as caught:
        function(spec, user)
    assert "\n" not in str(caught.value)


def test_check_accepts_what_resolves(user):
    for spec in (
        "geneval",
        "jpeg",
        "mine.py:brightness",
        "mine.py:Area",
        "mine.py:ready",
        "url:http://localhost:1",
        {"type": "mine.py:brightness", "scale": 3},
        "rewards.scorers.jpeg:JpegScorer",
        "mine.py:raise_in_call",
    ):
        check(spec, user)
        resolve(spec, user)


def test_check_does_not_run_user_code(tmp_path):
    (tmp_path / "loud.py").write_text("raise SystemExit('ran')\ndef f(images, prompts, metadata): ...\n")
    check("loud.py:f", tmp_path)


def test_a_file_that_exits_at_import_is_a_typed_error(tmp_path):
    (tmp_path / "loud.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(SpecError, match="SystemExit"):
        resolve("loud.py:f", tmp_path)


def test_a_file_that_raises_at_import_is_a_typed_error(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\ndef f(images, prompts, metadata): ...\n")
    with pytest.raises(SpecError, match="ModuleNotFoundError"):
        resolve("bad.py:f", tmp_path)


def test_check_of_a_builtin_imports_no_heavy_library(user):
    code = (
        "import sys; from rewards.resolve import check\n"
        "check('geneval'); check('mine.py:brightness', sys.argv[1])\n"
        "for bad in ({'type': 'clip'}, {'type': 'pickscore', 'path': '/no'}):\n"
        "    try: check(bad)\n"
        "    except Exception: pass\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'scipy', 'fastapi', 'flowalign'} & set(sys.modules)\n"
        "print(heavy or '')"
    )
    out = subprocess.run([sys.executable, "-c", code, str(user)], capture_output=True, text=True, check=True).stdout
    assert not out.strip()


def test_a_misspelt_option_of_a_class_is_named_without_running_its_file(tmp_path):
    (tmp_path / "own.py").write_text(
        "raise SystemExit\nclass Sharp:\n    def __init__(self, power=2): ...\n    def score(self, i, p, m): ...\n"
    )
    with pytest.raises(SpecError, match=r"own\.py:Sharp \(line 2\) has no option 'powr'; it has power"):
        check({"type": f"{tmp_path / 'own.py'}:Sharp", "powr": 1})
    check({"type": f"{tmp_path / 'own.py'}:Sharp", "power": 1})


@pytest.mark.parametrize("size", [0, -3, 2.5, "8", True])
def test_a_batch_size_that_is_no_number_of_images_is_refused(size):
    with pytest.raises(SpecError, match=r"jpeg.*batch_size is .*at least 1"):
        resolve({"type": "jpeg", "batch_size": size})


@pytest.mark.parametrize("function", [check, resolve])
def test_a_spelling_of_other_tools_is_answered_with_ours(function, user):
    with pytest.raises(SpecError, match=r"'mine.py::brightness' has two colons; write mine.py:brightness$"):
        function("mine.py::brightness", user)
    with pytest.raises(SpecError, match=r"names no installed module; did you mean mine.py:brightness\?"):
        function("mine:brightness", user)
    (user / "sub").mkdir()
    (user / "sub" / "own.py").write_text(USER)
    with pytest.raises(SpecError, match=r"did you mean sub/own.py:two\?"):
        function("sub.own:two", user)


ASYNC = """
import functools
async def waits(images, prompts, metadata):
    return [1.0] * len(images)
class Waits:
    async def score(self, images, prompts, metadata):
        return {"a": [1.0] * len(images)}
class Called:
    async def __call__(self, images, prompts, metadata):
        return [1.0] * len(images)
called, partly = Called(), functools.partial(waits)
def hands_on(images, prompts, metadata):
    return waits(images, prompts, metadata)
def one_of_them(images, prompts, metadata):
    return {"one": waits(images, prompts, metadata)}
"""


@pytest.mark.filterwarnings("error")
def test_an_async_reward_is_refused_by_name_and_nobody_warns_that_it_was_not_awaited(tmp_path, batch):
    (tmp_path / "mine.py").write_text(ASYNC)
    for name in ("waits", "Waits"):
        for function in (check, resolve):
            with pytest.raises(SpecError, match=rf"mine.py:{name}.* async.*; write a plain function"):
                function(f"mine.py:{name}", tmp_path)
    for name in ("called", "partly"):
        with pytest.raises(SpecError, match=rf"mine.py:{name} is async; write a plain function"):
            resolve(f"mine.py:{name}", tmp_path)
    for name in ("hands_on", "one_of_them"):
        scorer = resolve(f"mine.py:{name}", tmp_path)
        with pytest.raises(InvalidScores, match=r"reward 'mine' is async: it returned a coroutine; write a plain"):
            score_batch("mine", scorer, Asked(*batch))
    gc.collect()
