"""Where pictures, latents and trajectories go on a real cluster, and where they do not."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from flowalign.cluster import pipeline as stages
from flowalign.cluster.errors import PlacementError
from flowalign.cluster.ray_backend import RayBackend
from flowalign.cluster.store import object_store_bytes
from flowalign.config.alignment import AlignConfig
from flowalign.data.prompts import evaluation_batch
from flowalign.plan.stored import stored_bytes
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from flowalign.run.protocols import Collected
from flowalign.samples.joined import join_trajectories
from flowalign.types import Preview, Trajectories
from tests.cluster.runs import small_config

NORM = """
import numpy as np

class Norm:
    needs = frozenset({"latents"})

    def answer(self, asked):
        asked.images[:] = 0  # its own
        return {"norm": np.sqrt((asked.latents.astype(np.float64) ** 2).sum((1, 2, 3)))}
"""
SIDE = 128


def config_of(pipeline: Path, folder: Path, backend: str) -> AlignConfig:
    """Images of 128 × 128, of which a thumbnail has every second pixel; 24 in chunks of 4."""
    (folder / "norm.py").write_text(NORM)
    brightness = {"spec": "reward.py:brightness", "options": {"folder": str(folder)}}
    model = {"path": str(pipeline), "max_sequence_length": 16, "height": SIDE, "width": SIDE}
    rewards = [{"spec": "norm.py:Norm", "name": "norm"}, brightness]
    return small_config(pipeline, folder, cluster={"backend": backend}, model=model, rewards=rewards)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def backend(tiny_pipeline_dir: Path, folder: Path) -> Iterator[RayBackend]:
    made = RayBackend(config_of(tiny_pipeline_dir, folder, "ray"), folder)
    made.sync()
    yield made
    made.close()


def collect(backend: Any, evaluation: bool = False) -> Collected:
    run = build_run(backend.config)
    plan = run.algorithm.plan(0, run.seed)
    assert plan is not None
    batch = evaluation_batch("shapes:eval", 28) if evaluation else run.sampler.batch(0)
    return backend.collect(batch, plan, seed=run.seed, evaluation=evaluation)


def fetched(backend: RayBackend, monkeypatch: pytest.MonkeyPatch, evaluation: bool) -> list[Any]:
    """What the driver gets of the store while it collects."""
    got: list[Any] = []
    usual = stages.fetch
    monkeypatch.setattr(stages, "fetch", lambda ref: got.append(usual(ref)) or got[-1])
    collect(backend, evaluation)
    return got


@pytest.mark.parametrize("evaluation", [False, True])
def test_the_driver_gets_thumbnails_and_scores_and_of_an_evaluation_its_first_images(
    backend: RayBackend, monkeypatch: pytest.MonkeyPatch, evaluation: bool
) -> None:
    got = fetched(backend, monkeypatch, evaluation)
    previews = [one for one in got if isinstance(one, Preview)]
    images, whole = (28, 24) if evaluation else (24, 0)
    assert sum(map(len, previews)) == images and sum(len(one.images) for one in previews) == whole
    assert {one.thumbnails.shape[1:] for one in previews} == {(SIDE // 2, SIDE // 2, 3)}
    thumbnails, pictures = images * 3 * (SIDE // 2) ** 2, whole * 3 * SIDE**2
    assert len(pickle.dumps(got)) <= thumbnails + pictures + 2_000 * len(got)


def test_a_reward_is_sent_the_latents_that_it_needs_and_the_bits_are_those_of_one_process(
    backend: RayBackend, tiny_pipeline_dir: Path, folder: Path
) -> None:
    local = LocalBackend(config_of(tiny_pipeline_dir, folder, "local"), folder)
    local.sync()
    here, there = collect(local), collect(backend)
    assert here.batch == there.batch and np.array_equal(here.preview.thumbnails, there.preview.thumbnails)
    assert all(here.scores.by_reward[name].equal(there.scores.by_reward[name]) for name in ("norm", "brightness"))
    walked = join_trajectories(here.trajectories)
    norms = walked.final_NCHW[:].double().square().sum((1, 2, 3)).sqrt().float()
    torch.testing.assert_close(there.scores.by_reward["norm"], norms)
    assert 0 < here.scores.by_reward["brightness"].min()  # of the image as it was made
    one, other = (made.update(own.trajectories, own.scores, 0) for made, own in ((local, here), (backend, there)))
    assert one.metrics == other.metrics
    local.close()


def test_a_reward_that_needs_no_latents_is_sent_none(backend: RayBackend) -> None:
    def keep(actor: Any) -> None:
        usual = actor.worker.score

        def score(chunks: Any, evaluation: bool) -> Any:
            actor.sent = [chunk.final_NCHW is None for chunk in chunks]
            return usual(chunks, evaluation)

        actor.worker.score = score

    reward = backend.rewards.actors[0]
    ray.get(reward.__ray_call__.remote(keep))
    for evaluation in (False, True):
        collect(backend, evaluation)
        assert ray.get(reward.__ray_call__.remote(lambda actor: actor.sent)) == [evaluation]


def test_a_rank_maps_trajectories_where_they_lie_and_has_no_copy(backend: RayBackend) -> None:
    def places(actor: Any) -> list[str]:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        spans = [(*(int(end, 16) for end in line[0].split("-")), line[1], " ".join(line[5:])) for line in lines]
        found = []
        for chunk in actor.chunks:
            for tensor in (chunk.states_NSCHW, chunk.final_NCHW, chunk.log_prob_NS, chunk.condition.text["tokens"]):
                found += [rights + name for a, b, rights, name in spans if a <= tensor.data_ptr() < b]
        return found

    held = collect(backend).trajectories
    backend.learner.call("take", *held[0].trajectory_refs)
    found = ray.get(backend.learner.actors[0].__ray_call__.remote(places))
    assert len(found) == 4 * 6 and all(place[3] == "s" and "/dev/shm/" in place for place in found), set(found)


def test_what_an_iteration_stores_is_told_beforehand(backend: RayBackend) -> None:
    held = collect(backend)
    stored = 24 * 3 * SIDE**2
    for chunk in ray.get(held.trajectories[0].trajectory_refs):
        assert isinstance(chunk, Trajectories)
        stored += len(pickle.dumps(chunk)) + chunk.final_NCHW[:].nbytes
    assert stored <= 1.05 * stored_bytes(backend.config) and stored_bytes(backend.config) <= 1.3 * stored


def test_a_store_takes_three_tenths_of_the_room_or_what_is_needed_and_is_refused_where_that_is_not_there() -> None:
    size = object_store_bytes(0)
    assert size >= 75 * 2**20 and object_store_bytes(2 * size) == 2 * size
    with pytest.raises(PlacementError, match=r"^placement: Ray's object store needs .* GB for an iteration, .* has "):
        object_store_bytes(10**15)
