"""What samplers share: grids, times, the network's own words, the walk and the registry."""

import itertools
import math
import shutil
import weakref

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


def test_a_grid_of_ones_own():
    asked = []

    def halves(process, steps):
        asked.append((process, steps))
        return [0.5**i for i in range(steps)] + [0.0]

    times = time_grid(VP(), 4, halves)
    assert times.tolist() == [1, 0.5, 0.25, 0.125] and times.dtype == torch.float64
    assert asked == [(VP(), 4)]
    with pytest.raises(ValueError, match="got 1 after 0"):
        time_grid(VP(), 3, lambda process, steps: [0.0, 1.0])
    with pytest.raises(ValueError, match="steps"):
        time_grid(VP(), 0, halves)


def test_a_registered_grid_of_ones_own(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", None)
    register("mine", grid=lambda process, steps: [1.0, 0.5, 0.0][:steps])(samplers.euler)
    seen, denoiser = [], tanh_net(VP(), "eps", (2,))
    samplers.sample(denoiser, 3, sampler="mine", steps=3, seed=0,
                    callback=lambda i, t, *_: seen.append(t))
    assert seen == [1.0, 0.5]


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


def test_what_is_remembered_cannot_be_changed():
    for function, args in (
        (time_grid, (VP(), 5)),
        (as_times, (VP(), [1.0, 0.4])),
        (step_coefficients, (VP(), time_grid(VP(), 5))),
    ):
        first = function(*args)
        parts = first if isinstance(first, tuple) else (first,)
        copies = [part.clone() for part in parts]
        for part in parts:
            part.zero_()
        again = function(*args)
        again = again if isinstance(again, tuple) else (again,)
        assert all(torch.equal(a, b) for a, b in zip(again, copies, strict=True))
    with pytest.raises(TypeError, match="steps must be an int, got True"):
        time_grid(VP(), 1), time_grid(VP(), True)
    evaluate = Evaluator(tanh_net(VP(), "eps"), time_grid(VP(), 5))
    evaluate.points[0], evaluate.p[0] = 7, 7
    assert Evaluator(tanh_net(VP(), "eps"), time_grid(VP(), 5)).points[0] == 1


def test_a_process_of_ones_own_is_asked_anew():
    class Mine(VP):
        power = 1.0

        def sigma(self, t):
            return super().sigma(t) ** self.power

    mine, times = Mine(), torch.tensor([0.9, 0.5], dtype=torch.float64)
    before = step_coefficients(mine, times)[1]
    object.__setattr__(mine, "power", 2.0)
    after = step_coefficients(mine, times)[1]
    assert abs(before - after) > 1e-4
    assert step_coefficients(VP(beta_max=19.0), times)[1] != step_coefficients(VP(), times)[1]


def test_coefficients_are_differentiable_in_the_times():
    times = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    step_coefficients(VP(), times.detach())
    assert torch.autograd.gradcheck(lambda t: step_coefficients(VP(), t), times)
    h = torch.func.grad(lambda t: step_coefficients(VP(), t)[2].sum())(times.detach())
    assert h.isfinite().all() and torch.func.jvp(
        lambda x: x * time_grid(VP(), 7), (h.new_ones(7),), (h.new_ones(7),))[0][0] == 1
    assert type(time_grid(VP(), 7)) is torch.Tensor and time_grid(VP(), 7).numpy()[0] == 1


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


def with_history(denoiser, x, times, on_x, on_x0, on_noise, draws):
    """The states of a walk over a table, from the formula; the last is the result."""
    states, said = [x], []
    for i, t in enumerate(times):
        said = [denoiser(states[-1], t), *said]
        if i == len(on_x):
            return [*states, said[0]]
        total = sum(b * answer for b, answer in zip(on_x0[i], said, strict=False))
        states.append(on_x[i] * states[-1] + total + on_noise[i] * draws[i])
    return states


@each_process
@each_coordinate
@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("lags", [1, 2, 3, 6])
def test_walk_over_a_table_is_the_formula(process, predicts, rows, lags):
    generator = torch.Generator().manual_seed(rows + 10 * lags)
    times = (process.t_max * torch.tensor([1.0, 0.7, 0.7, 0.3], dtype=torch.float64)).tolist()
    on_x, on_noise = torch.rand(2, rows, dtype=torch.float64, generator=generator)
    on_x0 = torch.rand(rows, lags, dtype=torch.float64, generator=generator).tril()
    draws = torch.randn(rows, 5, 2, dtype=torch.float64, generator=generator)
    x_T = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    inner = tanh_net(process, predicts)
    expected = with_history(inner, x_T, times, on_x, on_x0, on_noise, draws)
    scale = max(1, *(x.abs().max().item() for x in expected))
    for denoiser in (inner, Plain(inner)):
        noises, seen = iter(draws), []
        end = walk(denoiser, x_T, times, on_x, on_x0, on_noise, noise=lambda x, z=noises: next(z),
                   callback=lambda i, t, x_t, x0_hat, s=seen: s.append((i, t, x_t, x0_hat)))
        for found, wanted in zip([*(x for *_, x, _ in seen), end], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * scale)
        assert [(i, t) for i, t, *_ in seen] == list(enumerate(times))
        for i, t, x_t, x0_hat in seen:
            wide = max(scale, x0_hat.abs().max().item())
            torch.testing.assert_close(x0_hat, inner(x_t, t), rtol=0, atol=1e-8 * wide, msg=str(i))


def test_a_table_of_one_column_is_that_column():
    denoiser, x_T, times = tanh_net(VP(), "eps"), torch.randn(3, 2), time_grid(VP(), 4)
    on_x, on_x0, on_noise = torch.rand(3, 3)
    draw = dict(noise=lambda x: torch.ones_like(x))
    column = walk(denoiser, x_T, times, on_x, on_x0, on_noise, **draw)
    table = walk(denoiser, x_T, times, on_x, on_x0[:, None], on_noise, **draw)
    padded = torch.nn.functional.pad(on_x0[:, None], (0, 2))
    assert torch.equal(column, table)
    assert torch.equal(column, walk(denoiser, x_T, times, on_x, padded, on_noise, **draw))
    ends = [torch.cat([a, torch.tensor([z])]) for a, z in ((on_x, 0.0), (on_x0, 1.0))]
    longer = walk(denoiser, x_T, times, ends[0], ends[1][:, None], [*on_noise.tolist(), 0], **draw)
    torch.testing.assert_close(longer, column)


def test_a_single_time_with_and_without_a_row():
    denoiser = Denoiser(lambda x, t: 2 * x, VP(), "x0")
    x = torch.ones(2, 3)
    assert walk(denoiser, x, [0.5], [], torch.zeros(0, 2)).eq(2).all()
    assert walk(denoiser, x, [0.5], [3.0], [[0.25]]).eq(3.5).all()
    assert walk(denoiser, x, [0.5], [3.0], [[0.25, 0.0]], [0.0]).eq(3.5).all()


def test_no_noise_is_drawn_where_its_factor_is_zero():
    drawn = []
    walk(tanh_net(), torch.zeros(2, 2), [0.9, 0.5, 0.2], [1.0] * 3, torch.ones(3, 1),
         [0.0, 2.0, 0.0], noise=lambda x: drawn.append(1) or torch.ones_like(x))
    assert len(drawn) == 1


@pytest.mark.parametrize("predicts", ["x0", "eps", "v"])
def test_a_network_may_reuse_the_memory_of_its_answers(predicts):
    """As a graph of a compiled network does: each answer is written over the one before."""
    buffer = torch.empty(3, 2, dtype=torch.float64)

    def reusing(x, t):
        return buffer.copy_(torch.tanh(x) * (1 + t[:, None]))

    x_T, on_x = torch.randn(3, 2, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    on_x0 = torch.rand(4, 3, dtype=torch.float64).tril()
    ends = [walk(Denoiser(net, Flow(), predicts), x_T, [1.0, 0.6, 0.4, 0.2], on_x, on_x0)
            for net in (tanh_net().net, reusing) if predicts != "eps"]
    ends += [walk(Denoiser(net, VP(), predicts), x_T, [1.0, 0.6, 0.4, 0.2], on_x, on_x0)
             for net in (tanh_net().net, reusing)]
    assert all(torch.equal(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True))


def test_no_state_outlives_its_step():
    """Alive at a call are the state and the one that the caller holds."""
    def alive(on_x0):
        living, most, count = weakref.WeakSet(), [], len(on_x0)

        def net(x, t):
            living.add(x)
            most.append(len(living))
            return torch.tanh(x)

        walk(Denoiser(net, VP(), "x0"), torch.randn(2, 2), time_grid(VP(), count + 1),
             torch.ones(count), on_x0)
        return max(most)

    assert alive(torch.ones(6, 1)) == alive(torch.ones(6, 3).tril()) == 2


def tables():
    """Tables of every kind: without history, two answers, gaps, a row at the end."""
    generator = torch.Generator().manual_seed(8)
    on_x, on_x0 = torch.rand(6, generator=generator), torch.rand(6, 4, generator=generator).tril()
    gaps = on_x0 * (torch.rand(6, 4, generator=generator) < 0.4)
    short = [(on_x[:5], table[:5]) for table in (on_x0[:, :1], on_x0[:, :2], on_x0, gaps)]
    return [*short, (on_x, on_x0[:, :3]), (on_x, gaps), (on_x, on_x0 * torch.eye(6)[:, :4])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("predicts", COORDINATES)
def test_every_bit_is_the_same_however_memory_is_used(predicts, dtype):
    """With and without a callback, a graph, a network that holds the state or answers with it."""
    x_T, held = torch.randn(4, 3).to(dtype), []

    def through(answer, grad=False, callback=None):
        denoiser = tanh_net(VP(), predicts)
        denoiser.net = lambda x, t: answer(torch.tanh(x) if answer is not alias else x)
        with torch.set_grad_enabled(grad):
            return [walk(denoiser, x_T, time_grid(VP(), 6), *table, callback=callback)
                    for table in tables()]

    def plain(x):
        return x

    def alias(x):
        return x[:]

    def hold(x):
        held.append(x)
        return x

    before = x_T.clone()
    expected, of_alias = (through(f, True, lambda *_: None) for f in (plain, alias))
    for found in (through(plain), through(hold), through(plain, True)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(through(alias), of_alias, strict=True))
    assert torch.equal(x_T, before)


def test_memory_is_written_over_where_nobody_sees_it():
    """Large states stay in the cache: the own state and one place for each answer."""
    addresses = set()

    def net(x, t):
        addresses.add(x.data_ptr())
        return torch.tanh(x)

    for lags, most in ((1, 2), (2, 3), (3, 4)):
        addresses.clear()
        with torch.no_grad():
            walk(Denoiser(net, VP(), "eps"), torch.randn(64, 64, 64), time_grid(VP(), 20),
                 torch.rand(19), torch.rand(19, lags).tril())
        assert 2 <= len(addresses) <= most


def test_no_state_is_written_to_that_a_network_holds():
    kept, copies = [], []

    class Holding(torch.nn.Module):
        def forward(self, x, t, cond=None):
            kept.append(x), copies.append(x.clone())
            return torch.tanh(x)

    for table in tables():
        with torch.no_grad():
            walk(Denoiser(Holding(), VP(), "eps"), torch.randn(4, 3), time_grid(VP(), 6), *table)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_forward_derivatives_through_a_walk():
    x_T, v = torch.randn(2, 4, 3, dtype=torch.float64)
    for table in tables():
        def end(x, table=table):
            return walk(tanh_net(VP(), "eps"), x, time_grid(VP(), 6), *table)

        def silent(x):
            with torch.no_grad():
                return end(x)

        _, expected = torch.autograd.functional.jvp(end, x_T, v)
        for f in (end, silent):
            value, found = torch.func.jvp(f, (x_T,), (v,))
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            assert torch.equal(value, end(x_T))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_walk():
    """It gives what the loop gives, and all its evaluations are in one graph."""
    net, graphs = torch.nn.Linear(3, 3), []
    denoiser, x_T = Denoiser(lambda x, t: torch.tanh(net(x)) * t[:, None], VP(), "eps"), (
        torch.randn(4, 3))
    on_x, on_x0 = torch.rand(4), torch.rand(4, 2).tril()

    def run(x):
        return walk(denoiser, x, time_grid(VP(), 4), on_x, on_x0)

    def counted(graph, inputs):
        graphs.append(sum("tanh" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    with torch.no_grad():
        expected = run(x_T)
        torch.testing.assert_close(torch.compile(run, backend=counted)(x_T), expected)
        assert max(graphs) == sum(graphs) == 4
        evaluate = Evaluator(denoiser, time_grid(VP(), 4))
        rows = stepping._rows(time_grid(VP(), 4), evaluate.p, evaluate.q, on_x, on_x0, None)
        loop = torch.compile(lambda x: stepping._run(evaluate, x, rows, None, None),
                             fullgraph=True)
        torch.testing.assert_close(loop(x_T), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_cuda_graph_of_a_whole_run(sampler):
    net = torch.nn.Linear(3, 3).cuda()
    denoiser = Denoiser(lambda x, t: torch.tanh(net(x)) * t[:, None], VP(), "eps", (3,),
                        device="cuda", dtype=torch.float32)
    first, second = torch.randn(2, 4, 3, device="cuda")
    x_T, stream = first.clone(), torch.cuda.Stream()

    def run():
        return samplers.sample(denoiser, x_T=x_T, sampler=sampler, steps=5)

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    for start in (first, second):
        x_T.copy_(start)
        graph.replay()
        found, expected = result.clone(), run()
        torch.testing.assert_close(found, expected)


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
        ({"on_x0": [1.0, 1.0, 1.0]}, ValueError, "on_x0 must be 2 finite numbers"),
        ({"on_x0": [[1.0]]}, ValueError, "on_x0 must be 2 or 3 rows of finite numbers"),
        ({"on_x0": [[1.0]] * 4}, ValueError, "on_x0 must be 2 or 3 rows of finite numbers"),
        ({"on_x0": [[1.0], [math.nan]]}, ValueError, "on_x0 must be 2 or 3 rows of finite"),
        ({"on_x0": [[1.0, 0.0], [1.0, 0.2], [0, 0]]}, ValueError, "on_x must be 3 finite numbers"),
        ({"on_x0": [[1.0, 0.1], [1.0, 0.2]]}, ValueError, r"on_x0\[i, j\] must be 0 for j > i"),
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
    net, tables = torch.nn.Linear(2, 2, dtype=torch.float64), [torch.rand(2, 3)]
    tables += [(torch.rand(4), torch.rand(4, 3).tril(), torch.rand(4))]
    x_T = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    for predicts, table in itertools.product(("eps", "x0", "v", "edm"), tables):
        scale = 0.5 if predicts == "edm" else None
        denoiser = Denoiser(lambda x, t: torch.tanh(net(x)), VP(), predicts, sigma_data=scale)

        def end(x, denoiser=denoiser, table=table):
            return walk(denoiser, x, time_grid(VP(), 4), *table, noise=torch.ones_like)

        net.weight.grad = None
        assert torch.autograd.gradcheck(end, x_T) and net.weight.grad is None
        end(x_T).sum().backward()
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
    assert time_grid(VP(), entry.steps, entry.grid)[0] == 1
    assert entry.fn.__doc__ and name.isidentifier()
    try:
        assert entry.evaluations(1) >= 1
    except ValueError as error:
        assert "finds its own steps" in str(error)


@pytest.mark.parametrize("predicts", ["eps", "edm"])
def test_a_prediction_of_another_shape_is_refused(predicts):
    denoiser = Denoiser(lambda x, t: x[:, :1], VP(), predicts, (2,), sigma_data=0.5)
    with pytest.raises(ValueError, match=r"prediction of shape \(3, 1\) for \(3, 2\)"):
        samplers.sample(denoiser, x_T=torch.randn(3, 2), steps=2)
