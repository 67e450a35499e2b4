"""Networks: shapes, labels, start at zero, what is refused, gradients, compilation, layout."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffnotes.denoisers import Denoiser
from diffnotes.networks import (
    MLP,
    DiT,
    UNet,
    from_config,
    patchify,
    position_features,
    time_features,
    unpatchify,
    zero_init,
)
from diffnotes.processes import Cosine
from diffnotes.samplers import sample

TINY = dict(channels=4, multipliers=(1, 2))
KINDS = ["MLP", "MLP with waves", "UNet", "UNet with heads", "DiT"]


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
    torch.manual_seed(0)
    heads = dict(attention_levels=[0, 1], heads=2)
    return [MLP(2, 8, 2, **options), MLP(2, 8, 2, frequencies=3, **options),
            UNet(**TINY, **options), UNet(**TINY, **heads, **options),
            DiT(1, 2, 8, 2, 2, **options)]


each_net = pytest.mark.parametrize("net", tiny_nets(n_classes=3), ids=KINDS)
each_image_net = pytest.mark.parametrize("net", tiny_nets(n_classes=3)[2:], ids=KINDS[2:])


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


@pytest.mark.parametrize(("t", "dim", "error", "message"), [
    (torch.rand(3), 5, ValueError, "dim must be divisible by 2; got 5"),
    (torch.rand(3), 0, ValueError, "dim must be"), (torch.rand(3), -2, ValueError, "dim must be"),
    (torch.rand(3), 4.0, TypeError, "dim must be"),
    (torch.tensor(0.5), 4, ValueError, r"t must have shape \(B,\), got \(\)"),
    (torch.rand(3, 1), 4, ValueError, r"t must have shape \(B,\), got \(3, 1\)")])
def test_senseless_features(t, dim, error, message):
    with pytest.raises(error, match=message):
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


def test_older_descriptions_build_the_same_network():
    """New arguments have defaults that leave the names of the weights alone."""
    older = {"name": "UNet", "in_channels": 1, "channels": 4, "multipliers": [1, 2], "blocks": 1,
             "n_classes": 3, "out_channels": None, "attention": True, "dropout": 0.1,
             "time_scale": 1000.0}
    for config, net in ((older, UNet(1, 4, (1, 2), n_classes=3)),
                        ({"name": "MLP", "dim": 2, "hidden": 8, "depth": 1}, MLP(2, 8, 1))):
        assert from_config(config).state_dict().keys() == net.state_dict().keys()
        assert from_config(config).load_state_dict(net.state_dict())
    parts = ["embedding", "first", "down", "up", "middle1", "attention", "middle2", "norm", "last"]
    names = list(UNet(**TINY).state_dict())
    assert list(dict.fromkeys(name.split(".")[0] for name in names)) == parts
    assert not any("attention" in name for name in names if not name.startswith("attention."))


def test_unknown_name():
    with pytest.raises(ValueError, match="MLP.*UNet.*DiT"):
        from_config({"name": "Transformer"})


@each_net
@pytest.mark.parametrize(("change", "error", "message"), [
    (dict(x=torch.zeros(3, 2).long()), TypeError, "floating"),
    (dict(t=torch.rand(2)), ValueError, r"t must have shape \(3,\)"),
    (dict(t=torch.tensor(0.5)), ValueError, r"t must have shape \(3,\)"),
    (dict(cond=torch.tensor([0, 1, 3])), ValueError, "0 to 2; got 0 to 3"),
    (dict(cond=torch.tensor([0, 1, -2])), ValueError, "0 to 2; got -2 to 1"),
    (dict(cond=torch.tensor([0, 1])), ValueError, r"int64 \(3,\); got torch.int64 \(2,\)"),
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
    dict(channels=6), dict(channels=5), dict(attention_levels=(1,)),
    dict(attention_levels=(0, 1), heads=4), dict(heads=2, blocks=2)])
def test_configurations(options):
    net = opened(UNet(**TINY | options))
    channels = options.get("in_channels", 1)
    out = net(torch.randn(2, channels, 8, 12), torch.rand(2))
    assert out.shape == (2, options.get("out_channels", channels), 8, 12)
    assert from_config(net.config()).load_state_dict(net.state_dict())


@pytest.mark.parametrize("options", [
    dict(channels=0), dict(multipliers=(1, 0)), dict(blocks=0), dict(n_classes=0),
    dict(attention_levels=(2,)), dict(attention_levels=(-1,)), dict(attention_levels=(0.5,)),
    dict(heads=0), dict(heads=3), dict(attention=False, attention_levels=(0,), heads=3),
    dict(dropout=1.0), dict(dropout=-0.1), dict(out_channels=0)])
def test_senseless_configurations(options):
    with pytest.raises(ValueError):
        UNet(**options)


@pytest.mark.parametrize("build", [lambda **o: MLP(2, 8, 1, **o), UNet, DiT],
                         ids=["MLP", "UNet", "DiT"])
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
    (lambda: UNet(attention_levels=1), TypeError, "attention_levels must be a sequence"),
    (lambda: UNet(attention_levels=(2,)), ValueError, r"levels are 0 to 1; .*=\(2,\)"),
    (lambda: UNet(attention="yes"), TypeError, "attention must be True or False"),
    (lambda: UNet(heads=3), ValueError, "attention must be divisible by 3; got 64"),
    (lambda: DiT(hidden=6), ValueError, "hidden must be divisible by 4; got 6"),
    (lambda: DiT(hidden=8, heads=3), ValueError, "hidden must be divisible by 12; got 8"),
    (lambda: DiT(patch=0), ValueError, "patch must be at least 1"),
    (lambda: MLP(2, frequencies=0), ValueError, "frequencies must be at least 1"),
    (lambda: MLP(2, bandwidth=0.0), ValueError, "bandwidth must be positive"),
    (lambda: MLP(2, out_channels=None), TypeError, "out_channels must be an int"),
    (lambda: MLP(2, 7), ValueError, "hidden must be divisible by 2"),
    (lambda: MLP(None), TypeError, "dim must be an int")])
def test_senseless_sizes(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("net", [UNet(), DiT()], ids=["UNet", "DiT"])
@pytest.mark.parametrize(("x", "t", "cond", "error", "message"), [
    (torch.ones(2, 1, 0, 8), torch.ones(2), None, ValueError, "H, W > 0 must be divisible .* 0×8"),
    (torch.ones(2, 1, 8, 8), 0.5, None, ValueError, r"t must have shape \(2,\), .* got 0.5"),
    (torch.ones(2, 1, 8, 8), None, None, ValueError, "got None"),
    (torch.ones(2, 1, 8, 8), torch.ones(()), None, ValueError, r"t must have shape \(2,\)")])
def test_senseless_inputs(net, x, t, cond, error, message):
    with pytest.raises(error, match=message):
        net(x, t, cond)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: UNet(n_classes=3)(torch.ones(1, 1, 8, 8), torch.ones(1), [1]), ValueError,
     r"cond must be int64 \(1,\); got \[1\]"),
    (lambda: patchify(None, 2), ValueError, r"x must have shape \(B, C, H, W\); got None"),
    (lambda: unpatchify(torch.ones(2, 16, 4), 0, (8, 8)), ValueError, "patch must be at least 1"),
    (lambda: unpatchify(torch.ones(2, 12, 4), 2, (7, 7)), ValueError, "divisible by 2; got 7"),
    (lambda: unpatchify(torch.ones(2, 16, 4), 2, (8, 10)), ValueError, "tokens must have shape"),
    (lambda: position_features(2, 2, "8"), TypeError, "dim must be an int")])
def test_senseless_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


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
    assert MLP(1, 8, 1, out_channels=2)(torch.randn(5, 1), torch.rand(5)).shape == (5, 2)


def test_waves_are_kept_and_not_trained():
    net = MLP(2, 8, 1, frequencies=5, bandwidth=3.0)
    assert net.state_dict()["waves"].shape == (5, 2)
    assert "waves" not in dict(net.named_parameters())
    again = MLP(2, 8, 1, frequencies=5)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.waves, net.waves)
    assert "waves" not in MLP(2, 8, 1).state_dict()
    torch.manual_seed(0)
    assert abs(MLP(2, 8, 1, frequencies=20_000, bandwidth=3.0).waves.std() - 3) < 4 * 3 / 280


def test_waves_of_shaped_samples_in_half_precision():
    """The angles are computed in float32, under autocast too; only the features are rounded."""
    net = opened(MLP(4, 8, 1, frequencies=16, bandwidth=20.0))
    x, t = torch.randn(5, 2, 2), torch.rand(5)
    expected = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert (net(x, t).float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(("patch", "size"), [(1, (3, 2)), (2, (4, 8)), (4, (8, 4)), (3, (3, 6))])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_patches_are_put_back(patch, size, n):
    x = torch.arange(n * 2 * math.prod(size), dtype=torch.float64).reshape(n, 2, *size)
    tokens = patchify(x, patch)
    assert tokens.shape == (n, math.prod(size) // patch**2, 2 * patch**2)
    assert torch.equal(unpatchify(tokens, patch, size), x)
    if n:
        assert torch.equal(tokens[0, 0], x[0, :, :patch, :patch].flatten())


@pytest.mark.parametrize("shape", [(1, 4, 6), (1, 1, 4, 6)])
def test_patches_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="x must have shape|divisible by 4; got 4×6"):
        patchify(torch.zeros(shape), 4)


def test_positions():
    features = position_features(3, 5, 8, dtype=torch.float64).reshape(3, 5, 8)
    for i in range(3):
        for j in range(5):
            row, column = (time_features(torch.tensor([n]).double(), 4, 1.0)[0] for n in (i, j))
            torch.testing.assert_close(features[i, j], torch.cat([row, column]))
    assert position_features(2, 2, 4).dtype == torch.float32
    with pytest.raises(ValueError, match="dim must be divisible by 4; got 6"):
        position_features(2, 2, 6)


@pytest.mark.parametrize("options", [
    dict(patch=1), dict(patch=4), dict(in_channels=3), dict(in_channels=3, out_channels=6),
    dict(heads=1), dict(depth=1), dict(hidden=24, heads=3)])
def test_configurations_of_a_transformer(options):
    net = opened(DiT(**dict(hidden=8, depth=2, heads=2) | options))
    channels = options.get("in_channels", 1)
    out = net(torch.randn(2, channels, 8, 12), torch.rand(2))
    assert out.shape == (2, options.get("out_channels", channels), 8, 12)
    assert from_config(net.config()).load_state_dict(net.state_dict())


def test_a_transformer_knows_places_and_blocks_start_closed():
    net = DiT(1, 2, 8, 2, 2)
    h, emb = torch.randn(2, 6, 8), torch.randn(2, 8)
    assert all(torch.equal(block(h, emb), h) for block in net.blocks)
    x, t = torch.randn(1, 1, 8, 8), torch.rand(1)
    shifted = opened(net)(x.roll(2, 3), t)
    assert not torch.allclose(shifted, net(x, t).roll(2, 3), rtol=0.1)


def test_sizes_in_millions_cost_nothing_on_the_meta_device():
    with torch.device("meta"):
        net = DiT(4, 2, 1152, 28, 16, n_classes=1000, out_channels=8)
        assert sum(p.numel() for p in net.parameters()) == 675_866_912
        assert net(torch.empty(1, 4, 32, 32), torch.empty(1)).shape == (1, 8, 32, 32)


@pytest.mark.parametrize("net", tiny_nets()[2:], ids=KINDS[2:])
def test_samples_as_a_denoiser(net):
    denoiser = Denoiser(opened(copy.deepcopy(net)), Cosine(), "v", (1, 4, 4))
    with torch.no_grad():
        assert sample(denoiser, 3, steps=3, seed=0).isfinite().all()


def test_dropout_acts_in_training_only():
    net = opened(UNet(**TINY, dropout=0.5))
    x, t = inputs(net)
    assert not torch.equal(net.train()(x, t), net(x, t))
    assert torch.equal(net.eval()(x, t), net(x, t))


@each_image_net
def test_channels_last_gives_the_same_and_stays(net):
    net = opened(copy.deepcopy(net)).double()
    x, t = torch.randn(2, 1, 8, 8).double(), torch.rand(2).double()
    expected, layouts = net(x, t), []

    def look(layer, args):
        layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))

    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        layer.register_forward_pre_hook(look)
    kind = {"memory_format": torch.channels_last}
    torch.testing.assert_close(net.to(**kind)(x.to(**kind), t), expected)
    assert all(layouts) and len(layouts) == len(convolutions)


@each_net
def test_autocast_to_bfloat16(net):
    """Some dozens of roundings of 2**-9 each; angles in bfloat16 would be off by the whole."""
    net = opened(copy.deepcopy(net))
    x, t = inputs(net)
    expected = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x, t)
    assert (rough.float() - expected).norm() < 0.1 * expected.norm()
    rough.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@each_net
def test_one_graph_without_breaks(net):
    """One for a size, none for other values, one more for all sizes; labels are another one."""
    net, graphs = opened(copy.deepcopy(net)).eval(), []
    torch.compiler.reset()

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=counting, fullgraph=True)
    x, t = inputs(net, 8)
    cond = torch.arange(8) % 4 - 1
    for size, expected in ((8, 1), (8, 1), (6, 2), (5, 2), (3, 2)):
        x, t, cond = x[-size:], t[-size:].flip(0), cond[-size:]
        torch.testing.assert_close(compiled(x, t, cond), net(x, t, cond))
        assert len(graphs) == expected
    torch.testing.assert_close(compiled(x, t), net(x, t))
    torch.compiler.reset()


@each_net
def test_compiled_gradients(net):
    """The ahead-of-time trace, with its backward pass, needs no compiler either."""
    net = opened(copy.deepcopy(net)).double()
    x, t = inputs(net, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    cond, slopes = torch.tensor([0, -1, 2]), []
    for call in (net, compiled):
        net.zero_grad()
        call(x, t, cond).square().sum().backward()
        slopes.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(slopes[1], slopes[0])
    torch.compiler.reset()


def test_zero_init_returns_its_layer():
    layer = nn.Linear(3, 2)
    assert zero_init(layer) is layer and not layer.weight.any() and not layer.bias.any()


def test_senseless_patches():
    with pytest.raises(ValueError, match="patch must be at least 1, got 0"):
        patchify(torch.zeros(2, 1, 8, 8), 0)
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, 16, 4\), got \(2, 5, 4\)"):
        unpatchify(torch.zeros(2, 5, 4), 2, (8, 8))
