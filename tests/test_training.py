"""Training: the loss, times, averages, and runs that repeat or stop as they should."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from diffnotes.ddpm import simple_loss
from diffnotes.denoisers import Denoiser
from diffnotes.mixtures import GaussianMixture
from diffnotes.networks import MLP, UNet
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP, linear_betas
from diffnotes.training import WEIGHTINGS, draw_times, ema_decay, ema_update, loss, train

PROCESSES = [VP(), VE(), SubVP(), Cosine(), EDM(), Flow(), Discrete(linear_betas(50))]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
POINTS = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3


def model(predicts="v", process=None, seed=0, **options):
    torch.manual_seed(seed)
    net = MLP(2, 8, 1, n_classes=3, **options)
    nn.init.normal_(net.last.weight, std=0.1)
    return Denoiser(net, process or Cosine(), predicts, (2,), sigma_data=0.8)


def flat(denoiser):
    return torch.cat([p.detach().flatten() for p in denoiser.parameters()])


def quick(denoiser, data=POINTS, **options):
    return train(denoiser, data, **{"steps": 5, "batch_size": 8, "progress": False} | options)


def draws(n=6):
    generator = torch.Generator().manual_seed(1)
    eps = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return POINTS[:n].double(), (torch.arange(n).double() + 0.5) / n, eps


# --- The loss -----------------------------------------------------------------


@each_process
@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "score", "velocity", "edm"])
def test_simple_is_the_simple_loss(process, predicts):
    x0, t, eps = draws()
    t = 0.1 + 0.8 * t
    net = model(predicts, process).to(torch.float64)
    expected = simple_loss(net, x0, t, eps, LABELS[:6])
    torch.testing.assert_close(loss(net, x0, t=t, eps=eps, cond=LABELS[:6]), expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_is_least_at_the_posterior_mean(weighting):
    law = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]).double(), 0.2)
    x0 = law.sample(4000, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)).double()
    t = 0.2 + 0.6 * draw_times(VP(), 4000).double()
    exact, least = law.denoiser(VP()), {}
    for shift in (-0.1, 0.0, 0.1):
        shifted = lambda x, t, cond, shift=shift: exact(x, t) + shift  # noqa: E731
        biased = Denoiser(shifted, VP(), "x0", (2,), sigma_data=1.0)
        least[shift] = loss(biased, x0, t=t, eps=eps, weighting=weighting).mean().item()
    assert least[0.0] < min(least[-0.1], least[0.1])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_shape_dtype_and_gradient(weighting):
    x0, t, eps = draws()
    net = model().to(torch.float64)
    value = loss(net, x0, t=t, eps=eps, weighting=weighting)
    assert value.shape == (6,) and value.dtype == torch.float64 and (value >= 0).all()
    grads = torch.autograd.grad(value.sum(), list(net.parameters()), allow_unused=True)
    direction = [torch.randn_like(p) for p in net.parameters()]
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None)
    sides = []
    for step in (1e-6, -1e-6):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(step * d)
        sides.append(loss(moved, x0, t=t, eps=eps, weighting=weighting).sum())
    torch.testing.assert_close((sides[0] - sides[1]) / 2e-6, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_at_one_time_for_all(weighting):
    x0, _, eps = draws()
    net = model().to(torch.float64)
    expected = loss(net, x0, t=torch.full((6,), 0.5).double(), eps=eps, weighting=weighting)
    for t in (0.5, torch.tensor(0.5).double()):
        torch.testing.assert_close(loss(net, x0, t=t, eps=eps, weighting=weighting), expected)
    assert loss(net.to(torch.float32), x0.float(), t=0.5, eps=eps.float()).dtype == torch.float32


def test_loss_is_a_mean_over_a_sample():
    silent = Denoiser(lambda x, t, cond: torch.zeros_like(x), VP(), "eps", (2, 3))
    eps = torch.full((4, 2, 3), 2.0)
    value = loss(silent, torch.zeros(4, 2, 3), t=torch.full((4,), 0.5), eps=eps)
    torch.testing.assert_close(value, torch.full((4,), 4.0))


def test_unknown_weighting_lists_the_valid_ones():
    x0, t, eps = draws()
    for call in (lambda: loss(model(), x0, t=t, eps=eps, weighting="snr"),
                 lambda: quick(model(), weighting="snr")):
        with pytest.raises(ValueError) as error:
            call()
        assert all(name in str(error.value) for name in WEIGHTINGS)


# --- Times --------------------------------------------------------------------


@each_process
@pytest.mark.parametrize("n", [1, 7, 128])
def test_times_one_in_each_part(process, n):
    t = draw_times(process, n, generator=torch.Generator().manual_seed(0))
    assert t.shape == (n,) and t.dtype == torch.float32 and (t.diff() >= 0).all()
    if isinstance(process, Discrete):
        k = t.double() * process.n_steps
        torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-4)
        assert k.min() >= 0.5 and k.max() <= process.n_steps + 0.5
    else:
        share = (t - process.t_min) / (process.t_max - process.t_min) * n
        assert ((share - torch.arange(n) > -1e-3) & (share - torch.arange(n) < 1 + 1e-3)).all()
        assert t.min() >= process.t_min * (1 - 1e-6) and t.max() <= process.t_max


def test_chain_steps_are_equally_likely():
    t = draw_times(Discrete(linear_betas(50)), 20_000)
    assert (t * 50).round().long().bincount(minlength=51).tolist() == [0] + 50 * [400]


# --- Averages -----------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.9999))
def test_decay(k, limit):
    decay = ema_decay(k, limit)
    assert decay == min(limit, (k + 1) / (k + 10)) and decay <= ema_decay(k + 1, limit)


@pytest.mark.parametrize("arguments", [(-1,), (0, -0.1), (0, 1.1), (0, float("nan"))])
def test_senseless_decays(arguments):
    with pytest.raises(ValueError, match="k must be at least 0"):
        ema_decay(*arguments)


def test_senseless_numbers_of_times():
    for n, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="n must be"):
            draw_times(VP(), n)


def test_update_is_the_formula():
    average, current = [torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)]
    expected = [0.9 * a + 0.1 * c for a, c in zip(average, current, strict=True)]
    ema_update(average, current, 0.9)
    torch.testing.assert_close(average, expected)


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
    averaged = quick(net, steps=300, callback=lambda k, value: path.append(flat(net).double()))
    for k, weights in enumerate(path):
        exact = ema_decay(k) * exact + (1 - ema_decay(k)) * weights
    assert averaged.dtype == net.dtype == dtype and flat(averaged).dtype == dtype
    tolerance = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(flat(averaged).double(), exact, rtol=tolerance, atol=1e-5)


def test_an_average_may_be_wider_than_what_it_averages():
    average = [torch.ones(3)]
    for _ in range(1000):
        ema_update(average, [torch.zeros(3, dtype=torch.bfloat16)], 0.999)
    torch.testing.assert_close(average[0], torch.full((3,), 0.999**1000), rtol=1e-4, atol=0)
    with pytest.raises(ValueError):
        ema_update(average, [], 0.9)


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


# --- Runs ---------------------------------------------------------------------


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
    first, again, other = (flat(quick(model(), data, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_datasets_and_tensors_agree():
    pair = flat(quick(model(), (POINTS, LABELS)))
    assert torch.equal(pair, flat(quick(model(), TensorDataset(POINTS, LABELS))))
    assert not torch.equal(pair, flat(quick(model(), POINTS)))


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
    quick(model(), x0, steps=300, batch_size=128, lr=1e-2, weighting="v",
          callback=lambda k, value: values.append(value.item()))
    assert sum(values[-50:]) < 0.8 * sum(values[:50])


def test_half_precision_data_and_float64_networks():
    assert quick(model().to(torch.float64), POINTS.half()).dtype == torch.float64
    assert flat(quick(model(), POINTS.double())).isfinite().all()


# --- What is refused ----------------------------------------------------------

NAN = POINTS.clone()
NAN[3, 1] = float("nan")


class Strings(Dataset):
    """Items that are no tensors."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return "x"


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
])
def test_refused_data(data, error, message):
    with pytest.raises(error, match=message):
        quick(model(), data)


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
        quick(model(), TensorDataset(bad))
