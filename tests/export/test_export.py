from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file

from flowalign.config.sections import SHIPPED
from flowalign.config.training import PretrainConfig
from flowalign.export import ExportError, export
from flowalign.export.card import base_name, write_card
from flowalign.export.verify import differences, load_pipeline, probe, unexplained
from flowalign.intake.recorded import of_training
from flowalign.models.build import load_policy
from flowalign.models.guided import guided
from flowalign.record.checkpoint import CheckpointError
from flowalign.record.outputs import DirectoryTaken
from flowalign.samples.opened import Which, ode_plan, open_policy
from flowalign.samples.rollout import SampleNoise, integrate
from flowalign.samples.sampled import sample_checkpoint, sampled_model
from tests.tiny import run_config, write_checkpoint, write_pipeline

PROMPTS = ["a photo of a red circle", "a photo of three squares", "a photo of two stars"]
METRICS = {"eval/geneval/overall": 0.5, "eval/geneval/counting": 0.25, "reward/total/mean": 0.4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("base") / "tiny-sd3")


@pytest.fixture
def runs(base: Path, tmp_path: Path) -> dict[str, Path]:
    made = {}
    for name in ("full", "lora"):
        write_checkpoint(tmp_path / name, run_config(base, lora=name == "lora"), metrics=METRICS)
        made[name] = tmp_path / name
    return made


def rollout_latents(run: Path, base: Path, lora: bool, guidance: float, which: Which = "model") -> torch.Tensor:
    policy, _ = open_policy(run, run_config(base, lora=lora), which)
    noise = SampleNoise(5, range(len(PROMPTS)), policy.network.latent_shape(None, None))
    return integrate(
        guided(policy.network), policy.encoders.encode_prompts(PROMPTS, 16), noise, ode_plan(policy, 10, guidance)
    )[2]


def public_latents(pipeline: Any, guidance: float) -> torch.Tensor:
    noise = SampleNoise(5, range(len(PROMPTS)), (16, 8, 8)).draw()
    return pipeline(
        PROMPTS,
        latents=noise,
        num_inference_steps=10,
        guidance_scale=guidance,
        max_sequence_length=16,
        output_type="latent",
    ).images


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_an_exported_pipeline_gives_our_latents_from_the_same_noise(
    runs: dict[str, Path], base: Path, tmp_path: Path, name: str, guidance: float
) -> None:
    lora = name == "lora"
    made = export(runs[name], tmp_path / "out", kind="pipeline", config=run_config(base, lora=lora))
    assert max(made.velocity_error, made.latents_error) <= 1e-5
    ours = rollout_latents(runs[name], base, lora, guidance)
    assert difference(public_latents(load_pipeline(made.path), guidance), ours) <= 1e-5
    assert difference(public_latents(load_pipeline(base), guidance), ours) > 1e-2


@pytest.mark.parametrize("library", ["diffusers", "peft"])
def test_exported_lora_files_give_our_latents_in_both_layouts(
    runs: dict[str, Path], base: Path, tmp_path: Path, library: str
) -> None:
    made = export(runs["lora"], tmp_path / "out", kind="lora", config=run_config(base, lora=True))
    pipeline = load_pipeline(base)
    if library == "diffusers":
        pipeline.load_lora_weights(str(made.path))
    else:
        PeftModel.from_pretrained(pipeline.transformer, str(made.path))  # type: ignore[arg-type]
    ours = rollout_latents(runs["lora"], base, True, 3.0)
    assert difference(public_latents(pipeline, 3.0), ours) <= 1e-5


@pytest.mark.parametrize("kind", ["lora", "pipeline"])
def test_a_lora_of_a_base_in_eight_bits_is_exported_against_the_base_as_it_is(
    runs: dict[str, Path], base: Path, tmp_path: Path, kind: str
) -> None:
    plain, eight = run_config(base, lora=True), run_config(base, lora=True)
    eight = eight.model_copy(update={"model": eight.model.model_copy(update={"base_dtype": "int8"})})
    made, other = (
        export(runs["lora"], tmp_path / name, kind=kind, config=own) for name, own in (("8", eight), ("32", plain))
    )
    files = list(made.path.glob("**/*.safetensors"))
    assert files and all(f.read_bytes() == (other.path / f.relative_to(made.path)).read_bytes() for f in files)
    assert made.base_deviation is not None and 1e-4 < made.base_deviation < 0.05
    assert made.on_other_base is not None and f"differs by {made.base_deviation:.2%} from that on the int8 base" in (
        made.on_other_base
    )
    assert other.on_other_base is None and "on a base in int8" in (made.path / "README.md").read_text()


