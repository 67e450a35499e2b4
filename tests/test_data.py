"""The digits and their levels: shapes, ranges, splits, errors."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from diffnotes.data import DIGIT_LEVELS, Levels, digits

LEVELS = st.builds(
    lambda count, low, width: Levels(count, low, low + width),
    st.integers(2, 300), st.floats(-10, 10), st.floats(0.1, 20))


@pytest.mark.parametrize(("split", "n"), [("all", 1797), ("train", 1500), ("test", 297)])
def test_shapes_and_range(split, n):
    images, labels = digits(split)
    assert images.shape == (n, 1, 8, 8) and images.dtype == torch.float32
    assert labels.shape == (n,) and labels.dtype == torch.int64
    assert (images.min(), images.max()) == (-1, 1) and labels.unique().tolist() == list(range(10))
    assert torch.equal((images + 1) * 8, ((images + 1) * 8).round())


def test_splits_part_the_whole():
    whole, train, test = (digits(split)[0].flatten(1) for split in ("all", "train", "test"))
    counts = torch.cat([train, test]).unique(dim=0, return_counts=True)
    expected = whole.unique(dim=0, return_counts=True)
    assert all(torch.equal(a, b) for a, b in zip(counts, expected, strict=True))
    assert torch.cdist(train, test, compute_mode="donot_use_mm_for_euclid_dist").min() > 0


def test_labels_belong_to_their_images():
    images, labels = digits("train")
    held, truth = digits("test")
    nearest = torch.cdist(held.flatten(1), images.flatten(1)).argmin(1)
    assert (labels[nearest] == truth).float().mean() > 0.97


def test_each_call_gives_new_tensors():
    digits("test")[0].zero_()
    assert digits("test")[0].abs().sum() > 0


def test_unknown_split_lists_the_splits():
    with pytest.raises(ValueError, match="all.*train.*test"):
        digits("valid")


@pytest.mark.development
def test_the_file_is_what_the_source_gives():
    done = subprocess.run([sys.executable, "tools/make_digits.py", "--check"], cwd=ROOT)
    assert done.returncode == 0


@settings(deadline=None)
@given(LEVELS)
def test_counts_there_and_back(levels):
    k = torch.arange(levels.count)
    x = levels.to_values(k, torch.float64)
    assert x[0] == levels.low and abs(x[-1] - levels.high) < 1e-9
    assert torch.equal(levels.to_counts(x), k)


@settings(deadline=None)
@given(LEVELS, st.integers(0, 2**32 - 1))
def test_dequantised_values_stay_in_their_bins(levels, seed):
    k = torch.arange(levels.count)
    generator = torch.Generator().manual_seed(seed)
    x = levels.to_values(k, torch.float64)
    spread = levels.dequantize(x, generator=generator)
    assert ((spread - x).abs() <= levels.step / 2).all() and not torch.equal(spread, x)
    assert ((levels.to_counts(spread) - k).abs() <= 1).all()


def test_dequantising_is_reproducible_and_fills_the_bin():
    x = torch.zeros(20_000)
    draws = [DIGIT_LEVELS.dequantize(x, generator=torch.Generator().manual_seed(5)) for _ in "ab"]
    assert torch.equal(*draws)
    assert abs(draws[0].mean()) < 4 * DIGIT_LEVELS.step / (12 * 20_000) ** 0.5
    assert draws[0].max() > 0.49 * DIGIT_LEVELS.step and draws[0].min() < -0.49 * DIGIT_LEVELS.step


def test_values_out_of_range_go_to_the_ends():
    beyond = torch.tensor([-9.0, -1.01, 1.01, torch.inf])
    assert DIGIT_LEVELS.to_counts(beyond).tolist() == [0, 0, 16, 16]


@pytest.mark.parametrize(
    "arguments", [(1,), (17, 1.0, -1.0), (17, 0.0, 0.0), (17, 0.0, float("nan"))])
def test_senseless_levels(arguments):
    with pytest.raises(ValueError, match="low < high"):
        Levels(*arguments)


def test_by_default_8_bit_images():
    assert Levels() == Levels(256, -1.0, 1.0) and Levels().to_counts(torch.tensor(2.0)) == 255


def test_wrong_dtypes():
    for k in (torch.rand(3), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(TypeError, match="integer dtype"):
            DIGIT_LEVELS.to_values(k)
    for method in (DIGIT_LEVELS.to_counts, DIGIT_LEVELS.dequantize):
        with pytest.raises(TypeError, match="floating"):
            method(torch.arange(3))
    with pytest.raises(ValueError, match="NaN"):
        DIGIT_LEVELS.to_counts(torch.tensor([0.0, float("nan")]))
