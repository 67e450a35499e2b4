"""Metrics: invariances, outside libraries, closed forms, refusals the chapter does not show."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffnotes import metrics
from diffnotes.data import digits
from diffnotes.metrics import (
    DigitFeatures,
    Estimate,
    copied_share,
    copy_score,
    cubic_kernel,
    digit_features,
    directions,
    extract,
    frechet_distance,
    gaussian_frechet,
    gaussian_kernel,
    jackknife,
    kernel_distance,
    nearest_distance,
    neighbour_scores,
    proportion,
    sliced_wasserstein,
)

few = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
OMEGA = directions(20, 3, generator=torch.Generator().manual_seed(0))
DISTANCES = {
    "frechet": frechet_distance,
    "cubic": lambda x, y: kernel_distance(x, y).value,
    "gaussian": lambda x, y: kernel_distance(x, y, gaussian_kernel).value,
    "sliced": lambda x, y: sliced_wasserstein(x, y, OMEGA),
}
each_distance = pytest.mark.parametrize("name", DISTANCES)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def clouds(seed, n=12, m=9, d=3):
    g = torch.Generator().manual_seed(seed)
    spread = 0.5 + torch.rand(2, d, generator=g, dtype=torch.float64)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * spread[0]
    return x, torch.randn(m, d, generator=g, dtype=torch.float64) * spread[1] + 0.4


def rotation(d, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]


def covariance(d, seed, rank=None):
    g = torch.Generator().manual_seed(seed)
    factor = torch.randn(d, rank or d, generator=g, dtype=torch.float64)
    return factor @ factor.T / d


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


# -- estimates ---------------------------------------------------------------------------------


@given(n=st.integers(1, 400), data=st.data())
@few
def test_proportion_is_wilsons_interval(n, data):
    stats = pytest.importorskip("scipy.stats")
    k = data.draw(st.integers(0, n))
    estimate = proportion(torch.arange(n) < k)
    level = 1 - 2 * stats.norm.sf(2.0)
    ci = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert estimate.value == k / n and estimate.n == (n,)
    assert estimate[1:3] == pytest.approx(tuple(ci), abs=1e-12)
    assert 0 <= estimate.low < estimate.high <= 1 or math.isclose(estimate.high, 1)


@pytest.mark.parametrize("bad", [torch.ones(3), [True], torch.tensor([1, 0]), None])
def test_proportion_refuses_what_is_no_bool_tensor(bad):
    with pytest.raises(TypeError, match="bool"):
        proportion(bad)


@pytest.mark.parametrize("shape", [(0,), (2, 2), ()])
def test_proportion_refuses_shapes(shape):
    with pytest.raises(ValueError, match="shape"):
        proportion(torch.zeros(shape, dtype=torch.bool))


def test_estimate_says_value_interval_and_sizes():
    assert str(Estimate(0.5, 0.25, 0.75, (10, 20))) == "0.500 [0.250, 0.750] (n = 10, 20)"


@given(seed=seeds, n=st.integers(2, 30), groups=st.integers(2, 30))
@few
def test_jackknife_of_a_mean_is_the_mean(seed, n, groups):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    estimate = jackknife(torch.mean, x, groups=groups)
    close(estimate.value, x.mean().item())
    assert estimate.low <= estimate.value <= estimate.high and estimate.n == (n,)
    if groups >= n:
        close(estimate.high - estimate.value, 2 * x.std().item() / n**0.5)


@given(seed=seeds, groups=st.integers(2, 12))
@few
def test_jackknife_removes_a_bias_of_one_over_n_whatever_the_groups(seed, groups):
    """A statistic that is nothing but its bias comes back as its limit, exactly."""
    x, y = clouds(seed, 11, 7)
    biased = jackknife(lambda x, y: 2.0 + 3 / len(x) - 5 / len(y), x, y, groups=groups)
    close(biased.value, 2.0)
    plain = jackknife(lambda x, y: 2.0 + 3 / len(x), x, y, groups=groups, debias=False)
    close(plain.value, 2.0 + 3 / 11)


def test_jackknife_adds_the_errors_of_its_samples():
    x, y = clouds(0)
    x, y = x[:, 0], y[:, 0]
    both = jackknife(lambda x, y: x.mean() - y.mean(), x, y, groups=20)
    half = [2 * u.std().item() / len(u) ** 0.5 for u in (x, y)]
    close(both.high - both.value, math.hypot(*half))
    assert both.n == (12, 9)


def test_jackknife_of_several_numbers_is_the_jackknife_of_each():
    x, y = clouds(8)

    def both(x, y):
        return x.mean(), y.var() - x.var()

    together = jackknife(both, x, y, groups=5)
    apart = [jackknife(lambda x, y, i=i: both(x, y)[i], x, y, groups=5) for i in range(2)]
    assert len(together) == 2
    for found, expected in zip(together, apart, strict=True):
        assert found.n == expected.n == (12, 9)
        close(f64(found[:3]), f64(expected[:3]))
    scores = jackknife(neighbour_scores, x, y, groups=3, debias=False)
    assert [score.value for score in scores] == list(neighbour_scores(x, y))
    for bad in (torch.zeros(2, 2), torch.zeros(0)):
        with pytest.raises(ValueError, match="statistic"):
            jackknife(lambda x, bad=bad: bad, x)


def test_jackknife_depends_on_its_seed_alone():
    x = torch.randn(50)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (jackknife(torch.var, x, groups=7) for _ in range(2))
    assert first == second != jackknife(torch.var, x, groups=7, seed=1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "error, arguments, options",
    [
        (ValueError, [torch.randn(5)], dict(groups=1)),
        (ValueError, [torch.randn(1)], {}),
        (ValueError, [], {}),
        (TypeError, [torch.randn(5)], dict(groups=2.0)),
        (ValueError, [torch.full((5,), torch.nan)], {}),
    ],
)
def test_jackknife_refuses(error, arguments, options):
    with pytest.raises(error):
        jackknife(lambda *x: x[0].mean(), *arguments, **options)


# -- distances: what holds for all of them --------------------------------------------------------


@each_distance
@given(seed=seeds)
@few
def test_distances_are_symmetric_and_blind_to_order(name, seed):
    x, y = clouds(seed)
    distance = DISTANCES[name]
    shuffle = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    close(distance(x, y), distance(y, x))
    close(distance(x, y), distance(x[shuffle], y.flip(0)))


@pytest.mark.parametrize("name", ["frechet", "gaussian"])
@given(seed=seeds)
@few
def test_rigid_motions_change_nothing(name, seed):
    x, y = clouds(seed)
    Q, shift = rotation(3, seed), f64([3.0, -1.0, 2.0])
    close(DISTANCES[name](x @ Q + shift, y @ Q + shift), DISTANCES[name](x, y), rtol=1e-8)


@given(seed=seeds)
@few
def test_turning_cloud_and_directions_together_changes_nothing(seed):
    x, y = clouds(seed)
    Q = rotation(3, seed)
    close(sliced_wasserstein(x @ Q, y @ Q, OMEGA @ Q), sliced_wasserstein(x, y, OMEGA))
    close(kernel_distance(x @ Q, y @ Q).value, kernel_distance(x, y).value)


@pytest.mark.parametrize("name, power", [("frechet", 2), ("sliced", 2)])
@given(seed=seeds, scale=st.floats(0.1, 10))
@few
def test_squared_distances_scale_with_the_square(name, power, seed, scale):
    x, y = clouds(seed)
    close(DISTANCES[name](scale * x, scale * y), scale**power * DISTANCES[name](x, y), rtol=1e-7)


@pytest.mark.parametrize("name", ["frechet", "sliced"])
@given(seed=seeds, n=st.integers(2, 20))
@few
def test_a_cloud_is_at_no_distance_from_itself(name, seed, n):
    x, _ = clouds(seed, n)
    assert 0 <= DISTANCES[name](x, x.flip(0)) < 1e-13


@each_distance
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_computed_in_double_precision_whatever_comes_in(name, dtype):
    x, y = (u.to(dtype) for u in clouds(1))
    value = DISTANCES[name](x, y)
    assert value == DISTANCES[name](x.double(), y.double())
    assert not torch.is_tensor(value) or (value.dtype == torch.float64 and value.ndim == 0)


def all_metrics(x, y):
    """Every metric of two clouds, as functions without arguments."""
    return {
        "frechet": lambda: frechet_distance(x, y),
        "kernel": lambda: kernel_distance(x, y),
        "sliced": lambda: sliced_wasserstein(x, y, OMEGA),
        "neighbours": lambda: neighbour_scores(x, y),
        "nearest": lambda: nearest_distance(x, y),
        "copy": lambda: copy_score(x, y, y),
        "share": lambda: copied_share(x, y, y),
    }


GOOD = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
SPOILT = GOOD.clone()
SPOILT[4, 1] = torch.nan
REFUSED = [
    (TypeError, "floating", torch.ones(9, 3, dtype=torch.int64)),
    (TypeError, "floating", torch.ones(9, 3, dtype=torch.bool)),
    (TypeError, "floating", np.ones((9, 3))),
    (ValueError, "finite", SPOILT),
    (ValueError, "finite", GOOD / 0),
    (ValueError, "dimension", GOOD[:, :2]),
    (ValueError, "least", GOOD[:, 0]),
    (ValueError, "least", GOOD[:0]),
    (ValueError, "least", GOOD[:, :0]),
]


@pytest.mark.parametrize("metric", all_metrics(GOOD, GOOD))
@pytest.mark.parametrize("error, message, bad", REFUSED)
def test_bad_clouds_are_refused_on_either_side(metric, error, message, bad):
    for pair in ((bad, GOOD), (GOOD, bad)):
        with pytest.raises(error, match=message):
            all_metrics(*pair)[metric]()


@pytest.mark.parametrize("metric", all_metrics(GOOD, GOOD))
def test_images_are_flattened(metric):
    x, y = torch.randn(10, 1, 3, 1), torch.randn(8, 1, 3, 1)
    assert str(all_metrics(x, y)[metric]()) == str(
        all_metrics(x.flatten(1), y.flatten(1))[metric]()
    )


@pytest.mark.parametrize("metric, least", [("frechet", 2), ("kernel", 3), ("neighbours", 6)])
def test_too_few_points_are_refused(metric, least):
    all_metrics(GOOD[:least], GOOD)[metric]()
    with pytest.raises(ValueError, match=f"at least {least} points"):
        all_metrics(GOOD[: least - 1], GOOD)[metric]()


# -- the Frechet distance -------------------------------------------------------------------------


@given(seed=seeds, n=st.integers(2, 30), d=st.integers(1, 8))
@few
def test_samples_give_the_distance_of_their_moments(seed, n, d):
    x, y = clouds(seed, n, 20, d)
    moments = [m for u in (x, y) for m in (u.mean(0), u.T.cov().reshape(d, d))]
    close(frechet_distance(x, y), gaussian_frechet(*moments), atol=1e-7)


@given(seed=seeds)
@few
def test_it_is_the_cost_of_the_optimal_map(seed):
    """T = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2 carries N(0, A) to N(0, B)."""
    A, B = (covariance(4, seed + i) + 0.05 * torch.eye(4).double() for i in range(2))

    def power(C, exponent):
        values, axes = torch.linalg.eigh(C)
        return (axes * values**exponent) @ axes.T

    root = power(A, 0.5)
    T = power(A, -0.5) @ power(root @ B @ root, 0.5) @ power(A, -0.5)
    eye, zero = torch.eye(4).double(), torch.zeros(4).double()
    close(T @ A @ T.T, B, rtol=1e-6, atol=1e-9)
    cost = ((eye - T) @ A @ (eye - T).T).trace()
    close(gaussian_frechet(zero, A, zero, B), cost, rtol=1e-6, atol=1e-9)


@given(seed=seeds)
@few
def test_its_root_obeys_the_triangle_inequality(seed):
    laws = [(covariance(3, seed + i)[0], covariance(3, seed + 7 * i)) for i in range(3)]
    ab, bc, ac = (gaussian_frechet(*laws[i], *laws[j]).sqrt() for i, j in ((0, 1), (1, 2), (0, 2)))
    assert ac <= ab + bc + 1e-9


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_singular_covariances(rank):
    A, zero = covariance(5, 1, rank), torch.zeros(5).double()
    assert gaussian_frechet(zero, A, zero, A) < 1e-13
    close(gaussian_frechet(zero, A, zero, 0 * A), A.trace())
    close(gaussian_frechet(zero, A, zero, 4 * A), A.trace())
    B = covariance(5, 2)
    linalg = pytest.importorskip("scipy.linalg")
    half = torch.from_numpy(linalg.sqrtm(B.numpy()).real)
    overlap = torch.linalg.eigvalsh(half @ A @ half)[-rank:].sqrt().sum()
    close(gaussian_frechet(zero, A, zero, B), A.trace() + B.trace() - 2 * overlap)


def test_gaussian_frechet_takes_single_precision_and_refuses_no_covariance():
    mean, eye = torch.zeros(3), torch.eye(3)
    value = gaussian_frechet(mean, covariance(3, 0).float(), mean, eye)
    close(value, gaussian_frechet(mean, covariance(3, 0), mean, eye), rtol=1e-5)
    skew = eye.clone()
    skew[0, 1] = 0.5
    for bad in (skew, -eye, torch.eye(4), eye[:2], torch.diag(torch.tensor([1.0, 1.0, -0.1]))):
        with pytest.raises(ValueError):
            gaussian_frechet(mean, bad, mean, eye)
        with pytest.raises(ValueError):
            gaussian_frechet(mean, eye, mean, bad)
    for bad in (torch.zeros(2), torch.tensor([0.0, torch.inf, 0.0])):
        with pytest.raises(ValueError):
            gaussian_frechet(bad, eye, mean, eye)
    with pytest.raises(TypeError):
        gaussian_frechet(torch.zeros(3, dtype=torch.int64), eye, mean, eye)


# -- the kernel distance --------------------------------------------------------------------------


@given(seed=seeds, n=st.integers(3, 8), m=st.integers(3, 8))
@few
def test_kernel_distance_and_interval_by_leaving_out_one(seed, n, m):
    x, y = clouds(seed, n, m, 2)

    def naive(x, y):
        pairs = [len(u) * (len(u) - 1) for u in (x, y)]
        within = [gaussian_kernel(u, u).sum() - len(u) for u in (x, y)]
        return within[0] / pairs[0] + within[1] / pairs[1] - 2 * gaussian_kernel(x, y).mean()

    found = kernel_distance(x, y, gaussian_kernel)
    close(f64(found[:3]), f64(jackknife(naive, x, y, groups=10)[:3]))
    assert found.n == (n, m)


def test_kernels():
    x, y = f64([[1.0, 2.0]]), f64([[3.0, -1.0], [1.0, 2.0]])
    close(cubic_kernel(x, y), f64([[1.5**3, 3.5**3]]))
    close(gaussian_kernel(x, y, 2.0), f64([[math.exp(-13 / 8), 1.0]]))


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_kernel_distance_of_gaussians_in_any_dimension(scale):
    """Isotropic laws: E k = (1 + s/h^2)^(-d/2) exp(-|delta|^2 / (2 (h^2 + s)))."""
    d, delta, g = 5, 0.5, torch.Generator().manual_seed(1)

    def mean(s, gap):
        return (1 + s / scale**2) ** (-d / 2) * math.exp(-d * gap**2 / (2 * (scale**2 + s)))

    exact = mean(2, 0) + mean(2 * 0.49, 0) - 2 * mean(1.49, delta)
    runs = []
    for _ in range(150):
        x, y = torch.randn(2, 50, d, generator=g, dtype=torch.float64)
        runs.append(kernel_distance(x, delta + 0.7 * y, partial(gaussian_kernel, scale=scale)))
    values = f64([run.value for run in runs])
    assert abs(values.mean() - exact) < 4 * values.std() / 150**0.5
    held = [run.low <= exact <= run.high for run in runs]
    assert sum(held) > 0.86 * len(held)  # 4 standard errors below 0.95


def test_large_tables_go_in_blocks(monkeypatch):
    x, y = clouds(5, 40, 30)
    train = torch.cat([x[:5], y])

    def everything():
        scores = neighbour_scores(x, y, 3), copy_score(x, train, y), kernel_distance(x, y)
        return [f64(score[:3]) for score in scores]

    whole = everything()

    def narrow(x, y, pairwise=metrics._distances):
        for start in range(0, len(x), 7):
            yield start, pairwise(x[start : start + 7], y)

    monkeypatch.setattr(metrics, "_blocks", narrow)
    close(torch.stack(everything()), torch.stack(whole))


# -- sliced ---------------------------------------------------------------------------------------


@given(seed=seeds, n=st.integers(1, 9), m=st.integers(1, 9))
@few
def test_on_a_line_it_is_scipys_distance(seed, n, m):
    stats = pytest.importorskip("scipy.stats")
    x, y = clouds(seed, n, m, 1)
    expected = stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
    close(sliced_wasserstein(x, y, f64([[1.0]]), p=1), f64(expected))
    close(
        sliced_wasserstein(x, y, OMEGA[:, :1], p=3),
        sliced_wasserstein(x.repeat(2, 1), y.repeat(3, 1), OMEGA[:, :1], p=3),
    )


def test_quantiles_of_two_gaussians():
    """Midpoint quantiles of N(0, 1) and N(1, 4): W2^2 = 1 + 1, less the tails beyond 1/(2n)."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    z = torch.special.ndtri(u)[:, None]
    assert abs(sliced_wasserstein(z, 1 + 2 * z, f64([[1.0]])) - 2) < 1e-3


