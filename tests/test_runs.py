"""Runs: steps as functions of the seed, averages, what is written, and what is refused."""

import errno
import json
import math
import os
import random
import signal
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from diffnotes import checkpoints, runs
from diffnotes.batches import SCHEDULES, Batches, batch_indices, seed_of, step_size, stream
from diffnotes.denoisers import Denoiser
from diffnotes.mixtures import GaussianMixture
from diffnotes.networks import MLP, UNet
from diffnotes.pretrained import load
from diffnotes.processes import VP, Cosine
from diffnotes.runs import posthoc, read_run, train
from diffnotes.training import ema_decay, gamma_of, power_decay

pytest.importorskip("accelerate")
POINTS = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3
DATA = POINTS, LABELS
NAN = POINTS.clone()
NAN[3, 1] = float("nan")


def model(predicts="v", process=None, seed=0, **options):
    torch.manual_seed(seed)
    net = MLP(2, 8, 1, **{"n_classes": 3} | options)
    nn.init.normal_(net.last.weight, std=0.1)
    return Denoiser(net, process or Cosine(), predicts, (2,), sigma_data=0.8)


def unlabelled(**options):
    return model(n_classes=None, **options)


def flat(denoiser):
    return torch.cat([p.detach().flatten() for p in denoiser.parameters()])


def quick(denoiser, data=DATA, **options):
    return train(denoiser, data, **{"steps": 5, "batch_size": 8, "progress": False} | options)


def test_trained_weights_are_the_average_of_the_path():
    net, path = model(), []
    start = flat(net)
    averaged = quick(net, ema=0.5, callback=lambda k, value: path.append(flat(net)))
    for k, weights in enumerate(path):
        decay = min(0.5, (k + 1) / (k + 10))
        start = decay * start + (1 - decay) * weights
    torch.testing.assert_close(flat(averaged), start)
    assert not torch.equal(flat(averaged), flat(net))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_averaged_in_float32(dtype):
    net, path = model().to(dtype), []
    exact = flat(net).double()
    steps = 300 if dtype == torch.bfloat16 else 60
    averaged = quick(net, steps=steps, callback=lambda k, value: path.append(flat(net).double()))
    for k, weights in enumerate(path):
        exact = ema_decay(k) * exact + (1 - ema_decay(k)) * weights
    assert averaged.dtype == net.dtype == dtype and flat(averaged).dtype == dtype
    tolerance = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(flat(averaged).double(), exact, rtol=tolerance, atol=1e-5)


