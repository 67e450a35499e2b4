"""What samplers share: grids, times, the network's own words, the walk and the registry."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffnotes import processes, samplers, stepping
from diffnotes.denoisers import Denoiser, posterior
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP
from diffnotes.stepping import (
    SAMPLERS,
    Evaluator,
    Sampler,
    as_times,
    denoise_along,
    register,
    step_coefficients,
    time_grid,
    walk,
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
COORDINATES = ["x0", "eps", "v", "score", "velocity", "edm"]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
each_coordinate = pytest.mark.parametrize("predicts", COORDINATES)
numbers = st.floats(-2, 2, allow_subnormal=False)


def tanh_net(process=None, predicts="x0", shape=None, **options):
    """A denoiser that acts on each entry alone."""
    options["sigma_data"] = 0.5 if predicts == "edm" else None
    return Denoiser(lambda x, t: torch.tanh(x) * (1 + t[:, None]), process or VP(), predicts,
                    shape, **options)


class Plain:
    """A callable with a process, and no short cut to its network."""

    def __init__(self, inner):
        self.inner, self.process = inner, inner.process

    def __call__(self, x_t, t, cond=None):
        return self.inner(x_t, t, cond)


def by_hand(denoiser, x, times, on_x, on_x0, on_noise, draws):
    """The states of a walk, and what it returns, from the formula."""
    states = [x]
    for t, a, b, c, z in zip(times, on_x, on_x0, on_noise, draws, strict=False):
        states.append(a * states[-1] + b * denoiser(states[-1], t) + c * z)
    return [*states, denoiser(states[-1], times[-1])]


# --- Grids and times ----------------------------------------------------------


@each_process
@pytest.mark.parametrize("kind", ["log_snr", "t"])
@pytest.mark.parametrize("steps", [1, 2, 3, 18, 50, 333, 1000])
def test_grids(process, kind, steps):
    times = time_grid(process, steps, kind)
    assert times.shape == (steps,) and times.dtype == torch.float64 and times.device.type == "cpu"
    assert times[0] == process.t_max and (times.diff() < 0).all()
    assert steps == 1 or times[-1] == process.t_min
    assert (process.sigma(times) > 0).all() and (process.alpha(times) > 0).all()
    if isinstance(process, Discrete):
        k = times * process.n_steps
        assert ((k - k.round()).abs() < 1e-9).all()


@pytest.mark.parametrize("n_steps", [1, 2, 5, 17])
def test_a_chain_has_room_for_all_its_points_and_no_more(n_steps):
    chain = Discrete(torch.full((n_steps,), 0.3, dtype=torch.float64))
    for steps, kind in itertools.product(range(1, n_steps + 1), ("log_snr", "t")):
        k = time_grid(chain, steps, kind) * n_steps
        assert len(set(k.round().tolist())) == steps and k[0] == n_steps
    with pytest.raises(ValueError, match=f"at most.* {n_steps}, got {n_steps + 1}"):
        time_grid(chain, n_steps + 1)


@pytest.mark.parametrize(
    "times,message",
    [
        ([], "N >= 1"),
        ([[1.0, 0.5]], "N >= 1"),
        (0.5, "N >= 1"),
        ([1.1, 0.5], r"\[0, 1\], got 1.1"),
        ([0.5, -0.1], r"\[0, 1\], got -0.1"),
        ([1.0, math.nan, 0.2], r"\[0, 1\], got nan"),
        ([0.5, 0.5], "got 0.5 after 0.5"),
        ([0.2, 0.9], "got 0.9 after 0.2"),
        ([0.0], "sigma > 0"),
        ([1.0, 0.5, 0.7, 0.1], "got 0.7 after 0.5"),
    ],
)
def test_senseless_times(times, message):
    with pytest.raises(ValueError, match=message):
        as_times(VP(), times)


def test_complex_times():
    for times in ([0.5 + 0.2j, 0.1], torch.tensor([0.5 + 0.2j, 0.1])):
        with pytest.raises(TypeError, match="times must be real"):
            as_times(VP(), times)


def test_a_last_time_without_noise_is_dropped():
    assert as_times(VP(), [1.0, 0.5, 0.0]).tolist() == [1.0, 0.5]
    assert as_times(VE(), [1.0, 0.0]).tolist() == [1.0, 0.0]
    assert as_times(VP(), torch.tensor([1.0, 0.5])).dtype == torch.float64


def test_grid_refusals():
    with pytest.raises(ValueError, match="at most.*1000, got 2000"):
        time_grid(PROCESSES[6], 2000)
    with pytest.raises(ValueError, match="kind must be one of 'log_snr', 't'"):
        time_grid(VP(), 3, "karras")
    for steps, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="steps"):
            time_grid(VP(), steps)


@given(st.integers(2, 40), st.sampled_from(["log_snr", "t"]))
@settings(deadline=None)
def test_a_chain_gives_what_a_search_by_hand_gives(steps, kind):
    """Each point is the lowest free one from its rounded time on, as far as there is room."""
    chain = Discrete([0.02] * 20 + [0.2] * 10 + [0.5] * 10)
    free, wanted = 0, chain.n_steps * time_of(chain, steps, kind).flip(0)
    expected = []
    for i, k in enumerate(wanted.round().tolist()):
        free = min(max(int(k), free + 1), 40 - (steps - 1) + i)
        expected.append(free)
    assert (time_grid(chain, steps, kind).flip(0) * 40).round().int().tolist() == expected


def time_of(chain, steps, kind):
    """The times before they are brought to the chain."""
    ends = torch.tensor([chain.t_max, chain.t_min], dtype=torch.float64)
    if kind == "t":
        return torch.linspace(*ends.tolist(), steps, dtype=torch.float64)
    levels = torch.linspace(*chain.log_snr(ends).tolist(), steps, dtype=torch.float64)
    times = chain.t_of_log_snr(levels)
    times[0], times[-1] = ends
    return times


# --- Coefficients -------------------------------------------------------------


@each_process
@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=5, unique=True))
@settings(deadline=None, max_examples=20)
def test_the_step_without_noise_keeps_the_marginals(process, values):
    times = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assume(times.diff().max() < -1e-6)
    a, b, h = step_coefficients(process, times)
    alpha, sigma = process.alpha(times), process.sigma(times)
    torch.testing.assert_close(a * alpha[:-1] + b, alpha[1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a * sigma[:-1], sigma[1:], rtol=1e-12, atol=0)
    torch.testing.assert_close(h, process.log_snr(times).diff() / 2, rtol=1e-6, atol=1e-8)
    assert (b >= 0).all() and (h > 0).all()


@each_process
def test_the_posterior_keeps_the_marginals(process):
    times = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    b, var = posterior(one, zero, times[1:], times[:-1], process)
    a, _ = posterior(zero, one, times[1:], times[:-1], process)
    alpha, sigma = process.alpha(times), process.sigma(times)
    torch.testing.assert_close(a * alpha[:-1] + b, alpha[1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a**2 * sigma[:-1] ** 2 + var, sigma[1:] ** 2, rtol=1e-9, atol=0)


# --- The network's own words --------------------------------------------------


@each_process
@each_coordinate
@pytest.mark.parametrize("time", ["t", "log_snr", "log_sigma"])
def test_evaluator_says_what_the_denoiser_says(process, predicts, time):
    denoiser, times = tanh_net(process, predicts, (3,), time=time), time_grid(process, 4)
    evaluate, x = Evaluator(denoiser, times), torch.randn(5, 3, dtype=torch.float64)
    for i in (0, 3, 1, 1, 2, 0):
        found = evaluate.x0_hat(i, x, evaluate(i, x))
        expected = denoiser(x, times[i].item())
        scale = max(1, expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * scale)


def test_evaluator_tells_its_numbers():
    times = torch.tensor([0.8, 0.3], dtype=torch.float64)
    evaluate = Evaluator(tanh_net(VP(), "eps"), times)
    assert evaluate.points == [0.8, 0.3]
    torch.testing.assert_close(evaluate.p, 1 / VP().alpha(times))
    torch.testing.assert_close(evaluate.q, -VP().sigma(times) / VP().alpha(times))
    plain = Evaluator(Plain(tanh_net()), times)
    assert plain.p.tolist() == [0, 0] and plain.q.tolist() == [1, 1]


def test_evaluator_refuses_what_a_coordinate_does_not_tell():
    with pytest.raises(ValueError, match="at t = 1"):
        Evaluator(tanh_net(Flow(), "eps"), torch.tensor([1.0, 0.5], dtype=torch.float64))


def test_the_first_call_checks():
    times = torch.tensor([0.8, 0.3], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(B, 2\), got \(3, 5\)"):
        Evaluator(tanh_net(shape=(2,)), times)(0, torch.randn(3, 5))
    with pytest.raises(TypeError, match="takes no cond"):
        Evaluator(tanh_net(), times, torch.tensor([1, 2, 3]))(0, torch.randn(3, 2))


# --- The walk -----------------------------------------------------------------


@each_process
@each_coordinate
def test_walk_is_the_formula(process, predicts):
    generator = torch.Generator().manual_seed(3)
    times = (process.t_max * torch.tensor([1.0, 0.7, 0.7, 0.3], dtype=torch.float64)).tolist()
    columns = torch.rand(3, 3, dtype=torch.float64, generator=generator)
    draws = torch.randn(3, 5, 2, dtype=torch.float64, generator=generator)
    x_T = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    inner, seen = tanh_net(process, predicts), []
    expected = by_hand(inner, x_T, times, *columns, draws)
    for denoiser in (inner, Plain(inner)):
        noises = iter(draws)
        end = walk(denoiser, x_T, times, *columns, noise=lambda x, z=noises: next(z),
                   callback=lambda i, t, x_t, x0_hat: seen.append((i, t, x_t, x0_hat)))
        for found, wanted in zip([*(x for *_, x, _ in seen), end], expected, strict=True):
            scale = max(1, wanted.abs().max().item())
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * scale)
        assert [i for i, *_ in seen] == [0, 1, 2, 3] and [t for _, t, *_ in seen] == times
        torch.testing.assert_close(seen[-1][3], end, rtol=0, atol=0)
        seen.clear()


@given(st.lists(st.tuples(numbers, numbers), max_size=6))
@settings(deadline=None)
def test_walk_without_noise_draws_none(rows):
    denoiser, x_T = tanh_net(VP(), "v"), torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    times = torch.linspace(0.9, 0.1, len(rows) + 1, dtype=torch.float64).tolist()
    on_x, on_x0 = [a for a, _ in rows], [b for _, b in rows]
    expected = by_hand(denoiser, x_T, times, on_x, on_x0, [0.0] * len(rows), [0.0] * len(rows))
    state = torch.get_rng_state()
    found = walk(denoiser, x_T, times, on_x, on_x0)
    assert torch.equal(torch.get_rng_state(), state)
    scale = max(1.0, *(x.abs().max().item() for x in expected))
    torch.testing.assert_close(found, expected[-1], rtol=0, atol=1e-9 * scale)


def test_walk_draws_standard_normals_by_default():
    x_T, columns = torch.zeros(50_000, 1), ([0.0], [0.0], [3.0])
    states = []
    walk(tanh_net(), x_T, [0.9, 0.2], *columns, callback=lambda i, t, x, _: states.append(x))
    assert abs(states[1].mean()) < 0.06 and abs(states[1].std() - 3) < 0.05
    given, sizes = [], []
    walk(tanh_net(), x_T, [0.9, 0.5, 0.2], [1.0] * 2, [0.0] * 2, [1.0] * 2,
         noise=lambda x: sizes.append((x.shape, x.dtype)) or torch.ones_like(x),
         callback=lambda i, t, x, _: given.append(x[0, 0].item()))
    assert given == [0, 1, 2] and sizes == [((50_000, 1), torch.float32)] * 2


def test_one_time_is_one_evaluation():
    calls = []
    denoiser = Denoiser(lambda x, t: calls.append(t[0].item()) or 2 * x, VP(), "x0")
    assert walk(denoiser, torch.ones(2, 3), [0.5], [], []).eq(2).all() and calls == [0.5]


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"times": [0.5, 0.9, 0.1]}, ValueError, "must not increase"),
        ({"times": [1.5, 0.9, 0.1]}, ValueError, r"\[0, 1\], got 1.5"),
        ({"times": []}, ValueError, "N >= 1"),
        ({"times": [0.9, math.nan, 0.1]}, ValueError, "nan"),
        ({"times": [0.9, 0.1j, 0.1]}, TypeError, "real"),
        ({"on_x": [1.0]}, ValueError, "on_x must be 2 finite numbers"),
        ({"on_x0": [1.0, math.inf]}, ValueError, "on_x0 must be 2 finite numbers"),
        ({"on_noise": [[1.0, 1.0]]}, ValueError, "on_noise must be 2 finite numbers"),
        ({"on_noise": [1.0, math.nan]}, ValueError, "on_noise .* got .1.0, nan"),
        ({"x_T": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "int64"),
        ({"x_T": torch.tensor([[1.0, math.nan]])}, ValueError, "x_T must be finite, got nan"),
        ({"x_T": torch.tensor([[1.0, -math.inf]])}, ValueError, "x_T must be finite, got -inf"),
        ({"x_T": torch.ones(3, 5)}, ValueError, "shape"),
    ],
)
def test_walk_refuses(change, error, message):
    sound = {"x_T": torch.ones(3, 2), "times": [0.9, 0.5, 0.1], "on_x": [1.0, 1.0],
             "on_x0": [0.1, 0.1], "on_noise": [0.1, 0.1]}
    walk(tanh_net(shape=(2,)), **sound)
    with pytest.raises(error, match=message):
        walk(tanh_net(shape=(2,)), **(sound | change))


def test_states_given_away_are_never_written_to():
    kept, copies = [], []

    def net(x, t):
        kept.append(x), copies.append(x.clone())
        return x

    denoiser, columns = Denoiser(net, VP(), "x0"), torch.rand(3, 5)
    for callback in (None, lambda i, t, x, x0_hat: (net(x, t), net(x0_hat, t))):
        x_T = torch.randn(4, 2)
        before = x_T.clone()
        walk(denoiser, x_T, time_grid(VP(), 6), *columns, callback=callback)
        assert torch.equal(x_T, before)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_are_float32_or_better(dtype):
    seen = set()
    denoiser = Denoiser(lambda x, t: seen.add((x.dtype, t.dtype)) or torch.tanh(x), VP(), "v")
    found = walk(denoiser, torch.randn(3, 2).to(dtype), time_grid(VP(), 4), *torch.rand(3, 3))
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == dtype and seen == {(wide, wide)}


def test_gradients_through_a_walk():
    net, columns = torch.nn.Linear(2, 2, dtype=torch.float64), torch.rand(2, 3)
    denoiser = Denoiser(lambda x, t: torch.tanh(net(x)), VP(), "eps")
    x_T = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: walk(denoiser, x, time_grid(VP(), 4), *columns), x_T)
    assert net.weight.grad is None
    walk(denoiser, x_T, time_grid(VP(), 4), *columns).sum().backward()
    assert net.weight.grad.abs().sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_device_sync_in_the_walk():
    net = torch.nn.Linear(2, 2).cuda()
    denoiser = Denoiser(lambda x, t: net(x), VP(), "v", (2,), device="cuda", dtype=torch.float32)
    x_T, columns = torch.randn(4, 2, device="cuda"), torch.rand(3, 4)
    walk(denoiser, x_T, time_grid(VP(), 5), *columns)
    torch.cuda.set_sync_debug_mode("error")
    try:
        walk(denoiser, x_T, time_grid(VP(), 5), *columns)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_of_ones_own():
    """The loop asks at each time, steps between them, and reads x0_hat at the last."""
    evaluate, seen = Evaluator(tanh_net(VP(), "eps"), time_grid(VP(), 3)), []

    def step(i, x, value):
        seen.append((i, value))
        return x + 1

    x_T = torch.zeros(2, 2, dtype=torch.float64)
    found = denoise_along(evaluate, x_T, step)
    assert [i for i, _ in seen] == [0, 1]
    expected = tanh_net(VP(), "eps")(x_T + 2, time_grid(VP(), 3)[-1].item())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


# --- The registry -------------------------------------------------------------


def test_both_paths_lead_to_one_registry():
    for name in ("SAMPLERS", "Sampler", "register", "as_times", "time_grid", "step_coefficients"):
        assert getattr(samplers, name) is getattr(stepping, name)


def test_register(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", None)

    @register("mine", steps=3, grid="t", evaluations=lambda n, extra=1: n + extra)
    def mine(denoiser, x_T, times, *, cond=None, noise=None, callback=None, extra=1):
        return x_T

    entry = SAMPLERS["mine"]
    assert entry.fn is mine and (entry.steps, entry.grid) == (3, "t") and entry.evaluations(5) == 6
    assert Sampler(mine).evaluations(5) == 5 and Sampler(mine).steps == 18


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_entry_is_sound(name):
    entry = SAMPLERS[name]
    assert time_grid(VP(), entry.steps, entry.grid)[0] == 1 and entry.evaluations(1) >= 1
    assert entry.fn.__doc__ and name.isidentifier()


@pytest.mark.parametrize("predicts", ["eps", "edm"])
def test_a_prediction_of_another_shape_is_refused(predicts):
    denoiser = Denoiser(lambda x, t: x[:, :1], VP(), predicts, (2,), sigma_data=0.5)
    with pytest.raises(ValueError, match=r"prediction of shape \(3, 1\) for \(3, 2\)"):
        samplers.sample(denoiser, x_T=torch.randn(3, 2), steps=2)
