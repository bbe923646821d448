"""Sizes of a model from its configuration files alone: nothing is loaded, everything lives on the meta device."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from flowalign.config.sections import ModelConfig
from flowalign.flow.schedule import PipelineSchedule
from flowalign.models.blocks import blocks_of
from flowalign.models.directory import Directory, open_directory, read_sizes
from flowalign.models.errors import ModelError
from flowalign.models.family import Forward, ModelFamily, module_config
from flowalign.models.network import Network
from flowalign.models.weights import read_weights


@dataclass(frozen=True)
class ModelSizes:
    """Parameter counts and the FLOPs of one forward pass of one sample (a multiply-add counts as two).

    ``buffers`` are the numbers that the network holds beside its parameters, such as a table of positions; ``blocks``
    the parameters of the ``transformer`` that lie in its blocks.
    """

    source: str
    transformer: int
    trainable: int
    frozen: dict[str, int]
    flops: int
    latent_shape: tuple[int, int, int]
    image_tokens: int
    text_tokens: int
    width: int
    num_layers: int
    buffers: int = 0
    blocks: int = 0


def inspect_model(model: ModelConfig) -> ModelSizes:
    """Count a pipeline from its folders' ``config.json``; weights may be absent.

    Where the directory does not exist, what is published of the model stands in, and ``source`` says so.

    Raises:
        ModelError: a configuration file is missing or unreadable, or the image size does not fit.
    """
    directory = open_directory(model)
    network = _as_configured(directory, model)
    shape = directory.latent_shape(model.height, model.width)
    rows = directory.family.full_text(directory, model.max_sequence_length)
    total = sum(p.numel() for p in network.parameters())
    lora = model.lora
    trainable = (
        total if lora is None else lora_parameters(network, lora.rank, lora.targets or directory.family.lora_targets)
    )
    width, num_layers = directory.family.blocks(module_config(network))
    return ModelSizes(
        source=directory.source,
        transformer=total,
        trainable=trainable,
        frozen=_frozen(directory),
        flops=_forward_flops(directory.family.forward, network, shape, tuple(rows.items())),
        latent_shape=shape,
        image_tokens=shape[1] * shape[2] // directory.geometry.patch**2,
        text_tokens=rows["tokens"][0],
        width=width,
        num_layers=num_layers,
        buffers=sum(buffer.numel() for buffer in network.buffers()),
        blocks=sum(p.numel() for block in blocks_of(network) for p in block.parameters()),
    )


def own_schedule(model: ModelConfig) -> PipelineSchedule:
    """Return the noise levels that the pipeline at ``model.path`` walks at the configured size, from its small files.

    Where the directory does not exist, what is published of the model stands in.

    Raises:
        ModelError: the files are missing or unreadable, or say what is not reproduced.
    """
    return open_directory(model).schedule(model.height, model.width)


def lora_parameters(network: nn.Module, rank: int, targets: Sequence[str]) -> int:
    """Return the number of parameters of a LoRA on the linear layers whose names end in one of ``targets``."""
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets)
    )


def trained_parameters(model: ModelConfig) -> int | None:
    """Return how many numbers a run over ``model`` learns, from its small files.

    It is None where only the loaded network tells.
    """
    try:
        directory = open_directory(model)
    except ModelError:
        return None
    file = directory.path / "transformer" / "config.json"
    if model.transformer is not None or not file.is_file():
        return None
    config = read_sizes(file)
    if config.get("_class_name") != directory.family.network:
        return None
    network = _without_weights(directory.family, config)
    if model.lora is None:
        return sum(p.numel() for p in network.parameters())
    return lora_parameters(network, model.lora.rank, model.lora.targets or directory.family.lora_targets)


def most_trained(model: ModelConfig) -> int | None:
    """Return how many numbers a run over ``model`` learns at the most, from the headers of its weight files.

    That is all that they hold, or a LoRA on each matrix of them. It is None where they do not tell.
    """
    if model.transformer is not None:
        return None
    try:
        weights = read_weights(open_directory(model).path / "transformer")
    except (ModelError, OSError):
        return None
    if model.lora is None:
        return weights.parameters
    return model.lora.rank * sum(sum(shape) for _, shape in weights.tensors.values() if len(shape) == 2)


def bare_network(model: ModelConfig) -> nn.Module:
    """Return the network of ``model`` on the meta device, with its inputs and without a LoRA.

    Raises:
        ModelError: the files do not say it.
    """
    from flowalign.models.inputs import CONFIG_KEY, add_inputs

    directory = open_directory(model)
    config = directory.config("transformer")
    network = _without_weights(directory.family, config)
    if inputs := {*(config.get(CONFIG_KEY) or ()), *(model.inputs or ())}:
        add_inputs(network, inputs)
    return network


def empty_network(model: ModelConfig) -> Network:
    """Return the network of ``model`` on the meta device, with its inputs or begun anew, and without a LoRA.

    Raises:
        ModelError: the files do not say it.
    """
    directory = open_directory(model)
    module, config = _as_configured(directory, model), directory.config("transformer")
    if inputs := _inputs(model, config):
        from flowalign.models.inputs import add_inputs

        module = copy.deepcopy(module)
        add_inputs(module, inputs)
    return Network(
        directory.family,
        module,
        directory.scheduler,
        directory.geometry,
        mixed=model.dtype == "bfloat16",
        path_family=model.family or "rf",
        attention=model.attention,
    )


def empty_autoencoder(model: ModelConfig) -> nn.Module | None:
    """Return the autoencoder of ``model`` on the meta device; None where no file says what it is.

    Raises:
        ModelError: a file cannot be read.
    """
    directory = open_directory(model)
    there = directory.published is not None or (directory.path / "vae" / "config.json").is_file()
    return _part_without_weights(directory, "vae").requires_grad_(False) if there else None


def _as_configured(directory: Directory, model: ModelConfig) -> nn.Module:
    """Return the directory's network, or the one that ``model`` begins anew, on the meta device; not to be changed."""
    config = directory.config("transformer")
    if model.transformer is None or directory.family.fresh is None:
        return _of_class(directory.family.network, json.dumps(dict(config), sort_keys=True))
    like = module_config(_of_class(directory.family.network, json.dumps(dict(config), sort_keys=True)))
    with torch.device("meta"):
        return directory.family.fresh(like, model.transformer)


