"""DDIM: its equivalences, published code, ends of time, spacings, the way back, refusals."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from diffnotes import ddim
from diffnotes.ddpm import ancestral
from diffnotes.denoisers import Denoiser, from_x0_eps
from diffnotes.mixtures import Gaussian, GaussianMixture
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
from diffnotes.samplers import euler, heun, nfe, sample
from diffnotes.stepping import SAMPLERS, as_times, step_coefficients, time_grid

CHAIN = Discrete(linear_betas())
PROCESSES = [VP(), SubVP(), VE(), EDM(), Cosine(), Flow(), CHAIN, Discrete(cosine_betas(1000))]
NAMES = ["VP", "SubVP", "VE", "EDM", "Cosine", "Flow", "linear", "cosine"]
COORDINATES = ["x0", "eps", "v", "score", "velocity", "edm"]
KINDS = ["trailing", "leading", "linspace"]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
each_coordinate = pytest.mark.parametrize("predicts", COORDINATES)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def law():
    """A mixture in three dimensions with full covariances."""
    factor = normal(3, 3, 3, seed=5)
    covariances = 0.06 * factor @ factor.mT + 0.04 * torch.eye(3, dtype=torch.float64)
    means = f64([[1.0, 0.0, -0.5], [-0.8, 0.5, 0.2], [0.0, -1.0, 0.8]])
    return GaussianMixture(means, covariances, f64([0.5, 0.2, 0.3]))


def point_denoiser(process, predicts, point):
    """What a network says whose data are one point."""

    def net(x, t):
        alpha, sigma = (c.reshape(-1, 1) for c in (process.alpha(t), process.sigma(t)))
        x = x * torch.hypot(0.5 * alpha, sigma) if predicts == "edm" else x  # it saw c_in x
        return from_x0_eps(point.expand_as(x), (x - alpha * point) / sigma, t, process, predicts,
                           sigma_data=0.5)

    return Denoiser(net, process, predicts, (2,), dtype=torch.float64,
                    sigma_data=0.5 if predicts == "edm" else None)


def no_noise(x):
    raise AssertionError("noise was drawn")


# -- the family ----------------------------------------------------------------------------------


@each_process
def test_with_no_noise_it_is_euler_and_with_all_of_it_ancestral(process, law):
    denoiser, times, x_T = law.denoiser(process), time_grid(process, 9), normal(6, 3)
    still = ddim.ddim_sampler(denoiser, x_T, times, noise=no_noise)
    assert torch.equal(still, euler(denoiser, x_T, times))
    draws = normal(8, 6, 3, seed=1)
    ends = []
    for fn in (partial(ddim.ddim_sampler, eta=1), partial(ancestral, variance="small")):
        source = iter(draws)
        ends.append(fn(denoiser, x_T, times, noise=lambda x, s=source: next(s)))
        assert next(source, None) is None
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)


@each_process
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_coefficients_keep_the_marginals(process, eta):
    times = time_grid(process, 12)
    a, b, c = ddim.ddim_coefficients(process, times, eta)
    alpha, sigma = process.alpha(times), process.sigma(times)
    torch.testing.assert_close(a * alpha[:-1] + b, alpha[1:], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(a**2 * sigma[:-1] ** 2 + c**2, sigma[1:] ** 2, rtol=1e-11, atol=0)
    _, transition = process.transition(times[1:], times[:-1])
    torch.testing.assert_close(c, eta * sigma[1:] / sigma[:-1] * transition.sqrt(), rtol=1e-6,
                               atol=1e-13)


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=["Cosine", "Flow"])
def test_coefficients_from_pure_noise_and_of_tiny_steps(process):
    """alpha(1) = 0: a keeps sqrt(1 - eta^2) of the noise. Tiny steps: b = (1 + eta^2) h alpha."""
    assert process.alpha(1.0) < 1e-15
    for eta in (0.0, 0.6, 1.0):
        a, b, c = ddim.ddim_coefficients(process, f64([1.0, 0.4]), eta)
        alpha, sigma = process.alpha(0.4), process.sigma(0.4)
        found, wanted = [a.item(), b.item(), c.item()], [math.sqrt(1 - eta**2) * sigma, alpha,
                                                        eta * sigma]
        assert found == pytest.approx([float(w) for w in wanted], abs=1e-8)
        _, b, _ = ddim.ddim_coefficients(process, f64([0.5, 0.5 - 1e-10]), eta)
        _, _, h = step_coefficients(process, f64([0.5, 0.5 - 1e-10]))
        assert b.item() == pytest.approx((process.alpha(0.5) * (1 + eta**2) * h).item(), rel=1e-6)


@pytest.mark.parametrize("eta", [-1e-9, 1.0001, math.nan, math.inf])
def test_eta_has_a_range(eta, law):
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        ddim.ddim_sampler(law.denoiser(VP()), normal(2, 3), [1.0, 0.5], eta=eta)


# -- ends of time ---------------------------------------------------------------------------------


@each_process
@each_coordinate
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_single_point_is_reached_in_any_number_of_steps(process, predicts, eta):
    """Rounding of p x + q F where noise is 1/sigma times the point: 1e-9 at most."""
    point, x_T = f64([0.7, -0.2]), normal(4, 2) * process.prior_std()
    denoiser = point_denoiser(process, predicts, point)
    for steps in range(1, 6):
        for grid in ("log_snr", "t"):
            times = time_grid(process, steps, grid)
            end = ddim.ddim_sampler(denoiser, x_T, times, eta=eta)
            torch.testing.assert_close(end, point.expand(4, 2), rtol=0, atol=1e-9)


def test_one_step_returns_the_guess(law):
    for process in PROCESSES:
        x_T, t = normal(4, 3), process.t_max
        end = ddim.ddim_sampler(law.denoiser(process), x_T, [t], eta=1.0, noise=no_noise)
        torch.testing.assert_close(end, law.denoiser(process)(x_T, t), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("predicts", ["x0", "v", "velocity"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_from_a_time_without_signal(predicts, eta):
    net = Denoiser(lambda x, t: torch.tanh(x), Flow(), predicts, (2,))
    times = [1.0, 0.6, 0.0]
    assert ddim.ddim_sampler(net, normal(3, 2), times, eta=eta).isfinite().all()
    noise = Denoiser(lambda x, t: torch.tanh(x), Flow(), "eps", (2,))
    with pytest.raises(ValueError, match="t = 1"):
        ddim.ddim_sampler(noise, normal(3, 2), times, eta=eta)


# -- published code -------------------------------------------------------------------------------


def by_the_paper(eps_net, x, steps, betas, eta, draws):
    """Equations 12 and 16 of Song, Meng and Ermon in plain numbers, steps k = 1 .. T."""
    bar = [1.0]
    for beta in betas.tolist():
        bar.append(bar[-1] * (1 - beta))
    for k, before in zip(steps, [*steps[1:], 0], strict=True):
        now, then = bar[k], bar[before]
        std = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        eps = eps_net(x, k)
        x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        x = math.sqrt(then) * x0 + math.sqrt(max(1 - then - std**2, 0)) * eps
        x = x + std * next(draws) if before else x
    return x


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("kind", "steps"), [("trailing", [1000, 750, 500, 250]),
                                             ("leading", [751, 501, 251, 1]),
                                             ("linspace", [1000, 667, 334, 1])])
def test_golden_steps_of_each_spacing(kind, steps, eta):
    net = Denoiser(lambda x, t: torch.tanh(x + t[:, None]), CHAIN, "eps", (3,))
    times, x_T, draws = ddim.spaced_times(CHAIN, 4, kind), normal(5, 3), normal(3, 5, 3, seed=2)
    assert (times * 1000).round().int().tolist() == steps
    source = iter(draws)
    end = ddim.ddim_sampler(net, x_T, times, eta=eta, noise=lambda x: next(source))
    expected = by_the_paper(lambda x, k: torch.tanh(x + k / 1000), x_T, steps, CHAIN.betas, eta,
                            iter(draws))
    torch.testing.assert_close(end, expected, rtol=1e-10, atol=1e-10)


def scheduler(kind, T=1000, **options):
    """diffusers' DDIM on the same chain, its table in float64."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    found = diffusers.DDIMScheduler(num_train_timesteps=T, trained_betas=linear_betas(T).numpy(),
                                    timestep_spacing=kind, clip_sample=False, **options)
    found.alphas_cumprod = Discrete(linear_betas(T)).alpha_bar[1:].clone()
    return found


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("kind", "T", "S", "offset"), [
    ("trailing", 1000, 10, 0), ("trailing", 1000, 50, 0), ("leading", 1000, 10, 0),
    ("leading", 1000, 13, 0), ("leading", 1000, 20, 1), ("linspace", 60, 60, 0)])