class Norm(nn.Module):
    """A network with a buffer that training changes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, t, cond=None):
        return self.norm(x)


def test_buffers_are_copied():
    denoiser = Denoiser(Norm(), Cosine(), "v", (2,))
    averaged = quick(denoiser)
    assert averaged.net.norm.num_batches_tracked == 5
    assert torch.equal(averaged.net.norm.running_mean, denoiser.net.norm.running_mean)
    assert averaged.net.norm.running_mean.any()


def test_result_is_a_new_denoiser():
    net = model().train()
    averaged = quick(net)
    assert averaged is not net and averaged.net is not net.net and averaged.process is net.process
    for name in ("predicts", "shape", "time", "sigma_data"):
        assert getattr(averaged, name) == getattr(net, name)
    assert net.net.training and not averaged.net.training
    assert all(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in averaged.parameters())


@pytest.mark.parametrize("data", [
    POINTS, (POINTS,), (POINTS, LABELS), TensorDataset(POINTS), TensorDataset(POINTS, LABELS)])
def test_seed_decides(data):
    bare = torch.is_tensor(data) or len(data) == 1 or len(data[0]) == 1
    make = unlabelled if bare else model
    first, again, other = (flat(quick(make(), data, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_datasets_and_tensors_agree():
    pair = flat(quick(model(), (POINTS, LABELS)))
    assert torch.equal(pair, flat(quick(model(), TensorDataset(POINTS, LABELS))))
    plain = flat(quick(unlabelled(), POINTS))
    assert torch.equal(plain, flat(quick(unlabelled(), TensorDataset(POINTS))))


def test_dropout_repeats_and_global_randomness_is_untouched():
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        net = Denoiser(UNet(channels=4, dropout=0.5), Cosine(), "v", shape=(1, 4, 4))
        images = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(123 + len(weights))
        before = torch.get_rng_state()
        quick(net, images)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(flat(net))
    assert torch.equal(*weights)


class Spy(nn.Module):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, x, t, cond=None):
        self.seen.append((t, cond))
        return self.scale * x


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_labels_are_dropped_as_often_as_asked(share):
    spy = Denoiser(Spy(), Cosine(), "v", (2,))
    quick(spy, (POINTS, LABELS), steps=50, batch_size=40, label_dropout=share)
    labels = torch.cat([cond for _, cond in spy.net.seen])
    dropped = (labels == -1).double().mean()
    assert abs(dropped - share) <= 4 * (share * (1 - share) / 2000) ** 0.5
    kept = labels[labels >= 0].bincount(minlength=3).double()
    assert kept.max() < 1.3 * kept.min()


def test_every_epoch_sees_every_label_once():
    spy = Denoiser(Spy(), Cosine(), "v", (2,))
    quick(spy, (POINTS, torch.arange(40)), steps=12, batch_size=10, label_dropout=0.0)
    labels = torch.cat([cond for _, cond in spy.net.seen])
    assert all(sorted(epoch.tolist()) == list(range(40)) for epoch in labels.split(40))


def test_batches_may_be_larger_than_the_data():
    spy = Denoiser(Spy(), Cosine(), "v", (2,))
    quick(spy, (POINTS[:3], torch.arange(3)), steps=2, batch_size=7, label_dropout=0.0)
    assert [len(t) for t, _ in spy.net.seen] == [7, 7]


def test_callback_and_bar(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    seen = []
    quick(model(), progress=True, callback=lambda k, value: seen.append((k, value)))
    assert [k for k, _ in seen] == list(range(5))
    assert all(value.shape == () and not value.requires_grad for _, value in seen)
    assert "5/5" in capsys.readouterr().err
    quick(model())
    assert capsys.readouterr().err == ""


def test_training_lowers_the_loss():
    values = []
    law = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.01)
    x0 = law.sample(500, generator=torch.Generator().manual_seed(0)).float()
    quick(unlabelled(), x0, steps=300, batch_size=128, lr=1e-2, weighting="v",
          callback=lambda k, value: values.append(value.item()))
    assert sum(values[-50:]) < 0.8 * sum(values[:50])


def test_half_precision_data_and_float64_networks():
    assert quick(unlabelled().to(torch.float64), POINTS.half()).dtype == torch.float64
    assert flat(quick(unlabelled(), POINTS.double())).isfinite().all()


class Strings(Dataset):
    """Items that are no tensors."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return "x"


class Endless(IterableDataset):
    """No length, and no items by number."""

    def __iter__(self):
        return iter(POINTS)


@pytest.mark.parametrize(("data", "error", "message"), [
    (POINTS.long(), TypeError, "floating-point"),
    (POINTS[:0], ValueError, "n > 0"),
    (TensorDataset(POINTS[:0]), ValueError, "empty"),
    (POINTS[:, :1], ValueError, "data"),
    (torch.zeros(5), ValueError, "data must have shape"),
    (NAN, ValueError, "not finite"),
    ((POINTS, LABELS[:5]), ValueError, "labels must be int64"),
    ((POINTS, LABELS[:, None]), ValueError, "labels must be int64"),
    ((POINTS, LABELS.float()), TypeError, "labels must be an int64 tensor; got torch.float32"),
    ((POINTS, LABELS.int()), TypeError, "labels must be an int64 tensor; got torch.int32"),
    ((POINTS, LABELS.tolist()), TypeError, "labels must be an int64 tensor; got list"),
    ((POINTS, LABELS + 1), ValueError, "0 to 2; got 1 to 3"),
    ((POINTS, LABELS - 2), ValueError, "0 to 2; got -2 to 0"),
    ((POINTS, LABELS, LABELS), ValueError, "got 3 items"),
    ((), ValueError, "got 0 items"),
    (TensorDataset(POINTS, LABELS, LABELS), ValueError, "got 3 items"),
    (TensorDataset(POINTS, LABELS.float()), TypeError, "labels must be an int64"),
    (TensorDataset(POINTS, LABELS + 1), ValueError, "0 to 2; got"),
    (Strings(), TypeError, "floating-point"),
    (None, TypeError, "data must be a floating-point tensor, got NoneType"),
    (POINTS.to_sparse(), TypeError, "data must be a dense tensor; got torch.sparse_coo"),
    (Endless(), TypeError, "a Dataset with a length, whose items have numbers; got Endless"),
    (POINTS, ValueError, "the network has 3 classes and the data no labels: give them, with -1"),
    (TensorDataset(POINTS), ValueError, "3 classes and the data no labels"),
])
def test_refused_data(data, error, message):
    with pytest.raises(error, match=message):
        quick(model(), data)


