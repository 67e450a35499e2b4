"""Score SDEs: equivalences, closed forms, counting, dtypes, shapes, devices and refusals."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffnotes import sde
from diffnotes.ddpm import ancestral, simple_loss
from diffnotes.denoisers import Denoiser
from diffnotes.mixtures import Empirical, Gaussian, GaussianMixture
from diffnotes.networks import MLP
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
from diffnotes.samplers import nfe, sample
from diffnotes.stepping import SAMPLERS, time_grid, walk

PROCESSES = [VP(), SubVP(), VE(), EDM(), Cosine(), Flow(), Discrete(linear_betas(50))]
NAMES = ["euler_maruyama", "probability_flow", "reverse_diffusion", "pc"]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
each_sampler = pytest.mark.parametrize("name", NAMES)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def replay(draws):
    pile = iter(draws)
    return lambda x: next(pile)


def pull(process, **options):
    """A denoiser that acts on each entry alone."""
    return Denoiser(lambda x, t: torch.tanh(x), process, "x0", **options)


@pytest.fixture(scope="module")
def law():
    """Three components in three dimensions, in no notebook."""
    means = f64([[1.5, 0.0, -0.5], [-1.0, 0.8, 0.5], [0.0, -1.2, 1.0]])
    factor = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    covariances = 0.05 * factor @ factor.mT + 0.05 * torch.eye(3, dtype=torch.float64)
    return GaussianMixture(means, covariances, f64([0.5, 0.2, 0.3]))


# -- samplers: equivalences -----------------------------------------------------------------------


@each_process
def test_euler_maruyama_is_simulate_of_the_reverse_drift(law, process):
    times, exact = time_grid(process, 12), law.denoiser(process)
    x_T = process.sigma(times[0]) * torch.randn(5, 3, dtype=torch.float64)
    z = torch.randn(11, 5, 3, dtype=torch.float64)
    for churn in (0.0, 0.6, 1.0, 1.4):
        path = sde.simulate(
            partial(sde.reverse_drift, exact, churn=churn),
            lambda t, churn=churn: churn * process.diffusion(t),
            x_T,
            times,
            noise=replay(z),
        )
        states = []
        found = sde.euler_maruyama(
            exact,
            x_T,
            times,
            churn=churn,
            noise=replay(z),
            callback=lambda i, t, x, x0: states.append(x),  # noqa: B023
        )
        scale = path.abs().max().item()
        torch.testing.assert_close(torch.stack(states), path, rtol=1e-9, atol=1e-9 * scale)
        torch.testing.assert_close(found, exact(path[-1], times[-1].item()), rtol=1e-8, atol=1e-8)


@each_process
def test_the_flow_is_the_reversal_without_noise(law, process):
    times, x_T = time_grid(process, 9), process.prior_sample((4, 3), dtype=torch.float64)

    def refuse(x):
        raise AssertionError("the flow draws no noise")

    exact = law.denoiser(process)
    flow = sde.probability_flow(exact, x_T, times, noise=refuse)
    silent = sde.euler_maruyama(exact, x_T, times, noise=torch.zeros_like, churn=0.0)
    torch.testing.assert_close(flow, silent, rtol=1e-9, atol=1e-9)


def test_reverse_diffusion_is_ancestral_sampling_where_alpha_is_one(law):
    for process in (VE(), EDM()):
        times, x_T = time_grid(process, 15), process.prior_sample((4, 3), dtype=torch.float64)
        z, exact = torch.randn(14, 4, 3, dtype=torch.float64), law.denoiser(process)
        found = sde.reverse_diffusion(exact, x_T, times, noise=replay(z))
        torch.testing.assert_close(found, ancestral(exact, x_T, times, noise=replay(z)))


@pytest.mark.parametrize("make", [linear_betas, cosine_betas])
def test_on_a_chain_it_is_ancestral_sampling_to_first_order(law, make):
    """The same noise on chains that double in length: the distance halves."""
    distances = []
    for n in (100, 200, 400):
        process = Discrete(make(n))
        times = torch.arange(n, n // 10, -1, dtype=torch.float64) / n
        x_T = process.prior_std() * torch.ones(6, 3, dtype=torch.float64)
        generator = torch.Generator().manual_seed(4)
        fine = torch.randn(400, 6, 3, generator=generator, dtype=torch.float64)
        z = fine.reshape(n, 400 // n, 6, 3).sum(1) / (400 // n) ** 0.5
        exact = Gaussian(f64([0.3, -0.2, 0.0]), f64(0.4)).denoiser(process)
        pair = [f(exact, x_T, times, noise=replay(z)) for f in (sde.reverse_diffusion, ancestral)]
        distances.append((pair[0] - pair[1]).abs().mean().item())
    for before, after in zip(distances[:-1], distances[1:], strict=True):
        assert 0.8 < math.log2(before / after) < 1.25


def test_coefficients_of_the_chain_and_of_the_ladder():
    betas = linear_betas(40)
    k = torch.arange(40, 0, -1, dtype=torch.float64)
    chain = Discrete(betas)
    on_x, on_x0, on_noise = sde.reverse_diffusion_coefficients(chain, k / 40)
    beta, variance = betas.flip(0)[:-1], 1 - chain.alpha_bar.flip(0)[:-2]
    torch.testing.assert_close(on_x, 2 - (1 - beta).sqrt() - beta / variance, rtol=1e-10, atol=0)
    torch.testing.assert_close(on_noise, beta.sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(on_x0, beta / variance * (1 - variance).sqrt(), rtol=1e-10, atol=0)
    ladder, times = VE(), torch.linspace(1, 0, 30, dtype=torch.float64)
    squares = ladder.sigma(times) ** 2
    on_x, on_x0, on_noise = sde.reverse_diffusion_coefficients(ladder, times)
    torch.testing.assert_close(on_noise, (squares[:-1] - squares[1:]).sqrt())
    torch.testing.assert_close(on_x, squares[1:] / squares[:-1])
    torch.testing.assert_close(on_x + on_x0, torch.ones(29, dtype=torch.float64))


@each_process
def test_a_small_step_is_the_same_in_every_predictor(process):
    t = f64([0.6, 0.6 - 1e-6]) if not isinstance(process, Discrete) else f64([0.6, 0.58])
    a = sde.reverse_sde_coefficients(process, t)
    b = sde.reverse_diffusion_coefficients(process, t)
    tolerance = 1e-9 if not isinstance(process, Discrete) else 0.06
    for mine, other in zip(a, b, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("name", ["euler_maruyama", "reverse_diffusion", "probability_flow"])
@each_process
def test_samples_have_the_law(law, name, process):
    """Mean and covariance of the mixture; 4.5 standard errors, 4% of a variance for the steps."""
    generator = torch.Generator().manual_seed(6)
    exact = law.denoiser(process)
    times = time_grid(process, 50 if isinstance(process, Discrete) else 150)
    x_T = law.marginal(process, times[0]).sample(3000, generator=generator)
    fresh = partial(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype))
    x = SAMPLERS[name].fn(exact, x_T, times, noise=fresh)
    if isinstance(process, Discrete):  # fifty steps: 15%
        allowed = 0.15
    else:
        allowed = 0.1 if name == "probability_flow" else 0.04
    std = law.cov.diagonal().sqrt()
    assert ((x.mean(0) - law.mean).abs() < 4.5 * std / 3000**0.5 + allowed * std / 2).all()
    ratio = x.var(0) / law.cov.diagonal()
    assert ((ratio - 1).abs() < 4.5 * (2 / 3000) ** 0.5 + allowed).all()


# -- samplers: contract ---------------------------------------------------------------------------


@each_process
@each_sampler
def test_a_single_point_is_reached_exactly(process, name):
    """With x0_hat right at once the last step lands on it, whatever went before."""
    point = f64([[1.5, -0.5]])
    for steps in (1, 2, 30):
        found = sample(Empirical(point).denoiser(process), 4, sampler=name, steps=steps, seed=0)
        torch.testing.assert_close(found, point.expand(4, 2), rtol=0, atol=1e-12)


@each_sampler
@pytest.mark.parametrize("n", [1, 2, 7])
def test_evaluations_are_counted_truly(name, n):
    calls = []
    counting = Denoiser(lambda x, t: calls.append(1) or torch.tanh(x), VP(), "x0", (2,))
    sample(counting, 3, sampler=name, steps=n, seed=0)
    assert len(calls) == nfe(name, n) == SAMPLERS[name].evaluations(n)


@pytest.mark.parametrize("n_corrector", [0, 1, 2, 3])
def test_a_partial_corrector_is_counted_truly(n_corrector):
    calls, chosen = [], partial(sde.predictor_corrector, n_corrector=n_corrector)
    counting = Denoiser(lambda x, t: calls.append(1) or torch.tanh(x), VP(), "x0", (2,))
    sample(counting, 3, sampler=chosen, steps=7, seed=0)
    assert len(calls) == nfe(chosen, 7) == 7 + 6 * n_corrector
    assert nfe(partial(chosen, snr=0.1), 7) == len(calls)


@pytest.mark.parametrize("n_corrector", [0, 1, 3])
def test_correctors_cost_what_they_say_and_come_after_each_step(n_corrector):
    asked, reports = [], []
    net = Denoiser(lambda x, t: asked.append(t[0].item()) or torch.tanh(x), VP(), "x0")
    times = [1.0, 0.5, 0.2, 0.1]
    sde.predictor_corrector(
        net,
        torch.randn(3, 2, dtype=torch.float64),
        times,
        n_corrector=n_corrector,
        callback=lambda i, t, x, x0: reports.append((i, t)),
    )
    expected = [1.0] + [t for t in times[1:] for _ in range(n_corrector + 1)]
    assert asked == pytest.approx(expected) and reports == list(enumerate(times))


@each_sampler
def test_first_samples_do_not_depend_on_how_many(name):
    process = VP()
    few, many = (
        sample(pull(process, shape=(5,), dtype=torch.float64), n, sampler=name, steps=9, seed=3)
        for n in (3, 40)
    )
    torch.testing.assert_close(few, many[:3], rtol=1e-12, atol=1e-12)


def test_a_neighbour_does_not_move_a_sample():
    """Norms are each sample's own: a wild neighbour changes nothing."""
    process, z = VP(), torch.randn(20, 2, 6, dtype=torch.float64)
    x_T = torch.randn(2, 6, dtype=torch.float64)
    wild = torch.stack([x_T[0], 1e3 * x_T[1]])
    a, b = (
        sde.predictor_corrector(
            pull(process), x, time_grid(process, 10), noise=replay(z), n_corrector=1
        )
        for x in (x_T, wild)
    )
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


