"""``learner.compile: auto``: decided by what a run saves and what compiling takes, said, recorded and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.training import PretrainConfig
from flowalign.intake.file import load_align, load_run
from flowalign.intake.resolved import read_resolved, write_resolved
from flowalign.models.blocks import blocks_of
from flowalign.models.build import load_network
from flowalign.plan import make_plan
from flowalign.run import compiled
from tests.families.adapted import run_of
from tests.families.ours import flowalign
from tests.tiny import run_config, write_config

AUTO = {"engine": "torch", "compile": "auto"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


def config_of(pipeline: Path, iterations: int = 20, **changes: Any) -> AlignConfig:
    return run_config(pipeline, **{"iterations": iterations, "learner": AUTO, **changes})


def test_a_run_compiles_where_its_passes_save_more_than_that_takes(tiny_pipeline_dir: Path) -> None:
    short, long = (compiled.decided(config_of(tiny_pipeline_dir, count)) for count in (2, 100_000_000))
    assert short[0] is False and short[1].startswith("2 iterations would save ")
    assert long[0] is True and "and compiling takes about 42 s" in long[1]  # the last block is of a kind of its own


@pytest.mark.parametrize(
    ("iterations", "cached", "said"),
    [
        (80, False, (True, "80 iterations would save 45 s of passes, and compiling takes about 42 s")),
        (70, False, (False, "70 iterations would save 39 s of passes, and compiling takes about 42 s")),
        (
            5,
            True,
            (
                True,
                "5 iterations would save 2.8 s of passes, and compiling takes about 2.1 s, which torch's cache holds",
            ),
        ),
    ],
)
def test_the_quickstarts_model_pays_back_where_its_benchmark_did(
    iterations: int, cached: bool, said: tuple[bool, str]
) -> None:
    """``scripts/benchmarks/results/compiled.json``: after 81 iterations, or 3 with a cache, of 2.8 s of passes."""
    assert compiled.pays_back(iterations, 2.8, 42.0, cached) == said


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"learner": {**AUTO, "engine": "fsdp"}}, "FSDP cannot run a compiled network"),
        ({"learner": {**AUTO, "engine": "deepspeed", "zero_stage": 3}}, "ZeRO stage 3 cannot run"),
        ({"learner": {**AUTO, "activation_checkpointing": "blocks"}}, "a compiled network chooses this by itself"),
        ({"learner": {**AUTO, "offload": "disk"}}, "a compiled network has no blocks to bring in"),
        ({"cluster": {"device": "cuda"}}, "what it saves on a GPU has not been measured; write true"),
    ],
)
def test_what_speaks_against_compiling_is_said(tiny_pipeline_dir: Path, changes: dict[str, Any], why: str) -> None:
    found = compiled.decided(config_of(tiny_pipeline_dir, 100_000_000, **changes))
    assert found[0] is False and found[1].startswith(why)


def test_without_a_compiler_nothing_is_compiled(tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled.decided(config_of(tiny_pipeline_dir, 100_000_000)) == (False, "there is no C++ compiler")


def test_each_shape_and_a_reference_of_a_lora_are_graphs_of_their_own(tiny_pipeline_dir: Path) -> None:
    def seconds(**changes: Any) -> float:
        config = config_of(tiny_pipeline_dir, **changes)
        needs = build_algorithm(config.algorithm).needs
        return compiled.compiling_s(load_network(config.model), config, needs) / compiled.OF_A_KIND

    two = {"learner": {**AUTO, "micro_batch_size": 4}}
    sizes = {"data": {"sizes": ["64x64", "64x32"]}, "learner": {**AUTO, "micro_batch_size": 8}}
    lora = {"path": str(tiny_pipeline_dir), "lora": {"rank": 2, "alpha": 4}}
    by_lora = {"model": lora, "algorithm": {"type": "flow_grpo", "group_size": 4, "beta": 0.1}}
    one = {"learner": {**AUTO, "micro_batch_size": 8}}
    kinds = seconds(**one)
    assert seconds(**two) == 2 * kinds and seconds(**sizes) == 3 * kinds  # two sizes, and that of evaluations
    assert seconds(**by_lora, **one) == 2 * kinds


def test_a_training_compiles_its_network_whole(tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {
        "name": "train",
        "model": {"path": str(tiny_pipeline_dir)},
        "algorithm": {"type": "rectified_flow"},
        "latents": "bank",
        "phases": [{"iterations": 100_000_000, "learning_rate": 1e-4, "max_sequence_lengths": {16: 1, 32: 1, 64: 0}}],
        "learner": {"compile": "auto", "batch_size": 6, "micro_batch_size": 4},
    }
    config = PretrainConfig.model_validate(sections)
    needs, network = build_algorithm(config.algorithm).needs, load_network(config.model)
    blocks = len(list(blocks_of(network.module)))
    assert compiled.compiling_s(network, config, needs) == blocks * 2 * 2 * compiled.OF_A_BLOCK  # the last is short
    assert compiled.decided(config)[0] is True
    assert "derivative" in str(compiled.hindrance(config, replace(needs, inputs=("r",))))
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert compiled.decided(config) == (False, "several processes would each decide by what they measure")


def test_a_cache_is_known_by_a_run_with_the_same_graphs(tiny_pipeline_dir: Path) -> None:
    config = config_of(tiny_pipeline_dir)
    assert not compiled.is_cached(config)
    compiled.remember(config)
    assert compiled.is_cached(config.model_copy(update={"name": "other", "seed": 5, "iterations": 3}))
    wider = config.model_copy(update={"rollout": config.rollout.model_copy(update={"chunk_size": 9})})
    assert not compiled.is_cached(wider)


def test_a_run_says_and_records_what_it_decided_and_goes_on_so(
    tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run_of(tmp_path, tiny_pipeline_dir, "null")
    told = flowalign("align", file, "learner.compile=auto")
    assert "learner.compile: auto is false; 1 iteration would save " in told
    run = tmp_path / "runs" / tmp_path.name
    assert read_resolved(run).learner.compile is False
    monkeypatch.setattr(compiled, "OF_A_KIND", 0.0)  # another machine, where it would pay
    told = flowalign("align", file, "learner.compile=auto", "iterations=2")
    assert "learner.compile: auto is false, as the run was begun" in told
    assert read_resolved(run).learner.compile is False


def test_a_run_that_was_compiled_goes_on_compiled(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    own = [f"runs_dir={tmp_path}", "learner.compile=auto"]
    loaded = load_align(path, own)
    assert loaded.config.learner.compile == "auto" and not loaded.config.rollouts_compile
    learner = loaded.config.learner.model_copy(update={"compile": True})
    write_resolved(loaded.config.model_copy(update={"learner": learner}), tmp_path / "tiny")
    assert load_align(path, own).config.learner.compile == "auto"  # it has no checkpoint, and begins anew
    (tmp_path / "tiny" / "checkpoints").mkdir()
    (tmp_path / "tiny" / "checkpoints" / "latest").write_text("step_000002\n")
    assert load_align(path, own).config.rollouts_compile
    assert load_align(path, [*own, "checkpoint.resume=never"]).config.learner.compile == "auto"


def test_a_plan_says_that_it_does_not_know_and_a_wrong_value_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    loaded = load_run(path, ["learner.compile=auto"])
    assert any(note.startswith("learner.compile: auto is decided when") for note in make_plan(loaded.config).notes)
    with pytest.raises(ConfigError, match=r"^learner\.compile: got 'maybe'; write true or false or auto$"):
        load_align(path, ["learner.compile=maybe"])
