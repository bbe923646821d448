"""Writes the files of an export, and compares them."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from flowalign.config.sampled import Sampled
from flowalign.config.sections import SamplingConfig
from flowalign.export.card import base_name
from flowalign.export.verify import Errors, differences, euler, load_pipeline, merged_errors, probe
from flowalign.models.base import Policy
from flowalign.models.directory import OWN_PIPELINE
from flowalign.models.encoders import Encoders
from flowalign.models.loading import assembled, own_pipeline, pipeline_of, quietly
from flowalign.models.merge import fuse_lora
from flowalign.models.network import Network
from flowalign.models.recorded import PATH_FAMILY
from flowalign.models.scheduler import CONVERSIONS, DEFAULTS
from flowalign.record.disk import on_disk, require_room
from flowalign.record.files import save_tensors
from flowalign.record.outputs import RECORD as RECORD

SHARD_SIZE = "5GB"


def write_pipeline(
    policy: Policy, directory: Path, config: Sampled, dtype: torch.dtype, shard_size: str = SHARD_SIZE
) -> Errors:
    expected = probe(policy, config)
    fuse_lora(policy.network)
    module = policy.network.module
    if dtype != torch.float32:
        module.to(dtype).float()
        expected = probe(policy, config)
    module.to(dtype)
    pipeline = assembled(policy)
    widen_encoders(policy.encoders)
    pipeline.scheduler = euler(pipeline.scheduler, **_walking(config.evaluation))
    # By its record our loader knows a consistency student, whose scheduler it would refuse in another directory.
    (directory / RECORD).write_text(json.dumps({"sampling": {"solver": config.evaluation.solver}}), encoding="utf-8")
    save_pipeline(pipeline, policy.network, directory, shard_size)
    family = policy.network.family
    return differences(expected, family, load_pipeline(directory, config.device, family=family), config)


def widen_encoders(encoders: Encoders) -> None:
    """Convert half-precision encoders to float32.

    transformers loads them in half precision, whatever dtype the pipeline is loaded in.
    """
    for part in encoders.text_encoders:
        part.float()


def save_pipeline(pipeline: Any, network: Network, directory: Path, shard_size: str = SHARD_SIZE) -> None:
    """Save the pipeline of ``network`` as it is; weights of a part that take more than ``shard_size``, as several files
    with an index.

    Where a plain pipeline would sample it wrongly, add a file that samples it rightly, without which diffusers refuses
    to load it.
    """
    own = bool(network.added_inputs) or network.path_family != "rf"
    transformer = pipeline.transformer
    if own or PATH_FAMILY in transformer.config:
        transformer.register_to_config(**{PATH_FAMILY: network.path_family})
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    sizes = (sum(p.numel() * p.element_size() for p in part.parameters()) for part in parts)
    require_room(f"a pipeline in {directory.parent}", directory.parent, on_disk(sizes))
    with quietly():
        pipeline.save_pretrained(str(directory), safe_serialization=True, max_shard_size=shard_size)
    forget_local_paths(directory)
    if not own:
        return
    shutil.copy(str(inspect.getsourcefile(own_pipeline(network.family))), directory / f"{OWN_PIPELINE[0]}.py")
    index = directory / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8")) | {"_class_name": list(OWN_PIPELINE)}
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_lora(policy: Policy, directory: Path, config: Sampled) -> Errors:
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    network: Any = policy.network.module
    expected = probe(policy, config)
    adapter = network.peft_config["default"]
    adapter.base_model_name_or_path = base_name(config.model.path)
    adapter.inference_mode = True
    adapter.target_modules = sorted(adapter.target_modules)  # a set, which PEFT would write in any order
    adapter.save_pretrained(str(directory))
    state = get_peft_model_state_dict(network, save_embedding_layers=False)
    weights = {name: w.detach().to("cpu", torch.float32).contiguous() for name, w in state.items()}
    save_tensors({f"base_model.model.{n}": w for n, w in weights.items()}, directory / "adapter_model.safetensors")
    # Readers without PEFT's metadata take alpha = rank, so alpha / rank goes into B.
    scale = adapter.lora_alpha / adapter.r
    scaled: Any = {n: w * scale if ".lora_B." in n else w for n, w in weights.items()}
    family = policy.network.family
    pipeline_of(family).save_lora_weights(str(directory), transformer_lora_layers=scaled)
    found = []
    for library in ("diffusers", "peft"):
        pipeline = load_pipeline(Path(config.model.path), config.device, family=family)
        if library == "diffusers":
            pipeline.load_lora_weights(str(directory))
        else:
            PeftModel.from_pretrained(pipeline.transformer, str(directory))
        found.append(differences(expected, family, pipeline, config))
    return merged_errors(found)


def _walking(sampling: SamplingConfig) -> dict[str, Any]:
    """Return the options with which the base's scheduler walks the levels that the exported model is sampled along."""
    found: dict[str, Any] = {"stochastic_sampling": sampling.solver == "consistency"}
    if sampling.grid != "pipeline":  # handed over as sigmas, or 0.1's static grid: no conversion, but the shift
        found |= {name: DEFAULTS[name] for name in CONVERSIONS}
    if sampling.grid == "diffusers":
        found["use_dynamic_shifting"] = False
    return found


def forget_local_paths(directory: Path) -> None:
    """Leave out where on this machine the parts came from."""
    for path in directory.glob("**/*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
