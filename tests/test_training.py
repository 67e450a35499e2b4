"""Training: losses, time samplers and their weights, averages and what is made of them."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffnotes.ddpm import simple_loss
from diffnotes.denoisers import Denoiser
from diffnotes.mixtures import GaussianMixture
from diffnotes.networks import MLP
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP, linear_betas
from diffnotes.training import (
    TIMES,
    WEIGHTINGS,
    draw_times,
    ema_decay,
    ema_update,
    gamma_of,
    importance_times,
    level_means,
    log_normal_times,
    log_snr_times,
    loss,
    posthoc_weights,
    power_decay,
    profile_products,
    uniform_times,
)

PROCESSES = [VP(), VE(), SubVP(), Cosine(), EDM(), Flow(), Discrete(linear_betas(50))]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
each_times = pytest.mark.parametrize("times", TIMES)
POINTS = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3
HEIGHTS = torch.tensor([3.0, 0.1, 1.0, 1.0, 7.0]).double()


def model(predicts="v", process=None, seed=0, **options):
    torch.manual_seed(seed)
    net = MLP(2, 8, 1, n_classes=3, **options)
    nn.init.normal_(net.last.weight, std=0.1)
    return Denoiser(net, process or Cosine(), predicts, (2,), sigma_data=0.8)


def draws(n=6):
    generator = torch.Generator().manual_seed(1)
    eps = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return POINTS[:n].double(), (torch.arange(n).double() + 0.5) / n, eps


def chain_for(weighting):
    return Discrete(linear_betas(50)) if weighting == "vlb" else None


def middles(n):
    return (torch.arange(n).double() + 0.5) / n


# --- The loss -----------------------------------------------------------------


@each_process
@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "score", "velocity", "edm"])
def test_simple_is_the_simple_loss(process, predicts):
    x0, t, eps = draws()
    t = 0.1 + 0.8 * t
    net = model(predicts, process).to(torch.float64)
    expected = simple_loss(net, x0, t, eps, LABELS[:6])
    torch.testing.assert_close(loss(net, x0, t=t, eps=eps, cond=LABELS[:6]), expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_is_least_at_the_posterior_mean(weighting):
    process = chain_for(weighting) or VP()
    law = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]).double(), 0.2)
    x0 = law.sample(4000, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)).double()
    t = 0.2 + 0.6 * middles(4000)
    exact, least = law.denoiser(process), {}
    for shift in (-0.1, 0.0, 0.1):
        shifted = lambda x, t, cond, shift=shift: exact(x, t) + shift  # noqa: E731
        biased = Denoiser(shifted, process, "x0", (2,), sigma_data=1.0)
        least[shift] = loss(biased, x0, t=t, eps=eps, weighting=weighting).mean().item()
    assert least[0.0] < min(least[-0.1], least[0.1])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_shape_dtype_and_gradient(weighting):
    x0, t, eps = draws()
    net = model(process=chain_for(weighting)).to(torch.float64)
    value = loss(net, x0, t=t, eps=eps, weighting=weighting)
    assert value.shape == (6,) and value.dtype == torch.float64 and (value >= 0).all()
    grads = torch.autograd.grad(value.sum(), list(net.parameters()), allow_unused=True)
    direction = [torch.randn_like(p) for p in net.parameters()]
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None)
    sides = []
    for step in (1e-6, -1e-6):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(step * d)
        sides.append(loss(moved, x0, t=t, eps=eps, weighting=weighting).sum())
    torch.testing.assert_close((sides[0] - sides[1]) / 2e-6, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_at_one_time_for_all(weighting):
    x0, _, eps = draws()
    net = model(process=chain_for(weighting)).to(torch.float64)
    expected = loss(net, x0, t=torch.full((6,), 0.5).double(), eps=eps, weighting=weighting)
    for t in (0.5, torch.tensor(0.5).double()):
        torch.testing.assert_close(loss(net, x0, t=t, eps=eps, weighting=weighting), expected)
    half = loss(net.to(torch.float32), x0.float(), t=0.5, eps=eps.float(), weighting=weighting)
    torch.testing.assert_close(half.double(), expected, rtol=1e-4, atol=1e-6)


def test_loss_is_a_mean_over_a_sample():
    silent = Denoiser(lambda x, t, cond: torch.zeros_like(x), VP(), "eps", (2, 3))
    eps = torch.full((4, 2, 3), 2.0)
    value = loss(silent, torch.zeros(4, 2, 3), t=torch.full((4,), 0.5), eps=eps)
    torch.testing.assert_close(value, torch.full((4,), 4.0))


def test_min_snr_is_finite_where_the_signal_is_gone_and_where_the_noise_is():
    x0, _, eps = draws()
    values = loss(model("v"), x0.float(), t=torch.tensor([0.0, 1.0, 0.5] * 2), eps=eps.float(),
                  weighting="min_snr")
    assert values.isfinite().all() and values[1] == 0 and values[2] > 0


def test_the_bound_takes_the_nearest_step():
    chain, (x0, _, eps) = Discrete(linear_betas(50)), draws()
    for t, step in ((0.5, 0.5), (0.501, 0.5), (0.02, 0.02)):
        found = WEIGHTINGS["vlb"][1](chain, torch.tensor(t))
        torch.testing.assert_close(found, WEIGHTINGS["vlb"][1](chain, torch.tensor(step)))
    with pytest.raises(ValueError, match="needs a Discrete process, got Cosine"):
        loss(model(), x0.float(), t=0.5, eps=eps.float(), weighting="vlb")


@pytest.mark.parametrize(("changed", "error", "message"), [
    (dict(eps=torch.ones(3, 2)), ValueError, r"eps has shape \(3, 2\), x0 \(6, 2\)"),
    (dict(x0=torch.ones(6, 3), eps=torch.ones(6, 3)), ValueError, r"must have shape \(B, 2\)"),
    (dict(t=torch.full((5,), 0.5)), ValueError, r"one number per sample: shape \(5,\)"),
    (dict(t=1.5), ValueError, "t must lie in"), (dict(t=None), TypeError, "t must be"),
    (dict(x0=None), TypeError, "x0 must be"),
    (dict(denoiser=torch.ones_like), TypeError, "denoiser must be a Denoiser, got builtin")])
def test_senseless_losses(changed, error, message):
    x0, t, eps = (x.float() for x in draws())
    arguments = dict(denoiser=model(), x0=x0, t=t, eps=eps) | changed
    with pytest.raises(error, match=message):
        loss(arguments.pop("denoiser"), arguments.pop("x0"), **arguments)


def test_unknown_weighting_lists_the_valid_ones():
    x0, t, eps = draws()
    with pytest.raises(ValueError) as error:
        loss(model(), x0, t=t, eps=eps, weighting="snr")
    assert all(name in str(error.value) for name in WEIGHTINGS)


# --- Times --------------------------------------------------------------------


@each_process
@each_times
@pytest.mark.parametrize("n", [1, 7, 128])
def test_times_are_times_and_repeat(process, times, n):
    first, again, other = (draw_times(process, n, times=times,
                                      generator=torch.Generator().manual_seed(seed))
                           for seed in (0, 0, 1))
    for x in first:
        assert x.shape == (n,) and x.dtype == torch.float32 and x.isfinite().all()
    t, weight = first
    assert (t.diff() >= 0).all() and (weight > 0).all() and torch.equal(t, again[0])
    assert process.t_min * (1 - 1e-6) <= t.min() and t.max() <= process.t_max * (1 + 1e-6)
    assert n < 7 or not torch.equal(t, other[0])
    if isinstance(process, Discrete):
        k = t.double() * process.n_steps
        torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-4)


@each_process
@pytest.mark.parametrize("n", [1, 7, 128])
def test_uniform_times_one_in_each_part(process, n):
    t, weight = draw_times(process, n)
    assert (weight == 1).all()
    if not isinstance(process, Discrete):
        share = (t - process.t_min) / (process.t_max - process.t_min) * n
        assert ((share - torch.arange(n) > -1e-3) & (share - torch.arange(n) < 1 + 1e-3)).all()


def test_independent_times_leave_strata_empty():
    t, _ = draw_times(VE(), 1000, low_discrepancy=False,
                      generator=torch.Generator().manual_seed(0))
    filled = (t * 1000).long().unique().numel()
    assert abs(filled / 1000 - (1 - 1 / math.e)) < 0.06
    assert draw_times(VE(), 1000)[0].mul(1000).long().unique().numel() > 995


def test_chain_steps_are_equally_likely():
    t, _ = draw_times(Discrete(linear_betas(50)), 20_000)
    assert (t * 50).round().long().bincount(minlength=51).tolist() == [0] + 50 * [400]


def test_a_chain_that_starts_without_noise_starts_later():
    chain = Discrete([0.0, 0.1, 0.2, 0.3])
    for times in TIMES:
        t, weight = draw_times(chain, 999, times=times)
        assert t.min() >= 0.5 and weight.isfinite().all()
    k = draw_times(chain, 999)[0] * 4
    assert k.round().long().bincount().tolist() == [0, 0] + 3 * [333]


@each_process
@pytest.mark.parametrize("sampler", [
    uniform_times, log_snr_times, lambda p, u: importance_times(p, u, HEIGHTS),
    lambda p, u: importance_times(p, u, HEIGHTS, base=log_snr_times)])
def test_weights_keep_the_uniform_objective(process, sampler):
    u = middles(200_000)
    t, weight = sampler(process, u)
    plain, _ = uniform_times(process, u)
    for h in (torch.ones_like, torch.square, lambda t: torch.cos(9 * t)):
        torch.testing.assert_close((weight * h(t)).mean(), h(plain).mean(), rtol=0, atol=2e-4)


@each_process
def test_times_uniform_in_the_log_snr(process):
    u = middles(1000)
    t, weight = log_snr_times(process, u)
    if isinstance(process, Discrete):
        factor = WEIGHTINGS["likelihood"][1](process, t)
        torch.testing.assert_close(weight * factor, (weight * factor)[:1].expand(1000))
    else:
        high, low = (process.log_snr(end) for end in (process.t_min, process.t_max))
        torch.testing.assert_close(process.log_snr(t), high + (low - high) * u)


def test_heights_are_frequencies():
    t, weight = importance_times(VE(), middles(10_000), HEIGHTS)
    counted = (t * 5).long().bincount(minlength=5) / 10_000
    torch.testing.assert_close(counted.double(), HEIGHTS / HEIGHTS.sum(), rtol=0, atol=2e-4)
    cell = (t * 5).long()
    torch.testing.assert_close(weight, HEIGHTS.mean() / HEIGHTS[cell])


@pytest.mark.parametrize("u", [0.0, 1.0])
@each_process
def test_ends_of_u(process, u):
    ends = torch.tensor([u], dtype=torch.float64)
    for sampler in (*TIMES.values(), lambda p, u: importance_times(p, u, HEIGHTS)):
        t, weight = sampler(process, ends)
        assert process.t_min <= t + 1e-9 and t <= process.t_max + 1e-9
        assert weight.isfinite().all() and (weight > 0).all()


@each_process
def test_log_normal_noise_levels(process):
    t, weight = log_normal_times(process, middles(20_000), mean=-0.5, std=0.5)
    level = -process.log_snr(t) / 2
    assert (weight == 1).all()
    assert abs(level.mean() + 0.5) < 0.03 and abs(level.std() - 0.5) < 0.03


def test_logit_normal_is_log_normal_on_the_straight_line():
    t, _ = log_normal_times(Flow(), middles(1000), mean=0.3, std=0.9)
    expected = torch.sigmoid(0.3 + 0.9 * torch.special.ndtri(middles(1000)))
    torch.testing.assert_close(t, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("arguments", [dict(std=0.0), dict(std=-1.0), dict(mean=200.0, std=0.1)])
def test_senseless_log_normals(arguments):
    with pytest.raises(ValueError, match="no such noise level"):
        log_normal_times(VP(), middles(4), **arguments)


@pytest.mark.parametrize("heights", [
    torch.zeros(3), torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan]), torch.ones(2, 2),
    torch.ones(0)])
def test_senseless_heights(heights):
    with pytest.raises(ValueError, match="heights"):
        importance_times(VP(), middles(4), heights)
    with pytest.raises(TypeError, match="heights must be a tensor, got list"):
        importance_times(VP(), middles(4), heights.tolist())


def test_times_of_ones_own():
    t, weight = draw_times(VP(), 8, times=lambda u: (u**2, 2 * u),
                           generator=torch.Generator().manual_seed(0))
    u = (torch.arange(8) + torch.rand(8, generator=torch.Generator().manual_seed(0))) / 8
    torch.testing.assert_close(t, u**2)
    torch.testing.assert_close(weight, 2 * u)


@pytest.mark.parametrize(("result", "got"), [
    ((torch.ones(8), torch.ones(1)), r"\(8,\) and \(1,\)"), (torch.ones(8), r"\(8,\)"),
    (([1.0] * 8, torch.ones(8)), r"list and \(8,\)"), (None, "NoneType")])
def test_times_that_are_no_two_tensors(result, got):
    with pytest.raises(ValueError, match=rf"two \(8,\) tensors; got {got}$"):
        draw_times(VP(), 8, times=lambda u: result)


@pytest.mark.parametrize("sampler", [
    *TIMES.values(), lambda p, u: importance_times(p, u, HEIGHTS)])
def test_senseless_u(sampler):
    for u, error, message in (([0.5], TypeError, "u must be"), (0.5, TypeError, "u must be"),
                              (torch.arange(3), TypeError, "u must be"),
                              (torch.tensor([1.5]), ValueError, "u must lie in")):
        with pytest.raises(error, match=message):
            sampler(VP(), u)
    with pytest.raises(TypeError, match="process must be a Process .* got Denoiser"):
        sampler(model(), middles(3))


@each_process
def test_a_table_of_one_height_changes_nothing(process):
    u = torch.cat([middles(9), torch.ones(1).double()])
    for base in (uniform_times, log_snr_times):
        for found, plain in zip(importance_times(process, u, torch.tensor([3.0]), base=base),
                                base(process, u), strict=True):
            torch.testing.assert_close(found, plain)


def test_senseless_calls():
    for n, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="n must be"):
            draw_times(VP(), n)
    with pytest.raises(TypeError, match=r"process must be a Process such as VP\(\), got Denoiser"):
        draw_times(model(), 3)
    with pytest.raises(ValueError) as caught:
        draw_times(VP(), 3, times="sobol")
    assert all(name in str(caught.value) for name in TIMES)


@each_process
def test_level_means(process):
    t, values = draw_times(process, 5000)[0].double(), torch.rand(5000).double()
    found = level_means(process, t, values, 7)
    high, low = (process.log_snr(end).item() for end in (process.t_min, process.t_max))
    edges = np.linspace(high, low, 8)
    level = process.log_snr(t)
    for i in range(7):
        inside = values[(level < edges[i] - 1e-6) & (level > edges[i + 1] + 1e-6)]
        if len(inside) > 20:
            assert abs(inside.mean() - found[i]) < 0.15
    assert found.shape == (7,) and torch.isclose(
        level_means(process, t, values, 1)[0], values.mean())


def test_level_means_of_nothing():
    found = level_means(VP(), torch.tensor([1.0]), torch.tensor([3.0]), 4)
    assert found[3] == 3 and found[:3].isnan().all()
    with pytest.raises(ValueError, match="one value for each time"):
        level_means(VP(), torch.ones(2), torch.ones(3))
    with pytest.raises(TypeError, match="cells"):
        level_means(VP(), torch.ones(2), torch.ones(2), 2.5)
    for arguments, name in ((([0.5], torch.ones(1)), "t"), ((torch.ones(1), [0.5]), "values")):
        with pytest.raises(TypeError, match=f"{name} must be a floating-point tensor, got list"):
            level_means(VP(), *arguments)


# --- Averages -----------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.9999))
def test_decay(k, limit):
    decay = ema_decay(k, limit)
    assert decay == min(limit, (k + 1) / (k + 10)) and decay <= ema_decay(k + 1, limit)


@pytest.mark.parametrize("arguments", [(-1,), (0, -0.1), (0, 1.1), (0, float("nan"))])
def test_senseless_decays(arguments):
    with pytest.raises(ValueError, match="k must be at least 0"):
        ema_decay(*arguments)


@pytest.mark.parametrize(("call", "name"), [
    (lambda: ema_decay("7"), "k"), (lambda: ema_decay(1, None), "limit"),
    (lambda: power_decay(None, 3.0), "k"), (lambda: power_decay(1, "3"), "gamma"),
    (lambda: gamma_of("wide"), "sigma_rel")])
def test_what_is_no_number(call, name):
    with pytest.raises(TypeError, match=f"{name} must be a number, got"):
        call()


@pytest.mark.parametrize(("current", "decay", "message"), [
    ([], 0.9, "1 averages, 0 weights"), ([torch.ones(2)], 0.9, "of its shape"),
    ([torch.ones(3)], 1.5, r"decay must be in \[0, 1\]; got 1.5"),
    ([torch.ones(3)], math.nan, "got nan")])
def test_senseless_updates(current, decay, message):
    average = torch.zeros(3)
    with pytest.raises(ValueError, match=message):
        ema_update([average], current, decay)
    assert not average.any()


def test_update_is_the_formula():
    average, current = [torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)]
    expected = [0.9 * a + 0.1 * c for a, c in zip(average, current, strict=True)]
    ema_update(average, current, 0.9)
    torch.testing.assert_close(average, expected)


def test_an_average_may_be_wider_than_what_it_averages():
    average = [torch.ones(3)]
    for _ in range(1000):
        ema_update(average, [torch.zeros(3, dtype=torch.bfloat16)], 0.999)
    torch.testing.assert_close(average[0], torch.full((3,), 0.999**1000), rtol=1e-4, atol=0)
    with pytest.raises(ValueError):
        ema_update(average, [], 0.9)


@settings(deadline=None)
@given(st.floats(0.001, 0.2886))
def test_gamma_has_the_width_asked_for(sigma_rel):
    gamma = gamma_of(sigma_rel)
    width = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)
    assert gamma >= 0 and math.isclose(width, sigma_rel, rel_tol=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, float("nan")])
def test_senseless_widths(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel must be in \(0, 0.2887\]"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("gamma", [0.0, 2.5, 16.97])
def test_power_averages_are_sums_over_the_path(gamma):
    path = torch.randn(50, 3).double()
    average = [torch.full((3,), 1e9).double()]
    for k, theta in enumerate(path):
        ema_update(average, [theta], power_decay(k, gamma))
    shares = (torch.arange(51).double() / 50).pow(gamma + 1).diff()
    torch.testing.assert_close(average[0], shares @ path, rtol=0, atol=1e-12)
    if gamma == 0:
        torch.testing.assert_close(average[0], path.mean(0))


@pytest.mark.parametrize("arguments", [(-1, 3.0), (0, -1.0), (2, float("nan"))])
def test_senseless_power_decays(arguments):
    with pytest.raises(ValueError, match="gamma above -1"):
        power_decay(*arguments)


def test_products_are_symmetric_and_positive():
    steps, gammas = [10, 20, 20, 35], [3.0, 0.0, 9.5, 2.0]
    matrix = profile_products(steps, gammas, steps, gammas)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-14)
    assert np.linalg.eigvalsh(matrix).min() > 0
    np.testing.assert_allclose(profile_products([20], [0.0], [30], [0.0]), 1 / 30)
    assert profile_products(steps, gammas, [5, 7], [1, 1]).shape == (4, 2)


def test_a_stored_average_is_found_again():
    steps, gammas = np.repeat([100, 200, 300], 2), np.tile([17.0, 7.0], 3)
    for i in range(6):
        x = posthoc_weights(steps, gammas, steps[i], gammas[i])
        np.testing.assert_allclose(x, np.eye(6)[i], atol=1e-6)


def test_many_stored_averages_stay_tame():
    steps, gammas = np.repeat(np.arange(1, 65) * 10, 2), np.tile([17.0, 7.0], 64)
    for sigma_rel in (0.04, 0.075, 0.15, 0.25):
        x = posthoc_weights(steps, gammas, 640, gamma_of(sigma_rel))
        assert math.isclose(x.sum(), 1, rel_tol=1e-9) and abs(x).sum() < 6


def test_one_stored_average_is_all_there_is():
    np.testing.assert_allclose(posthoc_weights([100], [7.0], 100, 3.0), [1.0])


@pytest.mark.parametrize(("arguments", "message"), [
    (([], [], 10, 3.0), "need finite steps"),
    (([10], [3.0, 4.0], 10, 3.0), "need finite steps"),
    (([0], [3.0], 1, 3.0), "need finite steps"),
    (([10], [-0.6], 10, 3.0), "need finite steps"),
    (([10], [3.0], 10, -0.6), "need finite steps"),
    (([10], [3.0], 10, math.nan), "need finite steps"),
    (([10], [math.inf], 10, 3.0), "need finite steps"),
    (([math.nan], [3.0], 10, 3.0), "need finite steps"),
    (([10], [3.0], math.nan, 3.0), "need finite steps"),
    (([10], [3.0], 11, 3.0), "last stored step is 10; wanted 11")])
def test_senseless_reconstructions(arguments, message):
    with pytest.raises(ValueError, match=message):
        posthoc_weights(*arguments)


@pytest.mark.parametrize("arguments", [(["a"], [3.0], 10, 3.0), ([10], [3.0], "b", 3.0),
                                       ([10], [{}], 10, 3.0)])
def test_profiles_of_no_numbers(arguments):
    with pytest.raises(TypeError, match="steps and gammas must be numbers"):
        posthoc_weights(*arguments)


@pytest.mark.parametrize("arguments", [([-1], [1], [1], [1]), ([1], [1], [0], [1]),
                                       ([1], [-0.5], [1], [1]), ([1, 2], [1], [1], [1])])
def test_senseless_products(arguments):
    with pytest.raises(ValueError, match="need finite steps > 0 and as many gammas > -1/2"):
        profile_products(*arguments)
