"""Likelihood: refusals, shapes, dtypes, devices and agreements that the chapter does not show."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffnotes import likelihood
from diffnotes.data import DIGIT_LEVELS
from diffnotes.ddpm import variational_bound
from diffnotes.denoisers import Denoiser
from diffnotes.likelihood import (
    bits_offset,
    discrete_log_prob,
    flow_bound,
    likelihood_terms,
    log_likelihood,
    quadratic_forms,
    sign_probes,
    unit_probes,
)
from diffnotes.mixtures import Empirical, Gaussian, GaussianMixture
from diffnotes.networks import MLP, UNet
from diffnotes.processes import (
    EDM,
    VE,
    VP,
    Cosine,
    Discrete,
    Flow,
    SubVP,
    linear_betas,
)

PROCESSES = [VP(), SubVP(), VE(), EDM(), Cosine(), Flow(), Discrete(linear_betas(50))]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
QUICK = dict(steps=6)
BAD_NUMBERS = st.sampled_from([math.nan, math.inf, -math.inf])


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def law():
    """A mixture in three dimensions with full covariances, in no notebook."""
    factor = torch.randn(3, 3, 3, generator=generator(5), dtype=torch.float64)
    covariances = 0.06 * factor @ factor.mT + 0.02 * torch.eye(3, dtype=torch.float64)
    means = f64([[2.0, 0.0, -1.0], [-1.5, 1.0, 0.5], [0.0, -2.0, 1.5]])
    return GaussianMixture(means, covariances, f64([0.5, 0.2, 0.3]))


def small_unet(seed=0, n_classes=None, dropout=0.0):
    """A U-Net for images 1 x 4 x 4 whose weights are all random, attention and all."""
    torch.manual_seed(seed)
    net = UNet(1, 8, (1, 2), n_classes=n_classes, dropout=dropout)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


# -- against the exact density -------------------------------------------------------------------


@each_process
def test_a_mixture_has_its_density_under_every_process(law, process):
    x = law.marginal(process, process.t_min).sample(60, generator=generator())
    exact = law.marginal_log_prob(x, process.t_min, process)
    prior = law.marginal(process, 1.0)
    found = log_likelihood(law.denoiser(process), x, prior=prior)
    assert (found - exact).abs().max() < 2e-3
    adaptive = log_likelihood(law.denoiser(process), x, prior=prior, method="adaptive", tol=1e-7)
    assert (adaptive - exact).abs().max() < 1e-4


@each_process
def test_any_start_in_time(law, process):
    for t in (0.02, 0.5, 0.98):
        x = law.marginal(process, t).sample(20, generator=generator())
        found = log_likelihood(law.denoiser(process), x, t_min=t, prior=law.marginal(process, 1.0))
        assert (found - law.marginal_log_prob(x, t, process)).abs().max() < 2e-3


def test_any_end_in_time(law):
    x = law.marginal(VP(), 0.1).sample(20, generator=generator())
    exact = law.marginal_log_prob(x, 0.1, VP())
    for t_max in (0.2, 0.6):
        found = log_likelihood(law.denoiser(VP()), x, t_min=0.1, t_max=t_max,
                               prior=law.marginal(VP(), t_max))
        assert (found - exact).abs().max() < 1e-4


@pytest.mark.parametrize("bend", [1.0, 1e6])
def test_the_bend_of_the_clock_does_not_matter(law, bend, monkeypatch):
    x = law.marginal(VP(), 1e-3).sample(10, generator=generator())
    terms = likelihood_terms(law.denoiser(VP()), x, steps=160)
    monkeypatch.setattr(likelihood, "_BEND", bend)
    other = likelihood_terms(law.denoiser(VP()), x, steps=160)
    assert (terms.total - other.total).abs().max() < 1e-4
    torch.testing.assert_close(terms.x_end, other.x_end, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("predicts", ["x0", "v", "velocity", "eps", "score"])
def test_every_coordinate_where_the_signal_ends(law, process, predicts):
    """x0, v and velocity go to t = 1; noise and score end at t_max."""
    exact = law.denoiser(process)
    ask = {"x0": exact, "v": exact.v, "velocity": exact.velocity, "eps": exact.eps,
           "score": exact.score}[predicts]
    denoiser = Denoiser(lambda x, t: ask(x, t.double()), process, predicts, dtype=torch.float64)
    x = law.marginal(process, 0.1).sample(20, generator=generator())
    found = log_likelihood(denoiser, x, t_min=0.1)
    # the default prior at t_max = 0.999 lacks the mean: norm(m) / r, r > 600
    tolerance = 2e-2 if predicts in ("eps", "score") else 1e-3
    assert (found - law.marginal_log_prob(x, 0.1, process)).abs().max() < tolerance


def test_a_time_that_is_infinite_at_the_end_is_avoided(law):
    told = []
    denoiser = Denoiser(lambda x, t: told.append(t[0].item()) or 0.1 * x, Cosine(), "x0",
                        time="log_snr")
    assert log_likelihood(denoiser, torch.randn(2, 3), **QUICK).isfinite().all()
    assert min(told) == pytest.approx(Cosine().log_snr(Cosine().t_max).item(), rel=1e-5)


def test_a_condition_prices_its_component(law):
    label, process = torch.arange(12) % 3, Cosine()
    x = law.sample(12, generator=generator(), cond=label)
    x = process.perturb(x, 0.05, torch.randn(x.shape, generator=generator(), dtype=x.dtype))
    for cond in (label, 1):
        found = log_likelihood(law.denoiser(process), x, t_min=0.05, cond=cond)
        exact = law.marginal_log_prob(x, 0.05, process, cond=cond)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)


def test_samples_do_not_see_one_another(law):
    x = law.sample(7, generator=generator())
    together = log_likelihood(law.denoiser(VP()), x, **QUICK)
    alone = torch.cat([log_likelihood(law.denoiser(VP()), x[i:i + 1], **QUICK) for i in range(7)])
    torch.testing.assert_close(together, alone)


# -- shapes, dtypes, modes -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (6,), (1, 2, 3), (2, 3, 1), (1, 8, 8)])
def test_any_event_shape_is_its_flattened_self(shape):
    """Pitfall: an exact divergence that indexes unflattened outputs."""
    dim = math.prod(shape)
    factor = torch.randn(dim, dim, generator=generator(1), dtype=torch.float64)
    C = factor @ factor.T / dim + 0.1 * torch.eye(dim)
    flat, event = (Gaussian(torch.ones(s).double(), C) for s in ((dim,), shape))
    x = flat.marginal(VP(), 1e-3).sample(3, generator=generator())
    a = likelihood_terms(flat.denoiser(VP()), x, **QUICK)
    b = likelihood_terms(event.denoiser(VP()), x.reshape(3, *shape), chunk=5, **QUICK)
    torch.testing.assert_close(a.total, b.total)
    assert b.x_end.shape == (3, *shape) and b.volume.shape == (3, 1) and b.prior.shape == (3,)
    probes = likelihood_terms(event.denoiser(VP()), x.reshape(3, *shape), divergence="hutchinson",
                              n_probes=4, generator=generator(), **QUICK)
    assert probes.volume.shape == (3, 4) and probes.total.shape == (3,)


def test_a_batch_of_plain_numbers():
    denoiser = Denoiser(lambda x, t: 0.5 * x, VP(), "x0")
    x = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(log_likelihood(denoiser, x, **QUICK),
                               log_likelihood(denoiser, x[:, None], **QUICK))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    net = MLP(3, 16, 1)
    denoiser = Denoiser(net, VP(), "v", (3,))
    x = torch.randn(4, 3, generator=generator()).to(dtype)
    terms = likelihood_terms(denoiser, x, **QUICK)
    wide = torch.promote_types(dtype, torch.float32)
    assert terms.total.dtype == terms.x_end.dtype == wide and terms.total.isfinite().all()
    reference = log_likelihood(denoiser, x.double(), **QUICK)
    torch.testing.assert_close(terms.total.double(), reference, rtol=1e-4, atol=1e-4)


def test_float32_loses_little():
    law = Gaussian(torch.full((64,), 0.3).double(), 0.1)
    x = law.marginal(EDM(), 0.0).sample(5, generator=generator())
    wide = log_likelihood(law.denoiser(EDM()), x, chunk=64)
    thin = log_likelihood(law.to(torch.float32).denoiser(EDM()), x.float(), chunk=64)
    assert (wide - thin).abs().max() < 5e-3


def test_the_network_runs_in_evaluation_mode_and_is_put_back():
    net = small_unet(dropout=0.5).train()
    net.middle1.eval()
    before = {name: module.training for name, module in net.named_modules()}
    denoiser = Denoiser(net, VP(), "v", (1, 4, 4))
    x = torch.randn(3, 1, 4, 4, generator=generator())
    options = dict(divergence="hutchinson", steps=3)
    a, b = (log_likelihood(denoiser, x, generator=generator(1), **options) for _ in range(2))
    assert torch.equal(a, b)
    assert before == {name: module.training for name, module in net.named_modules()}
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError, match="stop"):
        log_likelihood(denoiser, x, prior=Stops(), **options)
    assert before == {name: module.training for name, module in net.named_modules()}


class Stops:
    def log_prob(self, x):
        raise RuntimeError("stop")


def test_exact_trace_of_a_network_with_attention_and_labels():
    denoiser = Denoiser(small_unet(n_classes=3), Cosine(), "v", (1, 4, 4))
    x, cond = torch.randn(2, 1, 4, 4, generator=generator()), torch.tensor([0, 2])
    exact = likelihood_terms(denoiser, x, cond=cond, steps=3)
    loop = likelihood_terms(denoiser, x, cond=cond, steps=3, chunk=1)
    torch.testing.assert_close(exact.total, loop.total, rtol=1e-4, atol=1e-4)
    many = likelihood_terms(denoiser, x, cond=cond, steps=3, divergence="hutchinson",
                            n_probes=400, chunk=100, generator=generator())
    se = many.volume.std(1) / 20
    assert ((many.volume.mean(1) - exact.volume[:, 0]).abs() < 4.5 * se).all()
    torch.testing.assert_close(many.x_end, exact.x_end)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_inside_any_grad_mode_and_leaves_no_graph(law, mode):
    with mode():
        x = law.sample(3, generator=generator())
        value = log_likelihood(law.denoiser(VP()), x, **QUICK)
        assert not value.requires_grad and torch.is_grad_enabled() == (mode is torch.enable_grad)
    torch.testing.assert_close(value, log_likelihood(law.denoiser(VP()), x.clone(), **QUICK))


def test_the_states_given_are_left_alone(law):
    x = law.sample(3, generator=generator())
    before = x.clone()
    log_likelihood(law.denoiser(VP()), x, **QUICK)
    assert torch.equal(x, before) and not x.requires_grad


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("method", ["rk4", "heun"])
def test_the_gradient_in_x_is_right(law, divergence, method):
    denoiser = law.denoiser(Cosine())

    def value(x):
        return log_likelihood(denoiser, x, t_min=0.2, steps=3, divergence=divergence,
                              method=method, generator=generator(), chunk=2)
    x = law.marginal(Cosine(), 0.2).sample(2, generator=generator()).requires_grad_()
    assert torch.autograd.gradcheck(value, x, eps=1e-6, atol=1e-5)


def test_the_gradient_of_a_network_with_attention():
    denoiser = Denoiser(small_unet().double(), VP(), "v", (1, 4, 4))
    x = torch.randn(1, 1, 4, 4, generator=generator(), dtype=torch.float64).requires_grad_()
    options = dict(t_min=0.3, steps=2)
    (grad,) = torch.autograd.grad(log_likelihood(denoiser, x, **options).sum(), x)
    v = torch.randn(x.shape, generator=generator(1), dtype=torch.float64)
    ahead, behind = (log_likelihood(denoiser, x.detach() + h * v, **options)
                     for h in (1e-5, -1e-5))
    torch.testing.assert_close((grad * v).sum(), (ahead - behind)[0] / 2e-5, rtol=1e-5, atol=1e-6)


def test_no_graph_is_built_where_gradients_are_off(law):
    x = law.sample(2, generator=generator()).requires_grad_()
    with torch.no_grad():
        assert not log_likelihood(law.denoiser(VP()), x, **QUICK).requires_grad


# -- randomness ----------------------------------------------------------------------------------


def test_the_generator_decides(law):
    x, options = law.sample(5, generator=generator()), dict(divergence="hutchinson", **QUICK)
    a, b, c = (log_likelihood(law.denoiser(VP()), x, generator=generator(seed), **options)
               for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(3)
    first = log_likelihood(law.denoiser(VP()), x, **options)
    torch.manual_seed(3)
    assert torch.equal(first, log_likelihood(law.denoiser(VP()), x, **options))


def test_every_sample_has_a_probe_of_its_own_and_keeps_it(law):
    x = law.sample(1, generator=generator()).expand(40, 3)
    volume = likelihood_terms(law.denoiser(VP()), x, divergence="hutchinson", **QUICK).volume
    assert volume.unique().numel() > 1
    seen = []

    class Spy(likelihood._Slope):
        def __call__(self, *args):
            seen.append(self.probes.clone())
            return super().__call__(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "_Slope", Spy)
        likelihood_terms(law.denoiser(VP()), x, divergence="hutchinson", **QUICK)
    assert len(seen) == 24 and all(torch.equal(probes, seen[0]) for probes in seen)


def test_unbiased_for_a_jacobian_that_is_not_symmetric():
    matrix = torch.randn(4, 4, generator=generator(), dtype=torch.float64)
    x = torch.randn(2, 4, generator=generator(), dtype=torch.float64).requires_grad_()
    probes = sign_probes(x, 5000, generator=generator())
    forms = quadratic_forms(x @ matrix.T, x, probes, chunk=999)
    assert ((forms.mean(0) - matrix.trace()).abs() < 4.5 * forms.std(0) / 5000**0.5).all()
    exact = quadratic_forms(x @ matrix.T, x, unit_probes(x), chunk=3)
    torch.testing.assert_close(exact, matrix.diagonal()[:, None].expand(4, 2))


@pytest.mark.parametrize("method, cost", [("rk4", 4), ("heun", 2)])
def test_evaluations_are_counted_truly(method, cost):
    calls = []
    denoiser = Denoiser(lambda x, t: calls.append(len(x)) or 0.3 * x, VP(), "x0")
    terms = likelihood_terms(denoiser, torch.randn(5, 2), method=method, steps=7)
    assert terms.evaluations == len(calls) == 7 * cost and set(calls) == {5}
    calls.clear()
    terms = likelihood_terms(denoiser, torch.randn(5, 2), method="adaptive")
    assert terms.evaluations == len(calls)


# -- data on levels ------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 2.0), st.floats(-2, 2), st.integers(1, 3))
def test_the_mean_over_a_cell_is_its_probability(width, centre, dim):
    law, normal = Gaussian(torch.zeros(dim).double(), 1.0), torch.distributions.Normal(0.0, 1.0)
    x = torch.full((1, dim), centre, dtype=torch.float64)
    draws = discrete_log_prob(law.log_prob, x.expand(3000, dim), width, generator=generator())[0]
    P = (normal.cdf(x + width / 2) - normal.cdf(x - width / 2)).prod()
    assert abs(draws.exp().mean() - P) < 5 * draws.exp().std() / 3000**0.5 + 1e-12
    assert draws.mean() < P.log() + 5 * draws.std() / 3000**0.5 + 1e-12


def test_dequantised_draws_are_those_of_the_levels():
    x = DIGIT_LEVELS.to_values(torch.randint(0, 17, (3, 1, 8, 8), generator=generator()))
    seen = []

    def log_prob(x):
        seen.append(x)
        return x.new_zeros(len(x))
    rows = discrete_log_prob(log_prob, x, DIGIT_LEVELS.step, n_draws=2, generator=generator(4))
    assert rows.shape == (2, 3) and torch.allclose(rows, torch.tensor(64 * math.log(1 / 8)))
    assert torch.equal(seen[0], DIGIT_LEVELS.dequantize(x, generator=generator(4)))
    assert not torch.equal(seen[0], seen[1])
    assert bits_offset(DIGIT_LEVELS.step) == 3.0


def test_the_flow_bound_is_the_chains_in_the_limit(law):
    """Exact denoiser, the same last time and decoder; the chain's excess falls as 1 / T."""
    process, t = VP(), 0.1
    x0 = law.sample(4000, generator=generator())
    flow = flow_bound(law.denoiser(process), x0, t, prior=law.marginal(process, 1.0), steps=24,
                      generator=generator(1)).total
    ends = [process.log_snr(u).item() for u in (1.0, t)]
    chain = [variational_bound(law.denoiser(process), x0, process.t_of_log_snr(
        torch.linspace(*ends, n, dtype=torch.float64)).clamp(t, 1.0), generator=generator(2)).total
        for n in (60, 120)]
    limit = 2 * chain[1] - chain[0]
    assert abs((limit - flow).mean()) < 4.5 * (limit - flow).std() / 4000**0.5 + 0.01
    assert chain[0].mean() > flow.mean() and flow.mean() > -law.log_prob(x0).mean()


