"""DDPM: equivalences, closed forms, dtypes, broadcasting, refusals the chapter does not show."""

import math
from functools import partial

import pytest
import torch

from diffnotes import ddpm
from diffnotes.denoisers import Denoiser, posterior
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

PROCESSES = [VP(), SubVP(), VE(), EDM(), Cosine(), Flow(), Discrete(linear_betas(50))]
CHAIN = Discrete(linear_betas(1000))


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def chain_times(n):
    return torch.arange(n, 0, -1, dtype=torch.float64) / n


def grid(process, n=24):
    if isinstance(process, Discrete):
        return chain_times(process.n_steps)
    return torch.linspace(process.t_max, max(process.t_min, 1e-3), n, dtype=torch.float64)


MEANS = f64([[2.0, 0.0, -1.0], [-1.5, 1.0, 0.5], [0.0, -2.0, 1.5]])


@pytest.fixture(scope="module")
def law():
    """A mixture in three dimensions with full covariances, in no notebook."""
    factor = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    covariances = 0.06 * factor @ factor.mT + 0.02 * torch.eye(3, dtype=torch.float64)
    return GaussianMixture(MEANS, covariances, f64([0.5, 0.2, 0.3]))


# -- ancestral sampling ------------------------------------------------------------------------


def test_a_thousand_steps_match_mean_covariance_and_weights_of_a_mixture(law):
    """Sampling error: 4.5 standard errors; discretisation: O(1/T) of the spread, 1% allowed."""
    n = 6000
    generator = torch.Generator().manual_seed(11)

    def noise(like):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    start = noise(torch.empty(n, 3, dtype=torch.float64))
    x = ddpm.ancestral(law.denoiser(CHAIN), start, chain_times(1000), noise=noise)
    std = law.cov.diagonal().sqrt()
    assert ((x.mean(0) - law.mean).abs() < 4.5 * std / n**0.5 + 0.01 * std).all()
    centred = x - law.mean
    products = centred[:, :, None] * centred[:, None, :]
    allowed = 4.5 * products.std(0) / n**0.5 + 0.01 * std[:, None] * std
    assert ((products.mean(0) - law.cov).abs() < allowed).all()
    nearest = torch.cdist(x, MEANS).argmin(1)
    exact = torch.cdist(law.sample(200_000, generator=generator), MEANS).argmin(1)
    share, wanted = (k.bincount(minlength=3) / len(k) for k in (nearest, exact))
    assert ((share - wanted).abs() < 4.5 * (wanted * (1 - wanted) / n).sqrt() + 0.005).all()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("variance", ["large", "small"])
def test_gaussian_data_follow_the_variance_recursion_in_any_process(process, variance):
    """Every state is linear in the draws; its exact variance, against all draws one at a time."""
    times = grid(process)
    n = len(times)
    denoiser = Gaussian(f64([0.0]), f64(0.3)).denoiser(process)
    draws = torch.eye(n, dtype=torch.float64)  # sample i sees only draw i
    queue = iter(draws[1:])
    start = process.sigma(times[0]) * draws[0][:, None]
    x = ddpm.ancestral(
        denoiser, start, times, variance=variance, noise=lambda like: next(queue)[:, None]
    )
    V = process.sigma(times[0]) ** 2
    for t, s in zip(times[:-1], times[1:], strict=True):
        ratio, var = process.transition(s, t)
        a_t, v_t = process.alpha(t), process.sigma(t) ** 2
        v_s = process.sigma(s) ** 2
        gain = a_t * 0.3 / (a_t**2 * 0.3 + v_t)
        V = (ratio * v_s / v_t + process.alpha(s) * var / v_t * gain) ** 2 * V
        V = V + var * (v_s / v_t if variance == "small" else 1)
    a_t, v_t = process.alpha(times[-1]), process.sigma(times[-1]) ** 2
    V = (a_t * 0.3 / (a_t**2 * 0.3 + v_t)) ** 2 * V
    torch.testing.assert_close(x.square().sum(), V, rtol=1e-10, atol=0)


