"""Foreign networks: signatures, the audit, and diffusers there and back; nothing is downloaded."""

import json
import subprocess
import sys
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from diffnotes.ddpm import ancestral
from diffnotes.denoisers import Denoiser, guided
from diffnotes.interop import (
    adapt,
    audit,
    clipped,
    from_diffusers,
    scheduler_times,
    to_diffusers,
)
from diffnotes.mixtures import Gaussian, GaussianMixture
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP, linear_betas
from diffnotes.samplers import as_process, euler, sample

PROCESSES = [VP(), VE(), SubVP(), Cosine(), EDM(), Flow(), Discrete(linear_betas(200))]
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"]
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def by_name(process):
    return type(process).__name__


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def law():
    return GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64), 0.05)


def make_unet(diffusers, seed=0, **options):
    torch.manual_seed(seed)
    settings = dict(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4)
    return diffusers.UNet2DModel(**settings | options).eval()


@pytest.fixture(scope="module")
def unet(diffusers):
    return make_unet(diffusers)


def make_scheduler(kind, schedule="linear", **options):
    if schedule == "trained":
        options |= dict(trained_betas=torch.linspace(1e-4, 0.03, 500).sqrt().mul(0.1).tolist(),
                        num_train_timesteps=500)
    else:
        options |= dict(beta_schedule=schedule)
    return kind(**dict(clip_sample=False) | options)


def in_double(scheduler):
    """The scheduler with its own table, and all that is made of it, in float64."""
    for name in ("betas", "alphas", "alphas_cumprod", "one", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


@torch.no_grad()
def their_samples(unet, scheduler, x, labels=None, **options):
    generator = torch.Generator().manual_seed(5)
    for timestep in scheduler.timesteps:
        output = unet(x, timestep, labels).sample
        x = scheduler.step(output, timestep, x, generator=generator, **options).prev_sample
    return x


@torch.no_grad()
def our_samples(denoiser, scheduler, sampler, x, labels=None):
    generator = torch.Generator().manual_seed(5)
    return sampler(denoiser, x, scheduler_times(scheduler), cond=labels,
                   noise=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype))


