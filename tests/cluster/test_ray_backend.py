"""The Ray backend against the local one, with and without dying workers; real actors, a random tiny model."""

from __future__ import annotations

import gc
import importlib
import io
import logging
import os
import re
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ray
from ray.exceptions import ObjectLostError
from rich.console import Console

from flowalign.cluster.actors import HostedScorer
from flowalign.cluster.errors import LearnerLost, PlacementError, WorkerImportError, WorkerLost
from flowalign.cluster.ray_backend import RayBackend
from flowalign.config.cluster import PatienceConfig
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig
from flowalign.intake.file import load_align
from flowalign.intake.run_directory import begin_run, check_run
from flowalign.record import checkpoint
from flowalign.record.checkpoint import content_hash
from flowalign.record.metrics import read_metrics, without_times
from flowalign.run.drive import drive, local_backend
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from flowalign.run.made import MadeOf
from flowalign.run.patience import Patience
from flowalign.run.sync import SyncError
from flowalign.samples.offers import TRAINING
from flowalign.samples.scoring import ScorerHangs
from rewards.interface import InvalidScores, ScorerFailed, SpecError
from tests.algorithms.every import plan_of
from tests.cluster.listening import Door, asks_for_token, documented, doors, name
from tests.cluster.runs import Trace, assert_same_bits, small_config, trace
from tests.fault.trainings import assert_same_training, bank_of, here, written

SIGKILL = "it was killed by SIGKILL|its process was gone at once"  # before Linux 6.15 nobody is told of the signal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def local(tiny_pipeline_dir: Path, folder: Path) -> Trace:
    config = small_config(tiny_pipeline_dir, folder, cluster={"backend": "local"})
    backend = LocalBackend(config, folder)
    try:
        return trace(backend, config)
    finally:
        backend.close()


BEFORE: set[int] = set()


@pytest.fixture(scope="module", autouse=True)
def _doors_of_other_files() -> None:
    BEFORE.update(door.port for door in doors(os.getpid()))


@pytest.fixture(scope="module")
def two(tiny_pipeline_dir: Path, folder: Path) -> Iterator[RayBackend]:
    """Two rollout workers on a Ray of their own."""
    config = small_config(tiny_pipeline_dir, folder, cluster={"rollout_workers": 2})
    backend = RayBackend(config, folder, made=MadeOf(config, folder))
    yield backend
    backend.close()
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def start(two: RayBackend) -> list[dict[str, Any]]:
    return two.state()


@pytest.fixture
def fresh(two: RayBackend, start: list[dict[str, Any]]) -> RayBackend:
    """The two workers' backend, back at its first state."""
    two.restore(start)
    return two


@pytest.fixture
def hasty(fresh: RayBackend) -> Iterator[RayBackend]:
    """One that waits for 6 s, or twice as long as what it has once done took."""
    vigil = fresh.rollouts.vigil
    collect(fresh, fresh.config)
    usual, vigil.patience = vigil.patience, Patience(PatienceConfig(least_s=6, factor=2), vigil.patience.longest)
    yield fresh
    vigil.patience = usual


def collect(backend: RayBackend, config: RunConfig) -> Any:
    run = build_run(config)
    backend.sync()
    return backend.collect(run.sampler.batch(0), plan_of(run.algorithm, seed=run.seed), seed=run.seed)


def test_two_rollout_workers_give_the_bits_of_the_local_backend(fresh: RayBackend, local: Trace) -> None:
    assert_same_bits(trace(fresh, fresh.config), local)


