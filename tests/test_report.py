"""Reports: what goes in, what comes out, what is refused; and verdicts on laws that are known."""

import hashlib
import json
import math
import warnings

import pytest
import torch
from torch import nn

from diffnotes import report as reports
from diffnotes.data import DIGIT_LEVELS, Levels, digits
from diffnotes.denoisers import Denoiser
from diffnotes.metrics import Estimate, proportion
from diffnotes.mixtures import Empirical, Gaussian, GaussianMixture
from diffnotes.networks import UNet
from diffnotes.processes import EDM, VE, VP, Cosine
from diffnotes.report import (
    Report,
    Row,
    evaluate,
    held_out_bits,
    judge,
    load_features,
    random_features,
)

CENTRES = torch.tensor([[-2.0, 0.0, 1.0], [2.0, 0.5, -1.0]])
LAW = GaussianMixture(CENTRES, torch.tensor([0.3, 0.5]))
ALWAYS = {
    "Frechet, as computed",
    "Frechet, bias removed",
    "kernel distance",
    "sliced Wasserstein",
    "precision",
    "recall",
    "density",
    "coverage",
}
COPYING = {"Frechet to held-out data", "nearer to training set", "tied to training set"}


def draw(n, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=g)
    return LAW.sample(n, cond=labels, generator=g), labels


TRAIN, HELD_OUT = draw(300, 0), draw(120, 1)


@pytest.fixture(scope="module")
def honest():
    denoiser = LAW.denoiser(Cosine())
    return evaluate(denoiser, (TRAIN, HELD_OUT), n=200, conditional=True, steps=30)


def test_a_report_has_all_rows_and_their_sizes(honest):
    assert {row.name for row in honest.rows} == ALWAYS | COPYING | {"read as asked"}
    assert honest["read as asked"].model.n == (200,)
    assert honest["read as asked"].real.n == (120,)
    assert honest["kernel distance"].model.n == honest["kernel distance"].real.n == (150, 150)
    assert honest["Frechet to held-out data"].model.n == (120, 120)
    assert honest["tied to training set"].model.n == (200, 300, 120)
    assert honest.samples.shape == (200, 3) and honest.asked.shape == (200,)
    for row in honest.rows:
        assert row.model.low <= row.model.value <= row.model.high


def test_an_exact_model_is_told_from_data_in_no_row(honest):
    for row in honest.rows:
        gap = row.excess
        assert gap.low - 0.5 * (gap.high - gap.value) <= 0 <= gap.high + (gap.high - gap.value)


def test_about_says_what_was_done(honest):
    about = honest.about
    assert about["samples"] == 200 and about["training images"] == 300
    assert about["held-out images"] == 120 and about["evaluations"] == 59
    assert about["features"].startswith("raw pixels")
    assert about["classifier"].startswith("label of the nearest")
    assert about["sampler"] == "heun" and about["guidance"] == 1.0 and about["seed"] == 0


def test_it_prints_and_is_json(honest):
    text = str(honest)
    assert all(row.name in text for row in honest.rows) and "raw pixels" in text
    assert "150, 150" in text and max(map(len, text.splitlines()[:-1])) < 120
    back = json.loads(json.dumps(honest.to_dict()))
    assert back["about"] == honest.about and list(back["rows"]) == [r.name for r in honest.rows]
    row = back["rows"]["coverage"]
    assert row["model"]["value"] == honest["coverage"].model.value
    assert row["real"]["n"] == [150, 150] and row["wanted"] == "as real"
    with pytest.raises(KeyError, match="kernel distance"):
        honest["FID"]


def test_the_seed_alone_decides(honest):
    denoiser = LAW.denoiser(Cosine())
    state = torch.get_rng_state()
    again = evaluate(denoiser, (TRAIN, HELD_OUT), n=200, conditional=True, steps=30, batch_size=9)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.allclose(again.samples, honest.samples, atol=1e-5)
    assert torch.equal(again.asked, honest.asked)
    other = evaluate(denoiser, (TRAIN, HELD_OUT), n=200, conditional=True, steps=30, seed=1)
    assert not torch.allclose(other.samples, honest.samples)


