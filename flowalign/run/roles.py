"""The networks that an algorithm calls, by their roles: the policy, and all that it declares beside it.

Some of them follow the learner's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from flowalign.algorithm import Needs, VelocityModel
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import Precision, RunConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.engine.accumulate import autocast
from flowalign.engine.frozen_blocks import offload_blocks
from flowalign.engine.offload import Offload
from flowalign.models.build import load_network, reference_velocity
from flowalign.models.encoders import Encoders
from flowalign.models.fingerprint import encoders_of, same_encoders
from flowalign.models.guided import frozen, guided
from flowalign.models.network import Network
from flowalign.models.perceptual import ImageFeatures
from flowalign.models.start import StartingAdapter
from flowalign.run.learner import Learner
from flowalign.run.offloaded import OffloadedCopy, load_decoder, offload_of
from flowalign.run.second import second_network
from flowalign.run.teachers import Teacher, load_teachers
from flowalign.samples.differentiable import PixelRewards


class Follower(Protocol):
    """A network that takes the learner's weights over, from time to time."""

    def follow(self, learner: Learner, iteration: int) -> None:
        """Take over what the learner holds after ``iteration``, counted from 0, where it is time; a collective call."""
        ...


class Kept(Protocol):
    """A reference of weights that a run cannot make anew, and a checkpoint keeps."""

    def take(self, weights: Mapping[str, Tensor]) -> None: ...

    def weights(self) -> dict[str, Tensor]: ...


@dataclass
class Roles:
    """The networks of a learner's rank as functions, by role, and those of them that have more to them.

    Among the functions are also features, decoder and reward, where those are needed.

    ``second`` is trained beside the policy, ``reference`` is one that is refreshed, or that the run began from.
    """

    models: dict[str, VelocityModel]
    second: Network | None = None
    reference: Kept | None = None
    followers: list[Follower] = field(default_factory=list)


def roles_of(
    config: RunConfig,
    network: Network,
    needs: Needs,
    teachers: Mapping[str, Teacher] | None = None,
    *,
    compares: bool = True,
) -> Roles:
    """Load, copy or take apart all that ``needs`` asks for beside the policy ``network``; ``teachers`` live elsewhere.

    ``compares`` reads the files of the teachers' encoders, which one rank does for all.

    Raises:
        ConfigError, ModelError: a teacher is missing, or does not share the model's latents or encoders.
        ScorerError: see `PixelRewards`.
    """
    device, offload = config.device, offload_of(config)
    network.scale = needs.guidance_scale
    roles = Roles({"policy": guided(network)})
    if isinstance(config, AlignConfig):
        roles.models |= load_teachers(config, needs.teachers, network, teachers, compares=compares, offload=offload)
    if needs.reference is not None and needs.reference.refresh is not None:
        refreshed = RefreshedReference(network, needs.reference.refresh, device, offload)
        roles.reference, roles.models["reference"] = refreshed, refreshed.velocity
        roles.followers.append(refreshed)
    elif needs.reference is not None and config.model.lora is not None and config.model.lora.path is not None:
        start = StartingAdapter(network)
        roles.reference, roles.models["reference"] = start, start.velocity
    elif needs.reference is not None and offload is not None and config.model.lora is None:
        roles.models["reference"] = OffloadedCopy(network, offload, device).velocity
    elif needs.reference is not None:
        roles.models["reference"] = reference_velocity(network, device)
    if needs.second is not None:
        roles.second = second_network(network)
        roles.models["second"] = guided(roles.second)
    if needs.teacher:
        roles.models["teacher"] = frozen(_teacher(config, network, offload))
    if needs.average:
        average = FollowingAverage(network, device, offload)
        roles.models["ema"] = average.velocity
        roles.followers.append(average)
    roles.models = {role: precise(model, config.network_dtype, device) for role, model in roles.models.items()}
    functions: dict[str, Any] = {}
    if needs.features:
        assert isinstance(config, PretrainConfig)
        functions["features"] = ImageFeatures(load_decoder(config, offload), Path(config.features))
    if needs.decoder:
        functions["decoder"] = partial(_pixels, load_decoder(config, offload))
    if needs.reward:
        functions["reward"] = PixelRewards(config.trained_rewards, Path(), device)
    roles.models |= functions
    return roles


def _pixels(encoders: Encoders, latents_NCHW: Tensor) -> Tensor:
    return encoders.decode_pixels(latents_NCHW).clamp(0, 1)


def _teacher(config: RunConfig, network: Network, offload: Offload | None) -> Network:
    """Load the one frozen teacher of a training on latents."""
    wanted: ModelConfig | None = getattr(config, "teacher", None)
    if wanted is None:
        raise ConfigError("teacher", f"{config.algorithm['type']} needs one; give teacher.path")
    teacher = load_network(wanted)
    teacher.refuse_missing_kernel(config.device, config.precisions, "teacher.attention")
    mine, theirs = network.latent_shape(), teacher.latent_shape()
    if mine != theirs or not same_encoders(encoders_of(config.model), encoders_of(wanted)):
        raise ConfigError(
            "teacher.path",
            f"{wanted.path} has latents {theirs} or encoders other than the student's {mine}; a teacher must "
            "share the student's autoencoder and text encoders",
        )
    offload_blocks(teacher.module.requires_grad_(False).eval(), offload, config.device)
    teacher.module.to(config.device)
    return teacher


def precise(velocity: VelocityModel, dtype: Precision, device: str) -> VelocityModel:
    """Return ``velocity`` in a precision of its own; its result is float32."""
    if dtype == "float32":
        return velocity

    def call(*args: Any, **kwargs: Any) -> Tensor:
        with autocast(device, dtype):
            return velocity(*args, **kwargs).float()

    return call


class RefreshedReference:
    """A frozen copy of the network, LoRA included, that takes the policy's weights every ``every`` iterations."""

    def __init__(self, network: Network, every: int, device: str = "cpu", offload: Offload | None = None) -> None:
        self.every = every
        self._trained = [name for name, p in network.module.named_parameters() if p.requires_grad]
        self._copy = OffloadedCopy(network, offload, device)
        self.velocity = self._copy.velocity

    def due(self, iteration: int) -> bool:
        """Tell whether iteration ``iteration``, counted from 0, ends with a refresh."""
        return (iteration + 1) % self.every == 0

    def follow(self, learner: Learner, iteration: int) -> None:
        if self.due(iteration):
            self.take(learner.engine.weights())

    def take(self, weights: Mapping[str, Tensor]) -> None:
        self._copy.bind(weights)

    def weights(self) -> dict[str, Tensor]:
        held = self._copy.held()
        return {name: held[name].detach().to("cpu", copy=True) for name in self._trained}


class FollowingAverage:
    """A frozen copy of the network that holds the learner's average."""

    def __init__(self, network: Network, device: str, offload: Offload | None = None) -> None:
        self._copy = OffloadedCopy(network, offload, device)
        self.velocity = self._copy.velocity

    def follow(self, learner: Learner, iteration: int) -> None:
        if learner.ema is not None and learner.ema.due:
            self._copy.bind(learner.ema.weights())
