"""One side of peer.py: ours or the peer's loop, in a process that does what its standard input says.

``states DIR`` writes velocities and log-probs of one batch of states; ``iterate N`` does iteration N and prints its
seconds. The peer's files are imported from the checkout that the user names.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import positive
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.config.sections import SHIPPED
from flowalign.data.prompts import GroupSampler, load_prompts
from flowalign.intake.file import load_align
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from rewards.resolve import resolve

CONFIG = Path("configs/shapes/flow_grpo.yaml")
STEPS, TRAINED, LENGTH, NOISE = 10, 9, 2, 0.7
RATE, CLIP, SEED = 1.2e-4, 1e-4, 0
REWARD = {"mode": "partial", "detector": "palette"}


class Ours:
    """The local backend, as `flowalign align` runs it."""

    def __init__(self, options: argparse.Namespace) -> None:
        changes = {
            "cluster.backend": "local",
            "cluster.threads": options.threads,
            "cluster.reward_threads": options.threads,
            "learner.engine": "torch",
            "learner.compile": options.compile,
            "learner.ema_decay": None,
            "learner.updates_per_iteration": 1,
            "learner.micro_batch_size": options.batch,
            "evaluation.weights": "model",
            "rollout.chunk_size": options.batch,
            "data.groups_per_iteration": options.groups,
            "model.dtype": options.dtype,
            "algorithm.group_size": options.group_size,
            "algorithm.noise_level": NOISE,
            "algorithm.window": {"kind": "fixed", "start": 0, "size": TRAINED},
            "algorithm.clip_range": CLIP,
            "algorithm.initial_noise": "own",
            "logging.wandb": "disabled",
        }
        written = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]
        loaded = load_align(CONFIG, written)
        self.run = build_run(loaded.config)
        self.backend = LocalBackend(loaded.config, loaded.base_dir)
        self.backend.sync()

    def states(self, folder: Path) -> None:
        """Walk one batch; write its states, their velocities at each step and the log-probs of the walk."""
        plan = self.run.plan(0)
        assert plan is not None
        batch = self.run.sampler.batch(0).take(range(8))
        made = self.backend.collect(batch, plan, seed=SEED)
        walked = made.trajectories[0]
        network = self.backend.learner.network
        velocities = []
        with torch.no_grad():
            for step in range(TRAINED):
                t = torch.full((len(batch),), plan.sigmas[step])
                velocities.append(network.velocity(walked.states_NSCHW[:, step], t, walked.condition))
        told = {"velocity": torch.stack(velocities, 1), "log_prob": walked.log_prob_NS}
        save_file({name: value.contiguous() for name, value in told.items()}, folder / "ours.safetensors")
        save_file({"states": walked.states_NSCHW.contiguous()}, folder / "walk.safetensors")
        (folder / "prompts.json").write_text(json.dumps(list(batch.prompts)))

    def iterate(self, iteration: int) -> dict[str, float]:
        began = time.perf_counter()
        plan = self.run.plan(iteration)
        assert plan is not None
        made = self.backend.collect(self.run.sampler.batch(iteration), plan, seed=SEED)
        rolled = time.perf_counter()
        update = self.backend.update(made.trajectories, made.scores, iteration)
        self.backend.sync()
        ended = time.perf_counter()
        return {
            "rollout_s": rolled - began - made.score_s,
            "score_s": made.score_s,
            "learn_s": ended - rolled,
            "iteration_s": ended - began,
            "images": float(len(made.batch)),
            "transitions": update.metrics["learner/transitions"],
            "reward": float(made.scores.total.mean()),
        }


class Theirs:
    """The peer's pipeline function and step function, and the update of its train_sd3 over them."""

    def __init__(self, options: argparse.Namespace) -> None:
        from diffusers import StableDiffusion3Pipeline

        package = types.ModuleType("flow_grpo")
        package.__path__ = [str(options.peer / "flow_grpo")]  # its __init__ imports what a rollout does not need
        sys.modules["flow_grpo"] = package
        from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob  # type: ignore
        from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob  # type: ignore

        self.options, self.walk, self.step = options, pipeline_with_logprob, sde_step_with_logprob
        absent: Any = {"text_encoder_3": None, "tokenizer_3": None}
        shipped = str(SHIPPED / "pipeline")
        self.pipeline: Any = StableDiffusion3Pipeline.from_pretrained(shipped, trust_remote_code=False, **absent)
        self.pipeline.set_progress_bar_config(disable=True)
        for frozen in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            frozen.float().requires_grad_(False)
        self.network = self.pipeline.transformer.float().requires_grad_(True)
        if options.compile:
            self.network.compile()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE)
        groups = {"groups": options.groups, "group_size": options.group_size}
        self.sampler = GroupSampler(load_prompts("shapes:train"), **groups, seed=SEED)
        self.scorer = resolve({"type": "geneval", **REWARD})

    def precision(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.options.dtype == "bfloat16" else nullcontext()

    def encoded(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=prompts,
                prompt_2=prompts,
                prompt_3=prompts,
                do_classifier_free_guidance=False,
                max_sequence_length=LENGTH,
                device="cpu",
            )
        return tokens, pooled

    def states(self, folder: Path) -> None:
        """Take the states that our side walked through its own network and step function."""
        prompts = json.loads((folder / "prompts.json").read_text())
        states = load_file(folder / "walk.safetensors")["states"]
        tokens, pooled = self.encoded(prompts)
        self.pipeline.scheduler.set_timesteps(STEPS)
        velocities, log_probs = [], []
        with torch.no_grad():
            for step in range(TRAINED):
                times = self.pipeline.scheduler.timesteps[step].expand(len(prompts))
                velocity, log_prob = self.asked(states[:, step], states[:, step + 1], times, tokens, pooled)
                velocities.append(velocity)
                log_probs.append(log_prob)
        told = {"velocity": torch.stack(velocities, 1), "log_prob": torch.stack(log_probs, 1)}
        save_file({name: value.contiguous() for name, value in told.items()}, folder / "theirs.safetensors")

    def asked(self, x: Tensor, after: Tensor, times: Tensor, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity at a state and the log-prob of the step to the next."""
        with self.precision():
            velocity = self.network(
                hidden_states=x,
                timestep=times,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            _, log_prob, _, _ = self.step(
                self.pipeline.scheduler, velocity.float(), times, x, prev_sample=after, noise_level=NOISE
            )
        return velocity.float(), log_prob

    def iterate(self, iteration: int) -> dict[str, float]:
        began = time.perf_counter()
        made, score_s = self.roll_out(iteration)
        rolled = time.perf_counter()
        transitions = self.learn(made)
        ended = time.perf_counter()
        return {
            "rollout_s": rolled - began - score_s,
            "score_s": score_s,
            "learn_s": ended - rolled,
            "iteration_s": ended - began,
            "images": float(len(made["reward"])),
            "transitions": float(transitions),
            "reward": float(made["reward"].mean()),
        }

    def roll_out(self, iteration: int) -> tuple[dict[str, Tensor], float]:
        batch, size, score_s = self.sampler.batch(iteration), self.options.batch, 0.0
        parts: list[dict[str, Tensor]] = []
        self.network.eval()
        for begin in range(0, len(batch), size):
            part = batch.take(range(begin, min(begin + size, len(batch))))
            prompts = list(part.prompts)
            tokens, pooled = self.encoded(prompts)
            with torch.no_grad(), self.precision():
                images, latents, log_probs = self.walk(
                    self.pipeline,
                    prompt_embeds=tokens,
                    pooled_prompt_embeds=pooled,
                    num_inference_steps=STEPS,
                    guidance_scale=1.0,
                    output_type="pt",
                    noise_level=NOISE,
                    max_sequence_length=LENGTH,
                )
            scoring = time.perf_counter()
            pixels = (images.float().cpu().numpy().transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
            rewards = self.scorer.score(pixels, prompts, [dict(row) for row in part.metadata])
            score_s += time.perf_counter() - scoring
            states = torch.stack(latents, 1)
            times = self.pipeline.scheduler.timesteps.repeat(len(prompts), 1)
            own = {"tokens": tokens, "pooled": pooled, "times": times, "x": states[:, :-1], "after": states[:, 1:]}
            own |= {"log_prob": torch.stack(log_probs, 1)}
            parts.append({**own, "reward": torch.as_tensor(np.asarray(next(iter(rewards.values())))).float()})
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, score_s

    def learn(self, made: dict[str, Tensor]) -> int:
        """One update over the images whose group has rewards that differ; return the number of trained transitions."""
        groups = made["reward"].view(-1, self.options.group_size)
        advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        kept = advantage != 0
        own = {key: value[kept] for key, value in made.items()}
        advantage = advantage[kept].clamp(-5, 5)
        order = torch.randperm(len(advantage))
        own, advantage = {key: value[order] for key, value in own.items()}, advantage[order]
        self.network.train()
        transitions = 0
        for begin in range(0, len(advantage), self.options.batch):
            part = slice(begin, begin + self.options.batch)
            for step in range(TRAINED):
                x, after, times = (own[key][part, step] for key in ("x", "after", "times"))
                _, log_prob = self.asked(x, after, times, own["tokens"][part], own["pooled"][part])
                ratio = torch.exp(log_prob - own["log_prob"][part, step])
                lost = torch.maximum(-advantage[part] * ratio, -advantage[part] * ratio.clamp(1 - CLIP, 1 + CLIP))
                (lost.sum() / len(advantage) / TRAINED).backward()
                transitions += len(x)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return transitions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "theirs"))
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--threads", type=positive, required=True)
    parser.add_argument("--groups", type=positive, required=True)
    parser.add_argument("--group-size", type=positive, required=True)
    parser.add_argument("--batch", type=positive, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    side: Any = Ours(options) if options.side == "ours" else Theirs(options)
    for line in sys.stdin:
        what, _, value = line.strip().partition(" ")
        if what == "states":
            side.states(Path(value))
            print(json.dumps({}), flush=True)
        else:
            print(json.dumps(side.iterate(int(value))), flush=True)


if __name__ == "__main__":
    main()
