"""Brownian motion as a function, and the reverse SDE on it: laws, accounts, refusals."""

import math
from functools import partial

import pytest
import torch

from diffnotes.brownian import BrownianPath, adaptive_sde, path_noise, snr_path
from diffnotes.ddpm import ancestral
from diffnotes.denoisers import Denoiser
from diffnotes.mixtures import Gaussian, GaussianMixture
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP, linear_betas
from diffnotes.samplers import nfe, sample
from diffnotes.sde import euler_maruyama
from diffnotes.stepping import SAMPLERS, time_grid

PROCESSES = [VP(), SubVP(), VE(), EDM(), Cosine(), Flow(), Discrete(linear_betas(50))]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def law():
    means = f64([[1.5, 0.0, -0.5], [-1.0, 0.8, 0.5], [0.0, -1.2, 1.0]])
    return GaussianMixture(means, f64([0.05, 0.1, 0.2]), f64([0.5, 0.2, 0.3]))


def even(depth=6):
    return torch.linspace(0, 2, 2**depth + 1, dtype=torch.float64)


# -- the path -------------------------------------------------------------------------------------


def test_increments_add_up_in_any_order():
    places = sorted({*even()[::7].tolist(), 0.0, 0.111, 0.77, 1.3333, 1.9, 2.0})
    answers = []
    for order in (1, -1):
        path = BrownianPath(even(), torch.zeros(9, 4, 2, dtype=torch.float64), seed=1)
        pairs = list(zip(places, places[1:], strict=False))[::order]
        pieces = [path(a, b) for a, b in pairs][::order]
        answers.append(torch.stack(pieces))
        torch.testing.assert_close(answers[-1].sum(0), path(0.0, 2.0))
    torch.testing.assert_close(*answers)
    torch.testing.assert_close(path(0.3, 1.7), -path(1.7, 0.3))
    assert torch.equal(path(0.5, 0.5), torch.zeros(9, 4, 2, dtype=torch.float64))


def test_samples_have_paths_of_their_own():
    path = BrownianPath(even(), torch.zeros(8, 3), seed=1)
    all_of_them = path(0.1, 1.5)
    fewer = BrownianPath(even(), torch.zeros(3, 3), seed=1)(0.1, 1.5)
    torch.testing.assert_close(fewer, all_of_them[:3])
    rows = torch.tensor([6, 1])
    torch.testing.assert_close(path(0.1, 1.5, rows), all_of_them[rows])
    a, b = f64([0.1, 0.2]), f64([1.5, 0.9])
    torch.testing.assert_close(path(a, b, rows)[0], all_of_them[6])
    torch.testing.assert_close(path(a, b, rows)[1], path(0.2, 0.9)[1])
    assert len(all_of_them.unique()) == 24
    other = BrownianPath(even(), torch.zeros(8, 3), seed=2)(0.1, 1.5)
    assert (other - all_of_them).abs().min() > 0
    keys = BrownianPath(even(), torch.zeros(2, 3), seed=torch.tensor([5, 5]))(0.1, 1.5)
    assert torch.equal(keys[0], keys[1])


def test_moments_are_those_of_brownian_motion():
    n = 40_000
    path = BrownianPath(even(4), torch.zeros(n, 1, dtype=torch.float64), seed=5)
    places = f64([0.0, 0.03, 0.25, 0.4, 1.0, 1.01, 1.9, 2.0])
    w = torch.cat([path(a, b) for a, b in zip(places[:-1], places[1:], strict=True)], 1).cumsum(1)
    wanted = torch.minimum(places[1:, None], places[1:])
    found = w.T @ w / n
    size = (wanted.diagonal()[:, None] * wanted.diagonal() + wanted**2) / n
    assert ((found - wanted).abs() < 4.5 * size.sqrt()).all()
    assert (w.mean(0).abs() < 4.5 * (places[1:] / n).sqrt()).all()
    z = w[:, -1] / 2**0.5
    assert abs((z**4).mean() - 3) < 4.5 * (96 / n) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_path_keeps_dtype_and_shape(dtype):
    for shape in [(5,), (5, 2), (5, 3, 1, 2)]:
        path = BrownianPath(even(), torch.zeros(shape, dtype=dtype), seed=0)
        assert path(0.0, 1.0).dtype == dtype and path(0.0, 1.0).shape == shape
    wide, narrow = (BrownianPath(even(), torch.zeros(50, 3, dtype=d), seed=0)(0.1, 0.7)
                    for d in (torch.float64, torch.float32))
    torch.testing.assert_close(wide.float(), narrow, rtol=0, atol=1e-5)