def test_many_directions_are_taken_in_pieces():
    x, y = clouds(3)
    omega = directions(150, 3, generator=torch.Generator().manual_seed(2))
    close(omega.norm(dim=1), torch.ones(150).double())
    pieces = [sliced_wasserstein(x, y, line[None]) for line in omega]
    close(sliced_wasserstein(x, y, omega), torch.stack(pieces).mean())


def test_directions_are_uniform_and_reproducible():
    first, second = (directions(9000, 2, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    assert torch.equal(first, second) and first.dtype == torch.float64
    moments = first.T @ first / 9000
    assert (moments - torch.eye(2) / 2).abs().max() < 4 * (1 / 8 / 9000) ** 0.5
    for bad, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error):
            directions(bad, 2)


@pytest.mark.parametrize("p", [0.5, math.inf, math.nan])
def test_sliced_refuses_exponents_and_directions(p):
    x, y = clouds(0)
    with pytest.raises(ValueError, match="at least 1"):
        sliced_wasserstein(x, y, OMEGA, p=p)
    with pytest.raises(ValueError, match="columns"):
        sliced_wasserstein(x, y, OMEGA[:, :2])


# -- neighbours -----------------------------------------------------------------------------------


@given(seed=seeds, k=st.integers(1, 5), scale=st.floats(0.5, 2))
@few
def test_scores_against_scikit_learn_and_under_similarities(seed, k, scale):
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = clouds(seed, 14, 11)
    found = neighbour_scores(x, y, k)

    def radii(u):
        return neighbors.NearestNeighbors(n_neighbors=k + 1).fit(u).kneighbors(u)[0][:, k]

    d = np.linalg.norm(x.numpy()[:, None] - y.numpy(), axis=2)
    in_y, in_x = d <= radii(y.numpy()), d <= radii(x.numpy())[:, None]
    shares = in_y.any(1).mean(), in_x.any(0).mean(), in_y.sum() / (14 * k), in_y.any(0).mean()
    assert tuple(found) == pytest.approx(shares, abs=1e-12)
    moved = [scale * u @ rotation(3, seed) + 1 for u in (x, y)]
    assert tuple(neighbour_scores(*moved, k)) == pytest.approx(shares, abs=1e-12)
    assert neighbour_scores(y, x, k).precision == found.recall


def test_identical_and_disjoint_clouds():
    x, _ = clouds(2, 20)
    same, apart = neighbour_scores(x, x), neighbour_scores(x, x + 100)
    assert same[:2] == (1, 1) and same.coverage == 1 and same.density >= 1
    assert tuple(apart) == (0, 0, 0, 0)


@pytest.mark.parametrize("k, error", [(0, ValueError), (1.0, TypeError), (9, ValueError)])
def test_neighbour_scores_refuse_k(k, error):
    with pytest.raises(error):
        neighbour_scores(GOOD, GOOD, k)


@pytest.mark.parametrize("n, m, k", [(10, 20, 2), (30, 10, 4)])
def test_expected_coverage_and_density_do_not_depend_on_the_law(n, m, k):
    g = torch.Generator().manual_seed(0)
    empty = math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    for d in (1, 6):
        scores = f64(
            [
                neighbour_scores(
                    torch.randn(n, d, generator=g) ** 3, torch.randn(m, d, generator=g) ** 3, k
                )
                for _ in range(300)
            ]
        )
        z = (scores.mean(0) - f64([0, 0, 1, 1 - empty])) / (scores.std(0) / 300**0.5)
        assert z[2:].abs().max() < 4


# -- copying --------------------------------------------------------------------------------------


@given(seed=seeds)
@few
def test_copy_score_is_mann_whitneys(seed):
    stats = pytest.importorskip("scipy.stats")
    x, y = clouds(seed, 15, 8)
    train = (4 * clouds(seed + 1, 10)[0]).round() / 4
    x, y = (2 * x).round() / 2, (2 * y).round() / 2  # with equal distances
    near, far = nearest_distance(x, train), nearest_distance(y, train)
    U = stats.mannwhitneyu(far.numpy(), near.numpy()).statistic
    close(copy_score(x, train, y).value, float(U) / (15 * 8))


def test_copies_are_flagged_and_honest_samples_are_not():
    g = torch.Generator().manual_seed(4)
    train, held_out, honest = torch.randn(3, 300, 8, generator=g)
    copies = train[torch.randint(300, (300,), generator=g)]
    near = copies + 0.3 * torch.randn(300, 8, generator=g)
    assert copy_score(copies, train, held_out)[:3] == (1, 1, 1)
    assert copied_share(copies, train, held_out).value == 1
    for flagged in (copies, near):
        assert copy_score(flagged, train, held_out).low > 0.6
        assert copied_share(flagged, train, held_out).low > 0.6
    assert copy_score(honest, train, held_out).low < 0.5
    assert copied_share(honest, train, held_out).low < 0
    far = 5 * honest
    assert copy_score(far, train, held_out).high < 0.1
    assert copied_share(far, train, held_out).low < 0


@pytest.mark.parametrize("n, m", [(10, 30), (25, 5)])
def test_copied_share_is_one_for_copies_and_counts_chance(n, m):
    x, y = clouds(6, n, m)
    assert copied_share(x, x, y).value == 1
    chance = n / (n + m)
    close(copied_share(y, x, y).value, -chance / (1 - chance))
    close(copied_share(x, x, x).value, (0.5 - 0.5) / 0.5)  # ties count half


def test_nearest_distance_is_exactly_zero_on_copies():
    x = 1e4 + torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    assert (nearest_distance(x[:50], x) == 0).all()
    close(nearest_distance(x[:1], x[1:]), torch.cdist(x[:1].double(), x[1:].double()).amin(1))


# -- features -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features():
    return digit_features()


def test_digit_features_read_held_out_digits(features):
    images, labels = digits("test")
    assert (features.logits(images).argmax(1) == labels).double().mean() >= 0.99
    train, _ = digits("train")
    found = extract(features, train)
    assert found.shape == (1500, 32) and found.dtype == torch.float32
    assert found.mean(0).abs().max() < 0.02 and abs(found.var(0).mean() - 1) < 0.02


def test_digit_features_come_ready_and_leave_the_generator_alone(features):
    state = torch.get_rng_state()
    net = digit_features(device="cpu")
    assert torch.equal(state, torch.get_rng_state())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.config() == features.config() == {"channels": 24, "dim": 32}
    assert DigitFeatures(**net.config()).load_state_dict(net.state_dict())
    folder = metrics.resources.files("diffnotes") / "assets" / "digit_features"
    assert sum(len(file.read_bytes()) for file in folder.iterdir()) < 300_000


def test_damaged_weights_are_refused(monkeypatch):
    monkeypatch.setattr(metrics.hashlib, "sha256", lambda data: metrics.hashlib.md5(data))
    with pytest.raises(ValueError, match="not those that were stored"):
        digit_features()


def test_digit_features_refuse_other_images(features):
    for bad, error in (
        (torch.zeros(2, 8, 8), ValueError),
        (torch.zeros(2, 1, 28, 28), ValueError),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), TypeError),
    ):
        with pytest.raises(error):
            features(bad)
        with pytest.raises(error):
            features.logits(bad)