def test_the_flow_bound_bounds_a_probability():
    """Data on three levels under its own empirical law: -log P is known."""
    points = f64([[-1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    denoiser = Empirical(points).denoiser(Cosine())
    bound = flow_bound(denoiser, points.repeat(60, 1), 0.05, levels=f64([-1.0, 0.0, 1.0]),
                       generator=generator())
    mean = bound.total.mean().item()
    assert math.log(3) - 5e-3 < mean < math.log(3) + 0.05
    assert bound.steps.shape == (180, 0)


# -- bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser(lambda x, t: 0.5 * x, VP(), "x0", (3,))


@settings(max_examples=25, deadline=None)
@given(BAD_NUMBERS, st.integers(1, 5), st.data())
def test_numbers_that_are_none_are_refused(bad, n, data):
    denoiser = Denoiser(lambda x, t: 0.5 * x, VP(), "x0", (3,))
    x = torch.zeros(n, 3)
    x[data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, 2))] = bad
    for call in (lambda: log_likelihood(denoiser, x), lambda: flow_bound(denoiser, x, 0.1),
                 lambda: discrete_log_prob(lambda x: x.sum(1), x, 0.1)):
        with pytest.raises(ValueError, match="x must be finite"):
            call()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=3))
def test_wrong_shapes_are_refused(shape):
    if len(shape) == 2 and shape[0] > 0 and shape[1] == 3:
        return
    denoiser = Denoiser(lambda x, t: 0.5 * x, VP(), "x0", (3,))
    with pytest.raises(ValueError, match="x must"):
        log_likelihood(denoiser, torch.zeros(shape))


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=1.0 + 1e-9), st.just(math.nan)))
def test_times_outside_are_refused(t):
    denoiser = Denoiser(lambda x, t: 0.5 * x, VP(), "x0", (3,))
    for name in ("t_min", "t_max"):
        with pytest.raises(ValueError, match=name):
            log_likelihood(denoiser, torch.zeros(2, 3), **{name: t})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_images_as_counts_are_refused(denoiser, dtype):
    x = torch.zeros(2, 3).to(dtype)
    for call in (lambda: log_likelihood(denoiser, x), lambda: flow_bound(denoiser, x, 0.1),
                 lambda: discrete_log_prob(lambda x: x.sum(1), x, 0.1)):
        with pytest.raises(TypeError, match="x must be a floating-point tensor"):
            call()


