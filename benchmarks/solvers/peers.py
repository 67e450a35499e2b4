"""The peers' samplers that are compared, as functions of (model, top, bottom, y, nfe) -> x0.

`model(y, s)` is the exact denoiser in the common coordinates y = x / alpha, s = sigma / alpha, and
counts its calls; `top` and `bottom` are the ends of a grid. A peer with other coordinates gets its
inputs and outputs converted. What a peer leaves undone stays undone, except that samplers which
stop at `bottom` also appear with one evaluation kept for a last denoising.
"""

import importlib
import math
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import azula.denoise
import azula.noise
import azula.sample
import diffusers
import torch
from diffusers import SASolverScheduler  # noqa: F401  (before the stand-ins below)
from torch import nn

# What the packages import beside their samplers, and no sampler calls.
for unused in ("torchvision", "torchvision.transforms", "accelerate"):
    try:
        importlib.import_module(unused)
    except ImportError:
        sys.modules[unused] = MagicMock()


def bare(package: str, module: str) -> ModuleType:
    """A module of a package without what the package itself imports."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations)
    return importlib.import_module(f"{package}.{module}")


kd = bare("k_diffusion", "sampling")
small = bare("smalldiffusion", "diffusion")

diffusers.utils.logging.set_verbosity_error()
DOUBLE = torch.float64


def exponential(u, top, bottom):
    return top * (bottom / top) ** u


def karras(u, top, bottom):
    return (top ** (1 / 7) + u * (bottom ** (1 / 7) - top ** (1 / 7))) ** 7


def of_time(u, top, bottom):
    """Equal steps in t under VP with beta from 0.1 to 20, from 1 to 0.001."""
    t = 1 - 0.999 * u
    return torch.expm1(0.1 * t + 9.95 * t**2).sqrt()


#: Levels s from top to bottom as u goes from 0 to 1.
GRIDS = {"karras": karras, "exponential": exponential, "time": of_time}


def levels(n: int, top: float, bottom: float, grid: str) -> torch.Tensor:
    return GRIDS[grid](torch.linspace(0, 1, n, dtype=DOUBLE), top, bottom)


def grids(process: str) -> list[str]:
    return list(GRIDS)[: 3 if process == "vp-cont" else 2]


# --- k-diffusion ----------------------------------------------------------------


class NormalsLike:
    """Plain normals, in the place of k-diffusion's Brownian tree, which is slow."""

    shape = (1, 1)

    def __call__(self, sigma, sigma_next):
        return torch.randn(self.shape, dtype=DOUBLE)


def k_diffusion(sampler, per_step, grid, model, top, bottom, y, nfe, **options):
    if "noise_sampler" in options:
        options["noise_sampler"].shape = y.shape
    steps = (nfe + per_step - 1) // per_step
    sigmas = kd.append_zero(levels(steps, top, bottom, grid))
    if per_step == 2 and sampler.startswith("heun") and nfe < 3:
        return None
    run = getattr(kd, f"sample_{sampler}")
    return run(lambda x, s: model(x, s[0].item()), y, sigmas, disable=True, **options)


def dpm_fast(model, top, bottom, y, nfe):
    run = partial(kd.sample_dpm_fast, disable=True)
    return model(run(lambda x, s: model(x, s[0].item()), y, bottom, top, nfe - 1), bottom)


def k_diffusion_settings(process):
    plain = [("euler", 1, {}), ("heun", 2, {}), ("dpm_2", 2, {}), ("dpmpp_2m", 1, {}),
             ("dpmpp_2s_ancestral", 2, {"eta": 0.0})]
    plain += [("lms", 1, {"order": order}) for order in (2, 3, 4)]
    for name, per_step, options in plain:
        for grid in grids(process):
            label = " ".join(["k-diffusion", name, *map(str, options.values()), grid])
            yield label, partial(k_diffusion, name, per_step, grid, **options)
    yield "k-diffusion dpm_fast", dpm_fast


# --- azula -----------------------------------------------------------------------