@each_sampler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(name, dtype):
    seen = []

    def net(x, t):
        seen.append(x.dtype)
        return 0.5 * x

    x_T = torch.randn(2, 1, 4, 4).to(dtype)
    x = SAMPLERS[name].fn(Denoiser(net, VP(), "x0"), x_T, [1.0, 0.5, 0.1], noise=torch.zeros_like)
    assert x.dtype == dtype and x.shape == x_T.shape and x.isfinite().all()
    assert set(seen) == {torch.promote_types(dtype, torch.float32)}


@each_sampler
@pytest.mark.parametrize("predicts", ["eps", "v", "score", "velocity", "x0"])
def test_every_coordinate_gives_the_same_samples(law, name, predicts):
    from diffnotes.denoisers import convert

    process = VP()
    exact = law.denoiser(process)

    def net(x, t):
        return convert(exact(x, t), x, t, process, "x0", predicts)

    other = Denoiser(net, process, predicts, dtype=torch.float64)
    times, z = time_grid(process, 8), torch.randn(30, 4, 3, dtype=torch.float64)
    x_T = process.prior_sample((4, 3), dtype=torch.float64)
    ends = [SAMPLERS[name].fn(d, x_T, times, noise=replay(z)) for d in (exact, other)]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-7, atol=1e-7)


