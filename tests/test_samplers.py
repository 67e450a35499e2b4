"""Samplers and the front: exactness, counting, reproducibility, dtypes, shapes and refusals."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import tanh

from diffnotes import processes, samplers
from diffnotes.denoisers import Denoiser, convert, from_x0_eps, guided
from diffnotes.mixtures import Empirical, Gaussian, GaussianMixture
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP
from diffnotes.samplers import (
    SAMPLERS,
    as_process,
    as_times,
    euler,
    heun,
    nfe,
    register,
    sample,
    step_coefficients,
    time_grid,
)

PROCESSES = [
    VP(),
    SubVP(),
    VE(),
    EDM(),
    Cosine(),
    Flow(),
    Discrete(processes.linear_betas()),
    Discrete(processes.cosine_betas(1000)),
]
NAMES = ["VP", "SubVP", "VE", "EDM", "Cosine", "Flow", "linear", "cosine"]
EXACT = ["euler", "heun", "ancestral"]  # where x0_hat stands still
each_process = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
each_sampler = pytest.mark.parametrize("name", list(SAMPLERS))
ADAPTIVE = ("adaptive", "adaptive_sde")  # their times and calls: test_adaptive, test_brownian
BETWEEN = ("dpm_2s", "dpmpp_2s", "dpm_3s", "edm_sde")
each_exact_sampler = pytest.mark.parametrize("name", EXACT)


def pointwise(process=None, predicts="x0", shape=(2,), **options):
    """A denoiser that acts on each entry alone, so that no batch changes its rounding."""
    return Denoiser(lambda x, t: torch.tanh(x), process or VP(), predicts, shape, **options)


@pytest.fixture(scope="module")
def mixture():
    means = torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.05, 0.1], dtype=torch.float64))


# --- Exactness ----------------------------------------------------------------


@each_process
@each_exact_sampler
@pytest.mark.parametrize("steps", range(1, 6))
def test_a_single_point_is_reached_exactly(process, name, steps):
    point = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
    found = sample(Empirical(point).denoiser(process), 5, sampler=name, steps=steps, seed=0)
    torch.testing.assert_close(found, point.expand(5, 2), rtol=0, atol=1e-14)


@each_process
@each_exact_sampler
@pytest.mark.parametrize("predicts", ["eps", "v", "score", "velocity", "edm"])
def test_every_coordinate_reaches_a_single_point(process, name, predicts):
    point, sigma_data = torch.tensor([1.5, -0.5], dtype=torch.float64), 0.5

    def net(x, t):
        if predicts == "edm":
            x = x * torch.hypot(process.alpha(t) * sigma_data, process.sigma(t))[:, None]
        return convert(
            point.expand_as(x), x, t, process, "x0", predicts, sigma_data=sigma_data
        )

    denoiser = Denoiser(net, process, predicts, (2,), sigma_data=0.5, dtype=torch.float64)
    for steps in range(1, 6):
        found = sample(denoiser, 3, sampler=name, steps=steps, seed=0)
        # Rounding of x_t times the largest 1 / alpha, 2e4 on the capped cosine chain.
        torch.testing.assert_close(found, point.expand(3, 2), rtol=0, atol=1e-10)


@each_process
@pytest.mark.parametrize("sampler", [euler, heun])
@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "score", "velocity", "edm"])
@pytest.mark.parametrize("time", ["t", "log_snr", "log_sigma"])
def test_the_short_cut_to_the_network_changes_nothing(process, sampler, predicts, time):
    """The same samples through Denoiser.__call__ and through the network itself."""

    class Plain:
        """Only ``process`` and a call: no short cut is possible."""

        def __init__(self, inner):
            self.inner, self.process = inner, inner.process

        def __call__(self, x_t, t, cond=None):
            return self.inner(x_t, t, cond)

    def net(x, t, cond):
        return torch.tanh(x) * 0.3 + 0.01 * torch.tanh(t)[:, None] + 0.1 * cond[:, None]

    denoiser = Denoiser(net, process, predicts, (2,), time, sigma_data=0.7)
    x_T, cond = process.prior_sample((6, 2), dtype=torch.float64), torch.arange(6)
    times = time_grid(process, 5)
    ends = [sampler(d, x_T, times, cond=cond) for d in (denoiser, Plain(denoiser))]
    scale = ends[1].abs().max().item()
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-8 * max(1, scale))


def test_the_index_of_a_chain_reaches_the_network():
    seen = []
    denoiser = Denoiser(
        lambda x, t: seen.append(t[0].item()) or x, PROCESSES[6], "v", (2,), "index"
    )
    sample(denoiser, 2, sampler="euler", times=[1.0, 0.5, 0.001])
    assert seen == [999, 499, 0]


@each_process
@pytest.mark.parametrize("sampler,least,most", [(euler, 0.9, 1.1), (heun, 1.9, 2.1)])
def test_order(process, sampler, least, most):
    cov = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
    law = Gaussian(torch.tensor([1.0, -0.5], dtype=torch.float64), cov)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 2, dtype=torch.float64, generator=generator)
    errors = []
    for steps in (81, 161):
        log_snr = torch.linspace(-7.0, 6.0, steps, dtype=torch.float64)
        times = process.t_of_log_snr(log_snr)
        first, last = times[0].item(), times[-1].item()
        x_T = process.sigma(first) * noise
        exact = law.denoiser(process)(law.flow_map(x_T, first, last, process), last)
        errors.append((sampler(law.denoiser(process), x_T, times) - exact).abs().mean().item())
    assert least < math.log2(errors[0] / errors[1]) < most


def test_no_two_are_the_same(mixture):
    """Two samplers that differ must differ: guards against one registered twice."""
    denoiser = mixture.denoiser(VP())
    ends = {name: sample(denoiser, 8, sampler=name, steps=9, seed=0) for name in SAMPLERS}
    for one, other in itertools.combinations(SAMPLERS, 2):
        assert (ends[one] - ends[other]).abs().max() > 1e-3


@each_process
@pytest.mark.parametrize("steps", [2, 3, 4, 6, 9])
def test_long_steps_stay_near_the_data(process, steps):
    """No state leaves the mean of the predictions by more than the noise of its level."""
    law = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64), 0.25)
    heights = []

    def watch(i, t, x_t, x0_hat):
        # Data are within 2 + 4.5 * 0.5, noise of 4000 normals within 4.5.
        reach = 4.25 * process.alpha(t) + 4.5 * process.sigma(t)
        heights.append((x_t.abs().max() / reach).item())

    found = sample(law.denoiser(process), 2000, steps=steps, seed=0, callback=watch)
    assert found.abs().max() < 4.5 and max(heights) < 1.1


@pytest.mark.parametrize("t,s", [(0.5, 0.45), (0.9, 0.1), (1.0, 0.5)])
@pytest.mark.parametrize("process", [VP(), Flow(), Cosine()], ids=["VP", "Flow", "Cosine"])
def test_the_factor_of_heun(process, t, s):
    """The second prediction enters x_s with min(1, (exp(h) - 1) / 2) alpha_s."""
    states, gap = [], torch.tensor([3.0, -2.0], dtype=torch.float64)
    denoiser = Denoiser(lambda x, u: gap * (u < t)[:, None], process, "x0", (2,))
    for sampler in (euler, heun):
        sampler(denoiser, torch.ones(1, 2, dtype=torch.float64), [t, s],
                callback=lambda i, u, x, x0_hat: states.append(x))
    ratio = process.alpha(s) * process.sigma(t) / (process.alpha(t) * process.sigma(s))
    expected = process.alpha(s) * min(1.0, (ratio.item() - 1) / 2) * gap
    torch.testing.assert_close((states[3] - states[1])[0], expected, rtol=1e-10, atol=0)


def test_an_exact_start_has_no_error_of_the_prior():
    law = Gaussian(torch.tensor([3.0], dtype=torch.float64), 0.25)
    for process in (VE(), EDM(), VP()):
        reach = process.alpha(1.0) * 3.0
        ends = [
            sample(law.denoiser(process), x_T=start.reshape(1, 1), steps=200).item()
            for start in (torch.zeros_like(reach), reach)
        ]
        assert abs(ends[1] - 3) < 1e-6
        assert (ends[1] - ends[0]) / 0.5 == pytest.approx(
            3 * (process.alpha(1.0) / process.sigma(1.0)).item(), rel=0.02
        )


@each_process
def test_the_law_comes_out(process, mixture):
    found = sample(mixture.denoiser(process), 3000, steps=30, seed=4)
    gap = (found.mean(0) - mixture.mean).abs() / (found.std(0) / 3000**0.5)
    assert gap.max() < 4
    torch.testing.assert_close(found.T.cov(), mixture.cov, rtol=0.1, atol=0.03)


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=["Cosine", "Flow"])
@pytest.mark.parametrize("sampler", [euler, heun])
def test_from_where_alpha_is_zero(process, sampler, mixture):
    times = [1.0, 0.6, 0.3, 0.01]
    a, b, h = step_coefficients(process, as_times(process, times))
    assert h[0] == math.inf and b[0] == process.alpha(0.6) and a.isfinite().all()
    x_T = torch.randn(5, 2, dtype=torch.float64)
    found = sampler(mixture.denoiser(process), x_T, times)
    assert found.isfinite().all()
    if sampler is euler:
        # A start just below 1 differs by its alpha, 1.6e-9 at most, times slopes of order 10.
        near = sampler(mixture.denoiser(process), x_T, [1 - 1e-9, 0.6, 0.3, 0.01])
        torch.testing.assert_close(found, near, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="at t = 1"):
        sampler(Denoiser(lambda x, t: x, process, "eps", (2,)), x_T, times)


# --- Counting and calling back ------------------------------------------------


@each_sampler
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_nfe_is_what_is_spent(name, steps):
    calls = []
    denoiser = Denoiser(lambda x, t: calls.append(len(x)) or x * 0, VP(), "x0", (2,))
    sample(denoiser, 4, sampler=name, steps=steps)
    known = {"annealed_langevin": 5 * steps + 1, "dpm_3s": 3 * steps - 2}
    known |= dict.fromkeys(["heun", "pc", "dpm_2s", "dpmpp_2s", "edm_heun", "edm_sde"],
                           2 * steps - 1)
    if name in ADAPTIVE:
        with pytest.raises(ValueError, match="finds its own steps"):
            nfe(name, steps)
        return
    assert len(calls) == nfe(name, steps) == known.get(name, steps)
    calls.clear()
    sample(denoiser, 4, sampler=name, steps=steps, batch_size=3)
    assert calls.count(3) == calls.count(1) == nfe(name, steps)


def test_defaults():
    assert (nfe(), nfe("heun"), nfe("ancestral")) == (20, 35, 1000)
    chain = Discrete(processes.linear_betas(50))
    assert (nfe("ancestral", process=chain), nfe("ancestral", 7, process=chain)) == (50, 7)
    assert nfe(process=chain) == 20 and nfe("ancestral", process=VP()) == 1000
    with pytest.raises(ValueError, match="at most the chain's 50, got 51"):
        nfe("euler", 51, process=chain)
    calls = []
    counting = Denoiser(lambda x, t: calls.append(1) or x * 0, chain, "x0", (2,))
    sample(counting, 2, sampler="ancestral")
    assert len(calls) == 50
    calls.clear()
    denoiser = Denoiser(lambda x, t: calls.append(1) or x * 0, VP(), "x0", (2,))
    sample(denoiser, 2)
    assert len(calls) == 20


def test_guidance_is_one_batched_call_for_two():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sizes, self.weight = [], torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, cond=None):
            self.sizes.append(len(x))
            return x * 0 + self.weight * (0 if cond is None else cond[:, None].clamp(min=0))

    net = Net()
    denoiser = Denoiser(net, VP(), "x0", (2,))
    found = sample(denoiser, 3, steps=4, cond=2, guidance=3.0)
    assert net.sizes == [6] * 4 and torch.equal(found, torch.full((3, 2), 6.0))
    net.sizes.clear()
    found = sample(denoiser, 3, steps=4, cond=2)
    assert net.sizes == [3] * 4 and torch.equal(found, torch.full((3, 2), 2.0))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ADAPTIVE])
def test_callback(name, mixture):
    seen = []
    denoiser = mixture.denoiser(VP())
    run = partial(sample, denoiser, 5, sampler=name, steps=4, seed=0, batch_size=3)
    found = run(callback=lambda *args: seen.append(args))
    begins = [k for k, (i, *_) in enumerate(seen) if i == 0]
    batches = [seen[begins[0]:begins[1]], seen[begins[1]:]]
    grid = time_grid(VP(), 4, SAMPLERS[name].grid).tolist()
    for batch in batches:
        assert len(begins) == 2 and [i for i, *_ in batch] == list(range(len(batch)))
        told = list(dict.fromkeys(t for _, t, *_ in batch))
        # Some look between the times, edm_sde at the times its noise reaches.
        assert name == "edm_sde" or [t for t in told if t in grid] == grid
        assert name in BETWEEN or told == grid
    for _, t, x_t, x0_hat in seen:
        torch.testing.assert_close(x0_hat, denoiser(x_t, t), rtol=1e-12, atol=1e-12)
    ends = torch.cat([batch[-1][3] for batch in batches])
    assert name == "calibrated" or torch.equal(ends, found)  # it goes on to sigma = 0
    assert torch.equal(found, run())


def test_states_given_away_are_never_written_to():
    kept, copies = [], []

    def net(x, t):
        kept.append(x), copies.append(x.clone())
        return x

    for sampler in (euler, heun):
        x_T = torch.randn(4, 2)
        before = x_T.clone()
        sample(Denoiser(net, VP(), "x0", (2,)), x_T=x_T, sampler=sampler, steps=6)
        assert torch.equal(x_T, before)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_progress(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    seen = []
    run = partial(sample, pointwise(), 4, steps=3, batch_size=2)
    run(progress=True, callback=lambda *args: seen.append(args))
    assert "6/6" in capsys.readouterr().err and len(seen) == 6
    run()
    assert capsys.readouterr() == ("", "")


# --- Randomness ---------------------------------------------------------------


@each_sampler
@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 16, 16)])
def test_a_sample_belongs_to_its_number(name, shape):
    denoiser = Denoiser(lambda x, t: torch.tanh(x) + x / 1000, VP(), "x0", shape)
    run = partial(sample, denoiser, sampler=name, steps=4, seed=11)
    many = run(150)
    assert many.shape == (150, *shape)
    for n in (1, 63, 64, 65, 100):
        assert torch.equal(run(n), many[:n])
    for size in (1, 7, 64, 100, 1000):
        assert torch.equal(run(150, batch_size=size), many)
    assert len(many.flatten(1).unique(dim=0)) == 150
    assert not torch.equal(run(5), sample(denoiser, 5, sampler=name, steps=4, seed=12))


def test_the_noise_of_a_run_is_standard_normal_and_of_its_own_stream():
    draws = []

    def spy(denoiser, x_T, times, *, cond, noise, callback):
        draws.extend([x_T / denoiser.process.prior_std(), noise(x_T), noise(x_T)])
        return x_T

    sample(pointwise(shape=(8,)), 5000, sampler=spy, steps=2, seed=0)
    values = torch.stack(draws).flatten(1).double()
    se = values.shape[1] ** -0.5
    assert (values.mean(1).abs() < 4 * se).all() and (values.var(1) - 1).abs().max() < 6 * se
    assert (values.corrcoef() - torch.eye(3)).abs().max() < 4 * se
    kept = draws[1:3]
    draws.clear()
    sample(pointwise(shape=(8,)), x_T=torch.zeros(5000, 8), sampler=spy, steps=2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(draws[1:3], kept, strict=True))


def test_seeds_and_blocks_never_share_a_generator():
    def first(seed, use, block):
        return samplers._generator(seed, use, block, torch.device("cpu")).initial_seed()

    blocks = {first(5, 1, block) for block in range(20000)}
    assert len(blocks) == 20000
    seeds = [first(*key, 0) for key in itertools.product([0, 1, 5, 2**32 + 5, 2**70], [0, 1])]
    assert len(set(seeds)) == len(seeds)


@each_sampler
def test_generator_gives_plain_draws(name):
    runs = [
        sample(pointwise(), 6, sampler=name, steps=3, generator=torch.Generator().manual_seed(8))
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    starts = []
    sample(
        pointwise(), 6, sampler=name, steps=3, generator=torch.Generator().manual_seed(8),
        callback=lambda i, t, x_t, x0_hat: starts.append(x_t),
    )
    plain = torch.randn(6, 2, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(starts[0], plain * VP().prior_std(), rtol=1e-6, atol=0)


def test_global_random_state():
    torch.manual_seed(1)
    one = sample(pointwise(), 3, steps=2)
    torch.manual_seed(1)
    assert torch.equal(sample(pointwise(), 3, steps=2), one)
    state = torch.get_rng_state()
    sample(pointwise(), 3, sampler="ancestral", steps=3, seed=0)
    sample(pointwise(), 3, sampler="ancestral", steps=3, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


# --- Dtypes, shapes, devices --------------------------------------------------


@each_sampler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 16, 16)])
def test_dtypes_and_shapes(name, dtype, shape):
    seen = set()

    def net(x, t):
        seen.add((x.dtype, t.dtype))
        return torch.tanh(x)

    wide = torch.promote_types(dtype, torch.float32)
    x_T = torch.randn(3, *shape).to(dtype)
    given = sample(Denoiser(net, VP(), "x0", shape), x_T=x_T, sampler=name, steps=4)
    assert given.dtype == dtype and given.shape == (3, *shape) and given.isfinite().all()
    assert seen == {(wide, wide)}
    seen.clear()
    drawn = sample(Denoiser(net, VP(), "x0", shape, dtype=dtype), 3, sampler=name, steps=4)
    assert drawn.dtype == dtype and seen == {(dtype, wide)}


@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "velocity"])
def test_a_half_network_under_a_wide_state(predicts):
    """Coefficients stay in float64 and the state in float32: only the network is rounded."""
    x0, eps = torch.randn(2, 50, 4)

    def net(x, t):
        return from_x0_eps(x0, eps, t.double(), VP(), predicts).to(x.dtype)

    for dtype in (torch.float16, torch.bfloat16):
        denoiser = Denoiser(net, VP(), predicts, (4,), dtype=dtype)
        x_T = VP().perturb(x0, 0.5, eps)
        found = sample(denoiser, x_T=x_T, sampler="euler", times=[0.5, 0.3, 0.1])
        gain = {"eps": 1.0, "x0": 1.0, "v": 1.0, "velocity": 3.0}[predicts]
        assert (found - x0).abs().max() < 30 * gain * torch.finfo(dtype).eps


@pytest.mark.parametrize("sampler", [euler, heun])
def test_gradients_reach_the_start_and_the_weights(sampler):
    weight = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    net = torch.nn.Linear(2, 2, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: torch.tanh(net(x)) * weight, VP(), "v", (2,))
    x_T = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sampler(denoiser, x, time_grid(VP(), 4)), x_T)
    sampler(denoiser, x_T, time_grid(VP(), 4)).sum().backward()
    assert weight.grad.abs() > 0 and net.weight.grad.abs().sum() > 0


def test_sample_builds_a_graph_only_for_a_start_that_asks():
    weight = torch.nn.Parameter(torch.tensor(0.4))
    denoiser = Denoiser(lambda x, t: torch.tanh(x) * weight, VP(), "x0", (2,))
    assert not sample(denoiser, 3, steps=3).requires_grad
    assert sample(denoiser, x_T=torch.randn(3, 2, requires_grad=True), steps=3).requires_grad
    with torch.no_grad():
        x_T = torch.randn(3, 2, requires_grad=True)
        assert not sample(denoiser, x_T=x_T, steps=3).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_sampler
def test_no_device_sync_in_the_loop(name):
    net = torch.nn.Linear(2, 2).cuda()
    denoiser = Denoiser(lambda x, t: net(x), VP(), "v", (2,), device="cuda", dtype=torch.float32)
    x_T = torch.randn(4, 2, device="cuda")
    sample(denoiser, x_T=x_T, sampler=name, steps=3, seed=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        SAMPLERS[name].fn(denoiser, x_T, time_grid(VP(), 5), noise=torch.randn_like)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sample(denoiser, 4, sampler=name, steps=3, seed=0).device.type == "cuda"


# --- The front's arguments ----------------------------------------------------


def test_how_many():
    assert sample(pointwise(), x_T=torch.randn(3, 2), steps=2).shape == (3, 2)
    assert sample(pointwise(), 3, x_T=torch.randn(3, 2), steps=2).shape == (3, 2)
    assert sample(pointwise(shape=None), x_T=torch.randn(3, 5), steps=2).shape == (3, 5)
    conditional = Denoiser(lambda x, t, cond: x * 0 + cond[:, None], VP(), "x0", (2,))
    assert sample(conditional, cond=torch.tensor([4, 5]), steps=2).tolist() == [[4, 4], [5, 5]]


def test_conditions_reach_the_network_whole():
    seen = []

    def net(x, t, cond):
        seen.append(cond)
        return x * 0

    denoiser = Denoiser(net, VP(), "x0", (2,))
    for cond in (3, torch.tensor(3), torch.tensor(3, dtype=torch.int32)):
        sample(denoiser, 4, cond=cond, steps=2, batch_size=3)
        assert all(c.dtype == torch.int64 and c.eq(3).all() for c in seen)
        assert [len(c) for c in seen] == [3] * 2 + [1] * 2
        seen.clear()
    labels = torch.tensor([1, 2, 3, 4])
    sample(denoiser, 4, cond=labels, sampler="euler", steps=1, batch_size=3)
    assert torch.equal(torch.cat(seen), labels)
    seen.clear()
    embedded = torch.randn(4, 7)
    sample(denoiser, 4, cond=embedded, sampler="euler", steps=1, batch_size=3)
    assert torch.equal(torch.cat(seen), embedded)
    seen.clear()
    sample(denoiser, 4, steps=1)
    assert seen == [None]


def test_conditional_laws(mixture):
    found = sample(mixture.denoiser(VP()), cond=torch.tensor([0, 1] * 50), seed=0)
    assert (found[::2, 0] < 0).all() and (found[1::2, 0] > 0).all()


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({}, ValueError, "say how many"),
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": -3}, ValueError, "got -3"),
        ({"n": 2.0}, TypeError, "n must be an int"),
        ({"n": True}, TypeError, "n must be an int"),
        ({"n": 2, "steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"n": 2, "steps": 2.5}, TypeError, "steps must be an int"),
        ({"n": 2, "steps": 3, "times": [1.0, 0.5]}, ValueError, "steps or times"),
        ({"n": 2, "sampler": "heum"}, ValueError, "'euler', 'heun'.*'heum'"),
        ({"n": 2, "sampler": None}, ValueError, "None"),
        ({"n": 2, "seed": 0, "generator": torch.Generator()}, ValueError, "not both"),
        ({"n": 2, "seed": -1}, ValueError, "got -1"),
        ({"n": 2, "seed": 1.5}, TypeError, "seed must be an int"),
        ({"n": 2, "seed": True}, TypeError, "seed must be an int"),
        ({"n": 2, "batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"n": 2, "batch_size": 1.5}, TypeError, "batch_size"),
        ({"n": 2, "guidance": 2.0}, ValueError, "guidance needs a cond"),
        ({"n": 2, "cond": 1, "guidance": math.nan}, ValueError, "finite"),
        ({"n": 2, "cond": 1, "guidance": "big"}, TypeError, "number"),
        ({"n": 2, "cond": torch.zeros(3, dtype=torch.int64)}, ValueError, "n = 2 of them, got 3"),
        ({"n": 2, "cond": True}, TypeError, "integers"),
        ({"n": 2, "x_T": torch.randn(3, 2)}, ValueError, r"len\(x_T\) = 3 or left out, got 2"),
        ({"x_T": torch.randn(3, 5)}, ValueError, r"\(B, 2\), got \(3, 5\)"),
        ({"x_T": torch.randn(2)}, ValueError, r"\(B, 2\), got \(2,\)"),
        ({"x_T": torch.tensor(1.0)}, ValueError, "shape"),
        ({"x_T": torch.randn(0, 2)}, ValueError, "at least 1, got 0"),
        ({"x_T": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "int64"),
        ({"x_T": torch.ones(3, 2, dtype=torch.complex64)}, TypeError, "complex64"),
        ({"x_T": [[1.0, 2.0]]}, TypeError, "list"),
        ({"x_T": torch.tensor([[1.0, math.nan]])}, ValueError, "x_T must be finite, got nan"),
        ({"x_T": torch.tensor([[-math.inf, 1.0]])}, ValueError, "x_T must be finite, got -inf"),
        ({"cond": []}, ValueError, r"len\(cond\) must be at least 1, got 0"),
        ({"n": 2, "cond": []}, ValueError, "n = 2 of them, got 0"),
        ({"n": 2, "generator": 3}, TypeError, "torch.Generator, got 3"),
        ({"n": 2, "times": [1.0, 0.5 + 0.1j]}, TypeError, "times must be real"),
    ],
)
def test_refusals(options, error, message):
    denoiser = Denoiser(lambda x, t, cond: x, VP(), "x0", (2,))
    with pytest.raises(error, match=message):
        sample(denoiser, **options)


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), Gaussian(torch.zeros(2), 1.0), tanh])
def test_what_is_no_denoiser(other):
    with pytest.raises(TypeError, match=r"law.denoiser\(process\) or Denoiser\(net, process\)"):
        sample(other, 2)


def test_no_shape_no_samples():
    with pytest.raises(ValueError, match="no shape"):
        sample(pointwise(shape=None), 3)
    with pytest.raises(ValueError, match="shape"):
        sample(pointwise(shape=None), x_T=torch.tensor(1.0))


def test_grid_refusals():
    with pytest.raises(ValueError, match="at most.*1000, got 2000"):
        sample(pointwise(PROCESSES[6]), 2, steps=2000)
    with pytest.raises(ValueError, match="kind must be one of 'log_snr', 't'"):
        time_grid(VP(), 3, "karras")
    with pytest.raises(TypeError, match="steps"):
        nfe("heun", 2.0)
    with pytest.raises(ValueError, match="steps"):
        nfe("heun", 0)
    with pytest.raises(ValueError, match="'heun'"):
        nfe("nothing")


@pytest.mark.parametrize("sampler", [euler, heun])
def test_samplers_refuse_by_themselves(sampler):
    with pytest.raises(TypeError, match="int64"):
        sampler(pointwise(), torch.ones(3, 2, dtype=torch.int64), [1.0, 0.5])
    with pytest.raises(ValueError, match="0.7 after 0.5"):
        sampler(pointwise(), torch.ones(3, 2), [0.5, 0.7])
    with pytest.raises(ValueError, match="shape"):
        sampler(pointwise(), torch.ones(3, 5), [0.5, 0.2])


# --- A denoiser of another process --------------------------------------------

#: A time that every process can tell to every other.
MIDDLE = {"VP": 0.4, "SubVP": 0.4, "VE": 0.5, "EDM": 0.5, "Cosine": 0.5, "Flow": 0.5,
          "linear": 0.4, "cosine": 0.5}
each_pair = pytest.mark.parametrize("here,there", list(itertools.product(NAMES, repeat=2)))


def of_name(name):
    return PROCESSES[NAMES.index(name)]


@each_pair
def test_an_exact_denoiser_moves_exactly(here, there, mixture):
    x, target = torch.randn(6, 2, dtype=torch.float64), of_name(there)
    for inner in (mixture.denoiser(of_name(here)),
                  Denoiser(mixture.denoiser(of_name(here)).eps, of_name(here), "eps", (2,)),
                  Denoiser(mixture.denoiser(of_name(here)).v, of_name(here), "v", (2,))):
        moved, wanted = as_process(inner, target), mixture.denoiser(target)
        assert moved.process is target and moved.shape == (2,)
        for t in (MIDDLE[there], torch.full((6,), MIDDLE[there], dtype=torch.float64)):
            torch.testing.assert_close(moved(x, t), wanted(x, t), rtol=0, atol=1e-8)
            torch.testing.assert_close(moved.eps(x, t), wanted.eps(x, t), rtol=0, atol=1e-8)
        back = as_process(moved, of_name(here))
        found, wanted = (d(x, MIDDLE[here]) for d in (back, inner))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


def test_both_ends_of_time_move(mixture):
    x = torch.randn(6, 2, dtype=torch.float64)
    for here, there in itertools.permutations((Cosine(), Flow()), 2):
        moved = as_process(mixture.denoiser(here), there)
        for t in (0.0, 1.0):
            expected = mixture.denoiser(there)(x, t)
            torch.testing.assert_close(moved(x, t), expected, rtol=0, atol=1e-9)


def test_a_moved_network_is_the_same_network():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = torch.nn.Linear(2, 2), []

        def forward(self, x, t, cond=None):
            self.seen.append((t.dtype, t[0].item(), cond, self.training))
            return self.inner(x)

    net = Net()
    moved = as_process(Denoiser(net, VP(), "v", (2,)), VE())
    assert list(moved.parameters()) == list(net.parameters()) and moved.dtype == torch.float32
    moved(torch.randn(3, 2), 0.5, 4)
    own = VP().t_of_log_snr(VE().log_snr(0.5)).item()
    dtype, t, cond, training = net.seen.pop()
    assert dtype == torch.float32 and t == pytest.approx(own, rel=1e-5) and training
    assert cond.tolist() == [4, 4, 4]
    sample(moved, 3, steps=2, seed=0)
    assert not any(training for *_, training in net.seen) and net.training
    moved(torch.randn(3, 2), 0.5).sum().backward()
    assert net.inner.weight.grad.abs().sum() > 0
    moved.to(torch.float64)
    assert net.inner.weight.dtype == torch.float64 and moved.dtype == torch.float64


def test_guidance_before_and_after_a_move(mixture):
    x, inner = torch.randn(4, 2, dtype=torch.float64), mixture.denoiser(VP())
    wanted = guided(mixture.denoiser(EDM()), 2.5)(x, 0.5, 1)
    for found in (guided(as_process(inner, EDM()), 2.5), as_process(guided(inner, 2.5), EDM())):
        torch.testing.assert_close(found(x, 0.5, 1), wanted, rtol=0, atol=1e-8)


def test_a_batched_null_label_moves_too():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, cond=None):
            return x * 0 + self.scale * cond[:, None].clamp(min=0)

    moved = as_process(Denoiser(Net(), VP(), "x0", (2,)), VE())
    assert guided(moved, 3.0)(torch.randn(4, 2), 0.5, 2).eq(6).all()


def test_what_cannot_move():
    for other in (torch.nn.Linear(2, 2), lambda x, t: x, None):
        with pytest.raises(TypeError, match="needs a Denoiser"):
            as_process(other, VE())
    with pytest.raises(TypeError, match="must be an instance"):
        as_process(pointwise(), VE)
    with pytest.raises(ValueError, match="log_snr"):
        as_process(pointwise(VE()), VP())(torch.randn(2, 2), 1.0)
    with pytest.raises(TypeError, match="cond"):
        as_process(pointwise(), VE())(torch.randn(2, 2), 0.5, 1)


# --- The registry -------------------------------------------------------------


def test_a_sampler_of_ones_own(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", None)

    @register("mine", steps=3, grid="t", evaluations=lambda n: 0)
    def mine(denoiser, x_T, times, *, cond=None, noise=None, callback=None):
        return x_T * 0 + len(times) + times[1]

    assert samplers.SAMPLERS["mine"].fn is mine and nfe("mine") == 0
    for sampler in ("mine", mine, samplers.SAMPLERS["mine"]):
        assert sample(pointwise(), 2, sampler=sampler).eq(3 + time_grid(VP(), 3, "t")[1]).all()
    with pytest.raises(ValueError, match="'mine'"):
        sample(pointwise(), 2, sampler="yours")


def test_a_partial_sampler_keeps_its_grid():
    small = partial(SAMPLERS["ancestral"].fn, variance="small")
    assert nfe(small) == 1000
    seen = []
    sample(pointwise(), 2, sampler=small, steps=3, callback=lambda i, t, *_: seen.append(t))
    assert seen == time_grid(VP(), 3, "t").tolist()


def test_a_partial_sampler_costs_what_its_options_make_it_cost(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "busy", None)

    @register("busy", steps=4, grid="t", evaluations=lambda n, twice=False: n * (1 + twice))
    def busy(denoiser, x_T, times, *, cond=None, noise=None, callback=None, twice=False, other=0):
        return x_T

    assert (nfe("busy"), nfe(busy), nfe(partial(busy, other=3))) == (4, 4, 4)
    assert nfe(partial(busy, twice=True)) == 8 and nfe(partial(partial(busy, twice=True)), 3) == 6
    assert nfe(partial(lambda *_, **__: None, twice=True), 5) == 5


def test_the_denoiser_is_left_as_it_was():
    net = torch.nn.Linear(2, 2).train()
    denoiser = Denoiser(lambda x, t: net(x), VP(), "x0", (2,))
    public = {k: v for k, v in vars(denoiser).items() if k[0] != "_"}
    sample(denoiser, 3, steps=2)
    assert public.items() <= vars(denoiser).items() and net.training


def test_dropout_sleeps_while_samples_are_drawn():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
            self.frozen = torch.nn.BatchNorm1d(2).eval()

        def forward(self, x, t, cond=None):
            if fails:
                raise RuntimeError("on purpose")
            return self.frozen(self.inner(x))

    fails = []
    net = Net()
    denoiser = Denoiser(net, VP(), "v", (2,))
    modes = [module.training for module in net.modules()]
    assert True in modes and False in modes
    one, other = (sample(denoiser, 20, steps=5, seed=0) for _ in range(2))
    assert torch.equal(one, other)
    assert [module.training for module in net.modules()] == modes
    guided = [sample(denoiser, 20, steps=5, seed=0, cond=1, guidance=2.0) for _ in range(2)]
    assert torch.equal(*guided) and [module.training for module in net.modules()] == modes
    fails.append(True)
    with pytest.raises(RuntimeError, match="on purpose"):
        sample(denoiser, 20, steps=5, seed=0)
    assert [module.training for module in net.modules()] == modes
    fails.clear()
    denoiser.eval()
    assert torch.equal(sample(denoiser, 20, steps=5, seed=0), one) and not net.training


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_chain_that_begins_without_noise(sampler):
    process = Discrete([0.0, 0.0, 0.5, 0.9])
    denoiser = Empirical(torch.ones(1, 2)).denoiser(process)
    torch.testing.assert_close(sample(denoiser, 3, sampler=sampler, seed=0), torch.ones(3, 2))
    with pytest.raises(ValueError, match="at most the chain's 2, got 3"):
        sample(denoiser, 3, sampler=sampler, steps=3)
