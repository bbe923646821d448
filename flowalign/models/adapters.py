"""LoRA files as people have them, in PEFT's layout, diffusers' or what diffusers converts: what they say, and weights.

A header alone tells rank and layers of most files; those that diffusers has to convert are read whole.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowalign.models.errors import ModelError
from flowalign.models.family import ModelFamily
from flowalign.models.loading import pipeline_of
from flowalign.record.textfiles import TextError, read_object
from rewards.missing import hint

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
ENDS = (".lora_A.weight", ".lora_B.weight")
# Settings of a LoRA that change neither what it computes nor where it lies, beside rank, alpha and layers.
_IDLE = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"}
_IDLE |= {"lora_dropout", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform"}
_IDLE |= {"layers_pattern", "eva_config", "init_lora_weights", "peft_type"}
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the weights below the adapter
Shapes = Mapping[str, tuple[int, int]]  # of linear layers by name: features in and out


class AdapterError(ModelError):
    """An adapter that a run cannot begin from: which, and why."""


@dataclass(frozen=True)
class Adapter:
    """What the file of a LoRA says: its rank and alpha, and the layers that it lies on with their features in and out.

    ``targets`` are the ends of names that its own configuration gives for them, where it has such.
    """

    family: ModelFamily
    file: Path
    rank: int
    alpha: float
    layers: Shapes
    targets: tuple[str, ...] = ()

    def weights(self) -> dict[str, Tensor]:
        """Read the weights, as ``<layer>.lora_A.weight`` (rank, in) and ``<layer>.lora_B.weight`` (out, rank)."""
        return _read(self.family, self.file, whole=True)[0]


def read_adapter(family: ModelFamily, path: Path) -> Adapter:
    """Read what the adapter in a folder, or in a file, says of itself.

    A folder with both layouts is read as PEFT's, which keeps alpha apart from the weights.

    Raises:
        AdapterError: there is none, it is damaged, or it is more than a LoRA of one rank on the network of ``family``.
    """
    file = _file_in(path)
    state, settings = _read(family, file, whole=False)
    _refuse_settings(file, settings)
    layers = _layers(file, state)
    ranks = {name: int(state[f"{name}{ENDS[0]}"].shape[0]) for name in layers}
    first = next(iter(layers))
    if other := next((name for name in layers if ranks[name] != ranks[first]), None):
        raise _refused(
            f"{file} has rank {ranks[first]} on {first} and {ranks[other]} on {other}; a run learns a LoRA of one rank"
        )
    rank = int(settings.get("r", ranks[first]))
    if rank != ranks[first]:
        raise _refused(f"{file} has {first}{ENDS[0]} of rank {ranks[first]}, and its configuration says r: {rank}")
    targets = settings.get("target_modules")
    named = tuple(map(str, targets)) if isinstance(targets, list | tuple | set) else ()
    return Adapter(family, file, rank, float(settings.get("lora_alpha", rank)), layers, named)


def _refused(reason: str) -> AdapterError:
    return AdapterError(f"model.lora.path: {reason}")


def _file_in(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise _refused(f"{path} is no .safetensors file; give a LoRA in that format, or a folder with one")
        return path
    if not path.is_dir():
        raise _refused(f"{path} is not there{hint(path)}; give a folder or a .safetensors file with a LoRA")
    peft, settings = (path / name for name in PEFT_FILES)
    if peft.is_file() and settings.is_file():
        return peft
    if (path / DIFFUSERS_FILE).is_file():
        return path / DIFFUSERS_FILE
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1 and not settings.is_file():
        return found[0]
    if found and not settings.is_file():
        raise _refused(f"{path} has {len(found)} .safetensors files; give one of them, such as {found[0]}")
    raise _refused(
        f"{path} holds no LoRA; it has neither {' and '.join(PEFT_FILES)}, as PEFT saves, nor {DIFFUSERS_FILE}, as "
        "diffusers does"
    )


def _read(family: ModelFamily, file: Path, *, whole: bool) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return tensors by layer and end, and the settings of PEFT's that are known; without ``whole`` they are empty
    wherever the header tells as much."""
    try:
        with safe_open(file, "pt") as opened:
            names, said = list(opened.keys()), opened.metadata() or {}
            shapes = {name: opened.get_slice(name).get_shape() for name in names}
            of_peft = file.name == PEFT_FILES[0] and (file.parent / PEFT_FILES[1]).is_file()
            plain = of_peft or all(name.startswith("transformer.") and name.endswith(ENDS) for name in names)
            if whole or not plain:
                state = {name: opened.get_tensor(name) for name in names}
            else:
                state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    except (OSError, SafetensorError) as error:
        raise _refused(f"{file} cannot be read ({error}); is it whole?") from error
    _refuse_others(file, names)
    if not of_peft:
        return _as_diffusers_reads(family, file, state, said)
    try:
        settings = read_object(file.parent / PEFT_FILES[1])
    except TextError as error:
        raise _refused(str(error)) from error
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}, settings