def test_extract_works_in_batches_in_evaluation_mode_without_a_graph():
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Dropout(0.5))
    net[1].eval()
    images = torch.randn(10, 1, 2, 3)
    whole = extract(net, images)
    assert net.training and not net[1].training and net[2].training
    assert not whole.requires_grad
    close(extract(net, images, batch_size=3), whole, rtol=1e-5, atol=1e-6)
    close(extract(net, images[:1]), whole[:1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        close(whole, net[1](images.flatten(1)), rtol=1e-5, atol=1e-6)
    pooled = extract(lambda x: x.double()[:, :, :2], images)  # any function, any shape
    assert pooled.shape == (10, 6) and pooled.dtype == torch.float32


def test_extract_restores_the_mode_when_the_network_fails():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    net = Broken()
    with pytest.raises(RuntimeError, match="no"):
        extract(net, torch.randn(3, 2))
    assert net.training


@pytest.mark.parametrize(
    "error, call, images, options",
    [
        (TypeError, lambda x: x, torch.zeros(3, 2, dtype=torch.int64), {}),
        (TypeError, lambda x: x.long(), torch.zeros(3, 2), {}),
        (ValueError, lambda x: x / 0, torch.ones(3, 2), {}),
        (ValueError, lambda x: x, torch.full((3, 2), torch.nan), {}),
        (ValueError, lambda x: x[:1], torch.zeros(3, 2), {}),
        (ValueError, lambda x: x[:, 0], torch.zeros(3, 2), {}),
        (ValueError, lambda x: x, torch.zeros(0, 2), {}),
        (ValueError, lambda x: x, torch.zeros(3, 2), dict(batch_size=0)),
    ],
)
def test_extract_refuses(error, call, images, options):
    with pytest.raises(error):
        extract(call, images, **options)
