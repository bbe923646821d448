"""Facts about the families: what their outputs mean, their losses, their times and their grids."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from flowalign.config.pathfamilies import FORMULATIONS
from flowalign.flow import path
from flowalign.flow.pathfamilies import PATH_FAMILIES, PathFamily, edm, rf_velocity, sampling_sigmas
from flowalign.flow.pathfamilies import path_family as named
from flowalign.flow.schedule import sigmas
from flowalign.flow.solvers.euler import solve as euler
from flowalign.flow.solvers.heun import solve as heun
from tests.flow import analytic
from tests.flow.analytic import raw_output

GRID = [f"edm({p_mean}, {p_std})" for p_mean in (-1.2, 0.0, 1.2) for p_std in (0.6, 1.8)]  # corners of the report's
NAMES = [*PATH_FAMILIES, *GRID]
every_family = pytest.mark.parametrize("family", [named(name) for name in NAMES], ids=NAMES)
TIMES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@given(
    name=st.sampled_from(sorted(NAMES)),
    t=st.floats(1e-3, 1 - 1e-3),
    x0=st.floats(-3, 3),
    noise=st.floats(-3, 3),
)
def test_velocity_of_every_family_is_that_of_the_rectified_flow(name, t, x0, noise):
    family = named(name)
    x0, noise, t = (torch.tensor([value], dtype=torch.float64) for value in (x0, noise, t))
    z, output = analytic.interpolate(family.path, x0, noise, t), raw_output(family, x0, noise, t)
    torch.testing.assert_close(family.velocity(z, output, t), noise - x0, rtol=1e-7, atol=1e-7)
    s = family.rf_time(t)
    torch.testing.assert_close(z / family.scale(t), path.interpolate(x0, noise, s), rtol=1e-9, atol=1e-9)


def test_rectified_flow_is_the_very_same_function():
    def network(x, t):
        return x * t

    family = PATH_FAMILIES["rf"]
    x0, noise, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    assert rf_velocity(family, network) is network
    assert family.velocity(noise, x0, t) is x0
    assert torch.equal(analytic.interpolate(family.path, x0, noise, t), path.interpolate(x0, noise, t))
    assert torch.equal(family.network_time(t), t) and torch.equal(family.rf_time(t), t)


@every_family
def test_velocity_from_the_analytic_posterior_is_that_of_the_rectified_flow(family: PathFamily, gaussian):
    times = []

    def network(z_in, t):
        times.append(t)
        t = family.own_time(s).unsqueeze(1)  # the exact time: what the network is told is rounded
        a, b = family.path.a(t), family.path.b(t)
        z = z_in * torch.sqrt(b**2 + family.sigma_data**2) if family.prediction == "edm" else z_in
        gain = a * gaussian.c**2 / (a**2 * gaussian.c**2 + b**2)
        x0 = gaussian.mu + gain * (z - a * gaussian.mu)
        return raw_output(family, x0, (z - a * x0) / b, t)

    s = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.93], dtype=torch.float64)
    x = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(5, 3)
    velocity = rf_velocity(family, network)(x, s)
    torch.testing.assert_close(velocity, gaussian.velocity(x, s), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(times[0].double(), family.own_time(s), rtol=1e-6, atol=0)
    assert ((times[0] > 0) & (times[0] <= 1)).all() and (family.name == "rf" or times[0].dtype == torch.float32)


@every_family
def test_converted_velocity_is_finite_at_both_ends_in_float32(family: PathFamily):
    velocity = rf_velocity(family, lambda z_in, t: z_in)
    for s in (1.0, family.initial_scale, 1e-4, 0.0):
        assert velocity(torch.randn(2, 3), torch.full((2,), s)).isfinite().all()


@every_family
def test_converted_velocity_has_a_forward_derivative_in_state_and_time(family: PathFamily):
    velocity = rf_velocity(family, lambda z_in, t: torch.sin(z_in) + z_in * t.unsqueeze(1))
    x, s, h = torch.tensor([[0.3, -0.8]], dtype=torch.float64), torch.tensor([0.45], dtype=torch.float64), 1e-3
    tangents = (torch.tensor([[0.7, 0.2]], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    slope = torch.func.jvp(velocity, (x, s), tangents)[1]
    ahead, behind = velocity(x + h * tangents[0], s + h), velocity(x - h * tangents[0], s - h)
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=2e-3, atol=2e-3)


@every_family
def test_loss_of_the_raw_output_is_the_weighted_loss_of_the_noise(family: PathFamily, generator):
    """The gradients are parallel at every time, and equal once weighted; so are those of flow matching."""
    x0, noise, inputs = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    weights = torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    def gradients(t: torch.Tensor, weigh: bool) -> list[torch.Tensor]:
        z, output = analytic.interpolate(family.path, x0, noise, t), inputs @ weights
        x, s, velocity = z / family.scale(t)[:, None], family.rf_time(t), family.velocity(z, output, t)
        noise_hat, x0_hat = path.noise_from_velocity(x, velocity, s), path.x0_from_velocity(x, velocity, s)
        own, cfm = analytic.noise_weight(family, t), analytic.cfm_weight(family.path, t)
        if not weigh:
            own, cfm = torch.ones(6), torch.ones(6)
        slope_a, slope_b = family.path.da(t)[:, None], family.path.db(t)[:, None]
        flow_error = slope_a * (x0_hat - x0) + slope_b * (noise_hat - noise)
        raw_error = output - raw_output(family, x0, noise, t[:, None])
        losses = [raw_error**2, flow_error**2, *(w[:, None] * (noise_hat - noise) ** 2 for w in (own, cfm))]
        return [torch.autograd.grad(loss.mean(), weights, retain_graph=True)[0].flatten() for loss in losses]

    for t in (0.03, 0.5, 0.97):
        raw, flow, weighted, _ = gradients(torch.full((6,), t, dtype=torch.float64), weigh=False)
        for other in (flow, weighted):
            assert torch.cosine_similarity(raw, other, dim=0).item() == pytest.approx(1, abs=1e-12)
    mixed = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95], dtype=torch.float64)
    raw, flow, weighted, flow_weighted = gradients(mixed, weigh=True)
    torch.testing.assert_close(weighted, raw, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flow_weighted, flow, rtol=1e-9, atol=1e-12)


@every_family
def test_weighted_error_of_the_converted_velocity_is_that_of_the_raw_output(family: PathFamily, generator):
    x0, noise, error = (torch.randn(99, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    z, target = analytic.interpolate(family.path, x0, noise, TIMES), raw_output(family, x0, noise, TIMES[:, None])
    velocity_error = family.velocity(z, target + error, TIMES) - (noise - x0)
    weighted = family.velocity_weight(TIMES)[:, None] * velocity_error**2
    torch.testing.assert_close(weighted, error**2, rtol=1e-7, atol=1e-9)


def test_loss_weights_have_their_published_forms():
    sigma = PATH_FAMILIES["edm"].path.b(TIMES)
    published = {
        "rf": 1 / (1 - TIMES) ** 2,
        "eps/linear": torch.ones_like(TIMES),
        "eps/cos": torch.ones_like(TIMES),
        "v/linear": 1 / PATH_FAMILIES["v/linear"].path.a(TIMES) ** 2,
        "v/cos": 1 / torch.cos(math.pi / 2 * TIMES) ** 2,
        "edm": sigma**2 * (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2,
        "edm/rf": 1 + 4 * (TIMES / (1 - TIMES)) ** 2,
        "edm/cos": 1 + 4 * torch.tan(math.pi / 2 * TIMES) ** 2,
    }
    assert published.keys() == FORMULATIONS.keys()
    for name, weight in published.items():
        torch.testing.assert_close(analytic.noise_weight(PATH_FAMILIES[name], TIMES), weight, rtol=1e-9, atol=0)
    for name in ("rf", "v/cos"):  # a constant factor apart, since the cosine path turns at a constant speed
        ratio = analytic.cfm_weight(PATH_FAMILIES[name].path, TIMES) / analytic.noise_weight(PATH_FAMILIES[name], TIMES)
        torch.testing.assert_close(ratio, ratio[:1].expand(99), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_network_sees_and_predicts_unit_variance_at_every_time(sigma_data):
    family = edm(sigma_data=sigma_data)
    t = torch.cat([torch.zeros(1, dtype=torch.float64), TIMES, torch.ones(1, dtype=torch.float64)])
    data, zero = torch.full((101,), sigma_data, dtype=torch.float64), torch.zeros(101, dtype=torch.float64)
    noise = torch.ones_like(zero)
    parts = [(data, zero), (zero, noise)]  # of variance sigma_data² and 1, and independent
    seen = [family.network_input(analytic.interpolate(family.path, *part, t), t) for part in parts]
    for first, second in (seen, [raw_output(family, *part, t)[1:] for part in parts]):  # 0 / 0 at t = 0
        torch.testing.assert_close(first**2 + second**2, torch.ones_like(first))


@every_family
def test_rf_time_and_own_time_are_inverses(family: PathFamily):
    for t in (TIMES, torch.tensor([0.0, 1e-6, 1 - 1e-6], dtype=torch.float64)):
        torch.testing.assert_close(family.own_time(family.rf_time(t)), t, rtol=1e-9, atol=1e-12)
    s = TIMES * family.initial_scale
    torch.testing.assert_close(family.rf_time(family.own_time(s)), s, rtol=1e-9, atol=0)
    ends = family.own_time(torch.tensor([0.0, 1.0]))
    assert ends.dtype == torch.float64 and ends.tolist() == pytest.approx([0, 1])


@every_family
def test_float32_noise_levels_keep_their_precision(family: PathFamily):
    """A float32 quantile of EDM's sigma 80 would be off by half a per cent."""
    s = torch.tensor([1e-3, 0.5, family.initial_scale * (1 - 1e-6)])
    again = family.rf_time(family.own_time(s))
    torch.testing.assert_close(again / (1 - again), s.double() / (1 - s.double()), rtol=1e-9, atol=1e-9)


