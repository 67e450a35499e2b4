"""The flow with steps of its own: exactness, accounts, dtypes, shapes, conditions and refusals."""

import math
from functools import partial

import pytest
import torch

from diffnotes import adaptive
from diffnotes.adaptive import PAIRS, Pair, adaptive_flow, doubled, step_factor
from diffnotes.denoisers import Denoiser
from diffnotes.mixtures import Gaussian, GaussianMixture
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP, linear_betas
from diffnotes.samplers import nfe, sample
from diffnotes.stepping import SAMPLERS, time_grid

PROCESSES = [VP(), SubVP(), VE(), EDM(), Cosine(), Flow(), Discrete(linear_betas(50))]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
each_pair = pytest.mark.parametrize("pair", PAIRS)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def law():
    means = f64([[1.5, 0.0, -0.5], [-1.0, 0.8, 0.5], [0.0, -1.2, 1.0]])
    return GaussianMixture(means, f64([0.05, 0.1, 0.2]), f64([0.5, 0.2, 0.3]))


def coordinate(law, process, predicts):
    """The exact denoiser, told in another coordinate."""
    exact = law.denoiser(process)

    def net(x, t):
        x0, eps = exact.x0_and_eps(x, t)
        a, s, da, ds = (
            v.reshape(-1, *[1] * (x.ndim - 1))
            for v in (process.alpha(t), process.sigma(t),
                      process.alpha_prime(t), process.sigma_prime(t))
        )
        return {
            "x0": x0,
            "eps": eps,
            "v": a * eps - s * x0,
            "score": -eps / s,
            "velocity": da * x0 + ds * eps,
        }[predicts]

    return Denoiser(net, process, predicts)


@each_process
@each_pair
def test_on_normal_data_it_is_the_flow_map(process, pair):
    law = Gaussian(f64([0.5, -1.0]), f64([0.4, 1.5]))
    times = [process.t_max, process.t_min]
    x_T = process.sigma(process.t_max) * torch.randn(6, 2, dtype=torch.float64)
    end = law.flow_map(x_T, *times, process)
    wanted = law.posterior_mean(end, process.t_min, process)
    tol = 10.0 ** -(2 + PAIRS[pair].order)
    found = adaptive_flow(law.denoiser(process), x_T, times, pair=pair, atol=tol, rtol=0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=20 * tol)


@each_process
def test_from_the_very_end_of_noise(process, law):
    """Where alpha(1) = 0 the clock starts at 0; the result is that of t_max but for its alpha."""
    x = torch.randn(5, 3, dtype=torch.float64)
    late, early = (
        adaptive_flow(law.denoiser(process), process.sigma(t) * x, [t, process.t_min], atol=1e-6)
        for t in (1.0, process.t_max)
    )
    assert late.isfinite().all()
    torch.testing.assert_close(late, early, rtol=0, atol=0.05)


@each_process
@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "score", "velocity"])
def test_every_coordinate_gives_the_same(law, process, predicts):
    x_T = process.sigma(process.t_max) * torch.randn(4, 3, dtype=torch.float64)
    times = [process.t_max, process.t_min]
    found = adaptive_flow(coordinate(law, process, predicts), x_T, times)
    torch.testing.assert_close(found, adaptive_flow(law.denoiser(process), x_T, times),
                               rtol=1e-6, atol=1e-6)


@each_process
@each_pair
def test_a_point_is_exact(process, pair):
    point = f64([0.3, -2.0])
    single = Denoiser(lambda x, t: point.expand_as(x), process, "x0")
    x_T = process.sigma(process.t_max) * torch.randn(3, 2, dtype=torch.float64)
    states = []
    found = adaptive_flow(single, x_T, time_grid(process, 2), pair=pair,
                          callback=lambda i, t, x, x0: states.append(x))
    torch.testing.assert_close(found, point.expand(3, 2))
    t, s = process.t_max, process.t_min
    end = process.alpha(s) * point + process.sigma(s) / process.sigma(t) * (
        x_T - process.alpha(t) * point)
    torch.testing.assert_close(states[-1], end, rtol=1e-9, atol=1e-9)


def test_one_time_is_one_evaluation(law):
    runs, x_T = [], torch.randn(4, 3, dtype=torch.float64)
    found = adaptive_flow(law.denoiser(VP()), x_T, [0.7], record=runs.append)
    torch.testing.assert_close(found, law.denoiser(VP())(x_T, 0.7))
    assert runs[0].evaluations.tolist() == [1] * 4 and runs[0].accepted.tolist() == [0] * 4


