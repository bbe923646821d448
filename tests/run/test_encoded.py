"""What a learner holds of a model, and the process that encodes for it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flowalign.data.preferences import PreferencesError
from flowalign.models.build import load_encoders
from flowalign.run import encoded
from flowalign.run.encoded import EncodingFailed, pairs_of
from flowalign.run.workers import LearnerWorker
from tests.data.test_preferences import offline_config, table, write_parquet


def modules_held() -> list[str]:
    """Encoders and autoencoders that are alive in this process."""
    gc.collect()
    return [
        type(found).__name__
        for found in gc.get_objects()
        if isinstance(found, PreTrainedModel) or type(found).__name__ == "AutoencoderKL"
    ]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "pairs.parquet", table(4, 0))


def test_a_learner_of_pairs_holds_no_encoder_and_draws_what_one_with_encoders_draws(
    pairs: Path, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    config = offline_config(tiny_pipeline_dir, pairs)
    before = modules_held()
    worker = LearnerWorker(config)
    try:
        assert modules_held() == before
        made = worker.source.batch(1)
    finally:
        worker.close()
    own = offline_config(tiny_pipeline_dir, Path(shutil.copy(pairs, tmp_path / "again.parquet")))
    expected = pairs_of(own, load_encoders(config.model)).batch(1)
    for one, other in ((made.winner_NCHW, expected.winner_NCHW), (made.loser_NCHW, expected.loser_NCHW)):
        assert torch.equal(one, other)
    assert torch.equal(made.condition.text["tokens"], expected.condition.text["tokens"])


def test_what_is_encoded_already_starts_no_process(
    pairs: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = offline_config(tiny_pipeline_dir, pairs)
    pairs_of(config, load_encoders(config.model))
    monkeypatch.setattr(encoded.subprocess, "Popen", None)
    assert len(pairs_of(config, None)) > 0


def test_an_error_of_the_encoding_process_arrives_as_itself_and_what_it_prints_is_no_answer(
    tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('said by code of the user')")
    monkeypatch.syspath_prepend(tmp_path)
    broken = [{**row, "jpg_0": b"no picture"} for row in table(4, 0)]
    config = offline_config(tiny_pipeline_dir, write_parquet(tmp_path / "broken.parquet", broken))
    asked: dict[str, Any] = {"config": config.model_dump(mode="json"), "rank": 0, "world_size": 1}
    with pytest.raises(PreferencesError, match="cannot be used"):
        encoded.encode_apart("pairs", asked)
    written = capfd.readouterr()
    assert "said by code of the user" in written.err and "said by" not in written.out


@pytest.mark.slow
def test_the_encoding_process_ends_with_the_one_that_started_it(
    pairs: Path, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    config = offline_config(tiny_pipeline_dir, pairs).model_dump(mode="json")
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    request.write_text(json.dumps({"what": "pairs", "threads": 1, "config": config, "rank": 0, "world_size": 1}))
    line = [sys.executable, "-m", encoded.MODULE, str(request), str(answer)]
    ended = subprocess.run(line, stdin=subprocess.DEVNULL, timeout=200)  # as where the other end of a pipe is closed
    assert ended.returncode == 1 and not answer.exists()


def test_a_killed_encoding_process_is_named_and_done_again(
    pairs: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = offline_config(tiny_pipeline_dir, pairs)

    class Killed(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            os.kill(self.pid, signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(encoded.subprocess, "Popen", Killed)
        with pytest.raises(EncodingFailed, match=r"encodes the pairs was ended by SIGKILL; .*same command again"):
            pairs_of(config, None)
    assert len(pairs_of(config, load_encoders(config.model))) > 0