def test_path_refusals():
    like = torch.zeros(2, 1)
    for marks in (even()[:-1], even().flip(0), 0 * even(), f64([1.0])):
        with pytest.raises(ValueError, match="marks"):
            BrownianPath(marks, like, 0)
    with pytest.raises(TypeError, match="floating"):
        BrownianPath(even(), like.long(), 0)
    path = BrownianPath(even(), like, 0)
    for a, b in ((-0.1, 1.0), (0.5, 2.1), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="known from 0 to 2"):
            path(a, b)
    with pytest.raises(ValueError, match="same two marks"):
        path(0.001, 0.002)
    with pytest.raises(ValueError, match="depth"):
        snr_path(VP(), like, 0, depth=0)
    with pytest.raises(ValueError, match="two times"):
        snr_path(VP(), like, 0, times=[0.5])


@each_process
def test_marks_cover_the_process(process):
    path = snr_path(process, torch.zeros(2, 1), 0, depth=5)
    ends = f64([process.t_max, process.t_min])
    q = (process.alpha(ends) / process.sigma(ends)) ** 2
    assert path.marks[0] == q[0] and path.marks[-1] == q[1] and len(path.marks) == 33
    whole = snr_path(process, torch.zeros(2, 1), 0, times=[1.0, process.t_min], depth=5)
    assert whole.marks[0] >= 0 and (whole.marks.diff() > 0).all()
    late = path.marks[-10:].log().diff()
    torch.testing.assert_close(late, late[:1].expand(9), rtol=1e-2, atol=0)


def test_fixed_steps_see_the_same_noise(law):
    """Coarse noise is what the fine one adds up to, in the clock of the path."""
    process, like = VP(), torch.zeros(6, 3, dtype=torch.float64)
    path = snr_path(process, like, 2, depth=8)
    times = process.t_of_log_snr(path.marks.log())
    times[0], times[-1] = process.t_max, process.t_min
    fine, coarse = path_noise(path, process, times), path_noise(path, process, times[::4])
    gaps = path.marks.diff().sqrt()
    z = torch.stack([fine(like) * gap for gap in gaps])
    wide = (path.marks[::4]).diff().sqrt()
    sums = torch.stack([coarse(like) * gap for gap in wide])
    torch.testing.assert_close(z.reshape(64, 4, 6, 3).sum(1), sums, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="once more"):
        fine(like)
    assert path_noise(path, process, times[::64])(like.float()).dtype == torch.float32


