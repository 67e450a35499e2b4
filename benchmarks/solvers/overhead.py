"""Microseconds a step round a network of one multiplication: by hand, diffnotes and its peers.

One thread, the processor's seconds, 50 steps. Everything that a call does is counted, its
coefficients too, but for the loops by hand, which have theirs from before. The contestants run in
turn, and a figure is the median over the rounds.
"""

import time
from functools import partial
from statistics import median

import azula.sample
import diffusers
import peers
import torch
from flow_matching.solver import ODESolver
from torch import nn

from diffnotes.denoisers import Denoiser
from diffnotes.processes import VP, Discrete, linear_betas
from diffnotes.samplers import sample
from diffnotes.stepping import SAMPLERS, step_coefficients, time_grid

STEPS = 50
CHAIN = Discrete(linear_betas())


class OneMultiply(nn.Module):
    """Answers with half of what it is given."""

    def forward(self, x, t, cond=None):
        return x * 0.5


def hand_made(order):
    """A loop by hand for a network that predicts eps, in place, with its factors from before."""
    process, times = VP(), time_grid(VP(), STEPS)
    alpha, sigma = process.alpha(times), process.sigma(times)
    a, b, h = step_coefficients(process, times)
    more = torch.zeros_like(b)
    if order == 2:
        more[1:] = b[1:] * h[1:] / h[:-1] / 2
    columns = [v.tolist() for v in (a, b + more, -more, 1 / alpha, -sigma / alpha)]

    @torch.no_grad()
    def run(net, x_T):
        x, old = x_T.clone(), None
        rows = times.float()[:-1, None].repeat(1, len(x))
        for t, a, b, c, p, q in zip(rows, *columns, strict=False):
            if order == 1:
                eps = net(x, t)
                x.mul_(a + b * p).add_(eps, alpha=b * q)
                continue
            x0_hat = net(x, t).mul_(q).add_(x, alpha=p)
            x.mul_(a).add_(x0_hat, alpha=b)
            if old is not None:
                x.add_(old, alpha=c)
            old = x0_hat
        eps = net(x, times[-1].float().expand(len(x)))
        return x.mul_(columns[3][-1]).add_(eps, alpha=columns[4][-1])
    return run


def diffusers_loop(name, net, x_T, **options):
    scheduler = getattr(diffusers, f"{name}Scheduler")(beta_start=1e-4, beta_end=0.02, **options)

    @torch.no_grad()
    def run():
        scheduler.set_timesteps(STEPS)
        x = x_T * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        return x
    return run


def azula_loop(name, net, x_T, **options):
    schedule = azula.noise.VPSchedule()

    class Network(azula.denoise.Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = schedule

        def forward(self, x_t, t, **_):
            alpha, sigma = schedule(t)
            return azula.denoise.DiracPosterior((x_t - sigma * net(x_t, t)) / alpha)

    sampler = getattr(azula.sample, f"{name}Sampler")
    return partial(sampler(Network(), steps=STEPS, silent=True, **options), x_T)


def contestants(net, x_T):
    found = {"by hand, DDIM": partial(hand_made(1), net, x_T),
             "by hand, DPM++2M": partial(hand_made(2), net, x_T)}
    denoiser = Denoiser(net, VP(), "eps", x_T.shape[1:])
    found["diffnotes default"] = partial(
        sample, denoiser, x_T=x_T, steps=STEPS, generator=torch.Generator())
    for name in ("euler", "ddim", "dpmpp_2m", "unipc_2", "ancestral"):
        if name in SAMPLERS:
            found[f"diffnotes {name}"] = partial(sample, denoiser, x_T=x_T, sampler=name,
                                                 steps=STEPS, generator=torch.Generator())
    found["flow_matching Euler"] = lambda: ODESolver(lambda x, t: net(x, t)).sample(
        x_init=x_T, step_size=1 / STEPS, method="euler")
    for name, options in (("DDIM", {"clip_sample": False}), ("EulerDiscrete", {}),
                          ("DPMSolverMultistep", {}), ("UniPCMultistep", {}),
                          ("DDPM", {"clip_sample": False})):
        found[f"diffusers {name}"] = diffusers_loop(name, net, x_T, **options)
    sigmas = peers.kd.append_zero(peers.levels(STEPS, 80.0, 0.002, "karras")).float()
    for name in ("dpmpp_2m", "euler"):
        found[f"k-diffusion {name}"] = partial(
            getattr(peers.kd, f"sample_{name}"), lambda x, s: net(x, s), x_T, sigmas, disable=True)
    for name in ("Euler", "zEAB", "DDIM"):
        found[f"azula {name}"] = azula_loop(name, net, x_T)
    model = peers.SmallModel(None, x_T.shape[1:])
    model.predict_eps_cfg = lambda x, sigma, cond, scale: net(x, sigma)
    found["smalldiffusion DDIM"] = lambda: list(peers.small.samples(
        model, sigmas[:-1], xt=x_T, accelerator=peers.SimpleNamespace(device="cpu")))
    return found


def table():
    """Label -> microseconds a step on each shape."""
    torch.set_num_threads(1)
    rows = {}
    for shape, rounds in (((64, 3, 32, 32), 15), ((1, 3, 8, 8), 60)):
        runs = contestants(OneMultiply(), torch.randn(shape))
        spent = {label: [] for label in runs}
        for turn in range(rounds + 1):
            for label, run in runs.items():
                start = time.process_time()
                run()
                if turn:
                    spent[label].append(1e6 * (time.process_time() - start) / STEPS)
        for label, values in spent.items():
            rows.setdefault(label, []).append(float(f"{median(values):.3g}"))
        hand = spent["by hand, DDIM"], spent["by hand, DPM++2M"]
        for label, base in (("euler", 0), ("ddim", 0), ("dpmpp_2m", 1)):
            if f"diffnotes {label}" in spent:
                both = zip(spent[f"diffnotes {label}"], hand[base], strict=True)
                ratio = median(a / b for a, b in both)
                rows.setdefault(f"ratio {label} to by hand", []).append(float(f"{ratio:.3g}"))
    print(f"{'microseconds a step':36}{'64x3x32x32':>12}{'1x3x8x8':>12}")
    for label, values in rows.items():
        print(f"{label:36}" + "".join(f"{value:12.3g}" for value in values))
    return {"steps": STEPS, "rows": rows}
