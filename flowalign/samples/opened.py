"""Opens a checkpoint and samples from it the way the run itself evaluates: same chunks, same steps, same bits.

Shapes: N samples, C H W latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign.config.sampled import Sampled
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig, SamplingConfig
from flowalign.config.solvers import NOISY
from flowalign.flow import pathfamilies
from flowalign.flow.guidance import guidance_of
from flowalign.flow.schedule import PipelineSchedule
from flowalign.models.base import Policy
from flowalign.models.build import bind_weights, buffers_hash, load_encoders, load_network
from flowalign.models.directory import is_pipeline
from flowalign.models.embeddings import EmbeddingStore
from flowalign.models.network import Network
from flowalign.record import checkpoint
from flowalign.record.checkpoint import BUFFERS, CheckpointError
from flowalign.record.checkpoint import find as find_checkpoint
from flowalign.record.contents import base_hash
from flowalign.record.destroyed import fault, total_norm
from flowalign.record.log import say_once
from flowalign.samples.arrange import texts_of_batch
from flowalign.samples.cache import cache_rule, check_sampling
from flowalign.samples.rollout import rollout
from flowalign.types import Noise, PromptBatch, Samples, SamplingPlan

Which = str  # model, ema, or the name of another average such as ema_0.99
Progress = Callable[[int, int], None]  # how many of how many are done


def silent(done: int, total: int) -> None:
    """Tell nobody."""


def open_policy(
    path: Path, config: Sampled, which: Which = "model", batch: PromptBatch | None = None
) -> tuple[Policy, dict[str, Any]]:
    """Open the policy at ``path`` and its state.json: a run directory, a checkpoint, or a base pipeline (empty state).

    Where ``batch`` is all that it is asked for, texts are read and kept where the run's rollouts do; without any that
    is not there, no text encoder is loaded.

    Raises:
        CheckpointError: ``path`` is none of these, or what it holds is not whole or does not fit ``config.model``; or
            other weights than the model are asked of a pipeline.
    """
    network, state = open_network(path, config, which)
    model, embeddings, text = model_of(path, config), None, True
    if batch is not None and config.rollout_embeddings is not None:
        embeddings = EmbeddingStore(config.rollout_embeddings, model, config.device)
        text = bool(embeddings.lacking(texts_of_batch(batch, model), model.max_sequence_length))
    encoders = load_encoders(model, text=text, embeddings=embeddings).to(config.device)
    return Policy(network, encoders), state


def model_of(path: Path, config: Sampled) -> ModelConfig:
    """Return the model that is loaded of ``path``: the pipeline that it is, or the configured model of its weights."""
    if not is_pipeline(path):
        return config.model
    return config.model.model_copy(
        update={"path": str(path), "lora": None, "base_dtype": None, "transformer": None, "inputs": None}
    )


def open_network(path: Path, config: Sampled, which: Which = "model") -> tuple[Network, dict[str, Any]]:
    """Open the network alone of what `open_policy` opens. Raise CheckpointError as it does.

    Where its kernel of attention does not run on this device, torch chooses one, which is said.
    """
    path, pipeline = Path(path), is_pipeline(path)
    if pipeline and which != "model":
        raise CheckpointError(f"--weights: {path} is a pipeline, which has one set of weights, not {which}")
    found = path if pipeline else find_checkpoint(path, which)
    network = load_network(model_of(path, config), begin=False)
    network.module.to(config.device)
    if (reason := network.missing_kernel(config.device, {config.model.dtype})) is not None:
        say_once(f"model.attention: {reason}. Torch chooses here, and last digits may differ from the run's")
        network.attention = "auto"
    if pipeline:
        if (wrong := fault("the weights", dict(network.module.named_parameters()))) is not None:
            raise CheckpointError(f"{path} is a pipeline that was destroyed, {wrong}; take an intact one")
        return network, {}
    state = load_weights(network, found, which)
    if config.model.lora is not None and state.get("base_hash") not in (None, base_hash(Path(config.model.path))):
        raise CheckpointError(
            f"{found} is a LoRA of another base model than {config.model.path}; say where its own is: --model DIR"
        )
    # Of all weights the checkpoint brings its own, but what a network has beside them is that of its base.
    from_files = config.model.lora is None and config.model.transformer is None
    if from_files and state.get(BUFFERS) not in (None, buffers_hash(network.module)):
        raise CheckpointError(
            f"{found} was trained from another base model than {config.model.path}, whose network has other buffers, "
            "such as positions; say where its own is: --model DIR"
        )
    return network, state


def load_weights(network: Network, path: Path, which: Which = "model") -> dict[str, Any]:
    """Bind a checkpoint's weights, checked against its manifest, to the network's trainable parameters.

    Returns its state.json. Raises CheckpointError where names, shapes or ``which`` do not fit, or the weights are
    destroyed.
    """
    with checkpoint.advised(path):
        manifest = checkpoint.verify(path, (f"{which}.safetensors", "state.json"))
    if f"{which}.safetensors" not in manifest["files"]:
        there = sorted(file.removesuffix(".safetensors") for file in manifest["files"] if "/" not in file)
        there = [name for name in there if name == "model" or name.startswith("ema")]
        raise CheckpointError(
            f"{path} has no {which} weights; it has {', '.join(there)} (its ema_decay says which averages are kept)"
        )
    weights = load_file(path / f"{which}.safetensors")
    own = {name: p.shape for name, p in network.module.named_parameters() if p.requires_grad}
    wrong = sorted(n for n in {*own, *weights} if n not in own or n not in weights or own[n] != weights[n].shape)
    if wrong:
        raise CheckpointError(
            f"{path} does not fit the configured model: {len(wrong)} tensors differ, first {wrong[0]!r}; "
            "model.path and model.lora must be those of the run"
        )
    began = total_norm({name: p for name, p in network.module.named_parameters() if p.requires_grad})
    if (destroyed := fault(f"the weights of {which}", weights, began=began)) is not None:
        raise CheckpointError(f"{path} holds a state that was destroyed, {destroyed}; {checkpoint.advice(path)}")
    bind_weights(network.module, weights)
    return json.loads((path / "state.json").read_bytes())


def ode_plan(policy: Policy, num_steps: int, guidance_scale: float) -> SamplingPlan:
    """Plan deterministic Euler steps along the levels of the model's own pipeline, at the model's own size."""
    return policy_plan(policy, SamplingConfig(num_steps=num_steps, guidance_scale=guidance_scale), ModelConfig())


def sampling_plan(
    sampling: SamplingConfig,
    *,
    schedule: PipelineSchedule,
    path_family: str | None = "rf",
    inputs: Sequence[str] | None = (),
) -> SamplingPlan:
    """Plan the walk that ``sampling`` describes, along the levels that ``schedule``, the model's own pipeline, walks.

    A model of another family than ``rf`` has levels of its own, see `pathfamilies.sampling_sigmas`.

    Raises:
        ConfigError: the pipeline has no levels for this number of steps.
    """
    path = pathfamilies.path_family(path_family or "rf")
    try:
        if path.is_rectified_flow:
            levels = schedule.levels(sampling.num_steps, grid=sampling.grid)
        else:
            levels = pathfamilies.sampling_sigmas(path, sampling.num_steps, shift=schedule.named_shift)
    except ValueError as error:
        raise ConfigError("", str(error)) from error
    noise, solver = Noise(), sampling.solver
    if solver in NOISY:
        level = sampling.eta if solver == "ddpm" else 1.0
        noise, solver = Noise(NOISY[solver], level, (0, sampling.num_steps - 1)), "euler"
    return SamplingPlan(
        tuple(levels.tolist()),
        noise,
        guidance_of(sampling),
        solver=solver,
        average_velocity="r" in (inputs or ()),
        initial_scale=path.initial_scale,
        cache=cache_rule(sampling.cache),
    )


def asked(own: SamplingConfig, **changes: Any) -> SamplingConfig:
    """Return ``own`` with what a caller asked for instead.

    Raises:
        ConfigError: the solver has no such option, or its steps cannot be cached.
    """
    made = own.model_copy(update=changes)
    try:
        check_sampling("", made)
    except ConfigError as error:
        raise ConfigError("--solver", error.reason) from error
    return made


def policy_plan(policy: Policy, sampling: SamplingConfig, size: ModelConfig) -> SamplingPlan:
    """Plan as `sampling_plan` for an opened model, at the height and width of ``size``."""
    network = policy.network
    schedule = network.schedule(size.height, size.width)
    return sampling_plan(sampling, schedule=schedule, path_family=network.path_family, inputs=network.inputs)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use ``count`` torch threads for a while: on a CPU they decide the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def roll(
    policy: Policy,
    batch: PromptBatch,
    plan: SamplingPlan,
    config: Sampled,
    seed: int,
    progress: Progress = silent,
    noise: Tensor | None = None,
) -> Iterator[Samples]:
    """Yield the chunks of ``batch``, as it was `arranged`, in the run's own geometry.

    ``noise`` (N, C, H, W) has that of a sample at its id; None: samples begin with their own.
    """
    done = 0
    for chunk in batch.chunks(config.rollout.chunk_size):
        yield rollout(
            policy,
            chunk,
            plan,
            seed=seed,
            policy_version=0,
            length=config.model.max_sequence_length,
            height=config.model.height,
            width=config.model.width,
            decode_batch_size=config.rollout.decode_batch_size,
            geometry=config.rollout.chunk_size,
            initial=None if noise is None else noise[list(chunk.sample_ids)],
        )
        done += len(chunk)
        progress(done, len(batch))
