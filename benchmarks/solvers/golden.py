"""What k-diffusion's and azula's samplers give on a small law, for the tests to read."""

import json
from functools import partial

import peers
import torch

LAW = {"weights": [0.5, 0.3, 0.2], "means": [[1.0, 0.0], [-0.5, 0.8], [-0.3, -1.1]], "std": 0.3}
SIGMAS = [20.0, 8.0, 3.5, 1.5, 0.6, 0.2, 0.05]
STARTS = [[12.0, -7.0], [-20.0, 15.0], [3.0, 24.0], [-9.0, -18.0]]


def denoise(y, s):
    """The mean of x0 given y = x0 + s z under LAW."""
    means = torch.tensor(LAW["means"], dtype=torch.float64)
    rest, var = LAW["std"] ** 2 + s**2, LAW["std"] ** 2
    log_p = torch.tensor(LAW["weights"]).double().log() - torch.cdist(y, means) ** 2 / (2 * rest)
    return var / rest * y + (1 - var / rest) * log_p.softmax(1) @ means


class Replay:
    """The same normals in the same order for every sampler."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def __call__(self, *_):
        return next(self.draws)


class Steps(peers.Levels):
    """azula's times 1, (N - 1) / N, ... 0 as the levels of a list."""

    def __init__(self, sigmas):
        self.sigmas = sigmas

    def __call__(self, t):
        s = self.sigmas[((1 - t) * (len(self.sigmas) - 1)).round().long()]
        return torch.ones_like(s), s


def write(path):
    """k-diffusion: SIGMAS then 0. azula: SIGMAS alone, its last state; z at each step as given."""
    sigmas = torch.tensor(SIGMAS, dtype=torch.float64)
    start = torch.tensor(STARTS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(20, *start.shape, generator=generator, dtype=torch.float64)
    model = partial(lambda x, s: denoise(x, s[0].item()))
    ends, with_zero = {}, peers.kd.append_zero(sigmas)
    plain = {name: {} for name in ("euler", "heun", "dpm_2", "dpmpp_2m")}
    plain["dpmpp_2s_ancestral"] = {"eta": 0.0}
    for name, options in plain.items():
        run = getattr(peers.kd, f"sample_{name}")
        ends[f"k-diffusion {name}"] = run(model, start, with_zero, disable=True, **options)
    for order in (2, 3, 4):
        ends[f"k-diffusion lms {order}"] = peers.kd.sample_lms(
            model, start, with_zero, order=order, disable=True)
    noisy = {"euler_ancestral": {}, "dpmpp_2s_ancestral": {}, "dpmpp_sde": {}, "dpmpp_3m_sde": {},
             "dpmpp_2m_sde midpoint": {"solver_type": "midpoint"},
             "dpmpp_2m_sde heun": {"solver_type": "heun"}}
    for name, options in noisy.items():
        for eta in (1.0, 0.5):
            run = partial(getattr(peers.kd, f"sample_{name.split()[0]}"), eta=eta, **options)
            ends[f"k-diffusion {name}, eta {eta}"] = run(
                model, start, with_zero, noise_sampler=Replay(draws), disable=True)
    denoiser = peers.AzulaDenoiser(denoise, Steps(sigmas))
    for name in ("zAB", "vAB", "zEAB", "xEAB"):
        for order in (1, 2, 3):
            sampler = getattr(peers.azula.sample, f"{name}Sampler")(
                denoiser, steps=len(SIGMAS) - 1, order=order, silent=True, dtype=torch.float64)
            ends[f"azula {name}{order}"] = sampler(start)
    content = {"law": LAW, "sigmas": SIGMAS, "starts": STARTS, "draws": draws.tolist(),
               "ends": {name: end.tolist() for name, end in ends.items()}}
    text = json.dumps(content, separators=(",", ":")).replace('],"', '],\n"')
    path.write_text(text + "\n", encoding="utf8")
    print(f"{len(ends)} golden values in {path.name}")
