"""Other people's images: each layout is read, and each thing that does not fit is refused."""

import builtins
import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from diffnotes.data import DIGIT_LEVELS, Levels, digit_images
from diffnotes.sources import (
    CIFAR10_NAMES,
    NoSplit,
    cifar10,
    from_dataset,
    image_folder,
    mnist_like,
    npz,
    open_data,
)

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(1)
GREY = RNG.integers(0, 256, (6, 9, 7), np.uint8)
COLOUR = RNG.integers(0, 256, (6, 9, 7, 3), np.uint8)
LABELS = np.array([0, 2, 1, 1, 0, 2])


def idx(path, array, pack=bytes):
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(pack(head + array.astype(np.uint8).tobytes()))


# --- npz ------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "y"), [("images", "labels"), ("x", "y"), ("arr_0", "arr_1"),
                                      ("x_train", "y_train"), ("train_images", "train_labels")])
def test_names_in_an_npz(tmp_path, x, y):
    np.savez(tmp_path / "a.npz", **{x: GREY, y: LABELS})
    images = npz(tmp_path / "a.npz")
    assert np.array_equal(images.counts[:, 0], GREY) and images.labels.tolist() == LABELS.tolist()
    assert images.levels == Levels() and images.n_classes == 3
    with pytest.raises(NoSplit, match="no images of the split 'test'"):
        npz(tmp_path / "a.npz", "test")


def test_splits_in_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=GREY, x_test=GREY[:2], val_images=GREY[:3], y_test=[0, 1])
    for split, n in (("train", 6), ("test", 2), ("val", 3)):
        assert len(npz(tmp_path / "a.npz", split)) == n
    assert npz(tmp_path / "a.npz").labels is None


def test_axes_of_an_npz(tmp_path):
    for x in (COLOUR, COLOUR.transpose(0, 3, 1, 2)):
        np.savez(tmp_path / "a.npz", images=x, labels=LABELS[:, None])
        assert np.array_equal(npz(tmp_path / "a.npz").counts, COLOUR.transpose(0, 3, 1, 2))
    for shape in [(4, 3, 5, 3), (4, 7, 8, 9), (4,), (2, 1, 4, 4), (2, 3, 1, 9, 9)]:
        np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8))
        with pytest.raises(ValueError, match=r"a\.npz: no images with 1 to 4 channels"):
            npz(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", ">u2", "i4", "u4", "i8", "u8"])
def test_whole_numbers_of_an_npz(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", images=GREY.astype(dtype), levels=300)
    images = npz(tmp_path / "a.npz")
    assert np.array_equal(images.counts[:, 0], GREY) and images.levels == Levels(300)
    given = npz(tmp_path / "a.npz", levels=Levels(256, 0.0, 1.0))
    assert given.levels == Levels(256, 0.0, 1.0) and given.counts.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_must_lie_on_the_levels_that_are_named(tmp_path, dtype):
    path = tmp_path / "a.npz"
    np.savez(path, images=(GREY / 255).astype(dtype))
    with pytest.raises(ValueError, match="value_range"):
        npz(path)
    assert np.array_equal(npz(path, value_range=(0.0, 1.0)).counts[:, 0], GREY)
    for wrong in [(-1.0, 1.0), (0.0, 255.0)]:
        with pytest.raises(ValueError, match=r"a\.npz: values from .* do not lie"):
            npz(path, value_range=wrong)
    np.savez(path, images=np.full((2, 8, 8), np.nan, dtype))
    with pytest.raises(ValueError, match="NaN"):
        npz(path, value_range=(0.0, 1.0))


@pytest.mark.parametrize(("arrays", "message"), [
    ({"images": GREY, "labels": LABELS[:4]}, "6 images need labels"),
    ({"images": GREY, "labels": np.eye(6)}, "a.npz"),
    ({"images": GREY, "labels": LABELS - 1}, "-1"),
    ({"images": GREY, "labels": LABELS / 2}, "integer"),
    ({"images": GREY, "levels": 17}, "0 .. 16"),
    ({"images": GREY[:0]}, "none 0"), ({"pixels": GREY}, "no images of the split 'train'"),
    ({"images": GREY, "levels": [1, 2]}, "a.npz"), ({"images": np.array(["a"])}, "a.npz"),
    ({"images": GREY.astype(complex)}, "integer"), ({"images": GREY, "levels": 1}, "count >= 2"),
], ids=range(11))
def test_archives_that_do_not_fit(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError) as caught:
        npz(tmp_path / "a.npz")
    assert str(caught.value).startswith(str(tmp_path / "a.npz")) and message in str(caught.value)


# --- idx and CIFAR-10 -----------------------------------------------------------


@pytest.mark.parametrize("dot", "-.")
@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress)])
@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("test", "t10k")])
def test_mnist_and_its_heirs(tmp_path, dot, suffix, pack, split, part):
    idx(tmp_path / f"{part}-images{dot}idx3-ubyte{suffix}", GREY, pack)
    idx(tmp_path / f"{part}-labels{dot}idx1-ubyte{suffix}", LABELS, pack)
    for images in (mnist_like(tmp_path, split), open_data(tmp_path, split)):
        assert np.array_equal(images.counts[:, 0], GREY) and images.levels == Levels()
        assert images.labels.tolist() == LABELS.tolist() and images.names == ("0", "1", "2")
    assert mnist_like(tmp_path, split, names=["a", "b", "c"]).names == ("a", "b", "c")
    other = {"train": "test", "test": "train"}[split]
    with pytest.raises(FileNotFoundError, match="images-idx3-ubyte: get it from .*github"):
        mnist_like(tmp_path, other)