@each_sampler
def test_states_conditions_and_gradients(name):
    seen, times = [], [1.0, 0.6, 0.3]

    def net(x, t, cond):
        seen.append(cond)
        return torch.tanh(x) + cond[:, None]

    x_T = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    before, states = x_T.detach().clone(), []
    x = SAMPLERS[name].fn(
        Denoiser(net, VP(), "x0"),
        x_T,
        times,
        cond=torch.tensor([0, 4, 2]),
        noise=torch.ones_like,
        callback=lambda i, t, x, x0: states.append(x),
    )
    assert torch.equal(x_T.detach(), before) and torch.equal(states[0].detach(), before)
    assert all(cond.tolist() == [0, 4, 2] for cond in seen)
    assert len({state.data_ptr() for state in states}) == 3
    (gradient,) = torch.autograd.grad(x.sum(), x_T)
    assert gradient.isfinite().all() and gradient.abs().min() > 0


@each_sampler
def test_empty_batches_and_scalars_per_sample(name):
    fn, model = SAMPLERS[name].fn, pull(VP())
    assert fn(model, torch.zeros(0, 3), [1.0, 0.5]).shape == (0, 3)
    assert fn(model, torch.zeros(4), [1.0, 0.5]).shape == (4,)


@each_sampler
def test_a_device_is_not_looked_at(name):
    x_T = torch.empty(2, 3, device="meta")
    assert SAMPLERS[name].fn(pull(VP()), x_T, [1.0, 0.5, 0.2]).shape == (2, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_sampler
def test_no_wait_for_the_device(name):
    net = MLP(2).cuda()
    denoiser = Denoiser(net, VP(), "eps", (2,))
    x_T, times = torch.randn(4, 2, device="cuda"), time_grid(VP(), 5)
    SAMPLERS[name].fn(denoiser, x_T, times)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = SAMPLERS[name].fn(denoiser, x_T, times)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.device.type == "cuda" and x.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_rest_runs_on_a_device():
    denoiser, x = Denoiser(MLP(2).cuda(), VP(), "eps", (2,)), torch.randn(4, 2, device="cuda")
    t = torch.full((4,), 0.5, device="cuda")
    path = sde.simulate(VP().drift, VP().diffusion, x, [0.1, 0.2, 0.3])
    loss = sde.score_loss(denoiser, x, t, torch.randn_like(x), "likelihood")
    told = sde.conditioned(denoiser, lambda x, t, y: -x.square().sum(1))
    assert path.shape == (3, 4, 2) and loss.shape == (4,)
    for found in (path, loss, told(x, 0.5), sde.reverse_drift(denoiser, x, t)):
        assert found.device.type == "cuda" and found.isfinite().all()


# -- simulate -------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6, unique=True),
    st.booleans(),
    st.sampled_from([(), (2,), (1, 2, 2)]),
)
@settings(max_examples=40, deadline=None)
def test_simulate_keeps_times_shapes_and_the_start(times, backwards, shape):
    times, x = sorted(times, reverse=backwards), torch.randn(3, *shape, dtype=torch.float64)
    path = sde.simulate(lambda x, t: torch.ones_like(x), lambda t: 0.0, x, times)
    assert path.shape == (len(times), 3, *shape) and torch.equal(path[0], x)
    torch.testing.assert_close(path[-1], x + times[-1] - times[0])