REFUSED = [
    (dict(divergence="trace"), ValueError, "'exact', 'hutchinson'"),
    (dict(method="rk5"), ValueError, "'rk4', 'heun', 'adaptive'"),
    (dict(t_min=1.0), ValueError, "less than t_max"),
    (dict(t_min=0.5, t_max=0.5), ValueError, "less than t_max"),
    (dict(t_min=0.0), ValueError, "sigma.0. is 0"),
    (dict(t_min="now"), TypeError, "t_min"),
    (dict(steps=0), ValueError, "steps"),
    (dict(steps=2.5), TypeError, "steps"),
    (dict(steps=True), TypeError, "steps"),
    (dict(chunk=0), ValueError, "chunk"),
    (dict(n_probes=0), ValueError, "n_probes"),
    (dict(n_probes=2), ValueError, "hutchinson"),
    (dict(tol=0.0), ValueError, "tol"),
    (dict(tol=math.nan), ValueError, "tol"),
    (dict(generator=0), TypeError, "torch.Generator"),
    (dict(prior=lambda x: x), TypeError, "log_prob"),
    (dict(prior=torch.distributions.Normal(0.0, 1.0)), ValueError, "one number for each of 2"),
    (dict(prior=Empirical(torch.zeros(2, 3))), ValueError, "density"),
    (dict(cond=torch.tensor([1, 2])), TypeError, "takes no cond"),
]


