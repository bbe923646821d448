"""Preferences of a family whose texts have lengths of their own: each image is what its prompt alone gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig
from flowalign.intake.file import load_align
from flowalign.making.preferences import make_preferences
from flowalign.record.metrics import read_metrics
from flowalign.samples.sampled import sampled_model
from tests.families.ours import flowalign, write_run
from tests.tiny import run_config

LONG = "a photo of two small dogs that run over the grass near the old house and a blue ball on the green table"
ROWS = [
    {"prompt": "a red cube", "negative_prompt": "blurry"},
    {"prompt": LONG, "negative_prompt": "low quality picture with bad text"},
]


def pairs(model: Path, folder: Path, rows: list[dict[str, str]]) -> set[tuple[str, bytes, bytes]]:
    """Make the pairs of four groups, guided; return the prompt of each and its images as they were written."""
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text("def bright(images, *rest):\n    return images.reshape(len(images), -1).mean(1)\n")
    config = run_config(model, model={"path": str(model), "max_sequence_length": 96, "height": 64, "width": 64})
    walked = sampled_model(model, config, num_steps=2, seed=0, guidance_scale=3.0)
    reward = RewardConfig(spec=f"{folder / 'mine.py'}:bright")
    make_preferences(walked, reward, folder / "out", prompts=str(folder / "prompts.jsonl"), pairs=4, group_size=2)
    table = pyarrow.parquet.read_table(next((folder / "out").glob("*.parquet"))).to_pylist()
    return {(row["caption"], row["jpg_0"]["bytes"], row["jpg_1"]["bytes"]) for row in table}


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_pairs_among_prompts_of_other_lengths_are_those_of_a_prompt_alone(
    tiny: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    model = tiny(name)
    together = pairs(model, tmp_path / "both", ROWS)
    alone = [pairs(model, tmp_path / f"alone{number}", [row]) for number, row in enumerate(ROWS)]
    assert len(together) == 4 and all(len(together & own) == 2 for own in alone)


def test_offline_pairs_are_compared_at_the_guidance_that_the_network_is_told(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """The winner's own error is another one at another number; the network of Stable Diffusion 3 takes none."""
    pairs(tiny("flux-dev"), tmp_path / "pairs", ROWS[:1])
    offline = "{type: diffusion_dpo, source: offline, sft_weight: 1, guidance_scale: %s}"

    def asked(scale: float) -> list[str]:
        own = ["rewards=[]", f"data.preferences={tmp_path / 'pairs' / 'out'}", f"algorithm={offline % scale}"]
        return [*own, "iterations=1", f"name=at{scale:g}", "evaluation.every=0"]

    losses = {}
    for scale in (1.0, 3.5):
        flowalign("align", write_run(tmp_path, tiny("flux-dev")), *asked(scale))
        losses[scale] = next(iter(read_metrics(next(tmp_path.rglob(f"at{scale:g}/metrics.jsonl")))))["loss/winner"]
    assert losses[1.0] != pytest.approx(losses[3.5], rel=1e-3)
    with pytest.raises(
        ConfigError, match=r"^algorithm\.guidance_scale: the network of this Stable Diffusion 3 takes no"
    ):
        load_align(write_run(tmp_path, tiny("sd3")), asked(3.5))
