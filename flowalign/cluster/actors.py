"""Ray actors around the workers: thin, and started by a method, so that their own errors arrive typed."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from flowalign.algorithm import VelocityModel
from flowalign.cluster.environment import packages_of, python_with
from flowalign.cluster.errors import WorkerLost
from flowalign.cluster.pool import fetch
from flowalign.cluster.session import worker_env
from flowalign.cluster.witness import DEATHS, Witness
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.sections import RewardConfig
from flowalign.record.checkpoint import BUFFERS, content_hash
from flowalign.record.death import Birth, say_hard_exits
from flowalign.run.collecting import Request
from flowalign.run.made.late import Expected, held
from flowalign.run.teachers import SharedTeacher, ask
from flowalign.run.workers import BindReceipt, LearnerWorker, RewardWorker, RolloutWorker
from flowalign.samples.children import end_children
from flowalign.samples.scoring import load_scorer
from flowalign.types import Condition, Pictures, Preview, Scores, Trajectories, Update
from rewards.interface import (
    Answers,
    Asked,
    Offers,
    ScorerFailed,
    SpecError,
    blamed,
    call,
    declared_names,
    one_line,
)
from rewards.printable import write_out_logs
from rewards.usercode.loading import keep_user_line

Weights = dict[str, Tensor]

SHARED = ("model", "ema", "averages")  # of a rank's state: the same on all

_ON_PURPOSE = ("The given NumPy array is not writable", "Zero-copy tensor serialization is enabled")


class Mortal:
    """A process whose end may have to be explained. ``variables`` are of its environment."""

    variables: ClassVar[dict[str, str]] = {}

    def born(self) -> Birth:
        import ray

        say_hard_exits()
        write_out_logs()
        for warning in _ON_PURPOSE:
            warnings.filterwarnings("ignore", warning)
        return Birth.of_this_process(ray.get_runtime_context().get_node_id())


class RolloutActor(Mortal):
    """Makes chunks with the weights it was last bound to.

    Who reads them maps their tensors where they lie in the object store, and must not write there.
    """

    variables: ClassVar[dict[str, str]] = {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}

    def __init__(
        self, config: RunConfig, name: str, texts: Sequence[str] = (), expected: Expected | None = None
    ) -> None:
        self.config, self.name, self.texts, self.expected = config, name, texts, expected

    def start(self) -> int:
        """Load the model; answers with the process id."""
        with held(self.expected, self.config):
            self.worker = RolloutWorker(self.config, self.name, self.texts)
        return os.getpid()

    def bind(self, weights: Weights, version: int) -> BindReceipt:
        return self.worker.bind(weights, version)

    def rollout(self, asked: Request) -> tuple[Pictures, Trajectories, Preview]:
        """Return three objects: the pictures go to a reward actor, the trajectories to the learner's ranks."""
        return self.worker.rollout(asked)


class HostedScorer(Answers):
    """A scorer in an actor with the reward's own ``runtime_env``; it ends with the reward actor that made it.

    Raises:
        SpecError: Ray refuses the environment or could not make it. ScorerFailed: the process died.
        What the scorer raises.
    """

    def __init__(self, reward: RewardConfig, offers: Offers, base_dir: Path, config: RunConfig) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        given = dict(reward.runtime_env or {})
        packages, options = packages_of(given), {}
        if packages is not None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            given = {**given, "py_executable": python_with(reward.label, packages)}
            del given["pip"]
            options["scheduling_strategy"] = here
        variables = {**worker_env(config.cluster.reward_threads), **given.pop("env_vars", {})}
        device = config.cluster.device if config.cluster.reward_gpus else "cpu"
        self._label = reward.label
        self._retried: dict[str, int] = {}
        try:
            # No resources of its own: it shares those of the actor that waits for it.
            environment = {**given, "env_vars": variables}
            hosted: Any = ray.remote(HostedHere).options(num_cpus=0, runtime_env=environment, **options)
            self._actor = hosted.remote(reward.model_copy(update={"runtime_env": None}), base_dir, device, offers)
        except (ValueError, TypeError) as error:
            raise SpecError(f"reward {self._label!r}: Ray refuses its runtime_env ({one_line(error)})") from None
        self._witness = Witness(self._actor)
        self.needs, self.name, self.sometimes = self._fetch(self._actor.start.remote())

    def answer(self, asked: Asked) -> Mapping[str, Any]:
        scores, self._retried = self._fetch(self._actor.answer.remote(asked))
        return scores

    def retried(self) -> dict[str, int]:
        return self._retried

    def _fetch(self, ref: Any) -> Any:
        from ray.exceptions import RuntimeEnvSetupError

        try:
            self._witness.meet()
            return fetch(ref)
        except RuntimeEnvSetupError as error:
            raise SpecError(f"reward {self._label!r}: Ray could not make its runtime_env ({one_line(error)})") from None
        except DEATHS as error:
            why = self._witness.cause(error)
            raise ScorerFailed(f"reward {self._label!r}: the process of its runtime_env died: {why}") from None


class HostedHere(Mortal):
    """The other end of ``HostedScorer``: the scorer itself."""

    def __init__(self, reward: RewardConfig, base_dir: Path, device: str, offers: Offers) -> None:
        self.reward, self.base_dir, self.device, self.offers = reward, base_dir, device, offers

    def start(self) -> tuple[frozenset[str], str | None, list[str]]:
        """Load the scorer; answers with what it needs, and `declared_names` of it."""
        self.named = load_scorer(self.reward, self.base_dir, self.device, offers=self.offers)
        with self.named.apart, blamed(self.reward.label):
            return self.named.needs, *declared_names(self.named.scorer)

    def answer(self, asked: Asked) -> tuple[Mapping[str, Any], dict[str, int]]:
        """Return the scores, and the number of questions that the scorer had to ask again."""
        with self.named.apart:
            scores = call(self.reward.label, self.named.scorer, asked)
        asks = getattr(self.named.scorer, "retried", None)
        return scores, {} if asks is None else asks()


