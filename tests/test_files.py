"""Readers of files: what is sound comes back, what is not is refused in one line, at no cost."""

import builtins
import gzip
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffnotes.files import (
    read_cifar10,
    read_idx,
    read_image,
    read_npz,
    read_pickle,
    to_pixels,
)

Image = pytest.importorskip("PIL.Image")
CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
RNG = np.random.default_rng(0)


def idx_bytes(array):
    kind = CODES[array.dtype.str[1:]]
    head = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def refused(read, path, *, memory=2**22, **options):
    """The message of a refusal, which is one line, names the file and costs little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            read(path, **options)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file and gives its path."""

    def write(data, name="file"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


# --- idx ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (1, 2, 3, 4), (0, 5)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_comes_back(file, kind, shape, pack):
    array = (RNG.normal(size=shape) * 50).astype(kind)
    found = read_idx(file(pack(idx_bytes(array))))
    assert found.numpy().dtype == array.dtype and np.array_equal(found.numpy(), array)
    found += 1


def test_every_cut_of_an_idx_file_is_noticed(file):
    whole = idx_bytes(RNG.integers(0, 256, (2, 3, 4), np.uint8))
    for data in (whole, gzip.compress(whole)):
        for length in range(len(data)):
            refused(read_idx, file(data[:length]))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.booleans(), st.booleans())
def test_arbitrary_bytes_are_no_idx_file(file, data, headed, packed):
    data = (b"\0\0\x08\x02" if headed else b"") + data
    try:
        read_idx(file(gzip.compress(data) if packed else data))
    except ValueError as error:
        assert "idx file" in str(error)


