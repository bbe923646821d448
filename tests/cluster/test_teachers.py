"""Teachers as actors that the learner's ranks share, against teachers inside the learner; real actors and pipelines."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from flowalign.cluster.actors import RemoteTeacher, TeacherActor
from flowalign.cluster.errors import PlacementError, WorkerLost
from flowalign.cluster.placement import shares
from flowalign.cluster.ray_backend import RayBackend
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.models.build import load_policy
from flowalign.models.errors import ModelError
from flowalign.record.checkpoint import content_hash
from flowalign.run.collecting import Request
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from flowalign.run.made import MadeOf
from flowalign.run.teachers import SharedTeacher, ask
from flowalign.run.workers import LearnerWorker, RolloutWorker
from flowalign.types import Guidance
from tests.algorithms.every import plan_of
from tests.cluster.runs import Trace, assert_same_bits, small_config, trace


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the tests of this file that need one; backends join it and leave it running."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def teachers(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A deeper one for a task, and for all others one of the student's size, guided, whose scheduler differs."""
    from flowalign.shapes.build.pipeline import new_transformer

    torch.manual_seed(1)
    made = tmp_path_factory.mktemp("teachers")
    for name, layers in (("deep", 2), ("shifted", 1)):
        shutil.copytree(tiny_pipeline_dir, made / name)
        shutil.rmtree(made / name / "transformer")
        new_transformer(128, 128, num_layers=layers, num_heads=1).save_pretrained(str(made / name / "transformer"))
    (made / "shifted" / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0})
    )
    return {
        "deep": {"path": str(made / "deep"), "tasks": ["counting", "position", "colors"]},
        "shifted": {"path": str(made / "shifted"), "guidance_scale": 2.0},
    }