@given(st.lists(st.floats(allow_nan=True), max_size=4))
@settings(max_examples=60, deadline=None)
def test_simulate_refuses_any_other_times(times):
    gaps = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
    inside = all(0 <= t <= 1 for t in times) and times
    if inside and (all(g > 0 for g in gaps) or all(g < 0 for g in gaps)):
        return
    with pytest.raises(ValueError, match="times must"):
        sde.simulate(VP().drift, VP().diffusion, torch.zeros(2, 1), times)


@each_process
def test_the_forward_paths_have_the_processes_marginals(process):
    """From a point at t_min; 4.5 standard errors and 2% for the steps."""
    low, high = max(process.t_min, 0.05), 0.7
    generator = torch.Generator().manual_seed(0)
    x0, n = torch.full((8000,), 1.5, dtype=torch.float64), 500
    times = torch.linspace(low, high, n + 1, dtype=torch.float64)
    fresh = partial(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype))
    end = sde.simulate(process.drift, process.diffusion, x0, times, noise=fresh)[-1]
    ratio, var = process.transition(low, high)
    assert (end.mean() - 1.5 * ratio).abs() < 4.5 * (var / 8000).sqrt() + 0.02 * ratio
    assert (end.var() / var - 1).abs() < 4.5 * (2 / 8000) ** 0.5 + 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_simulate_keeps_the_dtype(dtype):
    wide, seen = torch.promote_types(dtype, torch.float32), []
    path = sde.simulate(
        lambda x, t: seen.append(x.dtype) or x,
        VP().diffusion,
        torch.ones(2, 3).to(dtype),
        [0, 0.1],
    )
    assert path.dtype == dtype and seen == [wide]


