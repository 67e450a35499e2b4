"""What `train` adds to a training step: forward, backward and fused AdamW alone, and diffusers.

All train the same U-Net on the same images. The contestants run in turn, a few steps each; a
ratio is the median, over the rounds, of the mean step of one round by that of the bare loop in
the same round. The first steps of a round are not counted; `start` is the time to the end of the
first. Seconds are the processor's, so that a neighbour on the machine counts for less.
"""

import os
import time
from importlib.metadata import version
from importlib.util import find_spec
from statistics import mean, median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from diffnotes.denoisers import Denoiser  # noqa: E402
from diffnotes.networks import UNet  # noqa: E402
from diffnotes.processes import Discrete, linear_betas  # noqa: E402
from diffnotes.runs import train  # noqa: E402
from diffnotes.training import ema_update  # noqa: E402

PROCESS = Discrete(linear_betas(1000))
WARM = 3  # steps of a round that are not counted


def unet():
    torch.manual_seed(0)
    net = UNet(in_channels=1, channels=48, multipliers=(1, 2), blocks=1)
    nn.init.normal_(net.last.weight, std=0.02)
    return net.train()


def bare(net, data, steps, batch_size, tick, averaged=False):
    """Forward, backward and fused AdamW on the loss of the noise; with a weight average or not."""
    current, grid = list(net.parameters()), torch.arange(1, 1001) / 1000
    average = [p.detach().clone() for p in current]
    optimizer = torch.optim.AdamW(current, lr=1e-4, fused=True)
    alpha, sigma = PROCESS.alpha(grid).view(-1, 1, 1, 1), PROCESS.sigma(grid).view(-1, 1, 1, 1)
    for _ in range(steps):
        x0 = data[torch.randint(len(data), (batch_size,))]
        k = torch.randint(1000, (batch_size,))
        eps = torch.randn_like(x0)
        loss = F.mse_loss(net(alpha[k] * x0 + sigma[k] * eps, grid[k]), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if averaged:
            ema_update(average, current, 0.999)
        tick()


def bare_averaged(*args):
    bare(*args, averaged=True)


def diffnotes(net, data, steps, batch_size, tick):
    """The library's `train` as it comes: schedule, weight average, loss by noise level, checks."""
    denoiser = Denoiser(net, PROCESS, "eps", shape=(1, 8, 8))
    train(denoiser, data, steps=steps, batch_size=batch_size, lr=1e-4, progress=False,
          callback=lambda *_: tick())


def diffusers(net, data, steps, batch_size, tick):
    """The loop of its tutorial on unconditional images, with the average of its example script."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    accelerator, scheduler = Accelerator(cpu=True), DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    loader = DataLoader(TensorDataset(data), batch_size, shuffle=True, drop_last=True)
    rates = get_cosine_schedule_with_warmup(optimizer, 10, steps)
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True)
    net, optimizer, loader, rates = accelerator.prepare(net, optimizer, loader, rates)
    done = 0
    while done < steps:
        for (clean,) in loader:
            noise = torch.randn(clean.shape, device=clean.device)
            k = torch.randint(0, 1000, (len(clean),), device=clean.device, dtype=torch.int64)
            noisy = scheduler.add_noise(clean, noise, k)
            with accelerator.accumulate(net):
                loss = F.mse_loss(net(noisy, (k + 1) / 1000), noise)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(net.parameters())
            loss.detach().item()
            tick()
            done += 1
            if done == steps:
                return


def seconds(contestant, data, steps, batch_size):
    """Mean seconds of a counted step, and seconds before the first step is done."""
    net, ticks = unet(), [time.process_time()]
    contestant(net, data, steps + WARM, batch_size, lambda: ticks.append(time.process_time()))
    assert len(ticks) == steps + WARM + 1
    times = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    return mean(times[WARM:]), times[0]


def table(contestants, data, steps, batch_size, rounds):
    """One row for each contestant, all of them in turn in each round."""
    results = {c: [] for c in contestants}
    for i in range(rounds + 1):
        for contestant in contestants:
            result = seconds(contestant, data, steps, batch_size)
            if i:  # the first round warms up
                results[contestant].append(result)
    print(f"\nbatch {batch_size}, {rounds} rounds of {steps} steps")
    print(f"{'':34} {'ms a step':>10} {'ratio':>7} {'10% to 90%':>15} {'start, ms':>10}")
    base = [step for step, _ in results[bare]]
    for contestant, pairs in results.items():
        step, start = zip(*pairs, strict=True)
        ratios = sorted(a / b for a, b in zip(step, base, strict=True))
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        print(f"{NAMES[contestant]:34} {1e3 * median(step):10.2f} {median(ratios):7.3f}"
              f" {low:7.3f} {high:7.3f} {1e3 * median(start):10.0f}")


NAMES = {
    bare: "forward, backward, fused AdamW",
    bare_averaged: "the same and a weight average",
    diffnotes: "diffnotes.train (budget 1.05)",
    diffusers: "diffusers' tutorial loop",
}


def main():
    torch.set_num_threads(1)
    here = [c for c in NAMES if c is not diffusers or find_spec("diffusers")]
    peers = f", diffusers {version('diffusers')}" if diffusers in here else ", no diffusers here"
    size = sum(p.numel() for p in unet().parameters()) / 1e6
    print(f"torch {torch.__version__}{peers}; U-Net {size:.2f}M on 1x8x8, one thread")
    data = torch.rand(1500, 1, 8, 8) * 2 - 1
    table(here, data, steps=10, batch_size=64, rounds=15)
    table(here, data, steps=40, batch_size=4, rounds=25)


if __name__ == "__main__":
    main()
