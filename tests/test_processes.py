"""Processes: shapes and dtypes, refusals, properties for all times, the chain against a loop."""

import copy
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffnotes.processes import (
    EDM,
    VE,
    VP,
    Cosine,
    Discrete,
    Flow,
    Process,
    SubVP,
    cosine_betas,
    from_config,
    linear_betas,
)
from diffnotes.samplers import time_grid

PROCESSES = {
    "VP": VP(),
    "VP constant rate": VP(3.0, 3.0),
    "SubVP": SubVP(),
    "VE": VE(),
    "EDM": EDM(),
    "EDM straight": EDM(rho=1.0),
    "Cosine": Cosine(),
    "Flow": Flow(),
    "Discrete": Discrete(linear_betas()),
    "Discrete cosine": Discrete(cosine_betas(50)),
    "Discrete, one step": Discrete([0.5]),
}
CURVES = "log_alpha alpha sigma alpha_prime sigma_prime log_snr drift_coef diffusion".split()
each = pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)
processes = st.sampled_from(list(PROCESSES.values()))
times = st.floats(0.001, 0.999)
same = torch.testing.assert_close


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- Shapes, dtypes, numbers --------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curves_keep_shape_and_dtype(p, dtype):
    for curve, shape in itertools.product(CURVES, [(), (1,), (5,)]):
        value = getattr(p, curve)(torch.full(shape, 0.3, dtype=dtype))
        assert value.shape == shape and value.dtype == dtype and not value.isnan().any()


@each
def test_a_number_is_a_float64_on_the_cpu(p):
    for curve in CURVES:
        value = getattr(p, curve)(0.3)
        assert value.shape == () and value.dtype == torch.float64 and value.device.type == "cpu"
        assert value == getattr(p, curve)(f64(0.3))[0]


@each
def test_float32_is_the_float64_value_rounded(p):
    t = torch.logspace(-6, math.log10(0.9987), 60)  # off the grids of the chains
    for curve in ("alpha", "sigma", "diffusion", "drift_coef", "alpha_prime", "sigma_prime"):
        exact = getattr(p, curve)(t.double())
        same(getattr(p, curve)(t).double(), exact, rtol=4e-6, atol=0)


@each
def test_transition_in_float32(p):
    s = torch.linspace(0.0003, 0.9965, 60)  # between the grid points of the chains
    t = s + 1e-3
    for value, exact in zip(p.transition(s, t), p.transition(s.double(), t.double()), strict=True):
        assert value.dtype == torch.float32
        same(value.double(), exact, rtol=4e-6, atol=0)


@each
def test_gradients_in_time_agree_with_slopes(p):
    t = torch.linspace(0.013, 0.987, 7, dtype=torch.float64)
    for curve, prime in (("alpha", p.alpha_prime), ("sigma", p.sigma_prime)):
        _, slope = torch.func.jvp(getattr(p, curve), (t,), (torch.ones_like(t),))
        same(slope, prime(t), rtol=1e-10, atol=1e-12)


@each
def test_ends(p):
    for t in (0.0, 1.0):
        for curve in CURVES:
            assert not getattr(p, curve)(t).isnan()
    assert p.alpha(0.0) == 1 and 0 <= p.t_min <= p.t_max <= 1
    assert p.prior_std() == p.sigma(1.0).item()
    for t in (p.t_min, p.t_max):
        assert p.drift_coef(t).isfinite() and p.diffusion(t).isfinite()


ENDS = {"VP": 152.16697, "SubVP": 152.16368, "VE": 50.0, "EDM": 80.0, "Discrete": 157.40728}


@pytest.mark.parametrize("name", ENDS)
def test_noise_over_signal_at_the_end(name):
    p = PROCESSES[name]
    assert (p.sigma(1.0) / p.alpha(1.0)).item() == pytest.approx(ENDS[name], abs=5e-6)


