"""What the library adds to the arithmetic: a sampling step and a training step against bare loops.

One thread. The contestants of a row run in turn and each ratio is the median over the rounds.
"""

import os
import time
from functools import partial
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from diffnotes.denoisers import Denoiser  # noqa: E402
from diffnotes.networks import UNet  # noqa: E402
from diffnotes.processes import VP  # noqa: E402
from diffnotes.runs import train  # noqa: E402
from diffnotes.samplers import nfe, sample, time_grid  # noqa: E402

PROCESS = VP()
STEPS = 50


def row(name: str, ours, bare, count: int, repeats: int, budget: str):
    """Prints microseconds per step of both, and the ratio; each is called once to warm up."""
    ours(), bare()
    rounds = []
    for _ in range(repeats):
        start = time.process_time()
        ours()
        middle = time.process_time()
        bare()
        rounds.append((middle - start, time.process_time() - middle))
    micro = [1e6 * median(times) / count for times in zip(*rounds, strict=True)]
    ratio = median(a / b for a, b in rounds)
    print(f"{name:34} {micro[0]:11.0f} {micro[1]:11.0f} {ratio:8.3f}   {budget}")


@torch.no_grad()
def bare_ddim(net, x_T):
    """The deterministic sampler for a network that predicts eps, in place, with Python floats."""
    times = time_grid(PROCESS, STEPS)
    alpha, sigma = PROCESS.alpha(times), PROCESS.sigma(times)
    on_x = alpha[1:] / alpha[:-1]
    on_eps = sigma[1:] - on_x * sigma[:-1]
    rows = times.to(x_T.dtype)[:, None].repeat(1, len(x_T))
    x = x_T.clone()
    for t, a, b in zip(rows[:-1], on_x.tolist(), on_eps.tolist(), strict=True):
        eps_hat = net(x, t)
        x.mul_(a).add_(eps_hat, alpha=b)
    eps_hat = net(x, rows[-1])
    return x.sub_(eps_hat, alpha=sigma[-1].item()).div_(alpha[-1].item())


@torch.no_grad()
def bare_2m(net, x_T):
    """DPM-Solver++(2M) for a network that predicts eps: data prediction, one answer kept."""
    times = time_grid(PROCESS, STEPS)
    alpha, sigma = PROCESS.alpha(times), PROCESS.sigma(times)
    on_x, h = sigma[1:] / sigma[:-1], PROCESS.log_snr(times).diff() / 2
    on_x0 = -alpha[1:] * torch.expm1(-h)
    on_old = torch.cat([h.new_zeros(1), -on_x0[1:] * h[1:] / h[:-1] / 2])
    columns = (on_x, on_x0 - on_old, on_old, 1 / alpha, sigma / alpha)
    rows = times.to(x_T.dtype)[:, None].repeat(1, len(x_T))
    x, old = x_T.clone(), torch.zeros_like(x_T)
    for t, a, b, c, p, q in zip(rows, *(column.tolist() for column in columns), strict=False):
        x0_hat = net(x, t).mul_(-q).add_(x, alpha=p)
        x.mul_(a).add_(x0_hat, alpha=b).add_(old, alpha=c)
        old = x0_hat
    eps_hat = net(x, rows[-1])
    return x.sub_(eps_hat, alpha=sigma[-1].item()).div_(alpha[-1].item())


@torch.no_grad()
def forwards(net, x, count):
    t = torch.full((len(x),), 0.5)
    for _ in range(count):
        net(x, t)


def bare_training(net, data, steps, batch_size):
    """Forward, backward and fused AdamW on the loss of the noise; nothing else."""
    net.train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        x0 = data[torch.randint(len(data), (batch_size,))]
        t = torch.rand(batch_size)
        eps = torch.randn_like(x0)
        alpha, sigma = PROCESS.alpha(t).view(-1, 1, 1, 1), PROCESS.sigma(t).view(-1, 1, 1, 1)
        loss = (net(alpha * x0 + sigma * eps, t) - eps).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


class OneMultiply(nn.Module):
    def forward(self, x, t, cond=None):
        return x * 0.5


def unet():
    torch.manual_seed(0)
    net = UNet(in_channels=1, channels=48, multipliers=(1, 2), blocks=1)
    nn.init.normal_(net.last.weight, std=0.02)
    return net


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, one thread; microseconds a step")
    print(f"{'':34} {'diffnotes':>11} {'bare':>11} {'ratio':>8}   budget")
    net = OneMultiply()
    for shape in [(64, 3, 32, 32), (1, 3, 8, 8)]:
        x_T, denoiser = torch.randn(shape), Denoiser(net, PROCESS, "eps", shape=shape[1:])
        for name, bare in (("euler", bare_ddim), ("dpmpp_2m", bare_2m)):
            ours = partial(sample, denoiser, x_T=x_T, sampler=name, steps=STEPS,
                           generator=torch.Generator())
            by_hand = partial(bare, net, x_T)
            label = f"{name}, one multiply, {'x'.join(map(str, shape))}"
            row(label, ours, by_hand, STEPS, 40, "1.3")
    net, x_T = unet(), torch.randn(64, 1, 8, 8)
    denoiser = Denoiser(net, PROCESS, "eps", shape=(1, 8, 8))
    size = f"U-Net {sum(p.numel() for p in net.parameters()) / 1e6:.1f}M"
    for name in ["euler", "heun", "ancestral"]:
        ours = partial(sample, denoiser, x_T=x_T, sampler=name, steps=10, seed=0)
        calls = nfe(name, 10)
        bare = partial(forwards, net, x_T, calls)
        row(f"{name}, {size}, 64x1x8x8", ours, bare, calls, 7, "1.05")
    data = torch.rand(1500, 1, 8, 8) * 2 - 1
    for batch_size, steps in [(64, 12), (4, 60)]:
        denoiser = Denoiser(unet(), PROCESS, "eps", shape=(1, 8, 8))
        options = dict(steps=steps, batch_size=batch_size)
        ours = partial(train, denoiser, data, progress=False, **options)
        bare = partial(bare_training, unet(), data, **options)
        row(f"training, {size}, batch {batch_size}", ours, bare, steps, 7, "1.05")


if __name__ == "__main__":
    main()