def test_linear_path_has_the_alphas_of_the_discrete_schedule():
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    a, b = PATH_FAMILIES["eps/linear"].path.a(t), PATH_FAMILIES["eps/linear"].path.b(t)
    torch.testing.assert_close(a**2, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(t), rtol=0, atol=1e-14)


@every_family
def test_grid_falls_from_the_initial_scale_to_zero(family: PathFamily):
    for shift in (1.0, 3.0):
        for num_steps in (1, 2, 28):
            grid = sampling_sigmas(family, num_steps, shift=shift)
            assert grid.shape == (num_steps + 1,) and grid.dtype == torch.float32 and (grid.diff() < 0).all()
            assert grid[0].item() == pytest.approx(family.initial_scale, rel=1e-6) and grid[-1] == 0
    assert (sampling_sigmas(family, 8, shift=3.0)[1:-2] > sampling_sigmas(family, 8)[1:-2]).all()


def test_initial_scale_is_the_part_of_the_noise():
    alpha_bar = math.prod(1 - (0.00085**0.5 + n / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for n in range(1000))
    a, b = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    assert PATH_FAMILIES["rf"].initial_scale == PATH_FAMILIES["v/cos"].initial_scale == 1
    assert PATH_FAMILIES["v/linear"].initial_scale == pytest.approx(b / (a + b))
    assert PATH_FAMILIES["edm"].initial_scale == pytest.approx(80 / 81)


def test_rf_grid_is_bitwise_the_schedules():
    assert torch.equal(sampling_sigmas(PATH_FAMILIES["rf"], 10, shift=3.0), sigmas(10, 3.0))


def test_edm_grid_is_that_of_karras():
    grid = sampling_sigmas(PATH_FAMILIES["edm"], 5).double()[:-1]
    expected = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    assert (grid / (1 - grid)).tolist() == pytest.approx(expected, rel=1e-4)


def test_linear_grid_is_the_trailing_one_of_the_discrete_schedule():
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps].double()
    expected = 1 / (1 + torch.sqrt(alpha_bar / (1 - alpha_bar)))
    grid = sampling_sigmas(PATH_FAMILIES["v/linear"], 10)[:-1]
    torch.testing.assert_close(grid, expected.float(), rtol=1e-4, atol=0)