def test_labels_are_asked_as_often_as_the_data_have_them():
    x, y = torch.randn(100, 3), torch.arange(100) < 30
    asked = reports._labels_for(LAW.denoiser(VP()), reports._Set(x, y.long()), 100, True, 0)
    assert asked.sum() == 30
    twice = reports._labels_for(LAW.denoiser(VP()), reports._Set(x, y.long()), 200, True, 0)
    assert twice.sum() == 60


def test_faults_are_found():
    honest_samples, labels = draw(200, 2)
    pair = (TRAIN, HELD_OUT)
    copies = judge(TRAIN[0][:200], pair)
    assert copies["nearer to training set"].model.value == 1
    assert copies["tied to training set"].excess.low > 0.3
    wrong = judge(honest_samples, pair, asked=1 - labels)
    assert wrong["read as asked"].model.high < 0.1 < 0.9 < wrong["read as asked"].real.low
    one_mode = judge(draw(400, 3)[0][draw(400, 3)[1] == 0], pair)
    assert one_mode["recall"].excess.high < 0 and one_mode["coverage"].excess.high < 0
    shifted = judge(honest_samples + 1, pair)
    for name in ("Frechet, bias removed", "kernel distance", "sliced Wasserstein"):
        assert shifted[name].model.low > 0 and shifted[name].excess.low > 0
    fine = judge(honest_samples, pair)
    assert fine["tied to training set"].model.low < 0 < fine["tied to training set"].model.high


def test_samples_in_order_of_class_are_mixed_before_they_are_cut():
    x, y = draw(600, 4)
    report = judge(x[y.argsort()], (TRAIN, HELD_OUT))
    assert report["recall"].excess.low < 0 < report["recall"].excess.high
    assert report["Frechet, bias removed"].model.low < 0.1


def test_without_held_out_data_nothing_is_said_of_copying():
    for data in (TRAIN[0], TRAIN, list(TRAIN)):
        report = judge(draw(50, 5)[0], data)
        assert {row.name for row in report.rows} == ALWAYS
        assert report.about["held-out images"] == 0
    with_labels = judge(*draw(50, 5)[:1], TRAIN, asked=draw(50, 5)[1])
    assert with_labels["read as asked"].real is None
    assert with_labels.to_dict()["rows"]["read as asked"]["real"] is None
    assert "read as asked" in str(with_labels)
    with pytest.raises(ValueError, match="no value for real data"):
        _ = with_labels["read as asked"].excess


class Stored:
    """What `data.Images` offers."""

    def __init__(self, x, y, levels=None):
        self.x, self.y, self.levels = x, y, levels

    def tensors(self):
        return self.x, self.y


def test_images_bring_their_labels_and_levels():
    levels = Levels(9)
    train, held_out, found = reports._as_sets((Stored(*TRAIN, levels), Stored(*HELD_OUT)))
    assert found is levels and torch.equal(held_out.y, HELD_OUT[1])
    train, held_out, found = reports._as_sets(Stored(TRAIN[0], None))
    assert held_out is None and train.y is None and found is None
    assert reports._as_sets(None)[2] is DIGIT_LEVELS