# -- drift, loss, condition -----------------------------------------------------------------------


@each_process
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_reverse_drift_broadcasts_its_times(process, dtype):
    x, model = torch.randn(4, 2, 3, dtype=torch.float64).to(dtype), pull(process)
    one = sde.reverse_drift(model, x, 0.4, churn=0.5)
    many = sde.reverse_drift(model, x, torch.full((4,), 0.4, dtype=torch.float64), churn=0.5)
    assert one.dtype == many.dtype == dtype and one.shape == x.shape
    torch.testing.assert_close(one, many)


@each_process
@given(churn=st.floats(0, 3), t=st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_churn_only_scales_the_score(process, churn, t):
    x, model = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], pull(process)
    flow = sde.reverse_drift(model, x, t, churn=0.0)
    found = sde.reverse_drift(model, x, t, churn=churn) - flow
    wanted = -(churn**2) / 2 * process.diffusion(t) ** 2 * model.score(x, t)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * (1 + flow.abs().max().item()))
    velocity = model.velocity(x, t)
    scale = velocity.abs().max().item()
    torch.testing.assert_close(flow, velocity, rtol=1e-8, atol=1e-9 * (1 + scale))


@pytest.mark.parametrize("shape", [(), (3,), (1, 4, 4)])
def test_score_loss_sums_over_any_event(shape):
    x0, eps = torch.randn(2, 5, *shape)
    silent = Denoiser(lambda x, t: torch.zeros_like(x), VP())
    for t in (0.3, torch.tensor(0.3), torch.rand(5).clamp(min=0.1)):
        loss = sde.score_loss(silent, x0, t, eps)
        torch.testing.assert_close(loss, eps.square().reshape(5, -1).sum(1))
        size = math.prod(shape)
        torch.testing.assert_close(loss, size * simple_loss(silent, x0, t, eps))
        weight = (VP().diffusion(t) / VP().sigma(t)) ** 2 / 2
        likely = sde.score_loss(silent, x0, t, eps, "likelihood")
        torch.testing.assert_close(likely, (weight * loss.double()).float())
        assert loss.shape == likely.shape == (5,) and likely.dtype == torch.float32


def test_score_loss_trains_and_hands_on_the_condition():
    seen, weight = [], torch.nn.Parameter(torch.tensor(0.5))

    def net(x, t, cond):
        seen.append(cond.tolist())
        return weight * x

    denoiser = Denoiser(net, VP(), "eps")
    x0, eps = torch.randn(2, 4, 2)
    loss = sde.score_loss(denoiser, x0, 0.5, eps, "likelihood", torch.tensor([3, 1, 2, 0]))
    loss.sum().backward()
    assert seen == [[3, 1, 2, 0]] and weight.grad.isfinite() and weight.grad != 0


@each_process
def test_conditioning_on_a_component_gives_its_law(law, process):
    def log_prob(x, t, y):
        return law.label_posterior(x, t, process).gather(1, y[:, None])[:, 0].log()

    told = sde.conditioned(law.denoiser(process), log_prob)
    x = law.marginal(process, 0.4).sample(12)
    for t in (0.4, torch.linspace(0.3, 0.5, 12, dtype=torch.float64)):
        for y in (torch.tensor(1), torch.arange(12) % 3):
            exact = law.posterior_mean(x, t, process, cond=y)
            torch.testing.assert_close(told(x, t, y), exact, rtol=1e-7, atol=1e-7)
    assert told.shape == (3,) and told.process == process and told.dtype == torch.float64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_sampler