@pytest.mark.parametrize("together", [False, True])
@each_pair
def test_the_account_is_true(law, pair, together):
    asked, exact = [], law.denoiser(VP())

    class Counting(Denoiser):
        def __call__(self, x_t, t, cond=None):
            asked.append(len(x_t))
            assert x_t.shape[0] == len(t)
            return super().__call__(x_t, t, cond)

    runs, seen, g = [], [], torch.Generator().manual_seed(0)
    x_T = torch.randn(9, 3, dtype=torch.float64, generator=g)
    adaptive_flow(Counting(exact.net, VP(), "x0"), x_T, [1, 1e-3], pair=pair, together=together,
                  record=runs.append, atol=1e-4, rtol=0,
                  callback=lambda i, t, x, x0: seen.append((i, t.clone(), x, x0)))
    run, extra = runs[0], not PAIRS[pair].ends_in_result
    assert sum(asked) == run.evaluations.sum()
    stages = len(PAIRS[pair].b) - 1
    wanted = 1 + stages * (run.accepted + run.rejected) + extra * run.accepted
    assert torch.equal(run.evaluations, wanted)
    assert [i for i, *_ in seen] == list(range(len(seen)))
    assert seen[0][1].unique().tolist() == [1.0] and seen[-1][1].unique().tolist() == [1e-3]
    assert all((a[1] >= b[1]).all() for a, b in zip(seen, seen[1:], strict=False))
    torch.testing.assert_close(seen[-1][3], run.x0)
    assert (len(run.evaluations.unique()) == 1) == together


def test_the_tolerance_rules_the_error(law):
    exact, x_T = law.denoiser(VP()), torch.randn(60, 3, dtype=torch.float64)
    truth = adaptive_flow(exact, x_T, [1, 1e-3], pair="dormand_prince", atol=1e-10, rtol=0)
    errors, costs, runs = [], [], []
    for tol in (1e-2, 1e-3, 1e-4):
        found = adaptive_flow(exact, x_T, [1, 1e-3], atol=tol, rtol=0, record=runs.append)
        errors.append((found - truth).square().mean(1).sqrt().median().item() / tol)
        costs.append(runs[-1].evaluations.double().mean().item())
    assert 0.02 < min(errors) and max(errors) < 3
    assert 2.5 < costs[-1] / costs[-2] < 4  # a method of order two: the root of ten


