"""Runs whose rollout workers hold no text encoders: what is encoded first, what is refused, what goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.data.banks.cache import EncodedCache
from flowalign.data.prompts import GroupSampler
from flowalign.intake.file import load_align
from flowalign.models.build import load_encoders
from flowalign.plan import make_plan, plan_rows
from flowalign.run import encoded
from flowalign.run.workers import RolloutWorker
from flowalign.samples.opened import torch_threads
from flowalign.samples.sampled import sample_checkpoint, sampled_model
from tests.tiny import run_config, write_checkpoint

PROMPTS = ["a red cube", "two dogs", "a green ball on the grass"]


def write_run(folder: Path, pipeline: Path, **changes: Any) -> Path:
    """Write a small alignment with prompts of its own, of which one has a negative prompt."""
    rows: list[dict[str, str]] = [{"prompt": prompt} for prompt in PROMPTS]
    rows[1]["negative_prompt"] = "blurry"
    write_prompts(folder, rows)
    sections: dict[str, Any] = {
        "name": "run",
        "runs_dir": str(folder / "runs"),
        "iterations": 2,
        "model": {"path": str(pipeline), "max_sequence_length": 16, "lora": {"rank": 4}},
        "data": {"prompts": "prompts.jsonl", "groups_per_iteration": 3},
        "algorithm": {"type": "flow_grpo", "group_size": 2, "num_steps": 2, "guidance_scale": 4.0},
        "rewards": ["jpeg"],
        "learner": {"micro_batch_size": 8, "engine": "torch"},
        "rollout": {"chunk_size": 4},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"prompts": "prompts.jsonl", "num_samples": 3, "num_steps": 2, "scorer": "jpeg"},
        "checkpoint": {"every": 1},
        "logging": {"wandb": "disabled"},
    }
    sections |= changes
    path = folder / f"{sections['name']}.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def write_prompts(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def called(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: str | Path) -> dict[str, Any]:
    shown = called(*arguments, "--json")
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


def test_precompute_of_a_run_encodes_its_prompts_once_and_says_so(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    config = write_run(tmp_path, tiny_pipeline_dir)
    folder = tmp_path / "runs" / ".encoded"
    first = answer("precompute", config)
    texts = {*PROMPTS, "blurry", ""}
    files = list(folder.rglob("*.safetensors"))
    assert (first["encoded"], first["there"]) == (len(texts), 0) == (len(files), 0)
    assert first["bytes"] == sum(file.stat().st_size for file in files) and first["folder"] == str(folder)
    shown = called("precompute", config, f"rollout.embeddings={folder}")
    assert shown.exit_code == 0 and f"0 of {len(texts)} texts encoded" in shown.output, shown.output
    more = answer("precompute", tmp_path / "prompts.jsonl", "--model", tiny_pipeline_dir, "--to", folder, "--threads",
                  "1", "--max-sequence-length", "16", "--negative-prompt", "low quality")  # fmt: skip
    assert (more["encoded"], more["there"]) == (1, len(texts))


def test_what_says_nothing_of_prompts_and_what_is_missing_is_refused(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    config = write_run(tmp_path, tiny_pipeline_dir)
    prompts = tmp_path / "prompts.jsonl"
    refusals = {
        ("precompute", config, "--to", "x"): "--to: says nothing of a configuration's prompts, which names its own",
        ("precompute", prompts, "--model", "shapes", "--to", "x", "--flip"): "--flip: says nothing of prompts alone",
        ("precompute", prompts, "--model", "shapes", "--to", "x", "a=1"): "KEY=VALUE: says nothing of prompts alone",
        ("precompute", tmp_path, "--model", "shapes", "--to", "x", "--threads", "1"): "--threads: says nothing of cap",
        ("precompute", prompts, "--to", "x"): "--model: is missing",
        ("precompute", tmp_path, "--model", "shapes"): "--to: is missing",
    }
    for arguments, said in refusals.items():
        shown = called(*arguments)
        assert shown.exit_code == 2 and said in shown.output, (arguments, shown.output)


def test_never_refuses_a_prompt_without_an_embedding_by_name_before_anything_starts(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    config = write_run(tmp_path, tiny_pipeline_dir, rollout={"text_encoders": "never"})
    answer("precompute", config)
    assert load_align(config).config.rollout.text_encoders == "never"
    write_prompts(tmp_path, [{"prompt": prompt} for prompt in (*PROMPTS[:2], "a camel")])
    began = time.monotonic()
    shown = called("align", config)
    assert time.monotonic() - began < 5 and shown.exit_code == 2
    assert "rollout.text_encoders: is never, and 1 of the run's 4 prompts have no embedding in" in shown.output
    assert "'a camel'" in shown.output and not (tmp_path / "runs" / "run").exists()
    own = load_align(config, require_files=False)
    assert any("'a camel'" in line for line in own.missing)
    with pytest.raises(ConfigError, match="'a camel'"):  # on a machine that has other embeddings than the first
        RolloutWorker(own.config, texts=["a camel"])


def test_what_a_run_draws_is_what_it_asks_for(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "tag": "even" if i % 2 == 0 else "odd"} for i in range(11)]
    for iterations, weights in ((1, {}), (2, {"odd": 3}), (9, {"even": 2}), (4, {"odd": 0})):
        sampler = GroupSampler(rows, groups=3, group_size=2, seed=5, task_weights=weights)
        drawn = {prompt for i in range(iterations) for prompt in sampler.batch(i).prompts}
        found = [row["prompt"] for row in sampler.rows(iterations)]
        assert set(found) == drawn and len(found) == len(drawn)


def test_a_plan_knows_where_the_text_encoders_are_and_what_the_embeddings_take(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    def planned(**rollout: str) -> Any:
        return make_plan(load_align(write_run(tmp_path, tiny_pipeline_dir, rollout=rollout)).config)

    kept, dropped = planned(), planned(text_encoders="drop")
    text = sum(count for part, count in kept.model.frozen.items() if part != "vae") * 4
    assert kept.memory.text_encoders == dropped.memory.text_encoders == text > 0
    assert kept.memory.rollout_weights - dropped.memory.rollout_weights == text
    assert kept.memory.learner_rank == dropped.memory.learner_rank
    config = write_run(tmp_path, tiny_pipeline_dir, rollout={"text_encoders": "drop"})
    size = answer("precompute", config)["bytes"]
    assert dropped.num_texts == 5 and kept.num_texts == 0
    assert dropped.memory.embeddings <= size < dropped.memory.embeddings + 5 * 1000  # their heads
    assert "loaded apart" in dict(plan_rows(dropped))["embeddings"] and "embeddings" not in dict(plan_rows(kept))
    shown = answer("plan", config)
    assert shown["memory"]["text_encoders"] == text and not shown["memory"]["keeps_text_encoders"]


def test_samples_of_texts_that_lie_there_load_no_text_encoder_and_are_the_same(
    tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"path": str(tiny_pipeline_dir), "max_sequence_length": 16, "lora": None}
    plain = run_config(tiny_pipeline_dir, model=model)
    write_checkpoint(tmp_path / "run", plain)
    kept = plain.model_copy(update={"rollout": plain.rollout.model_copy(update={"embeddings": str(tmp_path / "kept")})})
    loaded: list[bool] = []

    def watched(*args: Any, text: bool = True, **options: Any) -> Any:
        loaded.append(text)
        return load_encoders(*args, text=text, **options)

    monkeypatch.setattr("flowalign.samples.opened.load_encoders", watched)

    def sampled(config: AlignConfig, name: str) -> torch.Tensor:
        source = sampled_model(tmp_path / "run", config, num_steps=2, negative_prompt="blurry")
        sample_checkpoint(source, PROMPTS, tmp_path / name, save_latents=True)
        return load_file(tmp_path / name / "latents.safetensors")["latents"]

    expected = sampled(plain, "plain")
    assert torch.equal(sampled(kept, "first"), expected) and torch.equal(sampled(kept, "second"), expected)
    assert loaded == [True, True, False]


def test_captions_that_an_earlier_version_encoded_serve(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    config = run_config(tiny_pipeline_dir)
    encoders = load_encoders(config.model)
    older = EncodedCache(tmp_path, None, config.model)
    condition = encoders.encode_prompts([PROMPTS[0], ""], 16, full=True)
    for place, text in enumerate((PROMPTS[0], "")):
        older._store(older._key(b"caption", text.encode()), {name: row[place] for name, row in condition.text.items()})
    cache = EncodedCache(tmp_path, None, config.model)
    found = cache.condition([cache.caption(PROMPTS[0])])
    assert all(torch.equal(row[:1], condition.text[name][:1]) for name, row in found.text.items())
    fresh = EncodedCache(tmp_path / "fresh", encoders, config.model)
    made = fresh.condition([fresh.caption(PROMPTS[0])])
    assert all(torch.equal(made.text[name], row) for name, row in found.text.items())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_run_without_text_encoders_learns_the_same_and_goes_on_with_other_prompts(
    backend: str, tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = {"backend": backend, "threads": 1, "rollout_workers": 2 if backend == "ray" else 1}

    def learned(name: str, **rollout: str) -> tuple[Path, str, dict[str, torch.Tensor]]:
        own = {"name": name, "rollout": {"chunk_size": 4, **rollout}, "cluster": cluster}
        config = write_run(tmp_path, tiny_pipeline_dir, **own)
        shown = called("align", config)
        assert shown.exit_code == 0, shown.output
        weights = tmp_path / "runs" / name / "checkpoints" / "step_000002" / "model.safetensors"
        return config, shown.output, load_file(weights)

    _, _, expected = learned("kept")
    config, said, found = learned("dropped", text_encoders="drop")
    assert "text encoders: none in rollout workers, 5 texts are read from" in said
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert len(list((tmp_path / "runs" / ".encoded").rglob("*.safetensors"))) == 5
    write_prompts(tmp_path, [{"prompt": prompt} for prompt in (*PROMPTS, "a camel")])
    shown = called("align", config, "iterations=4", "--accept-changed", "data.prompts", "--accept-changed",
                   "evaluation.prompts")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert len(list((tmp_path / "runs" / ".encoded").rglob("*.safetensors"))) == 6


@pytest.mark.slow
def test_workers_that_start_at_once_encode_each_text_once(
    tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one waits for the first, and finds all that it needs."""
    from concurrent.futures import ThreadPoolExecutor

    config = load_align(write_run(tmp_path, tiny_pipeline_dir, rollout={"text_encoders": "drop"})).config
    asked: list[Any] = []
    apart = encoded.encode_apart
    monkeypatch.setattr(encoded, "encode_apart", lambda what, given: (asked.append(given["texts"]), apart(what, given)))

    def start(_: int) -> list[str]:
        with torch_threads(1):
            found = encoded.rollout_embeddings(config, PROMPTS)
            assert found is not None
            return found.lacking(PROMPTS, 16)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(start, range(2))) == [[], []]
    assert asked == [PROMPTS]