def test_labels_for_a_network_without_classes_are_refused():
    with pytest.raises(ValueError, match="data have labels and the network no classes"):
        quick(unlabelled(), DATA)
    quick(model(), (POINTS, torch.full((40,), -1)))
    quick(Denoiser(Norm(), Cosine(), "v", (2,)), DATA)


def test_data_that_require_gradients_get_none():
    points = POINTS.clone().requires_grad_()
    quick(model(), (points, LABELS))
    assert points.grad is None


def test_one_wrong_label_is_found_before_the_first_step():
    labels, seen = LABELS.clone(), []
    labels[17] = 3
    with pytest.raises(ValueError, match="0 to 2; got 0 to 3"):
        quick(model(), (POINTS, labels), steps=1, callback=lambda k, value: seen.append(k))
    assert not seen
    assert quick(model(), (POINTS, LABELS - 1)).shape == (2,)


@pytest.mark.parametrize(("seed", "error"), [
    (1.5, TypeError), (True, TypeError), (None, TypeError), ("0", TypeError),
    (-1, ValueError), (2**64, ValueError), (2**70, ValueError)])
def test_refused_seeds(seed, error):
    with pytest.raises(error, match="seed must be"):
        quick(model(), seed=seed)


def test_every_other_seed_is_taken():
    assert torch.equal(flat(quick(model(), seed=np.int64(3))), flat(quick(model(), seed=3)))
    quick(model(), seed=2**64 - 1)


@pytest.mark.parametrize("thing", [MLP(2, 8, 1), GaussianMixture(torch.zeros(1, 2), 1.0), VP()])
def test_only_denoisers_are_trained(thing):
    message = rf"denoiser must be a Denoiser\(net, .*bare {type(thing).__name__}"
    with pytest.raises(TypeError, match=message):
        quick(thing)


@pytest.mark.parametrize("options", [
    dict(steps=0), dict(steps=-3), dict(batch_size=0), dict(lr=0.0), dict(lr=float("nan")),
    dict(label_dropout=1.0), dict(label_dropout=-0.1), dict(ema=1.0)])
def test_refused_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        quick(model(), **options)


@pytest.mark.parametrize("options", [
    dict(lr="0.1"), dict(lr=None), dict(lr=torch.ones(())), dict(clip="1"), dict(ema=None),
    dict(label_dropout="x"), dict(minutes="1", steps=None), dict(steps=2.5), dict(warmup=2.5),
    dict(workers="1"), dict(workers=None), dict(log_every=None), dict(compile="default"),
    dict(resume=None), dict(augment=3), dict(callback=3), dict(profiles=0.1),
    dict(profiles="0.1"), dict(profiles=("a",)), dict(out=3), dict(out="")])
def test_options_of_another_kind_are_named(options):
    name = next(iter(options))
    with pytest.raises(TypeError, match=f"{name} must be .*got"):
        quick(model(), **options)


