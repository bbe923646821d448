"""``algorithm.solver``: whose images are walked by the ODE can take another solver for them."""

import pytest
import torch
from pydantic import ValidationError

from flowalign.algorithms import build_algorithm
from flowalign.flow.solvers import evaluations
from flowalign.models.guided import guided
from flowalign.samples.rollout import SampleNoise, integrate
from tests.algorithms.every import plan_of
from tests.algorithms.mixture import mixture_policy

OF_ODE = ("nft", "awm", "sft", "diffusion_dpo")


def walked(type: str, solver: str, num_steps: int) -> torch.Tensor:
    """Images of the mixture by the algorithm's own plan, all from the same noises, (64, 2)."""
    policy = mixture_policy()
    plan = plan_of(build_algorithm({"type": type, "num_steps": num_steps, "solver": solver}), 0, 0)
    condition = policy.encoders.encode_prompts(["0"] * 64, 1)
    return integrate(guided(policy.network), condition, SampleNoise(3, range(64), (2, 1, 1)), plan)[2].flatten(1)


@pytest.mark.parametrize("type", OF_ODE)
def test_a_solver_of_second_order_makes_images_nearer_to_those_of_a_fine_walk(type: str) -> None:
    exact = walked(type, "heun", 400)
    off = {solver: (walked(type, solver, 20) - exact).norm(dim=1).mean().item() for solver in ("euler", "ab2")}
    assert 0 < off["ab2"] < off["euler"] / 5
    assert evaluations("ab2", 20) == evaluations("euler", 20) == 20


@pytest.mark.parametrize("type", OF_ODE)
@pytest.mark.parametrize(
    ("solver", "said"),
    [
        ("ddpm", "makes noise of its own"),
        ("heum", "did you mean heun"),
        ("x", r"known: euler, ab2, dpmpp_2m, heun \["),  # none of those that are then refused
        ("heun(order=3)", "no option order"),
    ],
)
def test_a_solver_that_cannot_make_the_images_is_refused(type: str, solver: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        build_algorithm({"type": type, "solver": solver})


def test_pairs_from_disk_are_walked_by_no_solver() -> None:
    with pytest.raises(ValidationError, match="solver is for source: online"):
        build_algorithm({"type": "diffusion_dpo", "source": "offline", "solver": "heun"})