class Levels(azula.noise.Schedule):
    """The grids above as a schedule with alpha = 1 and steps of equal length in time."""

    def __init__(self, top, bottom, grid):
        self.level = lambda t: GRIDS[grid](1 - t, top, bottom)

    def __call__(self, t):
        return torch.ones_like(t), self.level(t)


class AzulaDenoiser(azula.denoise.Denoiser):
    def __init__(self, model, schedule):
        super().__init__()
        self.model, self.schedule = model, schedule

    def forward(self, x_t, t, **_):
        return azula.denoise.DiracPosterior(self.model(x_t, self.schedule(t)[1].item()))


def azula_run(name, per_step, grid, denoised, model, top, bottom, y, nfe, **options):
    steps = (nfe - denoised) // per_step
    denoiser = AzulaDenoiser(model, Levels(top, bottom, grid))
    run = getattr(azula.sample, name)(denoiser, steps=steps, silent=True, dtype=DOUBLE, **options)
    return model(run(y), bottom) if denoised else run(y)


def azula_settings(process):
    for name in ("zABSampler", "vABSampler", "zEABSampler", "xEABSampler"):
        for order in (2, 3):
            for grid in grids(process):
                for denoised in (False, True) if "EAB" in name else (True,):
                    label = f"azula {name.removesuffix('Sampler')}{order} {grid}"
                    yield label + ", denoised" * denoised, partial(
                        azula_run, name, 1, grid, denoised, order=order)


# --- smalldiffusion ---------------------------------------------------------------


class SmallModel(nn.Module):
    def __init__(self, model, shape):
        super().__init__()
        self.model, self.input_dims = model, tuple(shape)

    def rand_input(self, n):
        return torch.randn(n, *self.input_dims, dtype=DOUBLE)

    def predict_eps_cfg(self, x, sigma, cond, scale):
        return (x - self.model(x, sigma.item())) / sigma


def smalldiffusion(gam, grid, denoised, model, top, bottom, y, nfe, mu=0.0):
    if grid == "chain":
        table = small.sigmas_from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=DOUBLE))
    else:
        table = levels(1000, bottom, top, grid)
    sigmas = small.Schedule(table).sample_sigmas(nfe - denoised)
    *_, y = small.samples(SmallModel(model, y.shape[1:]), sigmas, gam=gam, mu=mu, xt=y,
                          accelerator=SimpleNamespace(device="cpu"))
    return model(y, sigmas[-1].item()) if denoised else y


def smalldiffusion_settings(process):
    for gam in (1.0, 1.4, 1.6, 2.0):
        for grid in ("chain", "karras") if process == "vp-disc" else ("exponential", "karras"):
            for denoised in (False, True):
                label = f"smalldiffusion gamma {gam} {grid}" + ", denoised" * denoised
                yield label, partial(smalldiffusion, gam, grid, denoised)


# --- diffusers ----------------------------------------------------------------------


def levels_of(scheduler):
    """s at each of the scheduler's times: its own table, or from its chain."""
    if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) > len(scheduler.timesteps):
        return scheduler.sigmas.double().tolist()
    bar = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return ((1 - bar) / bar).sqrt().tolist()


def diffusers_run(scheduler_name, per_step, options, model, top, bottom, y, nfe):
    """On the chain of a thousand betas, for a network that predicts the noise."""
    steps = (nfe + per_step - 1) // per_step
    chain = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler = getattr(diffusers, scheduler_name)(**chain, **options)
    scheduler.set_timesteps(steps)
    exploding = float(scheduler.init_noise_sigma) != 1
    x = y if exploding else y / math.sqrt(1 + top**2)
    for t, s in zip(scheduler.timesteps, levels_of(scheduler), strict=False):
        told = scheduler.scale_model_input(x, t)
        y = told * math.sqrt(1 + s**2)
        eps = (y - model(y, s)) / s
        x = scheduler.step(eps, t, x).prev_sample
    return x