@pytest.mark.parametrize(("predicts", "name"), [("eps", "epsilon"), ("x0", "sample"),
                                                ("v", "v_prediction")])
def test_diffusers_step_by_step(kind, T, S, offset, eta, predicts, name):
    """Each spacing where the scheduler steps to the next of its own list; 50 roundings."""
    theirs = scheduler(kind, T, steps_offset=offset, prediction_type=name)
    theirs.set_timesteps(S)
    chain = Discrete(linear_betas(T))
    times = ddim.spaced_times(chain, S, kind, offset=offset)
    assert ((times * T).round() - 1).int().tolist() == theirs.timesteps.tolist()
    net = Denoiser(lambda x, t: torch.tanh(x + t[:, None]), chain, predicts, (3,))
    x, draws = normal(4, 3), normal(S, 4, 3, seed=3)
    source = iter(draws)
    ours = ddim.ddim_sampler(net, x, times, eta=eta, noise=lambda x: next(source))
    for i, k in enumerate(theirs.timesteps.tolist()):
        said = torch.tanh(x + (k + 1) / T)
        # Theirs draws on the last step too, where its variance is 0.
        x = theirs.step(said, k, x, eta=eta, variance_noise=draws[i]).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_timesteps(kind):
    """The same lists, but where theirs has one index too many or, for one step, begins at 0."""
    theirs = scheduler(kind)
    for S in [*range(2, 130), 199, 333, 499, 500, 777, 999, 1000]:
        theirs.set_timesteps(S)
        ours = ((ddim.spaced_times(CHAIN, S, kind) * 1000).round() - 1).int().tolist()
        assert ours == theirs.timesteps.tolist()[:S]
        assert kind == "trailing" or len(theirs.timesteps) == S