def test_conditioning_works_without_a_graph(law, name, mode):
    process = VP()
    told = sde.conditioned(law.denoiser(process), lambda x, t, y: -x.square().sum(1))
    with mode():
        x = sample(told, 4, sampler=name, steps=4, seed=0)
    assert x.shape == (4, 3) and x.isfinite().all() and not x.requires_grad


def test_a_condition_of_more_axes_reaches_the_function():
    seen = []

    def log_prob(x, t, y):
        seen.append(y)
        return -(x - y).square().sum(1)

    y = torch.randn(5, 2)
    told = sde.conditioned(Denoiser(lambda x, t: 0 * x, VP(), "x0", (2,)), log_prob)
    assert told(torch.randn(5, 2), 0.5, y).shape == (5, 2) and torch.equal(seen[0], y)


# -- the corrector's step -------------------------------------------------------------------------


@given(st.floats(0.01, 1), st.floats(0.01, 10), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_step_follows_the_norms_and_stops_at_the_bound(snr, sigma, dim):
    score, z = torch.randn(2, 4, dim, dtype=torch.float64)
    free = sde.snr_step(score, z, math.inf, snr)
    wanted = 4 * snr**2 * z.square().sum(1) / score.square().sum(1)
    torch.testing.assert_close(free, wanted)
    moved, kicked = free / 2 * score.norm(dim=1), free.sqrt() * z.norm(dim=1)
    torch.testing.assert_close(moved / kicked, torch.full((4,), snr, dtype=torch.float64))
    torch.testing.assert_close(sde.snr_step(score, z, sigma, snr), wanted.clamp(max=sigma**2))


def test_a_score_that_vanishes_gives_the_bound_and_silence_gives_none():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert sde.snr_step(zero, one, 0.5).tolist() == [0.25, 0.25]
    assert sde.snr_step(zero, zero, 0.5).tolist() == [0.0, 0.0]


def test_a_predictor_may_be_any_triple():
    """Standing still, the corrector alone is Langevin dynamics; it widens by 1 + snr^2."""
    process = VE(0.5, 50.0)
    denoiser = Gaussian(torch.zeros(400, dtype=torch.float64), f64(0.01)).denoiser(process)

    def stand_still(process, times):
        n = len(times) - 1
        return torch.ones(n), torch.zeros(n), torch.zeros(n)

    states, v = [], 0.01 + process.sigma(0.0) ** 2
    torch.manual_seed(0)
    sde.predictor_corrector(
        denoiser,
        v.sqrt() * torch.randn(100, 400, dtype=torch.float64),
        [1e-9, 0.0],
        predictor=stand_still,
        n_corrector=60,
        snr=0.3,
        callback=lambda i, t, x, x0: states.append(x),
    )
    ratio = states[-1].square().mean() / v
    assert abs(ratio / 1.09 - 1) < 4.5 * (2 / 40_000) ** 0.5 + 0.01


# -- what is refused ------------------------------------------------------------------------------

BAD_TIMES = [
    ([0.2, 0.5], "decrease"),
    ([0.5, 0.5], "decrease"),
    ([1.1, 0.5], "1.1"),
    ([0.5, -0.1], "-0.1"),
    ([0.5, math.nan], "nan"),
    ([], "shape"),
    ([[0.5, 0.2]], "shape"),
    ([0.0], "sigma > 0"),
]


@each_sampler
@pytest.mark.parametrize("times, match", BAD_TIMES)
def test_samplers_refuse_times(name, times, match):
    with pytest.raises(ValueError, match=match):
        SAMPLERS[name].fn(pull(VP()), torch.zeros(2, 3), times)


@pytest.mark.parametrize("coefficients", ["reverse_sde", "reverse_diffusion"])
@pytest.mark.parametrize("times, match", BAD_TIMES)
def test_coefficients_refuse_times(coefficients, times, match):
    with pytest.raises(ValueError, match=match):
        getattr(sde, f"{coefficients}_coefficients")(VP(), times)


@each_sampler
def test_samplers_refuse_states(name):
    fn, model = SAMPLERS[name].fn, pull(VP())
    for bad in (math.nan, -math.inf):
        with pytest.raises(ValueError, match=f"x_T must be finite, got {bad}"):
            fn(model, torch.tensor([[0.0, bad]]), [1.0, 0.5])
    with pytest.raises(TypeError, match="x_T"):
        fn(model, torch.zeros(2, 3, dtype=torch.int64), [1.0, 0.5])
    with pytest.raises(TypeError, match="Denoiser.*got Identity"):
        fn(torch.nn.Identity(), torch.zeros(2, 3), [1.0, 0.5])


@pytest.mark.parametrize("process", [Cosine(), Flow()])
def test_the_singular_end_is_refused(process):
    for times in ([1.0, 0.5], [0.9995, 0.5]):
        for fn in (sde.euler_maruyama, sde.probability_flow):
            with pytest.raises(ValueError, match="t_max = 0.999"):
                fn(pull(process), torch.zeros(2, 3), times)
    assert sde.euler_maruyama(pull(process), torch.zeros(2, 3), [0.999, 0.9985]).isfinite().all()
    with pytest.raises(ValueError, match="infinite at t"):
        sde.reverse_drift(pull(process), torch.zeros(2, 3), 1.0)


@given(st.one_of(st.floats(max_value=-1e-9), st.just(math.nan), st.just(math.inf)))
@settings(max_examples=20, deadline=None)
def test_senseless_numbers_are_refused(bad):
    x, times = torch.zeros(2, 3), [0.5, 0.2]
    for call in (
        lambda: sde.reverse_drift(pull(VP()), x, 0.5, churn=bad),
        lambda: sde.reverse_sde_coefficients(VP(), times, churn=bad),
        lambda: sde.euler_maruyama(pull(VP()), x, times, churn=bad),
        lambda: sde.predictor_corrector(pull(VP()), x, times, snr=bad),
    ):
        with pytest.raises(ValueError, match="(churn|snr) must be finite and >= 0"):
            call()


@given(st.floats(allow_nan=True, allow_infinity=True))
@settings(max_examples=40, deadline=None)
def test_times_outside_the_unit_interval_are_refused(t):
    x = torch.zeros(2, 3)
    if 0 < t <= 1:
        t = 2 + t
    for call in (
        lambda: sde.reverse_drift(pull(VP()), x, t),
        lambda: sde.score_loss(pull(VP()), x, t, x),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize(
    "options, error, match",
    [
        (dict(n_corrector=-1), ValueError, "n_corrector must be .*got -1"),
        (dict(n_corrector=1.5), TypeError, "n_corrector must be an int"),
        (dict(n_corrector=True), TypeError, "n_corrector must be an int"),
        (dict(snr="loud"), TypeError, "snr must be a number, got 'loud'"),
        (dict(predictor=lambda p, t: (torch.ones(3),) * 3), ValueError, "predictor must be 1"),
        (dict(predictor="pc"), TypeError, "predictor must be a function .*got 'pc'"),
        (
            dict(predictor=lambda p, t: (f64([1]),) * 2),
            ValueError,
            "predictor must return 3 factors",
        ),
        (dict(predictor=lambda p, t: 1.0), ValueError, "predictor must return 3 factors.*got 1.0"),
        (dict(predictor=lambda p, t: (f64([math.nan]),) * 3), ValueError, "finite"),
    ],
)
def test_predictor_corrector_refuses(options, error, match):
    with pytest.raises(error, match=match):
        sde.predictor_corrector(pull(VP()), torch.zeros(2, 3), [0.5, 0.2], **options)


def test_other_refusals():
    x, model = torch.zeros(2, 3), pull(VP())
    with pytest.raises(ValueError, match="weight must be one of 'variance', 'likelihood'"):
        sde.score_loss(model, x, 0.5, x, "simple")
    with pytest.raises(ValueError, match="shape"):
        sde.score_loss(model, x, 0.5, torch.zeros(2, 2))
    with pytest.raises(TypeError, match="floating"):
        sde.score_loss(model, x.int(), 0.5, x)
    with pytest.raises(TypeError, match="log_prob must be a function"):
        sde.conditioned(model, 3.0)
    with pytest.raises(TypeError, match="Denoiser"):
        sde.conditioned(torch.nn.Identity(), lambda x, t, y: x)
    with pytest.raises(TypeError, match="x must be"):
        sde.simulate(VP().drift, VP().diffusion, x.int(), [0.1, 0.2])
    with pytest.raises(TypeError, match="times must be real"):
        sde.simulate(VP().drift, VP().diffusion, x, [0.1, 0.2j])
    with pytest.raises(ValueError, match="x must be finite"):
        sde.simulate(VP().drift, VP().diffusion, x + math.nan, [0.1, 0.2])


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(score=torch.ones(2, 3, dtype=torch.int64)), TypeError, "score must be a floating"),
        (dict(z=torch.ones(2, 2)), ValueError, r"z has shape \(2, 2\), score \(2, 3\)"),
        (dict(z=torch.ones(1, 3)), ValueError, r"z has shape \(1, 3\)"),
        (dict(sigma=-1.0), ValueError, "sigma must be >= 0, got -1.0"),
        (dict(sigma=math.nan), ValueError, "sigma must be >= 0, got nan"),
        (dict(snr=-0.1), ValueError, "snr must be finite and >= 0, got -0.1"),
        (dict(snr=math.nan), ValueError, "snr must be finite and >= 0, got nan"),
        (dict(snr=None), TypeError, "snr must be a number, got None"),
    ],
)
def test_the_corrector_step_refuses(change, error, match):
    given_ = dict(score=torch.ones(2, 3), z=torch.ones(2, 3), sigma=1.0) | change
    with pytest.raises(error, match=match):
        sde.snr_step(**given_)