@pytest.mark.parametrize("p", [Cosine(), Flow()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure_noise_at_the_end(p, dtype):
    one = torch.ones(2, dtype=dtype)
    assert (p.alpha(one) == 0).all() and (p.sigma(one) == 1).all()
    ratio, var = p.transition(0.3, one)
    assert (ratio == 0).all()
    same(var, one)


@pytest.mark.parametrize(
    "name, t_min, t_max",
    [
        ("VP", 1e-3, 1),
        ("SubVP", 1e-2, 1),
        ("VE", 0, 1),
        ("EDM", 0, 1),
        ("Cosine", 1e-3, 1 - 1e-3),
        ("Flow", 1e-3, 1 - 1e-3),
        ("Discrete", 1e-3, 1),
        ("Discrete cosine", 1 / 50, 1),
    ],
)
def test_range(name, t_min, t_max):
    assert (PROCESSES[name].t_min, PROCESSES[name].t_max) == (t_min, t_max)


# --- Properties ---------------------------------------------------------------


@given(processes, times)
def test_log_snr_and_back(p, t):
    assume(not (p == PROCESSES["Discrete, one step"] and t < 1e-3))
    assert p.t_of_log_snr(p.log_snr(t)).item() == pytest.approx(t, abs=1e-12, rel=1e-9)


@given(processes, times, times)
def test_log_snr_falls(p, s, t):
    assume(s < t - 1e-9)
    assert p.log_snr(s) > p.log_snr(t)


@given(processes, times)
def test_definition_of_f_g_and_log_snr(p, t):
    alpha, sigma, f = p.alpha(t), p.sigma(t), p.drift_coef(t)
    same(p.log_alpha(t), alpha.log(), rtol=1e-9, atol=1e-13)
    same(p.log_snr(t), (alpha**2 / sigma**2).log(), rtol=1e-9, atol=1e-9)
    same(f, p.alpha_prime(t) / alpha, rtol=1e-12, atol=0)
    g_squared = 2 * sigma * p.sigma_prime(t) - 2 * f * sigma**2
    same(p.diffusion(t) ** 2, g_squared, rtol=1e-9, atol=1e-12)


@given(processes, st.lists(st.floats(0, 0.999), min_size=3, max_size=3, unique=True))
def test_transitions_compose(p, values):
    u, s, t = sorted(values)
    (r_su, v_su), (r_ts, v_ts) = p.transition(u, s), p.transition(s, t)
    r_tu, v_tu = p.transition(u, t)
    same(r_ts * r_su, r_tu, rtol=1e-10, atol=0)
    same(r_ts**2 * v_su + v_ts, v_tu, rtol=1e-9, atol=1e-300)


@given(processes, times, times)
def test_transition_joins_the_marginals(p, s, t):
    s, t = sorted([s, t])
    ratio, var = p.transition(s, t)
    assert var >= 0 and 0 <= ratio <= 1
    same(ratio * p.alpha(s), p.alpha(t), rtol=1e-10, atol=0)
    same(ratio**2 * p.sigma(s) ** 2 + var, p.sigma(t) ** 2, rtol=1e-10, atol=0)


@each
def test_no_time_no_change(p):
    for t in (0.0, 0.4, 1.0):
        assert p.transition(t, t) == (1, 0)
    ratio, var = p.transition(f64(0.0, 0.2, 1.0), f64(0.0, 0.4, 1.0))
    assert ratio[[0, 2]].tolist() == [1, 1] and var[[0, 2]].tolist() == [0, 0] and var[1] > 0


@each
def test_transition_from_the_data(p):
    ratio, var = p.transition(0.0, f64(0.1, 0.9))
    same(ratio, p.alpha(f64(0.1, 0.9)))
    same(var, p.sigma(f64(0.1, 0.9)) ** 2 - ratio**2 * p.sigma(0.0) ** 2, rtol=1e-12, atol=0)


def test_transition_mixes_numbers_and_batches():
    ratio, var = VP().transition(0.1, torch.tensor([0.2, 0.3]))
    assert ratio.shape == var.shape == (2,) and ratio.dtype == torch.float32
    ratio, var = PROCESSES["Discrete"].transition(torch.tensor([0.1, 0.2]), 0.5)
    assert ratio.shape == var.shape == (2,) and var.dtype == torch.float32


# --- States -------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_perturb_keeps_the_dtype_of_the_data(p, dtype):
    x0, eps = torch.randn(2, 4, 1, 3).to(dtype)
    expected = (p.alpha(0.2) * x0.double() + p.sigma(0.2) * eps.double()).to(dtype)
    for t in (0.2, torch.tensor(0.2), torch.full((4,), 0.2), f64(0.2, 0.2, 0.2, 0.2)):
        x_t = p.perturb(x0, t, eps)
        assert x_t.dtype == p.drift(x0, t).dtype == dtype
        tolerance = 2e-6 if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
        same(x_t, expected, rtol=tolerance, atol=1e-6)


@each
def test_one_time_per_sample(p):
    x0, eps, t = torch.randn(3, 2, 2), torch.randn(3, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    x_t, drift = p.perturb(x0, t, eps), p.drift(x0, t)
    for i in range(3):
        same(x_t[i], p.perturb(x0[i : i + 1], t[i], eps[i : i + 1])[0])
        same(drift[i], p.drift_coef(t[i]) * x0[i])


def test_prior_sample():
    p, generator = EDM(), torch.Generator().manual_seed(3)
    x = p.prior_sample((4000, 2), generator=generator, dtype=torch.float64)
    assert x.shape == (4000, 2) and x.dtype == torch.float64
    assert x.std().item() == pytest.approx(80, rel=4 / math.sqrt(2 * 8000))
    again = p.prior_sample((4000, 2), generator=generator.manual_seed(3), dtype=torch.float64)
    assert torch.equal(x, again) and p.prior_sample((1,)).dtype == torch.float32


# --- Refusals -----------------------------------------------------------------


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan, f64(0.5, 1.5), torch.ones(2, 2)])
def test_time_outside(t):
    for p, curve in itertools.product(PROCESSES.values(), CURVES):
        with pytest.raises(ValueError, match="t must"):
            getattr(p, curve)(t)
    for kernel in (
        lambda: VP().perturb(torch.ones(2), t, torch.ones(2)),
        lambda: VP().transition(0, t),
    ):
        with pytest.raises(ValueError, match="t must"):
            kernel()


def test_order_and_length_of_times():
    with pytest.raises(ValueError, match="s <= t"):
        VP().transition(0.5, 0.4)
    with pytest.raises(ValueError, match="s <= t"):
        VP().transition(f64(0.1, 0.5), f64(0.2, 0.4))
    with pytest.raises(ValueError, match="s must"):
        VP().transition(-0.5, 0.4)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        VP().transition(torch.full((3,), 0.1), torch.full((2,), 0.2))


@pytest.mark.parametrize(
    "x0, eps, error",
    [
        (torch.ones(2, dtype=torch.int64), torch.ones(2), TypeError),
        (torch.ones(2, dtype=torch.complex64), torch.ones(2), TypeError),
        (torch.ones(2), torch.ones(2, dtype=torch.bool), TypeError),
        ([1.0, 2.0], torch.ones(2), TypeError),
        (torch.ones(2, 3), torch.ones(3), ValueError),
        (torch.ones(2, 1), torch.ones(2, 3), ValueError),
    ],
)
def test_perturb_refuses(x0, eps, error):
    with pytest.raises(error, match="x0|eps"):
        Flow().perturb(x0, 0.5, eps)


def test_batches_that_disagree():
    with pytest.raises(ValueError, match="per sample"):
        Flow().perturb(torch.ones(2, 3), torch.full((3,), 0.5), torch.ones(2, 3))
    with pytest.raises(ValueError, match="per sample"):
        Flow().drift(torch.ones(2, 3), torch.full((3,), 0.5))
    with pytest.raises(TypeError, match="x_t"):
        Flow().drift(torch.ones(2, dtype=torch.int64), 0.5)


@each
def test_log_snr_out_of_reach(p):
    low, high = p.log_snr(1.0).item(), p.log_snr(0.0).item()
    for level in {low - 1, high + 1, math.nan} - {-math.inf, math.inf}:
        with pytest.raises(ValueError, match="t of this log_snr"):
            p.t_of_log_snr(level)
    for t in (0.0, 1.0):
        same(p.t_of_log_snr(p.log_snr(torch.tensor(t))), torch.tensor(t), atol=1e-6, rtol=0)
    with pytest.raises(TypeError, match="log_snr"):
        p.t_of_log_snr(torch.tensor([1]))


@pytest.mark.parametrize("kind", [VE, EDM])
@pytest.mark.parametrize(
    "low, high", [(0, 1), (-1, 1), (1, 1), (2, 1), (1, math.inf), (math.nan, 1)]
)
def test_scales_out_of_order(kind, low, high):
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        kind(sigma_min=low, sigma_max=high)


@pytest.mark.parametrize("kind", [VP, SubVP])
@pytest.mark.parametrize("low, high", [(0, 1), (-1, 1), (2, 1), (1, math.inf), (math.nan, 1)])
def test_rates_out_of_order(kind, low, high):
    with pytest.raises(ValueError, match="beta_min <= beta_max"):
        kind(beta_min=low, beta_max=high)


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan, math.inf, 1e-3, 1e9])
def test_rho(rho):
    with pytest.raises(ValueError, match="rho"):
        EDM(rho=rho)


