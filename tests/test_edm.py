"""Karras's grid, sampler and churn: published algorithms, ends of time, noise drawn, refusals."""

import math
from functools import partial

import pytest
import torch

from diffnotes.denoisers import Denoiser, from_x0_eps
from diffnotes.edm import churn, edm_heun, edm_sde, karras_times, second_order
from diffnotes.mixtures import Gaussian, GaussianMixture
from diffnotes.processes import (
    EDM,
    VE,
    VP,
    Cosine,
    Discrete,
    Flow,
    SubVP,
    cosine_betas,
    linear_betas,
)
from diffnotes.samplers import heun, nfe, sample
from diffnotes.stepping import SAMPLERS, step_coefficients, time_grid

CHAIN = Discrete(linear_betas())
PROCESSES = [VP(), SubVP(), VE(), EDM(), Cosine(), Flow(), CHAIN, Discrete(cosine_betas(1000))]
NAMES = ["VP", "SubVP", "VE", "EDM", "Cosine", "Flow", "linear", "cosine"]
COORDINATES = ["x0", "eps", "v", "score", "velocity", "edm"]
SAMPLERS_HERE = {
    "edm_heun": edm_heun,
    "midpoint": partial(edm_heun, node=0.5),
    "ralston": partial(edm_heun, node=2 / 3),
    "edm_sde": edm_sde,
    "much": partial(edm_sde, s_churn=1e3, s_tmin=0.0, s_tmax=math.inf, s_noise=1.003),
}
each_process = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
each_continuous = pytest.mark.parametrize("process", PROCESSES[:6], ids=NAMES[:6])
each_sampler = pytest.mark.parametrize("name", SAMPLERS_HERE)

