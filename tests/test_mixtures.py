"""What bores about laws: shapes, dtypes, refusals, and the formulas at random."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffnotes.mixtures import Empirical, Gaussian, GaussianMixture, Law

WIDE = torch.float64


class Circle:
    """alpha = cos, sigma = sin of a quarter turn."""

    def alpha(self, t):
        return torch.cos(torch.as_tensor(t, dtype=WIDE) * math.pi / 2)

    def sigma(self, t):
        return torch.sin(torch.as_tensor(t, dtype=WIDE) * math.pi / 2)


class Numbers:
    """A process of Python floats, sigma = 0 at t = 0 and alpha = 0 at t = 1."""

    def alpha(self, t):
        return 1 - float(t)

    def sigma(self, t):
        return float(t)


CIRCLE = Circle()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=WIDE):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def spd(k, d, seed=0):
    a = randn(k, d, d, seed=seed)
    return a @ a.mT + 0.1 * torch.eye(d, dtype=WIDE)


def mixture(k=3, shape=(2,), seed=0, form="full"):
    d = math.prod(shape)
    covariances = {
        "number": 0.3,
        "round": torch.rand(k, generator=generator(seed), dtype=WIDE) + 0.1,
        "diagonal": torch.rand(k, d, generator=generator(seed), dtype=WIDE) + 0.1,
        "full": spd(k, d, seed),
    }[form]
    weights = torch.rand(k, generator=generator(seed + 1), dtype=WIDE) + 0.1
    return GaussianMixture(
        2 * randn(k, *shape, seed=seed + 2), covariances, weights / weights.sum()
    )


def dense(law, form):
    """Means ``(K, D)`` and full covariances of ``mixture(..., form)``."""
    parts = law._parts
    d = parts.means.shape[1]
    variances = parts.variances.expand(-1, d)
    axes = (
        torch.eye(d, dtype=WIDE).expand(len(variances), d, d) if parts.axes is None else parts.axes
    )
    return parts.means, axes @ torch.diag_embed(variances) @ axes.mT


LAWS = {
    "mixture": lambda shape: mixture(shape=shape),
    "round": lambda shape: mixture(shape=shape, form="round"),
    "gaussian": lambda shape: Gaussian(randn(*shape), spd(1, math.prod(shape))[0]),
    "empirical": lambda shape: Empirical(randn(7, *shape), torch.arange(7) % 3),
}


# --- Shapes, dtypes, times --------------------------------------------------------


@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, WIDE], ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_shapes_and_dtypes(kind, shape, dtype, batched):
    law = LAWS[kind](shape).to(dtype=dtype)
    t = torch.tensor([0.1, 0.5, 1.0]) if batched else 0.4
    x = randn(3, *shape, dtype=dtype)
    assert law.shape == shape and law.dtype == dtype and law.device.type == "cpu"
    assert law.mean.shape == shape and law.cov.shape == (math.prod(shape),) * 2
    assert law.sample(5).shape == (5, *shape) and law.sample(5).dtype == dtype
    for answer, wanted in [
        (law.marginal_log_prob(x, t, CIRCLE), (3,)),
        (law.marginal_score(x, t, CIRCLE), (3, *shape)),
        (law.posterior_mean(x, t, CIRCLE), (3, *shape)),
        (law.label_posterior(x, t, CIRCLE), (3, int(law.labels.max()) + 1)),
    ]:
        assert answer.shape == wanted and answer.dtype == dtype and answer.isfinite().all()


@pytest.mark.parametrize("kind", LAWS)
def test_answers_in_the_dtype_of_the_states(kind):
    law = LAWS[kind]((2,))
    x = randn(4, 2)
    low = law.posterior_mean(x.float(), 0.3, CIRCLE)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, law.posterior_mean(x.float().double(), 0.3, CIRCLE).float())
    assert law.posterior_mean(x.bfloat16(), 0.3, CIRCLE).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LAWS)
def test_batched_times_are_times_one_by_one(kind):
    law, x, t = LAWS[kind]((2,)), randn(5, 2), torch.tensor([0.2, 0.3, 0.5, 0.9, 1.0], dtype=WIDE)
    for method in ("marginal_log_prob", "marginal_score", "posterior_mean", "label_posterior"):
        together = getattr(law, method)(x, t, CIRCLE)
        apart = [getattr(law, method)(x[[i]], float(t[i]), CIRCLE) for i in range(5)]
        torch.testing.assert_close(together, torch.cat(apart))
        torch.testing.assert_close(getattr(law, method)(x, t[2], CIRCLE)[2], together[2])


@pytest.mark.parametrize("kind", LAWS)
def test_a_batch_is_cut_in_pieces_without_a_trace(kind):
    law = LAWS[kind]((2,))
    n = 2 * (2**21 // law._parts.variances.numel()) + 3
    x = randn(64, 2).repeat(n // 64 + 1, 1)[:n].to(torch.float32)
    t = torch.linspace(0.1, 1, 64, dtype=WIDE).repeat(n // 64 + 1)[:n]
    whole = law.to(dtype=torch.float32).posterior_mean(x, t, CIRCLE)
    assert whole.shape == x.shape
    first, last = whole[:64], whole[-(n % 64) - 64 : n - n % 64]
    torch.testing.assert_close(first, last)


def test_an_empty_batch_has_empty_answers():
    law = mixture()
    assert law.posterior_mean(randn(0, 2), 0.5, CIRCLE).shape == (0, 2)
    assert law.log_prob(randn(0, 2)).shape == (0,)


def test_python_floats_keep_their_digits():
    """Numbers given for covariances, weights and curves don't pass through float32."""
    law = GaussianMixture(randn(2, 2), 0.1, [0.1, 0.9])
    assert law._parts.variances.tolist() == [[0.1], [0.1]] and law.weights.tolist() == [0.1, 0.9]
    assert Gaussian(randn(2), 0.1).cov[0, 0] == 0.1
    x = randn(3, 2)
    alpha, sigma = 1 - 0.3, 0.3
    score = law.marginal(Numbers(), 0.3).score(x)
    torch.testing.assert_close(
        law.marginal_score(x, 0.3, Numbers()), score, rtol=1e-14, atol=1e-14
    )
    torch.testing.assert_close(
        alpha * law.posterior_mean(x, 0.3, Numbers()), x + sigma**2 * score, rtol=1e-14, atol=1e-14
    )