@every_family
@pytest.mark.parametrize("arguments", [{"num_steps": 0}, {"num_steps": 4, "shift": 0.0}])
def test_bad_grids_are_refused(family: PathFamily, arguments):
    with pytest.raises(ValueError):
        sampling_sigmas(family, **arguments)


@pytest.mark.parametrize("name", ["eps/cos", "v/cos", "edm/rf", "edm/cos", *GRID])
def test_golden_values_by_hand(name):
    """At quantile t = 0.75: (b / a, time s of the straight path, what the network is to say of x0 = 2, noise = -1)."""
    z = 0.6744897501960817  # of the standard normal, of which three quarters lie below it
    root = math.sqrt(2)
    cosine = math.tan(3 * math.pi / 8)  # 1 + sqrt(2)
    assert cosine == pytest.approx(1 + root)
    sine, side = math.sin(3 * math.pi / 8), math.cos(3 * math.pi / 8)
    ratio = {"eps/cos": cosine, "v/cos": cosine, "edm/rf": 3.0, "edm/cos": cosine}
    ratio |= {f"edm({m}, {s})": math.exp(m + s * z) for m in (-1.2, 0.0, 1.2) for s in (0.6, 1.8)}
    sigma = ratio[name]
    # F = (x0 - c_skip (x0 + sigma noise)) / c_out = (sigma x0 / 0.5 - 0.5 noise) / sqrt(sigma² + 0.25)
    said = {"eps/cos": -1.0, "v/cos": -side - 2 * sine}.get(name, (4 * sigma + 0.5) / math.sqrt(sigma**2 + 0.25))
    family, t = named(name), torch.tensor([0.75], dtype=torch.float64)
    x0, noise = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[-1.0]], dtype=torch.float64)
    assert (family.path.b(t) / family.path.a(t)).item() == pytest.approx(sigma, rel=1e-12)
    assert family.rf_time(t).item() == pytest.approx(sigma / (1 + sigma), rel=1e-12)
    z, output = analytic.interpolate(family.path, x0, noise, t), torch.full((1, 1), said, dtype=torch.float64)
    assert family.velocity(z, output, t).item() == pytest.approx(-3, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "quantile"),
    [
        ("edm/rf", lambda share: 2 * torch.logit(share)),  # lambda = 2 log((1 - t) / t): logistic
        ("edm/cos", lambda share: -2 * torch.log(torch.tan(math.pi / 2 * (1 - share)))),
        ("edm(0.6, 1.2)", lambda share: -2 * 0.6 + 2 * 1.2 * torch.special.ndtri(share)),
    ],
)
def test_an_edm_family_has_the_log_snr_of_its_name(name, quantile):
    """At a uniform t; and weighs the noise's error by density times exp(-lambda) + sigma_data², up to a factor."""
    found = analytic.log_snr(named(name).path, 1 - TIMES)  # rising
    torch.testing.assert_close(found, quantile(TIMES), rtol=1e-9, atol=1e-9)
    other = {"edm/rf": "rf", "edm/cos": "v/cos"}.get(name)
    if other is not None:
        torch.testing.assert_close(found, analytic.log_snr(PATH_FAMILIES[other].path, 1 - TIMES), rtol=1e-9, atol=1e-9)
    weight = analytic.noise_weight(named(name), 1 - TIMES)
    torch.testing.assert_close(weight * 0.5**2, torch.exp(-found) + 0.5**2, rtol=1e-9, atol=0)