def test_large_is_exact_for_unit_variance_and_small_for_a_point_mass():
    unit = Gaussian(f64([0.0]), f64(1.0)).denoiser(CHAIN)
    draws = torch.eye(1000, dtype=torch.float64)
    queue = iter(draws[1:])
    x = ddpm.ancestral(
        unit,
        draws[0][:, None] * CHAIN.prior_std(),
        chain_times(1000),
        noise=lambda like: next(queue)[:, None],
    )
    alpha = CHAIN.alpha(1 / 1000)  # x_1 has variance 1, x0_hat = alpha x_1
    assert (
        abs(x.square().sum() / alpha**2 - 1) < 1e-4
    )  # alpha_bar_T = 4e-5 is missing at the start
    point = Denoiser(lambda x, t, cond: torch.full_like(x, 0.7), CHAIN, predicts="x0")
    states = []
    ddpm.ancestral(
        point,
        torch.randn(4000, 1, dtype=torch.float64),
        chain_times(1000),
        variance="small",
        callback=lambda i, t, x_t, x0_hat: states.append(x_t),
    )
    x_100 = states[900]  # k = 100
    assert abs(x_100.var() / CHAIN.sigma(0.1) ** 2 - 1) < 4.5 * (2 / 4000) ** 0.5
    assert abs(x_100.mean() - 0.7 * CHAIN.alpha(0.1)) < 4.5 * CHAIN.sigma(0.1) / 4000**0.5


def test_ancestral_counts_calls_reports_states_and_returns_the_last_prediction(law):
    exact, calls = law.denoiser(CHAIN), []

    def net(x, t, cond):
        calls.append((t.unique().tolist(), cond))
        return exact(x, t.double())

    times = f64([1.0, 0.5, 0.2, 0.1])
    seen = []
    label = torch.tensor([0, 1, 2])
    x_T = torch.randn(3, 3, dtype=torch.float64)
    x = ddpm.ancestral(
        Denoiser(net, CHAIN, predicts="x0"),
        x_T,
        times,
        cond=label,
        callback=lambda *report: seen.append(report),
    )
    assert [call[0][0] for call in calls] == pytest.approx(times.tolist())
    assert all(torch.equal(cond, label) for _, cond in calls)
    assert [i for i, *_ in seen] == [0, 1, 2, 3] and [t for _, t, *_ in seen] == times.tolist()
    assert torch.equal(seen[0][2], x_T) and torch.equal(seen[-1][3], x)
    assert torch.equal(seen[-1][3], exact(seen[-1][2], 0.1))
    assert seen[0][2].data_ptr() != seen[1][2].data_ptr()  # states are not overwritten