def test_strong_order_one():
    wide = GaussianMixture(f64([[0.6], [-0.6]]), f64([0.3, 0.2]))
    process, n = EDM(), 300
    path = snr_path(process, torch.zeros(n, 1, dtype=torch.float64), 4, depth=9)
    times = process.t_of_log_snr(path.marks.log())
    times[0], times[-1] = process.t_max, process.t_min
    x_T, exact = process.prior_sample((n, 1), dtype=torch.float64), wide.denoiser(process)
    ends = {}
    for k in (512, 64, 16):
        grid = times[:: 512 // k]
        ends[k] = ancestral(exact, x_T, grid, variance="small",
                            noise=path_noise(path, process, grid))
    rms = [(ends[k] - ends[512]).square().mean().sqrt() for k in (16, 64)]
    slope = math.log(rms[0] / rms[1]) / math.log((1 / 16 - 1 / 512) / (1 / 64 - 1 / 512))
    assert abs(slope - 1) < 0.2


# -- the sampler ----------------------------------------------------------------------------------


@each_process
def test_close_to_the_path_itself(process):
    """A tight tolerance gives what the finest fixed steps give on the same path."""
    law = Gaussian(f64([0.5, -1.0]), f64([0.4, 1.5]))
    times = [process.t_max, process.t_min]
    x_T = process.sigma(process.t_max) * torch.randn(40, 2, dtype=torch.float64)
    path = snr_path(process, x_T, 3, depth=10)
    grid = process.t_of_log_snr(path.marks.clamp(min=1e-12).log())
    grid[0], grid[-1] = times
    fine = ancestral(law.denoiser(process), x_T, grid, variance="small",
                     noise=path_noise(path, process, grid))
    found = adaptive_sde(law.denoiser(process), x_T, times, atol=0.005, rtol=0, path=path)
    assert (found - fine).square().mean().sqrt() < 0.06


@each_process
def test_a_point_is_exact(process):
    point = f64([0.3, -2.0])
    single = Denoiser(lambda x, t: point.expand_as(x), process, "x0")
    for start in (process.t_max, 1.0):
        x_T = process.sigma(start) * torch.randn(3, 2, dtype=torch.float64)
        runs = []
        found = adaptive_sde(single, x_T, [start, process.t_min], record=runs.append)
        torch.testing.assert_close(found, point.expand(3, 2))
        assert runs[0].rejected.sum() == 0


def test_one_time_is_one_evaluation(law):
    runs, x_T = [], torch.randn(4, 3, dtype=torch.float64)
    found = adaptive_sde(law.denoiser(VP()), x_T, [0.7], record=runs.append)
    torch.testing.assert_close(found, law.denoiser(VP())(x_T, 0.7))
    assert runs[0].evaluations.tolist() == [1] * 4


@pytest.mark.parametrize("together", [False, True])
def test_the_account_is_true(law, together):
    asked, exact, runs = [], law.denoiser(VP()), []

    class Counting(Denoiser):
        def __call__(self, x_t, t, cond=None):
            asked.append(len(x_t))
            return super().__call__(x_t, t, cond)

    x_T = torch.randn(9, 3, dtype=torch.float64)
    adaptive_sde(Counting(exact.net, VP(), "x0"), x_T, [1, 1e-3], atol=0.01, together=together,
                 record=runs.append)
    run = runs[0]
    assert sum(asked) == run.evaluations.sum()
    assert torch.equal(run.evaluations, 1 + 2 * run.accepted + run.rejected)
    assert run.rejected.sum() > 0 and (len(run.evaluations.unique()) == 1) == together


def test_a_seed_belongs_to_a_sample(law):
    exact = law.denoiser(VP())
    many = sample(exact, 9, sampler="adaptive_sde", seed=3, batch_size=4)
    torch.testing.assert_close(many[:4], sample(exact, 4, sampler="adaptive_sde", seed=3))
    assert (many - sample(exact, 9, sampler="adaptive_sde", seed=4)).abs().min() > 0
    draws = [sample(exact, 5, sampler="adaptive_sde", generator=torch.Generator().manual_seed(i))
             for i in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_noise_is_drawn_twice_and_no_more(law):
    calls = []

    def noise(x):
        calls.append(x.shape)
        return torch.randn_like(x)

    x_T = torch.randn(4, 3, dtype=torch.float64)
    adaptive_sde(law.denoiser(VP()), x_T, [1, 1e-3], noise=noise)
    assert calls == [x_T.shape] * 2
    adaptive_sde(law.denoiser(VP()), x_T, [1, 1e-3], noise=noise, path=snr_path(VP(), x_T, 0))
    assert len(calls) == 2
    one = torch.randn(6, 1)
    ends = adaptive_sde(law.denoiser(VP()), x_T, [1, 1e-3], noise=torch.zeros_like)
    assert ends.isfinite().all() and len(one) == 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_shape(dtype):
    net = Denoiser(lambda x, t: torch.tanh(x), EDM(), "x0")
    for shape in [(2,), (2, 3), (2, 1, 4, 4)]:
        found = adaptive_sde(net, (80 * torch.randn(*shape)).to(dtype), [1, 0.0])
        assert found.dtype == dtype and found.shape == shape and found.isfinite().all()


def test_moments(law):
    n = 2_000
    x_T = law.marginal(VP(), 1.0).sample(n, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    found = adaptive_sde(law.denoiser(VP()), x_T, [1, 1e-3], atol=0.005, rtol=0)
    centred = found - law.mean
    stats = torch.cat([centred, centred**2], 1)
    wanted = torch.cat([f64([0, 0, 0]), law.cov.diagonal()])
    assert ((stats.mean(0) - wanted).abs() < 4.5 * stats.std(0) / n**0.5).all()


def test_conditions_travel_with_their_samples():
    law = GaussianMixture(f64([[-2.0], [0.0], [3.0]]), f64([1e-3, 0.3, 1e-2]))
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    found = adaptive_sde(law.denoiser(VP()), torch.randn(7, 1, dtype=torch.float64), [1, 1e-3],
                         cond=labels)
    assert ((found[:, 0] - f64([-2.0, 0.0, 3.0])[labels]).abs() < 3).all()
    assert ((found[labels != 1, 0] - f64([-2.0, 0.0, 3.0])[labels[labels != 1]]).abs() < 0.6).all()


def test_it_beats_fixed_steps_on_a_normal_law():
    """Variance of a unit normal law, with one step for all samples."""
    normal = Gaussian(f64([0.0]), 1.0)
    x_T = normal.marginal(VP(), 1.0).sample(3_000, generator=torch.Generator().manual_seed(1))
    path, runs = snr_path(VP(), x_T, 11), []
    found = adaptive_sde(normal.denoiser(VP()), x_T, [1, 1e-3], atol=0.05, rtol=0, path=path,
                         together=True, record=runs.append)
    grid = time_grid(VP(), int(runs[0].evaluations[0]))
    fixed = ancestral(normal.denoiser(VP()), x_T, grid, variance="small",
                      noise=path_noise(path, VP(), grid))
    assert abs(found.var() - 1) < 0.5 * abs(fixed.var() - 1)


def test_registered(law):
    assert SAMPLERS["adaptive_sde"].fn is adaptive_sde
    with pytest.raises(ValueError, match="record"):
        nfe("adaptive_sde")
    runs = []
    sample(law.denoiser(EDM()), 10, sampler=partial(adaptive_sde, record=runs.append),
           batch_size=4, seed=0)
    assert [len(run.evaluations) for run in runs] == [4, 4, 2]


def test_refusals(law):
    exact, x_T = law.denoiser(VP()), torch.randn(4, 3, dtype=torch.float64)
    run = partial(adaptive_sde, exact, x_T, [1, 1e-3])
    for options in (dict(atol=-1.0), dict(atol=0, rtol=0), dict(rtol=math.nan),
                    dict(max_evaluations=0)):
        with pytest.raises(ValueError, match="must"):
            run(**options)
    with pytest.raises(ValueError, match="reach"):
        run(path=snr_path(VP(), x_T, 0, times=[0.9, 0.1]))
    with pytest.raises(ValueError, match="samples"):
        run(path=snr_path(VP(), x_T[:2], 0))
    with pytest.raises(RuntimeError, match="max_evaluations = 30"):
        run(atol=1e-4, rtol=0, max_evaluations=30)
    with pytest.raises(RuntimeError, match="shorter step"):
        run(atol=1e-4, rtol=0, path=snr_path(VP(), x_T, 0, depth=3))
    with pytest.raises(TypeError, match="floating"):
        adaptive_sde(exact, torch.ones(2, 3, dtype=torch.long), [1, 1e-3])


def test_euler_maruyama_takes_the_path(law):
    x_T = torch.randn(5, 3, dtype=torch.float64)
    path, grid = snr_path(VP(), x_T, 1), time_grid(VP(), 30)
    ends = [euler_maruyama(law.denoiser(VP()), x_T, grid, noise=path_noise(path, VP(), grid))
            for _ in range(2)]
    assert torch.equal(*ends)
