"""NCSN: closed forms, equivalences, dtypes, shapes, refusals the chapter does not show."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffnotes import ncsn
from diffnotes.denoisers import Denoiser
from diffnotes.mixtures import Empirical, Gaussian, GaussianMixture
from diffnotes.networks import MLP
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP, linear_betas
from diffnotes.samplers import nfe, sample
from diffnotes.stepping import SAMPLERS, time_grid

PROCESSES = [VP(), SubVP(), VE(), EDM(), Cosine(), Flow(), Discrete(linear_betas(200))]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
LADDER = VE(0.05, 10.0)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def law():
    """A mixture in three dimensions with full covariances, in no notebook."""
    factor = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    means = f64([[2.0, 0.0, -1.0], [-1.5, 1.0, 0.5], [0.0, -2.0, 1.5]])
    covariances = 0.06 * factor @ factor.mT + 0.02 * torch.eye(3, dtype=torch.float64)
    return GaussianMixture(means, covariances, f64([0.5, 0.2, 0.3]))


def zero(x, t):
    return 0 * x


def one_draw_each(n):
    """Draws as unit vectors: sample i sees draw i only, so a linear chain lists its factors."""
    draws = torch.eye(n + 1, dtype=torch.float64)[..., None]
    queue = iter(draws[1:])
    return draws[0], lambda like: next(queue)


# -- the score ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 3), (2, 1, 3, 3), (0, 3), (5,)])
def test_score_of_a_normal_density(dtype, shape):
    x = torch.randn(shape, dtype=dtype)
    found = ncsn.score_of(
        lambda x: -x.reshape(len(x), math.prod(shape[1:])).square().sum(1) / 2, x
    )
    assert found.dtype == dtype and not found.requires_grad and not x.requires_grad
    torch.testing.assert_close(found, -x)


def test_score_of_works_where_gradients_are_off_and_refuses_integers(law):
    x = law.sample(5)
    with torch.no_grad():
        torch.testing.assert_close(ncsn.score_of(law.log_prob, x), law.score(x))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        ncsn.score_of(law.log_prob, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"log_density\(x\) must have shape \(5,\), got \(5, 3\)"):
        ncsn.score_of(torch.square, x)


# -- Langevin dynamics -------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    step=st.floats(0.01, 3.8),
    var=st.floats(0.05, 20.0),
    n=st.integers(1, 12),
    start=st.floats(0.0, 9.0),
)
def test_chains_on_normal_data_have_the_variance_in_closed_form(step, var, n, start):
    step = step * var
    x, noise = one_draw_each(n)
    law = Gaussian(f64([0.0]), f64(var))
    x = ncsn.langevin(law.score, start**0.5 * x, step, n, noise=noise)
    expected = ncsn.langevin_variance(step, var, n, start=start)
    torch.testing.assert_close(x.square().sum(), expected, rtol=1e-9, atol=1e-12)
    limit = ncsn.langevin_variance(step, var)
    torch.testing.assert_close((1 - step / (2 * var)) ** 2 * limit + step, limit)


def test_langevin_variance_broadcasts_and_refuses():
    table = ncsn.langevin_variance(f64([0.1, 0.2]), f64([[1.0], [2.0], [3.0]]), 4)
    assert table.shape == (3, 2) and table.dtype == torch.float64
    assert ncsn.langevin_variance(5.0, 1.0, 3) > 0
    for step, var, n in (
        (0.0, 1.0, 1),
        (-1.0, 1.0, 1),
        (1.0, 0.0, 1),
        (1.0, -1.0, 2),
        (math.nan, 1.0, 1),
        (4.0, 1.0, 3),
    ):
        with pytest.raises(ValueError, match="step and var must be > 0"):
            ncsn.langevin_variance(step, var, n)
    for step, var in ((math.inf, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="step and var must be > 0.*inf"):
            ncsn.langevin_variance(step, var, 2)
    with pytest.raises(ValueError, match="step < 4 var"):
        ncsn.langevin_variance(4.5, 1.0)
    for start in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"start must be >= 0, got {start}"):
            ncsn.langevin_variance(1.0, 1.0, 3, start=start)
    for n, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"n_steps must be .* got {n}"):
            ncsn.langevin_variance(1.0, 1.0, n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_langevin_raises_half_precision_for_the_moves(dtype):
    seen = []

    def score(x):
        seen.append(x.dtype)
        return -x

    x = torch.randn(2, 1, 4, 4).to(dtype)
    before = x.clone()
    moved = ncsn.langevin(score, x, 0.1, 3)
    assert moved.dtype == dtype and moved.shape == x.shape and torch.equal(x, before)
    assert set(seen) == {torch.promote_types(dtype, torch.float32)} and len(seen) == 3


@pytest.mark.parametrize(
    "changes, error, match",
    [
        (dict(step=0.0), ValueError, "step must be > 0 .* got 0"),
        (dict(step=-0.1), ValueError, "step must be > 0 .* got -0.1"),
        (dict(step=math.inf), ValueError, "step .* got inf"),
        (dict(step=math.nan), ValueError, "step .* got nan"),
        (dict(step=True), ValueError, "step .* got True"),
        (dict(step="0.1"), TypeError, "step must be a number, got '0.1'"),
        (dict(step=None), TypeError, "step must be a number, got None"),
        (
            dict(score=lambda x: x[0]),
            ValueError,
            r"score\(x\) must have shape \(2, 3\), got \(3,\)",
        ),
        (dict(x=[[0.0]]), TypeError, "x must be a floating-point tensor, got list"),
        (dict(n_steps=0), ValueError, "n_steps must be at least 1, got 0"),
        (dict(n_steps=2.0), TypeError, "n_steps must be an int"),
        (dict(x=torch.zeros(2, 3).int()), TypeError, "x must be .*int32"),
        (dict(x=torch.full((2, 3), math.nan)), ValueError, "x must be finite, got nan"),
    ],
)
def test_langevin_refuses(changes, error, match):
    good = dict(score=lambda x: -x, x=torch.zeros(2, 3), step=0.1, n_steps=2)
    assert ncsn.langevin(**good).shape == (2, 3)
    with pytest.raises(error, match=match):
        ncsn.langevin(**{**good, **changes})


# -- score matching ----------------------------------------------------------------------------


def test_implicit_and_sliced_agree_with_the_jacobian_for_any_shape():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 6)
    ).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def score(x):
        return net(x).reshape(x.shape)

    jacobian = torch.func.vmap(torch.func.jacrev(lambda a: net(a[None])[0]))(x).reshape(4, 6, 6)
    value = score(x).flatten(1)
    expected = value.square().sum(1) / 2 + jacobian.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(ncsn.implicit_score_matching(score, x), expected)
    u = torch.randn_like(x)
    along = torch.einsum("bi,bij,bj->b", u.flatten(1), jacobian, u.flatten(1))
    torch.testing.assert_close(
        ncsn.sliced_score_matching(score, x, u), value.square().sum(1) / 2 + along
    )


def test_gradients_reach_the_parameters_unless_they_are_off():
    net, x, u = torch.nn.Linear(3, 3), *torch.randn(2, 5, 3)
    for function in (ncsn.implicit_score_matching, partial(ncsn.sliced_score_matching, u=u)):
        value = function(net, x)
        gradients = torch.autograd.grad(value.mean(), net.parameters())
        assert all(g.abs().max() > 0 for g in gradients)
        with torch.no_grad():
            off = function(net, x)
        assert not off.requires_grad and torch.equal(off, value)


def test_a_score_that_does_not_depend_on_x_has_no_divergence():
    x, u = torch.randn(2, 4, 3)
    for value in (
        ncsn.implicit_score_matching(torch.ones_like, x),
        ncsn.sliced_score_matching(torch.ones_like, x, u),
    ):
        torch.testing.assert_close(value, torch.full((4,), 1.5))


def test_score_matching_refuses(law):
    x = law.sample(4)
    with pytest.raises(ValueError, match=r"score\(x\) must have shape \(4, 3\), got \(4, 2\)"):
        ncsn.implicit_score_matching(lambda x: x[:, :2], x)
    with pytest.raises(ValueError, match=r"target must have shape \(4, 3\), got \(3,\)"):
        ncsn.explicit_score_matching(law.score, x, x[0])
    with pytest.raises(ValueError, match=r"u must have shape \(4, 3\)"):
        ncsn.sliced_score_matching(law.score, x, x[0])
    with pytest.raises(TypeError, match="x must be .*int64"):
        ncsn.explicit_score_matching(law.score, torch.zeros(4, 3).long(), x)
    with pytest.raises(TypeError, match="u must be a floating-point tensor, got list"):
        ncsn.sliced_score_matching(law.score, x, [1.0])
    for function in (
        partial(ncsn.explicit_score_matching, target=x),
        ncsn.implicit_score_matching,
        partial(ncsn.sliced_score_matching, u=x),
    ):
        with pytest.raises(ValueError, match="x must be finite, got nan"):
            function(law.score, x * math.nan)


@each_process
def test_kernel_is_normal_and_its_score_is_minus_eps_over_sigma(process):
    x0, eps = torch.randn(2, 6, 2, 2, dtype=torch.float64)
    for t in (0.5, torch.linspace(0.2, 0.9, 6, dtype=torch.float64)):
        x_t = process.perturb(x0, t, eps)
        alpha, sigma = (
            torch.as_tensor(c).reshape(-1, 1, 1) for c in (process.alpha(t), process.sigma(t))
        )
        normal = torch.distributions.Normal(alpha * x0, sigma.expand(6, 2, 2))
        torch.testing.assert_close(
            ncsn.kernel_log_prob(x_t, x0, t, process), normal.log_prob(x_t).sum((1, 2))
        )
        torch.testing.assert_close(ncsn.kernel_score(x_t, x0, t, process), -eps / sigma)
        torch.testing.assert_close(
            ncsn.score_of(lambda x, t=t: ncsn.kernel_log_prob(x, x0, t, process), x_t),
            ncsn.kernel_score(x_t, x0, t, process),
        )


def test_kernel_keeps_the_dtype_and_refuses():
    x = torch.randn(3, 2)
    t = torch.full((3,), 0.5, dtype=torch.float64)
    assert ncsn.kernel_score(x, x, t, VP()).dtype == torch.float32
    assert ncsn.kernel_log_prob(x, x, t, VP()).dtype == torch.float32
    for function in (ncsn.kernel_log_prob, ncsn.kernel_score):
        with pytest.raises(ValueError, match="sigma is 0 at t = 0"):
            function(x, x, 0.0, VP())
        with pytest.raises(ValueError, match=r"x0 must have shape \(3, 2\), got \(1, 2\)"):
            function(x, x[:1], 0.5, VP())
        with pytest.raises(ValueError, match="one number per sample"):
            function(x, x, t[:2], VP())
        with pytest.raises(TypeError, match="x0 must be"):
            function(x, x.long(), 0.5, VP())
        with pytest.raises(ValueError, match="t must lie in"):
            function(x, x, 1.5, VP())


@each_process
@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "score"])
def test_denoising_score_matching_is_the_weighted_error_in_any_coordinate(process, predicts):
    denoiser = Denoiser(lambda x, t: 0.3 * x + 0.1, process, predicts)
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64)
    t = torch.linspace(0.3, 0.8, 5, dtype=torch.float64)
    x_t, sigma = process.perturb(x0, t, eps), process.sigma(t)
    error = denoiser.score(x_t, t) - ncsn.kernel_score(x_t, x0, t, process)
    torch.testing.assert_close(
        ncsn.denoising_score_matching(denoiser, x0, t, eps), sigma**2 * error.square().sum(1)
    )


def test_denoising_score_matching_passes_the_condition_on_and_keeps_the_dtype():
    seen = []

    def net(x, t, cond):
        seen.append(cond)
        return x

    x0, eps = torch.randn(2, 4, 1, 2, 2)
    t = torch.full((4,), 0.5, dtype=torch.float64)
    value = ncsn.denoising_score_matching(Denoiser(net, LADDER), x0, t, eps, torch.arange(4))
    assert (
        value.dtype == torch.float32 and value.shape == (4,) and seen[0].tolist() == [0, 1, 2, 3]
    )
    with pytest.raises(TypeError, match="needs a Denoiser.*got function"):
        ncsn.denoising_score_matching(net, x0, 0.5, eps)
    empty = ncsn.denoising_score_matching(Denoiser(zero, LADDER), x0[:0], 0.5, eps[:0])
    assert empty.shape == (0,)


def test_the_constant_of_denoising_on_a_finite_law():
    """Loss of the exact score, d - sigma^2 E norm(s)^2, in three dimensions, by sampling."""
    law = Empirical(torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).double())
    denoiser, generator = law.denoiser(LADDER), torch.Generator().manual_seed(2)
    x0 = law.sample(40_000, generator=generator)
    eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    for t in (0.3, 0.5, 0.7):
        sigma, x_t = LADDER.sigma(t), LADDER.perturb(x0, t, eps)
        values = ncsn.denoising_score_matching(denoiser, x0, t, eps)
        rest = values + sigma**2 * denoiser.score(x_t, t).square().sum(1) - 3
        assert rest.mean().abs() < 4 * rest.std() / 200


# -- annealed Langevin -------------------------------------------------------------------------


@each_process
@pytest.mark.parametrize("n_inner", [1, 4])
@pytest.mark.parametrize("step", [None, 0.2])
def test_normal_data_follow_the_variance_recursion_in_any_process(process, n_inner, step):
    times, v = time_grid(process, 9), 0.3
    x, noise = one_draw_each(9 * n_inner)
    denoiser = Gaussian(f64([0.0]), f64(v)).denoiser(process)
    x = ncsn.annealed_langevin(
        denoiser, process.sigma(times[0]) * x, times, n_inner=n_inner, step=step, noise=noise
    )
    noise2 = (process.sigma(times) / process.alpha(times)) ** 2
    if step is None:
        step = ncsn.langevin_step((noise2[0] / noise2[-1]).item() ** (1 / 16), n_inner)
    V = noise2[0]
    for level in noise2:
        for _ in range(n_inner):
            V = (1 - step * level / (2 * (v + level))) ** 2 * V + step * level
    V = V * (v / (v + noise2[-1])) ** 2
    torch.testing.assert_close(x.square().sum(), V, rtol=1e-8, atol=0)


def test_levels_are_visited_in_order_and_the_last_once_more(law):
    exact, seen, calls = law.denoiser(LADDER), [], []

    def net(x, t, cond):
        calls.append(cond)
        return exact(x, t.double())

    denoiser, label = Denoiser(net, LADDER, "x0"), torch.tensor([0, 1, 2])
    x_T = 10 * torch.randn(3, 3, dtype=torch.float64)
    times = f64([1.0, 0.5, 0.2])
    x = ncsn.annealed_langevin(
        denoiser, x_T, times, n_inner=2, cond=label, callback=lambda *report: seen.append(report)
    )
    assert [t for _, t, *_ in seen] == [1.0, 1.0, 0.5, 0.5, 0.2, 0.2, 0.2]
    assert [i for i, *_ in seen] == list(range(7)) and torch.equal(seen[0][2], x_T)
    assert torch.equal(seen[-1][3], x) and all(torch.equal(c, label) for c in calls)
    assert len(calls) == 7


@settings(deadline=None, max_examples=15)
@given(steps=st.integers(1, 12), n_inner=st.integers(1, 7))
def test_evaluations_are_counted_truly(steps, n_inner):
    calls, partly = [], partial(ncsn.annealed_langevin, n_inner=n_inner)

    def net(x, t):
        calls.append(len(x))
        return 0 * x

    for sampler, moves in (("annealed_langevin", 5), (partly, n_inner)):
        calls.clear()
        sample(Denoiser(net, LADDER, shape=(2,)), n=3, sampler=sampler, steps=steps, seed=0)
        assert len(calls) == nfe(sampler, steps) == moves * steps + 1


@each_process
def test_the_registered_sampler_finds_a_law(process, law):
    """40 levels of 5 moves; widening is below 12% of each std, weights within a tenth."""
    x = sample(law.denoiser(process), n=3000, sampler="annealed_langevin", seed=3)
    std = law.cov.diagonal().sqrt()
    assert ((x.mean(0) - law.mean).abs() < 0.15 * std).all()
    assert ((x.std(0) / std - 1).abs() < 0.12).all()
    assert SAMPLERS["annealed_langevin"].fn is ncsn.annealed_langevin


def test_the_first_samples_do_not_depend_on_n(law):
    draw = partial(sample, law.denoiser(LADDER), sampler="annealed_langevin", steps=6, seed=4)
    torch.testing.assert_close(draw(n=70)[:5], draw(n=5), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(draw(n=70, batch_size=33), draw(n=70), rtol=1e-9, atol=1e-9)
    first, again = (
        sample(
            law.denoiser(LADDER),
            n=5,
            sampler="annealed_langevin",
            steps=6,
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(2)
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_state_comes_back_in_its_dtype_and_is_left_alone(dtype):
    x_T = torch.randn(2, 1, 4, 4).to(dtype)
    before = x_T.clone()
    x = ncsn.annealed_langevin(Denoiser(zero, VP()), x_T, [0.9, 0.5])
    assert x.dtype == dtype and x.shape == x_T.shape and torch.equal(x_T, before)


def test_a_time_without_noise_is_dropped_and_a_single_level_needs_no_ratio():
    x_T, z = torch.randn(4, 2), torch.randn(4, 2)
    with_zero, without = (
        ncsn.annealed_langevin(Denoiser(zero, VP()), x_T, times, noise=lambda x: z)
        for times in ([0.9, 0.5, 0.0], [0.9, 0.5])
    )
    assert torch.equal(with_zero, without)
    assert ncsn.annealed_langevin(Denoiser(zero, VP()), x_T, [0.5]).isfinite().all()


@pytest.mark.parametrize(
    "changes, error, match",
    [
        (dict(times=[0.2, 0.5]), ValueError, "decrease"),
        (dict(times=[0.5, 0.5]), ValueError, "decrease"),
        (dict(times=[]), ValueError, "times"),
        (dict(times=[1.5, 0.5]), ValueError, "times must lie in"),
        (dict(times=[0.0]), ValueError, "sigma > 0"),
        (dict(n_inner=0), ValueError, "n_inner must be at least 1"),
        (dict(n_inner=2.5), TypeError, "n_inner must be an int"),
        (dict(step=0.0), ValueError, "step must be > 0 and < 4, got 0"),
        (dict(step=4.0), ValueError, "step must be > 0 and < 4, got 4"),
        (dict(step=math.nan), ValueError, "step .* got nan"),
        (dict(x_T=torch.full((2, 3), math.inf)), ValueError, "x_T must be finite, got inf"),
        (dict(x_T=torch.zeros(2, 3).int()), TypeError, "x_T must be .*int32"),
        (dict(denoiser=torch.nn.Identity()), TypeError, "needs a Denoiser.*got Identity"),
        (
            dict(denoiser=Denoiser(zero, Cosine(), "v"), times=[1.0, 0.5]),
            ValueError,
            "alpha is 0 at t = 1",
        ),
    ],
)
def test_annealed_langevin_refuses(changes, error, match):
    good = dict(denoiser=Denoiser(zero, VP()), x_T=torch.zeros(2, 3), times=[0.9, 0.5])
    assert ncsn.annealed_langevin(**good).isfinite().all()
    with pytest.raises(error, match=match):
        ncsn.annealed_langevin(**{**good, **changes})


def test_on_a_device_nothing_is_looked_at():
    x_T = torch.empty(2, 3, device="meta")
    assert ncsn.annealed_langevin(Denoiser(zero, VP()), x_T, [0.9, 0.5]).shape == (2, 3)
    assert ncsn.langevin(lambda x: -x, x_T, 0.1, 2).shape == (2, 3)


# -- levels and steps --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_distance_across_blocks(dtype):
    data = torch.randn(2100, 1, 2, 2, dtype=dtype)
    data[3], data[2050] = 40.0, -40.0
    assert ncsn.max_distance(data) == pytest.approx(160.0, rel=1e-6)
    assert ncsn.max_distance(data[:1]) == pytest.approx(0.0, abs=1e-3)
    assert ncsn.max_distance(data.to(torch.bfloat16)) == pytest.approx(160.0, rel=1e-2)


@pytest.mark.parametrize(
    "bad, error, match",
    [
        (torch.zeros(3, 2).int(), TypeError, "data must be"),
        (torch.zeros(3), ValueError, r"data must have shape \(n, ...\)"),
        (torch.zeros(0, 3), ValueError, r"n > 0, got \(0, 3\)"),
        (torch.full((3, 2), math.nan), ValueError, "data must be finite"),
    ],
)
def test_the_largest_distance_refuses(bad, error, match):
    with pytest.raises(error, match=match):
        ncsn.max_distance(bad)


@settings(deadline=None, max_examples=60)
@given(dim=st.integers(5, 10**6), overlap=st.floats(0.01, 0.99))
def test_the_ratio_solves_the_overlap(dim, overlap):
    ratio = ncsn.level_ratio(dim, overlap)
    assert ratio > 1 and ncsn.level_overlap(ratio, dim) == pytest.approx(overlap, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(ratio=st.floats(1.001, 3.0), count=st.integers(2, 400))
def test_levels_are_counted_with_both_ends(ratio, count):
    assert ncsn.n_levels(0.1 * ratio ** (count - 1), 0.1, ratio) == count


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: ncsn.level_ratio(4), ValueError, "dim must be at least 5.*got 4"),
        (lambda: ncsn.level_ratio(64.0), TypeError, "dim must be an int"),
        (lambda: ncsn.level_ratio(64, 0.0), ValueError, "overlap must be > 0"),
        (lambda: ncsn.level_ratio(64, 0.998), ValueError, "overlap .* got 0.998"),
        (lambda: ncsn.level_overlap(1.1, 0), ValueError, "dim must be at least 1"),
        (lambda: ncsn.level_overlap(0.9, 64), ValueError, "ratio must be >= 1, got 0.9"),
        (lambda: ncsn.level_overlap(math.nan, 64), ValueError, "ratio must be >= 1, got nan"),
        (lambda: ncsn.settled_ratio(4.5, 1.1, 3), ValueError, "0 < step < 4 .* got 4.5"),
        (lambda: ncsn.settled_ratio(1.0, 0.9, 3), ValueError, "ratio >= 1, got 1.0 and 0.9"),
        (lambda: ncsn.settled_ratio(1.0, 1.1, 0), ValueError, "n_inner must be at least 1"),
        (
            lambda: ncsn.noise_levels(torch.randn(1, 64)),
            ValueError,
            "largest distance in the data, 0",
        ),
        (lambda: ncsn.n_levels(1.0, 2.0, 1.5), ValueError, "0 < sigma_min < sigma_max"),
        (lambda: ncsn.n_levels(1.0, 0.0, 1.5), ValueError, "0 < sigma_min < sigma_max"),
        (lambda: ncsn.n_levels(1.0, 0.5, 1.0), ValueError, "ratio > 1"),
        (lambda: ncsn.n_levels(math.nan, 0.5, 2.0), ValueError, "got 0.5, nan"),
        (lambda: ncsn.langevin_step(1.0, 5), ValueError, "ratio must be > 1"),
        (lambda: ncsn.langevin_step(1.2, 0), ValueError, "n_inner must be at least 1"),
        (lambda: ncsn.langevin_step(1.2, 2.0), TypeError, "n_inner must be an int"),
        (lambda: ncsn.noise_levels(torch.zeros(3, 64)), ValueError, "sigma_min"),
        (lambda: ncsn.noise_levels(torch.randn(9, 3)), ValueError, "at least 5"),
        (lambda: ncsn.noise_levels(torch.randn(9, 64), 0.0), ValueError, "sigma_min"),
    ],
)
def test_choices_refuse(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_noise_levels_are_a_process_and_its_times():
    data = torch.randn(50, 1, 8, 8)
    process, times = ncsn.noise_levels(data, 0.02)
    assert process == VE(0.02, ncsn.max_distance(data))
    assert times[0] == 1 and times[-1] == 0 and times.dtype == torch.float64
    ratios = process.sigma(times[:-1]) / process.sigma(times[1:])
    assert ratios.max() / ratios.min() - 1 < 1e-9
    assert ratios[0] == pytest.approx(ncsn.level_ratio(64), rel=0.03)


@settings(deadline=None, max_examples=40)
@given(ratio=st.floats(1.003, 4.0), n=st.integers(1, 30))
def test_the_step_is_the_best_of_all_steps(ratio, n):
    for settled in (True, False):
        best = ncsn.langevin_step(ratio, n, settled=settled)
        steps = torch.linspace(0.001, 2, 1001, dtype=torch.float64)
        steps = torch.cat([steps, f64([best])])
        value = (
            ncsn.settled_ratio(steps, ratio, n)
            if settled
            else ncsn.langevin_variance(steps, 1.0, n, start=ratio**2)
        )
        assert 0 < best <= 2 and value[-1] >= 1
        assert value[-1] <= value.min() * (1 + 1e-4)


def test_the_settled_ratio_is_where_the_levels_take_it():
    for step, ratio, n in ((0.3, 1.1, 4), (1.0, 1.3, 1), (0.05, 1.01, 3)):
        V = f64(7.0)
        for _ in range(4000):
            V = ncsn.langevin_variance(step, 1.0, n, start=ratio**2 * V)
        torch.testing.assert_close(ncsn.settled_ratio(step, ratio, n), V)
    assert ncsn.settled_ratio(0.001, 2.0, 1) == math.inf
    assert ncsn.settled_ratio(f64([0.1, 0.2]), 1.01, 3).shape == (2,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    net = MLP(3).to("cuda")
    denoiser = Denoiser(net, LADDER, shape=(3,))
    x = sample(denoiser, n=8, sampler="annealed_langevin", steps=4, seed=0)
    assert x.device.type == "cuda" and x.isfinite().all()
    data = torch.randn(2000, 6, device="cuda")
    assert ncsn.max_distance(data) == pytest.approx(ncsn.max_distance(data.cpu()), rel=1e-4)
    x0, eps = torch.randn(2, 16, 3, device="cuda")
    t = torch.rand(16, device="cuda")
    ncsn.denoising_score_matching(denoiser, x0, t, eps).mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    value = ncsn.implicit_score_matching(lambda x: -x, x0)
    torch.testing.assert_close(value, x0.square().sum(1) / 2 - 3)
    assert ncsn.kernel_log_prob(x0, eps, t, LADDER).device.type == "cuda"
    assert ncsn.langevin(lambda x: -x, x0, 0.1, 3).device.type == "cuda"