def test_one_time_is_one_evaluation_and_draws_no_noise(law):
    def refuse(like):
        raise AssertionError("noise at the last step")

    x = torch.randn(4, 3, dtype=torch.float64)
    exact = law.denoiser(CHAIN)
    assert torch.equal(ddpm.ancestral(exact, x, [0.4], noise=refuse), exact(x, 0.4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_raised_for_the_steps_and_comes_back(dtype):
    seen = []

    def net(x, t, cond):
        seen.append(x.dtype)
        return 0.5 * x

    x = ddpm.ancestral(
        Denoiser(net, CHAIN, predicts="x0"),
        torch.randn(2, 1, 4, 4).to(dtype),
        [1.0, 0.5],
        noise=torch.zeros_like,
    )
    assert x.dtype == dtype and x.shape == (2, 1, 4, 4)
    assert set(seen) == {torch.promote_types(dtype, torch.float32)}


def test_the_state_given_is_left_alone(law):
    x_T = torch.randn(5, 3, dtype=torch.float64)
    before = x_T.clone()
    ddpm.ancestral(law.denoiser(CHAIN), x_T, [1.0, 0.6, 0.3])
    assert torch.equal(x_T, before)


def test_numbers_for_the_variance_do_what_the_words_do(law):
    times, x_T = chain_times(20) * 0.9, torch.randn(5, 3, dtype=torch.float64)
    numbers = ddpm.reverse_variance(times[:-1], times[1:], CHAIN, "small")
    exact, draws = law.denoiser(CHAIN), torch.randn(19, 5, 3, dtype=torch.float64)
    results = []
    for variance in ("small", numbers, numbers.tolist()):
        replay = partial(lambda pile, x: next(pile), iter(draws))
        results.append(ddpm.ancestral(exact, x_T, times, variance=variance, noise=replay))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "times, variance, match",
    [
        ([0.2, 0.5], "large", "decrease .* got 0.5 after 0.2"),
        ([0.5, 0.5], "large", "decrease .* got 0.5 after 0.5"),
        ([1.1, 0.5], "large", r"\[0, 1\], got 1.1"),
        ([0.5, -0.1], "large", r"\[0, 1\], got -0.1"),
        ([], "large", "N >= 1"),
        ([[0.5, 0.2]], "large", "N >= 1"),
        ([0.5, math.nan], "large", r"\[0, 1\], got nan"),
        ([0.0], "large", "sigma > 0"),
        ([0.5, 0.2], "medium", "large"),
        ([0.5, 0.2], torch.ones(2), "variance"),
        ([0.5, 0.2], [-1.0], "variance"),
        ([0.5, 0.2], [math.nan], "variance"),
    ],
)
def test_ancestral_refuses(law, times, variance, match):
    with pytest.raises(ValueError, match=match):
        ddpm.ancestral(
            law.denoiser(CHAIN), torch.randn(2, 3), torch.tensor(times), variance=variance
        )


def test_the_factors_of_a_step_on_the_chain():
    k = torch.arange(1000, 1, -1)
    bars, beta = CHAIN.alpha_bar, CHAIN.betas[k - 1]
    on_x, on_x0, on_noise = ddpm.ancestral_coefficients(CHAIN, chain_times(1000))
    before, after = bars[k - 1], bars[k]
    expected = (1 - beta).sqrt() * (1 - before) / (1 - after), before.sqrt() * beta / (1 - after)
    for found, wanted in zip((on_x, on_x0, on_noise**2), (*expected, beta), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert torch.equal(
        ddpm.ancestral_coefficients(CHAIN, f64([0.3, 0.2]), [4.0])[2], f64([2.0])
    )


@pytest.mark.parametrize("predicts", ["eps", "v", "score", "velocity"])
def test_ancestral_walks_alike_in_every_coordinate(law, predicts):
    exact, start = law.denoiser(CHAIN), torch.randn(5, 3, dtype=torch.float64)
    told = Denoiser(
        lambda x, t, cond: getattr(exact, predicts)(x, t), CHAIN, predicts, dtype=torch.float64
    )
    draws = torch.randn(19, 5, 3, dtype=torch.float64)
    ends = []
    for denoiser in (exact, told):
        replay = partial(lambda pile, x: next(pile), iter(draws))
        ends.append(ddpm.ancestral(denoiser, start, chain_times(20), noise=replay))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [VP(), CHAIN], ids=["VP", "Discrete"])
def test_the_step_to_the_data_is_the_one_without_noise(process, law):
    """A last time 0 adds nothing: x0_hat, or the decoder, is that step."""
    exact, x = law.denoiser(process), law.sample(4)
    results = []
    for times in ([1.0, 0.5, 0.1], [1.0, 0.5, 0.1, 0.0]):
        generator = torch.Generator().manual_seed(2)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        state = ddpm.ancestral(exact, x, times, noise=lambda like, draw=draw: draw(like.shape))
        bound = ddpm.variational_bound(exact, x, times, generator=generator)
        results.append((state, *bound))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2].shape == (4, 2)


def test_an_integer_state_is_refused(law):
    with pytest.raises(TypeError, match="x_T"):
        ddpm.ancestral(law.denoiser(CHAIN), torch.zeros(2, 3, dtype=torch.int64), [0.5, 0.2])


# -- the reverse step ----------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_mean_from_the_noise_is_the_posterior_mean_in_any_process(process):
    x0, eps = torch.randn(2, 6, 2, dtype=torch.float64)
    for t, s in (
        (f64(0.6), f64(0.3)),
        (f64([0.3, 0.4, 0.5, 0.6, 0.7, 0.8]), f64([0.1, 0.2, 0.3, 0.4, 0.5, 0.7])),
    ):
        x_t = process.perturb(x0, t, eps)
        expected, _ = posterior(x0, x_t, s, t, process)
        torch.testing.assert_close(
            ddpm.ddpm_mean(x_t, eps, t, s, process), expected, rtol=1e-9, atol=1e-9
        )


