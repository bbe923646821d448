from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from flowalign.flow import density
from flowalign.flow.pathfamilies import edm
from flowalign.flow.schedule import shift_sigma
from tests.flow.analytic import pdf, pdf_of

CASES = [
    ("uniform", {}),
    ("logit_normal", {}),
    ("logit_normal", {"m": -0.5, "s": 0.6}),
    ("mode", {}),
    ("mode", {"s": -0.8}),
    ("cosmap", {}),
    ("u_shaped", {}),
    ("u_shaped", {"a": 1.5}),
    ("uniform", {"shift": 3.0}),
    ("logit_normal", {"m": -0.5, "s": 0.6, "shift": 3.0}),
    ("mode", {"shift": 0.5}),
    ("cosmap", {"shift": 2.0}),
    ("u_shaped", {"shift": 3.0}),
]
IDS = [kind + "".join(f"-{k}{v}" for k, v in params.items()) for kind, params in CASES]


def cumulative(kind: str, params: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Grid of edges in [0, 1] and the integral of the pdf up to each, by the midpoint rule."""
    edges = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    mass = pdf(kind, middles, **params) / len(middles)
    return edges, torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])


@pytest.mark.parametrize(("kind", "params"), CASES, ids=IDS)
def test_pdf_integrates_to_one(kind, params):
    assert cumulative(kind, params)[1][-1].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("kind", "params"), CASES, ids=IDS)
def test_samples_follow_the_pdf(kind, params, generator):
    edges, cdf = (part.numpy() for part in cumulative(kind, params))
    t = density.sample(kind, (20_000,), generator, **params).double().numpy()
    assert stats.kstest(t, lambda x: stats.rv_histogram((cdf[1:] - cdf[:-1], edges)).cdf(x)).pvalue > 0.01


def test_closed_forms_match_values_by_hand():
    t = torch.tensor([0.5], dtype=torch.float64)
    assert pdf("logit_normal", t).item() == pytest.approx(4 / math.sqrt(2 * math.pi))
    assert pdf("cosmap", t).item() == pytest.approx(4 / math.pi)
    assert pdf("mode", t, s=1.0).item() == pytest.approx(1 / (2 - math.pi / 2))
    assert pdf("u_shaped", t).item() == pytest.approx(4 * math.exp(2) / (math.exp(4) - 1))


KINDS = list(density.DENSITIES)


def test_shifted_uniform_matches_a_value_by_hand():
    assert pdf("uniform", torch.tensor([0.5]), shift=3.0).item() == pytest.approx(0.75)


def test_shift_of_a_logit_normal_moves_its_location_by_the_log():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    moved = pdf("logit_normal", t, m=0.2 + math.log(3))
    torch.testing.assert_close(pdf("logit_normal", t, m=0.2, shift=3.0), moved)


@pytest.mark.parametrize("kind", KINDS)
def test_shifts_compose_by_multiplication(kind):
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    once, twice = density.density(kind, shift=6.0), density.Shifted(density.density(kind, shift=2.0), 3.0)
    torch.testing.assert_close(twice.from_uniform(u), once.from_uniform(u))
    torch.testing.assert_close(pdf_of(twice, u), pdf_of(once, u))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_a_shifted_density_are_the_shifted_samples(kind):
    plain, shifted = (density.sample(kind, (9,), torch.Generator().manual_seed(2), shift=s) for s in (1.0, 3.0))
    torch.testing.assert_close(shifted, shift_sigma(plain, 3.0))


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (-0.4, 1.0)])
def test_uniform_times_of_edm_give_a_log_normal_sigma(mean, std, generator):
    t = density.sample("uniform", (20_000,), generator)
    log_sigma = edm(mean, std).path.b(t.double()).log().numpy()
    assert stats.kstest(log_sigma, stats.norm(mean, std).cdf).pvalue > 0.01


def test_positive_location_of_logit_normal_favours_noise(generator):
    assert density.sample("logit_normal", (1000,), generator, m=1.0).mean() > 0.6


@pytest.mark.parametrize(("kind", "params"), CASES, ids=IDS)
def test_samples_are_float32_strictly_inside_the_interval(kind, params):
    ends = density.density(kind, **params).from_uniform(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert sorted(ends.tolist()) == pytest.approx([0, 1], abs=1e-12)
    t = density.sample(kind, (50, 4), torch.Generator().manual_seed(1), **params)
    assert t.shape == (50, 4) and t.dtype == torch.float32
    assert ((t > 0) & (t < 1)).all()


def test_extreme_parameters_stay_strictly_inside_the_interval(generator):
    t = density.sample("logit_normal", (1000,), generator, m=0.0, s=100.0)
    assert ((t > 0) & (t < 1)).all()


def test_same_seed_gives_same_samples():
    first, second = (density.sample("mode", (8,), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("triangle", {}),
        ("logit_normal", {"s": 0.0}),
        ("mode", {"s": 1.8}),
        ("u_shaped", {"a": 0.0}),
        ("uniform", {"shift": 0.0}),
    ],
)
def test_unknown_kind_and_bad_parameters_are_refused(kind, params, generator):
    with pytest.raises(ValueError):
        density.sample(kind, (1,), generator, **params)
