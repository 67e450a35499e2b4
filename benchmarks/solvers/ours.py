"""Every sampler that diffnotes knows by name, on the problems: `SAMPLERS` is asked, not a list."""

import torch

from diffnotes.denoisers import Denoiser
from diffnotes.processes import EDM, VE, VP, Discrete, linear_betas
from diffnotes.samplers import nfe, sample
from diffnotes.stepping import SAMPLERS

PROCESSES = {"vp-disc": Discrete(linear_betas()), "vp-cont": VP(),
             "ve-edm": EDM(), "ve-song": VE()}
DEFAULT = "diffnotes default"


def denoiser_of(model, process_name, dim):
    """The exact denoiser as one of diffnotes: model(y, s) in x / alpha and sigma / alpha."""
    process = PROCESSES[process_name]

    def net(x, t):
        alpha, sigma = process.alpha(t[0]).item(), process.sigma(t[0]).item()
        return model(x / alpha, sigma / alpha)

    return Denoiser(net, process, "x0", (dim,), dtype=torch.float64)


def steps_within(name, budget):
    """The most steps that make at most so many evaluations, or None."""
    options = {} if name == DEFAULT else {"sampler": name}
    counts = [steps for steps in range(1, budget + 1) if nfe(**options, steps=steps) <= budget]
    return max(counts, default=None)


def run(name, process_name, model, y, budget, seed=0):
    """x0 from y at t = 1, with at most `budget` evaluations."""
    denoiser, process = denoiser_of(model, process_name, y.shape[1]), PROCESSES[process_name]
    steps = steps_within(name, budget)
    if steps is None:
        return None
    options = {} if name == DEFAULT else {"sampler": name}
    x_T = process.alpha(1.0).item() * y
    return sample(denoiser, x_T=x_T, steps=steps, seed=seed, **options)


def names(noisy):
    """The samplers that draw noise, or those that do not; adaptive ones count their own steps."""
    found = []
    for name, entry in SAMPLERS.items():
        draws = []

        def noise(x, draws=draws):
            draws.append(1)
            return torch.randn_like(x)

        denoiser = Denoiser(lambda x, t: x / 2, VP(), "x0", (2,), dtype=torch.float64)
        try:
            nfe(name, 5)
        except ValueError:
            continue
        entry.fn(denoiser, torch.randn(4, 2).double(), [1.0, 0.7, 0.4, 0.2, 0.05], noise=noise)
        if bool(draws) == noisy:
            found.append(name)
    return found