def test_the_mean_at_alpha_zero_is_refused():
    with pytest.raises(ValueError, match="alpha"):
        ddpm.ddpm_mean(torch.ones(2, 1), torch.ones(2, 1), 1.0, 0.5, Flow())


def test_the_two_variances_on_the_chain():
    k = torch.arange(2, 1001, dtype=torch.float64)
    bars = (1 - linear_betas(1000)).cumprod(0)
    large = ddpm.reverse_variance(k / 1000, (k - 1) / 1000, CHAIN)
    small = ddpm.reverse_variance(k / 1000, (k - 1) / 1000, CHAIN, "small")
    torch.testing.assert_close(large, linear_betas(1000)[1:], rtol=1e-11, atol=0)
    expected = (1 - bars[:-1]) / (1 - bars[1:]) * linear_betas(1000)[1:]
    torch.testing.assert_close(small, expected, rtol=1e-11, atol=0)
    with pytest.raises(ValueError, match="kind"):
        ddpm.reverse_variance(0.5, 0.4, CHAIN, "middle")


def test_learned_range_broadcasts_and_interpolates_logarithms():
    t, s = f64([0.5, 0.6]), f64([0.4, 0.5])
    v = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    small, large = (
        ddpm.reverse_variance(t, s, CHAIN, kind)[:, None, None, None]
        for kind in ("small", "large")
    )
    torch.testing.assert_close(ddpm.learned_range_var(v, t, s, CHAIN), large**v * small ** (1 - v))
    assert (ddpm.learned_range_var(v + 2, t, s, CHAIN) > large).all()  # unbounded
    with pytest.raises(ValueError, match="no range"):
        ddpm.learned_range_var(v, f64([0.5, 0.001]), f64([0.4, 0.0]), CHAIN)


# -- the bound -----------------------------------------------------------------------------------


def test_gaussian_kl_against_torch_for_every_shape_of_variance():
    generator = torch.Generator().manual_seed(0)
    m, n = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)
    shapes = [(), (4,), (4, 3, 2)]
    for a in shapes:
        for b in shapes:
            v, w = (
                torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
                for shape in (a, b)
            )
            full = [x.reshape(4, 1, 1) if x.shape == (4,) else x for x in (v, w)]
            q, p = (
                torch.distributions.Normal(c, x.sqrt().expand(4, 3, 2))
                for c, x in zip((m, n), full, strict=True)
            )
            expected = torch.distributions.kl_divergence(q, p).sum((1, 2))
            torch.testing.assert_close(ddpm.gaussian_kl(m, v, n, w), expected)


def test_the_bound_on_gaussian_data_has_its_closed_form():
    """Data N(0, v) under Discrete, exact denoiser: every expected term is known."""
    process, v, T = Discrete(cosine_betas(10)), 0.4, 10
    law = Gaussian(torch.zeros(2, dtype=torch.float64), f64(v))
    generator = torch.Generator().manual_seed(3)
    x0 = law.sample(40_000, generator=generator)
    for variance in ("large", "small"):
        bound = ddpm.variational_bound(
            law.denoiser(process), x0, chain_times(T), variance=variance, generator=generator
        )
        assert bound.steps.shape == (40_000, T - 1)
        bars, betas = process.alpha_bar, process.betas
        expected = []
        for k in range(T, 1, -1):
            beta, bar, before = betas[k - 1], bars[k], bars[k - 1]
            tilde = beta * (1 - before) / (1 - bar)
            tau2 = beta if variance == "large" else tilde
            error = v * (1 - bar) / (bar * v + 1 - bar)
            gain2 = before * beta**2 / (1 - bar) ** 2
            expected.append(tilde / tau2 - 1 - (tilde / tau2).log() + gain2 * error / tau2)
        se = bound.steps.std(0) / 200
        assert ((bound.steps.mean(0) - torch.stack(expected)).abs() < 4.5 * se + 1e-12).all()
        error = v * (1 - bars[1]) / (bars[1] * v + 1 - bars[1])
        decoder = error / betas[0] + (2 * math.pi * betas[0]).log()
        assert abs(bound.decoder.mean() - decoder) < 4.5 * bound.decoder.std() / 200
        prior = bars[T] / (1 - bars[T]) * x0.square().sum(1) / 2
        torch.testing.assert_close(bound.prior, prior)
        assert bound.total.mean() > 1 + math.log(2 * math.pi * v)  # the entropy, d = 2
        torch.testing.assert_close(bound.total, bound.prior + bound.steps.sum(1) + bound.decoder)