def test_idx_files_that_do_not_belong_together(tmp_path):
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    for x, y, message in [(GREY, LABELS[:5], "6 images"), (LABELS, LABELS, "channels"),
                          (GREY, GREY, "labels of shape"), (GREY[:0], LABELS[:0], "none 0")]:
        idx(images, x)
        idx(labels, y)
        with pytest.raises(ValueError, match=message) as caught:
            mnist_like(tmp_path)
        assert str(images) in str(caught.value)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        mnist_like(tmp_path)


def write_cifar(folder, n=3):
    folder.mkdir(exist_ok=True)
    pixels = RNG.integers(0, 256, (6, n, 3072), np.uint8)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, data in zip(names, pixels, strict=True):
        batch = {"data": data, "labels": list(range(n))}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=3))
    return pixels.reshape(6, n, 3, 32, 32)


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10(tmp_path, inner):
    pixels = write_cifar(tmp_path / inner)
    train, test = open_data(tmp_path), open_data(tmp_path, "test")
    assert np.array_equal(train.counts, pixels[:5].reshape(15, 3, 32, 32))
    assert np.array_equal(test.counts, pixels[5]) and test.labels.tolist() == [0, 1, 2]
    assert train.names == CIFAR10_NAMES and train.n_classes == 10
    (tmp_path / inner / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_4: get it from .*kriz"):
        cifar10(tmp_path / inner)
    with pytest.raises(ValueError, match="train.*test"):
        cifar10(tmp_path / inner, "all")


def test_a_harmful_batch_stops_the_reading(tmp_path):
    write_cifar(tmp_path)

    class Harm:
        def __reduce__(self):
            return builtins.exec, (f"open({str(tmp_path / 'harm')!r}, 'w')",)

    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({"data": Harm()}, protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_3 .*exec.* refused"):
        open_data(tmp_path)
    assert not (tmp_path / "harm").exists()


# --- folders of pictures --------------------------------------------------------


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)


def test_classes_are_folders_in_alphabetical_order(tmp_path):
    for i, name in enumerate(["b/2.png", "a/1.PNG", "b/deep/1.png", "a/2.png"]):
        save(tmp_path / name, COLOUR[i])
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    save(tmp_path / "a" / ".hidden.png", GREY[0])
    save(tmp_path / ".cache" / "x.png", GREY[0])
    images = image_folder(tmp_path)
    assert np.array_equal(images.counts, COLOUR[[1, 3, 0, 2]].transpose(0, 3, 1, 2))
    assert images.names == ("a", "b") and images.labels.tolist() == [0, 0, 1, 1]


def test_loose_pictures_have_no_labels(tmp_path):
    for i in (2, 0, 1):
        save(tmp_path / f"{i}.png", GREY[i])
    (tmp_path / "empty").mkdir()
    images = image_folder(tmp_path)
    assert np.array_equal(images.counts[:, 0], GREY[:3]) and images.labels is images.names is None


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no pictures: none of \.png"):
        image_folder(tmp_path)
    save(tmp_path / "a" / "x.png", GREY[0])
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="b is the folder of a class"):
        image_folder(tmp_path)
    save(tmp_path / "b" / "x.png", GREY[1])
    save(tmp_path / "loose.png", GREY[1])
    with pytest.raises(ValueError, match=r"loose\.png.* beside folders"):
        image_folder(tmp_path)