@pytest.mark.parametrize(
    "error, message, data",
    [
        (TypeError, "pair", 3),
        (TypeError, "pair", "digits"),
        (TypeError, "floating", torch.zeros(9, 3, dtype=torch.uint8)),
        (ValueError, "at least 14", torch.zeros(4, 3)),
        (ValueError, "labels", (TRAIN[0], TRAIN[1][:5])),
        (ValueError, "held-out", (TRAIN[0], torch.zeros(9, 2))),
    ],
)
def test_other_data_are_refused(error, message, data):
    with pytest.raises(error, match=message):
        judge(TRAIN[0][:50], data)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, "digits are meant", dict(data=None)),
        (ValueError, "levels", dict(bits=True)),
        (ValueError, "labels", dict(data=TRAIN[0], conditional=True)),
        (ValueError, "sampler", dict(sampler="best")),
        (ValueError, "positive|at least", dict(n=0)),
        (ValueError, "at least", dict(n=3)),
    ],
)
def test_evaluate_refuses(error, message, options):
    with pytest.raises(error, match=message):
        evaluate(LAW.denoiser(VP()), **{"data": TRAIN, "n": 20, "steps": 3, **options})


def test_samples_are_checked():
    for error, bad in (
        (ValueError, torch.zeros(20, 4)),
        (ValueError, torch.full((20, 3), torch.nan)),
        (TypeError, torch.zeros(20, 3, dtype=torch.int64)),
    ):
        with pytest.raises(error):
            judge(bad, TRAIN)


def test_a_network_with_classes_is_asked_for_labels_and_others_are_not():
    data = digits("train")
    for n_classes, asked in ((10, True), (None, False)):
        net = UNet(channels=8, n_classes=n_classes)
        denoiser = Denoiser(net, Cosine(), "v", shape=(1, 8, 8))
        report = evaluate(denoiser, data, n=12, steps=2)
        assert (report.asked is not None) == asked
    assert evaluate(denoiser, data[0], n=12, steps=2).asked is None


class Odd(nn.Module):
    """A network whose config is no function, as in other libraries."""

    config = {"n_classes": 3}

    def forward(self, x, t, cond=None):
        return 0 * x


def test_a_network_of_another_library():
    report = evaluate(Denoiser(Odd(), VP(), "x0", shape=(3,)), TRAIN, n=20, steps=2)
    assert report.asked is None


def test_own_features_and_classifier_are_named():
    def halves(x):
        return x[:, :2]

    def reader(x):
        return torch.stack([-x[:, 0], x[:, 0]], 1)

    x, y = draw(80, 6)
    report = judge(x, TRAIN, asked=y, features=halves, classifier=reader)
    assert report.about["features"] == "halves" and "reader" in report.about["classifier"]
    assert report["read as asked"].model.value > 0.95
    assert judge(x, TRAIN, features=nn.Flatten()).about["features"] == "Flatten"


def test_fallbacks_are_named():
    images = torch.rand(40, 3, 16, 16)
    assert "untrained" in judge(images[:20], images).about["features"]
    assert "pixels" in judge(images[:20, :1, :4, :4], images[:, :1, :4, :4]).about["features"]
    held = digits("test")[0]
    assert "digit_features" in judge(held, digits("train")).about["features"]


def test_random_features_are_reproducible_and_scaled():
    images = torch.rand(60, 3, 20, 24)
    state = torch.get_rng_state()
    first, second, third = (random_features(images, seed)(images) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, second) and not torch.allclose(first, third)
    assert first.shape == (60, 64)
    assert first.mean(0).abs().max() < 1e-4 and abs(first.var(0).mean() - 1) < 1e-4
    with pytest.raises(ValueError, match="shape"):
        random_features(images[:, 0])
    with pytest.raises(TypeError, match="floating"):
        random_features(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))


class Options(nn.Module):
    def forward(self, x, twice: bool = False):
        return 2 * x if twice else 1 * x