def config_of(pipeline: Path, folder: Path, named: dict[str, Any], *, ranks: int = 1, **cluster: Any) -> AlignConfig:
    algorithm = {"type": "opd", "teachers": named, "num_steps": 3, "kind": "flow", "noise_level": 0.6}
    engine = "fsdp" if ranks > 1 else "torch"
    learner = {"engine": engine, "micro_batch_size": 4, "ema_decay": 0.5, "ranks": ranks}
    changes = {"algorithm": algorithm, "learner": learner, "data": {"groups_per_iteration": 13}, "rewards": []}
    return small_config(pipeline, folder, cluster={"teacher_cpus": 0.25, **cluster}, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def local(tiny_pipeline_dir: Path, folder: Path, teachers: dict[str, Any]) -> Trace:
    config = config_of(tiny_pipeline_dir, folder, teachers, backend="local")
    backend = LocalBackend(config, folder)
    try:
        return trace(backend, config)
    finally:
        backend.close()


@pytest.fixture(scope="module")
def one(cluster: None, tiny_pipeline_dir: Path, folder: Path, teachers: dict[str, Any]) -> Iterator[RayBackend]:
    config = config_of(tiny_pipeline_dir, folder, teachers)
    backend = RayBackend(config, folder, made=MadeOf(config, folder))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def start(one: RayBackend) -> list[dict[str, Any]]:
    return one.state()


@pytest.fixture
def fresh(one: RayBackend, start: list[dict[str, Any]]) -> RayBackend:
    one.restore(start)
    return one


def questions(config: AlignConfig, iteration: int) -> int:
    """Micro-batches of 4 that the teachers are asked for: of a sample's 3 steps each."""
    run = build_run(config)
    teacher_of = run.algorithm.needs.teacher_of
    assert teacher_of is not None
    named = Counter(map(teacher_of, run.sampler.batch(iteration).metadata))
    return sum(math.ceil(3 * count / 4) for count in named.values())


def pids(backend: RayBackend) -> list[int]:
    return ray.get([actor.__ray_call__.remote(lambda actor: os.getpid()) for actor in backend.teachers.actors])


def computed(backend: RayBackend) -> int:
    return sum(ray.get([a.__ray_call__.remote(lambda actor: actor.shared.computed) for a in backend.teachers.actors]))


@pytest.mark.slow
def test_teachers_in_actors_give_the_bits_of_teachers_in_the_learner(fresh: RayBackend, local: Trace) -> None:
    assert_same_bits(trace(fresh, fresh.config), local)
    assert min(local.metrics[0][f"loss/opd/{name}"] for name in ("deep", "shifted")) > 0
    assert computed(fresh) > 0


@pytest.mark.slow
@pytest.mark.fault
def test_a_teacher_killed_between_two_iterations_changes_no_bit(fresh: RayBackend, local: Trace) -> None:
    before = pids(fresh)
    os.kill(before[0], signal.SIGKILL)
    assert_same_bits(trace(fresh, fresh.config), local)
    after = pids(fresh)
    assert after[0] != before[0] and after[1] == before[1]


def die_at_the_third(actor: Any) -> None:
    """The teacher's process is killed over the third question that it is asked from now on."""
    compute, count = actor.shared.teacher.velocity, iter(range(3))

    def dies(*asked: Any, **options: Any) -> Tensor:
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(*asked, **options)

    actor.shared.teacher.velocity = dies


@pytest.mark.fault
@pytest.mark.slow
def test_a_teacher_in_an_actor_that_is_killed_over_a_question_gives_the_bits_of_one_in_the_learner(
    cluster: None, tiny_pipeline_dir: Path, tmp_path: Path, teachers: dict[str, Any]
) -> None:
    config = config_of(tiny_pipeline_dir, tmp_path, teachers)
    made: Any = ray.remote(TeacherActor)
    actor = made.options(num_cpus=0.1, max_restarts=-1, max_task_retries=3).remote(config, "deep")
    remote: Any = RemoteTeacher("deep", actor)
    remote.expected = MadeOf(config, tmp_path).expected("model.", "algorithm.teachers.deep.")
    before = ray.get(actor.start.remote())
    alone, asking = LearnerWorker(config), LearnerWorker(config, teachers={"deep": remote})
    student, run = RolloutWorker(config), build_run(config)
    student.bind(alone.weights(), 0)
    plan = run.algorithm.plan(0, 0)
    assert plan is not None
    _, rollout, _ = student.rollout(Request(run.sampler.batch(0), plan, 0, 0))
    ray.get(actor.__ray_call__.remote(die_at_the_third))
    expected = alone.update([rollout], None, 0).metrics
    assert asking.update([rollout], None, 0).metrics == expected and expected["loss/opd/deep"] > 0
    assert content_hash(asking.weights()) == content_hash(alone.weights())
    assert ray.get(actor.__ray_call__.remote(lambda actor: os.getpid())) != before
    ray.kill(actor)


@pytest.mark.slow
@pytest.mark.fault
def test_a_teacher_killed_over_a_question_is_asked_again(fresh: RayBackend, local: Trace) -> None:
    before = pids(fresh)
    fresh.sync()
    ray.get(fresh.teachers.actors[1].__ray_call__.remote(die_at_the_third))
    assert_same_bits(trace(fresh, fresh.config), local)
    assert pids(fresh)[1] != before[1]


@pytest.mark.slow
@pytest.mark.fault
def test_a_teacher_that_is_made_again_does_not_load_what_has_changed(
    fresh: RayBackend, local: Trace, teachers: dict[str, Any]
) -> None:
    trace(fresh, fresh.config, iterations=1)
    file = Path(teachers["deep"]["path"]) / "transformer" / "config.json"
    before = file.read_text()
    file.write_text(before + " ")
    os.kill(pids(fresh)[0], signal.SIGKILL)
    with pytest.raises(ConfigError, match=rf"^algorithm.teachers.deep.path: {file} has changed since the run began"):
        trace(fresh, fresh.config, iterations=1)
    file.write_text(before)
    fresh.restore(fresh.state())
    trace(fresh, fresh.config, iterations=1)


@pytest.mark.usefixtures("cluster")
def test_a_teacher_that_cannot_be_placed_is_refused_before_anything_starts(
    tiny_pipeline_dir: Path, tmp_path: Path, teachers: dict[str, Any]
) -> None:
    asked: tuple[tuple[dict[str, Any], str], ...] = (
        ({"teacher_gpus": 1}, "one teacher actor needs 1 GPU, .* lower cluster.teacher_gpus"),
        ({"teacher_cpus": 1.9}, r"2 teacher × 1.9 need .*lower the number of algorithm.teachers or cluster.teacher_cp"),
    )
    for cluster, said in asked:
        with pytest.raises(PlacementError, match=said):
            RayBackend(config_of(tiny_pipeline_dir, tmp_path, teachers, **cluster), tmp_path)
    with pytest.raises(ConfigError, match=r"^cluster.teacher_cpus: all actors together need"):
        config = config_of(tiny_pipeline_dir, tmp_path, teachers, teacher_cpus=10_000)
        config.cluster.check_cores(config.learner.ranks, 2)


def test_teachers_take_a_place_only_as_actors(
    tiny_pipeline_dir: Path, tmp_path: Path, teachers: dict[str, Any]
) -> None:
    def placed(**cluster: Any) -> dict[str, int]:
        return {s.kind: s.count for s in shares(config_of(tiny_pipeline_dir, tmp_path, teachers, **cluster))}

    assert placed() == {"rollout": 1, "reward": 1, "learner": 1, "teacher": 2}
    assert placed(teachers="learner")["teacher"] == 0 == placed(backend="local")["teacher"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_actor_whose_encoders_are_not_the_student_s_is_refused_by_name(
    tiny_pipeline_dir: Path, tmp_path: Path, teachers: dict[str, Any]
) -> None:
    other = Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "scaled"))
    path = other / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 2.0}))
    config = config_of(tiny_pipeline_dir, tmp_path, {"odd": {"path": str(other)}})
    with pytest.raises(ModelError, match=r"^algorithm.teachers.odd: .* encodes prompts or images otherwise"):
        RayBackend(config, tmp_path)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.usefixtures("cluster")
