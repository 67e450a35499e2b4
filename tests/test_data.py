"""Levels, digits, sets of images, splits and augmentation: shapes, ranges, draws, errors."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from diffnotes.data import (
    DIGIT_LEVELS,
    Images,
    Levels,
    digit_images,
    digits,
    hflip,
    random_split,
    shift,
    translate,
)

MOVE = torch.ones(4, dtype=torch.int64)
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


# --- Images ---------------------------------------------------------------------


def some_images(n=6, **options):
    counts = torch.arange(n * 2 * 3 * 4).reshape(n, 2, 3, 4) % 17
    return Images(counts, torch.arange(n) % 3, DIGIT_LEVELS, **options)


def test_items_batches_and_tensors_agree():
    images = some_images()
    values, labels = images.tensors()
    assert values.shape == (6, 2, 3, 4) and values.dtype == torch.float32
    assert labels.dtype == torch.int64 and len(images) == 6
    assert images.shape == (2, 3, 4) and images.n_classes == 3 and images.names == ("0", "1", "2")
    for indices in ([4, 1], torch.tensor([4, 1]), slice(1, 3)):
        x, y = images.batch(indices)
        assert torch.equal(x, values[indices]) and torch.equal(y, labels[indices])
    x, y = images[-1]
    assert torch.equal(x, values[5]) and y == labels[5]
    with pytest.raises(IndexError):
        images[6]


def test_images_go_through_a_data_loader():
    images = some_images()
    x, y = next(iter(torch.utils.data.DataLoader(images, batch_size=6)))
    assert torch.equal(x, images.tensors()[0]) and torch.equal(y, images.labels)


def test_images_without_labels():
    images = Images(torch.zeros(3, 1, 2, 2, dtype=torch.int64), names=["unused"])
    assert images.labels is images.names is images.n_classes is None
    assert torch.equal(images[0], torch.full((1, 2, 2), -1.0)) and images.batch([0])[1] is None
    assert images.subset([0, 2]).labels is None and len(images.to("cpu")) == 3


@pytest.mark.parametrize(("count", "dtype"), [(2, torch.uint8), (256, torch.uint8),
                                              (257, torch.int32), (65536, torch.int32)])
def test_counts_take_as_few_bytes_as_they_need(count, dtype):
    counts = torch.full((1, 1, 2, 2), count - 1, dtype=torch.int64)
    images = Images(counts, levels=Levels(count))
    assert images.counts.dtype == dtype and images[0].eq(1).all()


def test_names_outlive_a_subset():
    images = some_images(names=["a", "b", "c"])
    few = images.subset(images.labels == 0)
    assert few.names == ("a", "b", "c") and few.n_classes == 3 and few.levels == images.levels
    assert torch.equal(few.counts, images.counts[[0, 3]])


@pytest.mark.parametrize(("arguments", "message"), [
    ((torch.zeros(2, 3, 3, dtype=torch.uint8),), "n, C, H, W"),
    ((torch.zeros(0, 1, 3, 3, dtype=torch.uint8),), "none 0"),
    ((torch.full((1, 1, 2, 2), 17), None, Levels(17)), "17 .. 17"),
    ((torch.full((1, 1, 2, 2), -1),), "-1 .. -1"),
    ((torch.zeros(2, 1, 2, 2, dtype=torch.uint8), [1]), "2 images"),
    ((torch.zeros(2, 1, 2, 2, dtype=torch.uint8), [[1], [2]]), "2, 1"),
    ((torch.zeros(2, 1, 2, 2, dtype=torch.uint8), [-1, 0]), "-1 .. 0"),
    ((torch.zeros(2, 1, 2, 2, dtype=torch.uint8), [0, 2], Levels(), ["a", "b"]), "0 .. 2"),
])
def test_images_that_do_not_fit_together(arguments, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Images(*arguments)


def test_images_need_whole_numbers():
    for counts in (torch.rand(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool)):
        with pytest.raises(TypeError, match="counts"):
            Images(counts)
    with pytest.raises(TypeError, match="labels"):
        Images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), [0.5])


@pytest.mark.parametrize("split", ["all", "train", "test"])
def test_digits_both_ways(split):
    images, (values, labels) = digit_images(split), digits(split)
    assert torch.equal(images.tensors()[0], values) and torch.equal(images.labels, labels)
    assert images.levels == DIGIT_LEVELS and images.n_classes == 10


@pytest.mark.parametrize(("held", "count"), [(0.25, 2), (3, 3), (1, 1)])
def test_random_split_parts_the_whole(held, count):
    images = Images(torch.arange(8).reshape(8, 1, 1, 1), torch.arange(8))
    kept, out = random_split(images, held, seed=3)
    assert len(out) == count
    assert sorted([*kept.labels.tolist(), *out.labels.tolist()]) == [*range(8)]
    again = random_split(images, held, seed=3)
    assert torch.equal(again[1].labels, out.labels)
    assert out.names == kept.names == images.names
    assert torch.equal(out.counts.flatten(), out.labels.to(torch.uint8))


def test_random_split_depends_on_the_seed():
    images = digit_images("test")
    draws = [random_split(images, 100, seed=seed)[1].counts for seed in (0, 1)]
    assert not torch.equal(*draws)


@pytest.mark.parametrize("held", [0, 8, 9, 0.01, 0.999, -1, 2.5])
def test_senseless_splits(held):
    with pytest.raises(ValueError, match="both sides"):
        random_split(Images(torch.zeros(8, 1, 1, 1, dtype=torch.uint8)), held)


# --- Augmentation ---------------------------------------------------------------


def test_flips_are_all_or_nothing_and_about_half():
    x = torch.rand(2000, 2, 3, 4)
    y = hflip(x, torch.Generator().manual_seed(0))
    flipped = (y == x.flip(-1)).flatten(1).all(1)
    assert (flipped ^ (y == x).flatten(1).all(1)).all()
    assert abs(flipped.double().mean() - 0.5) < 4 * 0.5 / 2000**0.5
    assert torch.equal(y, hflip(x, torch.Generator().manual_seed(0)))


def test_translate_moves_down_and_right_and_fills():
    x = torch.arange(1.0, 13).reshape(1, 1, 3, 4)
    moved = translate(x, torch.tensor([1]), torch.tensor([-2]), fill=9.0)
    assert moved[0, 0].tolist() == [[9, 9, 9, 9], [3, 4, 9, 9], [7, 8, 9, 9]]
    far = translate(x, torch.tensor([30]), torch.tensor([0]))
    assert far.eq(-1).all() and torch.equal(translate(x, *torch.zeros(2, 1, dtype=int)), x)


def test_translate_is_undone_inside_a_margin():
    x = torch.full((5, 3, 8, 9), -1.0)
    x[:, :, 2:6, 2:7] = torch.rand(5, 3, 4, 5)
    down, right = torch.randint(-2, 3, (2, 5))
    assert torch.equal(translate(translate(x, down, right), -down, -right), x)


def test_translate_keeps_the_dtype():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        x = torch.rand(2, 1, 3, 3).to(dtype)
        assert translate(x, *torch.ones(2, 2, dtype=int)).dtype == dtype == hflip(x).dtype


def test_shifts_are_uniform():
    x = torch.full((9000, 1, 5, 5), -1.0)
    x[:, :, 2, 2] = 1
    y = shift(x, torch.Generator().manual_seed(1), pixels=1)
    where = (y == 1).double().mean(0)[0]
    assert (y == 1).sum() == 9000 and where[1:4, 1:4].sum() == 1
    assert (where[1:4, 1:4] - 1 / 9).abs().max() < 4 * (1 / 9 * 8 / 9 / 9000) ** 0.5


def test_senseless_moves():
    x = torch.zeros(3, 1, 4, 4)
    for down in (torch.ones(2, dtype=int), torch.ones(3, 1, dtype=int)):
        with pytest.raises(ValueError, match="3 images need 3 moves"):
            translate(x, down, torch.ones(3, dtype=int))
    with pytest.raises(ValueError, match="pixels"):
        shift(x, pixels=0)


@pytest.mark.parametrize("call", [hflip, shift, lambda x: translate(x, MOVE, MOVE)],
                         ids=["hflip", "shift", "translate"])
@pytest.mark.parametrize("x", [torch.rand(4, 8, 8), torch.rand(5), None], ids=["3d", "1d", "None"])
def test_only_batches_of_images_are_moved(call, x):
    with pytest.raises(ValueError, match=r"images must be a tensor \(n, C, H, W\)"):
        call(x)


@pytest.mark.parametrize("down", [torch.rand(4), 1], ids=["float", "number"])
def test_moves_are_whole(down):
    with pytest.raises(TypeError, match="moves must be int64"):
        translate(torch.rand(4, 1, 3, 3), down, MOVE)


@pytest.mark.parametrize("ends", [(-math.inf, 1.0), (-1.0, math.inf), (math.nan, 1.0)], ids=str)
def test_levels_have_finite_ends(ends):
    with pytest.raises(ValueError, match="finite low < high"):
        Levels(17, *ends)


def test_senseless_levels_and_splits():
    with pytest.raises(TypeError, match="levels must be Levels; got 17"):
        Images(torch.zeros(2, 1, 2, 2, dtype=int), levels=17)
    for images, held in ((digits(), 3), (digit_images("test"), "3")):
        with pytest.raises(TypeError, match="random_split needs Images and a number"):
            random_split(images, held)


@pytest.mark.parametrize("counts", [None, "abc", {}, digit_images()])
def test_counts_of_another_kind(counts):
    with pytest.raises(TypeError, match="counts must be a tensor or an array of whole numbers"):
        Images(counts)


@pytest.mark.parametrize(("labels", "names", "message"), [
    ("ab", None, "labels must be a tensor or an array of whole numbers; got str"),
    ([0, None], None, "labels must be a tensor or an array of whole numbers; got list"),
    ([0.5, 1.0], None, "labels must have an integer dtype"),
    ([0, 1], 5, "names must be a sequence of texts; got 5"),
    ([0, 1], "ab", "names must be a sequence of texts; got 'ab'")])
def test_labels_and_names_of_another_kind(labels, names, message):
    with pytest.raises(TypeError, match=message):
        Images(torch.ones(2, 1, 4, 4).long(), labels, names=names)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int16"])
def test_counts_of_any_integer_kind(dtype):
    images = Images(np.full((2, 1, 4, 4), 300, dtype), levels=Levels(2**16))
    assert images.counts.dtype == torch.int32 and (images.counts == 300).all()
    with pytest.raises(ValueError, match=r"0 .. 255; got 300 .. 300"):
        Images(np.full((2, 1, 4, 4), 300, dtype))


@pytest.mark.parametrize("ends", [("a", 1), (0, None)])
def test_ends_of_levels_are_numbers(ends):
    with pytest.raises(TypeError, match="low and high must be numbers"):
        Levels(17, *ends)


def test_counts_of_no_numbers_have_no_values():
    with pytest.raises(TypeError, match="counts must be a tensor or an array"):
        Levels(17).to_values(None)


@pytest.mark.parametrize("held", [math.nan, math.inf, -math.inf])
def test_shares_that_are_no_numbers(held):
    with pytest.raises(ValueError, match="held must leave images"):
        random_split(digit_images(), held)
    with pytest.raises(TypeError, match="got Images and True"):
        random_split(digit_images(), True)