def test_law_is_an_interface():
    with pytest.raises(TypeError, match="abstract"):
        Law()


# --- Against outsiders --------------------------------------------------------------


@pytest.mark.parametrize("form", ["number", "round", "diagonal", "full"])
def test_against_scipy(form):
    stats = pytest.importorskip("scipy.stats")
    law = mixture(4, (3,), form=form)
    x, alpha, sigma = randn(6, 3, seed=9), float(CIRCLE.alpha(0.4)), float(CIRCLE.sigma(0.4))
    for a, s, ours in [
        (1, 0, law.log_prob(x)),
        (alpha, sigma, law.marginal_log_prob(x, 0.4, CIRCLE)),
    ]:
        densities = [
            stats.multivariate_normal(a * m, a**2 * C + s**2 * np.eye(3)).pdf(x)
            for m, C in zip(*(part.numpy() for part in dense(law, form)), strict=True)
        ]
        np.testing.assert_allclose(ours, np.log(law.weights.numpy() @ densities), rtol=1e-10)


@pytest.mark.parametrize("kind", LAWS)
def test_score_is_the_gradient(kind):
    law, x = LAWS[kind]((1, 2, 2)), randn(5, 1, 2, 2).requires_grad_()
    t = torch.linspace(0.2, 1, 5, dtype=WIDE)
    (gradient,) = torch.autograd.grad(law.marginal_log_prob(x, t, CIRCLE).sum(), x)
    torch.testing.assert_close(law.marginal_score(x, t, CIRCLE), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LAWS)
def test_posterior_mean_is_differentiable(kind):
    law, x = LAWS[kind]((2,)), randn(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: law.posterior_mean(x, 0.5, CIRCLE), x)
    assert torch.autograd.gradcheck(lambda x: law.marginal_score(x, 0.5, CIRCLE), x)
    one = torch.func.jacrev(lambda x: law.posterior_mean(x[None], 0.5, CIRCLE)[0])
    torch.testing.assert_close(
        torch.func.vmap(one)(x.detach()), torch.stack([one(row) for row in x.detach()])
    )


