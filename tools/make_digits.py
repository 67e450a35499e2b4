"""Make diffnotes/assets/digits.npz from scikit-learn's copy of the UCI digits.

    python tools/make_digits.py           write the file
    python tools/make_digits.py --check   compare the committed file with the source

The images keep their order and their 17 grey levels. `test` marks the 297 images of the test
split, the last of a seeded permutation, so that both splits follow the same law.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

PATH = Path(__file__).resolve().parent.parent / "diffnotes" / "assets" / "digits.npz"
N_TEST = 297


def arrays() -> dict[str, np.ndarray]:
    """Images uint8 (1797, 8, 8) in 0..16, labels uint8 (1797,), test bool (1797,)."""
    source = load_digits()
    images, labels = source.images.astype(np.uint8), source.target.astype(np.uint8)
    if not np.array_equal(images, source.images) or images.max() != 16:
        raise SystemExit("scikit-learn's digits are no longer whole numbers from 0 to 16")
    test = np.zeros(len(labels), bool)
    test[np.random.default_rng(0).permutation(len(labels))[-N_TEST:]] = True
    return {"images": images, "labels": labels, "test": test}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    made = arrays()
    if not parser.parse_args().check:
        PATH.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(PATH, **made)
    with np.load(PATH, allow_pickle=False) as kept:
        same = set(kept) == set(made) and all(np.array_equal(kept[k], made[k]) for k in made)
    if not same:
        raise SystemExit(f"{PATH} differs from its source")
    size = PATH.stat().st_size / 1000
    print(f"{PATH.name}: {size:.0f} kB, {len(made['labels'])} images, as in the source")


if __name__ == "__main__":
    main()
