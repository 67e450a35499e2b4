"""Denoisers: shapes, dtypes, devices, ends of time, conditions, and what they refuse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffnotes.denoisers import (
    Denoiser,
    convert,
    from_x0_eps,
    guided,
    posterior,
    preconditioning,
    to_x0_eps,
)
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

NAMES = ["x0", "eps", "v", "score", "velocity", "edm"]
PROCESSES = {
    "VP": VP(), "VE": VE(), "SubVP": SubVP(), "Cosine": Cosine(), "EDM": EDM(), "Flow": Flow(),
    "linear": Discrete(linear_betas(50)), "capped": Discrete(cosine_betas(20)),
}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
each_name = pytest.mark.parametrize("name", NAMES)
READINGS = {"x0": "__call__", "eps": "eps", "v": "v", "score": "score", "velocity": "velocity"}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(process, t, shape, dtype=torch.float64):
    x0, eps = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    return x0, eps, process.perturb(x0, t, eps)


def spread(t, n):
    """n times near t, inside (0, 1)."""
    return (t + 0.01 * torch.arange(n, dtype=torch.float64)).clamp(max=0.95)


# --- Coordinates ---------------------------------------------------------------


@given(
    process=st.sampled_from(list(PROCESSES.values())),
    names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    t=st.floats(0.05, 0.9),
    shape=st.sampled_from([(3, 2), (2, 1, 8, 8), (2, 3, 4, 4), (1, 5)]),
    batched=st.booleans(),
    sigma_data=st.floats(0.1, 5.0),
)
@settings(max_examples=100, deadline=None)
def test_there_and_back(process, names, t, shape, batched, sigma_data):
    source, target = names
    t = spread(t, shape[0]) if batched else t
    x0, eps, x_t = pair(process, t, shape)
    value = from_x0_eps(x0, eps, t, process, source, sigma_data=sigma_data)
    other = convert(value, x_t, t, process, source, target, sigma_data=sigma_data)
    truth = from_x0_eps(x0, eps, t, process, target, sigma_data=sigma_data)
    torch.testing.assert_close(other, truth, rtol=1e-8, atol=1e-8)
    back = convert(other, x_t, t, process, target, source, sigma_data=sigma_data)
    torch.testing.assert_close(back, value, rtol=1e-8, atol=1e-8)
    both = to_x0_eps(value, x_t, t, process, source, sigma_data=sigma_data)
    torch.testing.assert_close(torch.stack(both), torch.stack([x0, eps]), rtol=1e-8, atol=1e-8)


@each_name
@each_process
def test_the_state_is_the_pair(process, name):
    x0, eps, x_t = pair(process, 0.4, (4, 2))
    value = randn(4, 2, seed=2)
    x0, eps = to_x0_eps(value, x_t, 0.4, process, name, sigma_data=0.5)
    torch.testing.assert_close(process.perturb(x0, 0.4, eps), x_t, rtol=1e-10, atol=1e-10)


@each_name
@each_process
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_ends_are_finite_or_refused(process, name, t):
    x_t, value = randn(3, 2), randn(3, 2, seed=1)
    denoiser = Denoiser(lambda x, t, cond: value, process, name, sigma_data=0.5)
    alpha, sigma = process.alpha(t), process.sigma(t)
    for target, reading in READINGS.items():
        for time in (t, torch.tensor(t), torch.full((3,), t)):
            try:
                assert getattr(denoiser, reading)(x_t, time).isfinite().all()
            except ValueError as error:
                assert f"{name} -> {target} has no finite value at t = {t:g}" in str(error)
                assert alpha == 0 or sigma == 0 or not process.sigma_prime(t).isfinite()


@each_process
def test_what_must_be_known_at_the_ends(process):
    x_t, value = randn(3, 2), randn(3, 2, seed=1)
    for t in (0.0, 1.0):
        for name in ("x0", "v", "edm"):
            assert convert(value, x_t, t, process, name, "x0", sigma_data=0.5).isfinite().all()
        for name in ("eps", "v", "edm"):
            assert convert(value, x_t, t, process, name, "eps", sigma_data=0.5).isfinite().all()
    if process.sigma(0.0) == 0:
        for name in ("eps", "v", "score", "edm"):
            clean = convert(value, x_t, 0.0, process, name, "x0", sigma_data=0.5)
            torch.testing.assert_close(clean, x_t)
    if process.alpha(1.0) == 0:
        for name in ("x0", "v", "edm", "velocity"):
            noise = convert(value, x_t, 1.0, process, name, "eps", sigma_data=0.5)
            torch.testing.assert_close(noise, x_t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@each_name
def test_low_precision_is_only_rounding(dtype, name):
    x0, eps, x_t = (a.to(dtype) for a in pair(Cosine(), 0.5, (64, 2)))
    wide = from_x0_eps(x0.double(), eps.double(), 0.5, Cosine(), name, sigma_data=1.0)
    narrow = from_x0_eps(x0, eps, 0.5, Cosine(), name, sigma_data=1.0)
    assert narrow.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(narrow.double(), wide, rtol=unit, atol=4 * unit)
    result = convert(narrow, x_t, torch.tensor(0.5, dtype=dtype), Cosine(), name, "v",
                     sigma_data=1.0)
    exact = convert(narrow.double(), x_t.double(), 0.5, Cosine(), name, "v", sigma_data=1.0)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=4 * unit, atol=4 * unit)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(source="noise"), ValueError, "source must be one of 'x0', 'eps', 'v'"),
        (dict(target="x"), ValueError, "target must be one of"),
        (dict(source="edm"), ValueError, "edm needs sigma_data"),
        (dict(source="edm", sigma_data=0.0), ValueError, "a positive number; got 0.0"),
        (dict(source="edm", sigma_data=math.nan), ValueError, "a positive number; got nan"),
        (dict(t=1.5), ValueError, "t must lie in"),
        (dict(t=torch.tensor([0.5, -0.1, 0.5])), ValueError, "t must lie in"),
        (dict(t=math.nan), ValueError, "t must lie in"),
        (dict(t=torch.full((2,), 0.5)), ValueError, r"\(2,\)"),
        (dict(t=torch.full((3, 1), 0.5)), ValueError, "shape"),
        (dict(t=torch.tensor(1)), TypeError, "floating"),
        (dict(value=torch.zeros(3, 3)), ValueError, r"shape \(3, 3\) for \(3, 2\)"),
        (dict(value=torch.zeros(3, 2, dtype=torch.int64)), TypeError, "value must be .*int64"),
        (dict(x_t=torch.zeros(3, 2, dtype=torch.complex64)), TypeError, "x_t must .*complex64"),
    ],
)
def test_conversions_refuse(arguments, error, message):
    good = dict(value=randn(3, 2), x_t=randn(3, 2), t=0.5, process=VP(), source="eps", target="x0")
    convert(**good)
    with pytest.raises(error, match=message):
        convert(**{**good, **arguments})


def test_an_infinite_target_is_refused():
    for name in ("score", "velocity"):
        with pytest.raises(ValueError, match=f"{name} has no finite value at t = 0 of VP"):
            from_x0_eps(randn(2, 2), randn(2, 2), 0.0, VP(), name)
    one_bad = torch.tensor([0.5, 0.0])
    with pytest.raises(ValueError, match="x0 -> eps has no finite value at t = 0"):
        convert(randn(2, 2), randn(2, 2), one_bad, VP(), "x0", "eps")


# --- Preconditioning and the posterior ------------------------------------------


@each_process
def test_preconditioning_is_regular_and_unit(process):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    c_skip, c_out, c_in = preconditioning(process, t, 0.7)
    torch.testing.assert_close(c_in**2 * (0.49 * alpha**2 + sigma**2), torch.ones(11).double())
    left = (1 - c_skip * alpha) ** 2 * 0.49 + c_skip**2 * sigma**2
    torch.testing.assert_close(left, c_out**2)
    assert c_skip.shape == c_out.shape == c_in.shape == t.shape


@each_process
@pytest.mark.parametrize("shape", [(4, 2), (4, 1, 8, 8), (4, 3, 4, 4)])
def test_posterior_shapes_and_batching(process, shape):
    x0, x_t = randn(*shape), randn(*shape, seed=1)
    s, t = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), torch.tensor([0.3, 0.9, 0.5, 1.0]).double()
    mean, var = posterior(x0, x_t, s, t, process)
    assert mean.shape == shape and var.shape == (4,)
    for i in range(4):
        m, v = posterior(x0[i:i + 1], x_t[i:i + 1], s[i].item(), t[i].item(), process)
        assert v.shape == ()
        torch.testing.assert_close(mean[i:i + 1], m, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(var[i], v, rtol=1e-10, atol=1e-14)
    mixed, _ = posterior(x0, x_t, 0.1, t, process)
    torch.testing.assert_close(mixed[:1], mean[:1])


@each_process
def test_posterior_continues_the_forward_process(process):
    """Drawing x_t and then x_s from the posterior must give the law of x_s given x0."""
    s, t, one = 0.25, 0.75, torch.ones(1, 1).double()
    on_x0, var = posterior(one, 0 * one, s, t, process)
    on_x_t, _ = posterior(0 * one, one, s, t, process)
    mean = on_x0 + on_x_t * process.alpha(t)
    torch.testing.assert_close(mean.squeeze(), process.alpha(s), rtol=1e-10, atol=1e-12)
    total = var + (on_x_t.squeeze() * process.sigma(t)) ** 2
    torch.testing.assert_close(total, process.sigma(s) ** 2, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("betas", [linear_betas(100), cosine_betas(100), [0.3]])
def test_posterior_is_the_papers(betas):
    chain = Discrete(betas)
    k = torch.arange(1, chain.n_steps + 1)
    beta, now, before = chain.betas, chain.alpha_bar[k], chain.alpha_bar[k - 1]
    x0, x_k = randn(len(k), 1), randn(len(k), 1, seed=1)
    mean, var = posterior(x0, x_k, (k - 1) / chain.n_steps.__float__(), k.double() / len(k), chain)
    torch.testing.assert_close(var, beta * (1 - before) / (1 - now), rtol=1e-6, atol=1e-12)
    paper = ((before.sqrt() * beta / (1 - now))[:, None] * x0
             + ((1 - beta).sqrt() * (1 - before) / (1 - now))[:, None] * x_k)
    torch.testing.assert_close(mean, paper, rtol=1e-6, atol=1e-6)
    assert var[0] == 0


@each_process
def test_posterior_ends(process):
    x0, x_t = randn(3, 2), randn(3, 2, seed=1)
    mean, var = posterior(x0, x_t, 0.0, 1.0, process)
    assert mean.isfinite().all() and var.isfinite()
    if process.sigma(0.0) == 0:
        torch.testing.assert_close(mean, x0, rtol=1e-12, atol=1e-12)
        assert var == 0
    if process.alpha(1.0) == 0:
        mean, var = posterior(x0, x_t, 0.5, 1.0, process)
        torch.testing.assert_close(mean, process.alpha(0.5) * x0)
        torch.testing.assert_close(var, process.sigma(0.5) ** 2)


def test_posterior_refuses():
    x = randn(2, 2)
    for s, t in [(0.5, 0.5), (0.6, 0.5), (torch.tensor([0.1, 0.6]), 0.5)]:
        with pytest.raises(ValueError, match="s must be earlier than t"):
            posterior(x, x, s, t, VP())
    with pytest.raises(ValueError, match="s must lie in"):
        posterior(x, x, -0.1, 0.5, VP())
    with pytest.raises(TypeError, match="x0 must be a floating"):
        posterior(x.long(), x, 0.1, 0.5, VP())
    with pytest.raises(ValueError, match="no finite value"):
        posterior(x, x, 0.0, 0.5, Discrete([0.0, 0.1]))
    with pytest.raises(ValueError, match=r"x0 \(2, 2\) and x_t \(1, 2\) differ in shape"):
        posterior(x, x[:1], 0.1, 0.5, VP())
    with pytest.raises(ValueError, match="one number per sample"):
        posterior(x, x, torch.full((3,), 0.1), torch.full((4,), 0.5), VP())


# --- The denoiser ---------------------------------------------------------------


class Net(nn.Module):
    """Scales its input by a parameter, and remembers what it was called with."""

    def __init__(self, channels=1):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.tensor(0.5)), []
        self.channels = channels

    def forward(self, x, t, cond=None):
        self.calls.append((x, t, cond))
        y = self.scale * x
        return y if self.channels == 1 else torch.cat([y] * self.channels, 1)


def gaussian_mean(x_t, alpha, sigma, mean, var):
    """Posterior mean of a Gaussian with this mean and variance in every coordinate."""
    return mean + alpha * var / (alpha**2 * var + sigma**2) * (x_t - alpha * mean)


@each_process
@each_name
@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 4, 4)])
def test_exact_gaussian_in_every_coordinate(process, name, shape):
    mean, var, t = 0.3, 0.75, 0.6
    alpha, sigma = process.alpha(t), process.sigma(t)
    x_t = randn(5, *shape)
    x0_hat = gaussian_mean(x_t, alpha, sigma, mean, var)
    eps_hat = (x_t - alpha * x0_hat) / sigma
    expected = {
        "x0": x0_hat, "eps": eps_hat, "v": alpha * eps_hat - sigma * x0_hat,
        "score": -(x_t - alpha * mean) / (alpha**2 * var + sigma**2),
        "velocity": process.alpha_prime(t) * x0_hat + process.sigma_prime(t) * eps_hat,
    }
    answer = from_x0_eps(x0_hat, eps_hat, t, process, name, sigma_data=0.4)
    denoiser = Denoiser(lambda x, t, cond: answer, process, name, shape, sigma_data=0.4)
    mean_of_law = torch.full(shape, mean, dtype=torch.float64)
    law = Gaussian(mean_of_law, torch.tensor(var).double()).denoiser(process)
    for target, reading in READINGS.items():
        for model in (denoiser, law):
            torch.testing.assert_close(getattr(model, reading)(x_t, t), expected[target],
                                       rtol=1e-8, atol=1e-8)
    both = denoiser.x0_and_eps(x_t, t)
    torch.testing.assert_close(torch.stack(both), torch.stack([x0_hat, eps_hat]))


@each_name
@pytest.mark.parametrize("time", ["t", "log_snr", "log_sigma", "index", lambda t: 999 * t])
def test_forms_of_t_agree(name, time):
    chain = Discrete(linear_betas(100))
    denoiser = Denoiser(Net(), chain, name, (2,), time, sigma_data=0.5)
    x_t = randn(4, 2, dtype=torch.float32)
    for reading in READINGS.values():
        truth = getattr(denoiser, reading)(x_t, 0.375)
        for t in (torch.tensor(0.375), torch.tensor(0.375).double(), torch.full((4,), 0.375),
                  torch.full((4,), 0.375).double()):
            torch.testing.assert_close(getattr(denoiser, reading)(x_t, t), truth,
                                       rtol=1e-4, atol=1e-4)
    for x, t, cond in denoiser.net.calls:
        assert t.shape == (4,) and t.dtype == torch.float32 and x.dtype == torch.float32
        assert cond is None


def test_what_the_network_is_told():
    chain = Discrete(linear_betas(40))
    told = {"t": 0.25, "index": 9.0, "log_snr": chain.log_snr(0.25).item(),
            "log_sigma": (chain.sigma(0.25) / chain.alpha(0.25)).log().item() / 4}
    for time, value in told.items():
        net = Net().double()
        Denoiser(net, chain, "eps", (2,), time)(randn(2, 2), 0.25)
        torch.testing.assert_close(net.calls[0][1], torch.full((2,), value).double())


@pytest.mark.parametrize("n_steps", [10, 250, 1000, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_indices_are_whole(n_steps, dtype):
    net, k = Net(), torch.arange(1, n_steps + 1)
    denoiser = Denoiser(net, Discrete(cosine_betas(n_steps)), "v", (1,), "index")
    denoiser(torch.zeros(n_steps, 1), k.to(dtype) / n_steps)
    assert torch.equal(net.calls[0][1], (k - 1).float())


@pytest.mark.parametrize("state", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(state, own):
    net = Net().to(own)
    denoiser = Denoiser(net, VP(), "v", (2,))
    assert denoiser.dtype == own
    x_t = randn(3, 2).to(state)
    assert denoiser(x_t, 0.5).dtype == denoiser.eps(x_t, 0.5).dtype == state
    assert denoiser.predict(x_t, 0.5).dtype == own
    for x, t, _ in net.calls:
        assert x.dtype == own and t.dtype == torch.promote_types(own, torch.float32)


def test_a_function_follows_the_state_or_its_dtype():
    seen = []
    free = Denoiser(lambda x, t, cond: seen.append(x.dtype) or x, VP(), "v")
    free(randn(2, 2, dtype=torch.float32), 0.5)
    fixed = Denoiser(free.net, VP(), "v", dtype=torch.float64, device="cpu")
    assert fixed(randn(2, 2, dtype=torch.float32), 0.5).dtype == torch.float32
    assert seen == [torch.float32, torch.float64]
    assert free.device is None and free.dtype is None
    assert fixed.device == torch.device("cpu") and list(fixed.parameters()) == []
    assert fixed.to(torch.float32).dtype == torch.float32


def test_two_argument_networks():
    denoiser = Denoiser(lambda x, t: 0 * x, Flow(), "v")
    assert denoiser(randn(2, 2), 0.5).shape == (2, 2)
    with pytest.raises(TypeError):
        denoiser(randn(2, 2), 0.5, cond=1)


@pytest.mark.parametrize(
    "net, takes",
    [
        (lambda x, t, scale=2.0: scale * x, False),
        (lambda x, t, *, cond=None: x, False),
        (lambda x, t, label: x, True),
        (lambda x, t, cond=-1: x, True),
        (lambda x, t, y=None: x, True),
        (lambda x, *rest: x, True),
    ],
)
def test_which_networks_are_given_a_condition(net, takes):
    denoiser, x = Denoiser(net, Flow(), "v"), torch.ones(2, 2)
    assert denoiser.predict(x, 0.5).shape == (2, 2)
    if takes:
        assert torch.equal(denoiser.predict(x, 0.5, 3), x)
    else:
        with pytest.raises(TypeError, match="takes no cond"):
            denoiser(x, 0.5, 3)


def test_a_default_is_left_alone():
    denoiser = Denoiser(lambda x, t, scale=2.0: scale * x, Flow(), "v")
    assert torch.equal(denoiser.predict(torch.ones(2, 2), 0.5), torch.full((2, 2), 2.0))


def test_repr():
    text = repr(Denoiser(Net(), Flow(), "v"))
    assert text.startswith("Denoiser(Net, Flow(") and text.endswith("'v')")


def test_module_life():
    denoiser = Denoiser(Net(), VP(), "v", (2,))
    assert denoiser.eval() is denoiser and not denoiser.net.training
    assert denoiser.train() is denoiser and denoiser.net.training
    assert list(denoiser.parameters()) == [denoiser.net.scale]
    assert denoiser.to(dtype=torch.float64) is denoiser
    assert denoiser.dtype == torch.float64 == denoiser.net.scale.dtype
    assert denoiser.to("meta").device.type == "meta"


@each_process
@each_name
def test_gradients(process, name):
    net = Net().double()
    denoiser = Denoiser(net, process, name, (2,), sigma_data=0.5)
    x = randn(2, 2).requires_grad_()
    for t in (0.5, torch.tensor([0.4, 0.6]).double()):
        assert torch.autograd.gradcheck(lambda x, t=t: denoiser(x, t), (x,))
        denoiser.eps(x, t).square().sum().backward()
        assert net.scale.grad is not None and net.scale.grad != 0
        assert x.grad.isfinite().all() and (x.grad != 0).all()


def test_kept_numbers_follow_the_denoiser_and_inference_mode():
    denoiser = Denoiser(Net(), VP(), "eps", (2,))
    x_t = randn(2, 2, dtype=torch.float32)
    with torch.inference_mode():
        first = denoiser(x_t, 0.5)
    denoiser(x_t, 0.5).sum().backward()
    assert denoiser.net.scale.grad is not None
    denoiser.process = Flow()
    again = Denoiser(Net(), Flow(), "eps", (2,))(x_t, 0.5)
    assert torch.equal(denoiser(x_t, 0.5), again) and not torch.allclose(first, again)
    for i in range(5000):
        denoiser._plans[("x0",), -float(i)] = None
    assert torch.equal(denoiser(x_t, 0.25), Denoiser(Net(), Flow(), "eps", (2,))(x_t, 0.25))
    assert len(denoiser._plans) < 10


def test_a_singular_reading_costs_no_evaluation():
    net = Net()
    with pytest.raises(ValueError, match="eps -> x0"):
        Denoiser(net, Flow(), "eps", (2,))(torch.zeros(2, 2), 1.0)
    assert net.calls == []


def test_predict_is_raw_and_readings_need_the_shape():
    denoiser = Denoiser(Net(channels=2), VP(), "eps", (1, 4, 4))
    x_t = torch.zeros(2, 1, 4, 4)
    assert denoiser.predict(x_t, 0.5).shape == (2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"prediction of shape \(2, 2, 4, 4\) for \(2, 1, 4, 4\)"):
        denoiser(x_t, 0.5)


def test_edm_scales_the_input():
    net, process = Net().double(), EDM()
    denoiser = Denoiser(net, process, "edm", (2,), "log_sigma", sigma_data=0.5)
    x, sigma = randn(3, 2), process.sigma(0.4)
    total = (sigma**2 + 0.25).sqrt()
    karras = 0.25 / total**2 * x + 0.5 * sigma / total * 0.5 * (x / total)
    torch.testing.assert_close(denoiser(x, 0.4), karras)
    torch.testing.assert_close(denoiser(x, torch.full((3,), 0.4).double()), karras)
    torch.testing.assert_close(net.calls[0][0], x / total)
    torch.testing.assert_close(net.calls[0][1], (sigma.log() / 4).expand(3))


@pytest.mark.parametrize("n", [0, 1])
def test_small_batches(n):
    denoiser = Denoiser(Net(), VP(), "v", (2,))
    assert denoiser(torch.zeros(n, 2), 0.5, cond=3).shape == (n, 2)
    assert denoiser(torch.zeros(n, 2), torch.full((n,), 0.5)).shape == (n, 2)


# --- Conditions and guidance -----------------------------------------------------


def test_labels():
    net = Net()
    denoiser = Denoiser(net, VP(), "v", (2,))
    x_t = torch.zeros(3, 2)
    for cond in (2, torch.tensor(2), torch.tensor([2, 2, 2]), torch.tensor([2] * 3).int()):
        denoiser(x_t, 0.5, cond)
        told = net.calls[-1][2]
        assert told.dtype == torch.int64 and torch.equal(told, torch.full((3,), 2))
    image = torch.zeros(3, 1, 4)
    denoiser(x_t, 0.5, image)
    assert net.calls[-1][2] is image
    denoiser(x_t, 0.5, 10**6)  # which labels exist is the network's business


@pytest.mark.parametrize(
    "cond, error, message",
    [
        (0.5, TypeError, "class labels must be integers"),
        (True, TypeError, "class labels must be integers, got torch.bool"),
        (torch.zeros(3), TypeError, "class labels must be integers, got torch.float32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"shape \(2,\) against"),
        ("cat", TypeError, "str"),
    ],
)
def test_labels_refused(cond, error, message):
    with pytest.raises(error, match=message):
        Denoiser(Net(), VP(), "v", (2,))(torch.zeros(3, 2), 0.5, cond)


@pytest.mark.parametrize("scale", [-1.0, 0, 0.5, 3])
def test_guidance_on_an_exact_law(scale):
    law = GaussianMixture(torch.tensor([[-1.0, 0], [1, 1], [0, 2]]).double(), 0.2)
    plain, x_t = law.denoiser(VP()), randn(5, 2)
    labels = torch.tensor([0, 1, 2, 1, 0])
    for reading in READINGS.values():
        c, u = (getattr(plain, reading)(x_t, 0.4, cond) for cond in (labels, None))
        strong = getattr(guided(plain, scale), reading)(x_t, 0.4, labels)
        torch.testing.assert_close(strong, u + scale * (c - u))


def test_guidance_calls():
    net = Net()
    plain = Denoiser(net, VP(), "v", (2,), "log_snr")
    assert guided(plain, 1.0) is plain
    strong = guided(plain, 2.0)
    x_t = torch.ones(3, 2)
    strong(x_t, 0.5, torch.tensor([4, 5, 6]))
    (x, t, cond), = net.calls
    assert x.shape == (6, 2) and t.shape == (6,) and cond.tolist() == [4, 5, 6, -1, -1, -1]
    guided(plain, 2.0, null=None)(x_t, 0.5, 4)
    assert len(net.calls) == 3 and net.calls[2][2] is None
    assert list(strong.parameters()) == [net.scale] and strong.shape == (2,)
    assert strong.time == "log_snr" and strong.predicts == "v"


def test_guidance_refuses():
    plain = Denoiser(Net(), VP(), "v", (2,))
    with pytest.raises(ValueError, match="guidance needs a cond"):
        guided(plain, 2.0)(torch.zeros(3, 2), 0.5)
    with pytest.raises(ValueError, match="finite"):
        guided(plain, math.nan)
    with pytest.raises(TypeError):
        guided(plain, "2")
    with pytest.raises(TypeError, match="null must be an int or None, got 1.5"):
        guided(plain, 2.0, null=1.5)


# --- Devices and refusals -------------------------------------------------------


@pytest.mark.parametrize("name", ["x0", "score", "edm"])
@pytest.mark.parametrize("time", ["t", "log_snr", "log_sigma", "index"])
def test_no_call_looks_at_a_device_tensor(name, time):
    """On the meta device tensors have no values: looking at one is an error."""
    process = Discrete(cosine_betas(10)) if time == "index" else VP()
    denoiser = Denoiser(Net().to("meta"), process, name, (2,), time, sigma_data=0.5)
    x_t = torch.empty(4, 2, device="meta")
    one_for_all = [] if time == "index" else [torch.empty((), device="meta")]
    for t in (torch.empty(4, device="meta"), *one_for_all, 0.5, torch.full((4,), 0.5)):
        for reading in READINGS.values():
            assert getattr(denoiser, reading)(x_t, t).device.type == "meta"
        for cond in (1, torch.empty(4, dtype=torch.int64, device="meta")):
            assert guided(denoiser, 2.0)(x_t, t, cond).device.type == "meta"


@pytest.mark.parametrize("predicts", NAMES[:5])
def test_posterior_and_convert_trust_the_device(predicts):
    x, t = torch.empty(4, 2, device="meta"), torch.empty(4, device="meta")
    assert convert(x, x, t, Cosine(), "v", predicts).shape == (4, 2)
    mean, var = posterior(x, x, t, t, VP())
    assert mean.shape == (4, 2) and var.shape == (4,)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(predicts="noise"), ValueError, "predicts must be one of 'x0', 'eps'"),
        (dict(predicts="edm"), ValueError, "edm needs sigma_data"),
        (dict(predicts="edm", sigma_data=-1.0), ValueError, "got -1.0"),
        (dict(time="index"), ValueError, "needs a Discrete process"),
        (dict(time="sigma"), ValueError, "time must be one of 't', 'log_snr'"),
        (dict(net=3), TypeError, "callable"),
        (dict(process=VP), TypeError, r"process must be an instance, VP\(\), got"),
        (dict(process="vp"), TypeError, "process must be an instance"),
        (dict(process=None), TypeError, "process must be an instance"),
        (dict(sigma_data=-3), ValueError, "a positive number; got -3"),
        (dict(shape=2), TypeError, r"shape must be a tuple, \(2,\), got 2"),
        (dict(shape=(2, 0)), ValueError, "shape must be at least 1"),
        (dict(shape=(2.0,)), TypeError, "shape must be an int"),
    ],
)
def test_construction_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Denoiser(**{"net": Net(), "process": VP(), **arguments})


@pytest.mark.parametrize(
    "x_t, t, error, message",
    [
        (torch.zeros(3, 3), 0.5, ValueError, r"\(B, 2\), got \(3, 3\)"),
        (torch.zeros(2), 0.5, ValueError, "x_t must have shape"),
        (torch.zeros(3, 2, dtype=torch.int64), 0.5, TypeError, "int64"),
        (torch.zeros(3, 2, dtype=torch.complex64), 0.5, TypeError, "complex64"),
        ([[0.0, 0.0]], 0.5, TypeError, "list"),
        (torch.zeros(3, 2), 1.01, ValueError, "t must lie in"),
        (torch.zeros(3, 2), torch.zeros(4), ValueError, r"\(4,\)"),
        (torch.zeros(3, 2), torch.zeros(1), ValueError, r"\(1,\)"),
        (torch.zeros(3, 2, device="meta"), 0.5, ValueError, "x_t is on meta, the network on cpu"),
    ],
)
def test_calls_refuse(x_t, t, error, message):
    with pytest.raises(error, match=message):
        Denoiser(Net(), VP(), "v", (2,))(x_t, t)


@pytest.mark.parametrize(
    "process, time, t",
    [
        (VP(), "log_snr", 0.0), (Flow(), "log_sigma", 1.0), (Cosine(), "log_snr", 1.0),
        (Discrete(cosine_betas(10)), "index", 0.0), (Discrete(cosine_betas(10)), "index", 0.05),
        (VP(), lambda t: t.log(), 0.0),
    ],
)
def test_a_time_the_network_cannot_be_told(process, time, t):
    with pytest.raises(ValueError, match="has no finite value at t"):
        Denoiser(Net(), process, "v", (2,), time)(torch.zeros(2, 2), t)