def test_features_from_a_file(tmp_path):
    path = tmp_path / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Options()).save(path)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    x = torch.randn(5, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = load_features(path, checksum.upper())
    doubled = load_features(str(path), checksum, prepare=lambda x: x + 1, twice=True)
    assert torch.equal(plain(x), x) and not plain(x).requires_grad
    assert torch.equal(doubled(x), 2 * (x + 1))
    with pytest.raises(ValueError, match="not opened"):
        load_features(path, checksum[:-1] + ("0" if checksum[-1] != "0" else "1"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not opened"):
        load_features(path, checksum)
    path.write_text("no network")
    with pytest.raises(ValueError, match="no TorchScript"):
        load_features(path, hashlib.sha256(b"no network").hexdigest())
    with pytest.raises(FileNotFoundError):
        load_features(tmp_path / "none.pt", checksum)


class Evil:
    """A pickle that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_not_executed(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save(Evil(str(trace)), path)
    with pytest.raises(ValueError, match="no TorchScript"):
        load_features(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert not trace.exists()


def test_the_excess_adds_variances():
    row = Row("x", Estimate(2.0, 1.4, 2.6, (9,)), Estimate(0.5, -0.3, 1.3, (9,)), "0")
    assert row.excess.value == 1.5 and row.excess.n == (9,)
    assert math.isclose(row.excess.high - 1.5, 1.0) and math.isclose(1.5 - row.excess.low, 1.0)


@pytest.mark.parametrize(
    "estimate, text",
    [
        (Estimate(0.98611, 0.97722, 0.99153, (1,)), "0.9861 [0.9772, 0.9915]"),
        (Estimate(1234.5, 1034.5, 1434.5, (1,)), "1234 [1034, 1434]"),
        (Estimate(1.0, 1.0, 1.0, (1,)), "1.000 [1.000, 1.000]"),
        (Estimate(0.1234, 0.0234, 0.2234, (1,)), "0.12 [0.02, 0.22]"),
        (None, ""),
    ],
)
def test_numbers_show_two_digits_of_their_interval(estimate, text):
    assert reports._written(estimate) == text


@pytest.mark.parametrize("process", [VP(), VE(), EDM(), Cosine()], ids=lambda p: type(p).__name__)
def test_bits_of_a_known_law(process):
    """Points on a lattice: log2 K bits in all, and the decoder's share of the tails."""
    levels, points = Levels(17, -4.0, 4.0), torch.tensor([[-2.0], [0.0], [2.0], [3.0]])
    denoiser = Empirical(points).denoiser(process)
    bits = held_out_bits(denoiser, points.repeat(40, 1), levels, divergence="exact", steps=64)
    tail = -math.log2(math.erf(2 / math.sqrt(2)))
    assert abs(bits.value - 2 - tail) < 0.02 and bits.n == (160,)
    assert bits.low < bits.value < bits.high


def test_bits_stand_beside_training_images():
    levels = Levels(33, -4.0, 4.0)
    train, held = (levels.to_values(levels.to_counts(u[0])) for u in (TRAIN, HELD_OUT))
    denoiser = Gaussian(train.mean(0), train.T.cov()).denoiser(VP())
    report = evaluate(denoiser, (train, held), n=20, steps=4, bits=10, levels=levels)
    row = report["bits/dim (real: training)"]
    assert row.model.n == row.real.n == (10,) and 3 < row.model.value < 6
    alone = evaluate(denoiser, train, n=20, steps=4, bits=10, levels=levels)
    assert alone["bits/dim (training)"].model.value == row.real.value
    every = evaluate(denoiser, (train, held), n=20, steps=4, bits=True, levels=levels)
    assert every["bits/dim (real: training)"].model.n == (64,)


def test_held_out_bits_depend_on_the_seed_alone():
    levels, denoiser = Levels(17, -4.0, 4.0), LAW.denoiser(Cosine())
    x = levels.to_values(levels.to_counts(TRAIN[0][:8]))
    state = torch.get_rng_state()
    first, second, third = (held_out_bits(denoiser, x, levels, seed=s) for s in (0, 0, 1))
    assert first == second != third and torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError):
        held_out_bits(denoiser, x[:1], levels)


def test_a_report_can_be_made_by_hand():
    row = Row("hits", proportion(torch.tensor([True, False])), None, "high")
    report = Report((row,), {"seed": 0}, torch.zeros(2, 1))
    assert report["hits"] is row and "seed: 0" in str(report) and "samples" not in repr(report)