def test_the_cosine_path_with_another_output_has_the_published_weights_of_its_log_snr():
    """Of ``-w lambda' / 2`` (arXiv:2403.03206, eq. 12): sech(lambda / 2) for the noise, exp(-lambda / 2) for v."""
    for name, published in (
        ("eps/cos", lambda snr: 1 / torch.cosh(snr / 2)),
        ("v/cos", lambda snr: torch.exp(-snr / 2)),
        ("rf", lambda snr: torch.exp(-snr / 2)),
    ):
        t = TIMES.clone().requires_grad_()
        log_snr = analytic.log_snr(PATH_FAMILIES[name].path, t)
        (slope,) = torch.autograd.grad(log_snr.sum(), t)
        found = -2 * analytic.noise_weight(PATH_FAMILIES[name], TIMES) / slope / published(log_snr.detach())
        torch.testing.assert_close(found, found[:1].expand(99), rtol=1e-9, atol=0)


def ideal_velocity(family: PathFamily, gaussian):
    """Return the velocity of a network of ``family`` that knows the data and answers in the family's own words."""
    level = torch.zeros(1)

    def network(z_in, t):
        own = family.own_time(level)  # the exact time: what the network is told is rounded
        a, b = (f(own).unsqueeze(1) for f in (family.path.a, family.path.b))
        z = z_in * torch.sqrt(b**2 + family.sigma_data**2) if family.prediction == "edm" else z_in
        x0 = gaussian.mu + a * gaussian.c**2 / (a**2 * gaussian.c**2 + b**2) * (z - a * gaussian.mu)
        return raw_output(family, x0, (z - a * x0) / b, own.unsqueeze(1))

    def velocity(x, s):
        nonlocal level
        level = s
        return rf_velocity(family, network)(x, s)

    return velocity


