"""Networks: shapes, labels, start at zero, what is refused, gradients, compilation."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffnotes.networks import MLP, UNet, from_config, time_features, zero_init

TINY = dict(channels=4, multipliers=(1, 2))


def opened(net):
    """The network with its zero layers filled at random."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return net


def inputs(net, n=3, dtype=torch.float32):
    torch.manual_seed(0)
    shape = (2,) if isinstance(net, MLP) else (net.config()["in_channels"], 4, 4)
    return torch.randn(n, *shape, dtype=dtype), torch.rand(n, dtype=dtype)


def tiny_nets(**options):
    return [MLP(2, 8, 2, **options), UNet(**TINY, **options)]


each_net = pytest.mark.parametrize("net", tiny_nets(n_classes=3), ids=["MLP", "UNet"])


@settings(deadline=None)
@given(st.integers(1, 20), st.floats(0.1, 1000), st.floats(0, 1))
def test_time_features(half, scale, time):
    features = time_features(torch.tensor([time], dtype=torch.float64), 2 * half, scale)
    cos, sin = features[0, :half], features[0, half:]
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(half, dtype=torch.float64))
    assert abs(sin[0] - math.sin(scale * time)) < 1e-10
    assert abs(cos[0] - math.cos(scale * time)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_angles_are_never_computed_in_half_precision(dtype):
    features = time_features(torch.ones(1, dtype=dtype), 8)
    assert features.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(features[0, 0] - torch.tensor(1000.0).double().cos()) < 1e-4


@pytest.mark.parametrize(("t", "dim", "error"), [
    (torch.rand(3), 5, ValueError), (torch.rand(3), 1, ValueError), (torch.rand(3), 0, ValueError),
    (torch.rand(3), -2, ValueError), (torch.rand(3), 4.0, TypeError),
    (torch.tensor(0.5), 4, ValueError), (torch.rand(3, 1), 4, ValueError)])
def test_senseless_features(t, dim, error):
    with pytest.raises(error, match="dim must be"):
        time_features(t, dim)


@each_net
def test_starts_at_zero(net):
    fresh = from_config(net.config())
    assert fresh(*inputs(net)).abs().max() == 0


@each_net
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype(net, dtype):
    net = opened(copy.deepcopy(net)).to(dtype)
    x, t = inputs(net)
    out = net(x.to(dtype), t, torch.tensor([0, -1, 2]))
    assert out.shape == x.shape and out.dtype == dtype and out.isfinite().all()
    assert net(x[:0].to(dtype), t[:0]).shape == x[:0].shape


@each_net
def test_null_label_is_no_label(net):
    net = opened(copy.deepcopy(net))
    x, t = inputs(net)
    none, null = net(x, t), net(x, t, torch.full((3,), -1))
    assert torch.equal(none, null)
    for label in range(3):
        assert not torch.allclose(net(x, t, torch.full((3,), label)), none)


@each_net
def test_samples_do_not_see_each_other(net):
    net = opened(copy.deepcopy(net)).double()
    x, t = inputs(net, dtype=torch.float64)
    cond = torch.tensor([0, 1, -1])
    alone = [net(x[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(net(x, t, cond), torch.cat(alone))


@each_net
def test_gradients(net):
    net = opened(copy.deepcopy(net)).double()
    x, t = inputs(net, n=1, dtype=torch.float64)
    cond = torch.tensor([1])
    assert torch.autograd.gradcheck(lambda x: net(x, t, cond), x.requires_grad_())
    net(x, t, cond).square().sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@each_net
def test_config_round_trip(net):
    config = json.loads(json.dumps(net.config()))
    again = from_config(config)
    assert again.config() == net.config() and config["name"] == type(net).__name__
    again.load_state_dict(opened(copy.deepcopy(net)).state_dict())
    x, t = inputs(net)
    assert torch.equal(again(x, t), opened(copy.deepcopy(net))(x, t))


def test_unknown_name():
    with pytest.raises(ValueError, match="MLP.*UNet"):
        from_config({"name": "Transformer"})


@each_net
@pytest.mark.parametrize(("change", "error", "message"), [
    (dict(x=torch.zeros(3, 2).long()), TypeError, "floating"),
    (dict(t=torch.rand(2)), ValueError, r"t must have shape \(3,\)"),
    (dict(t=torch.tensor(0.5)), ValueError, r"t must have shape \(3,\)"),
    (dict(cond=torch.tensor([0, 1, 3])), ValueError, "0 to 2; got 0 to 3"),
    (dict(cond=torch.tensor([0, 1, -2])), ValueError, "0 to 2; got -2 to 1"),
    (dict(cond=torch.tensor([0, 1])), ValueError, r"int64 of shape \(3,\)"),
    (dict(cond=torch.zeros(3)), ValueError, "int64"),
])
def test_refused_inputs(net, change, error, message):
    x, t = inputs(net)
    arguments = {"x": x, "t": t, "cond": None} | change
    if not arguments["x"].is_floating_point():
        arguments["x"] = x.long()
    with pytest.raises(error, match=message):
        net(**arguments)


def test_labels_need_classes():
    for net in tiny_nets():
        assert net(*inputs(net)).shape == inputs(net)[0].shape
        with pytest.raises(ValueError, match="n_classes"):
            net(*inputs(net), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(("shape", "message"), [
    ((3, 1, 6, 8), "divisible by 4.*got 6×8"), ((3, 1, 8, 9), "divisible by 4.*got 8×9"),
    ((3, 2, 8, 8), r"\(B, 1, H, W\)"), ((3, 64), r"\(B, 1, H, W\)")])
def test_wrong_images(shape, message):
    net = UNet(channels=4, multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(shape), torch.rand(3))


@pytest.mark.parametrize("options", [
    dict(attention=False), dict(blocks=2), dict(multipliers=(1,)), dict(multipliers=(2, 1, 3)),
    dict(in_channels=3), dict(in_channels=3, out_channels=6), dict(dropout=0.5),
    dict(channels=6)])
def test_configurations(options):
    net = opened(UNet(**TINY | options))
    channels = options.get("in_channels", 1)
    out = net(torch.randn(2, channels, 8, 12), torch.rand(2))
    assert out.shape == (2, options.get("out_channels", channels), 8, 12)
    assert from_config(net.config()).load_state_dict(net.state_dict())


@pytest.mark.parametrize("options", [
    dict(channels=5), dict(channels=0), dict(multipliers=(1, 0)), dict(blocks=0),
    dict(n_classes=0),
    dict(dropout=1.0), dict(dropout=-0.1), dict(out_channels=0)])
def test_senseless_configurations(options):
    with pytest.raises(ValueError):
        UNet(**options)


@pytest.mark.parametrize("build", [lambda **o: MLP(2, 8, 1, **o), UNet], ids=["MLP", "UNet"])
@pytest.mark.parametrize(("options", "error", "message"), [
    (dict(time_scale=float("nan")), ValueError, "time_scale must be positive and finite; got nan"),
    (dict(time_scale=float("inf")), ValueError, "time_scale"),
    (dict(time_scale=0), ValueError, "time_scale"),
    (dict(time_scale=-1.0), ValueError, "time_scale"),
    (dict(time_scale="a"), TypeError, "time_scale must be a number; got 'a'"),
    (dict(time_scale=True), TypeError, "time_scale"),
    (dict(n_classes=2.0), TypeError, "n_classes must be an int")])
def test_senseless_options_of_either(build, options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


@pytest.mark.parametrize(("build", "error", "message"), [
    (lambda: UNet(multipliers=()), ValueError, "multipliers must hold at least one"),
    (lambda: UNet(multipliers=2), TypeError, "multipliers must be a sequence of ints; got 2"),
    (lambda: UNet(multipliers=(1, 2.5)), TypeError, "multipliers must be an int"),
    (lambda: UNet(channels=None), TypeError, "channels must be an int"),
    (lambda: MLP(None), TypeError, "dim must be an int")])
def test_senseless_sizes(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(("options", "shape", "allowed"), [
    (dict(dim=3), (4, 2), r"\(B, 3\) or"), (dict(dim=3), (4,), r"\(B, 3\) or"),
    (dict(dim=1), (4,), r"\(B, 1\) or"), (dict(dim=6), (4, 2, 2), r"\(B, 6\) or"),
    (dict(dim=4, out_channels=2), (4, 2, 2), r"\(B, 4\);")])
def test_samples_of_another_size(options, shape, allowed):
    with pytest.raises(ValueError, match=f"x must have shape {allowed}.*got"):
        MLP(hidden=8, depth=1, **options)(torch.zeros(shape), torch.rand(4))


@each_net
def test_networks_tell_their_classes(net):
    assert net.n_classes == 3 and from_config(net.config() | {"n_classes": None}).n_classes is None


def test_mlp_takes_any_shape_and_more_outputs():
    assert MLP(12, 8, 1)(torch.randn(5, 3, 2, 2), torch.rand(5)).shape == (5, 3, 2, 2)
    assert MLP(3, 8, 1, out_channels=2)(torch.randn(5, 3), torch.rand(5)).shape == (5, 6)
    with pytest.raises(ValueError, match="hidden must be even"):
        MLP(2, 7)


def test_dropout_acts_in_training_only():
    net = opened(UNet(**TINY, dropout=0.5))
    x, t = inputs(net)
    assert not torch.equal(net.train()(x, t), net(x, t))
    assert torch.equal(net.eval()(x, t), net(x, t))


def test_channels_last_gives_the_same():
    net = opened(UNet(**TINY)).double()
    x, t = inputs(net, dtype=torch.float64)
    expected = net(x, t)
    kind = {"memory_format": torch.channels_last}
    last = net.to(**kind)(x.to(**kind), t)
    torch.testing.assert_close(last, expected)


@each_net
def test_traces_without_breaks(net):
    """One graph, labels included, is what torch.compile needs; this backend needs no compiler."""
    net = opened(copy.deepcopy(net)).eval()
    x, t = inputs(net)
    cond = torch.tensor([0, -1, 2])
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, cond), net(x, t, cond))


def test_zero_init_returns_its_layer():
    layer = nn.Linear(3, 2)
    assert zero_init(layer) is layer and not layer.weight.any() and not layer.bias.any()