@pytest.mark.parametrize(
    "log_prob, match",
    [
        (lambda x, t, y: torch.zeros(2), "differentiable"),
        (lambda x, t, y: 0.0, r"a tensor \(2,\).*got 0.0"),
        (lambda x, t, y: x.sum(), r"got torch.Size\(\[\]\)"),
        (lambda x, t, y: -x.square(), r"got torch.Size\(\[2, 3\]\)"),
    ],
)
def test_conditioning_refuses_what_is_no_log_probability(log_prob, match):
    told = sde.conditioned(pull(VP()), log_prob)
    with pytest.raises(ValueError, match=match):
        told(torch.zeros(2, 3), 0.5)


def test_infinite_weights_and_diffusions_are_refused():
    x = torch.zeros(2, 3)
    for process, t in ((VP(), 0.0), (Cosine(), 1.0), (VP(), torch.tensor([0.5, 0.0]))):
        with pytest.raises(ValueError, match="likelihood weight of .* is infinite at t"):
            sde.score_loss(Denoiser(lambda x, t: x, process), x, t, x, "likelihood")
    with pytest.raises(ValueError, match="diffusion must be finite, got inf at t = 1"):
        sde.simulate(Cosine().drift, Cosine().diffusion, x, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"shape of x, \(2, 3\); they make \(4, 2, 3\)"):
        sde.simulate(lambda x, t: torch.ones(4, 2, 3), lambda t: 1.0, x, [0.1, 0.2])


def test_the_samplers_are_walks():
    """Each is its three coefficients handed to walk."""
    process, z = SubVP(), torch.randn(9, 4, 2, dtype=torch.float64)
    x_T, times = process.prior_sample((4, 2), dtype=torch.float64), time_grid(process, 10)
    for fn, factors in (
        (sde.euler_maruyama, sde.reverse_sde_coefficients(process, times)),
        (sde.reverse_diffusion, sde.reverse_diffusion_coefficients(process, times)),
    ):
        by_walk = walk(pull(process), x_T, times, *factors, noise=replay(z))
        assert torch.equal(fn(pull(process), x_T, times, noise=replay(z)), by_walk)
