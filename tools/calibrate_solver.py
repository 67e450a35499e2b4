"""Writes diffnotes/assets/solver.json, the table of the sampler `calibrated`.

Levels, the scale c and corrections of the weights are found by gradient descent through the exact
denoisers of 32 synthetic laws, from the exact end of the probability flow; see chapter 35.

    python tools/calibrate_solver.py            every number of steps, then the curve for more
    python tools/calibrate_solver.py 5 8        these numbers of steps
    python tools/calibrate_solver.py curve      the curve
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffnotes.calibration import interpolation_weights

ASSET = Path(__file__).parents[1] / "diffnotes" / "assets" / "solver.json"
HEIGHTS = [157.40728081040757, 152.16697028394637, 80.0, 50.0]
ORDER, MOST = 4, 20
LEAST = 0.011  # the variance exploding process ends at 0.01


class Laws:
    """L mixtures of K Gaussians in the same number of axes, of which a law uses the first dim.

    A component has covariance variance I + axes diag(extra) axes^T.
    """

    def __init__(self, weights, means, variances, dim, axes=None, extra=None):
        self.weights, self.means, self.variances, self.dim = weights, means, variances, dim
        self.axes, self.extra = axes, extra
        self.used = torch.arange(means.shape[-1]) < dim[:, None]  # (L, d)

    def denoise(self, y: Tensor, r: float | Tensor) -> Tensor:
        """Returns E[x0 | x0 + r eps = y] for y of shape (L, B, d)."""
        total = self.variances + r * r  # (L, K)
        square = ((y * y).sum(-1)[..., None] - 2 * y @ self.means.mT
                  + (self.means * self.means).sum(-1)[:, None])
        exponent, log_det = square / total[:, None], self.dim[:, None] * torch.log(total)
        keep = self.variances / total
        if self.axes is not None:
            n_laws, k, d, rank = self.axes.shape
            flat = self.axes.permute(0, 2, 1, 3).reshape(n_laws, d, k * rank)
            along = ((y @ flat).view(n_laws, -1, k, rank)
                     - torch.einsum("lkd,lkdr->lkr", self.means, self.axes)[:, None])
            wide = self.extra + total[..., None]
            exponent = exponent - (along.square()
                                   * (self.extra / wide / total[..., None])[:, None]).sum(-1)
            log_det = log_det + torch.log(wide / total[..., None]).sum(-1)
        log_weights = torch.log(self.weights.clamp(min=1e-300))
        share = torch.softmax((log_weights - log_det / 2)[:, None] - exponent / 2, dim=-1)
        kept = share * keep[:, None]
        x0_hat = kept.sum(-1, keepdim=True) * y + (share - kept) @ self.means
        if self.axes is None:
            return x0_hat
        gain = (self.extra + self.variances[..., None]) / wide - keep[..., None]
        return x0_hat + (share[..., None] * along * gain[:, None]).flatten(2) @ flat.mT

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Returns n samples of each law, (L, n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        i = torch.arange(len(k))[:, None]
        z = torch.randn(*k.shape, self.means.shape[-1], generator=generator)
        x = self.means[i, k] + self.variances[i, k].sqrt()[..., None] * z
        if self.axes is not None:
            z = torch.randn(*k.shape, self.extra.shape[-1], generator=generator)
            x = x + torch.einsum("lndr,lnr->lnd", self.axes[i, k], z * self.extra[i, k].sqrt())
        return x * self.used[:, None]


def between(low: float, high: float, n: int, g: torch.Generator) -> Tensor:
    """Returns n numbers, even in their logarithm."""
    return low * (high / low) ** torch.rand(n, generator=g)


def standard(weights, means, variances, g, axes=None, extra=None) -> Laws:
    """Centres the laws, and gives each a root mean square between 0.7 and 1.25."""
    means = means - (weights[..., None] * means).sum(1, keepdim=True)
    d = means.shape[-1]
    power = means.square().sum(-1) + d * variances + (0 if extra is None else extra.sum(-1))
    factor = between(0.7, 1.25, len(means), g) / ((weights * power).sum(1) / d).sqrt()
    means, variances = means * factor[:, None, None], variances * factor[:, None] ** 2
    if extra is not None:
        extra = extra * factor[:, None, None] ** 2
    return Laws(weights, means, variances, torch.full((len(means),), float(d)), axes, extra)


def shares(n_laws: int, k: int, least: float, g: torch.Generator) -> Tensor:
    weights = torch.rand(n_laws, k, generator=g) + least
    return weights / weights.sum(1, keepdim=True)


def lumps(seed: int, n_laws: int = 12, k: int = 9, d: int = 2) -> Laws:
    """Round lumps scattered over the plane."""
    g = torch.Generator().manual_seed(seed)
    weights, means = shares(n_laws, k, 0.2, g), torch.randn(n_laws, k, d, generator=g)
    sizes = between(0.03, 0.15, n_laws, g)[:, None]
    spread = torch.exp(0.3 * torch.randn(n_laws, k, generator=g))
    return standard(weights, means, (sizes * spread) ** 2, g)


def surface(seed: int, n_laws: int = 4, k: int = 60, d: int = 24) -> Laws:
    """Blurred points of a curved surface, as a data set is."""
    g = torch.Generator().manual_seed(seed)
    chart = torch.randn(n_laws, 6, d, generator=g) / 6 ** 0.5
    angles = 2 * math.pi * torch.rand(n_laws, k, 3, generator=g)
    means = torch.cat([angles.sin(), angles.cos()], dim=-1) @ chart
    variances = between(0.01, 0.08, n_laws, g)[:, None].square().expand(n_laws, k).clone()
    return standard(torch.full((n_laws, k), 1 / k), means, variances, g)


def pancakes(seed: int, n_laws: int = 4, k: int = 6, d: int = 32, decay: float = 1.0) -> Laws:
    """Flat lumps: eight wide axes each, of falling variance, and little beside them."""
    g, rank = torch.Generator().manual_seed(seed), 8
    weights = shares(n_laws, k, 0.3, g)
    axes = torch.linalg.qr(torch.randn(n_laws, k, d, rank, generator=g))[0]
    noise = torch.randn(n_laws, k, rank, generator=g)
    extra = torch.exp(noise / 2 - decay * torch.arange(rank) / 2) * d / rank
    reach = 0.4 + torch.rand(n_laws, 1, 1, generator=g)
    means = torch.randn(n_laws, k, d, generator=g) * reach
    variances = between(0.01, 0.1, n_laws, g)[:, None].square().expand(n_laws, k).clone()
    return standard(weights, means, variances, g, axes, extra)


def together(families: list[Laws]) -> Laws:
    """The families as one, padded to the same numbers of axes and components."""
    k, d = (max(f.means.shape[i] for f in families) for i in (1, 2))
    pad = torch.nn.functional.pad
    parts = []
    for f in families:
        more_k, more_d = k - f.means.shape[1], d - f.means.shape[2]
        part = [pad(f.weights, (0, more_k)), pad(f.means, (0, more_d, 0, more_k)),
                pad(f.variances, (0, more_k), value=1.0), f.dim]
        if f.axes is not None:
            part += [pad(f.axes, (0, 0, 0, more_d, 0, more_k)), pad(f.extra, (0, 0, 0, more_k))]
        parts.append(part)
    return Laws(*map(torch.cat, zip(*parts, strict=True)))


def flow(laws: Laws, y: Tensor, start: float, end: float, n: int) -> Tensor:
    """Returns the probability flow at the level end, by n Runge-Kutta steps in log r."""
    points = torch.linspace(math.log(start), math.log(end), n + 1).tolist()
    for a, b in zip(points[:-1], points[1:], strict=True):
        h, velocity = b - a, lambda y, log_r: y - laws.denoise(y, math.exp(log_r))
        k1 = velocity(y, a)
        k2 = velocity(y + h / 2 * k1, (a + b) / 2)
        k3 = velocity(y + h / 2 * k2, (a + b) / 2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(y + h * k3, b))
    return y


@torch.no_grad()
def problem(laws: Laws, n: int, seed: int) -> tuple[Laws, list[Tensor], Tensor]:
    """The laws, states at each of HEIGHTS on the same paths, and the ends of the paths."""
    g = torch.Generator().manual_seed(seed)
    x = laws.sample(n, g)
    noise = torch.randn(x.shape, generator=g) * laws.used[:, None]
    starts = [x + HEIGHTS[0] * noise]
    for a, b in zip(HEIGHTS[:-1], HEIGHTS[1:], strict=True):
        starts.append(flow(laws, starts[-1], a, b, 20))
    return laws, starts, laws.denoise(flow(laws, starts[-1], HEIGHTS[-1], 1e-3, 500), 1e-3)


def problems(seed: int, n: int) -> list[tuple]:
    """Lumps and surfaces; pancakes of three kinds."""
    flat = [lumps(seed + 1), surface(seed + 2), surface(seed + 3, k=30, d=12)]
    steep = [pancakes(seed + 4), pancakes(seed + 5, decay=0.3, k=10),
             pancakes(seed + 6, k=3, d=48, decay=0.6)]
    return [problem(together(family), n, seed + 7) for family in (flat, steep)]


def run(laws: Laws, y: Tensor, r: Tensor, weights: Tensor) -> Tensor:
    """The sampler in common coordinates."""
    told: list[Tensor] = []
    for i in range(len(r)):
        told = [laws.denoise(y, r[i]), *told][:ORDER]
        mean = sum(w * x0_hat for w, x0_hat in zip(weights[i], told, strict=False))
        if i + 1 < len(r):
            y = r[i + 1] / r[i] * y + (1 - r[i + 1] / r[i]) * mean
    return mean


def rows(parameters: dict, height: float) -> tuple[Tensor, Tensor]:
    """Levels (N,) and weights (N, ORDER) of a start at the height."""
    levels = parameters["log_levels"].exp()
    r = torch.cat([levels.new_tensor([height]), levels])
    weights = interpolation_weights(r, parameters["log_c"].exp(), ORDER)
    free = torch.tril(torch.ones(len(r), ORDER)) * parameters["free"]
    return r, weights + torch.cat([-free[:, 1:].sum(1, keepdim=True), free[:, 1:]], dim=1)


def loss(parameters: dict, given: list, height: int, index: Tensor | slice) -> Tensor:
    """Mean over the laws of the log of the mean distance to the exact end."""
    r, weights = rows(parameters, HEIGHTS[height])
    logs = [(run(laws, starts[height][:, index], r, weights) - x0[:, index]).norm(dim=-1)
            .mean(-1).log().mean() for laws, starts, x0 in given]
    return torch.stack(logs).mean()


def learn(groups: list, parts, given: list, iterations: int, batch: int) -> None:
    """Adam on random samples and heights; parts(i) are the parameters of iteration i."""
    g = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=iterations,
                                                   pct_start=0.1)
    for i in range(iterations):
        height = int(torch.randint(len(HEIGHTS), (), generator=g))
        index = torch.randint(given[0][2].shape[1], (batch,), generator=g)
        optimiser.zero_grad()
        loss(parts(i), given, height, index).backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimiser.step()
        schedule.step()


def refined(log_levels: Tensor, steps: int) -> Tensor:
    """Levels for one more step, read off the old ones between the level 45 and the last."""
    old = np.concatenate([[math.log(45)], log_levels.numpy()])
    places = np.linspace(0, 1, steps)
    return torch.from_numpy(np.interp(places, np.linspace(0, 1, len(old)), old)[1:])


def table(steps: int, before: Tensor | None, given: list) -> dict:
    """Levels, scale and corrections for a number of steps."""
    karras = np.linspace(45 ** (1 / 7), max(0.06, 6 / steps ** 2) ** (1 / 7), steps)[1:] ** 7
    log_levels = torch.from_numpy(np.log(karras)) if before is None else refined(before, steps)
    parameters = {"log_levels": log_levels.requires_grad_(),
                  "log_c": torch.zeros(()).requires_grad_(),
                  "free": torch.zeros(steps, ORDER).requires_grad_()}
    groups = [{"params": [parameters["log_levels"], parameters["log_c"]], "lr": 0.012},
              {"params": [parameters["free"]], "lr": 0.005}]
    learn(groups, lambda i: parameters, given, iterations=900, batch=24)
    return {name: value.detach() for name, value in parameters.items()}


def on_curve(curve: Tensor, steps: int) -> dict:
    """The parameters that the curve (8, 2) gives a number of steps; the columns are a line.

    Row 0 is log c, row 1 the log of what the last level has above LEAST, the others a Chebyshev
    series that bends the line between the lowest height and the last level.
    """
    series = curve @ torch.tensor([1.0, math.log(steps / 40)])
    u, top = torch.linspace(-1, 1, steps)[1:], math.log(HEIGHTS[-1])
    places = torch.from_numpy(np.polynomial.chebyshev.chebvander(u.numpy(), len(series) - 3))
    last = torch.log(LEAST + series[1].exp())
    log_levels = top + (u + 1) / 2 * (last - top) + (1 - u * u) * (places @ series[2:])
    return {"log_levels": log_levels, "log_c": series[0], "free": torch.zeros(steps, ORDER)}


def fitted_curve(given: list) -> Tensor:
    """The curve, which starts as Karras's grid of rho 10."""
    columns = []
    for steps, last in ((40, 0.018), (24, 0.022)):
        u = np.linspace(-1, 1, steps)
        log_levels = np.log(np.linspace(50 ** 0.1, last ** 0.1, steps) ** 10)
        bend = log_levels - np.interp(u, u[[0, -1]], log_levels[[0, -1]])
        series = np.polynomial.chebyshev.chebfit(u[1:-1], (bend / (1 - u * u + 1e-30))[1:-1], 5)
        log_c = math.log(0.35) - 1.3 * math.log(steps / 40)
        columns.append([log_c, math.log(last - LEAST), *series])
    slope = (np.array(columns[1]) - columns[0]) / math.log(24 / 40)
    curve = torch.tensor(np.column_stack([columns[0], slope]))
    counts = [21, 28, 38, 52, 21, 28, 38, 52, 72, 100]
    learn([{"params": [curve.requires_grad_()], "lr": 0.007}],
          lambda i: on_curve(curve, counts[i % len(counts)]), given, iterations=400, batch=24)
    return curve.detach()