# k-diffusion 0.1.1.post1: sample_heun on the mixture below, eight levels from 80 to 0.002.
MEANS, VARIANCES = [[-1.0, 0.5], [1.0, 0.0], [0.25, -1.5]], [0.05, 0.1, 0.2]
OPTIONS = {"s_churn": 2.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
K_DIFFUSION = [
    [1.318206989680647, 0.001539383120986639],
    [-1.3126824471043603, 0.7188296109881549],
    [0.5773854320258034, -1.8925821001130252],
]
K_DIFFUSION_CHURNED = [
    [1.2279280369360945, 0.09915780687945057],
    [-1.1178671813429426, 0.5147542394114496],
    [0.2852818115010972, -1.3634038061734515],
]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level(process, times):
    return process.sigma(times) / process.alpha(times)


def time_of(process, r):
    return process.t_of_log_snr(-2 * math.log(r)).item()


@pytest.fixture(scope="module")
def law():
    return GaussianMixture(f64(MEANS), f64(VARIANCES))


def point_denoiser(process, predicts, point):
    """What a network says whose data are one point."""

    def net(x, t):
        alpha, sigma = (c.reshape(-1, 1) for c in (process.alpha(t), process.sigma(t)))
        x = x * torch.hypot(0.5 * alpha, sigma) if predicts == "edm" else x  # it saw c_in x
        eps = (x - alpha * point) / sigma
        sigma_data = 0.5 if predicts == "edm" else None
        return from_x0_eps(point.expand_as(x), eps, t, process, predicts, sigma_data=sigma_data)

    sigma_data = 0.5 if predicts == "edm" else None
    return Denoiser(net, process, predicts, (2,), sigma_data=sigma_data)


# --- The grid -----------------------------------------------------------------


@each_process
@pytest.mark.parametrize("rho", [0.5, 1.0, 7.0, 1e6])
@pytest.mark.parametrize("steps", [1, 2, 3, 18, 200])
def test_grids(process, steps, rho):
    times = karras_times(process, steps, rho=rho)
    assert times.shape == (steps,) and times.dtype == torch.float64 and times[0] == process.t_max
    assert (times.diff() < 0).all() and (process.sigma(times) > 0).all()
    assert steps == 1 or times[-1] == process.t_min
    if isinstance(process, Discrete):
        k = times * process.n_steps
        assert ((k - k.round()).abs() < 1e-9).all()
    elif rho < 100:  # beyond, the root itself has too few digits to tell
        roots = level(process, times) ** (1 / rho)
        torch.testing.assert_close(roots, torch.linspace(roots[0], roots[-1], steps).double(),
                                   rtol=1e-5, atol=1e-5)


@each_continuous
def test_chosen_ends(process):
    times = karras_times(process, 7, s_min=0.05, s_max=20.0)
    torch.testing.assert_close(level(process, times)[[0, -1]], f64([20.0, 0.05]))
    times = karras_times(process, 7, s_max=20.0)
    assert level(process, times[:1]).item() == pytest.approx(20.0) and times[-1] == process.t_min
    times = karras_times(process, 7, s_min=0.05)
    assert times[0] == process.t_max and level(process, times[-1:]).item() == pytest.approx(0.05)
    assert karras_times(process, 1, s_max=20.0).tolist() == [pytest.approx(time_of(process, 20.0))]


def test_on_edm_it_is_the_grid_of_its_clock():
    for steps in (1, 2, 18, 333):
        for process in (EDM(), EDM(0.01, 20.0, 3.0)):
            expected = time_grid(process, steps, "t")
            found = karras_times(process, steps, rho=process.rho)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_a_chain_has_room_for_all_its_points_and_no_more():
    chain = Discrete(torch.full((6,), 0.3, dtype=torch.float64))
    for steps in range(1, 7):
        assert len(set((6 * karras_times(chain, steps)).round().tolist())) == steps
    with pytest.raises(ValueError, match="at most.* 6, got 7"):
        karras_times(chain, 7)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"s_max": math.inf}, "both finite, positive"),
        ({"s_max": 200.0}, "s_max = 200"),
        ({"s_min": 0.0}, "s_min = 0"),
        ({"s_min": -1.0}, "s_min = -1"),
        ({"s_min": math.nan}, "s_min = nan"),
        ({"s_min": 3.0, "s_max": 3.0}, "s_min < s_max"),
        ({"s_min": 5.0, "s_max": 3.0}, "s_min < s_max"),
        ({"rho": 0.0}, "rho must be from 0.1 to 1e6, got 0.0"),
        ({"rho": -7.0}, "rho must be"),
        ({"rho": math.nan}, "rho must be"),
        ({"rho": math.inf}, "rho must be"),
        ({"steps": 0}, "steps"),
    ],
)
def test_senseless_grids(options, message):
    with pytest.raises(ValueError, match=message):
        karras_times(VP(), **{"steps": 5, **options})


def test_levels_that_a_process_does_not_have():
    with pytest.raises(ValueError, match=r"\[0.01, 50\].*VE"):
        karras_times(VE(), 5, s_min=0.001)
    with pytest.raises(ValueError, match="s_max = 60"):
        karras_times(VE(), 5, s_max=60.0)
    with pytest.raises(ValueError, match="s_min = 0.001"):
        karras_times(CHAIN, 5, s_min=0.001)
    with pytest.raises(ValueError, match="both finite"):
        karras_times(Flow(), 5, s_max=math.inf)
    for steps in (2.0, True, "5"):
        with pytest.raises(TypeError, match="steps"):
            karras_times(VP(), steps)


# --- The algorithms as they were published ------------------------------------


