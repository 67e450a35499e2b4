"""The calibrated solver: finite and exact where it must be, on its table and off it."""

import importlib
import json
import math
import sys
from importlib import resources

import pytest
import torch
from conftest import ROOT

from diffnotes.calibration import _entry, calibrated, calibrated_times, interpolation_weights
from diffnotes.denoisers import Denoiser, from_x0_eps
from diffnotes.mixtures import GaussianMixture
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP, linear_betas
from diffnotes.samplers import nfe, sample
from diffnotes.stepping import SAMPLERS

PROCESSES = {"VP": VP(), "SubVP": SubVP(), "VE": VE(), "EDM": EDM(), "Cosine": Cosine(),
             "Flow": Flow(), "Discrete": Discrete(linear_betas())}
TABLE = json.loads(resources.files("diffnotes").joinpath("assets/solver.json").read_text())
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def one_point(process, predicts, point):
    """A network that knows that all data are at one point."""
    def net(x, t, cond=None):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        if predicts == "edm":
            x = x * torch.hypot(alpha * sigma_data, sigma)
        eps = (x - alpha * point) / sigma
        return from_x0_eps(point.expand_as(x), eps, t, process, predicts, sigma_data=sigma_data)
    sigma_data = 0.5 if predicts == "edm" else None
    return Denoiser(net, process, predicts, shape=(3,), sigma_data=sigma_data)


@every_process
@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "score", "velocity", "edm"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 20, 21, 40])
def test_exact_on_one_point(process, predicts, steps):
    point = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    x_T = process.sigma(torch.tensor(process.t_max, dtype=torch.float64)) * torch.randn(
        7, 3, dtype=torch.float64)
    found = sample(one_point(process, predicts, point), x_T=x_T, sampler="calibrated", steps=steps)
    # eps and score tell x0 from numbers 160 times as large, at t_max of Flow and Cosine 1e4 or so.
    torch.testing.assert_close(found, point.expand(7, 3), rtol=0, atol=1e-7)


def test_table_is_whole():
    levels, corrections = TABLE["levels"], TABLE["corrections"]
    assert len(levels) == len(corrections) == len(TABLE["c"]) == 20
    for steps, (row, extra) in enumerate(zip(levels, corrections, strict=True), start=1):
        assert len(row) == steps - 1 and len(extra) == steps
        assert all(a > b > 0 for a, b in zip(row, row[1:], strict=False))
        assert not row or row[0] < 50
        for i, numbers in enumerate(extra):
            assert len(numbers) == 3 and not any(numbers[i:])


@every_process
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 21, 100, 300])
def test_times(process, steps):
    times = calibrated_times(process, steps)
    assert len(times) == steps and times.dtype == torch.float64
    assert (times.diff() < 0).all() and times[0] == process.t_max and times[-1] >= process.t_min
    if isinstance(process, Discrete):
        points = times * process.n_steps
        torch.testing.assert_close(points, points.round(), rtol=0, atol=1e-9)


def test_a_low_process_keeps_inside_its_range():
    low = VP(beta_max=2.0)
    times = calibrated_times(low, 10)
    assert (times.diff() < 0).all() and times[0] == low.t_max and times[-1] >= low.t_min


def test_scale():
    a = -EDM(0.002, 80.0).log_snr(calibrated_times(EDM(0.002, 80.0), 8)) / 2
    b = -EDM(0.02, 800.0).log_snr(calibrated_times(EDM(0.02, 800.0), 8, scale=10.0)) / 2
    torch.testing.assert_close(b, a + math.log(10), rtol=0, atol=1e-9)


def test_one_flow_from_every_height():
    law = GaussianMixture(torch.tensor([[-1.0, 0.5], [0.8, -0.3]], dtype=torch.float64),
                          torch.full((2, 2), 0.2 ** 2, dtype=torch.float64))
    g = torch.Generator().manual_seed(0)
    z = torch.randn(500, 2, dtype=torch.float64, generator=g)
    errors = []
    for process in PROCESSES.values():
        x_T = z * process.sigma(torch.tensor(process.t_max, dtype=torch.float64))
        ends = [sample(law.denoiser(process), x_T=x_T, sampler="calibrated", steps=n)
                for n in (10, 400)]
        errors.append((ends[0] - ends[1]).norm(dim=1).mean().item())
    # The chain, last, has its levels moved to its points, a tenth apart at the low end.
    assert max(errors[:-1]) < 1.2 * min(errors[:-1]) < 0.01 and errors[-1] < 0.01