@pytest.mark.parametrize(("other", "words"), [
    (GREY[0, :8], "1 x 8 x 7 with 8 bits"), (COLOUR[0], "3 x 9 x 7 with 8 bits"),
    (GREY[0].astype(np.uint16) * 200, "1 x 9 x 7 with 16 bits")])
def test_pictures_that_differ(tmp_path, other, words):
    save(tmp_path / "1.png", GREY[0])
    save(tmp_path / "2.png", other)
    with pytest.raises(ValueError, match=rf"2\.png is {words}, .*1\.png is 1 x 9 x 7 with 8 bits"):
        image_folder(tmp_path)
    if other.dtype == np.uint8:
        assert image_folder(tmp_path, size=6, channels=1).shape == (1, 6, 6)
        assert image_folder(tmp_path, size=(3, 5), channels=3).shape == (3, 3, 5)


def test_sixteen_bit_folders_have_their_levels(tmp_path):
    deep = RNG.integers(0, 2**16, (2, 4, 5), np.uint16)
    for i in (0, 1):
        save(tmp_path / f"{i}.png", deep[i])
    images = image_folder(tmp_path)
    assert images.levels == Levels(65536) and np.array_equal(images.counts[:, 0], deep)


def test_a_damaged_picture_is_named(tmp_path):
    save(tmp_path / "1.png", GREY[0])
    save(tmp_path / "2.png", GREY[1])
    data = (tmp_path / "2.png").read_bytes()
    for broken in (data[:40], b"", b"GIF89a", data[:50] + b"xx" + data[52:]):
        (tmp_path / "2.png").write_bytes(broken)
        with pytest.raises(ValueError, match=r"2\.png is damaged or no picture"):
            image_folder(tmp_path)


# --- data sets of other libraries -----------------------------------------------


def test_tensors_of_pytorch():
    digits = digit_images("test")
    x, y = digits.tensors()
    for dataset in (TensorDataset(x, y), digits, torch.utils.data.Subset(digits, range(297))):
        images = from_dataset(dataset, levels=DIGIT_LEVELS, value_range=(-1.0, 1.0))
        assert torch.equal(images.counts, digits.counts) and torch.equal(images.labels, y)
    assert from_dataset(TensorDataset(digits.counts)).labels is None


class Torchvision(Dataset):
    """What torchvision's data sets offer."""

    classes = ["zero", "one", "two"]

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return Image.fromarray(COLOUR[i]), int(LABELS[i])


def test_a_dataset_of_pictures_with_class_names():
    images = from_dataset(Torchvision())
    assert images.names == ("zero", "one", "two") and images.labels.tolist() == LABELS.tolist()
    assert np.array_equal(images.counts, COLOUR.transpose(0, 3, 1, 2))
    assert from_dataset(Torchvision(), size=4, channels=1).shape == (1, 4, 4)


def test_lists_of_several_kinds():
    for items in (list(GREY), list(torch.from_numpy(GREY)), [{"img": x} for x in GREY],
                  [(Image.fromarray(x),) for x in GREY], list(GREY[..., None])):
        assert np.array_equal(from_dataset(items).counts[:, 0], GREY)
    named = [{"scan": x, "digit": y, "label": 9} for x, y in zip(GREY, LABELS, strict=True)]
    assert from_dataset(named, image="scan", label="digit").labels.tolist() == LABELS.tolist()
    assert from_dataset([x.astype(bool) for x in GREY], levels=Levels(2)).levels.count == 2