def algorithm_2(D, x, sigmas, draws, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Karras et al. (2022), algorithm 2; with s_churn = 0 it is algorithm 1."""
    n, t = len(sigmas), [*sigmas, 0.0]
    for i in range(n):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * draws[i]
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - D(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
    return x


def algorithm_3(D, x, sigmas, a):
    """Karras et al. (2022), algorithm 3, but for its last step, which is Euler's here."""
    for t, t_next in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        h, d = t_next - t, (x - D(x, t)) / t
        if t_next == 0:
            return x + h * d
        x_look, t_look = x + a * h * d, t + a * h
        d_look = (x_look - D(x_look, t_look)) / t_look
        x = x + h * ((1 - 1 / (2 * a)) * d + 1 / (2 * a) * d_look)


def exact_at_level(law):
    carrier = VE(1e-4, 1e3)
    return lambda y, r: law.posterior_mean(y, time_of(carrier, r), carrier)


LEVELS = [40.0, 22.0, 9.0, 3.0, 1.2, 0.5, 0.11, 0.02]


@each_continuous
@pytest.mark.parametrize("predicts", ["x0", "eps", "v"])
@pytest.mark.parametrize("options", [{"s_churn": 0.0}, OPTIONS, {"s_churn": 99.0, "s_tmax": 1.2}])
def test_published_sampler(law, process, predicts, options):
    times, y, draws = [time_of(process, r) for r in LEVELS], 40 * normal(5, 2), normal(8, 5, 2)
    options = {"s_tmin": 0.0, "s_tmax": 50.0, **options}
    expected = algorithm_2(exact_at_level(law), y, LEVELS, draws, **options)
    exact = law.denoiser(process)
    said = {"x0": exact, "eps": exact.eps, "v": exact.v}[predicts]
    denoiser = Denoiser(said, process, predicts, (2,), dtype=torch.float64)
    top = level(process, f64([1.0])).item()
    if top < 50.0:  # VE ends at 50, above the first level but below its churn
        options["s_tmax"], draws[0] = min(options["s_tmax"], 30.0), 0.0
        expected = algorithm_2(exact_at_level(law), y, LEVELS, draws, **options)
    low, high, used = options["s_tmin"], options["s_tmax"], options["s_churn"] > 0
    stirred = iter([z for z, r in zip(draws, LEVELS, strict=True) if used and low <= r <= high])
    found = edm_sde(denoiser, process.alpha(times[0]) * y, times,
                    noise=lambda x: next(stirred), **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert next(stirred, None) is None
    if not used:
        found = edm_heun(denoiser, process.alpha(times[0]) * y, times)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@each_continuous
@pytest.mark.parametrize("node", [0.3, 0.5, 2 / 3, 1.0])
def test_published_family(law, process, node):
    times, y = [time_of(process, r) for r in LEVELS], 40 * normal(5, 2)
    found = edm_heun(law.denoiser(process), process.alpha(times[0]) * y, times, node=node)
    expected = algorithm_3(exact_at_level(law), y, LEVELS, node)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options,expected", [({"s_churn": 0.0}, K_DIFFUSION),
                                              (OPTIONS, K_DIFFUSION_CHURNED)])
def test_k_diffusion(law, options, expected):
    i = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    x_T, times = 80 * torch.sin(1 + 2 * i), karras_times(EDM(), 8)
    draws = [1.3 * torch.sin(3.0 * k + 5 * i) for k in range(8)]
    gated = iter([z for z, r in zip(draws, EDM().sigma(times).tolist(), strict=True)
                  if OPTIONS["s_tmin"] <= r <= OPTIONS["s_tmax"]])
    found = edm_sde(law.denoiser(EDM()), x_T, times, noise=lambda x: next(gated), **options)
    torch.testing.assert_close(found, f64(expected), rtol=0, atol=1e-9)


def test_short_steps_are_those_of_the_bounded_sampler(law):
    for process in PROCESSES:
        times = time_grid(process, 60)
        x_T = normal(4, 2) * process.sigma(times[0])
        if step_coefficients(process, times)[2].max() < math.log(3):
            found = edm_heun(law.denoiser(process), x_T, times)
            torch.testing.assert_close(found, heun(law.denoiser(process), x_T, times))


# --- Ends of time, few steps, one point ---------------------------------------


@each_process
@each_sampler
@pytest.mark.parametrize("predicts", COORDINATES)
def test_one_point_is_found_exactly(process, name, predicts):
    point, draw = f64([0.7, -1.2]), normal(3, 2, seed=1)
    denoiser = point_denoiser(process, predicts, point)
    for steps in (1, 2, 3, 4, 5):
        times = karras_times(process, steps)
        x_T = normal(3, 2) * process.sigma(times[0])
        found = SAMPLERS_HERE[name](denoiser, x_T, times, noise=lambda x: draw)
        # Rounding of eps at the first level, up to 2e4, and of the gains of long steps, to 1e6.
        torch.testing.assert_close(found, point.expand(3, 2), rtol=0, atol=1e-5)