def test_own_times_go_without_corrections():
    process = VP()
    law = GaussianMixture(torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
                          torch.full((2, 1), 0.2 ** 2, dtype=torch.float64))
    x_T = 150 * torch.randn(300, 1, dtype=torch.float64) * process.alpha(torch.tensor(1.0))
    times = calibrated_times(process, 8)
    nudged = torch.cat([times[:-1], times[-1:] * (1 + 1e-9)])
    on, off = (calibrated(law.denoiser(process), x_T, t) for t in (times, nudged))
    assert (on - off).abs().max() > 1e-4
    r = torch.exp(-process.log_snr(nudged) / 2)
    rows = interpolation_weights(r, TABLE["c"][7])
    assert rows.shape == (8, 4)


def test_own_times_between_the_points_of_a_chain():
    process = Discrete(linear_betas(30))
    law = GaussianMixture(torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
                          torch.full((2, 1), 0.2 ** 2, dtype=torch.float64))
    times = torch.linspace(1, 0.05, 50, dtype=torch.float64)
    found = calibrated(law.denoiser(process), torch.randn(3, 1, dtype=torch.float64), times)
    assert found.isfinite().all()


def test_the_program_and_the_library_have_one_curve():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        calibrate_solver = importlib.import_module("calibrate_solver")
    finally:
        sys.path.pop(0)
    for steps in (21, 40, 100):
        torch.set_default_dtype(torch.float64)
        try:
            made = calibrate_solver.on_curve(torch.tensor(TABLE["curve"]), steps)
        finally:
            torch.set_default_dtype(torch.float32)
        levels, c, _ = _entry(steps)
        torch.testing.assert_close(made["log_levels"], levels.log())
        torch.testing.assert_close(made["log_c"].exp().item(), c)


def test_order_falls_where_weights_are_wild():
    r = torch.tensor([50.0, 49.9, 49.8, 1.0, 0.5], dtype=torch.float64)
    rows = interpolation_weights(r, 1.0)
    assert rows.abs().sum(1).max() <= 16
    torch.testing.assert_close(rows.sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(rows[2], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))


def test_weights_are_differentiable():
    r = torch.tensor([40.0, 5.0, 2.0, 1.0, 0.2], dtype=torch.float64, requires_grad=True)
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(interpolation_weights, (r, c))


@pytest.mark.parametrize("r, c, order", [
    ([1.0, 2.0], 1.0, 4), ([2.0, 0.0], 1.0, 4), ([2.0, 1.0], 0.0, 4), ([2.0, 1.0], 1.0, 0),
    ([math.inf, 1.0, 0.5], 1.0, 4), ([2.0, 1.0], math.nan, 4),
], ids=["rising", "zero", "no scale", "no order", "infinite", "no number"])
def test_weights_refuse(r, c, order):
    with pytest.raises(ValueError):
        interpolation_weights(torch.tensor(r, dtype=torch.float64), c, order)


def test_times_refuse():
    with pytest.raises(ValueError, match="scale"):
        calibrated_times(VP(), 5, scale=-1.0)
    with pytest.raises(ValueError, match="steps"):
        calibrated_times(VP(), 0)
    with pytest.raises(TypeError):
        calibrated_times(VP(), 5.0)
    with pytest.raises(ValueError, match="chain"):
        calibrated_times(Discrete(linear_betas(30)), 40)


def test_it_is_the_default():
    assert nfe() == 20 and nfe(steps=7) == 7 and "calibrated" in SAMPLERS
    law = GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.full((2, 1), 0.04))
    x_T = 80 * torch.randn(5, 1)
    named = sample(law.denoiser(EDM()), x_T=x_T, sampler="calibrated", steps=9)
    assert torch.equal(sample(law.denoiser(EDM()), x_T=x_T, steps=9), named)


def test_a_gradient_reaches_the_start():
    law = GaussianMixture(torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
                          torch.full((2, 1), 0.04, dtype=torch.float64))
    x_T = (80 * torch.randn(3, 1, dtype=torch.float64)).requires_grad_()
    denoiser = law.denoiser(EDM())
    assert torch.autograd.gradcheck(
        lambda x: calibrated(denoiser, x, calibrated_times(EDM(), 6)), (x_T,), atol=1e-5)
