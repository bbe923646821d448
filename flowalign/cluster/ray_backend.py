"""The loop's backend on Ray: same workers and chunk geometry as LocalBackend, hence the same bits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flowalign.cluster.actors import SHARED, LearnerActor, Mortal, RewardActor, RolloutActor, TeacherActor
from flowalign.cluster.delivery import Delivery
from flowalign.cluster.environment import announcements
from flowalign.cluster.errors import ObjectLost
from flowalign.cluster.pipeline import Pipeline
from flowalign.cluster.placement import Share, reserve, shares
from flowalign.cluster.pool import Pool
from flowalign.cluster.ranks import LearnerGroup
from flowalign.cluster.session import LOST_S, RaySession, worker_env
from flowalign.cluster.vigil import Vigil
from flowalign.config.run import RunConfig
from flowalign.plan.stored import stored_bytes
from flowalign.record.disk import size_text
from flowalign.run.collecting import Request, collected, requests_of
from flowalign.run.fixed import texts_without_encoders
from flowalign.run.made import MadeOf
from flowalign.run.made.late import Expected
from flowalign.run.protocols import Collected, Count
from flowalign.run.ranks import Rank
from flowalign.run.sync import has_learned
from flowalign.run.teachers import teachers_of
from flowalign.samples.cache import cache_rule
from flowalign.types import PromptBatch, SamplingPlan, Scores, Update

CHILDREN_S = 3.0


class RayBackend:
    """Rollout and reward actors that may die and are made again, as the learner's ranks are by ``restart_learner``.

    Raises:
        PlacementError: within seconds, where the actors do not fit.
        ConfigError: an actor that is made again in mid-run would load something else than the run is ``made`` of.
        ClusterError: Ray cannot be reached, or an actor died while it started.
    """

    def __init__(
        self,
        config: RunConfig,
        base_dir: Path,
        say: Callable[[str], None] = lambda text: None,
        made: MadeOf | None = None,
        rank: Rank = Rank(),  # noqa: B008 - a value
    ) -> None:
        config = config.model_copy(update={"runs_dir": os.path.abspath(config.runs_dir)})  # actors work elsewhere
        self.config, self.base_dir, self.say, self._made = config, base_dir.resolve(), say, made
        self._started = self._told = False
        self._cache = cache_rule(config.rollout.cache)
        asked = shares(config)
        self._group: PlacementGroup | None = None
        self._closers: list[Any] = []
        began = time.monotonic()
        cluster, told, needed = config.cluster, lambda text: self.say(text), stored_bytes(config)
        patience_s = min(LOST_S, cluster.patience.least_s)
        self._session = RaySession(cluster.address, asked, cluster.device, patience_s, told, needed)
        where = "started on this machine" if config.cluster.address is None else f"joined at {config.cluster.address}"
        self._vigil = Vigil(cluster.patience, self._session.check, told)
        for line in self._session.said:
            say(line)
        facts = [f"Ray {where} in {time.monotonic() - began:.1f} s", _actors(asked)]
        if self._session.store is not None:
            wanted = (
                f", an iteration needs {size_text(needed)}" if needed else ""
            )  # nothing, where nothing is rolled out
            facts.append(f"object store of {size_text(self._session.store)}{wanted}")
        say("; ".join(facts))
        try:
            self._group = reserve(asked)
            self._start(asked)
        except BaseException:
            self.close()
            raise

    def _start(self, asked: Sequence[Share]) -> None:
        rollout, reward, learner, teacher = asked
        threads = self.config.cluster.threads
        first_rank = rollout.count + reward.count
        named = self._start_teachers(teacher, first_rank + learner.count)
        self._start_learner(learner, first_rank, named)
        texts = texts_without_encoders(self.config) if rollout.count else []
        self.rollouts = Pool(
            "rollout",
            rollout.count,
            lambda i: self._actor(RolloutActor, rollout, i, threads, f"rollout-{i}", texts, self._expected("model.")),
            self._vigil,
        )
        self._closers.append(self.rollouts)
        for line in announcements([*self.config.trained_rewards, *self.config.evaluation.judges]):
            self.say(line)
        self.rewards = Pool(
            "reward",
            reward.count,
            lambda i: self._actor(
                RewardActor,
                reward,
                rollout.count + i,
                self.config.cluster.reward_threads,
                self.base_dir,
                self._expected("rewards.", "evaluation.scorer.", "evaluation.gold."),
            ),
            self._vigil,
        )
        self._closers.append(self.rewards)
        self.learner.start()
        for workers in (self.teachers, self.rewards, self.rollouts, self.learner):
            workers.started()
        self._started = True
        if self.config.makes_images:
            self._needs = {evaluation: self.rewards.ask("needs", evaluation) for evaluation in (False, True)}
        retries = self.config.cluster.max_task_retries
        self._delivery = Delivery(self.learner, self.rollouts, self._vigil, retries, lambda text: self.say(text))

    def _expected(self, *sections: str) -> Expected | None:
        """Return the hashes for a worker that is made after the others; one of the beginning gets None."""
        return self._made.expected(*sections) if self._made is not None and self._started else None

    def _tell_learner(self) -> None:
        """Give the ranks, once it is known, what their teachers must find that Ray makes again."""
        if self._made is None or self._told or not self._made.complete:
            return
        if names := list(teachers_of(self.config)) if self.teachers.actors else []:
            own = {name: self._made.expected("model.", f"algorithm.teachers.{name}.") for name in names}
            self.learner.call("expect", own)
        self._told = True

    def _start_teachers(self, teacher: Share, bundle: int) -> dict[str, Any]:
        """Start the teachers' actors, by name.

        Learner ranks ask them, so Ray makes a dead one again and repeats what it lost.
        """
        names = list(teachers_of(self.config)) if teacher.count else []
        cluster = self.config.cluster
        faults = {"max_restarts": -1, "max_task_retries": cluster.max_task_retries}
        self.teachers = Pool(
            "teacher",
            len(names),
            lambda i: self._actor(TeacherActor, teacher, bundle + i, cluster.threads, names[i], **faults),
            self._vigil,
        )
        self._closers.append(self.teachers)
        return dict(zip(names, self.teachers.actors, strict=True))

    def _start_learner(self, learner: Share, bundle: int, teachers: Mapping[str, Any]) -> None:
        cluster = self.config.cluster
        of_learner = ["model.", "algorithm.type", "data.preferences", "teacher.", "features"]
        of_learner += [] if cluster.has_teacher_actors else ["algorithm.teachers."]
        self.learner = LearnerGroup(
            learner.count,
            lambda rank: self._actor(
                LearnerActor, learner, bundle + rank, cluster.threads, rank, teachers, self._expected(*of_learner)
            ),
            self._vigil,
            self.teachers,
            cluster.max_task_retries,
        )
        self._closers.append(self.learner)

    def _actor(self, cls: type[Mortal], share: Share, bundle: int, threads: int, *args: Any, **faults: int) -> Any:
        group, resources = self._group, share.bundle()
        assert group is not None
        return (
            ray.remote(cls)
            .options(
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
                runtime_env={"env_vars": worker_env(threads) | cls.variables},
                **faults,
            )
            .remote(self.config, *args)
        )

    def collect(
        self, batch: PromptBatch, plan: SamplingPlan, *, seed: int, evaluation: bool = False, count: Count | None = None
    ) -> Collected:
        """Roll out and score ``batch`` chunk by chunk; needs a ``sync`` before it.

        Raises:
            WorkerLost: a worker died more than ``cluster.max_task_retries`` times over one chunk.
            ScorerError, …: what a worker itself raised; it is not tried again.
        """
        needs, version = self._needs[evaluation], self._delivery.version
        requests, units = requests_of(
            self.config, batch, plan, self._cache, seed=seed, version=version, needs=needs, evaluation=evaluation
        )
        gives_up_s = self._gives_up_s(evaluation, _most_asked(requests, units) if "group" in needs else 1)
        retries = self.config.cluster.max_task_retries
        pipeline = Pipeline(requests, units, self.rollouts, self.rewards, evaluation, retries, gives_up_s)
        done = pipeline.run(count, self.say)
        previews = [seen for unit in done for seen in unit.previews]
        scores, score_s = [unit.scores for unit in done], sum(unit.score_s for unit in done)
        workers = (len(self.rollouts.actors), len(self.rewards.actors))
        return collected(batch, plan, previews, scores, [pipeline], score_s, workers=workers)

    def _gives_up_s(self, evaluation: bool, questions: int) -> float:
        """Return the time after which a reward actor ends the run by itself at the latest, since its scorers take too
        long. Each scorer may be asked so many ``questions``."""
        scorers = self.config.evaluation.judges if evaluation else self.config.trained_rewards
        cluster = self.config.cluster
        return cluster.reward_deadline_s * len(scorers) * questions + cluster.patience.least_s

    def update(self, trajectories: Sequence[Pipeline] | None, scores: Scores | None, iteration: int) -> Update:
        """Learn from what was collected: the ranks map the trajectories where they lie in the object store.

        Raises:
            LearnerLost: a rank died. WorkerLost: trajectories were lost too often.
        """
        self._tell_learner()
        while trajectories is not None:
            try:
                self.learner.call("take", *(ref for made in trajectories for ref in made.trajectory_refs))
                break
            except ObjectLost as lost:  # before any rank began, so that none waits for another
                for made in _makers(trajectories, lost):
                    made.make_again(lost)
        update = self.learner.call("update", scores, iteration)[0]
        self._delivery.learned = has_learned(update)
        return update

    def sync(self, evaluation: bool = False) -> None:
        """Bring the learner's weights to every rollout worker, as `Delivery.send` does."""
        if self.config.makes_images:
            self._delivery.send(evaluation)

    def validate(self) -> dict[str, float]:
        """Return the losses on what is kept for that; the same from every rank."""
        return self.learner.call("validate")[0]

    def parameters(self) -> tuple[int, int]:
        """Return the number of trained parameters, and of all."""
        return self.learner.call("parameters")[0]

    def state(self) -> list[dict[str, Any]]:
        """Return the learner's state, one entry a rank; all share rank 0's model."""
        states = self.learner.call("state")
        shared = {name: states[0][name] for name in SHARED}
        return [{**state, **shared} for state in states]

    def restore(self, states: list[dict[str, Any]]) -> str | None:
        """Continue where ``state`` was taken, and return a line where the ranks shared it otherwise."""
        held = {id(state["optimizer"]): state["optimizer"] for state in states}  # the same for all where it was
        optimizers = {key: ray.put(optimizer) for key, optimizer in held.items()}
        shared = ray.put({name: states[0][name] for name in SHARED})
        calls = [
            actor.restore.remote(shared, optimizers[id(state["optimizer"])], state["version"])
            for actor, state in zip(self.learner.actors, states, strict=True)
        ]
        lines = self.learner.wait(calls, "restore")
        self._delivery.learned = True
        return lines[0]

    def restart_learner(self) -> None:
        """Make all ranks again, as they were at the run's beginning, after one was lost; `restore` and `sync` follow.

        Raises:
            LearnerLost: one was lost meanwhile. ConfigError: a file that they load has changed.
            ClusterError: Ray is gone, a rank does not end, or finds no place.
        """
        self._session.check()
        self._told = False
        self.learner.restart()
        self._delivery.forget()

    def _end_children(self) -> None:
        """Let the reward actors end what their scorers started; who does not answer is not waited for long."""
        actors = self.rewards.actors if hasattr(self, "rewards") and self._closers else []
        with suppress(RayError):
            if asked := [actor.end_children.remote() for actor in actors]:
                ray.wait(asked, num_returns=len(asked), timeout=CHILDREN_S)

    def close(self) -> None:
        """End the actors, free their places, and stop Ray if it was started here; may be called twice."""
        self._session.begin_end()
        if ray.is_initialized() and not self._session.lost:
            self._end_children()
            for owner in self._closers:
                owner.kill()
            if self._group is not None:
                remove_placement_group(self._group)
        self._closers, self._group = [], None
        self._session.close()


def _makers(trajectories: Sequence[Pipeline], lost: ObjectLost) -> Sequence[Pipeline]:
    """Return whose trajectories were lost; all, where nobody says which."""
    return [made for made in trajectories if lost.ref in {ref.hex() for ref in made.trajectory_refs}] or trajectories


def _most_asked(requests: Sequence[Request], units: Sequence[range]) -> int:
    """Return the largest number of chunks or groups that are scored as one."""
    return max(max(len(unit), len({group for i in unit for group in requests[i].batch.group_ids})) for unit in units)


def _actors(asked: Sequence[Share]) -> str:
    """Return ``2 rollout, 1 reward, 1 learner``."""
    return ", ".join(f"{share.count} {share.kind}" for share in asked if share.count)