@each_process
@each_sampler
def test_finite_on_a_mixture_in_float32(law, process, name):
    law = law.to(dtype=torch.float32)
    for steps in (1, 2, 3, 4, 5):
        times = karras_times(process, steps)
        x_T = (normal(16, 2) * process.sigma(times[0])).float()
        found = SAMPLERS_HERE[name](law.denoiser(process), x_T, times)
        assert found.dtype == torch.float32 and found.isfinite().all()


@each_sampler
@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=["Cosine", "Flow"])
@pytest.mark.parametrize("predicts", ["x0", "v", "velocity", "edm"])
def test_from_pure_noise(process, predicts, name):
    """Where alpha = 0 the first step is Euler's, has one look, and adds no noise."""
    asked = []
    inner = point_denoiser(process, predicts, f64([0.7, -1.2]))
    net = inner.net

    def counted(x, t):
        asked.append(t[0].item())
        return net(x, t)

    denoiser = Denoiser(counted, process, predicts, (2,), sigma_data=inner.sigma_data)
    found = SAMPLERS_HERE[name](denoiser, normal(3, 2), [1.0, 0.6, 0.2])
    torch.testing.assert_close(found, f64([[0.7, -1.2]]).expand(3, 2), rtol=0, atol=1e-9)
    assert len(asked) == 4 and asked[0] == 1.0


def test_a_last_time_without_noise_is_dropped(law):
    x_T = normal(3, 2)
    with_zero = edm_heun(law.denoiser(VP()), x_T, [0.9, 0.5, 0.2, 0.0])
    assert torch.equal(with_zero, edm_heun(law.denoiser(VP()), x_T, [0.9, 0.5, 0.2]))


def test_one_time_returns_the_prediction(law):
    x_T = normal(3, 2) * EDM().sigma(1.0)
    expected = law.denoiser(EDM())(x_T, 1.0)
    for name in ("edm_heun", "edm_sde", "much"):
        assert torch.equal(SAMPLERS_HERE[name](law.denoiser(EDM()), x_T, [1.0]), expected)


# --- The churn ----------------------------------------------------------------


@each_process
@pytest.mark.parametrize("s_churn", [0.0, 0.1, 5.0, 1e6])
def test_churned_states_have_the_law_of_their_time(process, s_churn):
    times = karras_times(process, 30)
    hat, ratio, std = churn(process, times, s_churn=s_churn, s_tmin=0.0, s_tmax=math.inf)
    torch.testing.assert_close(ratio * process.alpha(times), process.alpha(hat), rtol=1e-9, atol=0)
    variance = (ratio * process.sigma(times)) ** 2 + std**2
    torch.testing.assert_close(variance, process.sigma(hat) ** 2, rtol=1e-9, atol=0)
    gain = level(process, hat) / level(process, times)
    gamma = min(s_churn / 30, math.sqrt(2) - 1)
    assert (hat >= times).all() and hat.max() <= 1 and ((std > 0) == (hat > times)).all()
    if isinstance(process, Discrete):
        k = hat * process.n_steps
        assert ((k - k.round()).abs() < 1e-9).all()
    else:
        below = level(process, times) * (1 + gamma) < level(process, f64([1.0]))
        torch.testing.assert_close(gain[below], torch.full_like(gain[below], 1 + gamma))
        assert (hat[~below] > 1 - 1e-12).all() or s_churn == 0


def test_no_noise_outside_the_band():
    times = f64([time_of(EDM(), r) for r in (60.0, 50.0, 1.0, 0.05, 0.04)])
    _, ratio, std = churn(EDM(), times)
    assert (std > 0).tolist() == [False, True, True, True, False] and (ratio == 1).all()


@pytest.mark.parametrize("steps", [1, 3, 18])
def test_noise_is_drawn_where_it_is_added(law, steps):
    calls = []

    def noise(x):
        calls.append(x.shape)
        return torch.zeros_like(x)

    times = karras_times(EDM(), steps)
    x_T = normal(4, 2) * EDM().sigma(times[0])
    r = EDM().sigma(times)
    expected = ((r >= 0.05) & (r <= 50)).sum().item()
    edm_sde(law.denoiser(EDM()), x_T, times, noise=noise)
    assert calls == [(4, 2)] * expected
    calls.clear()
    quiet = edm_sde(law.denoiser(EDM()), x_T, times, noise=noise, s_churn=0.0)
    plain = edm_heun(law.denoiser(EDM()), x_T, times, noise=noise)
    assert not calls and torch.equal(quiet, plain)