def test_a_training_on_latents_learns_the_bits_of_one_process(
    two: RayBackend, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    """On the Ray that is there, with a learner rank alone: no evaluation asks for images."""
    bank = bank_of(tiny_pipeline_dir, tmp_path / "bank")
    for place in ("local", "ray"):
        changes: dict[str, Any] = {"evaluation": {"every": 0}, "cluster": {"backend": place}}
        here(written(tmp_path, tiny_pipeline_dir, bank, place, **changes))
    assert_same_training(tmp_path / "runs" / "local", tmp_path / "runs" / "ray", rows_from=1)


def test_first_update_replays_the_rollout_exactly(local: Trace) -> None:
    assert [metrics["replay/max_abs_dlogp"] for metrics in local.metrics] == [0.0, 0.0]
    assert all(metrics["learner/updates"] == 1 for metrics in local.metrics)


def die_over_the_next_rollout(actor: Any) -> None:
    actor.worker.rollout = lambda *asked, **how: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault
def test_killed_rollout_worker_changes_no_bit(fresh: RayBackend, local: Trace) -> None:
    before = list(fresh.rollouts.pids)
    ray.get(fresh.rollouts.actors[1].__ray_call__.remote(die_over_the_next_rollout))
    fresh.say = (said := []).append
    assert_same_bits(trace(fresh, fresh.config), local)
    assert len(said) == 1 and said[0].startswith("retried: the rollout worker was lost over chunk ")
    assert fresh.rollouts.pids[0] == before[0]
    assert fresh.rollouts.pids[1] != before[1]
    must_find = fresh.rollouts.actors[1].__ray_call__.remote(lambda actor: set(actor.expected.record))
    assert "model.path" in ray.get(must_find)


@pytest.mark.fault
def test_killed_reward_worker_changes_no_bit(fresh: RayBackend, local: Trace, folder: Path) -> None:
    before = list(fresh.rewards.pids)
    (folder / "kill").write_text("")
    assert_same_bits(trace(fresh, fresh.config), local)
    assert fresh.rewards.pids != before
    assert re.match(SIGKILL, fresh.rewards.deaths[-1]) and "memory" not in fresh.rewards.deaths[-1]


@pytest.mark.fault
def test_trajectories_that_are_lost_after_they_were_scored_are_made_again(fresh: RayBackend, local: Trace) -> None:
    class Owner:
        def refs(self) -> list[Any]:
            return [ray.put(np.zeros(2**20)) for _ in range(2)]

    remote: Any = ray.remote(Owner).options(num_cpus=0)
    usual, until = fresh.collect, time.monotonic() + 60

    def losing(*asked: Any, **options: Any) -> Any:
        owner, collected = remote.remote(), usual(*asked, **options)
        collected.trajectories[0].trajectory_refs[1:3] = refs = ray.get(owner.refs.remote())
        ray.kill(owner)
        for ref in refs:
            with pytest.raises(ObjectLostError):
                while time.monotonic() < until:
                    ray.get(ref)
        return collected

    fresh.say = (said := []).append
    fresh.collect = losing
    try:
        assert_same_bits(trace(fresh, fresh.config), local)
    finally:
        del fresh.collect
    assert len(said) == 4 and all(line.startswith("retried: the rollout worker was lost over chunk ") for line in said)


class Lent:
    """A backend that outlives the run it works for; its rank is killed as it is to learn from iteration ``at``."""

    def __init__(self, backend: RayBackend, at: int) -> None:
        self._backend, self._at = backend, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def update(self, *args: Any) -> Any:
        if args[-1] + 1 == self._at:
            self._at = 0
            os.kill(self._backend.learner.pids[0], signal.SIGKILL)
        return self._backend.update(*args)

    def close(self) -> None:
        """Leave it to whoever lent it."""


@pytest.mark.fault
def test_a_run_whose_rank_is_killed_goes_back_by_itself_and_changes_no_bit(
    fresh: RayBackend, tiny_pipeline_dir: Path, folder: Path, tmp_path: Path
) -> None:
    said, before = io.StringIO(), fresh.learner.pids[0]
    runs = []
    for kind, backend in (("local", local_backend), ("ray", lambda *given: cast(Any, Lent(fresh, at=4)))):
        cluster = {"backend": kind, "rollout_workers": 2, "restart_wait_s": 0.2}
        changes = {"iterations": 4, "checkpoint": {"every": 2}, "logging": {"wandb": "disabled"}}
        changes |= {"name": kind, "runs_dir": str(tmp_path)}
        config = small_config(tiny_pipeline_dir, folder, cluster=cluster, **changes)
        runs.append(drive(config, folder, Console(file=said, width=500), backend=backend))
    lost = [line for line in said.getvalue().splitlines() if line.startswith("restarted: ")]
    begins = rf" from {runs[1] / 'checkpoints' / 'step_000002'} \(1 of at most 3 times\)"
    assert len(lost) == 1 and re.search(rf"the learner \(rank 0 of 1\) died: ({SIGKILL}).*{begins}", lost[0]), lost
    one, other = (checkpoint.load(run / "checkpoints" / "step_000004") for run in runs)
    assert one.ema is not None and other.ema is not None
    for a, b in ((one.model, other.model), (one.ema, other.ema), (one.optimizer_of(0)[0], other.optimizer_of(0)[0])):
        assert content_hash(a) == content_hash(b)
    rows = [read_metrics(run / "metrics.jsonl") for run in runs]
    assert [without_times(row) for row in rows[0]] == [without_times(row) for row in rows[1]]
    assert [row.get("learner/restarts") for row in rows[1]] == [None, None, 1.0, 1.0]
    assert fresh.learner.pids[0] != before and not Path(f"/proc/{before}").exists()


def test_a_run_goes_on_with_the_other_backend_and_the_bits_of_an_undisturbed_one(
    fresh: RayBackend, tiny_pipeline_dir: Path, folder: Path, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"local": local_backend, "ray": lambda *given: cast(Any, Lent(fresh, at=0))}

    def done(name: str, kind: str, iterations: int) -> Path:
        changes = {"name": name, "runs_dir": str(tmp_path), "iterations": iterations, "checkpoint": {"every": 1}}
        cluster = {"backend": kind, "rollout_workers": 2}
        small = small_config(tiny_pipeline_dir, folder, cluster=cluster, logging={"wandb": "disabled"}, **changes)
        (file := folder / f"{name}.yaml").write_text(small.model_dump_json())
        config = load_align(file).config
        check_run(config)
        return drive(config, folder, Console(quiet=True), lambda: begin_run(config), backend=own[kind])

    runs = [done("whole", "local", 2)]
    for run, first, then in (("there", "ray", "local"), ("back", "local", "ray")):
        runs.append([done(run, first, 1), done(run, then, 2)][-1])
    held = [checkpoint.load(run / "checkpoints" / "step_000002") for run in runs]
    for part in ("model", "ema"):
        assert len({content_hash(getattr(found, part)) for found in held}) == 1
    assert len({content_hash(found.optimizer_of(0)[0]) for found in held}) == 1
    rows = [[without_times(row) for row in read_metrics(run / "metrics.jsonl")] for run in runs]
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 2


def test_an_answer_that_nobody_waits_for_any_more_prints_nothing(
    fresh: RayBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of the ranks that were in step with one that has died."""
    says = logging.getLogger("ray._private.worker")
    says.addHandler(caplog.handler)
    try:
        actor = fresh.rollouts.actors[0]
        ref = actor.rollout.remote("no request")
        ray.get(actor.born.remote())  # which comes after it
        del ref
        gc.collect()
        time.sleep(1.0)
    finally:
        says.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.fault
def test_two_rollout_workers_killed_at_once_change_no_bit(fresh: RayBackend, local: Trace, folder: Path) -> None:
    before = list(fresh.rollouts.pids)
    (folder / "kill").write_text(" ".join(map(str, before)))
    assert_same_bits(trace(fresh, fresh.config), local)
    assert not set(before) & set(fresh.rollouts.pids)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("kind", ["rollout", "reward"])
def test_a_stopped_worker_is_told_of_ended_and_made_again_without_a_changed_bit(
    hasty: RayBackend, local: Trace, folder: Path, kind: str
) -> None:
    pool = hasty.rollouts if kind == "rollout" else hasty.rewards
    before = list(pool.pids)
    (folder / "stop").write_text(str(before[-1]) if kind == "rollout" else "")
    hasty.say = (said := []).append
    assert_same_bits(trace(hasty, hasty.config), local)
    assert pool.pids[-1] != before[-1] and not Path(f"/proc/{before[-1]}").exists()
    number = f"{kind} worker {len(before)} of {len(before)}, process {before[-1]}"
    late = rf"^late: {number} has not answered for \d+ s \(.*; if it goes on so it is ended and made again at \d\d:"
    assert any(re.search(late, line) for line in said), said
    lost = rf"^retried: the {kind} worker was lost .*\(it did not answer for \d+ s \(.*, since its process is stopped\)"
    assert any(re.search(lost, line) for line in said), said
    assert "memory" not in " ".join(said)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("leave", r"^it ended with exit code 3; its log ends: (.* \| )?os\._exit\(3\) at .*reward\.py, line \d+$"),
        pytest.param(
            "crash",
            r'^it was killed by SIGSEGV; its log ends: Fatal Python error: .* \| File ".*ctypes.* \| File',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_reward_that_ends_its_process_is_asked_how(fresh: RayBackend, folder: Path, order: str, said: str) -> None:
    (folder / order).write_text("")
    collect(fresh, fresh.config)
    assert re.search(said, fresh.rewards.deaths[-1]), fresh.rewards.deaths[-1]
    assert "reward.py" in fresh.rewards.deaths[-1] and "memory" not in fresh.rewards.deaths[-1]


@pytest.mark.slow
@pytest.mark.fault
def test_a_hosted_reward_says_why_it_ended_and_what_it_cannot_import(fresh: RayBackend, folder: Path) -> None:
    (folder / "own.py").write_text("import os\ndef deadly(images, prompts, metadata):\n    os._exit(4)\n")
    (folder / "lacking.py").write_text("import no_such_module\ndef reward(*asked):\n    return 0\n")
    (folder / "hiding").mkdir()
    (folder / "hiding" / "torch.py").write_text('raise ImportError("libcudart.so.12: cannot open it")')

    def hosted(spec: str, **variables: str) -> HostedScorer:
        reward = RewardConfig(spec=spec, runtime_env={"env_vars": {"ANY": "1", **variables}})
        return HostedScorer(reward, TRAINING, folder, fresh.config)

    with pytest.raises(ScorerFailed, match=r"^reward 'deadly': .* died: it ended with exit code 4; .*own\.py, line 3$"):
        hosted("own.py:deadly").score(np.zeros((1, 8, 8, 3), np.uint8), [""], [{}])
    with pytest.raises(SpecError, match=r"lacking\.py did not run: ModuleNotFoundError: No module named 'no_such_mod"):
        hosted("lacking.py:reward")
    with pytest.raises(WorkerImportError, match=r"^a worker cannot start: ImportError: libcudart\.so\.12: .*torch\.py"):
        hosted("own.py:deadly", PYTHONPATH=str(folder / "hiding"))


@contextmanager
def changed(file: Path) -> Iterator[None]:
    """Inside, a byte of it is another one, while size and time are the same."""
    before, times = file.read_bytes(), file.stat()
    for content in (before[:-1] + bytes([before[-1] ^ 1]), before):
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        if content is not before:
            yield


@pytest.mark.slow
@pytest.mark.fault
def test_a_rollout_worker_that_is_made_again_does_not_load_an_autoencoder_that_has_changed(
    fresh: RayBackend, local: Trace, folder: Path, tiny_pipeline_dir: Path
) -> None:
    file = tiny_pipeline_dir / "vae" / "diffusion_pytorch_model.safetensors"
    with changed(file), pytest.raises(ConfigError, match=rf"^model.path: {file} has changed since the run began"):
        (folder / "kill").write_text(str(fresh.rollouts.pids[1]))
        collect(fresh, fresh.config)
        fresh.sync()
    fresh.rollouts.replace({1: "its files were put back"})
    assert_same_bits(trace(fresh, fresh.config), local)


@pytest.mark.slow
@pytest.mark.fault
def test_a_reward_worker_that_is_made_again_does_not_run_code_that_has_changed(fresh: RayBackend, folder: Path) -> None:
    file = folder / "reward.py"
    with changed(file), pytest.raises(ConfigError, match=rf"^rewards.1.spec: {file} has changed since the run began"):
        (folder / "kill").write_text("")
        collect(fresh, fresh.config)
    fresh.rewards.replace({0: "its files were put back"})
    collect(fresh, fresh.config)


def test_raising_reward_arrives_typed_and_is_not_tried_again(fresh: RayBackend, folder: Path) -> None:
    restarts = len(fresh.rewards.deaths)
    (folder / "raise").write_text("")
    with pytest.raises(ScorerFailed, match=r"^reward 'brightness' raised ValueError: the scale") as caught:
        collect(fresh, fresh.config)
    assert type(caught.value) is ScorerFailed
    assert "\n" not in str(caught.value)
    assert len(fresh.rewards.deaths) == restarts


@pytest.mark.fault
def test_a_reward_that_hangs_ends_the_run_at_its_deadline_and_is_not_tried_again(
    fresh: RayBackend, folder: Path
) -> None:
    def within(actor: Any, seconds: float) -> None:
        cluster = actor.worker.config.cluster.model_copy(update={"reward_deadline_s": seconds})
        actor.worker.config = actor.worker.config.model_copy(update={"cluster": cluster})

    usual, restarts = fresh.config.cluster.reward_deadline_s, len(fresh.rewards.deaths)
    (folder / "sleep").write_text("")
    ray.get(fresh.rewards.actors[0].__ray_call__.remote(within, 1))
    with pytest.raises(ScorerHangs, match=r"'brightness' did not score a chunk within 1 s.*cluster\.reward_deadline_s"):
        collect(fresh, fresh.config)
    ray.get(fresh.rewards.actors[0].__ray_call__.remote(within, usual))
    assert len(fresh.rewards.deaths) == restarts


def test_reward_of_the_wrong_length_arrives_typed(fresh: RayBackend, folder: Path) -> None:
    (folder / "shorten").write_text("")
    with pytest.raises(InvalidScores, match=r"shape \(1,\) for 4 images"):
        collect(fresh, fresh.config)


def test_tampered_weight_stops_the_run_at_the_sync(fresh: RayBackend) -> None:
    def tamper(actor: Any) -> None:
        bind = actor.worker.bind

        def wrong(weights: Any, version: int) -> Any:
            name = next(iter(weights))
            return bind({**weights, name: weights[name] + 1e-3}, version)

        actor.worker.bind = wrong

    ray.get(fresh.rollouts.actors[1].__ray_call__.remote(tamper))
    with pytest.raises(SyncError, match=r"rollout-1 bound \d+ tensors of version 0"):
        fresh.sync()
    ray.get(fresh.rollouts.actors[1].__ray_call__.remote(lambda actor: delattr(actor.worker, "bind")))
    fresh.sync()


def free_cpus(wanted: float) -> float:
    """CPUs that nobody holds, once there are as many: Ray counts those of ended actors a little late."""
    until = time.monotonic() + 60
    while (free := ray.available_resources().get("CPU", 0.0)) < wanted and time.monotonic() < until:
        time.sleep(0.2)
    return free


@pytest.mark.usefixtures("two")
def test_placement_that_cannot_fit_is_refused_before_an_actor_starts(tiny_pipeline_dir: Path, folder: Path) -> None:
    free = free_cpus(0.25)
    total = ray.cluster_resources()["CPU"]
    asked = {
        r"one rollout actor needs 64 CPUs, .* \(1 node\) has .*; lower cluster.rollout_cpus": {"rollout_cpus": 64},
        r"one learner actor needs 1 GPU, .* has at most 0 GPUs; lower cluster.learner_gpus": {"learner_gpus": 1},
        r"1 rollout × .* CPUs? free of what others hold; lower cluster.rollout_cpus": {
            "rollout_cpus": min(free + 0.25, total - 0.5)
        },
    }
    for message, cluster in asked.items():
        with pytest.raises(PlacementError, match=message):
            RayBackend(small_config(tiny_pipeline_dir, folder, cluster=cluster), folder)


@pytest.mark.slow
@pytest.mark.fault
def test_one_worker_gives_the_same_bits_and_a_dead_learner_ends_the_run_in_a_sentence(
    fresh: RayBackend, local: Trace, tiny_pipeline_dir: Path, folder: Path
) -> None:
    free_cpus(0.75)
    backend = RayBackend(small_config(tiny_pipeline_dir, folder, cluster={"max_task_retries": 0}), folder)
    try:
        assert_same_bits(trace(backend, backend.config), local)
        (folder / "kill").write_text("")
        with pytest.raises(WorkerLost, match=r"^the reward worker died 1 times over chunk \d of 6 .*retries=0.*so: it"):
            collect(backend, backend.config)
        os.kill(backend.learner.pids[0], signal.SIGKILL)
        with pytest.raises(LearnerLost, match=rf"rank 0 of 1\) died: ({SIGKILL})") as caught:
            backend.sync()
        assert "memory" not in str(caught.value)
    finally:
        backend.close()
    assert ray.is_initialized()


def rays_doors() -> list[Door]:
    """Without those that other files of tests have left to this process and to their fork server."""
    opened = [door for door in doors(os.getpid()) if "multiprocessing.forkserver" not in door.command]
    return [door for door in opened if door.port not in BEFORE]


def test_an_own_ray_opens_what_is_documented_on_loopback_and_asks_for_its_token(two: RayBackend) -> None:
    told: dict[str, set[bool]] = {}
    for process, what, address, who in documented():
        if "Ray's" in what or "HTTP" in what or "counters" in who:
            told.setdefault(process.split("`")[1], set()).add(who.startswith("token"))
            assert address == "127.0.0.1"
    late = told.keys() - {"monitor", "dashboard"}  # their ports another Ray on this machine may have taken
    deadline, opened = time.monotonic() + 60, rays_doors()
    # Ray's agents are the last to open theirs, and a worker that has just begun has not its title yet.
    while time.monotonic() < deadline and not late <= {name(door, os.getpid()) for door in opened} <= told.keys():
        time.sleep(1)
        opened = rays_doors()
    seen: dict[str, set[bool]] = {}
    for door in opened:
        assert door.address == "127.0.0.1", door
        assert name(door, os.getpid()) in told, door
        seen.setdefault(name(door, os.getpid()), set()).add(asks_for_token(door.port))
    assert late <= seen.keys()
    assert seen == {process: told[process] for process in seen}


def test_nobody_but_its_user_may_enter_the_directory_of_an_own_ray(two: RayBackend) -> None:
    folder = two._session._folder
    assert folder is not None and stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    logs = importlib.import_module("ray._private.worker")._global_node.get_logs_dir_path()
    assert Path(logs).is_relative_to(folder)
