"""Train, judge and store the digits model that comes with the package.

    python tools/train_digits.py             train, judge, write diffnotes/assets/digits/
    python tools/train_digits.py --judge     judge the stored model only
    python tools/train_digits.py --out DIR   another folder (any --steps)

One thread of a laptop's CPU takes about ten minutes. The judge is a small classifier trained on
the real training digits: does it read in a sample the digit that was asked for, how sure is it,
how far are the samples' features from those of the data (Frechet distance), and are the samples
further from the training set than copies would be?
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from diffnotes import Cosine, Denoiser, UNet, digits, load, sample, save, train
from diffnotes.training import draw_times, loss

FOLDER = Path(__file__).resolve().parent.parent / "diffnotes" / "assets" / "digits"
RECIPE = dict(steps=5000, batch_size=128, lr=2e-3, weighting="v", seed=0, label_dropout=0.3)


def fit(steps: int) -> Denoiser:
    """The averaged denoiser of one run, its network in float32."""
    torch.manual_seed(0)
    net = UNet(n_classes=10, dropout=0.1)
    denoiser = Denoiser(net, Cosine(), "v", shape=(1, 8, 8))
    return train(denoiser, digits("train"), **{**RECIPE, "steps": steps})


class Reader(nn.Module):
    """Classifier of 8×8 digits; `features` are what the Frechet distance compares."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(),
            nn.Dropout(0.5))
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        return self.last(self.features(x))


def fit_reader(steps: int = 600) -> Reader:
    """The judge, trained on the real training digits with a little noise."""
    torch.manual_seed(0)
    images, labels = digits("train")
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=1e-2, fused=True)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - k / steps)
        batch = torch.randint(len(images), (128,))
        noisy = images[batch] + 0.1 * torch.randn(128, 1, 8, 8)
        optimizer.zero_grad()
        F.cross_entropy(reader(noisy), labels[batch]).backward()
        optimizer.step()
    return reader.eval()


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Frechet distance of two clouds of points, taken as Gaussians."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return (apart + cov_a.trace() + cov_b.trace() - 2 * cross).item()


@torch.no_grad()
def verdict(reader: Reader, images: torch.Tensor, labels: torch.Tensor | None) -> dict[str, float]:
    """Figures on one set of images."""
    train_images, _ = digits("train")
    best, read = reader(images).softmax(1).max(1)
    nearest = torch.cdist(images.flatten(1), train_images.flatten(1)).min(1).values
    figures = {
        "surer than 0.9": (best > 0.9).double().mean().item(),
        "Frechet distance": frechet(reader.features(images), reader.features(train_images)),
        "median distance to train": nearest.median().item(),
        "nearest of all": nearest.min().item(),
    }
    if labels is not None:
        figures["read as asked"] = (read == labels).double().mean().item()
    return figures


@torch.no_grad()
def held_out(denoiser: Denoiser, split: str) -> float:
    """The training loss on one split, conditional, with the same times and noise at each call."""
    images, labels = digits(split)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(8):
        order = torch.randperm(len(images), generator=generator)
        t = draw_times(denoiser.process, len(images), generator=generator)
        eps = torch.randn(images.shape, generator=generator)
        values = loss(denoiser, images[order], t=t, eps=eps, weighting="v", cond=labels[order])
        total += values.mean().item()
    return total / 8


def judge(denoiser: Denoiser, n: int = 2000) -> dict[str, dict[str, float]]:
    """Figures on test digits and on samples: with labels, without, and guided."""
    reader, asked = fit_reader(), torch.arange(n) % 10
    test_images, test_labels = digits("test")
    draw = dict(n=n, seed=0, batch_size=500)
    cases = {
        "test digits": (test_images, test_labels),
        "samples, label asked": (sample(denoiser, cond=asked, **draw), asked),
        "samples, no label": (sample(denoiser, **draw), None),
        "samples, guidance 2": (sample(denoiser, cond=asked, guidance=2.0, **draw), asked),
    }
    figures = {name: verdict(reader, *case) for name, case in cases.items()}
    losses = {split: held_out(denoiser, split) for split in ("train", "test")}
    for name, row in {**figures, "loss": losses}.items():
        print(f"{name:22}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return {**figures, "loss": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", action="store_true", help="judge what is stored, train nothing")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=RECIPE["steps"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.judge:
        begun = time.monotonic()
        denoiser = fit(options.steps)
        recipe = {**RECIPE, "steps": options.steps, "data": "digits, train split", "levels": 17,
                  "script": "tools/train_digits.py", "torch": torch.__version__.split("+")[0]}
        save(denoiser, options.out, dtype=torch.float16, data_range=(-1.0, 1.0), info=recipe)
        print(f"trained and stored in {time.monotonic() - begun:.0f} s")
    judge(load(options.out))


if __name__ == "__main__":
    main()