@each_continuous
def test_stirred_samples_have_the_law(process):
    """Mean and variance of a Gaussian, within four standard errors and the sampler's own error."""
    normal_law = Gaussian(f64([0.5]), 0.25)
    times = karras_times(process, 60, s_min=0.02, s_max=30.0)
    draw = torch.Generator().manual_seed(3)
    x_T = normal_law.marginal(process, times[0].item()).sample(20_000, generator=draw)

    def noise(x):
        return torch.randn(x.shape, generator=draw, dtype=x.dtype)

    found = edm_sde(normal_law.denoiser(process), x_T, times, noise=noise, s_churn=20.0)
    assert abs(found.mean() - 0.5) < 4 * 0.5 / math.sqrt(20_000)
    # With 60 steps and this churn Heun's own excess is below 3 per cent of the width.
    assert -4 * 0.5 / math.sqrt(40_000) < found.std() - 0.5 < 0.015 + 4 * 0.5 / math.sqrt(40_000)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"s_churn": -1.0}, "s_churn = -1"),
        ({"s_churn": math.inf}, "s_churn = inf"),
        ({"s_churn": math.nan}, "s_churn = nan"),
        ({"s_tmin": -0.1}, "s_tmin = -0.1"),
        ({"s_tmin": 3.0, "s_tmax": 2.0}, "s_tmin <= s_tmax"),
        ({"s_tmax": math.nan}, "s_tmax = nan"),
        ({"s_noise": -1.0}, "s_noise must be finite and at least 0, got -1"),
        ({"s_noise": math.inf}, "s_noise"),
        ({"s_noise": math.nan}, "s_noise"),
    ],
)
def test_senseless_options(options, message):
    with pytest.raises(ValueError, match=message):
        edm_sde(
            point_denoiser(VP(), "x0", f64([0.0, 0.0])), normal(2, 2), [1.0, 0.5], **options
        )


@pytest.mark.parametrize("node", [0.0, -0.5, 1.5, math.nan])
def test_senseless_nodes(law, node):
    with pytest.raises(ValueError, match="node must lie in"):
        edm_heun(law.denoiser(VP()), normal(2, 2), [1.0, 0.5], node=node)


@each_sampler
def test_senseless_states_and_times(law, name):
    sampler, denoiser = SAMPLERS_HERE[name], law.denoiser(VP())
    with pytest.raises(ValueError, match="times must decrease"):
        sampler(denoiser, normal(2, 2), [0.5, 0.9])
    with pytest.raises(ValueError, match="x_T"):
        sampler(denoiser, normal(2, 2) * math.nan, [0.9, 0.5])
    with pytest.raises(TypeError, match="x_T"):
        sampler(denoiser, torch.ones(2, 2, dtype=torch.int64), [0.9, 0.5])


# --- Looks, chains, costs -----------------------------------------------------


@each_process
@pytest.mark.parametrize("node", [0.25, 0.5, 1.0])
def test_looks_lie_on_the_way(process, node):
    times = karras_times(process, 20)
    looks, look, full = second_order(process, times[:-1], times[1:], node)
    assert (looks < times[:-1]).all() and (looks >= times[1:] - 1e-12).all()
    assert look.shape == (2, 19) and full.shape == (3, 19)
    alpha, sigma = process.alpha(times), process.sigma(times)
    # A prediction that stays is followed exactly: the factors of x0_hat add up to Euler's.
    torch.testing.assert_close(full[0], sigma[1:] / sigma[:-1], rtol=1e-9, atol=0)
    torch.testing.assert_close(full[0] * alpha[:-1] + full[1] + full[2], alpha[1:],
                               rtol=0, atol=1e-9 * full.abs().max())