@pytest.mark.parametrize(
    "shape", [(2**32 - 1,) * 3, (2**31, 1), (2**32 - 1,) * 255, (10**6, 10**4)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_idx_header_may_claim_what_it_likes(file, shape, pack):
    head = struct.pack(f">HBB{len(shape)}I", 0, 14, len(shape), *shape)
    message = refused(read_idx, file(pack(head + bytes(100))))
    assert "claims" in message and "at most" in message


def test_a_gzip_bomb_stops_at_the_claim(file):
    bomb = gzip.compress(struct.pack(">HBBI", 0, 8, 1, 10) + bytes(10**8))
    assert "holds more" in refused(read_idx, file(bomb))


@pytest.mark.parametrize("magic", [b"\0\0\x07\x01", b"\0\0\x08\x00", b"\1\0\x08\x01", b"PK\3\4"])
def test_wrong_magic(file, magic):
    assert "magic" in refused(read_idx, file(magic + bytes(20)))


@pytest.mark.parametrize("read", [read_idx, read_npz, read_pickle, read_image, read_cifar10])
def test_a_missing_file_is_just_that(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


# --- npz ------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_comes_back(tmp_path, save):
    arrays = {"a": RNG.integers(0, 256, (3, 4, 5), np.uint8), "b": RNG.normal(size=(2, 3)),
              "f": np.asfortranarray(RNG.normal(size=(4, 3))), "n": np.array(7),
              "z": np.zeros((0, 2)),
              "big": np.arange(3, dtype=">u2"), "t": np.array(["x", "yz"])}
    save(tmp_path / "x.npz", **arrays)
    found = read_npz(tmp_path / "x.npz")
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[k], arrays[k]) for k in arrays)
    assert found["big"].dtype.isnative and found["a"].flags.writeable
    assert read_npz(tmp_path / "x.npz", {"a", "none"}).keys() == {"a"}


def npz_of(member, compress=zipfile.ZIP_DEFLATED, name="x.npy"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compress) as archive:
        archive.writestr(name, member)
    return file.getvalue()


def npy_header(shape, descr="|u1", write=np.lib.format.write_array_header_1_0):
    file = io.BytesIO()
    write(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("shape", [(2**40,), (2**62, 2**62), (2**20, 2**20)])
@pytest.mark.parametrize("compress", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_npy_header_may_claim_what_it_likes(file, shape, compress):
    data = npz_of(npy_header(shape) + bytes(1000), compress)
    assert "claims" in refused(read_npz, file(data))


def test_a_directory_that_lies_about_its_size_is_noticed(file):
    """The archive's own directory says 4 GB; 1000 bytes of deflate cannot hold that."""
    data = bytearray(npz_of(npy_header((2**32 - 200,)) + bytes(1000)))
    at = data.rindex(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 2**32 - 200 + 128)
    refused(read_npz, file(bytes(data)))


@pytest.mark.parametrize("data", [
    npz_of(b""), npz_of(b"\x93NUMPY\1\0"), npz_of(b"\x93NUMPY\x09\0" + bytes(100)),
    npz_of(npy_header((3,)) + b"ab"), npz_of(npy_header((3,)) + b"abcd"),
    npz_of(npy_header((3,), "|O") + bytes(24)), npz_of(b"text", name="readme.txt"), b"", b"PK\3\4",
], ids=range(9))
def test_unsound_npz(file, data):
    assert "npz" in refused(read_npz, file(data))


def test_a_changed_byte_in_an_npz_is_noticed(file, tmp_path):
    np.savez(tmp_path / "x.npz", a=np.arange(1000))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[1000] ^= 1
    assert "CRC" in refused(read_npz, file(bytes(data)))


def test_objects_in_an_npz_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([Harm(tmp_path / "harm")], object))
    assert "Python objects" in refused(read_npz, tmp_path / "x.npz")
    assert not (tmp_path / "harm").exists()


# --- pickles --------------------------------------------------------------------


class Harm:
    """Unpickled by `pickle`, it makes a file."""

    def __init__(self, path, call=os.mkdir):
        self.path, self.call = str(path), call

    def __reduce__(self):
        return self.call, (self.path,)


def python2_batch(pixels, labels):
    """The instructions that Python 2 wrote for a published batch."""
    def text(s):
        return b"U" + bytes([len(s)]) + s

    n, raw = len(pixels), pixels.tobytes()
    array = (b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\0\x85q\tU\x01bq"
             b"\n\x87q\x0bRq\x0c(K\x01M" + struct.pack("<H", n) + b"M\0\x0c\x86q\rcnumpy\ndtype\n"
             b"q\x0eU\x02u1q\x0fK\0K\x01\x87q\x10Rq\x11(K\x03U\x01|q\x12NNNJ\xff\xff\xff\xff"
             b"J\xff\xff\xff\xffK\0tq\x13b\x89T" + struct.pack("<i", len(raw)) + raw + b"tq\x14b")
    numbers = b"]q\x05(" + b"".join(b"K" + bytes([y]) for y in labels) + b"e"
    names = b"]q\x16(" + b"".join(text(b"%d.png" % i) for i in range(n)) + b"e"
    return (b"\x80\x02}q\x01(" + text(b"batch_label") + b"q\x02" + text(b"training batch 1 of 5")
            + b"q\x03" + text(b"labels") + b"q\x04" + numbers + text(b"data") + b"q\x06" + array
            + text(b"filenames") + b"q\x15" + names + b"u.")


PIXELS, LABELS = RNG.integers(0, 256, (300, 3072), np.uint8), RNG.integers(0, 10, 300).tolist()


def test_a_batch_of_python_2(file):
    data = python2_batch(PIXELS, LABELS)
    assert np.array_equal(pickle.loads(data, encoding="latin1")["data"], PIXELS)
    found = read_pickle(file(data))
    assert np.array_equal(found["data"], PIXELS) and found["labels"] == LABELS
    assert found["batch_label"] == "training batch 1 of 5" and found["filenames"][7] == "7.png"
    x, y = read_cifar10(file(data))
    assert x.shape == (300, 3, 32, 32) and y.tolist() == LABELS
    assert x[5, 2, 3, 4] == PIXELS[5, 2 * 1024 + 3 * 32 + 4]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("call", [os.mkdir, os.system, eval, exec, builtins.open, subprocess.call])
def test_a_pickle_cannot_call(tmp_path, protocol, call):
    path = tmp_path / "batch"
    for value in ({"data": Harm(tmp_path / "harm", call)}, Harm(tmp_path / "harm", call)):
        path.write_bytes(pickle.dumps(value, protocol=protocol))
        assert "refused" in refused(read_pickle, path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("code", [
    b"\x80\x02cos\nsystem\nU\x04true\x85R.", b"(cos\nsystem\nU\x04trueo.",
    b"(U\x04trueios\nsystem\n.",
    b"\x80\x02cnumpy\nload\nU\x01x\x85R.", b"cnumpy.core.multiarray\n_reconstruct\x00\n.",
    b"cnumpy\nndarray\n)\x81.", b"\x80\x02cdiffnotes.files\nread_idx\n.", b"Pid\n.", b"K\x01Q.",
    b"\x82\x01.", b"\x80\x04\x8c\x02os\x8c\x06system\x93.", b"cnumpy\nndarray.__init__\n.",
], ids=range(12))
def test_other_ways_to_a_call(file, code):
    refused(read_pickle, file(code))


@pytest.mark.parametrize("code", [
    b"", b".", b"}", b"].", b"K\x01.", b"}K\x01a.", b"]K\x01K\x02s.", b"e.", b"u.",
    b"t.", b"\x85.",
    b"h\x01.", b"q\x01.", b"}(K\x01u.", b"}]K\x01s.", b"}b.", b"}}R.", b"K\x01K\x01R.",
    b"(((.",
    b"r\xff\xff\xff\x7f.", b"}r\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f.", b"T\xff\xff\xff\x7f.",
    b"T\xff\xff\xff\xff.", b"X\xff\xff\xff\x7fab.", b"\x80\xff.", b"\xff",
    b"}U\x04datacnumpy\ndtype\ns.",
    b"\x8e" + b"\xff" * 8 + b".", b"\x96" + b"\x7f" * 8 + b".",
], ids=range(30))
def test_nonsense_pickles(file, code):
    refused(read_pickle, file(code))


def test_a_memo_entry_of_any_number_costs_nothing(file):
    assert read_pickle(file(b"}r\xf0\xff\xff\xff.")) == {}


@settings(deadline=None, max_examples=300,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_damaged_batches_never_raise_anything_else(file, seed, changes):
    data = bytearray(python2_batch(PIXELS[:2], LABELS[:2]))
    draw = random.Random(seed)
    head = [i for i in range(len(data)) if i < 330 or i > len(data) - 40]
    for _ in range(changes):
        data[draw.choice(head)] = draw.randrange(256)
    try:
        read_cifar10(file(bytes(data)))
    except ValueError as error:
        assert "\n" not in str(error)


def array_claims(shape, dtype="u1", raw=b"abc", order=False):
    class Claim:
        def __reduce__(self):
            state = (1, shape, np.dtype(dtype), order, raw)
            return np.zeros(1, np.uint8).__reduce__()[0], (np.ndarray, (0,), b"b"), state

    return pickle.dumps({"data": Claim()}, protocol=3)


@pytest.mark.parametrize("options", [
    dict(shape=(2**60,)), dict(shape=(4,)), dict(shape=(-1, -3)), dict(shape=("3",)),
    dict(shape=7),
    dict(shape=(3,), dtype="O"), dict(shape=(3,), dtype="f8"), dict(shape=(3,), raw=[1, 2, 3]),
    dict(shape=(3,), order=True), dict(shape=(3,), raw="é" * 3 + "☃"), dict(shape=(2**70, 0)),
], ids=range(11))
def test_arrays_in_pickles_that_do_not_add_up(file, options):
    refused(read_pickle, file(array_claims(**options)))


def batch(**changes):
    return pickle.dumps({"data": PIXELS[:3], "labels": [1, 2, 3]} | changes, protocol=3)


@pytest.mark.parametrize(("data", "message"), [
    (batch(labels=[1, 2]), "3 images and labels"), (batch(labels=[1, 2, 10]), "0 to 9"),
    (batch(labels=["a", "b", "c"]), "0 to 9"), (batch(labels=None), "labels"),
    (batch(data=PIXELS[:3, :100]), "3072"), (batch(data=PIXELS[0]), "3072"),
    (batch(data=[1, 2]), "batch of CIFAR-10"), (pickle.dumps({"data": PIXELS[:3]}, 3), "labels"),
    (pickle.dumps([1], 3), "dictionary"), (pickle.dumps({}, 3), "CIFAR"),
    (batch(labels=[True, False, True]), "0 to 9"), (batch(labels=[[1], [2, 3], 4]), "CIFAR"),
], ids=range(12))
def test_batches_that_do_not_fit_together(file, data, message):
    assert message in refused(read_cifar10, file(data))


def test_columns_of_pictures(tmp_path):
    images = PIXELS[:7].reshape(7, 3, 32, 32)
    stored = {}
    for name, part in (("webp_00", images[:5]), ("webp_01", images[5:])):
        data = io.BytesIO()
        column = Image.fromarray(part.transpose(0, 2, 3, 1).reshape(-1, 32, 3))
        column.save(data, "WebP", lossless=True)
        stored[name] = np.frombuffer(data.getvalue(), np.uint8)
    np.savez(tmp_path / "b.npz", labels=np.array(LABELS[:7], np.uint8), **stored)
    x, y = read_cifar10(tmp_path / "b.npz")
    assert np.array_equal(x, images) and y.tolist() == LABELS[:7] and y.dtype == torch.int64
    stored["webp_01"] = stored["webp_01"][:-30]
    np.savez(tmp_path / "b.npz", labels=np.array(LABELS[:7], np.uint8), **stored)
    refused(read_cifar10, tmp_path / "b.npz")


# --- pictures -------------------------------------------------------------------


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


GREY = RNG.integers(0, 256, (5, 7), np.uint8)
COLOUR = RNG.integers(0, 256, (5, 7, 3), np.uint8)


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_channels_of_grey_and_colour(tmp_path, channels):
    grey = read_image(saved(tmp_path, Image.fromarray(GREY)), channels=channels)
    assert grey.shape == (channels or 1, 5, 7) and np.array_equal(grey[0], GREY)
    colour = read_image(saved(tmp_path, Image.fromarray(COLOUR)), channels=channels)
    assert colour.shape == (channels or 3, 5, 7) and colour.dtype == torch.uint8
    if channels != 1:
        assert np.array_equal(colour[:3], COLOUR.transpose(2, 0, 1))
    if channels == 4:
        assert (colour[3] == 255).all() and (grey[3] == 255).all()


def test_palettes_are_resolved(tmp_path):
    image = Image.fromarray(RNG.integers(0, 9, (5, 7), np.uint8) * 28).convert("RGB").quantize(16)
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    for name in ("x.png", "x.gif"):
        assert np.array_equal(read_image(saved(tmp_path, image, name)), expected)


def test_transparency_is_no_colour(tmp_path):
    clear = np.dstack([COLOUR, np.full((5, 7), 255, np.uint8)])
    assert read_image(saved(tmp_path, Image.fromarray(clear))).shape == (3, 5, 7)
    clear[0, 0, 3] = 254
    path = saved(tmp_path, Image.fromarray(clear))
    for channels in (None, 1, 3):
        assert "transparent" in refused(read_image, path, channels=channels)
    assert np.array_equal(read_image(path, channels=4), clear.transpose(2, 0, 1))
    keyed = saved(tmp_path, Image.fromarray(GREY), transparency=int(GREY[2, 3]))
    assert "transparent" in refused(read_image, keyed)
    palette = Image.fromarray(GREY // 16).convert("P")
    assert "transparent" in refused(read_image, saved(tmp_path, palette, transparency=0))


def test_sixteen_bits_stay(tmp_path):
    deep = RNG.integers(0, 2**16, (5, 7), np.uint16)
    for name in ("x.png", "x.tiff"):
        path = saved(tmp_path, Image.fromarray(deep), name)
        found = read_image(path)
        assert found.dtype == torch.int32 and np.array_equal(found[0], deep)
        assert "3 channels" in refused(read_image, path, channels=3)
    shrunk = read_image(path, size=4)
    assert 0 <= shrunk.min() and shrunk.max() < 2**16 and shrunk.dtype == torch.int32


def test_sixteen_bit_colour_is_not_cut(file):
    """A PNG of one pixel, 16 bits for each of three channels."""
    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    png = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
           + chunk(b"IDAT", zlib.compress(b"\0" + bytes(range(6)))) + chunk(b"IEND", b""))
    assert Image.open(io.BytesIO(png)).mode == "RGB"
    assert "16-bit colour" in refused(read_image, file(png))


def test_floats_and_wide_integers_are_refused(tmp_path):
    floats = saved(tmp_path, Image.fromarray(np.full((2, 2), 0.5, np.float32)), "x.tiff")
    assert "mode F" in refused(read_image, floats)
    wide = saved(tmp_path, Image.fromarray(np.full((2, 2), 2**20, np.int32)), "x.tiff")
    assert "65535" in refused(read_image, wide)


def test_pictures_are_turned_upright(tmp_path):
    image = Image.fromarray(COLOUR)
    exif = image.getexif()
    exif[0x0112] = 6
    path = saved(tmp_path, image, exif=exif)
    expected = np.rot90(COLOUR, -1).transpose(2, 0, 1)
    assert np.array_equal(read_image(path), expected)


@pytest.mark.parametrize(("size", "shape"), [(4, (4, 4)), ((2, 6), (2, 6)), (16, (16, 16))])
def test_sizes(size, shape):
    assert to_pixels(Image.fromarray(COLOUR), size=size).shape == (3, *shape)


def test_a_resize_cuts_evenly_and_keeps_flat_pictures_flat():
    page = np.zeros((10, 20), np.uint8)
    page[:, 5:15] = 200
    assert (to_pixels(Image.fromarray(page), size=5)[0, :, 1:4] >= 190).all()
    assert (to_pixels(Image.new("L", (9, 7), 77), size=3) == 77).all()


@pytest.mark.parametrize(
    "options", [dict(size=0), dict(size=(3, -1)), dict(channels=2), dict(size=(1, 2, 3))])
def test_senseless_options(options):
    with pytest.raises(ValueError):
        to_pixels(Image.fromarray(GREY), **options)
    with pytest.raises(TypeError):
        to_pixels(Image.fromarray(GREY), size=2.5)


def test_every_cut_of_a_picture_is_noticed(tmp_path, file):
    noise = Image.fromarray(RNG.integers(0, 256, (40, 40, 3), np.uint8))
    for name in ("x.png", "x.jpg", "x.bmp"):
        data = saved(tmp_path, noise, name).read_bytes()
        for length in [0, 1, 8, 20, 30, *range(50, len(data) // 2, 97)]:
            refused(read_image, file(data[:length]))


def test_a_picture_may_claim_what_it_likes(tmp_path, file):
    data = bytearray(saved(tmp_path, Image.fromarray(GREY)).read_bytes())
    for side in (2**16, 10_000, 2**30):
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        refused(read_image, file(bytes(data)))


def test_without_pillow_one_line_says_so(tmp_path):
    path = saved(tmp_path, Image.fromarray(GREY))
    code = ("import sys; sys.modules['PIL'] = None\nfrom diffnotes.files import read_image\n"
            f"try: read_image({str(path)!r})\nexcept ImportError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "pictures need Pillow: pip install 'diffnotes[train]'\n", done.stderr


def test_lies_are_refused_within_a_small_address_space(tmp_path):
    """The claims above, in a process that cannot have more than it had after its imports."""
    (tmp_path / "idx").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 2**22, 2**10, 2**10))
    (tmp_path / "npz").write_bytes(npz_of(npy_header((2**40,)) + bytes(9)))
    (tmp_path / "pickle").write_bytes(b"}r\xf0\xff\xff\xffT\xff\xff\xff\x7f.")
    code = f"""
import resource, torch
from diffnotes.files import read_idx, read_npz, read_pickle
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)
for name, read in [('idx', read_idx), ('npz', read_npz), ('pickle', read_pickle)]:
    try: read({str(tmp_path)!r} + '/' + name)
    except ValueError: print('refused')
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["refused"] * 3, done.stderr


def test_only_pictures_of_pillow_have_pixels():
    with pytest.raises(TypeError, match="picture of Pillow; got Tensor"):
        to_pixels(torch.zeros(1, 4, 4))


@pytest.mark.parametrize("read", [read_idx, read_npz, read_pickle, read_image, read_cifar10])
@pytest.mark.parametrize("path", [5, None, [1], b"abc"])
def test_a_path_is_text_or_a_path(read, path):
    with pytest.raises(TypeError, match="the path of a file must be text or a Path; got "):
        read(path)


@pytest.mark.parametrize("size", [(1,), (1, 2, 3), ()])
def test_a_size_is_one_side_or_two(size):
    picture = Image.new("L", (4, 4))
    with pytest.raises(ValueError, match=r"size must be a side or \(height, width\)"):
        to_pixels(picture, size=size)