@pytest.mark.parametrize(
    "betas", [[], [[0.1]], 0.1, [-0.1], [0.1, 1.0], [math.nan], [1.5], [0, 0]]
)
def test_betas_refused(betas):
    with pytest.raises(ValueError, match="betas must"):
        Discrete(betas)


@pytest.mark.parametrize("kind", [VP, SubVP])
def test_no_more_noise_than_float64_holds(kind):
    with pytest.raises(ValueError, match="mean <= 700"):
        kind(0.1, 1400)
    with pytest.raises(ValueError, match="float64"):
        Discrete([0.999999] * 1000)
    for p in (kind(0.1, 1399.9), Discrete([0.5] * 1000)):
        assert p.alpha(1.0) ** 2 > 0 and ((p.sigma(1.0) / p.alpha(1.0)) ** 2).isfinite()
        assert p.t_of_log_snr(p.log_snr(1.0)).item() == pytest.approx(1)


def test_complex_betas_refused():
    with pytest.raises(TypeError, match="betas.*complex"):
        Discrete(torch.tensor([0.1 + 0.5j]))


def test_schedules_refuse():
    for arguments in [(0,), (-1,), (10,), (1000, 0.0), (1000, 0.02, 0.01), (1000, 0.1, 1.0)]:
        with pytest.raises(ValueError):
            linear_betas(*arguments)
    for arguments in [(0,), (10, -0.1), (10, 0.008, 1.0), (10, 0.008, 0.0)]:
        with pytest.raises(ValueError):
            cosine_betas(*arguments)
    for schedule in (linear_betas, cosine_betas):
        with pytest.raises(TypeError, match="n_steps"):
            schedule(10.0)