def _inputs(model: ModelConfig, config: Mapping[str, Any]) -> set[str]:
    """Return the further inputs of a network: those that its own files name, unless it is begun anew, and the run's."""
    from flowalign.models.inputs import CONFIG_KEY

    own = () if model.transformer is not None else config.get(CONFIG_KEY) or ()
    return {*own, *(model.inputs or ())}


@lru_cache(maxsize=8)
def _of_class(network: str, config: str) -> nn.Module:
    """Build a diffusers network of a configuration in JSON, once; not to be changed."""
    import diffusers

    from flowalign.models.inputs import CONFIG_KEY

    own = {key: value for key, value in json.loads(config).items() if not key.startswith("_") and key != CONFIG_KEY}
    with torch.device("meta"):
        return getattr(diffusers, network)(**own)


def _without_weights(family: ModelFamily, config: Mapping[str, Any]) -> nn.Module:
    """Build the network of a ``config.json`` on the meta device."""
    from flowalign.models.inputs import CONFIG_KEY
    from flowalign.models.loading import transformer_of

    with torch.device("meta"):
        return transformer_of(family)(**{k: v for k, v in config.items() if not k.startswith("_") and k != CONFIG_KEY})


@lru_cache(maxsize=64)
def _forward_flops(
    forward: Forward, network: nn.Module, shape: tuple[int, int, int], rows: tuple[tuple[str, tuple[int, ...]], ...]
) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        text = {name: torch.empty(1, *row) for name, row in rows if name != "mask"}  # a text of full length
        forward(network, torch.empty(1, *shape), torch.empty(1), text, ticks=1000, guidance=torch.empty(1))
    return int(counter.get_total_flops())


def _frozen(directory: Directory) -> dict[str, int]:
    """Return the number of parameters of the autoencoder and of each text encoder whose configuration is there."""
    parts = [part for part in directory.family.encoder_parts if not part.startswith("tokenizer")]
    if (published := directory.published) is not None:
        known = published.parameters
        there = [part for part in parts if part in published.parts and part not in known]
    else:
        there, known = [part for part in parts if (directory.path / part / "config.json").is_file()], {}
    counted = {part: sum(p.numel() for p in _part_without_weights(directory, part).parameters()) for part in there}
    return {**counted, **known}


def _part_without_weights(directory: Directory, part: str) -> nn.Module:
    """Build an encoder of its class that ``model_index.json`` names, or what is published of it, on the meta device."""
    import diffusers
    import transformers

    library, name = directory.class_of(part)
    config = {k: v for k, v in directory.config(part).items() if not k.startswith("_")}
    with torch.device("meta"):
        if library == "diffusers":
            return getattr(diffusers, name)(**config)
        kind = getattr(transformers, name)
        return kind(kind.config_class(**config))
