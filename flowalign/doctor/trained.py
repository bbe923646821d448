"""What training needs of a model: layers for a LoRA, acknowledged weight syncs, exports that diffusers loads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowalign.config.sampled import SampledConfig
from flowalign.config.sections import LoraConfig, ModelConfig
from flowalign.doctor.checks import Check, judged
from flowalign.export.verify import TOLERANCE, Errors
from flowalign.export.writing import write_lora, write_pipeline
from flowalign.models.base import Policy
from flowalign.models.build import bind_weights, load_policy
from flowalign.models.errors import ModelError
from flowalign.models.inspect import lora_parameters
from flowalign.models.network import Network
from flowalign.record.checkpoint import content_hash
from flowalign.record.disk import DiskError, require_room, writing
from flowalign.run.sync import SyncError, check_receipt
from flowalign.run.workers import BindReceipt

RANK = LoraConfig().rank


def lora_targets(network: Network) -> Iterator[Check]:
    """Say how many layers the family's targets of a LoRA match; each must match one."""
    names = [name for name, module in network.module.named_modules() if isinstance(module, nn.Linear)]
    found = {
        target: sum(name == target or name.endswith(f".{target}") for name in names) for target in network.lora_targets
    }
    layers = len([name for name in names if any(name == t or name.endswith(f".{t}") for t in found)])
    count = lora_parameters(network.module, RANK, network.lora_targets)
    figures = {"targets": found, "layers": layers, "rank": RANK, "parameters": count}
    if lost := [target for target, matched in found.items() if not matched]:
        said = f"no layer goes by the name of {', '.join(lost)}, of {len(found)} targets"
        yield Check("fail", "LoRA", said, "name this model's layers with model.lora.targets", figures)
        return
    said = f"{len(found)} targets match {layers} layers, {count:,} parameters at rank {RANK}"
    yield Check("ok", "LoRA", said, figures=figures)


def sync(network: Network) -> Iterator[Check]:
    """Change one value in memory and bind it as a rollout worker does; its receipt must say so, and one of weights that
    were not bound must be refused."""
    advice = "do not train on it, its rollouts would be made by other weights; report it"
    name, held = next(iter(network.module.named_parameters()))
    before, sent = held.detach().clone(), {name: held.detach().clone()}
    sent[name].view(-1)[0] += 1
    wanted = BindReceipt("learner", 1, 1, content_hash(sent))
    if _fits(wanted, {name: before}):
        yield Check("fail", "sync", f"{name} was not bound, and its receipt does not show it", advice)
        return
    try:
        bind_weights(network.module, sent)
        bound = _fits(wanted, {name: dict(network.module.named_parameters())[name]})
    except ModelError as error:
        yield Check("fail", "sync", str(error), advice)
        return
    bind_weights(network.module, {name: before})
    if not bound:
        yield Check(
            "fail", "sync", f"one value of {name} was changed and sent, and the network does not hold it", advice
        )
        return
    said = f"one value of {name} was changed and bound, and the hash of what is held is that of what was sent"
    yield Check("ok", "sync", f"{said}; unbound, it is noticed", figures={"tensor": name})


def _fits(wanted: BindReceipt, held: dict[str, Any]) -> bool:
    try:
        check_receipt(wanted, BindReceipt("rollout", 1, 1, content_hash(held)))
    except SyncError:
        return False
    return True


def exports(path: Path, model: ModelConfig, device: str) -> Iterator[Check]:
    """Write a drawn LoRA, and a pipeline that it is merged into, to a temporary folder; diffusers reloads and samples
    both. What the disk has no room for is left out."""
    adapted = model.model_copy(update={"lora": LoraConfig()})
    policy, config = load_policy(adapted, device=device), SampledConfig(model=adapted, device=device)
    _draw_adapter(policy)
    with tempfile.TemporaryDirectory(prefix="flowalign-doctor-") as folder:
        size = 2 * sum(p.numel() * p.element_size() for p in policy.network.module.parameters() if p.requires_grad)
        for name, what in (("LoRA export", "lora"), ("pipeline export", "pipeline")):
            to = Path(folder) / what
            to.mkdir()
            try:
                with writing(f"the {name} in {folder}", to):
                    if what == "lora":
                        require_room(f"a LoRA in {folder}", to, size)
                        errors = write_lora(policy, to, config)
                    else:
                        errors = write_pipeline(policy, to, config, torch.float32)
            except DiskError as error:
                yield Check("skip", name, f"{error}, or set TMPDIR to a larger disk")
                continue
            yield _round_trip(name, errors)


def _round_trip(name: str, errors: Errors) -> Check:
    advice = "do not train on it, its exports would be another model; report it with the object of --json"
    said = "written, reloaded by diffusers and sampled"
    if name.startswith("LoRA"):
        said = "written in both layouts, reloaded by diffusers and by PEFT and sampled"
    if not errors.velocity <= TOLERANCE:
        return judged(name, said, errors.velocity, advice, **errors._asdict() | {"rounding": 0.0})
    return judged(name, said, errors.latents, advice, **errors._asdict())


@torch.no_grad()
def _draw_adapter(policy: Policy) -> None:
    """Draw the factors that begin at zero, so that the LoRA changes what the network computes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.network.module.parameters():
        if parameter.requires_grad and not parameter.any():
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.copy_(drawn)
