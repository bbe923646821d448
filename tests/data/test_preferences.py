"""Preference pairs from real files, the runs that learn from them, and the command that makes them."""

from __future__ import annotations

import io
import json
import math
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from flowalign.algorithms import build_algorithm
from flowalign.cli import app
from flowalign.cluster.ray_backend import RayBackend
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.data.banks.cache import EncodedCache
from flowalign.data.images import Skipped
from flowalign.data.preferences import PreferencesError, Row, check_source, left_out, load_pairs, read_rows
from flowalign.intake.file import load_align
from flowalign.models.build import load_encoders, load_policy
from flowalign.models.fingerprint import encoder_hash
from flowalign.plan import plan_geometry
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics, without_times
from flowalign.run.drive import drive, local_backend
from flowalign.run.workers import LearnerWorker
from tests.tiny import write_config

BRIGHT, DARK = 230, 20
REWARD = "def brightness(images, prompts, metadata):\n    return images.reshape(len(images), -1).mean(1) / 255.0\n"


def picture(level: int, seed: int, size: int = 64, kind: str = "PNG") -> bytes:
    """Noise around a grey level, as the bytes of an image file."""
    noise = np.random.default_rng(seed).integers(-15, 16, (size, size, 3))
    file = io.BytesIO()
    Image.fromarray((level + noise).astype(np.uint8)).save(file, format=kind)
    return file.getvalue()


def table(count: int = 6, ties: int = 1) -> list[dict[str, Any]]:
    """Rows in which the bright picture wins, now as jpg_0 and now as jpg_1, and ``ties`` after them."""
    rows = []
    for i in range(count + ties):
        bright = {"jpg": picture(BRIGHT, 2 * i), "label": 0.5 if i >= count else 1.0}
        dark = {"jpg": picture(DARK, 2 * i + 1), "label": 0.5 if i >= count else 0.0}
        places = (bright, dark) if i % 2 else (dark, bright)
        pair = {f"{name}_{place}": row[name] for place, row in enumerate(places) for name in row}
        rows.append({**pair, "caption": f"picture {i % 4}"})
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).to_parquet(str(path))
    return path


def offline_config(pipeline: Path, source: Path, **changes: Any) -> AlignConfig:
    content = {
        "name": "pairs",
        "runs_dir": str(source.parent / "runs"),
        "iterations": 4,
        "model": {"path": str(pipeline), "max_sequence_length": 16},
        "data": {"groups_per_iteration": 4, "preferences": str(source)},
        "algorithm": {"type": "diffusion_dpo", "source": "offline", "beta": 500},
        "rollout": {"chunk_size": 6},
        "learner": {"engine": "torch", "micro_batch_size": 4, "optimizer": {"learning_rate": 1e-3}},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 2, "keep_last": 10},
        "logging": {"wandb": "disabled"},
    }
    return AlignConfig.model_validate({**content, **changes})


@pytest.fixture(scope="module")
def policy(tiny_pipeline_dir: Path) -> Any:
    return load_policy(offline_config(tiny_pipeline_dir, Path("x")).model)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "pairs.parquet", table())


def latent_of(policy: Any, content: bytes) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(content))))
    return policy.encoders.encode_images(pixels[None])[0].half().float()


def test_a_parquet_file_gives_the_preferred_image_as_the_winner_and_counts_ties(
    source: Path, tiny_pipeline_dir: Path, policy: Any
) -> None:
    sampler = load_pairs(offline_config(tiny_pipeline_dir, source), policy.encoders)
    assert sampler.metrics == {"preferences/pairs": 6, "preferences/ties": 1}
    rows = table()
    winners = {i: latent_of(policy, row["jpg_0" if row["label_0"] else "jpg_1"]) for i, row in enumerate(rows[:6])}
    losers = {i: latent_of(policy, row["jpg_1" if row["label_0"] else "jpg_0"]) for i, row in enumerate(rows[:6])}
    seen = []
    for iteration in range(3):
        batch = sampler.batch(iteration)
        tokens = batch.condition.expand()["tokens"]
        for n in range(4):
            i = next(i for i, latent in winners.items() if torch.equal(latent, batch.winner_NCHW[n]))
            assert torch.equal(batch.loser_NCHW[n], losers[i])
            expected = policy.encoders.encode_prompts((rows[i]["caption"],), 16)
            assert torch.equal(tokens[n], expected.text["tokens"][0]) and torch.equal(
                batch.condition.null["tokens"], expected.null["tokens"]
            )
            seen.append(i)
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