def edm_run(scheduler_name, options, model, top, bottom, y, nfe):
    """diffusers' schedulers in the coordinates of Karras et al."""
    scheduler = getattr(diffusers, scheduler_name)(
        sigma_min=bottom, sigma_max=top, sigma_data=0.5, **options)
    scheduler.set_timesteps(nfe)
    for t, s in zip(scheduler.timesteps, scheduler.sigmas.double().tolist(), strict=False):
        scheduler.scale_model_input(y, t)
        rest = math.sqrt(s**2 + 0.25)
        output = (model(y, s) - 0.25 / rest**2 * y) / (s * 0.5 / rest)
        y = scheduler.step(output, t, y).prev_sample
    return y


SPACED = {
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}


def diffusers_settings():
    for spacing in ("leading", "linspace", "trailing"):
        options = {"timestep_spacing": spacing, "clip_sample": False}
        yield f"diffusers DDIM {spacing}", partial(diffusers_run, "DDIMScheduler", 1, options)
    many = {"DPMSolverMultistep": ("DPM++{}M", (2, 3)), "UniPCMultistep": ("UniPC-{}", (2, 3)),
            "DEISMultistep": ("DEIS-{}", (2, 3))}
    for name, (label, orders) in many.items():
        for order in orders:
            for grid, spaced in SPACED.items():
                options = {"solver_order": order, **spaced}
                yield f"diffusers {label.format(order)} {grid}", partial(
                    diffusers_run, f"{name}Scheduler", 1, options)
    for name, per_step in (("Heun", 2), ("LMS", 1)):
        for grid in ("linspace", "karras", "exponential"):
            kind = f"{name}DiscreteScheduler"
            yield f"diffusers {name} {grid}", partial(diffusers_run, kind, per_step, SPACED[grid])


def edm_settings():
    for order in (2, 3):
        for grid in grids("ve"):
            options = {"solver_order": order, "sigma_schedule": grid}
            yield f"diffusers EDM DPM++{order}M {grid}", partial(
                edm_run, "EDMDPMSolverMultistepScheduler", options)


def deterministic(process: str) -> dict:
    """Label -> run of every deterministic setting for a process."""
    families = (k_diffusion_settings, azula_settings, smalldiffusion_settings)
    found = {label: run for family in families for label, run in family(process)}
    if process == "vp-disc":
        return found | dict(diffusers_settings())
    return found | dict(edm_settings()) if process.startswith("ve") else found


# --- With noise ------------------------------------------------------------------------


def stochastic(process: str) -> dict:
    """Label -> run of every stochastic setting; they draw from torch's default generator."""
    found = {}
    for name, per_step in (("euler_ancestral", 1), ("dpmpp_2s_ancestral", 2), ("dpmpp_sde", 2),
                           ("dpmpp_2m_sde", 1), ("dpmpp_3m_sde", 1)):
        options = {} if "ancestral" in name else {"noise_sampler": NormalsLike()}
        for grid in grids("any"):
            found[f"k-diffusion {name} {grid}"] = partial(
                k_diffusion, name, per_step, grid, **options)
    for name in ("DDPMSampler", "ItoSampler"):
        for grid in grids("any"):
            found[f"azula {name.removesuffix('Sampler')} {grid}, denoised"] = partial(
                azula_run, name, 1, grid, True)
    found["smalldiffusion DDPM, denoised"] = partial(
        smalldiffusion, 1.0, "exponential", True, mu=0.5)
    if process == "vp-disc":
        for grid, spaced in SPACED.items():
            options = {"algorithm_type": "sde-dpmsolver++", **spaced}
            found[f"diffusers SDE-DPM++2M {grid}"] = partial(
                diffusers_run, "DPMSolverMultistepScheduler", 1, options)
            found[f"diffusers SA-Solver {grid}"] = partial(
                diffusers_run, "SASolverScheduler", 1, spaced)
        options = {"timestep_spacing": "trailing", "clip_sample": False}
        found["diffusers DDPM trailing"] = partial(diffusers_run, "DDPMScheduler", 1, options)
    return found