class RewardActor(Mortal):
    """Scores chunks that it takes from the object store."""

    def __init__(self, config: RunConfig, base_dir: Path, expected: Expected | None = None) -> None:
        self.config, self.base_dir, self.expected = config, base_dir, expected

    def start(self) -> int:
        with held(self.expected, self.config):
            hosted = partial(HostedScorer, base_dir=self.base_dir, config=self.config)
            self.worker = RewardWorker(self.config, self.base_dir, hosted)
        return os.getpid()

    def end_children(self) -> None:
        """End what the scorers have started: Ray ends this process without asking it."""
        end_children()

    def needs(self, evaluation: bool) -> frozenset[str]:
        return self.worker.needs(evaluation)

    def score(self, evaluation: bool, *chunks: Pictures) -> tuple[Scores, float]:
        return self.worker.score(chunks, evaluation)


class TeacherActor(Mortal):
    """One frozen network for all learner ranks. Where it dies Ray makes it again, and the next call loads it anew.

    That call brings along what it must find then, which was not known yet when the actor was first made.
    """

    def __init__(self, config: AlignConfig, name: str) -> None:
        self.config, self.name = config, name

    def start(self) -> int:
        """Load the model; answers with the process id."""
        _ = self.shared
        return os.getpid()

    @cached_property
    def shared(self) -> SharedTeacher:
        return SharedTeacher(self.config, self.name)

    def latent_shape(self) -> tuple[int, int, int]:
        return self.shared.teacher.latent_shape()

    def encoders(self, precision: str) -> str | None:
        return self.shared.teacher.encoders(precision)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        options: Mapping[str, Any],
        expected: Expected | None = None,
    ) -> Tensor:
        if "shared" not in vars(self):
            with held(expected, self.config):
                _ = self.shared
        return self.shared.velocity(x, t, condition, options)


class RemoteTeacher:
    """A teacher's actor, as a learner rank sees it."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name, self._actor = name, actor
        self._witness: Witness | None = None
        self.expected: Expected | None = None

    def latent_shape(self) -> tuple[int, int, int]:
        return self._fetch(self._actor.latent_shape.remote())

    def encoders(self, precision: str) -> str | None:
        return self._fetch(self._actor.encoders.remote(precision))

    @property
    def velocity(self) -> VelocityModel:
        return ask(lambda *asked: self._fetch(self._actor.velocity.remote(*asked, self.expected)))

    def _fetch(self, ref: Any) -> Any:
        try:
            self._witness = self._witness or Witness(self._actor)
            self._witness.meet()
            return fetch(ref)
        except DEATHS as error:
            why = "" if self._witness is None else self._witness.cause(error)
            raise WorkerLost(
                f"the teacher {self.name} keeps dying over one question, the last time so: {why}"
            ) from None


class LearnerActor(Mortal):
    """One rank of the learner; every method is called on all ranks at once."""

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        teachers: Mapping[str, Any] | None = None,
        expected: Expected | None = None,
    ) -> None:
        self.config, self.rank, self.expected = config, rank, expected
        self.teachers = {name: RemoteTeacher(name, actor) for name, actor in (teachers or {}).items()}
        self.chunks: tuple[Trajectories, ...] = ()

    def address(self) -> tuple[str, int]:
        """Return this node's address and a port that is free on it."""
        import ray.util

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def start(self, host: str, port: int, first_here: bool) -> int:
        """Join the other ranks, of whom rank 0 listens on ``host:port``; this is the first of its machine, or not."""
        ranks = self.config.learner.ranks
        own = {"teachers": self.teachers, "first_here": first_here}
        with held(self.expected, self.config):
            self.worker = LearnerWorker(self.config, self.rank, ranks, port, host, **own)
        return os.getpid()

    def take(self, *chunks: Trajectories) -> None:
        """Hold what the next update learns from, where it lies in the object store."""
        self.chunks = chunks

    def update(self, scores: Scores | None, iteration: int) -> Update:
        chunks, self.chunks = self.chunks, ()
        try:
            return self.worker.update(chunks, scores, iteration)
        except Exception as error:
            keep_user_line(error)  # of an algorithm of the user's own
            raise

    def expect(self, teachers: Mapping[str, Expected]) -> None:
        """Tell this actor what a teacher that is made anew must find."""
        for name, expected in teachers.items():
            self.teachers[name].expected = expected

    def validate(self) -> dict[str, float]:
        return self.worker.validate()

    def parameters(self) -> tuple[int, int]:
        return self.worker.parameters

    def publish(self, evaluation: bool = False) -> tuple[Weights | None, BindReceipt | None]:
        """Rank 0: the weights, once, for the object store, and what binding them must answer."""
        weights = self.worker.weights(evaluation)
        if self.rank:
            return None, None
        return weights, BindReceipt("learner", self.worker.version(), len(weights), content_hash(weights))

    def state(self) -> dict[str, Any]:
        """Return this rank's state; what all ranks share comes from rank 0 alone."""
        state = {**self.worker.state(), BUFFERS: self.worker.buffers}
        return {**state, **dict.fromkeys(SHARED)} if self.rank else state

    def restore(
        self,
        shared: Mapping[str, Any],
        optimizer: tuple[Mapping[str, Tensor], Mapping[str, Any]],
        version: int,
    ) -> str | None:
        return self.worker.restore(**shared, optimizer=optimizer, version=version)