def test_a_chain_of_one_step_has_a_prior_and_a_decoder_only(law):
    bound = ddpm.variational_bound(law.denoiser(CHAIN), law.sample(7), [1.0])
    assert bound.steps.shape == (7, 0) and bound.total.shape == (7,)


def test_every_term_has_fresh_noise_and_the_generator_decides(law):
    x0, exact = law.sample(2000), law.denoiser(CHAIN)
    first, again = (
        ddpm.variational_bound(
            exact, x0, chain_times(50), generator=torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    )
    assert torch.equal(first.total, again.total)
    neighbours = torch.corrcoef(first.steps[:, -6:].T)  # late steps: noise decides
    assert neighbours.fill_diagonal_(0).abs().max() < 0.5


def test_prior_kl_against_torch_and_with_the_papers_prior():
    x0 = torch.randn(5, 2, dtype=torch.float64)
    alpha, sigma = CHAIN.alpha(1.0), CHAIN.sigma(1.0)
    for std, given in ((sigma, None), (f64(1.0), 1.0)):
        q, p = torch.distributions.Normal(alpha * x0, sigma), torch.distributions.Normal(0.0, std)
        expected = torch.distributions.kl_divergence(q, p).sum(1)
        torch.testing.assert_close(
            ddpm.prior_kl(x0, 1.0, CHAIN, given), expected, rtol=1e-9, atol=1e-12
        )


def test_step_kl_takes_batched_times_and_variances():
    x0, x_t, x0_hat = torch.randn(3, 4, 1, 2, 2, dtype=torch.float64)
    t, s = f64([0.2, 0.4, 0.6, 0.8]), f64([0.1, 0.3, 0.4, 0.7])
    var = ddpm.reverse_variance(t, s, CHAIN)
    batched = ddpm.step_kl(x0, x_t, x0_hat, t, s, CHAIN)
    for given in (var, var[:, None, None, None].expand_as(x0)):
        torch.testing.assert_close(ddpm.step_kl(x0, x_t, x0_hat, t, s, CHAIN, given), batched)
    for i in range(4):
        alone = ddpm.step_kl(
            x0[i : i + 1], x_t[i : i + 1], x0_hat[i : i + 1], t[i].item(), s[i].item(), CHAIN
        )
        torch.testing.assert_close(alone, batched[i : i + 1])


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_weight_is_the_divergence_per_squared_error_in_any_process(process):
    x0, eps, eps_hat = torch.randn(3, 6, 2, dtype=torch.float64)
    for kind in ("large", "small"):
        x_t = process.perturb(x0, 0.6, eps)
        x0_hat = (x_t - process.sigma(0.6) * eps_hat) / process.alpha(0.6)
        args = (0.6, 0.5, process, kind)
        gap = ddpm.step_kl(x0, x_t, x0_hat, *args) - ddpm.step_kl(x0, x_t, x0, *args)
        expected = ddpm.bound_weight(*args) * (eps - eps_hat).square().sum(1)
        torch.testing.assert_close(gap, expected, rtol=1e-8, atol=1e-10)
    assert math.isinf(ddpm.bound_weight(0.02, 0.0, PROCESSES[-1], "small"))


@pytest.mark.parametrize("shape", [(), (3,), (1, 4, 4)])
def test_simple_loss_is_one_number_a_sample_for_any_event(shape):
    process = VP()
    x0, eps = torch.randn(2, 5, *shape)
    for t in (0.3, torch.tensor(0.3), torch.rand(5)):
        loss = ddpm.simple_loss(Denoiser(lambda x, u, c: torch.zeros_like(x), process), x0, t, eps)
        torch.testing.assert_close(loss, eps.square().reshape(5, -1).mean(1))


def test_simple_loss_hands_on_the_condition():
    seen = []
    denoiser = Denoiser(lambda x, t, cond: seen.append(cond) or x, VP())
    ddpm.simple_loss(denoiser, torch.randn(2, 3), 0.5, torch.randn(2, 3), torch.tensor([4, 2]))
    assert seen[0].tolist() == [4, 2]


# -- the decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "levels",
    [
        torch.linspace(-1, 1, 17),
        torch.linspace(0, 1, 256),
        torch.tensor([0.0, 1.0]),
        torch.tensor([-1.0, 0.0, 0.1, 3.0]),
    ],
)
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_bins_sum_to_one_for_any_levels(levels, dtype, atol):
    means = torch.tensor([[-2.0, 0.03, 0.5, 5.0]], dtype=dtype)
    for std in (0.02, 0.3, 3.0):
        total = sum(
            ddpm.decoder_log_prob(
                level.expand(4, 1).to(dtype), means.T, torch.tensor(std**2), levels
            ).exp()
            for level in levels
        )
        torch.testing.assert_close(total, torch.ones(4, dtype=dtype), atol=atol, rtol=0)