def test_a_plain_from_pretrained_reads_the_export_once_the_absent_encoder_is_named(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    made = export(runs["full"], tmp_path / "out", config=run_config(base))
    pipeline = StableDiffusion3Pipeline.from_pretrained(made.path, text_encoder_3=None, tokenizer_3=None)
    assert public_latents(pipeline, 1.0).shape == (3, 16, 8, 8)


def test_the_ema_export_holds_the_averaged_weights(runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    made = export(runs["full"], tmp_path / "out", kind="ema", config=run_config(base))
    latents = public_latents(load_pipeline(made.path), 1.0)
    assert difference(latents, rollout_latents(runs["full"], base, False, 1.0, "ema")) <= 1e-5
    assert difference(latents, rollout_latents(runs["full"], base, False, 1.0)) > 1e-2


def test_a_lora_of_the_averaged_weights_can_be_exported(runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    config = run_config(base, lora=True, evaluation={"weights": "ema"}, learner={"ema_decay": 0.5})
    made = export(runs["lora"], tmp_path / "out", kind="lora", config=config)  # those that a run evaluates
    assert (made.kind, made.weights) == ("lora", "ema")
    assert export(runs["lora"], tmp_path / "last", kind="lora", weights="model", config=config).weights == "model"
    pipeline = load_pipeline(base)
    pipeline.load_lora_weights(str(made.path))
    latents = public_latents(pipeline, 1.0)
    assert difference(latents, rollout_latents(runs["lora"], base, True, 1.0, "ema")) <= 1e-5
    assert difference(latents, rollout_latents(runs["lora"], base, True, 1.0)) > 1e-3


def test_two_names_of_weights_are_not_both_exported(runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="of ema and of model weights was asked for; name one"):
        export(runs["full"], tmp_path / "out", kind="ema", weights="model", config=run_config(base))


def test_a_kind_may_name_weights_by_their_former_name_too(runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    config = run_config(base, evaluation={"weights": "ema"}, learner={"ema_decay": 0.5})
    made = export(runs["full"], tmp_path / "out", kind="policy", config=config)
    assert (made.kind, made.weights) == ("pipeline", "model")


def test_text_encoders_are_exported_in_float32_and_no_local_path_is(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    made = export(runs["full"], tmp_path / "out", config=run_config(base))
    dtypes = {w.dtype for part in ("text_encoder", "text_encoder_2") for w in read(made.path / part).values()}
    assert dtypes == {torch.float32}
    texts = [path.read_text() for path in made.path.glob("**/*.json") if path.name != "flowalign.json"]
    assert not [text for text in texts if str(base.parent) in text]


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_half_precision_pipeline_is_compared_with_equally_rounded_weights(
    runs: dict[str, Path], base: Path, tmp_path: Path, name: str
) -> None:
    made = export(runs[name], tmp_path / "out", config=run_config(base, lora=name == "lora"), dtype="bfloat16")
    assert {w.dtype for w in read(made.path / "transformer").values()} == {torch.bfloat16}
    assert made.latents_error <= 1e-5


def test_a_model_that_magnifies_roundings_is_held_to_what_a_rounding_makes_of_its_latents(base: Path) -> None:
    config = run_config(base)
    policy = load_policy(config.model)
    parameters = dict(policy.network.module.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.mul_(8 if "weight" in name else 1)
    expected, pipeline = probe(policy, config), load_pipeline(base)
    pipeline.transformer = policy.network.module
    same = differences(expected, policy.network.family, pipeline, config)
    assert same.rounding > 1e-6  # of a plain model 1e-7
    assert same.shown <= 1e-5
    with torch.no_grad():
        parameters["proj_out.bias"].add_(0.1 * expected.velocity_NCHW.abs().max())
    other = differences(expected, policy.network.family, pipeline, config)
    assert min(other.velocity, other.latents - 4 * other.rounding) > 1e-3
    assert same._replace(velocity=0.0, latents=5e-5, rounding=1e-6).shown == pytest.approx(4.6e-5)
    wild = same._replace(velocity=0.0, latents=0.2, rounding=0.1)  # roundings explain a thousandth at most
    assert wild.shown == pytest.approx(0.199) and unexplained(1e-3, 0.1) == 0


def test_an_export_that_differs_is_refused_and_leaves_nothing(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match="differs from the policy"):
        export(runs["full"], tmp_path / "out", config=run_config(base), tolerance=-1.0)
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_without_lora_has_no_lora_to_export(runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="export it as pipeline"):
        export(runs["full"], tmp_path / "out", kind="lora", config=run_config(base))


def test_a_directory_that_is_no_earlier_export_is_not_replaced(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DirectoryTaken, match="no earlier export"):
        export(runs["full"], tmp_path / "out", config=run_config(base))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_an_earlier_export_is_replaced_only_where_that_is_asked_for(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    first = export(runs["lora"], tmp_path / "out", config=run_config(base, lora=True))
    assert re.fullmatch(
        r"compared 4 latents of 4 steps, guidance 1 and 3, of the reloaded files with the policy's: largest difference "
        r"\d\.\de-0\d of \d\.\d",
        first.compared,
    )
    with pytest.raises(
        DirectoryTaken, match=r"an export \(pipeline\) of .*lora/checkpoints/step_000010; give --overwr"
    ):
        export(runs["full"], tmp_path / "out", config=run_config(base))
    made = export(runs["full"], tmp_path / "out", config=run_config(base), overwrite=True)
    record = json.loads((made.path / "flowalign.json").read_text())
    assert record["max_sequence_length"] == 16
    assert record["checkpoint"].endswith("full/checkpoints/step_000010")
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_lora_of_another_base_is_refused(runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    other = write_pipeline(tmp_path / "other")
    weights = next((other / "transformer").glob("*.safetensors"))
    save_file({name: w + 1 for name, w in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="another base model"):
        export(runs["lora"], tmp_path / "out", kind="lora", config=run_config(other, lora=True))


def test_a_run_without_a_checkpoint_says_what_to_give(base: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        export(tmp_path / "new", tmp_path / "out", config=run_config(base))


@pytest.mark.parametrize(("name", "kind"), [("full", "pipeline"), ("lora", "lora"), ("full", "ema")])
def test_the_card_states_base_rewards_scores_and_licence(
    runs: dict[str, Path], base: Path, tmp_path: Path, name: str, kind: Any
) -> None:
    rows = [{"iteration": 0, "eval/geneval/overall": 0.3, "eval/geneval/counting": 0.125}]
    (runs[name] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = export(runs[name], tmp_path / "out", kind=kind, config=run_config(base, lora=name == "lora"))
    text = (made.path / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "other"
    assert front["tags"][:4] == ["flowalign", "text-to-image", "reinforcement-learning", "flow-grpo"]
    assert front["library_name"] == ("peft" if kind == "lora" else "diffusers")
    assert ModelCard(text).data.eval_results[0].metric_value == 0.5  # type: ignore[index]
    for part in (
        "`tiny-sd3`",
        "flow_grpo",
        "`geneval` × 1",
        "| geneval/overall | 0.300 | 0.500 |",
        "| geneval/counting",
    ):
        assert part in text
    assert ("not of the weights exported here" in text) == (kind == "ema")


def test_the_model_of_the_package_goes_by_its_name_in_a_card() -> None:
    assert base_name(str(SHIPPED / "pipeline")) == "shapes" and base_name("models/pipeline") == "pipeline"
    assert base_name("hub/models--owner--name/snapshots/1") == "owner/name"


def test_a_card_of_the_shipped_base_states_its_licence(tmp_path: Path) -> None:
    shipped = run_config(SHIPPED / "pipeline", lora=True)
    write_card(tmp_path, shipped, {"iteration": 1}, kind="lora", run_dir=tmp_path)
    assert (tmp_path / "README.md").read_text().startswith("---\nlicense: apache-2.0\nlibrary_name")


def test_a_card_says_of_rewards_what_is_trained_on_alone(base: Path, tmp_path: Path) -> None:
    parts = {"geneval_colors": 1, "geneval_positions": 2}
    geneval = {"spec": "geneval", "weight": 0, "options": {"clauses": True}, "parts": parts}
    rewards = [geneval, {"spec": "jpeg", "gold": True}, {"spec": "clip", "weight": 0}]
    write_card(tmp_path, run_config(base, rewards=rewards), {"iteration": 1}, kind="pipeline", run_dir=tmp_path)
    said = "`geneval_colors` × 1 + `geneval_positions` × 2 (clauses=True); `jpeg`, gold; `clip`, measured only |"
    assert f"| Rewards | {said}" in (tmp_path / "README.md").read_text()


def test_a_card_calls_only_verdicts_of_geneval_by_its_name(base: Path, tmp_path: Path) -> None:
    state = {"iteration": 1, "metrics": {"eval/jpeg/overall": 0.5}}
    own = run_config(base, evaluation={"num_samples": 12, "prompts": "prompts.txt", "scorer": {"spec": "jpeg"}})
    write_card(tmp_path, own, state, kind="pipeline", run_dir=tmp_path)
    text = (tmp_path / "README.md").read_text()
    result = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"][0]
    assert result["dataset"] == {"type": "prompts", "name": "prompts.txt"}
    assert "red circle" not in text  # which is of the shapes


def test_a_card_of_a_training_has_its_name_and_says_that_it_is_a_lora(base: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = {"name": "mine", "iterations": 4, "latents": "bank", "learner": {"batch_size": 2}}
    content |= {"model": {"path": str(base), "lora": {"rank": 4, "alpha": 4}}, "algorithm": {"type": "rectified_flow"}}
    training = PretrainConfig.model_validate(content)
    state = {"iteration": 4, "config": training.model_dump(mode="json")}
    write_card(tmp_path, of_training(training), state, kind="lora", run_dir=tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "\n# mine\n" in text
    assert "| Algorithm | rectified_flow · LoRA, rank 4, alpha 4 |" in text


def test_what_an_evaluation_was_made_of_is_no_score_of_a_card(base: Path, tmp_path: Path) -> None:
    made = {"eval/num_samples": 24.0, "eval/num_prompts": 20.0, "eval/seed": 1234, "eval/skipped_steps": 0.25}
    error = {"standard_error/geneval/overall": 0.0321}
    state = {"iteration": 1, "metrics": {"eval/geneval/overall": 0.5, **error, **made}}
    write_card(tmp_path, run_config(base), state, kind="pipeline", run_dir=tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| geneval/overall | – | 0.500 ± 0.032 |" in text and not {key for key in made if f"| {key[5:]} |" in text}
    assert ", seed 1234, 25% of the steps skipped, the same before and after." in text
    write_card(tmp_path, run_config(base), {"iteration": 1, "metrics": made}, kind="pipeline", run_dir=tmp_path)
    assert "This run was not evaluated before the export." in (tmp_path / "README.md").read_text()


def test_the_licence_fields_of_the_base_model_are_kept(runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    made = export(runs["lora"], tmp_path / "out", kind="lora", config=run_config(base, lora=True))
    (base / "README.md").unlink()
    assert (made.path / "README.md").read_text().startswith("---\nlicense: apache-2.0\nlibrary_name")


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_the_script_in_the_docs_draws_the_same_latents_with_diffusers_alone(
    runs: dict[str, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    script = text.partition("## The same picture in diffusers")[2].partition("```python\n")[2].partition("```")[0]
    config = run_config(base, lora=True)
    prompts = ["a photo of a cat", "two dogs"]
    model = sampled_model(runs["lora"], config, num_steps=5, guidance_scale=2.5, seed=3)
    out = tmp_path / "samples"
    sample_checkpoint(model, prompts, out, save_latents=True)
    export(runs["lora"], tmp_path / "aligned", config=config)
    capsys.readouterr()
    exec(compile(script, "docs/sampling.md", "exec"), {})
    _, _, found, _, largest = capsys.readouterr().out.split()
    assert 0 <= float(found) <= 1e-5 * float(largest) and float(largest) > 1