@pytest.mark.parametrize(("items", "message"), [
    ([], "empty"), ([GREY[0], GREY[0, :8]], "item 1: it is 1 x 8 x 7"),
    ([(GREY[0], 1), GREY[1]], "some items have a label"), ([(GREY[0], 1, 2)], "3 parts"),
    ([{"pixels": GREY[0]}], "keys are pixels"), ([GREY[0] / 300], "item 0: values from"),
    ([Image.fromarray(GREY[0]), Image.fromarray(COLOUR[0])], "item 1: it is 3 x 9 x 7"),
    ([(GREY[0], -1)], "-1"), ([(GREY[0], "cat")], "item 0"), (["cat"], "item 0"),
    ([None], "item 0"),
    ([GREY[0].astype(int) + 300], "item 0: counts must lie"), ([np.zeros(5, int)], "item 0"),
], ids=range(13))
def test_items_that_do_not_fit(items, message):
    with pytest.raises(ValueError, match=message):
        from_dataset(items)


def test_streams_and_unchosen_splits():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(GREY)

    for dataset in (Stream(), {"train": list(GREY)}, iter(GREY)):
        with pytest.raises(TypeError, match="choose a split"):
            from_dataset(dataset)


def test_hugging_face_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    classes = datasets.ClassLabel(names=["a", "b", "c"])
    features = datasets.Features(image=datasets.Image(), label=classes)
    rows = {"image": [Image.fromarray(x) for x in COLOUR], "label": LABELS.tolist()}
    whole = datasets.Dataset.from_dict(rows, features=features)
    images = from_dataset(whole)
    assert np.array_equal(images.counts, COLOUR.transpose(0, 3, 1, 2))
    assert images.names == ("a", "b", "c") and images.labels.tolist() == LABELS.tolist()
    assert torch.equal(from_dataset(whole.with_format("torch")).counts, images.counts)
    with pytest.raises(TypeError, match="choose a split"):
        from_dataset(datasets.DatasetDict(train=whole))
    with pytest.raises(TypeError, match="stream"):
        from_dataset(whole.to_iterable_dataset())
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(tmp_path / "both")
    assert torch.equal(open_data(tmp_path / "one").counts, images.counts)
    assert len(open_data(tmp_path / "both", "test")) == 1
    for folder, words in (("one", "no split 'test'"), ("both", "train.*test")):
        with pytest.raises(NoSplit, match=words):
            open_data(tmp_path / folder, "test" if folder == "one" else "valid")


# --- one call for all -----------------------------------------------------------


def test_open_data_by_name_and_archive(tmp_path):
    assert len(open_data("digits")) == 1500 and len(open_data("digits", "test")) == 297
    np.savez(tmp_path / "a.npz", images=GREY)
    assert len(open_data(str(tmp_path / "a.npz"))) == 6


def test_open_data_in_folders_of_splits(tmp_path):
    save(tmp_path / "train" / "a" / "1.png", GREY[0])
    save(tmp_path / "test" / "a" / "1.png", GREY[1])
    save(tmp_path / "test" / "b" / "1.png", GREY[2])
    assert len(open_data(tmp_path)) == 1 and len(open_data(tmp_path, "test", size=4)) == 2
    with pytest.raises(ValueError, match="no folder valid"):
        open_data(tmp_path, "valid")
    np.savez(tmp_path / "test.npz", images=GREY)
    assert len(open_data(tmp_path, "test")) == 6


def test_open_data_where_there_is_nothing_to_open(tmp_path):
    with pytest.raises(FileNotFoundError, match="no 'nowhere'.*digits"):
        open_data("nowhere")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="unpacked"):
        open_data(tmp_path / "cifar-10-python.tar.gz")
    with pytest.raises(ValueError, match="no pictures"):
        open_data(tmp_path)
    with pytest.raises(ValueError, match="random_split"):
        open_data(tmp_path, "test")


@pytest.mark.parametrize("read", [open_data, mnist_like, cifar10, image_folder])
def test_a_source_is_text_or_a_path(read):
    for source in (5, None, [1], b"abc", 3.5):
        with pytest.raises(TypeError, match="a path must be text or a Path; got "):
            read(source)
    with pytest.raises(ValueError, match="an empty path names nothing"):
        read("")


@pytest.mark.parametrize(("dataset", "error", "message"), [
    ("abc", TypeError, "str is no sequence of items"),
    ([None], ValueError, "item 0: a NoneType is no picture, tensor or array"),
    (["abc"], ValueError, "item 0: a str is no picture, tensor or array")])
def test_items_that_are_no_images(dataset, error, message):
    with pytest.raises(error, match=message):
        from_dataset(dataset)