def store(name: str, value, index: int | None = None) -> None:
    """Puts a value into the file, which may hold others already."""
    content = json.loads(ASSET.read_text()) if ASSET.exists() else {}
    if index is None:
        content[name] = value
    else:
        values = content.setdefault(name, [])
        values += [None] * (index + 1 - len(values))
        values[index] = value
    ASSET.write_text(json.dumps(content, sort_keys=True).replace("], \"", "],\n\"") + "\n")


def digits(value: Tensor) -> list | float:
    """Seven significant digits of each number."""
    return json.loads(json.dumps(value.tolist()), parse_float=lambda s: float(f"{float(s):.7g}"))


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    given, unseen = problems(0, 256), problems(1000, 128)
    before = None
    chosen = [int(w) for w in wanted if w != "curve"] if wanted else range(1, MOST + 1)
    for steps in chosen:
        p = table(steps, before, given) if steps > 1 else {
            "log_levels": torch.zeros(0), "log_c": torch.zeros(()), "free": torch.zeros(1, ORDER)}
        free = (torch.tril(torch.ones(steps, ORDER)) * p["free"])[:, 1:]
        before = p["log_levels"] if steps > 1 else None
        store("levels", digits(p["log_levels"].exp()), steps - 1)
        store("c", digits(p["log_c"].exp()), steps - 1)
        store("corrections", digits(free), steps - 1)
        with torch.no_grad():
            logs = [loss(p, laws, 2, slice(None)).item() for laws in (given, unseen)]
        print(f"{steps} steps: log distance {logs[0]:.3f}, laws not trained on {logs[1]:.3f}",
              flush=True)
    if not wanted or "curve" in wanted:
        store("curve", digits(fitted_curve(given)))


if __name__ == "__main__":
    main(sys.argv[1:])