@pytest.mark.parametrize("options, error, match", REFUSED, ids=range(len(REFUSED)))
def test_options_are_refused(denoiser, options, error, match):
    with pytest.raises(error, match=match):
        log_likelihood(denoiser, torch.zeros(2, 3), **{"steps": 2, **options})


def test_what_is_no_tensor_and_no_denoiser_is_refused(denoiser):
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        log_likelihood(denoiser, [[0.0, 0.0, 0.0]])
    with pytest.raises(TypeError, match="Denoiser"):
        log_likelihood(lambda x, t: x, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="unexpected keyword"):
        log_likelihood(denoiser, torch.zeros(2, 3), stepz=3)


@pytest.mark.parametrize("net", [lambda x, t: x.detach(), lambda x, t: torch.zeros_like(x),
                                 torch.no_grad()(lambda x, t: 0.5 * x)])
def test_a_denoiser_without_a_gradient_is_refused(net):
    """A trace of zero would be a wrong likelihood that looks like one."""
    with pytest.raises(ValueError, match="no gradient flows"):
        log_likelihood(Denoiser(net, VP(), "x0"), torch.zeros(2, 3), **QUICK)


def test_a_network_that_forgets_its_input_is_refused():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="no gradient flows"):
        log_likelihood(Denoiser(lambda x, t: weight.expand(len(x), 3), VP(), "x0"),
                       torch.zeros(2, 3), **QUICK)


