"""Networks with more inputs than a time: ``r``, where an average velocity leads, and a guidance scale.

An input is one more sinusoidal embedding with an MLP, added to the conditioning vector of the time and the pooled text.
Its value travels as one more column behind the pooled text, so that the network's forward stays a pure function of its
tensors (``torch.func.jvp``, ``torch.compile``, DeepSpeed). The last layer of a fresh input is zero: it changes nothing.

Columns are offsets from the plain network, 0 meaning "the velocity at t, unguided", which half precision holds exactly:

| input    | column       | embedded as | why                                                                |
| r        | t - r        | 1000 (t - r)| the scale of the time itself (MeanFlow, arXiv:2505.13447, table 1c)|
| guidance | guidance - 1 | 100 (g - 1) | scales 1 to 11 cover the embedding's range as t in [0, 1] does     |
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, TimestepEmbedding
from torch import Tensor, nn

from flowalign.models.errors import ModelError
from flowalign.models.weights import loaded_files

SCALES = {"r": 1000.0, "guidance": 100.0}  # the columns' order
PREFIX = "time_text_embed.inputs."
CONFIG_KEY = "extra_inputs"  # of the transformer's config.json


class TimeTextInputs(CombinedTimestepTextProjEmbeddings):
    """The embedding of time and pooled text with further inputs; it keeps the layers, and their names, of ``base``."""

    def __init__(self, base: CombinedTimestepTextProjEmbeddings) -> None:
        nn.Module.__init__(self)
        self.time_proj = base.time_proj
        self.timestep_embedder = base.timestep_embedder
        self.text_embedder = base.text_embedder
        self.inputs = nn.ModuleDict()
        self.train(base.training)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in SCALES if name in self.inputs)

    def forward(self, timestep: Tensor, pooled_projection: Tensor) -> Tensor:
        """Compute the conditioning (N, D) of times (N,) in [0, 1000] and pooled text (N, E) with a column an input."""
        names = self.names
        # Columns may be float32 beside half-precision weights: rounding them would move a time by whole units.
        text = pooled_projection[:, : -len(names)].to(self.text_embedder.linear_1.weight.dtype)
        text = text.contiguous()  # on some processors a product of a strided view rounds otherwise
        embedded = super().forward(timestep, text)
        for name, column in zip(names, pooled_projection[:, -len(names) :].unbind(1), strict=True):
            embedded = embedded + self.inputs[name](self.time_proj(SCALES[name] * column).to(text.dtype))
        return embedded


def add_inputs(network: Any, names: Iterable[str], *, seed: int = 0) -> None:
    """Give ``network`` the inputs ``names`` (of "r", "guidance") that it does not have yet; it computes the same after.

    ``network``: one with diffusers' ``time_text_embed`` of time and pooled text. The new parameters,
    ``time_text_embed.inputs.<name>.*``, are trainable, on the device and in the dtype of the embedding beside them;
    they depend on ``seed`` alone. The network's configuration lists the inputs as ``extra_inputs``. PEFT freezes
    whatever is no adapter, so add a LoRA first, or unfreeze ``network.time_text_embed.inputs`` after it.

    Raises:
        ModelError: an unknown input, or a network without such an embedding.
    """
    names = set(names)
    unknown = sorted(names - set(SCALES))
    if unknown:
        raise ModelError(f"unknown input {unknown[0]!r} of a network; known: {', '.join(SCALES)}")
    if not names:
        return
    embed = getattr(network, "time_text_embed", None)
    if not isinstance(embed, CombinedTimestepTextProjEmbeddings):
        raise ModelError(f"{type(network).__name__} has no embedding of time and pooled text to add inputs to")
    if not isinstance(embed, TimeTextInputs):
        network.time_text_embed = embed = TimeTextInputs(embed)
    beside = embed.timestep_embedder.linear_1
    for index, name in enumerate(SCALES):
        if name in names and name not in embed.inputs:
            fresh = _fresh(beside.in_features, beside.out_features, seed + index)
            embed.inputs[name] = fresh.to(beside.weight.device, beside.weight.dtype).train(embed.training)
    network.register_to_config(**{CONFIG_KEY: list(embed.names)})


def inputs_of(network: nn.Module) -> tuple[str, ...]:
    """Return the extra inputs that ``network`` takes, in the order of their columns."""
    embed = getattr(network, "time_text_embed", None)
    return embed.names if isinstance(embed, TimeTextInputs) else ()


def pooled_with_inputs(
    pooled: Tensor,
    t: Tensor,
    r: Tensor | None = None,
    guidance: float | Tensor | None = None,
    names: Iterable[str] = (),
) -> Tensor:
    """Return the pooled text (N, E) with a column for each of the network's inputs ``names``: (N, E + len(names)).

    ``t`` (N,) in [0, 1]; ``r`` (N,) in [0, t], None: t, the velocity at t itself; ``guidance`` a float or (N,), from 1
    (None: 1) up. Columns keep t's precision where the text's is lower. Differentiable in t and r.

    Raises:
        ModelError: an ``r`` for a network that does not take one, which would silently be ignored.
    """
    names = set(names)
    if r is not None and "r" not in names:
        raise ModelError("this network takes no second time r; add the input r to it (model.inputs) or leave r out")
    columns = []
    if "r" in names:
        columns.append(torch.zeros_like(t) if r is None else t - r)
    if "guidance" in names:
        scale = torch.as_tensor(1.0 if guidance is None else guidance, dtype=t.dtype, device=t.device)
        columns.append((scale - 1).expand(t.shape))
    return torch.cat([pooled, *(column[:, None] for column in columns)], 1) if columns else pooled


def restore_inputs(network: Any, directory: Path) -> None:
    """Add and fill the inputs that a saved transformer's folder lists: diffusers' loader reads the rest and drops them.

    Raises:
        ModelError: the folder lists inputs that its weights do not have.
    """
    from safetensors import safe_open

    names = json.loads((directory / "config.json").read_text()).get(CONFIG_KEY, ())
    add_inputs(network, names)
    wanted = {name: p for name, p in network.named_parameters() if name.startswith(PREFIX)}
    for path in loaded_files(directory):
        with safe_open(path, "pt") as file:
            for name in wanted.keys() & set(file.keys()):
                wanted.pop(name).data.copy_(file.get_tensor(name))
    if wanted:
        raise ModelError(f"{directory} lists the inputs {', '.join(names)} but has no weights {min(wanted)}")


def _fresh(channels: int, width: int, seed: int) -> TimestepEmbedding:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = TimestepEmbedding(channels, width)
    nn.init.zeros_(fresh.linear_2.weight)
    nn.init.zeros_(fresh.linear_2.bias)
    return fresh
