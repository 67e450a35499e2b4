"""Train, judge and store the network whose features compare digits.

    python tools/train_digit_features.py                   train, store, judge, seed 0
    python tools/train_digit_features.py --seeds 0 1 2 3   the first is stored, all are judged
    python tools/train_digit_features.py --judge           judge the stored network only

A small classifier of 8×8 digits, trained on the 1500 training images, each time turned, stretched,
sheared and shifted by up to a pixel; half a minute a seed on one thread of a laptop. Nothing about
it is chosen on the 297 held-out images. It is judged on them, with every seed that was asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.nn import functional as F

from diffnotes.data import digits
from diffnotes.metrics import DigitFeatures, digit_features, proportion

FOLDER = Path(__file__).resolve().parent.parent / "diffnotes" / "assets" / "digit_features"
RECIPE = dict(steps=1500, batch_size=128, lr=3e-3, weight_decay=1e-2, label_smoothing=0.05,
              dropout=0.2, noise=0.1, degrees=12, stretch=0.12, shear=0.15, shift=1.0)
WARP = {name: RECIPE[name] for name in ("degrees", "stretch", "shear", "shift")}


def warp(x: Tensor, degrees: float, stretch: float, shear: float, shift: float,
         mode: str = "bilinear", generator: torch.Generator | None = None) -> Tensor:
    """Each image under its own small affine map; what comes in from outside is blank paper."""

    def uniform(*shape):
        return 2 * torch.rand(len(x), *shape, generator=generator) - 1

    angle = math.radians(degrees) * uniform()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    widths = torch.diag_embed(torch.exp(stretch * uniform(2)))
    widths[:, 0, 1] = shear * uniform()
    move = shift * 2 / x.shape[-1] * uniform(2, 1)
    grid = F.affine_grid(torch.cat([turn @ widths, move], 2), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, mode, align_corners=False).clamp(0, 2) - 1


def fit(seed: int) -> DigitFeatures:
    """The network of one run."""
    torch.manual_seed(seed)
    images, labels = digits("train")
    net, steps = DigitFeatures(dropout=RECIPE["dropout"]), RECIPE["steps"]
    decay = RECIPE["weight_decay"]
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=decay, fused=True)
    for k in range(steps):
        rate = min(1, (k + 1) / 100) * (1 + math.cos(math.pi * k / steps)) / 2
        optimizer.param_groups[0]["lr"] = RECIPE["lr"] * rate
        batch = torch.randint(len(images), (RECIPE["batch_size"],))
        x = warp(images[batch], **WARP)
        logits = net.logits(x + RECIPE["noise"] * torch.randn_like(x))
        optimizer.zero_grad()
        smoothing = RECIPE["label_smoothing"]
        F.cross_entropy(logits, labels[batch], label_smoothing=smoothing).backward()
        optimizer.step()
    return standardise(net.eval(), images)


@torch.no_grad()
def standardise(net: DigitFeatures, images: Tensor) -> DigitFeatures:
    """Gives the features mean 0 and, on average, variance 1 on these images."""
    features = net(images)
    net.mean.copy_(features.mean(0))
    net.scale.copy_(features.var(0).mean().sqrt())
    return net


def store(net: DigitFeatures, seed: int) -> None:
    """Weights in half precision, and a page that says what they are."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    data = to_bytes({name: value.half() for name, value in net.state_dict().items()})
    (FOLDER / "model.safetensors").write_bytes(data)
    config = {"format": "diffnotes.digit_features", "network": net.config(),
              "info": {**RECIPE, "seed": seed, "data": "digits, train split",
                       "script": "tools/train_digit_features.py",
                       "torch": torch.__version__.split("+")[0]},
              "weights_sha256": hashlib.sha256(data).hexdigest()}
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in config.items())
    (FOLDER / "features.json").write_text("{\n" + lines + "\n}\n", encoding="utf8")


@torch.no_grad()
def judge(name: str, net: DigitFeatures) -> None:
    """Prints how many digits of each split are read rightly."""
    for split in ("train", "test"):
        images, labels = digits(split)
        right = net.logits(images).argmax(1) == labels
        print(f"{name}, {split}: {int((~right).sum())} wrong, read rightly {proportion(right)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", action="store_true", help="judge what is stored, train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in [] if options.judge else options.seeds:
        begun = time.monotonic()
        net = fit(seed)
        print(f"seed {seed}: {time.monotonic() - begun:.0f} s")
        judge(f"seed {seed}", net)
        if seed == options.seeds[0]:
            store(net, seed)
    judge("stored", digit_features())


if __name__ == "__main__":
    main()