def test_every_bin_reaches_half_way_to_its_neighbours():
    levels, ndtr = f64([-1.0, 0.0, 0.1, 3.0]), torch.special.ndtr
    edges = f64([-math.inf, -0.5, 0.05, 1.55, math.inf])
    mean, std = f64(0.2), f64(0.7)
    got = ddpm.decoder_log_prob(levels[:, None], mean.expand(4, 1), std**2, levels)
    expected = (ndtr((edges[1:] - mean) / std) - ndtr((edges[:-1] - mean) / std)).log()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_bins_are_finite_symmetric_and_have_gradients(dtype):
    levels = torch.linspace(-1, 1, 17, dtype=dtype)
    x0 = torch.tensor([[1.0], [-1.0], [0.0], [0.0], [1.0], [-1.0]], dtype=dtype)
    mean = torch.tensor(
        [[-1.0], [1.0], [1.0], [-1.0], [5.0], [-5.0]], dtype=dtype, requires_grad=True
    )
    var = torch.full((6,), 1e-4, dtype=dtype, requires_grad=True)
    value = ddpm.decoder_log_prob(x0, mean, var, levels)
    assert value.isfinite().all()
    torch.testing.assert_close(value[0::2], value[1::2][[0, 1, 2]])
    value.sum().backward()
    assert mean.grad.isfinite().all() and var.grad.isfinite().all()
    assert mean.grad[0] > 0 > mean.grad[1]


def test_decoder_gradients_are_those_of_the_formula():
    levels = torch.linspace(-1, 1, 5, dtype=torch.float64)
    x0 = levels[[0, 2, 3, 4]][:, None]
    mean, var = (
        torch.randn(4, 1, dtype=torch.float64, requires_grad=True),
        f64([0.3]).requires_grad_(),
    )
    assert torch.autograd.gradcheck(
        lambda m, v: ddpm.decoder_log_prob(x0, m, v.expand(4), levels), (mean, var)
    )


def test_decoder_as_a_density_is_torchs_normal():
    x0, mean = torch.randn(2, 4, 3, dtype=torch.float64)
    for var in (
        f64(0.3),
        torch.rand(4, dtype=torch.float64),
        torch.rand(4, 3, dtype=torch.float64),
    ):
        std = (var[:, None] if var.shape == (4,) else var).sqrt().expand(4, 3)
        expected = torch.distributions.Normal(mean, std).log_prob(x0).sum(1)
        torch.testing.assert_close(ddpm.decoder_log_prob(x0, mean, var), expected)


def test_data_off_the_levels_are_refused():
    levels = torch.linspace(-1, 1, 17)
    with pytest.raises(ValueError, match="levels"):
        ddpm.decoder_log_prob(
            torch.full((2, 3), 0.05), torch.zeros(2, 3), torch.tensor(1.0), levels
        )


def test_the_bound_of_pixels_clips_predictions_to_their_range():
    wild = Denoiser(lambda x, t, cond: torch.full_like(x, 50.0), CHAIN, predicts="x0")
    levels = torch.linspace(-1, 1, 17)
    white = torch.ones(3, 1, 2, 2)
    bound = ddpm.variational_bound(wild, white, [1.0, 0.5, 0.1], variance="small", levels=levels)
    torch.testing.assert_close(bound.steps, torch.zeros(3, 2), atol=1e-4, rtol=0)