def test_a_teacher_that_keeps_dying_ends_the_run_in_a_sentence(
    tiny_pipeline_dir: Path, tmp_path: Path, teachers: dict[str, Any]
) -> None:
    def die_at_once(actor: Any) -> None:
        actor.shared.teacher.velocity = lambda *asked, **options: os.kill(os.getpid(), signal.SIGKILL)

    config = config_of(tiny_pipeline_dir, tmp_path, {"deep": {"path": teachers["deep"]["path"]}}, max_task_retries=0)
    backend = RayBackend(config, tmp_path)
    try:
        ray.get(backend.teachers.actors[0].__ray_call__.remote(die_at_once))
        with pytest.raises(WorkerLost, match=r"^the teacher deep keeps dying over one question"):
            trace(backend, config)
    finally:
        backend.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("cluster")
def test_two_ranks_share_teachers_and_get_the_bits_of_teachers_of_their_own(
    tiny_pipeline_dir: Path, tmp_path: Path, teachers: dict[str, Any]
) -> None:
    traces = []
    for where in ("learner", "actor"):
        config = config_of(tiny_pipeline_dir, tmp_path, teachers, ranks=2, teachers=where)
        backend = RayBackend(config, tmp_path)
        try:
            traces.append(trace(backend, config))
            if where == "actor":
                least = questions(config, 0) + questions(config, 1)
                assert least <= computed(backend) <= least + 2 * len(teachers)  # uneven ends
            else:
                assert backend.teachers.actors == []
        finally:
            backend.close()
    assert_same_bits(*traces)


def test_an_answer_depends_on_the_used_prompts_alone(
    tiny_pipeline_dir: Path, tmp_path: Path, teachers: dict[str, Any]
) -> None:
    config = config_of(tiny_pipeline_dir, tmp_path, teachers)
    shared, policy = SharedTeacher(config, "deep"), load_policy(config.model)
    encode = partial(policy.encoders.encode_prompts, length=config.model.max_sequence_length)
    velocity = ask(shared.velocity)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *policy.network.latent_shape(None, None), generator=generator), torch.tensor([0.5, 0.2])
    condition = encode(("a red circle", "two dogs", "two dogs")).take(torch.tensor([2, 1]))
    first = velocity(x, t, condition, guidance=Guidance(2.0))
    assert torch.equal(first, shared.teacher.velocity(x, t, condition, guidance=Guidance(2.0)))
    for same in (condition, condition.take(torch.tensor([0, 0])), encode(("two dogs",) * 2)):
        assert torch.equal(velocity(x, t, same, guidance=Guidance(2.0)), first)
    changed = velocity(x, t, encode(("a red circle",) * 2), guidance=Guidance(2.0))
    assert shared.computed == 5 and not torch.equal(changed, first)


class Asked:
    """A shared teacher as a rank sees it, without Ray between them."""

    def __init__(self, shared: SharedTeacher) -> None:
        self.latent_shape, self.encoders = shared.teacher.latent_shape, shared.teacher.encoders
        self.velocity = ask(shared.velocity)


def test_learners_that_share_teachers_compute_the_bits_of_one_with_its_own(
    tiny_pipeline_dir: Path, tmp_path: Path, teachers: dict[str, Any]
) -> None:
    config = config_of(tiny_pipeline_dir, tmp_path, teachers, backend="local")
    shared = {name: SharedTeacher(config, name) for name in teachers}
    asked: Any = {name: Asked(teacher) for name, teacher in shared.items()}
    alone, *ranks = [LearnerWorker(config, teachers=given) for given in (None, asked, asked)]
    student, run = RolloutWorker(config), build_run(config)
    student.bind(alone.weights(), 0)
    _, rollout, _ = student.rollout(Request(run.sampler.batch(0), plan_of(run.algorithm), 0, 0))
    expected = alone.update([rollout], None, 0).metrics
    assert [rank.update([rollout], None, 0).metrics for rank in ranks] == [expected] * 2
    assert all(content_hash(rank.weights()) == content_hash(alone.weights()) for rank in ranks)
    assert sum(teacher.computed for teacher in shared.values()) == 2 * questions(config, 0)
