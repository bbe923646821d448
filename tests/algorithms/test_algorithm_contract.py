"""What the forward-process algorithms share: how they roll out, and the points they learn at."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from flowalign.algorithms import UnknownAlgorithm, algorithm_class, build_algorithm
from flowalign.algorithms.parts.points import ForwardConfig
from flowalign.config.section import ConfigError
from flowalign.flow import schedule
from flowalign.intake.file import load_align
from flowalign.types import Trajectories
from tests.algorithms.every import plan_of
from tests.algorithms.toy import LinearVelocity, make_rollout
from tests.tiny import write_config

CONFIGS = Path(__file__).parents[2] / "configs" / "shapes"
ALL = torch.ones(8, dtype=torch.bool)


def config(**changes) -> ForwardConfig:
    return ForwardConfig.model_validate({"type": "any", "num_steps": 6, "timesteps": 4, **changes})


def made(own: ForwardConfig) -> Trajectories:
    return make_rollout(LinearVelocity(), own.sampling_plan(schedule.sigmas(own.num_steps)))


def points(
    own: ForwardConfig, rollout: Trajectories, learns: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The samples of the points, and the points."""
    credit = own.points_of(learns, {}, {})
    return credit.sample, own.points(rollout, credit)


def part(rollout: Trajectories, rows: list[int]) -> Trajectories:
    """The chunk that a worker with these samples would have made."""
    index = torch.tensor(rows)
    return replace(
        rollout,
        batch=rollout.batch.take(rows),
        condition=rollout.condition.take(index),
        final_NCHW=rollout.final_NCHW[index],
    )


def test_all_steps_of_the_rollout_are_deterministic() -> None:
    plan = config(shift=3.0, guidance_scale=2.0).sampling_plan(schedule.sigmas(6, shift=3.0))
    assert (plan.noise.kind, plan.noise.window, plan.noise.level, plan.guidance.scale) == ("ode", (0, 0), 0.0, 2.0)
    assert list(plan.sigmas) == schedule.sigmas(6, shift=3.0).tolist()


def test_a_point_lies_on_the_line_from_its_latent_along_the_target() -> None:
    """x_t = (1 - t) x_0 + t noise and target = noise - x_0, so x_t - t target = x_0, of each sample's own latent."""
    own = config(density="uniform")
    rollout = made(own)
    sample, item = points(own, rollout, ALL)
    assert sample.tolist() == [n for n in range(8) for _ in range(4)]
    x0 = item["x"] - item["t"][:, None, None, None] * item["target"]
    torch.testing.assert_close(x0, rollout.final_NCHW[sample])
    noise = item["target"] + rollout.final_NCHW[sample]
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1


@pytest.mark.parametrize("density", ["grid", "logit_normal"])
def test_points_depend_on_neither_the_order_of_samples_nor_their_split(density: str) -> None:
    own = config(density=density)
    rollout = made(own)
    _, whole = points(own, rollout, ALL)
    for rows in ([5, 2, 7], [0, 1, 3, 4, 6], list(range(7, -1, -1))):
        _, alone = points(own, part(rollout, rows), ALL[: len(rows)])
        for key, value in whole.items():
            assert torch.equal(alone[key].unflatten(0, (len(rows), 4)), value.unflatten(0, (8, 4))[rows]), key


def test_leaving_samples_out_changes_no_point_of_the_others() -> None:
    own = config()
    rollout, learns = made(own), torch.arange(8) % 3 == 0
    sample, item = points(own, rollout, learns)
    _, whole = points(own, rollout, ALL)
    assert sample.unique().tolist() == [0, 3, 6]
    assert torch.equal(item["x"], whole["x"].unflatten(0, (8, 4))[learns].flatten(0, 1))


def test_points_change_with_the_seed_and_from_one_iteration_to_the_next() -> None:
    own = config()
    rollout = made(own)
    targets = [points(own, r, ALL)[1]["target"] for r in (rollout, replace(rollout, seed=1))]
    targets.append(points(own, replace(rollout, policy_version=1), ALL)[1]["target"])
    assert not any(torch.equal(a, b) for a, b in ((targets[0], targets[1]), (targets[0], targets[2])))