def test_bits():
    assert ddpm.bits_per_dim(f64(64 * math.log(2)), 64) == pytest.approx(1.0)
    assert ddpm.bits_per_dim(torch.ones(3, 2), 4).shape == (3, 2)


# -- what is refused -----------------------------------------------------------------------------

LEVELS = torch.linspace(-1, 1, 17)


@pytest.mark.parametrize(
    "changes, error, match",
    [
        (dict(decoder_var=-1.0), ValueError, "decoder_var .* got -1.0"),
        (dict(decoder_var=0.0), ValueError, "decoder_var .* got 0.0"),
        (dict(decoder_var=math.nan), ValueError, "decoder_var .* got nan"),
        (dict(variance=[0.0]), ValueError, "variance must be > 0 .* got 0"),
        (dict(variance=[math.nan]), ValueError, r"variance .* got \[nan\]"),
        (dict(variance=[-1.0]), ValueError, r"variance .* got \[-1.0\]"),
        (dict(x0=torch.full((2, 3), math.nan)), ValueError, "x0 must be finite, got nan"),
        (dict(x0=torch.zeros(2, 3).int()), TypeError, "x0 must be .*int32"),
        (dict(x0=torch.zeros(2, 3).numpy()), TypeError, "x0 must be .*ndarray"),
        (dict(levels=torch.tensor([1.0])), ValueError, r"levels .* got \[1.0\]"),
        (dict(levels=[1.0, 0.0]), ValueError, "levels must be two or more increasing"),
        (dict(denoiser=torch.nn.Identity()), TypeError, "Denoiser.*got Identity"),
        (dict(times=[0.5, 0.5]), ValueError, "decrease .* got 0.5 after 0.5"),
        (dict(times=[0.0]), ValueError, "sigma > 0"),
    ],
)
def test_the_bound_refuses(changes, error, match):
    model = Denoiser(lambda x, t: 0 * x, CHAIN)
    good = dict(denoiser=model, x0=torch.zeros(2, 3), times=[1.0, 0.5], levels=LEVELS)
    assert ddpm.variational_bound(**good).total.isfinite().all()
    with pytest.raises(error, match=match):
        ddpm.variational_bound(**{**good, **changes})


def test_levels_may_be_a_list_and_nan_is_on_none():
    x0, var = torch.zeros(2, 3), torch.tensor(0.1)
    as_list = ddpm.decoder_log_prob(x0, x0, var, LEVELS.tolist())
    assert torch.equal(as_list, ddpm.decoder_log_prob(x0, x0, var, LEVELS))
    for bad in (math.nan, -0.03, 0.03):
        with pytest.raises(ValueError, match="levels"):
            ddpm.decoder_log_prob(x0 + bad, x0, var, LEVELS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ancestral_refuses_a_state_that_is_not_finite(bad):
    model = Denoiser(lambda x, t: 0 * x, CHAIN)
    with pytest.raises(ValueError, match=f"x_T must be finite, got {bad}"):
        ddpm.ancestral(model, torch.tensor([[0.0, bad]]), [1.0, 0.5])
    with pytest.raises(TypeError, match="Denoiser.*got Identity"):
        ddpm.ancestral(torch.nn.Identity(), torch.zeros(2, 3), [1.0, 0.5])


def test_empty_batches():
    model, none = Denoiser(lambda x, t: 0 * x, CHAIN), torch.zeros(0, 3)
    assert ddpm.gaussian_kl(none, torch.tensor(1.0), none, torch.tensor(2.0)).shape == (0,)
    assert ddpm.simple_loss(model, none, 0.5, none).shape == (0,)
    for levels in (None, LEVELS):
        bound = ddpm.variational_bound(model, none, [1.0, 0.5], levels=levels)
        assert bound.total.shape == (0,) and bound.steps.shape == (0, 1)


def test_ancestral_on_a_device_does_not_look():
    model, x_T = Denoiser(lambda x, t: 0 * x, CHAIN), torch.empty(2, 3, device="meta")
    assert ddpm.ancestral(model, x_T, [1.0, 0.5]).shape == (2, 3)