@pytest.mark.parametrize("n,d", [(1, 1), (5, 2), (40, 64)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_empirical_against_brute_force(n, d, offset):
    data, t = randn(n, d) + offset, torch.linspace(0.05, 1, 6, dtype=WIDE)
    a, s = CIRCLE.alpha(t)[:, None], CIRCLE.sigma(t)[:, None]
    x = a * data[torch.arange(6) % n] + s * randn(6, d, seed=3)
    logits = -(x[:, None] - a[..., None] * data).square().sum(-1) / (2 * s**2)
    law = Empirical(data)
    torch.testing.assert_close(law.posterior_mean(x, t, CIRCLE), logits.softmax(1) @ data)
    log_prob = logits.logsumexp(1) - math.log(n) - d / 2 * (2 * math.pi * s[:, 0] ** 2).log()
    torch.testing.assert_close(law.marginal_log_prob(x, t, CIRCLE), log_prob)


def test_a_noised_data_set_is_a_mixture():
    law, x = Empirical(randn(6, 2), torch.arange(6) % 2), randn(4, 2, seed=5)
    noised = law.marginal(CIRCLE, 0.5)
    assert isinstance(noised, GaussianMixture) and torch.equal(noised.labels, law.labels)
    torch.testing.assert_close(noised.log_prob(x), law.marginal_log_prob(x, 0.5, CIRCLE))
    assert isinstance(law.marginal(CIRCLE, 0.0), Empirical)
    torch.testing.assert_close(law.marginal(CIRCLE, 0.0).cov, law.cov)


@pytest.mark.parametrize("kind", ["mixture", "round", "gaussian"])
def test_marginal_keeps_the_kind(kind):
    law, x = LAWS[kind]((2,)), randn(4, 2)
    noised = law.marginal(CIRCLE, torch.tensor(0.3, dtype=WIDE))
    assert type(noised) is type(law)
    torch.testing.assert_close(noised.log_prob(x), law.marginal_log_prob(x, 0.3, CIRCLE))
    torch.testing.assert_close(noised.score(x), law.marginal_score(x, 0.3, CIRCLE))
    cov = CIRCLE.alpha(0.3) ** 2 * law.cov + CIRCLE.sigma(0.3) ** 2 * torch.eye(2, dtype=WIDE)
    torch.testing.assert_close(noised.cov, cov)


# --- Properties at random -------------------------------------------------------------

SEEDS, TIMES = st.integers(0, 10_000), st.floats(0, 1)
FORMS = st.sampled_from(["number", "round", "diagonal", "full"])
quickly = settings(max_examples=60, deadline=None)


@quickly
@given(seed=SEEDS, t=st.floats(0.01, 0.99), k=st.integers(1, 5), d=st.integers(1, 4), form=FORMS)
def test_tweedie(seed, t, k, d, form):
    law, x = mixture(k, (d,), seed, form), 3 * randn(4, d, seed=seed + 7)
    a, s = CIRCLE.alpha(t), CIRCLE.sigma(t)
    left = a * law.posterior_mean(x, t, CIRCLE)
    torch.testing.assert_close(
        left, x + s**2 * law.marginal_score(x, t, CIRCLE), rtol=1e-9, atol=1e-9
    )


@quickly
@given(seed=SEEDS, t=TIMES, k=st.integers(1, 5), form=FORMS)
def test_labels_add_up(seed, t, k, form):
    law, x = mixture(k, (2,), seed, form), 3 * randn(4, 2, seed=seed + 7)
    p = law.label_posterior(x, t, CIRCLE)
    torch.testing.assert_close(p.sum(1), torch.ones(4, dtype=WIDE))
    tower = sum(p[:, [y]] * law.posterior_mean(x, t, CIRCLE, cond=y) for y in range(k))
    torch.testing.assert_close(tower, law.posterior_mean(x, t, CIRCLE), rtol=1e-9, atol=1e-9)


@quickly
@given(seed=SEEDS, t=TIMES, s=TIMES, d=st.integers(1, 4))
def test_flow_there_and_back(seed, t, s, d):
    law, x = Gaussian(randn(d, seed=seed), spd(1, d, seed)[0]), randn(4, d, seed=seed + 7)
    there = law.flow_map(x, t, s, CIRCLE)
    torch.testing.assert_close(law.flow_map(there, s, t, CIRCLE), x, rtol=1e-9, atol=1e-9)
    z = [law.marginal(CIRCLE, u).log_prob(y) for u, y in [(t, x), (s, there)]]
    jacobian = 0.5 * (law.marginal(CIRCLE, s).cov.logdet() - law.marginal(CIRCLE, t).cov.logdet())
    torch.testing.assert_close(z[0] - z[1], jacobian.expand(4), rtol=1e-8, atol=1e-8)


@quickly
@given(seed=SEEDS, t=TIMES, far=st.floats(0, 30), kind=st.sampled_from(list(LAWS)))
def test_no_nan_however_far(seed, t, far, kind):
    """Up to 1e30 away in float32, where squares overflow, at any noise level."""
    law = LAWS[kind]((2,)).to(dtype=torch.float32)
    x = 10**far * torch.nn.functional.normalize(randn(4, 2, seed=seed)).float()
    assert law.posterior_mean(x, t, CIRCLE).isfinite().all()
    assert not law.label_posterior(x, t, CIRCLE).isnan().any()
    if kind != "empirical":
        assert not law.marginal_log_prob(x, t, CIRCLE).isnan().any()
        assert not law.marginal_score(x, t, CIRCLE).isnan().any()


@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("t", [0.0, 1e-8, 1e-4, 0.5, 1 - 1e-4, 1 - 1e-8, 1.0])
def test_float32_is_as_good_as_its_input(kind, t):
    law = LAWS[kind]((1, 4, 4))
    x = CIRCLE.alpha(t) * law.sample(50, generator=generator()) + CIRCLE.sigma(t) * randn(
        50, 1, 4, 4
    )
    x = x.float()
    low = law.to(dtype=torch.float32).posterior_mean(x, t, CIRCLE)
    high = law.to(dtype=torch.float32).to(dtype=WIDE).posterior_mean(x.double(), t, CIRCLE)
    torch.testing.assert_close(low.double(), high, rtol=0, atol=2e-5)


def test_ends_of_time():
    for kind in LAWS:
        law = LAWS[kind]((2,))
        x = law.sample(5)
        torch.testing.assert_close(law.posterior_mean(x, 0.0, CIRCLE), x)
        numbers = law.posterior_mean(x, 1.0, Numbers())
        torch.testing.assert_close(numbers, law.mean.expand(5, 2))
    assert torch.equal(
        Empirical(randn(4, 2)).posterior_mean(randn(4, 2) + 1e-3, 0.0, CIRCLE), randn(4, 2)
    )


# --- Samples and labels -------------------------------------------------------------


@pytest.mark.parametrize("form", ["full", "diagonal", "round"])
def test_samples_have_the_moments(form):
    law = mixture(3, (1, 2, 1), form=form)
    x = law.sample(200_000, generator=generator()).flatten(1)
    torch.testing.assert_close(x.mean(0), law.mean.flatten(), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), law.cov, atol=0.1, rtol=0.02)


def test_samples_of_a_label():
    law = Empirical(randn(6, 2), torch.tensor([0, 4, 0, 4, 4, 0]))
    asked = torch.tensor([0, 4, -1] * 1000)
    x = law.sample(3000, cond=asked, generator=generator())
    which = (x[:, None] == randn(6, 2)).all(-1).double().argmax(1)
    assert torch.equal(law.labels[which][asked >= 0], asked[asked >= 0])
    counts = torch.bincount(which[asked == -1], minlength=6)
    assert (counts > 100).all()
    only = torch.bincount(which[asked == 0], minlength=6)
    assert (only[[0, 2, 5]] > 250).all() and only.sum() == 1000


def test_samples_follow_the_generator():
    law = mixture()
    pair = [law.sample(5, generator=generator(3), cond=1) for _ in range(2)]
    assert torch.equal(*pair)
    before = torch.random.get_rng_state()
    law.sample(5, generator=generator(3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_cond_in_all_its_forms():
    law, x = Empirical(randn(6, 2), torch.arange(6) % 2), randn(4, 2)
    one = Empirical(randn(6, 2)[1::2])
    wanted = one.marginal_log_prob(x, 0.5, CIRCLE)
    for cond in (
        1,
        torch.tensor(1),
        torch.ones(4, dtype=torch.int64),
        torch.ones(4, dtype=torch.int32),
    ):
        torch.testing.assert_close(law.marginal_log_prob(x, 0.5, CIRCLE, cond), wanted)
    free = law.marginal_score(x, 0.5, CIRCLE, torch.tensor([1, -1, 1, -1]))
    torch.testing.assert_close(free[1::2], law.marginal_score(x, 0.5, CIRCLE)[1::2])
    torch.testing.assert_close(free[::2], one.marginal_score(x, 0.5, CIRCLE)[::2])


# --- The denoiser -----------------------------------------------------------------


def test_denoiser():
    from diffnotes.processes import VP

    law, process, x = mixture(), VP(), randn(4, 2)
    denoiser = law.denoiser(process)
    assert denoiser.shape == (2,) and denoiser.dtype == WIDE
    t = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=WIDE)
    torch.testing.assert_close(denoiser(x, t), law.posterior_mean(x, t, process))
    torch.testing.assert_close(denoiser(x, t, 2), law.posterior_mean(x, t, process, 2))
    low = law.denoiser(process).to(dtype=torch.float32)
    assert low.net.law.dtype == torch.float32 and law.dtype == WIDE


# --- Refusals ------------------------------------------------------------------------

PAIR = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "make,error,words",
    [
        (
            lambda: GaussianMixture(torch.zeros(2, 2, dtype=torch.int64), 1.0),
            TypeError,
            "means.*int64",
        ),
        (lambda: GaussianMixture([[0.0]], 1.0), TypeError, "means.*list"),
        (lambda: GaussianMixture(torch.zeros(0, 2), 1.0), ValueError, "empty"),
        (lambda: GaussianMixture(torch.tensor(0.0), 1.0), ValueError, "empty"),
        (lambda: GaussianMixture(torch.tensor([[math.nan]]), 1.0), ValueError, "finite.*nan"),
        (lambda: GaussianMixture(PAIR, 0.0), ValueError, "component 0 .* eigenvalue 0"),
        (lambda: GaussianMixture(PAIR, -1), ValueError, "component 0"),
        (
            lambda: GaussianMixture(PAIR, torch.tensor([1.0, -0.5])),
            ValueError,
            "component 1 .*-0.5",
        ),
        (
            lambda: GaussianMixture(PAIR, torch.tensor([[1.0, 1], [1, 0]])),
            ValueError,
            "component 1",
        ),
        (
            lambda: GaussianMixture(PAIR, torch.tensor([[[1.0, 0], [0, 1]], [[1, 2], [2, 1]]])),
            ValueError,
            "component 1 is not positive definite: least eigenvalue -1",
        ),
        (
            lambda: GaussianMixture(PAIR, torch.ones(2, 2, 2)),
            ValueError,
            "component 0 is not positive definite",
        ),
        (
            lambda: GaussianMixture(PAIR, torch.tensor([[1.0, 0.5], [0, 1]]).expand(2, 2, 2)),
            ValueError,
            "symmetric",
        ),
        (lambda: GaussianMixture(PAIR, torch.ones(3)), ValueError, r"covariances .*\(3,\)"),
        (
            lambda: GaussianMixture(PAIR, torch.ones(2, 3, 3)),
            ValueError,
            r"covariances .*\(2, 3, 3\)",
        ),
        (lambda: GaussianMixture(PAIR, math.inf), ValueError, "finite"),
        (lambda: GaussianMixture(PAIR, 1.0, torch.tensor([0.5, 0.6])), ValueError, "sum 1"),
        (lambda: GaussianMixture(PAIR, 1.0, torch.tensor([0.5, 0.4])), ValueError, "sum 1"),
        (lambda: GaussianMixture(PAIR, 1.0, torch.tensor([1.5, -0.5])), ValueError, "positive"),
        (lambda: GaussianMixture(PAIR, 1.0, torch.tensor([1.0, 0.0])), ValueError, "positive"),
        (lambda: GaussianMixture(PAIR, 1.0, torch.ones(3) / 3), ValueError, "2 positive numbers"),
        (lambda: GaussianMixture(PAIR, 1.0, [math.nan, 0.5]), ValueError, "positive"),
        (lambda: Gaussian(torch.tensor([1, 2]), 1.0), TypeError, "mean.*int64"),
        (lambda: Gaussian(torch.zeros(2), torch.ones(3)), ValueError, r"covariance must.*\(3,\)"),
        (lambda: GaussianMixture(PAIR, math.nan), ValueError, "covariances .*got nan"),
        (lambda: mixture().to(torch.int64), TypeError, "floating"),
        (lambda: mixture().to(dtype=torch.int64), TypeError, "floating"),
        (lambda: mixture().denoiser(Circle), TypeError, r"an instance, Circle\(\)"),
        (lambda: Gaussian(torch.zeros(2), torch.ones(2, 2)), ValueError, "not positive definite"),
        (lambda: Empirical(torch.arange(4)), TypeError, "data.*int64"),
        (lambda: Empirical(torch.zeros(0, 2)), ValueError, "empty"),
        (lambda: Empirical(torch.tensor([math.inf])), ValueError, "finite"),
        (lambda: Empirical(PAIR, torch.tensor([0.0, 1.0])), TypeError, "labels.*float32"),
        (lambda: Empirical(PAIR, torch.tensor([True, False])), TypeError, "labels.*bool"),
        (lambda: Empirical(PAIR, torch.tensor([0, 1, 2])), ValueError, r"labels .*\(2,\)"),
        (lambda: Empirical(PAIR, torch.tensor([0, -1])), ValueError, "at least 0, got -1"),
    ],
)
def test_bad_laws(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    "ask,error,words",
    [
        (lambda law, x: law.log_prob(x.long()), TypeError, "int64"),
        (lambda law, x: law.log_prob(x[:, :1]), ValueError, r"\(B, 2\), got \(3, 1\)"),
        (lambda law, x: law.score(x[0]), ValueError, "shape"),
        (lambda law, x: law.posterior_mean(x, -0.1, CIRCLE), ValueError, "t must lie"),
        (lambda law, x: law.posterior_mean(x, 1.1, CIRCLE), ValueError, "t must lie"),
        (lambda law, x: law.posterior_mean(x, math.nan, CIRCLE), ValueError, "t must lie"),
        (
            lambda law, x: law.posterior_mean(x, torch.rand(2), CIRCLE),
            ValueError,
            "one number per",
        ),
        (
            lambda law, x: law.posterior_mean(x, torch.rand(3, 1), CIRCLE),
            ValueError,
            "t must have",
        ),
        (lambda law, x: law.marginal_score(x, 0.5, CIRCLE, 3), ValueError, "cond 3 is none"),
        (lambda law, x: law.marginal_score(x, 0.5, CIRCLE, -2), ValueError, "cond -2 is none"),
        (lambda law, x: law.marginal_score(x, 0.5, CIRCLE, 1.0), TypeError, "cond .*float"),
        (lambda law, x: law.marginal_score(x, 0.5, CIRCLE, True), TypeError, "cond .*bool"),
        (
            lambda law, x: law.marginal_score(x, 0.5, CIRCLE, torch.tensor([0, 1])),
            ValueError,
            "cond",
        ),
        (lambda law, x: law.sample(0), ValueError, "n must be"),
        (lambda law, x: law.sample(2.0), TypeError, "n must be"),
        (lambda law, x: law.sample(2, cond=9), ValueError, "cond 9"),
        (lambda law, x: law.marginal(CIRCLE, torch.rand(2)), ValueError, "one time"),
        (lambda law, x: law.marginal(CIRCLE, 2.0), ValueError, "t must lie"),
    ],
)
def test_bad_questions(ask, error, words):
    with pytest.raises(error, match=words):
        ask(mixture(), randn(3, 2))


def test_point_masses_have_no_density():
    law, x = Empirical(randn(4, 2)), randn(3, 2)
    for ask in (
        law.log_prob,
        law.score,
        lambda x: law.marginal_log_prob(x, 0.0, CIRCLE),
        lambda x: law.marginal_score(x, torch.tensor([0.5, 0.0, 1.0]), CIRCLE),
    ):
        with pytest.raises(ValueError, match="no density"):
            ask(x)
    for ask in (lambda: law.label_posterior(x, 0.5, CIRCLE), lambda: law.sample(2, cond=0)):
        with pytest.raises(ValueError, match="labels="):
            ask()


def test_covariances_within_rounding():
    """A product of float32 matrices, symmetric but for rounding, is a covariance."""
    a = randn(1, 20, 20).float()
    C = a @ a.mT
    C[0, 0, 1] *= 1 + 1e-7
    law = GaussianMixture(torch.zeros(1, 20), C)
    torch.testing.assert_close(law.cov, C[0], rtol=1e-4, atol=1e-4)


def test_to_takes_a_dtype_first():
    law = mixture().to(torch.float32)
    assert law.dtype == law.weights.dtype == torch.float32 and law.labels.dtype == torch.int64
    assert law.to("cpu", WIDE).dtype == WIDE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_default_weights_in_half_precision(dtype):
    law = GaussianMixture(torch.zeros(61, 2, dtype=dtype), 1.0)
    assert law.weights.dtype == dtype
    torch.testing.assert_close(law.weights, torch.full((61,), 1 / 61, dtype=dtype))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_one_covariance_in_all_its_forms(kind):
    for numbers in ([1.0, 2.0], [[1.0, 0.5], [0.5, 2.0]]):
        given = kind(numbers)
        expected = torch.as_tensor(given, dtype=WIDE)
        expected = expected.diag() if expected.ndim == 1 else expected
        law = Gaussian(torch.zeros(2, dtype=WIDE), given)
        torch.testing.assert_close(law.cov, expected)