def test_other_refusals_name_the_option(tmp_path):
    for options in (dict(warmup=-1), dict(workers=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 0.*got -1"):
            quick(model(), **options)
    with pytest.raises(ValueError, match="profiles must differ"):
        quick(model(), profiles=(0.1, 0.1), out=tmp_path)
    for share in (-1.0, float("nan"), None):
        with pytest.raises(ValueError, match="schedule must return a number >= 0; got"):
            quick(model(), schedule=lambda u, share=share: share)
    for result in (None, POINTS[:2], POINTS[:8, :1]):
        with pytest.raises(ValueError, match=r"augment must return samples \(8, 2\); got"):
            quick(model(), augment=lambda x, generator, result=result: result)


def test_numbers_of_numpy_are_numbers(tmp_path):
    options = dict(lr=np.float32(0.25), batch_size=np.int64(8), clip=np.float64(0.5))
    quick(model(), out=tmp_path, profiles=[np.float64(0.1)], **options)
    assert read_run(tmp_path)["recipe"]["lr"] == 0.25


def test_nothing_to_train():
    law = GaussianMixture(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="no parameters"):
        quick(law.denoiser(VP()))


def test_edm_needs_sigma_data():
    net = model()
    net.sigma_data = None
    with pytest.raises(ValueError, match="sigma_data"):
        quick(net, weighting="edm")


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step():
    class Breaks(Spy):
        def forward(self, x, t, cond=None):
            out = super().forward(x, t, cond)
            return out * float("nan") if len(self.seen) == 4 else out

    seen = []
    denoiser = Denoiser(Breaks(), Cosine(), "v", (2,))
    with pytest.raises(FloatingPointError, match="loss is nan at step 3"):
        quick(denoiser, callback=lambda k, value: seen.append(k))
    assert seen == [0, 1, 2, 3]


def test_a_bad_item_of_a_dataset_is_noticed():
    bad = POINTS.clone()
    bad[1:] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0"):
        quick(unlabelled(), TensorDataset(bad))



# --- What step k sees ---------------------------------------------------------


def test_seeds_differ_in_the_bits_that_a_cpu_hears():
    for stream_name in ("order", "draws"):
        words = {seed_of(3, stream_name, k) % 2**32 for k in range(100_000)}
        assert len(words) == 100_000
    assert seed_of(0, "draws", 5) != seed_of(0, "items", 5) != seed_of(1, "items", 5)
    assert 0 <= seed_of(2**64 - 1, "network", 2**40) < 2**64
    with pytest.raises(ValueError, match="draws"):
        seed_of(0, "noise", 1)


@pytest.mark.parametrize(("n", "size"), [(10, 4), (10, 10), (3, 8), (7, 1)])
def test_batches_are_consecutive_pieces_of_permutations(n, size):
    steps = [batch_indices(n, size, 5, k) for k in range(20)]
    assert all(len(step) == size for step in steps)
    for epoch in torch.cat(steps).split(n):
        if len(epoch) == n:
            assert epoch.sort().values.tolist() == list(range(n))
    assert torch.equal(batch_indices(n, size, 5, 17), steps[17])


class Noisy(Dataset):
    """Items that draw from all three global generators."""

    labels = None

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.stack([torch.rand(()), torch.tensor(np.random.rand(), dtype=torch.float32)
                            + random.random()])


@pytest.mark.parametrize("workers", [0, 2])
def test_items_depend_on_their_place_alone(workers):
    supply = Batches(Noisy(), unlabelled(), 4, 0)
    plain = [supply[k][0] for k in range(5)]
    assert not torch.equal(plain[0], plain[1])
    fetched = stream(supply, 2, workers)
    assert torch.equal(next(fetched)[0], plain[2]) and torch.equal(next(fetched)[0], plain[3])
    halves = [Batches(Noisy(), unlabelled(), 4, 0, rank=r, world=2)[2][0] for r in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), plain[2])


class Whole(Dataset):
    """Asked for whole batches."""

    labels = LABELS

    def __len__(self):
        return 40

    def __getitem__(self, i):
        raise AssertionError("asked for an item")

    def batch(self, indices):
        return POINTS[indices], LABELS[indices]


def test_whole_batches_where_the_data_can():
    assert torch.equal(flat(quick(model(), Whole())), flat(quick(model(), (POINTS, LABELS))))


def test_global_generators_are_put_back():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(3), np.random.rand(3), random.random()
    net = unlabelled()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    quick(net, Noisy())
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all()
    assert random.random() == expected[2]


# --- Schedules and parts ------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    rates = [step_size(k, 1000, 2.0, schedule) for k in range(1000)]
    assert math.isclose(rates[0], 2.0 * SCHEDULES[schedule](0) / 100) and max(rates) <= 2.0
    assert all(a >= b for a, b in zip(rates[100:], rates[101:], strict=False))
    last = {"constant": 2.0, "linear": 2e-3, "cosine": 2.0 * (math.pi / 2000) ** 2}
    assert math.isclose(rates[-1], last.get(schedule, 2 / math.sqrt(9.99)), rel_tol=1e-3)
    assert step_size(0, 10, 1.0, lambda u: 0.5, warmup=0) == 0.5


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_add_up_to_the_whole(parts):
    whole, pieces = [], []
    for seen, accumulate in ((whole, 1), (pieces, parts)):
        quick(model().to(torch.float64), (POINTS.double(), LABELS), clip=0.1,
              accumulate=accumulate,
              callback=lambda k, value, seen=seen: seen.append(value.item()))
    np.testing.assert_allclose(pieces, whole, rtol=1e-12)


def test_dropout_and_augmentation_belong_to_a_part():
    def shift(x, generator):
        return x + torch.randn(x.shape, generator=generator)

    a, b = (flat(quick(model(), augment=shift)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, flat(quick(model())))


def test_clipping_bounds_the_gradient():
    net, norms = model(), []
    quick(net, clip=1e-3, callback=lambda k, value: norms.append(
        torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()))
    assert max(norms) <= 1.001e-3


def test_precisions_in_turn_and_the_state_of_accelerate():
    from accelerate import Accelerator

    mine = Accelerator(cpu=True)
    full = flat(quick(model()))
    half = flat(quick(model(), precision="bf16"))
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    torch.testing.assert_close(full, half, atol=0.02, rtol=0.1)
    assert mine.mixed_precision == "no" and torch.equal(flat(quick(model())), full)
    again = model()
    quick(again, precision="bf16")
    assert "forward" not in vars(again.net) and not hasattr(again.net, "_is_accelerate_prepared")


def test_compiled_steps_are_the_same_to_rounding():
    wide = lambda **options: flat(quick(  # noqa: E731
        model().to(torch.float64), (POINTS.double(), LABELS), steps=3, **options))
    torch.testing.assert_close(wide(compile=True), wide(), atol=1e-9, rtol=0)


def test_frozen_parameters_stay():
    net = model()
    net.net.last.weight.requires_grad_(False)
    before = net.net.last.weight.clone()
    quick(net)
    assert torch.equal(net.net.last.weight, before)


# --- What is written ----------------------------------------------------------


def test_a_run_is_its_folder(tmp_path):
    out = tmp_path / "run"
    plain = flat(quick(model(), (POINTS, LABELS), steps=20))
    kept = quick(model(), (POINTS, LABELS), steps=20, out=out, save_every=5, log_every=4)
    assert torch.equal(flat(kept), plain) and torch.equal(flat(load(out)), plain)
    assert [p.name for p in checkpoints.checkpoints(out)] == ["step-00000015", "step-00000020"]
    run = read_run(out)
    assert run["step"] == run["steps"] == 20 and run["recipe"]["seed"] == 0
    assert [line["step"] for line in run["log"]] == [4, 5, 8, 10, 12, 15, 16, 20]
    assert all(line["processes"] == 1 and len(line["by_level"]) == 10 for line in run["log"])
    assert not list(out.rglob("*.tmp"))


def test_the_log_says_what_the_callback_hears(tmp_path):
    heard = []
    quick(model(), steps=6, log_every=3, out=tmp_path / "run",
          callback=lambda k, value: heard.append(value.item()))
    for line in read_run(tmp_path / "run")["log"]:
        assert line["loss"] == pytest.approx(heard[line["step"] - 1]) or line["step"] % 3 == 0
    total = [x for x in read_run(tmp_path / "run")["log"][0]["by_level"] if x is not None]
    assert total and all(x >= 0 for x in total)


@pytest.mark.parametrize("stop", [1, 7, 10])
def test_resumed_is_as_if_never_stopped(tmp_path, stop):
    class Stop(Exception):
        pass

    def halt(k, value):
        if k == stop:
            raise Stop

    options = dict(steps=20, save_every=3, out=tmp_path / "run", log_every=2, profiles=(0.1,))
    with pytest.raises(Stop):
        quick(model(), (POINTS, LABELS), callback=halt, **options)
    resumed = quick(model(seed=5), (POINTS, LABELS), resume=True, **options)
    assert torch.equal(flat(resumed), flat(quick(model(), (POINTS, LABELS), steps=20)))
    other = dict(options, out=tmp_path / "other")
    quick(model(), (POINTS, LABELS), **other)
    ours, theirs = (read_run(o["out"])["log"] for o in (options, other))
    strip = lambda lines: [{k: v for k, v in line.items() if k not in  # noqa: E731
                            ("samples_per_s", "seconds")} for line in lines]
    assert strip(ours) == strip(theirs)


def test_a_finished_run_returns_at_once(tmp_path):
    options = dict(out=tmp_path / "run", resume=True)
    first = quick(model(), **options)
    calls = []
    again = quick(model(seed=7), callback=lambda *told: calls.append(told), **options)
    assert torch.equal(flat(first), flat(again)) and not calls
    longer = quick(model(seed=7), steps=8, callback=lambda k, value: calls.append(k), **options)
    assert calls == [5, 6, 7] and not torch.equal(flat(longer), flat(first))


@pytest.mark.parametrize("change", [
    dict(lr=1e-3), dict(batch_size=4), dict(seed=1), dict(weighting="v"), dict(ema=0.5),
    dict(schedule="linear"), dict(times="log_normal"), dict(profiles=(0.2,)), dict(clip=1.0)])
def test_another_recipe_is_refused(tmp_path, change):
    quick(model(), out=tmp_path / "run")
    with pytest.raises(ValueError, match=f"another run: {next(iter(change))} is .* there and"):
        quick(model(), out=tmp_path / "run", resume=True, **change)


def test_other_data_and_networks_are_refused(tmp_path):
    quick(model(), out=tmp_path / "run")
    other = POINTS.clone()
    other[11, 0] += 1
    cases = (((other, LABELS), "data.sha256"), ((POINTS[:30], LABELS[:30]), "data.n"),
             ((POINTS, -LABELS.clamp(max=1)), "data"))
    for data, match in cases:
        with pytest.raises(ValueError, match=match):
            quick(model(), data, out=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="denoiser.predicts is 'v' there and 'eps' here"):
        quick(model("eps"), out=tmp_path / "run", resume=True)
    wide = Denoiser(MLP(2, 16, 1, n_classes=3), Cosine(), "v", (2,), sigma_data=0.8)
    with pytest.raises(ValueError, match="denoiser.network.hidden"):
        quick(wide, out=tmp_path / "run", resume=True)


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    quick(model(), out=tmp_path / "run")
    with pytest.raises(FileExistsError, match="resume=True"):
        quick(model(), out=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="other"):
            quick(model(), out=tmp_path / "other", resume=resume)
    quick(model(), out=tmp_path / "new", resume=True)


@pytest.mark.parametrize("name", runs._OURS)
def test_files_of_a_runs_names_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"holds {name} and no checkpoint"):
        quick(model(), out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_other_files_are_left_alone(tmp_path):
    mine = [tmp_path / name for name in ("thesis.tex", ".mine.tmp")]
    for path in mine:
        path.write_text("mine")
    quick(model(), out=tmp_path)
    (tmp_path / "checkpoints" / "step-mine").write_text("mine")
    (tmp_path / "averages").mkdir(), (tmp_path / "averages" / "step-mine.txt").write_text("mine")
    quick(model(), out=tmp_path, steps=8, resume=True)
    assert all(path.read_text() == "mine" for path in mine)
    assert read_run(tmp_path)["step"] == 8 and read_run(tmp_path)["averages"] == []


def test_out_is_a_folder_with_room(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="out must be a folder; .*file is a file"):
        quick(model(), out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(OSError, match="step 0 was not saved: File exists .*checkpoints"):
        quick(model(), out=tmp_path)


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    quick(model(), out=tmp_path)
    with pytest.raises(ValueError, match="is at step 5 already; got steps=3"):
        quick(model(), out=tmp_path, steps=3, resume=True)


def test_a_model_that_was_not_written_is_written_on_resuming(tmp_path, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    quick(model(), out=tmp_path, steps=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.pretrained, "save", killed)
        patch.setattr(runs, "_begin", lambda run, begin=runs._begin: (
            patch.setattr(runs, "_publish", lambda run: None), begin(run),
            patch.setattr(runs, "_publish", killed)))
        quick(model(), out=tmp_path, steps=8, save_every=8, resume=True)
    assert read_run(tmp_path)["step"] == 8
    assert runs.pretrained.read_config(tmp_path)["info"]["step"] == 4
    whole = quick(model(), out=tmp_path, steps=8, save_every=8, resume=True)
    assert torch.equal(flat(load(tmp_path)), flat(whole))


class Flip:
    """An augmentation that is an object."""

    def __call__(self, x, generator):
        return -x


@pytest.mark.parametrize("augment", [Flip(), partial(lambda x, generator, a: a * x, a=2.0)])
def test_augmentations_that_are_objects_go_into_the_recipe(tmp_path, augment):
    for resume in (False, True):
        quick(model(), out=tmp_path, augment=augment, resume=resume)
    with pytest.raises(ValueError, match="another run: augment is"):
        quick(model(), out=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no tensors", "state", "garbage"])
def test_a_damaged_checkpoint_steps_back(tmp_path, damage):
    out = tmp_path / "run"
    whole = quick(model(), steps=10, save_every=5, out=out)
    newest = checkpoints.checkpoints(out)[-1]
    tensors, state = newest / "state.safetensors", newest / "state.json"
    data = bytearray(tensors.read_bytes())
    if damage == "cut":
        tensors.write_bytes(data[:-7])
    elif damage == "flipped":
        data[-3] ^= 1
        tensors.write_bytes(data)
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "state":
        state.write_text(state.read_text().replace('"seconds": 0', '"seconds": 1'))
    else:
        state.write_text("[]")
    with pytest.warns(UserWarning, match="step-00000010 is no sound checkpoint"):
        resumed = quick(model(seed=4), steps=10, save_every=5, out=out, resume=True)
    assert torch.equal(flat(resumed), flat(whole))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_run(out)["step"] == 10


def test_no_sound_checkpoint_at_all(tmp_path):
    quick(model(), out=tmp_path / "run")
    for folder in checkpoints.checkpoints(tmp_path / "run"):
        (folder / "state.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the checkpoints"):
        quick(model(), out=tmp_path / "run", resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_run(tmp_path / "nothing")


def test_a_line_cut_short_is_forgotten(tmp_path):
    quick(model(), out=tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert read_run(tmp_path)["log"][-1]["step"] == 5
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b"ss\n[]\n\0\0\xff\n" + b'{"step": 9, "loss": 1.0}\n')
    assert [line["step"] for line in read_run(tmp_path)["log"]][-2:] == [5, 9]
    checkpoints.truncate_log(tmp_path, 3)
    assert all(line["step"] <= 3 for line in read_run(tmp_path)["log"])


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def full(folder, step, tensors, facts, **options):
        if step == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, step, tensors, facts, **options)

    write = checkpoints.write_checkpoint
    monkeypatch.setattr(runs, "write_checkpoint", full)
    with pytest.raises(OSError, match="step 10 was not saved: No space left on device; the last"):
        quick(model(), steps=20, save_every=5, out=out)
    monkeypatch.undo()
    assert load(out).shape == (2,) and read_run(out)["step"] == 5
    resumed = quick(model(), steps=20, save_every=5, out=out, resume=True)
    assert torch.equal(flat(resumed), flat(quick(model(), steps=20)))


def test_non_finite_weights_leave_the_last_checkpoint(tmp_path):
    net, out = model(), tmp_path / "run"

    def spoil(k, value):
        if k == 7:
            net.net.last.weight.data[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match="last.weight is not finite after step 7"):
        quick(net, steps=20, save_every=4, out=out, callback=spoil)
    assert read_run(out)["step"] == 4 and flat(load(out)).isfinite().all()


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt),
                                              (signal.SIGTERM, SystemExit)])
def test_an_interrupt_waits_for_the_step_and_saves(tmp_path, number, error):
    before = signal.getsignal(number)
    with pytest.raises(error):
        quick(model(), steps=20, out=tmp_path / "run", save_every=15,
              callback=lambda k, value: signal.raise_signal(number) if k == 3 else None)
    assert read_run(tmp_path / "run")["step"] == 4 and signal.getsignal(number) is before
    resumed = quick(model(), steps=20, out=tmp_path / "run", save_every=15, resume=True)
    assert torch.equal(flat(resumed), flat(quick(model(), steps=20)))


def test_stored_averages_are_power_averages_and_posthoc_finds_them(tmp_path):
    net, path = model(), []
    quick(net, steps=40, out=tmp_path / "run", profiles=(0.05, 0.1), save_every=4, lr=1e-2,
          callback=lambda k, value: path.append(flat(net).double()))
    stored = load_file(tmp_path / "run" / "averages" / "step-00000040.safetensors")
    for width in (0.05, 0.1, 0.08):
        mean = torch.zeros_like(path[0])
        for k, weights in enumerate(path):
            decay = power_decay(k, gamma_of(width))
            mean = decay * mean + (1 - decay) * weights
        names = [name for name, _ in net.net.named_parameters()]
        if width != 0.08:
            ours = torch.cat([stored[f"{width}/{name}"].flatten() for name in names]).double()
            torch.testing.assert_close(ours, mean, atol=1e-5, rtol=1e-5)
        found = flat(posthoc(tmp_path / "run", width)).double()
        torch.testing.assert_close(found, mean, atol=1e-5 if width != 0.08 else 1e-3, rtol=1e-4)
    assert posthoc(tmp_path / "run", 0.1, step=20).net is not None
    with pytest.raises(ValueError, match="no averages up to step 3"):
        posthoc(tmp_path / "run", 0.1, step=3)
    for step, error in ((0, ValueError), (-4, ValueError), (1.5, TypeError), ("4", TypeError)):
        with pytest.raises(error, match="step must be"):
            posthoc(tmp_path / "run", 0.1, step=step)


def test_minutes(tmp_path):
    options = dict(steps=None, minutes=0.01, out=tmp_path / "run")
    result = quick(model(), **options)
    run = read_run(tmp_path / "run")
    assert run["step"] == run["steps"] > 2 and 0.3 < run["seconds"] < 3
    again = quick(model(), resume=True, **options)
    assert torch.equal(flat(again), flat(result))


def test_samples_and_tensorboard(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("tensorboard")
    net = Denoiser(UNet(channels=4, n_classes=2), Cosine(), "v", (1, 4, 4))
    data = torch.rand(16, 1, 4, 4) * 2 - 1, torch.arange(16) % 2
    quick(net, data, out=tmp_path, steps=4, sample_every=2, tensorboard=True)
    pictures = sorted((tmp_path / "samples").glob("*.png"))
    assert [p.name for p in pictures] == ["step-00000002.png", "step-00000004.png"]
    assert image.open(pictures[0]).size == (410, 410)
    assert list((tmp_path / "tensorboard").iterdir())


def test_networks_of_ones_own_keep_their_checkpoints(tmp_path):
    spy = lambda: Denoiser(Spy(), Cosine(), "v", (2,))  # noqa: E731
    first = quick(spy(), out=tmp_path)
    assert not (tmp_path / "config.json").exists() and read_run(tmp_path)["step"] == 5
    assert torch.equal(flat(quick(spy(), out=tmp_path, resume=True)), flat(first))


def test_nothing_is_pickled(tmp_path):
    quick(model(), out=tmp_path)
    kinds = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize(("options", "match"), [
    (dict(steps=None), "either steps or minutes"), (dict(minutes=1.0), "either steps or minutes"),
    (dict(steps=None, minutes=0.0), "minutes must be positive"), (dict(clip=0.0), "clip"),
    (dict(accumulate=9), "no sample for each"), (dict(schedule="step"), "cosine"),
    (dict(times="snr"), "uniform"), (dict(precision="fp8"), "bf16"),
    (dict(resume=True), "resume needs out"), (dict(profiles=(0.1,)), "profiles needs out"),
    (dict(sample_every=2), "sample_every needs out"), (dict(log_every=0), "log_every")])
def test_more_refused_options(options, match):
    with pytest.raises(ValueError, match=match):
        quick(model(), **options)


def test_a_missing_extra_is_one_line(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="^training needs Accelerate: pip install"):
        quick(model())
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs tensorboard: pip install tensorboard"):
        quick(model(), out=tmp_path, tensorboard=True)


def test_a_checkpoint_is_plain_files(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "a")
    folder = checkpoints.write_checkpoint(tmp_path, 7, {"x": torch.arange(3.0)}, {"note": "ü"})
    assert torch.equal(load_file(folder / "state.safetensors")["x"], torch.arange(3.0))
    facts = json.loads((folder / "state.json").read_text())
    assert facts["step"] == 7 and facts["note"] == "ü" and len(facts["sha256"]) == 64
    tensors, read = checkpoints.read_checkpoint(folder)
    assert read["note"] == "ü" and tensors["x"].tolist() == [0, 1, 2]