def _as_diffusers_reads(
    family: ModelFamily, file: Path, state: dict[str, Tensor], said: Mapping[str, str]
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return what diffusers' own loader of the family's pipelines makes of a file for the network."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from diffusers.utils import convert_unet_state_dict_to_peft

    read = pipeline_of(family).lora_state_dict
    options = {name: True for name in ("return_lora_metadata", "return_alphas") if name == "return_lora_metadata"}
    options |= {"return_alphas": True} if "return_alphas" in inspect.signature(read).parameters else {}
    first = next(iter(state), "no key")
    try:
        made, *alphas, _ = read(dict(state), **options)
        made = {name: tensor for name, tensor in made.items()}
        metadata = json.loads(said[LORA_ADAPTER_METADATA_KEY]) if LORA_ADAPTER_METADATA_KEY in said else None
    except Exception as error:  # whatever a foreign file leads diffusers to raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise _refused(
            f"{file} has {first}, which diffusers converts to no LoRA of {family.title} ({reason})"
        ) from error
    if other := next((name for name in made if not name.startswith("transformer.")), None):
        part = other.partition(".")[0]
        why = "adapts a text encoder, which no run trains" if part.startswith("text_encoder") else "fits no layer"
        raise _refused(f"{file} has {other}, which {why}; give a LoRA of the transformer of a {family.pipeline} alone")
    inner = {name.removeprefix("transformer."): tensor for name, tensor in made.items()}
    if inner and "lora_A" not in next(iter(inner)):
        inner = convert_unet_state_dict_to_peft(inner)
    scales = {float(alpha) for found in alphas if found for alpha in found.values()}
    if len(scales) > 1:
        raise _refused(f"{file} has alphas from {min(scales):g} to {max(scales):g}; a run learns a LoRA of one alpha")
    if metadata is None:
        return inner, {"lora_alpha": scales.pop()} if scales else {}
    own = {name.removeprefix("transformer."): v for name, v in metadata.items() if name.startswith("transformer.")}
    if "r" not in own or "lora_alpha" not in own:
        raise _refused(f"{file} has metadata that say nothing of the transformer's rank and alpha; save it anew")
    return inner, own


def _refuse_others(file: Path, names: Sequence[str]) -> None:
    """Refuse a file that is no LoRA, or more than one, by the first key that says so."""
    if not names:
        raise _refused(f"{file} holds no tensor")
    for mark, what in (
        ("dora_scale", "a DoRA"),
        ("magnitude_vector", "a DoRA"),
        ("lokr_", "a LoKr"),
        ("hada_", "a LoHa"),
    ):
        if found := next((name for name in names if mark in name), None):
            raise _refused(f"{file} has {found}, so that it is {what}; give a LoRA")


def _refuse_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what PEFT would compute otherwise than a plain LoRA, or would do to the weights below it."""
    from peft import LoraConfig as PeftConfig

    usual = {field.name: field.default for field in fields(PeftConfig)}
    kind, start = str(settings.get("peft_type", "LORA")), settings.get("init_lora_weights", True)
    if kind.rpartition(".")[2] != "LORA":
        raise _refused(f"{file} is of type {kind}; give a LoRA")
    if start not in _STARTS:
        raise _refused(
            f"{file} says init_lora_weights: {start}, which changes the model's own weights; convert it first"
        )
    for name, value in settings.items():
        if name in _IDLE or not value or value in ("none", usual.get(name)):
            continue
        raise _refused(f"{file} says {name}: {value}, and a run learns a plain LoRA of one rank and alpha")


def _layers(file: Path, state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return features in and out of each layer, in the order of their names."""
    found = {}
    for name in sorted(state):
        if not name.endswith(ENDS):
            raise _refused(f"{file} has {name}, which is none of a LoRA; they end in {' or '.join(ENDS)}")
        layer = name[: -len(ENDS[0])]
        pair = [state.get(f"{layer}{end}") for end in ENDS]
        a, b = pair
        if a is None or b is None:
            raise _refused(f"{file} has {name} without its other half, {layer}{ENDS[0] if a is None else ENDS[1]}")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise _refused(f"{file} has factors of {shapes} on {layer}, which are none of a linear layer")
        found[layer] = (int(a.shape[1]), int(b.shape[0]))
    return found