def test_a_batch_is_a_function_of_seed_and_iteration(source: Path, tiny_pipeline_dir: Path, policy: Any) -> None:
    one, again, other = (
        load_pairs(offline_config(tiny_pipeline_dir, source, seed=seed), policy.encoders) for seed in (3, 3, 4)
    )
    for iteration in (0, 5):
        a, b, c = (sampler.batch(iteration) for sampler in (one, again, other))
        assert torch.equal(a.winner_NCHW, b.winner_NCHW) and a.seed == b.seed
        assert a.seed != c.seed
    assert one.batch(0).seed != one.batch(5).seed


def test_images_and_captions_are_encoded_once(source: Path, tiny_pipeline_dir: Path, policy: Any) -> None:
    config = offline_config(tiny_pipeline_dir, source)
    load_pairs(config, policy.encoders)
    files = {path: path.stat().st_mtime_ns for path in Path(f"{source}.cache").rglob("*.safetensors")}
    assert len(files) == 12 + 4 + 1  # images of pairs that are no ties, captions, the empty caption
    renamed = source.rename(source.with_name("moved.parquet"))
    data = {"groups_per_iteration": 4, "preferences": str(renamed), "preferences_cache": f"{source}.cache"}
    load_pairs(config.model_copy(update={"data": config.data.model_validate(data)}), policy.encoders)
    assert {path: path.stat().st_mtime_ns for path in Path(f"{source}.cache").rglob("*")}.items() >= files.items()
    assert len(list(Path(f"{source}.cache").rglob("*.safetensors"))) == len(files)


