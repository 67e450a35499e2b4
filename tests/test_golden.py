"""Our samplers beside k-diffusion's and azula's, whose results `make bench` stored."""

import json
import math
from functools import partial

import pytest
import torch
from conftest import ROOT

from diffnotes.ddim import ddim_sampler
from diffnotes.ddpm import ancestral
from diffnotes.edm import edm_heun
from diffnotes.exponential import dpmpp_2m, dpmpp_2m_sde, multistep
from diffnotes.mixtures import GaussianMixture
from diffnotes.processes import VE
from diffnotes.samplers import euler

STORED = json.loads((ROOT / "tests" / "golden_solvers.json").read_text(encoding="utf8"))
# Our eta is a factor of the noise, k-diffusion's one of its variance in the exponent.
HALF = math.sqrt(0.5)
K_DIFFUSION = {
    "euler": euler,
    "heun": edm_heun,
    "dpmpp_2m": dpmpp_2m,
    "euler_ancestral, eta 1.0": partial(ancestral, variance="small"),
    "euler_ancestral, eta 0.5": partial(ddim_sampler, eta=0.5),
    "dpmpp_2m_sde midpoint, eta 1.0": dpmpp_2m_sde,
    "dpmpp_2m_sde midpoint, eta 0.5": partial(dpmpp_2m_sde, eta=HALF),
    "dpmpp_2m_sde heun, eta 1.0": partial(multistep, order=2, eta=1.0),
    "dpmpp_2m_sde heun, eta 0.5": partial(multistep, order=2, eta=HALF),
}


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def problem():
    """The exact denoiser, the starts and the times of the stored runs."""
    law, process = STORED["law"], VE(1e-4, 1e3)
    weights = torch.tensor(law["weights"]).double()  # the stored runs had them rounded to float32
    denoiser = GaussianMixture(f64(law["means"]), law["std"] ** 2, weights).denoiser(process)
    return denoiser, f64(STORED["starts"]), process.t_of_log_snr(-2 * f64(STORED["sigmas"]).log())


@pytest.mark.parametrize("name", K_DIFFUSION)
def test_k_diffusion(name):
    draws = iter(f64(STORED["draws"]))
    found = K_DIFFUSION[name](*problem(), noise=lambda x: next(draws))
    expected = f64(STORED["ends"][f"k-diffusion {name}"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name, coordinate", [("xEAB", "x0"), ("zEAB", "eps")])
def test_azula(name, coordinate, order):
    """azula returns the last state, not the guess of the data from it."""
    states = []
    multistep(*problem(), order=order, coordinate=coordinate,
              callback=lambda i, t, x_t, x0_hat: states.append(x_t.clone()))
    expected = f64(STORED["ends"][f"azula {name}{order}"])
    torch.testing.assert_close(states[-1], expected, rtol=0, atol=1e-12)
