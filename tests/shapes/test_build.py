"""The build of the shipped networks, from nothing to a pipeline, shortened to three steps a network."""

import fcntl
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowalign.export.verify import load_pipeline

ROOT = Path(__file__).parents[2]


def build(work: Path, code: int = 0, **more: str) -> str:
    """What the script says, of refusals on its error stream."""
    environment = {**os.environ, "WORK": str(work), "STEPS": "3", "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        ["bash", "scripts/build_shapes.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout if code in (0, 75) else done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"MINUTES": "abc"}, "MINUTES: 'abc' is no whole number of 0 or more"),
        ({"MINUTES": "1.5"}, "MINUTES: '1.5' is no whole number"),
        ({"MINUTES": "-1"}, "MINUTES: '-1' is no whole number"),
        ({"STEPS": "0"}, "STEPS: '0' is no whole number of 1 or more"),
        ({"STEPS": "-1"}, "STEPS: '-1' is no whole number"),
        ({"STEPS": ""}, "was begun with 3 steps; give another WORK, or the same STEPS"),
        ({"STEPS": "4"}, "was begun with 3 steps"),
    ],
)
def test_what_the_build_cannot_do_is_said_before_it_does_anything(
    tmp_path: Path, given: dict[str, str], said: str
) -> None:
    (tmp_path / "steps.txt").write_text("3\n")
    assert said in build(tmp_path, 2, **given)


def test_two_builds_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"another build works in {tmp_path}" in build(tmp_path, 2)


@pytest.mark.slow
def test_the_build_script_makes_a_pipeline_that_diffusers_samples_and_a_second_run_repeats_no_training(tmp_path):
    assert "the same command goes on" in build(tmp_path, 75, MINUTES="0")
    first = build(tmp_path)
    stages = ("autoencoder", "open_clip", "encoders", "pickscore", "detector", "colors")
    assert all(f'"stage": "{stage}"' in first for stage in stages)
    pipeline: Any = load_pipeline(tmp_path / "pipeline")
    images = pipeline("a photo of a red circle", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()
    weights = (tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "untrained" / "model_index.json").unlink()  # a folder that was not finished counts as none
    second = build(tmp_path)
    assert (tmp_path / "untrained" / "model_index.json").is_file()
    assert '"stage"' not in second
    assert (tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors").read_bytes() == weights
