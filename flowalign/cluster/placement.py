"""Placement of actors: the demands of a configuration, whether they fit, and the placement group that holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from flowalign.cluster.errors import PlacementError
from flowalign.config.cluster import CORES_PROMISED
from flowalign.config.run import RunConfig
from flowalign.run.teachers import teachers_of

WAIT_S = 3.0
_SMALLEST_CPU = 0.001  # Ray refuses an empty bundle

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Share:
    """``count`` actors of one kind, each with its CPUs and GPUs."""

    kind: str
    count: int
    cpus: float
    gpus: float
    count_key: str

    def bundle(self) -> dict[str, float]:
        bundle = {"CPU": self.cpus or _SMALLEST_CPU}
        return {**bundle, "GPU": self.gpus} if self.gpus else bundle

    def amount(self, resource: str) -> float:
        return self.cpus if resource == "CPU" else self.gpus

    def key(self, resource: str) -> str:
        return f"cluster.{self.kind}_{resource.lower()}s"


def shares(config: RunConfig) -> tuple[Share, ...]:
    """Return the shares of rollout and reward workers, learner ranks and teachers, in their bundles' order.

    Where no images are made, the first two are empty.
    """
    c, makes = config.cluster, config.makes_images
    teachers = len(teachers_of(config)) if c.has_teacher_actors else 0
    return (
        Share("rollout", c.rollout_workers * makes, c.rollout_cpus, c.rollout_gpus, "cluster.rollout_workers"),
        Share("reward", c.reward_workers * makes, c.reward_cpus, c.reward_gpus, "cluster.reward_workers"),
        Share("learner", config.learner.ranks, c.learner_cpus, c.learner_gpus, "learner.ranks"),
        Share("teacher", teachers, c.teacher_cpus, c.teacher_gpus, "the number of algorithm.teachers"),
    )


def own_resources(asked: Sequence[Share], cores: int, gpus: int) -> tuple[int, int]:
    """Return the CPUs and GPUs to start Ray with on this machine: its cores, or up to twice as many where asked for.

    Raises:
        PlacementError: no single machine like this one holds what is asked for.
    """
    needed = math.ceil(_total(asked, "CPU"))
    room = max(cores, min(needed, CORES_PROMISED * cores))
    check_fits(asked, [{"CPU": room, "GPU": gpus}], f"this machine ({cores} cores)")
    return room, gpus


def check_fits(asked: Sequence[Share], nodes: Sequence[Resources], where: str) -> None:
    """Raise PlacementError where ``nodes`` cannot hold the actors even when idle."""
    for resource in ("CPU", "GPU"):
        largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        for share in asked:
            if share.count and share.amount(resource) > largest:
                raise PlacementError(
                    f"placement: one {share.kind} actor needs {_count(share.amount(resource), resource)}, a node of "
                    f"{where} has at most {_count(largest, resource)}; lower {share.key(resource)}"
                )
        needed, there = _total(asked, resource), sum(node.get(resource, 0.0) for node in nodes)
        if needed > there + 1e-6:
            raise PlacementError(_does_not_fit(asked, resource, f"{where} offers {_count(there, resource)}"))


def reserve(asked: Sequence[Share]) -> PlacementGroup:
    """Return a placement group with one bundle for each actor, in the order of ``asked``.

    Raises:
        PlacementError: within seconds, where the cluster is too small or its resources are taken.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    check_fits(asked, nodes, f"the cluster ({len(nodes)} {'node' if len(nodes) == 1 else 'nodes'})")
    group = placement_group([share.bundle() for share in asked for _ in range(share.count)], strategy="PACK")
    if group.wait(WAIT_S):
        return group
    remove_placement_group(group)
    free = ray.available_resources()
    for resource in ("GPU", "CPU"):
        if _total(asked, resource) > free.get(resource, 0.0):
            now = f"the cluster has {_count(free.get(resource, 0.0), resource)} free of what others hold"
            raise PlacementError(_does_not_fit(asked, resource, now))
    raise PlacementError(_does_not_fit(asked, "CPU", "the cluster's free resources are scattered over too many nodes"))


def _does_not_fit(asked: Sequence[Share], resource: str, there: str) -> str:
    parts = ", ".join(f"{s.count} {s.kind} × {s.amount(resource):g}" for s in asked if s.count and s.amount(resource))
    largest = max(asked, key=lambda s: s.count * s.amount(resource))
    keys = f"{largest.count_key} or {largest.key(resource)}" if largest.count > 1 else largest.key(resource)
    return f"placement: {parts} need {_count(_total(asked, resource), resource)}, {there}; lower {keys}"


def _total(asked: Sequence[Share], resource: str) -> float:
    return sum(share.count * share.amount(resource) for share in asked)


def _count(amount: float, resource: str) -> str:
    return f"{amount:g} {resource}{'' if amount == 1 else 's'}"