@every_family
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_solvers_keep_their_order_through_every_familys_conversion(family: PathFamily, solver, order, gaussian):
    velocity = ideal_velocity(family, gaussian)
    start, errors = torch.tensor([[1.3]], dtype=torch.float64), []
    exact = gaussian.ode(start, 0.8, 0.1)
    for steps in (16, 32):
        end = solver(velocity, start, torch.linspace(0.8, 0.1, steps + 1, dtype=torch.float64))
        errors.append((end - exact).abs().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@every_family
def test_samples_of_an_ideal_network_have_the_datas_mean_and_spread(family: PathFamily, gaussian):
    start = torch.tensor([-1.5, 0.0, 1.5], dtype=torch.float64)[:, None]
    grid = sampling_sigmas(family, 400)

    ideal = ideal_velocity(family, gaussian)

    def velocity(x, s):
        return gaussian.velocity(x, s) if float(s[0]) == 1 else ideal(x, s)

    end = euler(velocity, family.initial_scale * start, grid)
    torch.testing.assert_close(end, gaussian.mu + gaussian.c * start, rtol=0, atol=0.06)


def test_a_narrow_edm_begins_at_the_highest_level_that_it_is_trained_on():
    z = torch.special.ndtri(torch.tensor(1 - 2.0**-24, dtype=torch.float64)).item()
    for name in NAMES:
        if named(name).prediction == "edm":
            p_mean, p_std = {"edm": (-1.2, 1.2)}.get(name, (0.0, 9.0))
            if name.startswith("edm("):
                p_mean, p_std = map(float, name[4:-1].split(","))
            sigma = min(80.0, math.exp(p_mean + p_std * z))
            assert named(name).initial_scale == pytest.approx(sigma / (1 + sigma), rel=1e-9)
    assert named("edm(-1.2, 0.6)").initial_scale < 0.88 and named("edm(0.0, 0.6)").initial_scale < 0.97


def test_noise_on_the_cosine_path_begins_where_edm_does():
    family = PATH_FAMILIES["eps/cos"]
    assert family.first_time.item() == pytest.approx(2 / math.pi * math.atan(80))
    assert family.initial_scale == pytest.approx(80 / 81) and PATH_FAMILIES["eps/linear"].first_time == 1
    levels = sampling_sigmas(family, 4).double()[:-1]
    times = [share * 2 / math.pi * math.atan(80) for share in (1.0, 0.75, 0.5, 0.25)]
    assert (levels / (1 - levels)).tolist() == pytest.approx([math.tan(math.pi / 2 * t) for t in times], rel=1e-4)