def test_the_key_names_the_encoders_and_not_the_transformer(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    model = offline_config(tiny_pipeline_dir, tmp_path / "x").model
    copy = shutil.copytree(tiny_pipeline_dir, tmp_path / "copy")
    assert encoder_hash(model) == encoder_hash(model.model_copy(update={"path": str(copy)}))
    weights = next((copy / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert encoder_hash(model) == encoder_hash(model.model_copy(update={"path": str(copy)}))
    weights = next((copy / "vae").glob("*.safetensors"))
    hashes = []
    for change in (lambda w: w.half(), lambda w: w.float(), lambda w: w + 1):  # the same in other bytes; another
        save_file({name: change(tensor) for name, tensor in load_file(weights).items()}, weights)
        hashes.append(encoder_hash(model.model_copy(update={"path": str(copy)})))
    assert hashes[0] == hashes[1] != hashes[2]
    assert encoder_hash(model) != encoder_hash(model.model_copy(update={"path": str(copy)}))


def test_another_precision_is_encoded_anew(source: Path, tiny_pipeline_dir: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = {"path": str(tiny_pipeline_dir), "max_sequence_length": 16, "dtype": dtype}
        config = offline_config(tiny_pipeline_dir, source, model=model)
        load_pairs(config, load_encoders(config.model))
    assert len(list(Path(f"{source}.cache").rglob("*.safetensors"))) == 2 * (12 + 4 + 1)


def test_ranks_that_share_the_work_draw_the_same_pairs(source: Path, tiny_pipeline_dir: Path, policy: Any) -> None:
    config = offline_config(tiny_pipeline_dir, source)
    batches = [load_pairs(config, policy.encoders, rank=rank, world_size=2).batch(1) for rank in (0, 1)]
    assert torch.equal(batches[0].winner_NCHW, batches[1].winner_NCHW) and batches[0].seed == batches[1].seed


def test_a_folder_of_images_with_metadata_reads_like_a_parquet_file(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = []
    for i, row in enumerate(table()):
        for place in (0, 1):
            (folder / f"{i}_{place}.png").write_bytes(row[f"jpg_{place}"])
        names = {f"jpg_{place}_file_name": f"{i}_{place}.png" for place in (0, 1)}
        lines.append(json.dumps({**names, **{k: v for k, v in row.items() if not k.startswith("jpg")}}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    pairs = list(zip(read_rows(folder), read_rows(source), strict=True))
    assert len(pairs) == 7
    assert all(a == b for a, b in pairs)


def test_a_set_is_read_from_the_path_that_is_named_and_not_from_a_pattern(tmp_path: Path) -> None:
    for name, caption in (("p[1].parquet", "meant"), ("p1.parquet", "another")):
        Dataset.from_list([{**table(1, 0)[0], "caption": caption}]).to_parquet(str(tmp_path / name))
    assert [row.caption for row in read_rows(tmp_path / "p[1].parquet") if isinstance(row, Row)] == ["meant"]


def test_a_folder_of_parquet_files_with_image_columns_reads_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    features = Features(
        {"jpg_0": ImageColumn(), "jpg_1": ImageColumn(), "label_0": Value("float32"), "label_1": Value("float32")}
        | {"caption": Value("string")}
    )
    rows = table()
    for i, part in enumerate((rows[:4], rows[4:])):
        columns = [{**row, **{f"jpg_{p}": {"bytes": row[f"jpg_{p}"], "path": None} for p in (0, 1)}} for row in part]
        Dataset.from_list(columns, features=features).to_parquet(str(folder / f"pairs-{i}.parquet"))
    found = [row.images for row in read_rows(folder) if isinstance(row, Row)]
    assert found == [(row["jpg_0"], row["jpg_1"]) for row in rows]


def test_an_image_of_another_size_is_fitted_to_the_run_s(tmp_path: Path, tiny_pipeline_dir: Path, policy: Any) -> None:
    rows = [{**table(1, 0)[0], "jpg_0": picture(DARK, 1, 96, "JPEG"), "jpg_1": picture(BRIGHT, 2, 48)}]
    batch = load_pairs(
        offline_config(tiny_pipeline_dir, write_parquet(tmp_path / "a.parquet", rows)), policy.encoders
    ).batch(0)
    assert batch.winner_NCHW.shape == (4, 16, 8, 8)


def without(column: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != column} for row in table()]


def changed(**values: Any) -> list[dict[str, Any]]:
    """The third row with other values."""
    rows = table()
    return [*rows[:2], {**rows[2], **values}, *rows[3:]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (without("label_1"), "has no column 'label_1'; a preference set has jpg_0, jpg_1, label_0, label_1, caption"),
        (changed(label_0=None), r"row 2 has the labels None and"),
        (
            [{**row, "caption": ""} for row in table(2)] + table(4),
            r"more than 25% of the 8 pairs of .* cannot be used \(row 0 has no caption; .*; row 2 has no caption\)",
        ),
        (table(0, 3), r"all 3 pairs of .* are ties; there is nothing to learn from"),
    ],
)
def test_a_bad_set_is_refused_in_one_sentence(
    rows: list[dict[str, Any]], said: str, tmp_path: Path, tiny_pipeline_dir: Path, policy: Any
) -> None:
    path = write_parquet(tmp_path / "bad.parquet", rows)
    with pytest.raises(PreferencesError, match=said) as caught:
        load_pairs(offline_config(tiny_pipeline_dir, path), policy.encoders)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreferencesError, match="does not exist"):
        check_source(tmp_path / "absent.parquet")
    with pytest.raises(PreferencesError, match="neither parquet files nor images"):
        check_source(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(PreferencesError, match="cannot be read"):
        check_source(tmp_path / "broken.parquet")


def refusal(config: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_align(config, overrides)
    return str(caught.value)


OFFLINE = "algorithm={type: diffusion_dpo, source: offline}"


def test_a_configuration_names_its_pairs_exactly_where_the_algorithm_learns_from_them(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    write_parquet(tmp_path / "pairs.parquet", table())
    write_parquet(tmp_path / "lacking.parquet", without("caption"))
    pairs = "data.preferences=pairs.parquet"
    loaded = load_align(config, [OFFLINE, pairs, "rewards=[]"]).config
    assert loaded.data.preferences == str(tmp_path / "pairs.parquet")
    assert loaded.algorithm["group_size"] == 2
    geometry = plan_geometry(loaded, build_algorithm(loaded.algorithm))
    assert (geometry.rollout_passes, geometry.decoded, geometry.transitions) == (0, 0, 3)
    assert geometry.learner_backward_passes == 2 * 8  # two images of 3 pairs, filled up to a micro-batch of 8
    assert refusal(config, OFFLINE).startswith("data.preferences: is missing; give a parquet file")
    assert refusal(config, pairs).startswith("data.preferences: flow_grpo learns from what it rolls out")
    online = refusal(config, "algorithm={type: diffusion_dpo}", pairs)
    assert online.endswith(
        "diffusion_dpo learns from what it rolls out; write algorithm.source: offline, or leave it out"
    )
    assert "has no column 'caption'" in refusal(config, OFFLINE, "data.preferences=lacking.parquet")
    assert refusal(config, OFFLINE, "data.preferences=absent").startswith("data.preferences: ")
    assert refusal(config, "data.preferences_cache=x").startswith("data.preferences_cache: there is nothing to keep")


def test_the_first_update_of_a_learner_starts_at_log_2(source: Path, tiny_pipeline_dir: Path) -> None:
    config = offline_config(tiny_pipeline_dir, source)
    load_pairs(config, load_encoders(config.model))  # or a process is started that encodes them
    worker = LearnerWorker(config)
    try:
        metrics = worker.update((), None, 0).metrics
    finally:
        worker.close()
    assert metrics["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6) and metrics["dpo/margin"] == 0
    assert metrics["preferences/ties"] == 1 and metrics["dpo/pairs"] == 4


def test_the_reference_takes_the_policy_s_weights_every_few_iterations(source: Path, tiny_pipeline_dir: Path) -> None:
    algorithm = {"type": "diffusion_dpo", "source": "offline", "reference_refresh": 2}
    margins = []
    config = offline_config(tiny_pipeline_dir, source, algorithm=algorithm)
    load_pairs(config, load_encoders(config.model))
    worker = LearnerWorker(config)
    try:
        for iteration in range(4):
            margins.append(worker.update((), None, iteration).metrics["dpo/margin"])
    finally:
        worker.close()
    assert [margin == 0 for margin in margins] == [True, False, True, False]


def run(config: AlignConfig) -> tuple[Path, list[Mapping[str, Any]]]:
    backend = RayBackend if config.cluster.backend == "ray" else local_backend
    run_dir = drive(config, Path("."), Console(quiet=True), backend=backend)
    return run_dir, [without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_an_offline_run_continues_bitwise_and_evaluates(source: Path, tiny_pipeline_dir: Path, lora: Any) -> None:
    algorithm = {"type": "diffusion_dpo", "source": "offline", "beta": 500, "reference_refresh": 3}
    changes = {
        "algorithm": algorithm,
        "iterations": 5,
        "evaluation": {"every": 2, "num_samples": 6, "num_steps": 2},
        "model": {"path": str(tiny_pipeline_dir), "max_sequence_length": 16, "lora": lora},
    }
    whole, rows = run(offline_config(tiny_pipeline_dir, source, **changes))
    run(offline_config(tiny_pipeline_dir, source, **{**changes, "name": "parts", "iterations": 4}))
    parts, again = run(offline_config(tiny_pipeline_dir, source, **{**changes, "name": "parts"}))
    assert [row["iteration"] for row in rows] == list(range(6))
    assert any(key.startswith("eval/") for key in rows[2]) and not any(key.startswith("eval/") for key in rows[1])
    assert not any(key.startswith("reward/") for key in rows[1])
    a, b = (checkpoint.load(run_dir / "checkpoints" / "step_000005") for run_dir in (whole, parts))
    assert all(torch.equal(a.model[key], b.model[key]) for key in a.model)
    optimizers = [saved.optimizer_of(0)[0] for saved in (a, b)]
    assert optimizers[0].keys() == optimizers[1].keys()
    assert all(torch.equal(optimizers[0][key], optimizers[1][key]) for key in optimizers[0])
    assert any(key.startswith("reference.") for key in optimizers[0])
    assert rows[5]["loss/dpo"] == again[5]["loss/dpo"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_offline_run_on_ray_gives_the_bits_of_one_in_this_process_and_two_ranks_almost(
    source: Path, tiny_pipeline_dir: Path
) -> None:
    cpus = {"rollout_cpus": 0.25, "reward_cpus": 0.25, "learner_cpus": 0.25}
    ray, learner = {"backend": "ray", "threads": 1, **cpus}, {"engine": "torch", "micro_batch_size": 2}
    algorithm = {"type": "diffusion_dpo", "source": "offline", "reference_refresh": 2}
    changes = {"iterations": 3, "algorithm": algorithm, "evaluation": {"every": 3, "num_samples": 6, "num_steps": 2}}
    runs = {
        "local": {"learner": learner},
        "ray": {"learner": learner, "cluster": ray},
        "ranks": {"learner": {**learner, "engine": "fsdp", "ranks": 2}, "cluster": ray},
    }
    weights = {}
    for name, own in runs.items():
        run_dir, _ = run(offline_config(tiny_pipeline_dir, source, name=name, **changes, **own))
        weights[name] = checkpoint.load(run_dir / "checkpoints" / "step_000003").model
    for key, value in weights["local"].items():
        assert torch.equal(value, weights["ray"][key])
        torch.testing.assert_close(value, weights["ranks"][key], rtol=0, atol=1e-5)


def small_run(folder: Path, pipeline: Path) -> Path:
    """A configuration whose rollouts have 8 images."""
    path = folder / "small.yaml"
    path.write_text(
        f"name: small\niterations: 1\nmodel: {{path: {pipeline}, max_sequence_length: 16}}\n"
        "algorithm: {type: flow_grpo}\nrewards: [{spec: jpeg}]\nrollout: {chunk_size: 8}\n"
        "cluster: {backend: local, threads: 1}\n"
    )
    return path


def test_a_set_made_from_a_checkpoint_holds_the_best_and_the_worst_of_its_groups(
    tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bright.py").write_text(REWARD)
    arguments = ["make-preferences", str(tiny_pipeline_dir), "--reward", "bright.py:brightness", "--pairs", "5"]
    arguments += ["--group-size", "4", "--num-steps", "2", "--out", "made", "--json"]
    arguments += ["--config", str(small_run(tmp_path, tiny_pipeline_dir))]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    card = json.loads((tmp_path / "made" / "preferences.json").read_text())
    assert card["pairs"] == 5 and card["reward"]["spec"] == str(tmp_path / "bright.py:brightness")
    rows = [row for row in read_rows(tmp_path / "made") if isinstance(row, Row)]
    assert len(rows) == 5 and {row.winner for row in rows} == {0, 1}
    for row in rows:
        levels = [float(np.asarray(Image.open(io.BytesIO(content))).mean()) for content in row.images]
        assert row.winner == int(np.argmax(levels)) and row.caption
    assert "5 pairs kept of 6 groups; 1 more than was asked for; written to made" in done.stderr
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and "holds parquet files already" in refused.output


def test_a_reward_that_tells_nothing_apart_is_refused(
    tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat.py").write_text("def flat(images, prompts, metadata):\n    return [0.5] * len(images)\n")
    arguments = ["make-preferences", str(tiny_pipeline_dir), "--reward", "flat.py:flat", "--pairs", "1"]
    arguments += ["--group-size", "8", "--num-steps", "1", "--config", str(small_run(tmp_path, tiny_pipeline_dir))]
    done = CliRunner().invoke(app, [*arguments, "--out", "made"])
    assert done.exit_code == 2 and "tells too few of them apart" in " ".join(done.output.split())


def test_a_set_says_how_many_groups_gave_no_pair_and_why(
    tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every four groups one has equal scores, and of one a single image is judged."""
    monkeypatch.chdir(tmp_path)
    scores = [0.5, 0.5, 1, float("nan"), 1, 2, 3, 4]
    (tmp_path / "few.py").write_text(
        f"nan = float('nan')\ndef few(images, prompts, metadata):\n    return {scores}[: len(images)]\n"
    )
    arguments = ["make-preferences", str(tiny_pipeline_dir), "--reward", "few.py:few", "--pairs", "4", "--out", "made"]
    arguments += ["--group-size", "2", "--num-steps", "1", "--config", str(small_run(tmp_path, tiny_pipeline_dir))]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "4 pairs kept of 8 groups; 4 groups gave none: " in done.output
    card = json.loads((tmp_path / "made" / "preferences.json").read_text())
    assert card["groups_without_pair"] == 4 and card["pairs_beyond"] == 0
    assert card["why_without_pair"] == {
        "whose scores are all equal": 2,
        "of which fewer than two images could be judged": 2,
    }


def saved(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def test_pairs_show_what_people_see_and_latents_of_0_1_serve_only_pictures_that_it_read_the_same(
    tmp_path: Path, tiny_pipeline_dir: Path, policy: Any
) -> None:
    """A scan of 16 bits, a sideways photo, hidden black, and a plain picture."""
    red_above_blue = np.zeros((64, 64, 3), np.uint8)
    red_above_blue[:32, :, 0], red_above_blue[32:, :, 2] = 255, 255
    exif = Image.Exif()
    exif[0x0112] = 6
    half = np.zeros((64, 64, 4), np.uint8)
    half[:, 32:] = 0, 200, 0, 255
    scan = np.full((64, 64), 8000, np.uint16)
    scan[:, 32:] = 40_000
    seen = {
        saved(scan): np.repeat((scan >> 8).astype(np.uint8)[..., None], 3, 2),
        saved(np.rot90(red_above_blue).copy(), exif=exif): red_above_blue,
        saved(half): np.where(half[..., 3:] == 0, np.uint8(255), half[..., :3]),
        saved(red_above_blue[::-1].copy()): red_above_blue[::-1].copy(),
    }
    contents = list(seen)
    rows = [
        {"jpg_0": a, "jpg_1": b, "label_0": 1.0, "label_1": 0.0, "caption": f"{i}"}
        for i, (a, b) in enumerate(zip(contents, contents[1:] + contents[:1], strict=True))
    ]
    config = offline_config(tiny_pipeline_dir, write_parquet(tmp_path / "seen.parquet", rows))
    folder = Path(f"{tmp_path / 'seen.parquet'}.cache")
    cache = EncodedCache(folder, policy.encoders, config.model)
    for content in contents:  # what 0.1 left behind
        cache._store(cache._key(b"image", content), {"latents": torch.full((16, 8, 8), 7.0).half()})
    found = {tuple(latent.flatten().tolist()) for latent in load_pairs(config, policy.encoders).batch(0).winner_NCHW}
    latents = [
        policy.encoders.encode_images(torch.from_numpy(picture)[None])[0].half().float() for picture in seen.values()
    ]
    expected = [*latents[:3], torch.full((16, 8, 8), 7.0)]
    assert found == {tuple(latent.flatten().tolist()) for latent in expected}


def blemished() -> list[dict[str, Any]]:
    """Twelve pairs, of which the second has no picture, the fifth a moving one and the ninth no caption."""
    rows = table(12, 0)
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 255)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    for number, change in {1: {"jpg_1": b"<html>"}, 4: {"jpg_0": file.getvalue()}, 8: {"caption": " "}}.items():
        rows[number] |= change
    return rows


def test_pairs_that_cannot_be_used_are_left_out_counted_and_named_on_every_rank(
    tmp_path: Path, tiny_pipeline_dir: Path, policy: Any
) -> None:
    source = write_parquet(tmp_path / "pairs.parquet", blemished())
    config = offline_config(tiny_pipeline_dir, source)
    ranks = [load_pairs(config, policy.encoders, rank=rank, world_size=2) for rank in (0, 1)]
    assert ranks[0].metrics == {"preferences/pairs": 9, "preferences/ties": 0, "preferences/left_out": 3}
    assert ranks[0].digest == ranks[1].digest
    whole = [row for number, row in enumerate(blemished()) if number not in (1, 4, 8)]
    alone = load_pairs(
        offline_config(tiny_pipeline_dir, write_parquet(tmp_path / "whole.parquet", whole)), policy.encoders
    )
    assert torch.equal(ranks[1].batch(2).winner_NCHW, alone.batch(2).winner_NCHW)
    listed = Path(f"{source}.cache") / "skipped.json"
    assert [(row["number"], row["where"], row["kind"], row["reason"]) for row in json.loads(listed.read_text())] == [
        (1, "row 1, jpg_1", "image", "is a web page; only PNG, JPEG, WebP, TIFF, BMP and GIF are read"),
        (4, "row 4, jpg_0", "image", "is a GIF with several frames"),
        (8, "row 8", "caption", "has no caption"),
    ]
    said = left_out(config)
    assert said is not None and said.startswith(f"left out 3 preference pairs of {source} (row 1, jpg_1 is a web page;")
    write_parquet(source, whole)
    load_pairs(config, policy.encoders)
    assert left_out(config) is None and not listed.exists()


def test_a_run_says_which_pairs_it_left_out_and_continues_bitwise(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    source = write_parquet(tmp_path / "pairs.parquet", blemished())
    said = Console(file=io.StringIO(), width=10_000)
    changes = {"name": "parts", "iterations": 2, "checkpoint": {"every": 1, "keep_last": 10}}
    whole, rows = run(offline_config(tiny_pipeline_dir, source, iterations=3))
    run(offline_config(tiny_pipeline_dir, source, **changes))
    parts = drive(offline_config(tiny_pipeline_dir, source, **{**changes, "iterations": 3}), Path("."), said)
    a, b = (checkpoint.load(run_dir / "checkpoints" / "step_000003") for run_dir in (whole, parts))
    assert all(torch.equal(a.model[key], b.model[key]) for key in a.model)
    assert rows[-1]["preferences/left_out"] == 3
    assert f"left out 3 preference pairs of {source} (row 1, jpg_1 is a web page" in said.file.getvalue()  # type: ignore[attr-defined]


def test_columns_of_paths_are_read_from_beside_their_own_parquet_file(tmp_path: Path, policy: Any) -> None:
    rows = table(4, 0)
    for part in (0, 1):
        folder = tmp_path / "set" / f"part-{part}"
        (folder / "images").mkdir(parents=True)
        own = rows[2 * part : 2 * part + 2]
        for number, row in enumerate(own):
            for place in (0, 1):
                (folder / "images" / f"{number}_{place}.png").write_bytes(row[f"jpg_{place}"])
        slash = "\\" if part else "/"  # as Windows writes it
        names = [{f"jpg_{p}": f"images{slash}{n}_{p}.png" for p in (0, 1)} for n in (0, 1)]
        write_parquet(folder / "rows.parquet", [{**row, **name} for row, name in zip(own, names, strict=True)])
    found = list(read_rows(tmp_path / "set"))
    assert [row.images for row in found if isinstance(row, Row)] == [(row["jpg_0"], row["jpg_1"]) for row in rows]
    (tmp_path / "set" / "part-1" / "images" / "1_0.png").unlink()
    gone = list(read_rows(tmp_path / "set"))[3]
    assert isinstance(gone, Skipped) and gone.reason == (
        f"names images\\1_0.png in the column jpg_0, and there is no such file in {tmp_path / 'set' / 'part-1'}"
    )


def test_a_folder_s_missing_picture_is_a_pair_that_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(DARK, 1))
    rows = [
        {"jpg_0_file_name": "a.png", "jpg_1_file_name": name, "label_0": 1.0, "label_1": 0.0, "caption": "a"}
        for name in ("a.png", "b.png")
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole, missing = read_rows(tmp_path)
    assert isinstance(whole, Row) and isinstance(missing, Skipped)
    assert missing.where == "row 1" and missing.reason.endswith("b.png in the column jpg_1, and there is no such file")


ALIKE = """
import sys, torch
from flowalign.engine import process_group
rank, port = int(sys.argv[1]), int(sys.argv[2])
process_group.join(rank, 2, port, torch.device("cpu"))
print(process_group.alike(b"the same pairs"), process_group.alike(bytes([rank])))
"""


@pytest.mark.slow
def test_ranks_notice_that_they_hold_different_pairs() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", ALIKE]
    ranks = [subprocess.Popen([*command, str(r), port], stdout=subprocess.PIPE, text=True) for r in (0, 1)]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["True False\n"] * 2