def test_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Process()


# --- The chain ----------------------------------------------------------------


@given(st.lists(st.floats(0, 0.999, allow_subnormal=False), min_size=1, max_size=30).filter(any))
@settings(deadline=None)
def test_chain_against_a_loop(values):
    p, alpha_bar = Discrete(values), 1.0
    assert p.alpha_bar[0] == 1 and p.n_steps == len(values)
    for k, beta in enumerate(values, 1):
        ratio, var = p.transition((k - 1) / len(values), k / len(values))
        alpha_bar *= 1 - beta
        assert ratio.item() == pytest.approx(math.sqrt(1 - beta), rel=1e-9)
        assert var.item() == pytest.approx(beta, rel=1e-9, abs=1e-14)
        assert p.alpha_bar[k].item() == pytest.approx(alpha_bar, rel=1e-9)
        assert p.alpha(k / len(values)).item() == pytest.approx(math.sqrt(alpha_bar), rel=1e-9)
        expected = -len(values) * math.log1p(-beta)
        assert p.diffusion(k / len(values)).item() ** 2 == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_steps", [1, 7, 49, 100, 999, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_on_the_grid(n_steps, dtype):
    p = Discrete(linear_betas(n_steps, rescale=False))
    k = torch.arange(n_steps + 1, dtype=dtype)
    rate = (-n_steps * torch.log1p(-p.betas)).to(dtype)
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 1e-9, "atol": 4e-16}
    for grid in (k / n_steps, torch.linspace(0, 1, n_steps + 1, dtype=dtype)):
        same(p.log_alpha(grid), (p.alpha_bar.log() / 2).to(dtype), **tolerance)
        same(p.diffusion(grid[1:]) ** 2, rate, **tolerance)


