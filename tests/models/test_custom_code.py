"""No code of a model's directory is run, and nobody is asked whether it may be."""

from __future__ import annotations

import ast
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.export.verify import load_pipeline
from flowalign.models.build import load_policy
from flowalign.models.errors import ModelError
from rewards.interface import SpecError
from rewards.models.customcode import custom_code
from rewards.resolve import resolve

ROOT = Path(__file__).parents[2]
CODE = "from pathlib import Path\nPath(__file__).with_name('was_run').touch()\nraise RuntimeError('this was run')\n"
TENSORS_ALONE = ("PeftModel", "SD3Transformer2DModel")  # take no such argument


def copy_of(directory: Path, to: Path) -> Path:
    shutil.copytree(directory, to)
    (to / "evil.py").write_text(CODE)
    return to


def change(file: Path, **changes: object) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **changes}))


def change_text(file: Path, **changes: object) -> None:
    change(file, model_cfg=(config := json.loads(file.read_text())["model_cfg"]))
    change(file, model_cfg={**config, "text_cfg": {**config["text_cfg"], **changes}})


AUTO = {"AutoTokenizer": ["evil.Evil", None]}
SCORERS: dict[str, tuple[str, str, Callable[[Path], object], str]] = {
    "a tokenizer": (
        "pickscore",
        "pickscore",
        lambda path: change(path / "tokenizer_config.json", auto_map=AUTO),
        r"tokenizer_config\.json \(auto_map\)",
    ),
    "an image processor": (
        "pickscore",
        "pickscore",
        lambda path: change(path / "processor_config.json", image_processor={"auto_map": {"A": "evil.Evil"}}),
        r"processor_config\.json \(auto_map\)",
    ),
    "a model": (
        "pickscore",
        "pickscore",
        lambda path: change(path / "config.json", auto_map={"AutoModel": "other/repository--evil.Evil"}),
        r"config\.json \(auto_map\)",
    ),
    "a tokenizer of open_clip": (
        "clip",
        "open_clip",
        lambda path: (
            change_text(path / "open_clip_config.json", hf_tokenizer_name="here"),
            change(path / "tokenizer_config.json", auto_map=AUTO),
        ),
        r"tokenizer_config\.json \(auto_map\)",
    ),
    "open_clip told to trust": (
        "clip",
        "open_clip",
        lambda path: change_text(
            path / "open_clip_config.json", hf_tokenizer_name="here", tokenizer_kwargs={"trust_remote_code": True}
        ),
        r"open_clip_config\.json \(trust_remote_code\)",
    ),
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_reward_s_model_with_code_of_its_own_is_refused_by_name_before_it_is_loaded(tmp_path, name):
    scorer, shipped, make, said = SCORERS[name]
    path = copy_of(SHIPPED / shipped, tmp_path / "model")
    assert custom_code(path) is None
    make(path)
    with pytest.raises(SpecError, match=f"{scorer}: {path} names code of its own in {said}"):
        resolve({"type": scorer, "path": str(path)})
    assert not (path / "was_run").exists()


PIPELINES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tokenizer": (
        lambda path: change(path / "tokenizer" / "tokenizer_config.json", auto_map=AUTO),
        r"tokenizer/tokenizer_config\.json \(auto_map\)",
    ),
    "a network": (
        lambda path: change(path / "transformer" / "config.json", auto_map={"AutoModel": "evil.Evil"}),
        r"transformer/config\.json \(auto_map\)",
    ),
    "a part's class": (
        lambda path: change(path / "model_index.json", vae=["evil", "Evil"]),
        r"model_index\.json \(vae: evil\.py\)",
    ),
    "a module": (
        lambda path: change(path / "model_index.json", scheduler=["antigravity", "Evil"]),
        r"model_index\.json \(scheduler: antigravity\.py\)",
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_with_code_of_its_own_is_refused_by_name_before_it_is_loaded(tmp_path, tiny_pipeline_dir, name):
    make, said = PIPELINES[name]
    path = copy_of(tiny_pipeline_dir, tmp_path / "model")
    assert custom_code(path) is None
    (path / "vae" / "evil.py").write_text(CODE)
    make(path)
    for load in (lambda: load_policy(ModelConfig(path=str(path))), lambda: load_pipeline(path)):
        with pytest.raises(ModelError, match=f"{path} names code of its own in {said}"):
            load()
    assert not list(path.rglob("was_run"))


def test_a_pipeline_py_that_is_not_ours_is_not_run(tmp_path, tiny_pipeline_dir):
    path = copy_of(tiny_pipeline_dir, tmp_path / "model")
    (path / "pipeline.py").write_text(CODE)
    change(path / "model_index.json", _class_name=["pipeline", "FlowalignPipeline"])
    found, expected = load_pipeline(path), load_pipeline(tiny_pipeline_dir)
    assert type(found).__name__ == "FlowalignPipeline" and not (path / "was_run").exists()
    for mine, other in zip(found.transformer.parameters(), expected.transformer.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_question_that_a_library_would_ask_is_not_asked(tmp_path, monkeypatch):
    """open_clip loads what its configuration names without saying whether its code is trusted."""
    path = copy_of(SHIPPED / "open_clip", tmp_path / "model")
    scorer: Any = resolve({"type": "clip", "path": str(path)})
    change_text(path / "open_clip_config.json", hf_tokenizer_name="here")  # after the look at its files
    change(path / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="Evil")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    with pytest.raises(SpecError, match="did not load"):
        scorer.setup("cpu")
    assert not asked and not (path / "was_run").exists()


COMMAND = ["-m", "flowalign.cli", "try-reward", "pickscore", "path=model", "--images", "."]
AFTER_THE_LOOK = """
from pathlib import Path
from rewards.resolve import resolve
from tests.models.test_custom_code import AUTO, change, change_text
path = Path("model")
scorer = resolve({"type": "clip", "path": "model"})
change_text(path / "open_clip_config.json", hf_tokenizer_name="here")
change(path / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="Evil")
scorer.setup("cpu")
"""


@pytest.mark.parametrize(
    ("words", "model", "code", "said"),
    [
        (COMMAND, "pickscore", 2, "model names code of its own in tokenizer_config.json (auto_map)"),
        pytest.param(["-c", AFTER_THE_LOOK], "open_clip", 1, "did not load", marks=pytest.mark.slow),
    ],
    ids=["by a command", "by a library"],
)
def test_an_answer_that_waits_in_a_pipe_or_at_a_terminal_is_not_read(tmp_path, words, model, code, said):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    started = []
    for name, (keyboard, stdin) in {"terminal": pty.openpty(), "pipe": os.pipe()[::-1]}.items():
        path = copy_of(SHIPPED / model, tmp_path / name / "model")
        if model == "pickscore":
            change(path / "tokenizer_config.json", auto_map=AUTO)
        Image.new("RGB", (16, 16)).save(path.with_name("0.png"))
        os.write(keyboard, b"y\n")
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen([sys.executable, *words], cwd=path.parent, env=environment, stdin=stdin, **options)
        started.append((process, keyboard, stdin))
    for process, keyboard, stdin in started:
        shown, _ = process.communicate(timeout=250)
        assert process.returncode == code and said in " ".join(shown.split()), shown
        assert os.read(stdin, 10) == b"y\n"
        os.close(keyboard)
        os.close(stdin)
    assert not list(tmp_path.rglob("was_run"))


def test_a_detector_with_code_of_its_own_is_refused_by_name_before_it_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Evil"}}))
    detector = {"type": "mask2former", "path": str(tmp_path)}
    with pytest.raises(SpecError, match=rf"mask2former: {tmp_path} names code of its own in config\.json \(auto_map\)"):
        resolve({"type": "geneval", "detector": detector})


def test_every_load_of_a_model_says_that_its_code_is_not_trusted():
    found = 0
    for file in sorted(path for part in ("flowalign", "rewards", "scripts") for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = {word.arg: word.value for word in node.keywords}
            where = f"{file.relative_to(ROOT)}, line {node.lineno}"
            trusted = given.get("trust_remote_code")
            assert trusted is None or (isinstance(trusted, ast.Constant) and trusted.value is False), where
            assert "custom_pipeline" not in given, where
            if isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
                found += 1
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                assert trusted is not None or owner in TENSORS_ALONE, where
    assert found > 10