@each_sampler
@pytest.mark.parametrize("steps", [2, 9, 40])
def test_on_a_chain_the_network_is_asked_at_its_points(law, name, steps):
    asked = []

    def net(x, k):
        asked.extend(k[:1].tolist())
        return x * 0

    chain = Discrete(linear_betas(50))
    denoiser = Denoiser(net, chain, "x0", (2,), time="index")
    SAMPLERS_HERE[name](denoiser, normal(3, 2), karras_times(chain, steps))
    assert len(asked) == 2 * steps - 1 and all(k == round(k) and 0 <= k < 50 for k in asked)


@each_sampler
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluations(law, name, steps):
    asked = []

    def net(x, t):
        asked.append(t)
        return torch.tanh(x)

    SAMPLERS_HERE[name](Denoiser(net, VP(), "x0", (2,)), normal(3, 2), karras_times(VP(), steps))
    assert len(asked) == 2 * steps - 1 == nfe(SAMPLERS_HERE[name], steps)


@pytest.mark.parametrize("name", ["edm_heun", "edm_sde"])
def test_by_name(law, name):
    assert SAMPLERS[name].grid is karras_times
    seen = []
    denoiser = law.denoiser(VP())
    found = sample(denoiser, 6, sampler=name, steps=9, seed=0,
                   callback=lambda i, t, x, x0_hat: seen.append((i, t, x, x0_hat)))
    again = sample(denoiser, 6, sampler=name, times=karras_times(VP(), 9), seed=0)
    assert torch.equal(found, again) and [i for i, *_ in seen] == list(range(9))
    assert torch.equal(found, sample(denoiser, 6, sampler=name, steps=9, seed=0, batch_size=4))
    times = karras_times(VP(), 9)
    hat = churn(VP(), times)[0] if name == "edm_sde" else times
    assert [t for _, t, *_ in seen] == hat.tolist()
    for _, t, x_t, x0_hat in seen:
        torch.testing.assert_close(x0_hat, denoiser(x_t, t), rtol=1e-9, atol=1e-9)


@each_sampler
def test_dtypes_and_states(law, name):
    kept, copies = [], []

    def net(x, t):
        kept.append(x), copies.append(x.clone())
        return torch.tanh(x)

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x_T = normal(3, 2).to(dtype)
        before = x_T.clone()
        found = SAMPLERS_HERE[name](Denoiser(net, VP(), "x0", (2,)), x_T, karras_times(VP(), 5))
        assert found.dtype == dtype and torch.equal(x_T, before)
    assert all(torch.equal(x, copy) for x, copy in zip(kept, copies, strict=True))


@each_sampler
def test_gradients_reach_the_start(law, name):
    draws = normal(9, 3, 2, seed=2)

    def run(x_T):
        given = iter(draws)
        return SAMPLERS_HERE[name](law.denoiser(VP()), x_T, karras_times(VP(), 4),
                                   noise=lambda x: next(given))

    x_T = normal(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(run, (x_T,))


def test_conditions_reach_the_network():
    seen = []

    def net(x, t, cond):
        seen.append(cond)
        return x * 0

    labels = torch.tensor([3, 1])
    edm_sde(Denoiser(net, VP(), "x0", (2,)), normal(2, 2), karras_times(VP(), 4), cond=labels)
    assert len(seen) == 7 and all(torch.equal(cond, labels) for cond in seen)


@pytest.mark.parametrize("node", [0.5, 2 / 3, 1.0])
def test_order_two(node):
    """Against the closed form of a normal law, whose midpoint method is of order three."""
    law, errors = Gaussian(f64([0.3, -0.2]), f64([[0.5, 0.2], [0.2, 0.3]])), []
    x_T = 80 * normal(20, 2)
    denoiser = law.denoiser(EDM())
    exact = denoiser(law.flow_map(x_T, 1.0, 0.0, EDM()), 0.0)
    for steps in (129, 257):
        found = edm_heun(denoiser, x_T, karras_times(EDM(), steps), node=node)
        errors.append((found - exact).norm(dim=1).mean().item())
    order = math.log2(errors[0] / errors[1])
    assert abs(order - (3 if node == 0.5 else 2)) < 0.1