def test_steps_without_noise():
    p = Discrete([0.0, 0.2, 0.0, 0.3])
    assert p.sigma(0.25) == 0 and p.log_snr(0.25) == math.inf and p.t_of_log_snr(math.inf) == 0
    assert p.t_of_log_snr(p.log_snr(0.7)).item() == pytest.approx(0.5)
    assert p.diffusion(0.7) == 0 and p.transition(0.5, 0.75) == (1, 0)


def test_starts_at_the_first_step_with_noise():
    p = Discrete([0, 0.5, 0.9])
    assert p.t_min == pytest.approx(2 / 3) and p.sigma(p.t_min) > 0
    for kind in ("log_snr", "t"):
        same(time_grid(p, 2, kind), f64(1, 2 / 3))
    assert Discrete(linear_betas()).t_min == 1 / 1000


def test_betas_are_copied_into_float64():
    betas = torch.tensor([0.1, 0.2], requires_grad=True)
    p = Discrete(betas)
    with torch.no_grad():
        betas.zero_()
    assert p.betas.dtype == torch.float64 and not p.betas.requires_grad
    same(p.betas, f64(0.1, 0.2), rtol=1e-7, atol=0)
    assert Discrete(np.array([0.1, 0.2])) == Discrete([0.1, 0.2]) == Discrete(f64(0.1, 0.2))


def test_rescaling():
    assert torch.equal(linear_betas(), linear_betas(rescale=False))
    for n in (21, 100, 250, 4000):
        assert linear_betas(n).sum().item() == pytest.approx(10.05)
        assert len(linear_betas(n)) == n
    assert linear_betas(1, rescale=False).tolist() == [1e-4]
    assert torch.equal(linear_betas(10, rescale=False)[[0, -1]], f64(1e-4, 2e-2))


def test_cosine_betas():
    def bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - bar((k + 1) / 20) / bar(k / 20), 0.999) for k in range(20)]
    same(cosine_betas(20), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)
    assert cosine_betas(20, cap=0.3).max() == 0.3 and cosine_betas(1).tolist() == [0.999]


# --- Values -------------------------------------------------------------------


@each
def test_config_round_trip(p):
    again = from_config(p.config())
    assert again == p and hash(again) == hash(p) and type(again) is type(p)
    t = torch.linspace(0, 1, 9)
    assert torch.equal(again.sigma(t), p.sigma(t)) and torch.equal(again.alpha(t), p.alpha(t))


def test_config_is_plain():
    for p in PROCESSES.values():
        assert from_config(json.loads(json.dumps(p.config()))) == p
    assert VE(0.1, 3).config() == {"name": "VE", "sigma_min": 0.1, "sigma_max": 3}


def test_config_refuses():
    with pytest.raises(ValueError, match="'VP', 'VE', .*, 'Flow', 'Discrete'"):
        from_config({"name": "vp"})
    with pytest.raises(ValueError, match="None"):
        from_config({})
    with pytest.raises(TypeError, match="gamma"):
        from_config({"name": "VP", "gamma": 1})


@each
def test_values_not_identities(p):
    for other in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert other == p and hash(other) == hash(p)
    assert p != "p" and len(set(PROCESSES.values()) | {copy.copy(p)}) == len(PROCESSES)
    with pytest.raises(AttributeError):
        p.beta_min = 1.0


def test_different_processes_differ():
    assert VP() != SubVP() and VE() != VE(sigma_max=49.0) and Cosine() != Flow()
    assert Discrete([0.1, 0.2]) != Discrete([0.2, 0.1])
    assert repr(PROCESSES["Discrete"]) == "Discrete(n_steps=1000)"
    assert repr(EDM()) == "EDM(sigma_min=0.002, sigma_max=80.0, rho=7.0)"
