"""The build of the shipped networks, from nothing to a pipeline, shortened to three steps a network."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowalign.export.verify import load_pipeline

ROOT = Path(__file__).parents[2]


def build(work: Path, code: int = 0, **more: str) -> str:
    environment = {**os.environ, "WORK": str(work), "STEPS": "3", "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        ["bash", "scripts/build_shapes.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout


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
    second = build(tmp_path)
    assert '"stage"' not in second
    assert (tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors").read_bytes() == weights
