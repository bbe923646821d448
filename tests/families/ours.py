"""Our own walk over the tiny pipelines, a run over one, and what of both the families' tests ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from flowalign.algorithms import build_algorithm
from flowalign.cli import app
from flowalign.config.sections import ModelConfig, SamplingConfig
from flowalign.models.base import Policy
from flowalign.models.build import load_policy
from flowalign.models.fixed_geometry import fixed_geometry
from flowalign.models.guided import guided
from flowalign.record.metrics import read_metrics
from flowalign.samples.opened import policy_plan, torch_threads
from flowalign.samples.rollout import integrate, rollout
from flowalign.types import PromptBatch, Scores, value_of
from tests.algorithms.whole import prepare

LENGTH = 96  # tokens, enough for every prompt of these tests
PADDED = ("qwen_image", "z_image")  # families whose texts are as long as they are


class Given:
    """A noise that is there already, in the place of `SampleNoise`."""

    def __init__(self, noise: Tensor) -> None:
        self._noise = noise

    def draw(self) -> Tensor:
        return self._noise


def our_policy(directory: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> Policy:
    return load_policy(ModelConfig(path=str(directory), max_sequence_length=LENGTH, dtype=dtype))


def our_latents(
    policy: Policy,
    prompts: Sequence[str],
    *,
    noise: Tensor,
    num_steps: int,
    guidance: float,
    size: tuple[int, int],
    negative: str | None = None,
    geometry: int | None = None,
    **changes: Any,
) -> Tensor:
    """Return the latents of an evaluation's walk from initial noise (N, C, h, w), in one thread.

    ``guidance`` is a scale of ours; ``changes`` are fields of `Guidance`.
    """
    model = ModelConfig(height=size[0], width=size[1])
    plan = policy_plan(policy, SamplingConfig(num_steps=num_steps, guidance_scale=guidance), model)
    plan = replace(plan, guidance=replace(plan.guidance, **changes))
    negatives = None if negative is None else [negative] * len(prompts)
    with torch_threads(1):
        condition = policy.encoders.encode_prompts(prompts, LENGTH, negatives=negatives)
        return integrate(guided(policy.network), condition, Given(noise), plan, geometry=geometry)[2]  # type: ignore[arg-type]


def replay_difference(policy: Policy, prompts: Sequence[str], guidance: float) -> float:
    """Return the largest difference of log-probs that Flow-GRPO recomputes, shuffled and in other micro-batches, to
    those of its rollout."""
    content = {"type": "flow_grpo", "num_steps": 4, "group_size": 2, "guidance_scale": guidance}
    algorithm = build_algorithm(content, policy.network.schedule(64, 64))
    count = len(prompts)
    batch = PromptBatch(tuple(prompts), tuple(i // 2 for i in range(count)), tuple(range(count)), ({},) * count)
    plan = algorithm.plan(0, 0)
    assert plan is not None
    size: dict[str, Any] = {"length": LENGTH, "height": 64, "width": 64, "geometry": count}
    made = rollout(policy, batch, plan, seed=3, policy_version=0, **size).trajectories
    rewards = torch.randn(count, generator=torch.Generator().manual_seed(0))
    scores = Scores({"r": rewards}, rewards, torch.ones(count, dtype=torch.bool))
    models = {"policy": fixed_geometry(guided(policy.network), count)}
    train = prepare(algorithm, made, scores, models)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:-1]
    with torch.no_grad():
        outputs = [algorithm.loss(models, train.take(part)) for part in order.split(count)]
    assert len(outputs) > 1
    return max(float(value_of(output.metrics["replay/max_abs_dlogp"])) for output in outputs)


def alone_and_among_others(
    policy: Policy, prompts: Sequence[str], guidance: float, negative: str
) -> list[tuple[Tensor, Tensor]]:
    """Give final latents, log-prob and pixels of each sample of a stochastic rollout as it is made alone and among the
    others, in batches filled up to one more than all: pairs of what must be equal."""
    content = {"type": "flow_grpo", "num_steps": 3, "group_size": 2, "guidance_scale": guidance}
    plan = build_algorithm(content, policy.network.schedule(64, 64)).plan(0, 0)
    assert plan is not None
    ids = tuple(range(len(prompts)))
    size: dict[str, Any] = {"length": LENGTH, "height": 64, "width": 64, "geometry": len(ids) + 1}

    def made(rows: Sequence[int]) -> list[Tensor]:
        batch = PromptBatch(tuple(prompts), ids, ids, ({},) * len(ids), (negative,) * len(ids)).take(rows)
        walked = rollout(policy, batch, plan, seed=3, policy_version=0, **size)
        kept = walked.trajectories
        return [torch.as_tensor(kept.final_NCHW), kept.log_prob_NS, walked.pictures.images]

    together = made(ids)
    return [(one[0], all_[row]) for row in ids for one, all_ in zip(made([row]), together, strict=True)]


def card_class(directory: Path) -> str:
    """Name the class that an export's card loads it with."""
    found = re.search(r"(\w+)\.from_pretrained\(", (directory / "README.md").read_text())
    assert found is not None
    return found[1]


def flowalign(*arguments: str | Path) -> str:
    """Run a command in this process and return what it printed; it must end well."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def write_run(directory: Path, model: Path, text: str = "") -> Path:
    """Write an iteration of Flow-GRPO with a LoRA over a pipeline, brighter pictures being better, with more YAML."""
    (directory / "brightness.py").write_text(
        "def reward(images, prompts, metadata):\n    return images.mean((1, 2, 3))"
    )
    prompts = ["a red cube", "a photo of a blue ball", "a green table near the old house"]
    (directory / "prompts.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
    path = directory / "run.yaml"
    path.write_text(
        "name: once\n"
        "iterations: 1\n"
        f"runs_dir: {directory / 'runs'}\n"
        f"model: {{path: {model}, max_sequence_length: {LENGTH}, height: 64, width: 64, lora: {{rank: 4, alpha: 6}}}}\n"
        "data: {prompts: prompts.jsonl, groups_per_iteration: 2}\n"
        "algorithm: {type: flow_grpo, group_size: 2, num_steps: 3, window: {kind: fixed, start: 0, size: 2}}\n"
        f"rewards: [{{spec: '{directory / 'brightness.py'}:reward'}}]\n"
        "rollout: {chunk_size: 2}\n"
        "learner: {micro_batch_size: 2, engine: torch, optimizer: {learning_rate: 0.01}}\n"
        "evaluation: {every: 0}\n"
        "cluster: {backend: local, threads: 1}\n" + text
    )
    return path


def assert_an_iteration_is_exported(directory: Path, model: Path, *changes: str) -> None:
    """An iteration replays its rollout exactly and moves the weights, and its LoRA is written in both layouts."""
    flowalign("align", write_run(directory, model), *changes)
    made, lora = directory / "runs" / "once", directory / "lora"
    row = read_metrics(made / "metrics.jsonl")[-1]
    assert row["iteration"] == 1 and row["replay/max_abs_dlogp"] == 0 and row["learner/updates"] == 1
    flowalign("export", made, "--to", lora, "--as", "lora")
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        assert any(tensor.any() for key, tensor in load_file(lora / name).items() if ".lora_B." in key)