def test_samples_do_not_know_each_other(law):
    exact, x_T = law.denoiser(VP()), torch.randn(12, 3, dtype=torch.float64)
    whole = adaptive_flow(exact, x_T, [1, 1e-3])
    parts = [adaptive_flow(exact, x, [1, 1e-3]) for x in x_T.split(5)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-9, atol=1e-9)
    seeded = [sample(exact, n, sampler="adaptive", seed=3, batch_size=4) for n in (9, 4)]
    torch.testing.assert_close(seeded[0][:4], seeded[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape(dtype):
    seen = []

    def net(x, t):
        seen.append(x.dtype)
        return torch.tanh(x)

    for shape in [(2,), (2, 3), (2, 1, 4, 4)]:
        x_T = torch.randn(*shape).to(dtype)
        found = adaptive_flow(Denoiser(net, VP(), "x0"), x_T, [1, 1e-3])
        assert found.dtype == dtype and found.shape == x_T.shape and found.isfinite().all()
    assert set(seen) == {torch.promote_types(dtype, torch.float32)}


def test_conditions_travel_with_their_samples():
    """Samples leave at different times; each must keep its label."""
    means = f64([[-2.0], [0.0], [3.0]])
    law = GaussianMixture(means, f64([1e-3, 0.5, 1e-2]))
    exact, x_T = law.denoiser(VP()), torch.randn(7, 1, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    whole = adaptive_flow(exact, x_T, [1, 1e-3], cond=labels)
    for i, label in enumerate(labels.tolist()):
        alone = adaptive_flow(exact, x_T[i : i + 1], [1, 1e-3], cond=label)
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_gradient_and_untouched_arguments(law):
    exact, x_T = law.denoiser(VP()), torch.randn(3, 3, dtype=torch.float64)
    before = x_T.clone()
    options = dict(atol=1e-6, rtol=0, pair="dormand_prince")
    x = x_T.clone().requires_grad_()
    (grad,) = torch.autograd.grad(adaptive_flow(exact, x, [1, 1e-3], **options)[:, 0].sum(), x)
    ends = [adaptive_flow(exact, x_T + h * f64([1.0, 0, 0]), [1, 1e-3], **options)[:, 0]
            for h in (-1e-3, 1e-3)]
    torch.testing.assert_close(grad[:, 0], (ends[1] - ends[0]) / 2e-3, rtol=2e-2, atol=2e-3)
    assert torch.equal(x_T, before)


def test_noise_is_not_drawn(law):
    def refuse(x):
        raise AssertionError("the flow draws no noise")

    adaptive_flow(law.denoiser(VP()), torch.randn(2, 3).double(), [1, 1e-3], noise=refuse)


def test_any_pair_serves(law):
    exact, x_T = law.denoiser(VP()), torch.randn(5, 3, dtype=torch.float64)
    twice = doubled(PAIRS["heun"])
    assert twice.order == 3 and len(twice.b) == 5 and not twice.ends_in_result
    truth = adaptive_flow(exact, x_T, [1, 1e-3], pair="dormand_prince", atol=1e-9, rtol=0)
    found = adaptive_flow(exact, x_T, [1, 1e-3], pair=twice, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-3)
    assert isinstance(twice, Pair) and math.isclose(sum(twice.b), 1)


def test_the_controller():
    found = step_factor(f64([0.0, 1e-9, 1.0, 1.44, 1e9]), 2)
    torch.testing.assert_close(found, f64([3.0, 3.0, 0.9, 0.75, 0.2]))
    assert step_factor(f64([1e9]), 2, least=0.5).item() == 0.5
    assert step_factor(f64([0.25]), 2, safety=0.5, most=9.0).item() == 1.0


def test_registered(law):
    entry = SAMPLERS["adaptive"]
    assert entry.fn is adaptive_flow
    for ask in (partial(nfe, "adaptive"), partial(nfe, adaptive_flow),
                partial(entry.evaluations, 9)):
        with pytest.raises(ValueError, match="record"):
            ask()
    runs = []
    tight = partial(adaptive_flow, atol=1e-4, record=runs.append)
    sample(law.denoiser(EDM()), 10, sampler=tight, batch_size=4, seed=0)
    assert [len(run.evaluations) for run in runs] == [4, 4, 2]


def test_refusals(law):
    exact, x_T = law.denoiser(VP()), torch.randn(4, 3, dtype=torch.float64)
    run = partial(adaptive_flow, exact, x_T, [1, 1e-3])
    for options in (
        dict(atol=-1.0), dict(rtol=-1.0), dict(atol=math.nan), dict(rtol=math.inf),
        dict(atol=0, rtol=0), dict(atol=1e-16, rtol=0), dict(pair="euler"),
        dict(max_evaluations=0),
    ):
        with pytest.raises(ValueError, match="must"):
            run(**options)
    with pytest.raises(ValueError, match="float32"):
        adaptive_flow(exact, x_T.float(), [1, 1e-3], atol=1e-7, rtol=0)
    with pytest.raises(TypeError, match="floating"):
        adaptive_flow(exact, torch.ones(2, 3, dtype=torch.long), [1, 1e-3])
    with pytest.raises(ValueError, match="finite"):
        adaptive_flow(exact, x_T * math.nan, [1, 1e-3])
    with pytest.raises(ValueError, match="decrease"):
        adaptive_flow(exact, x_T, [1e-3, 1])
    counts = []
    with pytest.raises(RuntimeError, match=r"max_evaluations = 50: it was at t = 0\.\d+"):
        run(atol=1e-9, rtol=0, max_evaluations=50, callback=lambda i, *_: counts.append(i))
    assert len(counts) <= 50


def test_what_is_not_finite_stops_the_run():
    def late(x, t):
        return torch.where(t[:, None] < 0.5, math.nan, 0.0) * x

    broken = Denoiser(late, VP(), "x0")
    with pytest.raises(RuntimeError, match="sample 0 is no longer finite"):
        adaptive_flow(broken, torch.randn(3, 2), [1, 1e-3])


def test_a_rough_network_cannot_keep_it_for_ever():
    """A denoiser that jumps at random: every step fails, however short."""
    def rough(x, t):
        return torch.randn_like(x) * 1e6

    with pytest.raises(RuntimeError, match="max_evaluations = 200|shorter step"):
        adaptive_flow(Denoiser(rough, VP(), "x0"), torch.randn(3, 2), [1, 1e-3],
                      max_evaluations=200)


def test_module_is_small():
    public = ["PAIRS", "Pair", "doubled", "step_factor", "Solved", "adaptive_flow"]
    assert adaptive.__all__ == public
