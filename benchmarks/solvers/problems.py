"""Two laws whose probability flow is known exactly, and the four processes that start from it.

Everything is in the common coordinates y = x / alpha against s = sigma / alpha, where the flow of
every process is dy/ds = (y - D(y, s)) / s: the same curves, begun at different heights.

    python problems.py    recomputes the ends of the flow and compares them with those stored

benchmarks/problems/*.npz hold, in float64: `weights` (K,), `means` (K, d), `std` (), and in gmm64
`directions` (K, d, r), orthonormal, with `variances` (K, r); component k has covariance
std^2 I + directions diag(variances) directions^T. `xbar_vp_disc` (2000, d) are points at
s = 157.4 and `x0` where the flow takes them. The starts of the other processes lie on the same
curves.
"""

import math
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent.parent / "problems"
PROBLEMS = ("ring2d", "gmm64")
# Where s = sigma / alpha begins and where a grid may end: the chain of a thousand betas from 1e-4
# to 0.02; VP with beta from 0.1 to 20 at t = 1 and t = 0.001; Karras et al.; Song et al.
HEIGHTS = {
    "vp-disc": (157.40728081040757, math.sqrt(1e-4 / (1 - 1e-4))),
    "vp-cont": (152.16697028394637, math.sqrt(math.expm1(0.1e-3 + 19.9e-6 / 2))),
    "ve-edm": (80.0, 0.002),
    "ve-song": (50.0, 0.01),
}


class Problem:
    """A mixture of Gaussians, its exact denoiser, and the ends of 2000 curves of its flow."""

    def __init__(self, name: str):
        arrays = np.load(FOLDER / f"{name}.npz").items()
        data = {key: torch.as_tensor(value) for key, value in arrays}
        self.name, self.means, self.weights = name, data["means"], data["weights"]
        self.var, (n_parts, self.dim) = data["std"] ** 2, self.means.shape
        self.directions = data.get("directions", torch.zeros(n_parts, self.dim, 0).double())
        self.variances = data.get("variances", torch.zeros(n_parts, 0).double())
        self.x0, self.top = data["x0"], data["xbar_vp_disc"]
        flat = self.directions.permute(1, 0, 2).reshape(self.dim, -1)  # (d, K r)
        self.flat, self.parts = flat, torch.eye(n_parts).double().repeat_interleave(
            flat.shape[1] // n_parts, 0)  # (K r, K): which direction belongs to which component
        self.offset = torch.einsum("kd,kdr->kr", self.means, self.directions).flatten()
        self.all = torch.cat([flat, self.means.T], 1)

    def denoise(self, y: torch.Tensor, s: float) -> torch.Tensor:
        """The mean of x0 given y = x0 + s z, exactly."""
        rest, n = self.var + s**2, self.flat.shape[1]
        spread, dots = self.variances + rest, y @ self.all
        along, kept = dots[:, :n] - self.offset, self.var / rest
        square = (y * y).sum(1, keepdim=True) - 2 * dots[:, n:] + (self.means**2).sum(1)
        square = square / rest - along**2 @ ((1 / rest - 1 / spread).view(-1, 1) * self.parts)
        size = spread.log().sum(1) + (self.dim - spread.shape[1]) * rest.log()
        share = (self.weights.log() - size / 2 - square / 2).softmax(1)
        gain = ((self.variances + self.var) / spread - kept).flatten()
        more = along * (share @ (gain[:, None] * self.parts).T)
        return kept * y + (1 - kept) * (share @ self.means) + more @ self.flat.T

    def flow(self, y: torch.Tensor, s: float, end: float, steps: int) -> torch.Tensor:
        """Runge and Kutta's method of order four in log s."""
        h = math.log(end / s) / steps
        for i in range(steps):
            a, m, b = (s * math.exp(h * (i + part)) for part in (0, 0.5, 1))
            k1 = y - self.denoise(y, a)
            k2 = y + h / 2 * k1 - self.denoise(y + h / 2 * k1, m)
            k3 = y + h / 2 * k2 - self.denoise(y + h / 2 * k2, m)
            k4 = y + h * k3 - self.denoise(y + h * k3, b)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y

    def start(self, process: str) -> torch.Tensor:
        """Where the curves are at the height of a process."""
        top, height = HEIGHTS["vp-disc"][0], HEIGHTS[process][0]
        return self.top if process == "vp-disc" else self.flow(self.top, top, height, 200)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Exact samples."""
        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        k = self.weights.multinomial(n, replacement=True, generator=generator)
        part = self.variances.sqrt()[k] * draw(n, self.variances.shape[1])
        noise = self.var.sqrt() * draw(n, self.dim)
        return self.means[k] + noise + torch.einsum("ndr,nr->nd", self.directions[k], part)


def main():
    torch.set_num_threads(1)
    for name in PROBLEMS:
        problem = Problem(name)
        end = problem.flow(problem.top, HEIGHTS["vp-disc"][0], 1e-4, 3000)
        error = (problem.denoise(end, 1e-4) - problem.x0).norm(dim=1)
        print(f"{name}: recomputed ends differ from those stored by {error.mean():.1e} on average")


if __name__ == "__main__":
    main()
