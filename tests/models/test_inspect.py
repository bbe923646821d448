"""Sizes of a model from its small files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flowalign.config.sections import ModelConfig
from flowalign.models.inspect import bare_network, most_trained, trained_parameters


@pytest.mark.parametrize("lora", [None, {"rank": 4}, {"rank": 4, "targets": ["to_q", "linear_1"]}])
def test_no_run_learns_more_than_the_headers_of_the_weights_tell(
    tiny_pipeline_dir: Path, lora: dict[str, Any] | None
) -> None:
    model = ModelConfig.model_validate({"path": str(tiny_pipeline_dir), "lora": lora})
    exact, most = trained_parameters(model), most_trained(model)
    assert exact is not None and most is not None
    if lora is not None:
        assert exact < most
    else:
        assert most - exact == sum(buffer.numel() for buffer in bare_network(model).buffers())


def test_headers_tell_nothing_of_a_network_that_is_begun_anew_or_without_weights(
    tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    fresh = {"path": str(tiny_pipeline_dir), "transformer": {"num_layers": 2, "num_heads": 2}}
    assert most_trained(ModelConfig.model_validate(fresh)) is None
    shutil.copytree(tiny_pipeline_dir, tmp_path / "model")
    for file in (tmp_path / "model" / "transformer").glob("*.safetensors"):
        file.unlink()
    assert most_trained(ModelConfig(path=str(tmp_path / "model"))) is None
    assert most_trained(ModelConfig(path=str(tmp_path / "absent"))) is None
