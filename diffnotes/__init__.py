"""Diffusion models, each equation derived, implemented and checked: ``import diffnotes as dn``.

The names below are what most programs need, in the order of the book; everything else is at
``diffnotes.<module>``.
"""

__version__ = "0.1.0"

from .checks import check, check_mc, check_symbolic
from .mixtures import Empirical, Gaussian, GaussianMixture
from .processes import (
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
from .denoisers import Denoiser, guided, posterior
from .stepping import register, time_grid
from .ddpm import ancestral, variational_bound
from .ncsn import annealed_langevin, langevin, noise_levels
from .sde import euler_maruyama, predictor_corrector, probability_flow, reverse_diffusion
from .samplers import as_process, sample
from .likelihood import log_likelihood
from .data import Images, digits
from .sources import open_data
from .networks import MLP, DiT, UNet
from .training import loss
from .pretrained import from_pretrained, load, load_pretrained, push_to_hub, save
from .runs import posthoc, train
from .interop import adapt, audit, clipped, from_diffusers, to_diffusers
from .report import evaluate
from .ddim import ddim_sampler, invert, spaced_times
from .exponential import multistep
from .edm import edm_heun, edm_sde, karras_times
from .adaptive import adaptive_flow
from .calibration import calibrated, calibrated_times
from .brownian import BrownianPath, adaptive_sde

__all__ = [
    "check", "check_mc", "check_symbolic",
    "Gaussian", "GaussianMixture", "Empirical",
    "VP", "VE", "SubVP", "Cosine", "EDM", "Flow", "Discrete", "linear_betas", "cosine_betas",
    "Denoiser", "posterior", "guided",
    "register", "time_grid",
    "ancestral", "variational_bound",
    "annealed_langevin", "langevin", "noise_levels",
    "euler_maruyama", "predictor_corrector", "probability_flow", "reverse_diffusion",
    "as_process", "sample",
    "log_likelihood",
    "Images", "digits", "open_data",
    "MLP", "UNet", "DiT",
    "loss",
    "save", "load", "load_pretrained", "push_to_hub", "from_pretrained",
    "train", "posthoc",
    "adapt", "audit", "clipped", "from_diffusers", "to_diffusers",
    "evaluate",
    "ddim_sampler", "invert", "spaced_times",
    "multistep",
    "edm_heun", "edm_sde", "karras_times",
    "adaptive_flow",
    "calibrated", "calibrated_times",
    "BrownianPath", "adaptive_sde",
]
