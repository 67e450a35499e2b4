"""Draws nbs/images/overview.png: one sampler, an exact law above and the shipped model below."""

from pathlib import Path

import torch

import diffnotes as dn
from diffnotes import plots

PATH = Path(__file__).resolve().parent.parent / "nbs" / "images" / "overview.png"
COLUMNS = (0, 8, 9, 10, 17)


def states(denoiser, n):
    """The time and state of the sampler at the columns of the figure, the last one finished."""
    seen = []
    dn.sample(denoiser, n=n, seed=0, callback=lambda i, *state: seen.append(state))
    *early, last = (seen[i] for i in COLUMNS)
    return [(float(t), x_t) for t, x_t, _ in early] + [(0.0, last[2])]


def main():
    plots.style()
    means = torch.tensor([[-1.5, 0.0], [0.8, 1.3], [1.1, -1.2]], dtype=torch.float64)
    law = dn.GaussianMixture(means, torch.tensor([0.1, 0.03, 0.15]), torch.tensor([0.5, 0.2, 0.3]))
    digits = dn.load_pretrained("digits")
    process = digits.process
    exact, model = states(law.denoiser(process), 1500), states(digits, 16)
    figure, axes = plots.figure("wide", 2, len(COLUMNS))
    figure.set_size_inches(7.2, 3.1)
    for (t, x), (_, images), (top, bottom) in zip(exact, model, axes.T, strict=True):
        noised = law.marginal(process, t) if t else law
        plots.scatter2d(x, "model", ax=top, s=2)
        plots.density2d(noised.log_prob, ax=top, limit=3.2)
        top.set_title(f"$t = {t:.2f}$", fontsize=9)
        top.axis("off")
        plots.image_grid(images, 4, ax=bottom)
    figure.savefig(PATH, dpi=110)


if __name__ == "__main__":
    main()