def largest_gap(a, b):
    """The largest difference, relative to the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


def start(dtype=torch.float32, n=3):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(4), dtype=dtype)


# --- Any module ---------------------------------------------------------------


class Swapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, clock, x, y=None):
        return {"out": self.layer(x) * clock[:, None] + (0 if y is None else y[:, None])}


def test_adapt_signature_and_condition():
    net = Swapped()
    denoiser = Denoiser(adapt(net, lambda net, x, t, c: net(t, x, y=c)["out"]), VP(), "x0", (2,))
    x = torch.randn(3, 2)
    torch.testing.assert_close(denoiser(x, 0.5), net.layer(x) * 0.5)
    labels = torch.arange(3)
    torch.testing.assert_close(denoiser(x, 0.5, labels), net.layer(x) * 0.5 + labels[:, None])


def test_adapt_keeps_the_module_visible():
    net = Swapped()
    wrapped = adapt(net, lambda net, x, t, c: net(t, x)["out"])
    denoiser = Denoiser(wrapped, VP(), "x0", (2,))
    assert {id(p) for p in denoiser.parameters()} == {id(p) for p in net.parameters()}
    assert denoiser.to(torch.float64).dtype == net.layer.weight.dtype == torch.float64
    denoiser.eval()
    assert not net.training
    copied = deepcopy(wrapped)
    with torch.no_grad():
        net.layer.weight.zero_(), net.layer.bias.zero_()
    assert copied(torch.ones(1, 2).double(), torch.ones(1)).any()


@pytest.mark.parametrize("net, call", [(lambda x, t: x, lambda *a: 0), (nn.Linear(2, 2), "call")])
def test_adapt_refuses(net, call):
    with pytest.raises(TypeError, match="adapt needs a module and a function"):
        adapt(net, call)


def test_network_of_another_output_shape_is_refused():
    wide = adapt(nn.Linear(2, 1), lambda net, x, t, c: net(x))
    denoiser = Denoiser(wide, VP(), "x0", (2,))
    with pytest.raises(ValueError, match=r"prediction of shape \(3, 1\)"):
        denoiser(torch.randn(3, 2), 0.5)
    with pytest.raises(ValueError, match=r"prediction of shape \(3, 1\)"):
        sample(denoiser, 3, seed=0)


# --- The audit ----------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=by_name)
def test_audit_of_the_truth(law, process):
    x0 = law.sample(4000, generator=torch.Generator().manual_seed(0))
    found = audit(law.denoiser(process), x0, generator=torch.Generator().manual_seed(1))
    assert found.t.shape == found.log_snr.shape == found.error.shape == found.slope.shape == (9,)
    assert (found.t.diff() < 0).all() and found.error.max() < 1.005 and found.error.min() < 0.7
    assert (found.slope[4:] - 1).abs().max() < 0.02


@pytest.mark.parametrize("process", PROCESSES, ids=by_name)
def test_audit_of_a_gaussian_is_one(process):
    """The best line is the posterior mean of a Gaussian with independent entries."""
    cov = torch.tensor([0.3, 2.0], dtype=torch.float64)
    gauss = Gaussian(torch.tensor([1.0, -2.0], dtype=torch.float64), cov)
    x0 = gauss.sample(4000, generator=torch.Generator().manual_seed(0))
    x0 = (x0 - x0.mean(0)) / x0.std(0, correction=0) * cov.sqrt() + gauss.mean
    found = audit(gauss.denoiser(process), x0, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.error, torch.ones(9).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("slip", [
    dict(predicts="eps"), dict(predicts="x0"), dict(process=Flow()), dict(process=VP()),
    dict(time=lambda t: 1 - t), dict(time=lambda t: t**2)],
    ids=["eps", "x0", "Flow", "VP", "reversed", "squared"])
def test_audit_finds_a_slip(law, slip):
    right = dict(process=Cosine(), predicts="v", time="t")
    net = law.denoiser(Cosine()).v
    found = audit(Denoiser(net, **right | slip), law.sample(4000))
    assert found.error.max() > 1.1 or (found.slope[3:] - 1).abs().max() > 0.1


def test_audit_options(law):
    x0, labels = law.sample(500), torch.zeros(500, dtype=torch.int64)
    denoiser, seed = law.denoiser(VP()), torch.Generator().manual_seed
    a, b = (audit(denoiser, x0, generator=seed(3), times=[0.9, 0.2]) for _ in range(2))
    assert a.t.tolist() == [0.9, 0.2] and torch.equal(a.error, b.error)
    told = audit(denoiser, x0, times=[0.9], cond=labels, generator=seed(3))
    assert told.error[0] > a.error[0], "half of the data is not of that label"
    lines = str(a).splitlines()
    assert len(lines) == 3 and lines[0].split() == ["t", "log-SNR", "error", "slope"]


def test_audit_leaves_no_graph_and_refuses(law):
    layer = nn.Linear(2, 2)
    denoiser = Denoiser(adapt(layer, lambda net, x, t, c: net(x)), VP(), "x0")
    assert not audit(denoiser, torch.randn(20, 2)).error.requires_grad
    for x0 in (torch.randn(1, 2), torch.ones(5, 2)):
        with pytest.raises(ValueError, match="two or more samples that differ"):
            audit(denoiser, x0)
    with pytest.raises(TypeError):
        audit(denoiser, torch.ones(5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"samples that differ; got \(\)"):
        audit(denoiser, torch.tensor(1.0))
    for times in ([], 0.5, [[0.5]]):
        with pytest.raises(ValueError, match="times must be one or more in a list; got "):
            audit(denoiser, torch.randn(20, 2), times=times)


# --- Clipping -----------------------------------------------------------------


def test_ends_of_a_clip_are_numbers(law):
    for ends in (("a", "b"), (None, 1.0)):
        with pytest.raises(TypeError, match="low and high must be numbers"):
            clipped(law.denoiser(VP()), *ends)


@pytest.mark.parametrize("process", PROCESSES, ids=by_name)
def test_clipped(law, process):
    denoiser = law.denoiser(process)
    tight = clipped(denoiser, -0.5, 0.25)
    x = torch.randn(50, 2, dtype=torch.float64)
    t = torch.full((50,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(tight(x, t), denoiser(x, t).clamp(-0.5, 0.25))
    labels = torch.zeros(50, dtype=torch.int64)
    torch.testing.assert_close(tight(x, 0.3, labels),
                               denoiser(x, 0.3, labels).clamp(-0.5, 0.25))
    assert tight.shape == denoiser.shape and tight.process == process


def test_clipped_module_shares_its_weights():
    layer = nn.Linear(2, 2)
    denoiser = clipped(Denoiser(adapt(layer, lambda net, x, t, c: 100 * net(x)), VP(), "x0", (2,)))
    assert {id(p) for p in denoiser.parameters()} == {id(p) for p in layer.parameters()}
    assert denoiser.dtype == torch.float32 and denoiser(torch.randn(9, 2), 0.5).abs().max() == 1
    copied = deepcopy(denoiser.net)
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.zero_()
    assert copied(torch.ones(1, 2), torch.ones(1)).any()
    with pytest.raises(ValueError, match="low must be less than high"):
        clipped(denoiser, 1.0, -1.0)


# --- From diffusers: the same noise, the same samples -------------------------

CASES = {
    "DDPM-small": ("DDPMScheduler", {"variance_type": "fixed_small"}, {}, "small"),
    "DDPM-large": ("DDPMScheduler", {"variance_type": "fixed_large"}, {}, "large"),
    "DDIM": ("DDIMScheduler", {}, {}, None),
    "DDIM-eta1": ("DDIMScheduler", {}, {"eta": 1.0}, "small"),
}


def run_case(diffusers, unet, case, steps, dtype, schedule="linear", labels=None, null=None,
             **settings):
    kind, setting, options, variance = CASES[case]
    scheduler = make_scheduler(getattr(diffusers, kind), schedule, **setting | settings)
    if dtype == torch.float64:
        in_double(scheduler)
    scheduler.set_timesteps(steps)
    sampler = partial(ancestral, variance=variance) if variance else euler
    denoiser, x = from_diffusers(unet, scheduler, null=null), start(dtype)
    theirs = their_samples(unet, scheduler, x, labels, **options)
    return largest_gap(our_samples(denoiser, scheduler, sampler, x, labels), theirs)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_same_samples(diffusers, unet, case, schedule, prediction):
    gap = run_case(diffusers, unet, case, 20, torch.float32, schedule, prediction_type=prediction)
    assert gap < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("case", CASES)
def test_same_samples_in_double(diffusers, unet, case, prediction, spacing):
    """Their table in float64 leaves rounding; 1e-10 is the noise DDPM adds after its last step."""
    gap = run_case(diffusers, deepcopy(unet).double(), case, 10, torch.float64,
                   "squaredcos_cap_v2", prediction_type=prediction, timestep_spacing=spacing)
    odd = (case, spacing) in [("DDPM-large", "trailing"), ("DDIM", "linspace"),
                              ("DDIM-eta1", "linspace")]
    noisy = odd and prediction == "epsilon" and case == "DDPM-large"
    assert gap > (1e-8 if noisy else 1e-3) if odd else gap < 1e-9


@pytest.mark.parametrize("case", ["DDPM-small", "DDIM"])
def test_all_steps_of_a_chain(diffusers, unet, case):
    gap = run_case(diffusers, deepcopy(unet).double(), case, 100, torch.float64,
                   num_train_timesteps=100, prediction_type="v_prediction")
    assert gap < 1e-11


def test_offset_and_custom_timesteps(diffusers, unet):
    double = deepcopy(unet).double()
    gap = run_case(diffusers, double, "DDPM-small", 10, torch.float64, steps_offset=1,
                   prediction_type="sample")
    assert gap < 1e-9
    scheduler = in_double(make_scheduler(diffusers.DDPMScheduler))
    scheduler.set_timesteps(timesteps=[900, 500, 30, 0])
    assert scheduler_times(scheduler).tolist() == [0.901, 0.501, 0.031, 0.001]
    ours = our_samples(from_diffusers(double, scheduler), scheduler,
                       partial(ancestral, variance="small"), start(torch.float64))
    assert largest_gap(ours, their_samples(double, scheduler, start(torch.float64))) < 1e-12


def test_clip_sample(diffusers, unet):
    double = deepcopy(unet).double()
    for case, options in (("DDPM-small", {}), ("DDIM", {"use_clipped_model_output": True})):
        kind, setting, _, variance = CASES[case]
        scheduler = in_double(make_scheduler(getattr(diffusers, kind), clip_sample=True,
                                             clip_sample_range=0.7, **setting))
        scheduler.set_timesteps(20)
        sampler = partial(ancestral, variance=variance) if variance else euler
        x = start(torch.float64)
        theirs = their_samples(double, scheduler, x, **options)
        ours = our_samples(from_diffusers(double, scheduler), scheduler, sampler, x)
        assert ours.abs().max() == 0.7 and largest_gap(ours, theirs) < 1e-12
        bare = our_samples(from_diffusers(double, scheduler, clip=False), scheduler, sampler, x)
        assert bare.abs().max() > 1


def test_clip_argument(diffusers, unet):
    scheduler = make_scheduler(diffusers.DDPMScheduler)
    assert from_diffusers(unet, scheduler).predicts == "eps"
    forced = from_diffusers(unet, scheduler, clip=True)
    assert forced(10 * start(), 0.9).abs().max() == 1
    thresholding = make_scheduler(diffusers.DDPMScheduler, thresholding=True)
    with pytest.raises(ValueError, match="thresholding"):
        from_diffusers(unet, thresholding)
    assert from_diffusers(unet, thresholding, clip=False).predicts == "eps"


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_facts(diffusers, unet, prediction):
    scheduler = make_scheduler(diffusers.DDPMScheduler, prediction_type=prediction)
    denoiser = from_diffusers(unet, scheduler)
    assert denoiser.predicts == PREDICTIONS[prediction] and denoiser.shape == (1, 8, 8)
    alpha_bar = denoiser.process.alpha_bar
    torch.testing.assert_close(alpha_bar[1:], scheduler.alphas_cumprod.double(), atol=1e-14,
                               rtol=0)
    x, steps = start(), torch.tensor([1, 500, 1000])
    with torch.no_grad():
        raw = denoiser.predict(x, steps / 1000)
        torch.testing.assert_close(raw, unet(x, steps - 1).sample)


def test_networks_own_options(diffusers):
    scheduler = make_scheduler(diffusers.DDPMScheduler)
    oblong = make_unet(diffusers, sample_size=(8, 16))
    assert from_diffusers(oblong, scheduler).shape == (1, 8, 16)
    assert from_diffusers(make_unet(diffusers, sample_size=None), scheduler).shape is None
    learned = make_unet(diffusers, time_embedding_type="learned", num_train_timesteps=1000)
    x, k = start(), torch.tensor([3, 500, 1000])
    with torch.no_grad():
        raw = from_diffusers(learned, scheduler).predict(x, k / 1000)
        torch.testing.assert_close(raw, learned(x, k - 1).sample)


def test_learned_variance_is_left_out(diffusers):
    unet = make_unet(diffusers, out_channels=2)
    scheduler = make_scheduler(diffusers.DDPMScheduler, variance_type="learned_range")
    x = start()
    with torch.no_grad():
        eps = from_diffusers(unet, scheduler).eps(x, 0.5)
        torch.testing.assert_close(eps, unet(x, 499).sample[:, :1])
    with pytest.raises(ValueError, match="2 channels out for 1 in"):
        from_diffusers(unet, make_scheduler(diffusers.DDPMScheduler))


def test_labels(diffusers):
    unet = make_unet(diffusers, num_class_embeds=4).double()
    labels = torch.tensor([0, 2, 3])
    gap = run_case(diffusers, unet, "DDPM-small", 10, torch.float64, labels=labels)
    assert gap < 1e-12
    scheduler, x = make_scheduler(diffusers.DDPMScheduler), start(torch.float64)
    bare = from_diffusers(unet, scheduler)
    for cond in (None, torch.tensor([0, -1, 1]), torch.tensor([0, 4, 1])):
        with pytest.raises(ValueError, match="needs labels of 0 to 3"):
            bare(x, 0.5, cond)
    with pytest.raises(TypeError, match="labels must be integers"):
        bare(x, 0.5, torch.zeros(3))
    known = from_diffusers(unet, scheduler, null=3)
    with torch.no_grad():
        nothing = unet(x, 499, torch.full((3,), 3)).sample
        torch.testing.assert_close(known.eps(x, 0.5), nothing)
        torch.testing.assert_close(known.eps(x, 0.5, -1), nothing)
        something = unet(x, 499, labels).sample
        torch.testing.assert_close(guided(known, 3.0).eps(x, 0.5, labels),
                                   nothing + 3 * (something - nothing))


def test_no_classes_no_cond(diffusers, unet):
    denoiser = from_diffusers(unet, make_scheduler(diffusers.DDPMScheduler))
    with pytest.raises(TypeError, match="no classes"):
        denoiser(start(), 0.5, 1)


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DPMSolverMultistepScheduler",
                                  "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_any_scheduler_on_a_chain(diffusers, unet, kind):
    scheduler = getattr(diffusers, kind)(prediction_type="v_prediction")
    denoiser = from_diffusers(unet, scheduler)
    assert denoiser.predicts == "v" and denoiser.process.n_steps == 1000


def test_refusals(diffusers, unet):
    ddpm = diffusers.DDPMScheduler
    for source, scheduler, error, match in [
        (nn.Linear(2, 2), None, TypeError, "Linear: bring any other network by adapt"),
        (unet, None, ValueError, "give the scheduler too"),
        (unet, diffusers.FlowMatchEulerDiscreteScheduler(), ValueError, "has no DDPM chain"),
        (unet, diffusers.EDMEulerScheduler(), ValueError, "has no DDPM chain"),
        (unet, ddpm(rescale_betas_zero_snr=True), ValueError, "without any signal"),
        (unet, ddpm(prediction_type="flow"), ValueError, "prediction_type 'flow' is none of"),
    ]:
        with pytest.raises(error, match=match) as told:
            from_diffusers(source, scheduler)
        assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="has no DDPM chain"):
        scheduler_times(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match="int has no DDPM chain"):
        from_diffusers(unet, 5)
    with pytest.raises(FileNotFoundError, match="nowhere has no scheduler_config.json"):
        from_diffusers(unet, "nowhere")


def test_options_that_are_no_answers(diffusers, unet):
    scheduler = diffusers.DDPMScheduler()
    with pytest.raises(TypeError, match="clip must be True, False or None, got 'yes'"):
        from_diffusers(unet, scheduler, clip="yes")
    with pytest.raises(ValueError, match="which has no classes; got 3"):
        from_diffusers(unet, scheduler, null=3)
    labelled = make_unet(diffusers, num_class_embeds=4)
    for null in ("3", 1.5, True):
        with pytest.raises(TypeError, match="null must be an int or None, got "):
            from_diffusers(labelled, scheduler, null=null)
    for null in (-1, 4):
        with pytest.raises(ValueError, match=f"which has labels of 0 to 3; got {null}"):
            from_diffusers(labelled, scheduler, null=null)


# --- Folders ------------------------------------------------------------------


@pytest.fixture
def folder(diffusers, unet, tmp_path):
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_pipeline_and_folder(diffusers, unet, folder, capfd):
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    pipeline = diffusers.DDIMPipeline(unet, scheduler)
    state = torch.random.get_rng_state()
    given, read = from_diffusers(pipeline), from_diffusers(str(folder))
    assert torch.equal(state, torch.random.get_rng_state())
    alone = from_diffusers(folder / "unet", folder)
    stray = from_diffusers(folder / "unet", diffusers.DDPMScheduler(clip_sample=False))
    assert given.process == read.process == alone.process != stray.process
    with torch.no_grad():
        for other in (read, alone):
            assert torch.equal(given(start(), 0.5), other(start(), 0.5))
    assert not read.net.training and given.net.net is unet
    assert capfd.readouterr() == ("", "")


def test_folder_in_half_and_with_older_names(diffusers, unet, folder):
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    want = from_diffusers(folder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, file)
    with torch.no_grad():
        assert torch.equal(want(start(), 0.5), from_diffusers(folder)(start(), 0.5))
    save_file({key: value.to(torch.bfloat16) for key, value in state.items()}, file)
    half = from_diffusers(folder)
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        assert half(start(), 0.5).dtype == torch.float32


def test_damaged_folders(diffusers, folder, tmp_path):
    unet = folder / "unet"
    weights, config = unet / "diffusion_pytorch_model.safetensors", unet / "config.json"
    whole, said = weights.read_bytes(), config.read_text()
    small = dict(json.loads(said), layers_per_block=2)
    for path, content, error, match in [
        (weights, whole[:-1000], ValueError, "holds no whole network"),
        (weights, b"", ValueError, "holds no whole network"),
        (config, json.dumps(small), ValueError, "holds no whole network"),
        (config, "{", ValueError, "config.json is damaged"),
        (config, "[1]", ValueError, "config.json is damaged"),
        (config, '{"_class_name": "UNet2DConditionModel"}', ValueError, "not a UNet2DModel"),
        (folder / "scheduler" / "scheduler_config.json", '{"_class_name": "UNet2DModel"}',
         ValueError, "is no scheduler"),
    ]:
        before = path.read_bytes()
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(error, match=match) as told:
            from_diffusers(folder)
        assert "\n" not in str(told.value)
        path.write_bytes(before)
    assert from_diffusers(folder).predicts == "eps"
    weights.rename(unet / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        from_diffusers(folder)
    for place in (tmp_path, tmp_path / "none", "google/ddpm-cifar10-32"):
        with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
            from_diffusers(place)


def test_pipeline_with_more_than_a_unet(diffusers, unet):
    class Latent(diffusers.DiffusionPipeline):
        def __init__(self, vqvae, unet, scheduler):
            super().__init__()
            self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)

    pipeline = Latent(unet, unet, diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="Latent also has vqvae"):
        from_diffusers(pipeline)


# --- To diffusers -------------------------------------------------------------


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score"])
def test_to_diffusers(diffusers, law, predicts):
    chain = Discrete(linear_betas(1000))
    exact = law.denoiser(chain)
    ask = exact if predicts == "x0" else getattr(exact, predicts)
    denoiser = Denoiser(ask, chain, predicts, (2,))
    net, scheduler = to_diffusers(denoiser)
    assert scheduler.config.prediction_type == {"x0": "sample", "v": "v_prediction"}.get(
        predicts, "epsilon") and not scheduler.config.clip_sample
    in_double(scheduler).set_timesteps(20)
    x = torch.randn(5, 2, dtype=torch.float64)
    theirs = their_samples(net, scheduler, x)
    ours = our_samples(exact, scheduler, partial(ancestral, variance="small"), x)
    assert largest_gap(ours, theirs) < 1e-5
    (value,) = net(x, torch.tensor(9), return_dict=False)
    assert torch.equal(value, net(x, 9).sample) and value.dtype == torch.float64


def test_there_and_back(diffusers, unet):
    scheduler = make_scheduler(diffusers.DDPMScheduler, prediction_type="v_prediction")
    net, again = to_diffusers(from_diffusers(unet, scheduler))
    torch.testing.assert_close(again.alphas_cumprod, scheduler.alphas_cumprod, atol=1e-6, rtol=0)
    assert {id(p) for p in net.parameters()} == {id(p) for p in unet.parameters()}
    with torch.no_grad():
        for k in (0, 500, 999):
            torch.testing.assert_close(net(start(), k).sample, unet(start(), k).sample)


def test_to_diffusers_needs_a_chain(diffusers, law):
    with pytest.raises(ValueError, match=r"as_process\(denoiser, Discrete\(betas\)\)"):
        to_diffusers(law.denoiser(VP()))
    net, _ = to_diffusers(as_process(law.denoiser(VP()), Discrete(linear_betas(100))))
    assert net(torch.randn(3, 2, dtype=torch.float64), 50).sample.isfinite().all()


# --- Without diffusers --------------------------------------------------------


def test_without_diffusers(law, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for call in (lambda: from_diffusers("somewhere"),
                 lambda: to_diffusers(law.denoiser(Discrete(linear_betas(10, rescale=False))))):
        with pytest.raises(ImportError, match="pip install diffusers") as told:
            call()
        assert "\n" not in str(told.value)


def test_import_does_not_import_diffusers():
    code = "import sys, diffnotes.interop; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_no_denoiser_is_refused():
    for call in (lambda: audit(None, torch.rand(4, 2)), lambda: clipped(None),
                 lambda: to_diffusers(None)):
        with pytest.raises(TypeError, match="denoiser must be .* got NoneType"):
            call()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_audit_wants_finite_data(value):
    denoiser = Gaussian(torch.zeros(2), 1.0).denoiser(VP())
    with pytest.raises(ValueError, match="x0 must be finite"):
        audit(denoiser, torch.tensor([[0.0, 1.0], [value, 2.0]]))