def test_diffusers_steps_elsewhere_where_it_computes_the_index():
    theirs = scheduler("linspace")
    theirs.set_timesteps(10)
    x = normal(4, 3)
    moved = theirs.step(torch.tanh(x), 999, x).prev_sample
    seen = []
    net = Denoiser(lambda x, t: torch.tanh(x), CHAIN, "eps", (3,))
    for second in (0.9, 0.889):
        ddim.ddim_sampler(net, x, [1.0, second], callback=lambda i, t, x, _: seen.append(x))
    torch.testing.assert_close(moved, seen[1], rtol=1e-9, atol=1e-9)
    assert theirs.timesteps[1] == 888 and (moved - seen[3]).abs().max() > 0.1


# -- spacings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 7, 50, 1000])
def test_spacings_are_points_of_the_chain_and_as_many_as_asked(kind, T):
    process = Discrete(torch.full((T,), 0.01, dtype=torch.float64))
    for S in range(1, T + 1, max(1, T // 60)):
        times = ddim.spaced_times(process, S, kind)
        k = times * T
        assert times.dtype == torch.float64 and times.shape == (S,)
        assert (times.diff() < 0).all() and (k - k.round()).abs().max() < 1e-9 * T
        assert times[-1] >= 0.999 / T and times[0] <= 1
        assert kind == "leading" or times[0] == 1
        assert torch.equal(as_times(process, times), times)
    assert torch.equal(ddim.spaced_times(process, T, kind), torch.arange(T, 0, -1).double() / T)


@pytest.mark.parametrize(("arguments", "options", "error", "match"), [
    ((VP(), 10, "linspace"), {}, ValueError, "Discrete"),
    ((VP(), 10), {"offset": 1}, ValueError, "offset"),
    ((CHAIN, 10.0), {}, TypeError, "steps must be an int"),
    ((CHAIN, 0), {}, ValueError, "at least 1"),
    ((CHAIN, 1001), {}, ValueError, "at most the chain's 1000"),
    ((CHAIN, 10, "karras"), {}, ValueError, "trailing"),
    ((CHAIN, 10), {"offset": 1}, ValueError, "offset"),
    ((CHAIN, 10, "leading"), {"offset": -1}, ValueError, "offset"),
    ((CHAIN, 10, "leading"), {"offset": 100}, ValueError, "offset"),
    ((CHAIN, 1000, "leading"), {"offset": 1}, ValueError, "offset")])
def test_spacings_that_cannot_be(arguments, options, error, match):
    with pytest.raises(error, match=match):
        ddim.spaced_times(*arguments, **options)
    highest = ddim.spaced_times(CHAIN, 10, "leading", offset=99)
    assert highest[0] == 1 and highest[-1] == 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_steps_without_noise_are_not_counted(kind):
    process = Discrete(f64([0.0, 0.0, 0.5, 0.9]))
    assert ddim.spaced_times(process, 2, kind).tolist() == [1.0, 0.75]
    with pytest.raises(ValueError, match="at most the chain's 2, got 3"):
        ddim.spaced_times(process, 3, kind)


@each_process
def test_trailing_times_of_any_process(process):
    for S in (1, 2, 7, 900):
        times = ddim.spaced_times(process, S)
        assert times.shape == (S,) and times.dtype == torch.float64
        assert times[0] == process.t_max and times[-1] >= process.t_min
        assert S == 1 or (times.diff() < 0).all()
        if S < 8:
            wanted = process.t_max * (1 - torch.arange(S, dtype=torch.float64) / S)
            torch.testing.assert_close(times, wanted, rtol=0, atol=6e-4)
            assert isinstance(process, Discrete) or torch.allclose(times, wanted, rtol=1e-14)


# -- a treated guess ------------------------------------------------------------------------------


class Net(nn.Module):
    """A network with a parameter, dropout and a condition."""

    def __init__(self):
        super().__init__()
        self.scale, self.drop = nn.Parameter(f64([3.0])), nn.Dropout(0.5)

    def forward(self, x, t, cond=None):
        return self.drop(self.scale * x + (0 if cond is None else cond[:, None]))


@pytest.mark.parametrize("name", ["ddim", "ancestral", "euler", "heun"])
def test_every_sampler_sees_the_treated_guess(name):
    net, guesses = Net(), []
    clipped = ddim.treated(Denoiser(net, VP(), "eps", (2,)), lambda x0: x0.clamp(-1, 1))
    assert list(clipped.parameters()) == [net.scale] and clipped.dtype == torch.float64
    options = dict(x_T=normal(4, 2), steps=6, sampler=name, cond=torch.arange(4), seed=0)
    end = sample(clipped, **options, callback=lambda i, t, x, x0: guesses.append(x0.abs().max()))
    assert net.training and net.drop.training and end.abs().max() <= 1
    assert max(guesses) == 1 and torch.equal(end, sample(clipped, **options))


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_treatment_that_does_nothing_changes_nothing(law, eta):
    times, draws = time_grid(VP(), 8), normal(7, 5, 3)
    ends = []
    for denoiser in (law.denoiser(VP()), ddim.treated(law.denoiser(VP()), lambda x0: x0)):
        source = iter(draws)
        ends.append(ddim.ddim_sampler(denoiser, normal(5, 3), times, eta=eta,
                                      noise=lambda x, s=source: next(s)))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="Denoiser"):
        ddim.treated(lambda x, t: x, lambda x0: x0)


def test_diffusers_clips_and_derives_the_noise_anew_if_told():
    theirs = scheduler("trailing")
    theirs.register_to_config(clip_sample=True)
    theirs.set_timesteps(10)
    net = Denoiser(lambda x, t: torch.tanh(x) / 2, CHAIN, "eps", (3,))
    x = normal(6, 3)
    ours = ddim.ddim_sampler(ddim.treated(net, lambda x0: x0.clamp(-1, 1)), x,
                             ddim.spaced_times(CHAIN, 10))
    for k in theirs.timesteps.tolist():
        x = theirs.step(torch.tanh(x) / 2, k, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)
    assert (ours.abs() == 1).any()


# -- the way back up ------------------------------------------------------------------------------


@each_process
def test_many_rounds_are_the_exact_inverse(process, law):
    """A round shrinks errors by 1 - exp(-h) = 0.35 or better, so 40 leave rounding alone.

    The first step of the cosine chain, which caps its beta, is longer by far and is left out.
    """
    times, x_T = time_grid(process, 24)[1:], normal(4, 3) * process.prior_std()
    end = ddim.ddim_sampler(law.denoiser(process), x_T, times)
    code = ddim.invert(law.denoiser(process), end, times, rounds=40)
    torch.testing.assert_close(code / process.prior_std(), x_T / process.prior_std(), rtol=0,
                               atol=1e-8)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_each_round_gains_one_order_on_the_round_trip(rounds):
    gauss = Gaussian(f64([0.5, -1.0]), f64([0.6, 0.2])).denoiser(EDM())
    x0, trips = normal(20, 2), []
    for n in (161, 321):
        times = time_grid(EDM(), n)
        back = ddim.ddim_sampler(gauss, ddim.invert(gauss, x0, times, rounds=rounds), times)
        trips.append((back - x0).norm(dim=1).mean().item())
    assert math.log2(trips[0] / trips[1]) == pytest.approx(rounds + 1, abs=0.1)


@each_coordinate
def test_inversion_speaks_the_networks_language(predicts, law):
    exact = law.denoiser(VP())

    def asked(x, t):
        if predicts == "edm":  # it saw c_in x
            x = x * torch.hypot(0.5 * VP().alpha(t), VP().sigma(t))[:, None]
        return from_x0_eps(*exact.x0_and_eps(x, t), t, VP(), predicts, sigma_data=0.5)

    denoiser = Denoiser(asked, VP(), predicts, (3,), dtype=torch.float64,
                        sigma_data=0.5 if predicts == "edm" else None)
    times = time_grid(VP(), 15)
    found, wanted = (ddim.invert(d, normal(4, 3), times, rounds=2) for d in (denoiser, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", range(1, 6))
@each_process
def test_inversion_is_finite(process, steps):
    ball = Gaussian(f64([0.3, 0.3]), 0.25).denoiser(process)
    times = time_grid(process, steps)
    for rounds in (1, 5):
        assert ddim.invert(ball, normal(3, 2), times, rounds=rounds).isfinite().all()
    point = point_denoiser(process, "x0", f64([0.7, -0.2]))
    assert ddim.invert(point, normal(3, 2), times).isfinite().all()


def test_inversion_from_a_time_without_signal():
    denoiser = Gaussian(f64([0.3, 0.3]), 0.25).denoiser(Flow())
    times, x_T = [1.0, 0.6, 0.3, 0.05, 0.0], normal(5, 2)
    end = ddim.ddim_sampler(denoiser, x_T, times)
    code = ddim.invert(denoiser, end, times, rounds=80)
    torch.testing.assert_close(code, x_T, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="alpha > 0"):
        ddim.invert(denoiser, end, [1.0])


def test_inversion_of_labels_half_precision_and_gradients(law):
    exact = law.denoiser(VP())
    times, x0, cond = time_grid(VP(), 6), normal(3, 3), torch.tensor([0, 1, 2])
    seen = []
    together = ddim.invert(exact, x0, times, cond=cond,
                           callback=lambda i, t, x, x0_hat: seen.append((i, t)))
    assert seen == list(enumerate(times.tolist()))[::-1]
    alone = [ddim.invert(exact, x0[j:j + 1], times, cond=cond[j:j + 1]) for j in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    half = ddim.invert(exact, x0.to(torch.bfloat16), times)
    assert half.dtype == torch.bfloat16
    assert torch.autograd.gradcheck(lambda x: ddim.invert(exact, x, times, rounds=2),
                                    normal(2, 3).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x: ddim.ddim_sampler(exact, x, times), normal(2, 3).requires_grad_())


@pytest.mark.parametrize(("arguments", "options", "error", "match"), [
    ((lambda x, t: x, normal(2, 3), [1.0, 0.5]), {}, TypeError, "Denoiser"),
    ((None, normal(2, 3).int(), [1.0, 0.5]), {}, TypeError, "x0"),
    ((None, normal(2, 3) * math.nan, [1.0, 0.5]), {}, ValueError, "x0"),
    ((None, normal(2, 3), [0.5, 1.0]), {}, ValueError, "decrease"),
    ((None, normal(2, 3), [0.0]), {}, ValueError, "sigma > 0"),
    ((None, normal(2, 3), [1.0, 0.5]), {"rounds": 0}, ValueError, "rounds"),
    ((None, normal(2, 3), [1.0, 0.5]), {"rounds": 1.5}, TypeError, "rounds")])
def test_inversions_that_cannot_be(arguments, options, error, match, law):
    denoiser, *rest = arguments
    with pytest.raises(error, match=match):
        ddim.invert(denoiser or law.denoiser(VP()), *rest, **options)


def test_a_callable_with_a_process_is_enough(law):
    class Plain:
        process = VP()

        def __call__(self, x_t, t, cond=None):
            return law.denoiser(VP())(x_t, t)

    times = time_grid(VP(), 10)
    for run in (ddim.ddim_sampler, ddim.invert):
        torch.testing.assert_close(run(Plain(), normal(3, 3), times),
                                   run(law.denoiser(VP()), normal(3, 3), times))
    with pytest.raises(TypeError, match="Denoiser"):
        ddim.ddim_sampler(lambda x, t: x, normal(3, 3), times)


# -- between two codes ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 1, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slerp(shape, dtype):
    x, y = (normal(*shape, seed=seed).to(dtype).abs() + 0.1 for seed in (0, 1))
    tight = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps * 8}
    torch.testing.assert_close(ddim.slerp(x, y, 0.0), x, **tight)
    torch.testing.assert_close(ddim.slerp(x, y, 1.0), y, **tight)
    weights = torch.linspace(0, 1, 5, dtype=dtype)
    together = ddim.slerp(x, y, weights)
    assert together.dtype == dtype and together.shape == x.shape
    for j, w in enumerate(weights.tolist()):
        torch.testing.assert_close(ddim.slerp(x, y, w)[j], together[j], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ddim.slerp(x, x, 0.3), x, **tight)
    with pytest.raises(ValueError, match="opposite"):
        ddim.slerp(x, -x, 0.3)
    with pytest.raises(ValueError, match="weight must be finite"):
        ddim.slerp(x, y, math.nan)


def test_slerp_keeps_to_the_circle():
    x = f64([[3.0, 0.0]])
    for angle in (0.1, 1.0, 3.0):
        y = 3 * f64([[math.cos(angle), math.sin(angle)]])
        there = ddim.slerp(x, y, 0.25)
        wanted = 3 * f64([[math.cos(angle / 4), math.sin(angle / 4)]])
        torch.testing.assert_close(there, wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="one shape"):
        ddim.slerp(x, x[:, :1], 0.5)


# -- the front ------------------------------------------------------------------------------------


def test_by_name(law):
    entry = SAMPLERS["ddim"]
    assert entry.fn is ddim.ddim_sampler and entry.steps == 50
    assert nfe("ddim", 7) == 7
    denoiser = law.denoiser(CHAIN)
    default = sample(denoiser, 4, sampler="ddim", seed=0)
    published = ddim.spaced_times(CHAIN, 50)
    assert torch.equal(default, sample(denoiser, 4, sampler="ddim", times=published, seed=0))
    noisy = sample(denoiser, 4, sampler=partial(ddim.ddim_sampler, eta=1.0), seed=0)
    assert noisy.isfinite().all() and not torch.equal(noisy, default)


def test_samples_have_the_laws_moments(law):
    """4.5 standard errors of 4000 draws, and 1% of the spread for 300 steps."""
    for eta in (0.0, 0.5, 1.0):
        x = sample(law.denoiser(VP()), 4000, sampler=partial(ddim.ddim_sampler, eta=eta),
                   times=time_grid(VP(), 300), seed=2).double()
        std = law.cov.diagonal().sqrt()
        assert ((x.mean(0) - law.mean).abs() < 4.5 * std / 4000**0.5 + 0.01 * std).all()
        centred = x - law.mean
        products = centred[:, :, None] * centred[:, None, :]
        allowed = 4.5 * products.std(0) / 4000**0.5 + 0.02 * std[:, None] * std
        assert ((products.mean(0) - law.cov).abs() < allowed).all()


def test_heun_and_ddim_agree_in_the_limit(law):
    times, x_T = time_grid(VP(), 400), normal(10, 3) * VP().prior_std()
    fine = heun(law.denoiser(VP()), x_T, times)
    gaps = [(ddim.ddim_sampler(law.denoiser(VP()), x_T, time_grid(VP(), n)) - fine).abs().max()
            for n in (100, 200)]
    assert 1.7 < gaps[0] / gaps[1] < 2.3


def test_treated_wants_a_function():
    with pytest.raises(TypeError, match="treat must be a function"):
        ddim.treated(GaussianMixture(f64([[0.0]]), 1.0).denoiser(VP()), 3)