def test_no_sample_leaves_no_point() -> None:
    own = config()
    sample, item = points(own, made(own), ~ALL)
    assert len(sample) == 0 and item["x"].shape == (0, 2, 3, 3) and item["t"].shape == (0,)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"density_params": {"m": 1.0}}, "density_params: the grid"),
        ({"density": "uniform", "density_params": {"m": 1.0}}, "density_params: .*'m'"),
        ({"density": "logit_normal", "density_params": {"s": 0.0}}, "density_params: logit_normal needs s > 0"),
        ({"timesteps": 0}, "greater than or equal to 1"),
        ({"density": "grids"}, "'grid', 'uniform'"),
    ],
)
def test_options_that_contradict_each_other_are_refused_with_the_key(changes: dict, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        config(**changes)


@pytest.mark.parametrize("name", ["nft", "sft", "awm"])
def test_the_shipped_configuration_of_each_is_valid(name: str) -> None:
    config = load_align(CONFIGS / f"{name}.yaml", []).config
    assert config.algorithm["type"] == name and config.algorithm["shift"] is not None


OWN = """
from flowalign.algorithm import Algorithm, AlgorithmConfig, Needs
from flowalign.types import Noise, Trajectories, SamplingPlan

class Mine(Algorithm):
    class Config(AlgorithmConfig):
        group_size: int = 4
        noisy: int = 1
    @property
    def needs(self):
        return Needs(Trajectories, scores=True, group_size=self.config.group_size)
    def plan(self, iteration, seed):
        return SamplingPlan((1.0, 0.5, 0.0), Noise("flow", 0.7, (0, self.config.noisy)))
    def credit(self, batch, scores): ...
    def loss(self, models, minibatch): ...
"""


def test_an_algorithm_may_be_a_file_of_the_user_s(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    name = f"{tmp_path / 'own.py'}:Mine"
    assert algorithm_class(name) is algorithm_class(name)
    assert plan_of(build_algorithm({"type": name, "noisy": 2})).noise.window == (0, 2)
    with pytest.raises(UnknownAlgorithm, match=r"own\.py has no .Mind.; did you mean Mine\?"):
        algorithm_class(f"{tmp_path / 'own.py'}:Mind")
    with pytest.raises(UnknownAlgorithm, match=r"cannot import '.*absent.py': .*No such file"):
        algorithm_class(f"{tmp_path / 'absent.py'}:Mine")
    with pytest.raises(UnknownAlgorithm, match=r"own\.py:AlgorithmConfig is no subclass of .*Algorithm"):
        algorithm_class(f"{tmp_path / 'own.py'}:AlgorithmConfig")


def test_an_algorithm_that_was_written_for_prepare_is_refused_with_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text(
        OWN.replace("def credit(self, batch, scores)", "def prepare(self, batch, s, models)")
    )
    with pytest.raises(UnknownAlgorithm, match=r"old\.py:Mine has no items to learn from: `prepare` is `credit` and"):
        algorithm_class(f"{tmp_path / 'old.py'}:Mine")


@pytest.mark.parametrize(
    ("noisy", "said"), [(0, "plans no step of kind flow"), (3, r"plans noise in steps \[0, 3\) of 2")]
)
def test_a_plan_that_could_not_be_learned_from_is_refused_before_the_run(tmp_path, noisy, said):
    (tmp_path / "own.py").write_text(OWN)
    config = write_config(tmp_path)
    replaced = f"algorithm={{type: own.py:Mine, noisy: {noisy}}}"
    with pytest.raises(ConfigError, match=said):
        load_align(config, [replaced])


def test_an_algorithm_of_rollouts_that_plans_none_is_refused_before_the_run(tmp_path):
    (tmp_path / "own.py").write_text(OWN.replace("def plan(", "def rollout_plan("))
    with pytest.raises(ConfigError, match=r"own\.py:Mine learns from Trajectories and plans none; define plan\("):
        load_align(write_config(tmp_path), ["algorithm={type: own.py:Mine}"])


def test_a_part_of_a_name_is_taken_as_a_hint(tmp_path):
    with pytest.raises(ConfigError, match=r"algorithm.type: no algorithm 'dpo'.*did you mean diffusion_dpo\?"):
        load_align(write_config(tmp_path), ["algorithm={type: dpo}"])