def test_no_gradient_by_the_adaptive_method(denoiser):
    with pytest.raises(ValueError, match="no gradient"):
        log_likelihood(denoiser, torch.zeros(2, 3, requires_grad=True), method="adaptive")


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
def test_senseless_widths_are_refused(width):
    with pytest.raises(ValueError, match="width"):
        bits_offset(width)
    with pytest.raises(ValueError, match="width"):
        discrete_log_prob(lambda x: x.sum(1), torch.zeros(2, 3), width)


def test_the_flow_bound_refuses(denoiser):
    x = torch.zeros(2, 3)
    for options, match in ((dict(levels=[0.5, 1.0]), "levels"), (dict(levels=[1.0]), "levels"),
                           (dict(decoder_var=0.0), "decoder_var"),
                           (dict(decoder_var=math.nan), "decoder_var")):
        with pytest.raises(ValueError, match=match):
            flow_bound(denoiser, x, 0.1, steps=2, **options)
    with pytest.raises(ValueError, match="t_min"):
        flow_bound(denoiser, x, 1.5)


def test_scipy_is_asked_for_by_name(denoiser, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match=r"pip install 'diffnotes\[likelihood\]'"):
        log_likelihood(denoiser, torch.zeros(2, 3), method="adaptive")
    assert log_likelihood(denoiser, torch.zeros(2, 3), **QUICK).isfinite().all()


def test_importing_the_module_imports_no_scipy():
    code = "import sys, diffnotes.likelihood; assert 'scipy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- accelerators --------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_on_a_gpu_as_on_the_cpu(divergence):
    denoiser = Denoiser(small_unet().double(), Cosine(), "v", (1, 4, 4))
    x = torch.randn(2, 1, 4, 4, generator=generator(), dtype=torch.float64)
    options = dict(steps=3, divergence=divergence)
    here = log_likelihood(denoiser, x, generator=generator(1), **options)
    denoiser.to("cuda")
    leaf = x.cuda().requires_grad_()
    there = log_likelihood(denoiser, leaf, generator=generator(1), **options)
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.detach().cpu(), here, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(there.sum(), leaf)[0].isfinite().all()
    adaptive = log_likelihood(denoiser, x.cuda(), method="adaptive")
    assert adaptive.device.type == "cuda" and adaptive.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_device_sync_in_the_solve():
    net = torch.nn.Linear(2, 2).cuda()
    denoiser = Denoiser(lambda x, t: net(x), VP(), "v", (2,), device="cuda", dtype=torch.float32)
    x = torch.randn(4, 2, device="cuda")
    probes = torch.Generator("cuda").manual_seed(0)
    options = dict(divergence="hutchinson", generator=probes, steps=3)
    log_likelihood(denoiser, x, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        log_likelihood(denoiser, x, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
