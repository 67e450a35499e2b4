"""Exponential integrators: equal to diffusers' schedulers, finite everywhere, exact on a point."""

import inspect
from unittest import mock

import pytest
import torch

from diffnotes import processes
from diffnotes.denoisers import Denoiser, convert, preconditioning
from diffnotes.exponential import (
    _run,
    deis,
    dpm_2s,
    dpm_3s,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    dpmpp_3m,
    multistep,
    multistep_table,
    phi,
    refine,
    singlestep_table,
    unipc,
    unipc_table,
)
from diffnotes.mixtures import GaussianMixture
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP
from diffnotes.samplers import euler
from diffnotes.stepping import SAMPLERS, time_grid

CHAIN = Discrete(processes.linear_betas())
PROCESSES = [VP(), SubVP(), VE(), EDM(), Cosine(), Flow(), CHAIN,
             Discrete(processes.cosine_betas(1000))]
NAMES = ["VP", "SubVP", "VE", "EDM", "Cosine", "Flow", "linear", "cosine"]
SAMPLED = {"exponential": multistep, "dpmpp_2m": dpmpp_2m, "dpmpp_3m": dpmpp_3m,
           "dpmpp_2s": dpmpp_2s, "dpm_2s": dpm_2s, "dpm_3s": dpm_3s, "deis": deis,
           "unipc": unipc, "dpmpp_2m_sde": dpmpp_2m_sde}
OPTIONS = [
    *((name, fn, {}) for name, fn in SAMPLED.items()),
    *((f"multistep-{n}-{c}", multistep, dict(order=n, coordinate=c, lower_order_final=low))
      for n, c, low in [(1, "x0", False), (3, "x0", False), (3, "x0", True), (1, "eps", False),
                        (3, "eps", True), (1, "v", False), (2, "v", False), (3, "v", False)]),
    *((f"sde-{n}", multistep, dict(order=n, eta=0.7)) for n in (1, 2, 3)),
    *((f"unipc-{n}-{c}-{rule}", unipc, dict(order=n, coordinate=c, rule=rule))
      for n, c, rule in [(1, "x0", "bh1"), (2, "x0", "bh2"), (3, "x0", "exact"),
                         (2, "eps", "bh1"), (3, "v", "bh2")]),
    *((f"deis-{n}", deis, dict(order=n, variable=v)) for n, v in [(2, "t"), (3, "log_snr")]),
]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
each_option = pytest.mark.parametrize(
    "sampler,options", [case[1:] for case in OPTIONS], ids=[case[0] for case in OPTIONS]
)
MEANS = torch.tensor([[-1.0, 0.2], [0.8, 0.6], [0.3, -0.9]], dtype=torch.float64)
LAW = GaussianMixture(MEANS, torch.tensor([0.3, 0.2, 0.25], dtype=torch.float64))
X_T = torch.tensor([[-1.5, 0.3], [0.4, -0.2], [0.9, 1.7]], dtype=torch.float64)
SPOT = torch.tensor([0.8, -0.3], dtype=torch.float64)


def states_of(run):
    """The states at all times but the first."""
    states = []
    run(lambda i, t, x, x0_hat: states.append(x))
    return torch.stack(states[1:])


def one_point(process, predicts):
    """A network that knows that all data are at one point."""
    scale = 0.5 if predicts == "edm" else None

    def net(x, t):
        if predicts == "edm":
            x = x / preconditioning(process, t, 0.5)[2][:, None]
        return convert(SPOT.expand_as(x), x, t, process, "x0", predicts, sigma_data=scale)

    return Denoiser(net, process, predicts, (2,), sigma_data=scale, dtype=torch.float64)


# --- diffusers ----------------------------------------------------------------

MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
DEIS, UNIPC = "DEISMultistepScheduler", "UniPCMultistepScheduler"
DATA, NOISE, SDE = "dpmsolver++", "dpmsolver", "sde-dpmsolver++"
RULES = {"midpoint": "dpm", "heun": "exact"}
DRAWS = torch.linspace(-1.3, 1.7, 16 * 6, dtype=torch.float64).sin().reshape(16, 3, 2)


def peer(kind, times, predicts, draws=None, **options):
    """The states of a scheduler of diffusers on our times, kept from rounding to float32."""
    diffusers = pytest.importorskip("diffusers")
    ends = "zero" if options.get("algorithm_type", DATA) != NOISE else "sigma_min"
    if kind in (MULTI, SINGLE):
        options["final_sigmas_type"] = ends
        options.setdefault("lower_order_final", kind == SINGLE or len(times) < 15)
    scheduler = getattr(diffusers, kind)(
        beta_start=1e-4, beta_end=2e-2,
        prediction_type="sample" if predicts == "x0" else "epsilon", **options)
    scheduler.set_timesteps(len(times))
    levels = torch.exp(-CHAIN.log_snr(times) / 2)
    scheduler.sigmas = torch.cat([levels, levels.new_zeros(1)])
    scheduler.timesteps = (times * 1000 - 1).round().long()
    x, law, states = X_T, LAW.denoiser(CHAIN), []
    with mock.patch.object(torch, "float32", torch.float64):
        for i, step in enumerate(scheduler.timesteps[:-1]):
            value = (law if predicts == "x0" else law.eps)(x, times[i].item())
            noise = {} if draws is None else {"variance_noise": draws[i]}
            x = scheduler.step(value, step, x, **noise).prev_sample
            states.append(x)
    return torch.stack(states)


def ours(table, times, coordinate, draws=None):
    law, supply = LAW.denoiser(CHAIN), iter(() if draws is None else draws)
    return states_of(lambda callback: _run(law, X_T, times, table, coordinate, callback=callback,
                                           noise=lambda x: next(supply)))


def schemes():
    """Yields (name, N, ours, scheduler, what it predicts, its options)."""
    for n in (6, 16):
        low = n < 15
        for kind, coordinate in ((DATA, "x0"), (NOISE, "eps")):
            for order, solver in [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")]:
                yield (f"{kind} {order}M {solver} {n}", n,
                       lambda times, o=order, c=coordinate, s=solver, low=low: multistep_table(
                           CHAIN, times, o, c, rule=RULES[s], lower_order_final=low),
                       MULTI, coordinate,
                       dict(solver_order=order, algorithm_type=kind, solver_type=solver))
        for order in (1, 2, 3):
            yield (f"deis {order} {n}", n, lambda times, o=order, low=low: multistep_table(
                CHAIN, times, o, "eps", lower_order_final=low), DEIS, "eps",
                dict(solver_order=order))
            for coordinate, rule in [("x0", "bh1"), ("x0", "bh2"), ("eps", "bh1"), ("eps", "bh2")]:
                yield (f"unipc {order} {coordinate} {rule} {n}", n,
                       lambda times, o=order, c=coordinate, r=rule: unipc_table(
                           CHAIN, times, o, c, rule=r), UNIPC, coordinate,
                       dict(solver_order=order, solver_type=rule, predict_x0=coordinate == "x0"))
        for order, solver in [(1, "midpoint"), (2, "midpoint"), (2, "heun")]:
            yield (f"sde {order} {solver} {n}", n,
                   lambda times, o=order, s=solver: multistep_table(
                       CHAIN, times, o, rule=RULES[s], eta=1.0), MULTI, "x0",
                dict(solver_order=order, algorithm_type=SDE, solver_type=solver))
    for kind, coordinate in ((DATA, "x0"), (NOISE, "eps")):
        for order, solver in [(2, "midpoint"), (2, "heun"), (3, "heun")]:
            yield (f"{kind} {order}S {solver}", 3 * order + 1,
                   lambda times, o=order, c=coordinate, s=solver: singlestep_table(
                       CHAIN, times, o, c, rule=RULES[s]), SINGLE, coordinate,
                   dict(solver_order=order, algorithm_type=kind, solver_type=solver))


CASES = list(schemes())
each_scheme = pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@each_scheme
def test_equal_to_diffusers(case):
    name, n, table, kind, predicts, options = case
    times = time_grid(CHAIN, n, "t" if kind == SINGLE else "log_snr")
    draws = DRAWS if name.startswith("sde") else None
    torch.testing.assert_close(ours(table(times), times, predicts, draws),
                               peer(kind, times, predicts, draws, **options), rtol=0, atol=1e-9)


# The last state of the first sample, as diffusers 0.42.1 has it.
GOLDEN = {
    "dpmsolver++ 1M midpoint 6": [-0.967842716379, 0.160039061231],
    "dpmsolver++ 2M midpoint 6": [-1.505475155135, 0.271548324940],
    "dpmsolver++ 2M heun 6": [-1.743740289708, 0.320752324275],
    "dpmsolver++ 3M midpoint 6": [-2.075798424974, 0.395560155166],
    "dpmsolver 1M midpoint 6": [-0.967842716379, 0.160039061231],
    "dpmsolver 2M midpoint 6": [-1.311516358148, 0.233213977534],
    "dpmsolver 2M heun 6": [-1.212690318753, 0.211849195593],
    "dpmsolver 3M midpoint 6": [-1.346721639912, 0.241349539231],
    "deis 1 6": [-0.967842716379, 0.160039061231],
    "unipc 1 x0 bh1 6": [-1.106645804365, 0.188912796543],
    "unipc 1 x0 bh2 6": [-1.025055159520, 0.171950467849],
    "unipc 1 eps bh1 6": [-1.681031380590, 0.315489518718],
    "unipc 1 eps bh2 6": [-2.614318445161, 0.538125146720],
    "deis 2 6": [-1.212690318753, 0.211849195593],
    "unipc 2 x0 bh1 6": [-2.784191643657, 0.537145843482],
    "unipc 2 x0 bh2 6": [-1.565827302204, 0.284899687964],
    "unipc 2 eps bh1 6": [-2.044650621938, 0.402524447797],
    "unipc 2 eps bh2 6": [-2.008027524427, 0.391607045739],
    "deis 3 6": [-1.373172796292, 0.247477016752],
    "unipc 3 x0 bh1 6": [-2.618264769816, 0.514027436623],
    "unipc 3 x0 bh2 6": [-2.211166577596, 0.426213931412],
    "unipc 3 eps bh1 6": [-1.897306936559, 0.374355111757],
    "unipc 3 eps bh2 6": [-1.928443898347, 0.374365312661],
    "sde 1 midpoint 6": [-0.556042472696, -0.548373066755],
    "sde 2 midpoint 6": [-0.920200296219, -0.829881664455],
    "sde 2 heun 6": [-1.231475367676, -1.058378086333],
    "dpmsolver++ 1M midpoint 16": [-1.312633700872, 0.235953544732],
    "dpmsolver++ 2M midpoint 16": [-1.540941913653, 0.285980254045],
    "dpmsolver++ 2M heun 16": [-1.572488892065, 0.292865535373],
    "dpmsolver++ 3M midpoint 16": [-1.517502919729, 0.282036995935],
    "dpmsolver 1M midpoint 16": [-1.312633700872, 0.235953544732],
    "dpmsolver 2M midpoint 16": [-1.478189256768, 0.272496040567],
    "dpmsolver 2M heun 16": [-1.462005276203, 0.268918619754],
    "dpmsolver 3M midpoint 16": [-1.490073241681, 0.275401839307],
    "deis 1 16": [-1.312633700872, 0.235953544732],
    "unipc 1 x0 bh1 16": [-1.464387207791, 0.269255477066],
    "unipc 1 x0 bh2 16": [-1.419768458499, 0.259485146121],
    "unipc 1 eps bh1 16": [-1.530480810912, 0.284081665431],
    "unipc 1 eps bh2 16": [-1.604574847161, 0.300475523625],
    "deis 2 16": [-1.462005276203, 0.268918619754],
    "unipc 2 x0 bh1 16": [-1.561478566620, 0.291478118500],
    "unipc 2 x0 bh2 16": [-1.526201328257, 0.283472070979],
    "unipc 2 eps bh1 16": [-1.533866381777, 0.285272823752],
    "unipc 2 eps bh2 16": [-1.521749441517, 0.282814912910],
    "deis 3 16": [-1.496582567946, 0.276894048275],
    "unipc 3 x0 bh1 16": [-1.498508092443, 0.278404952364],
    "unipc 3 x0 bh2 16": [-1.498030400866, 0.278244369494],
    "unipc 3 eps bh1 16": [-1.507750939349, 0.279758418124],
    "unipc 3 eps bh2 16": [-1.507803077630, 0.279770995668],
    "sde 1 midpoint 16": [0.074036652209, 0.024327515460],
    "sde 2 midpoint 16": [0.207232786718, 0.144636997733],
    "sde 2 heun 16": [0.251900715295, 0.185497379792],
    "dpmsolver++ 2S midpoint": [-1.861182639399, 0.367670638894],
    "dpmsolver++ 2S heun": [-2.534615087996, 0.525172145566],
    "dpmsolver++ 3S heun": [-0.670733319125, 0.097738251600],
    "dpmsolver 2S midpoint": [-3.574102172789, 0.768753763971],
    "dpmsolver 2S heun": [-1.886386565424, 0.373406004234],
    "dpmsolver 3S heun": [-1.266143751688, 0.231399463090],
}


@each_scheme
def test_golden_values(case):
    name, n, table, kind, predicts, _ = case
    times = time_grid(CHAIN, n, "t" if kind == SINGLE else "log_snr")
    found = ours(table(times), times, predicts, DRAWS if name.startswith("sde") else None)
    torch.testing.assert_close(found[-1, 0].tolist(), GOLDEN[name], rtol=0, atol=1e-9)


def test_named_samplers_are_these_tables():
    law, times = LAW.denoiser(CHAIN), time_grid(CHAIN, 6)
    for name, fn, coordinate in [(f"{DATA} 2M midpoint 6", dpmpp_2m, "x0"),
                                 (f"{DATA} 3M midpoint 6", dpmpp_3m, "x0"),
                                 ("unipc 3 x0 bh2 6", unipc, "x0")]:
        table = next(case[2] for case in CASES if case[0] == name)(times)
        found = states_of(lambda callback, fn=fn: fn(law, X_T, times, callback=callback))
        torch.testing.assert_close(found, ours(table, times, coordinate), rtol=0, atol=1e-12)
    fine = refine(CHAIN, times, 2)
    for fn, coordinate in ((dpmpp_2s, "x0"), (dpm_2s, "eps")):
        table = singlestep_table(CHAIN, fine, 2, coordinate, rule="dpm")
        torch.testing.assert_close(fn(law, X_T, times), _run(law, X_T, fine, table, coordinate))


# --- Ends ---------------------------------------------------------------------


@each_process
@each_option
def test_exact_on_one_point(process, sampler, options):
    for predicts in ("x0", "eps", "v", "score", "velocity", "edm") if not options else ("v",):
        denoiser, x_T = one_point(process, predicts), process.prior_std() * X_T
        for steps in range(1, 6):
            found = sampler(denoiser, x_T, time_grid(process, steps), **options)
            torch.testing.assert_close(found, SPOT.expand(3, 2), rtol=0, atol=1e-8)


@each_process
@each_option
def test_finite_and_equal_whatever_the_network_says(process, sampler, options):
    exact = LAW.denoiser(process)
    options = options | ({"eta": 0.0} if options.get("eta") or sampler is dpmpp_2m_sde else {})
    for steps in range(1, 6):
        times, x_T = time_grid(process, steps), process.prior_std() * X_T
        expected = sampler(exact, x_T, times, **options)
        assert expected.isfinite().all()
        told = Denoiser(exact.v, process, "v", (2,))
        torch.testing.assert_close(sampler(told, x_T, times, **options), expected, rtol=1e-8,
                                   atol=1e-8)


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=["Cosine", "Flow"])
@pytest.mark.parametrize("predicts", ["x0", "v"])
@each_option
def test_from_pure_noise(process, predicts, sampler, options):
    coordinate = options.get("coordinate", "eps" if sampler in (dpm_2s, dpm_3s, deis) else "x0")
    for times in ([1.0], [1.0, 0.5], [1.0, 0.9, 0.01], [1.0, 0.8, 0.5, 0.2, 1e-6, 0.0]):
        if coordinate == "eps":
            with pytest.raises(ValueError, match="start at a smaller t"):
                sampler(one_point(process, predicts), X_T, times, **options)
            continue
        found = sampler(one_point(process, predicts), X_T, times, **options)
        torch.testing.assert_close(found, SPOT.expand(3, 2), rtol=0, atol=1e-10)
        assert sampler(LAW.denoiser(process), X_T, times, **options).isfinite().all()
    if coordinate != "eps":
        with pytest.raises(ValueError):
            sampler(one_point(process, "eps"), X_T, [1.0, 0.5], **options)


@each_process
def test_tables_from_one_to_many_times(process):
    for n in (1, 2, 3, 4, 60):
        times = time_grid(process, n)
        for order in (1, 2, 3):
            for coordinate in ("x0", "eps", "v"):
                on_x, on_f, none = multistep_table(process, times, order, coordinate)
                assert on_x.shape == (n - 1,) and on_f.shape == (n - 1, order) and none is None
                on_x, on_f = unipc_table(process, times, order, coordinate)
                assert on_x.shape == (n - 1,) and on_f.shape == (n - 1, order + 1)
                assert on_x.isfinite().all() and on_f.isfinite().all()
                fine = refine(process, times, order)
                assert len(fine) == order * (n - 1) + 1 and (fine.diff() < 0).all()
                on_x, on_f = singlestep_table(process, fine, order, coordinate)
                assert on_x.shape == (len(fine) - 1,) and on_f.shape == (len(fine) - 1, order)
                assert on_x.dtype == on_f.dtype == torch.float64


def test_first_order_is_euler_in_float32_too():
    law, times = LAW.to(dtype=torch.float32).denoiser(VP()), time_grid(VP(), 12)
    x_T = X_T.float()
    for coordinate in ("x0", "eps"):
        found = multistep(law, x_T, times, order=1, coordinate=coordinate)
        torch.testing.assert_close(found, euler(law, x_T, times), rtol=0, atol=2e-5)


def test_phi_of_any_shape():
    z = torch.tensor([[0.0, -1.0], [2.0, 1e-12]], dtype=torch.float64)
    found = phi(4, z)
    assert found.shape == (4, 2, 2)
    torch.testing.assert_close(found[:, 0, 0], 1 / torch.tensor([1.0, 2, 6, 24]).double())
    assert phi(1, torch.tensor(-800.0, dtype=torch.float64)).item() == 1 / 800
    with pytest.raises(ValueError, match="count must be at least 1"):
        phi(0, z)


# --- Behaviour ----------------------------------------------------------------


@each_option
def test_counts_dtypes_and_gradients(sampler, options):
    seen = []

    def net(x, t):
        seen.append(len(x))
        return torch.tanh(x)

    denoiser = Denoiser(net, VP(), "v", (2,), dtype=torch.float32)
    for n in (1, 2, 5):
        seen.clear()
        called = []
        sampler(denoiser, X_T.float(), time_grid(VP(), n), **options,
                callback=lambda i, t, x, x0_hat, called=called: called.append((i, t)))
        entry = next((e for e in SAMPLERS.values() if e.fn is sampler), None)
        assert len(seen) == len(called) == entry.evaluations(n)
        assert [i for i, _ in called] == list(range(len(called)))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x_T = X_T.to(dtype)
        kept = x_T.clone()
        assert sampler(denoiser, x_T, [0.9, 0.5, 0.2], **options).dtype == dtype
        assert torch.equal(x_T, kept)
    x_T = X_T.clone().requires_grad_()
    sampler(denoiser, x_T, [0.9, 0.5, 0.2], **options).sum().backward()
    assert x_T.grad.isfinite().all() and x_T.grad.abs().max() > 0


@each_option
def test_noise_is_drawn_only_where_it_is_used(sampler, options):
    drawn = []

    def noise(x):
        drawn.append(x.shape)
        return torch.zeros_like(x)

    sampler(LAW.denoiser(VP()), X_T, [0.9, 0.7, 0.5, 0.2], noise=noise, **options)
    stochastic = options.get("eta") or sampler is dpmpp_2m_sde
    assert len(drawn) == (3 if stochastic else 0)
    if sampler is dpmpp_2m_sde:
        dpmpp_2m_sde(LAW.denoiser(VP()), X_T, [0.9, 0.7], eta=0.0, noise=noise)
        assert len(drawn) == 3


@each_option
def test_plain_callables_and_conditions(sampler, options):
    class Plain:
        process = VP()

        def __call__(self, x_t, t, cond=None):
            return torch.tanh(x_t) * (1 if cond is None else cond)

    options = options | ({"eta": 0.0} if options.get("eta") or sampler is dpmpp_2m_sde else {})
    net = Denoiser(lambda x, t, cond: torch.tanh(x) * cond[:, None], VP(), "x0", (2,))
    found = sampler(Plain(), X_T, [0.9, 0.5, 0.2], cond=2, **options)
    told = sampler(net, X_T, [0.9, 0.5, 0.2], cond=torch.tensor(2), **options)
    torch.testing.assert_close(found, told)


def test_registered():
    for name, fn in SAMPLED.items():
        entry = SAMPLERS[name]
        assert entry.fn is fn and entry.grid == "log_snr"
        assert {"cond", "noise", "callback"} <= set(inspect.signature(fn).parameters)
    assert [SAMPLERS[name].evaluations(5) for name in ("dpm_2s", "dpm_3s", "deis")] == [9, 13, 5]


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda t: multistep_table(VP(), t, 0), ValueError, "order"),
        (lambda t: multistep_table(VP(), t, 4), ValueError, "order must be one of 1, 2, 3"),
        (lambda t: multistep_table(VP(), t, 2.0), TypeError, "order"),
        (lambda t: multistep_table(VP(), t, True), TypeError, "order"),
        (lambda t: multistep_table(VP(), t, 2, "score"), ValueError, "coordinate.*'x0', 'eps'"),
        (lambda t: multistep_table(VP(), t, rule="bh3"), ValueError, "rule.*'exact', 'dpm'"),
        (lambda t: multistep_table(VP(), t, variable="sigma"), ValueError, "variable"),
        (lambda t: multistep_table(VP(), t, eta=-0.1), ValueError, "eta.*-0.1"),
        (lambda t: multistep_table(VP(), t, eta=float("nan")), ValueError, "eta.*nan"),
        (lambda t: multistep_table(VP(), t, eta=float("inf")), ValueError, "eta.*inf"),
        (lambda t: multistep_table(VP(), t, 2, "v", eta=1.0), ValueError, "coordinate='x0'"),
        (lambda t: multistep_table(VP(), t.flip(0)), ValueError, "decrease"),
        (lambda t: multistep_table(Flow(), [1.0, 0.5], 2, "eps"), ValueError, "coordinate='x0'"),
        (lambda t: unipc_table(VP(), t, rule="dpm"), ValueError, "rule.*'exact', 'bh1', 'bh2'"),
        (lambda t: unipc_table(VP(), t, 5), ValueError, "order"),
        (lambda t: singlestep_table(VP(), t, 2), ValueError, "2 K \\+ 1 times.*refine; got 4"),
        (lambda t: singlestep_table(VP(), t, 4), ValueError, "order"),
        (lambda t: refine(VP(), t, 0), ValueError, "order"),
        (lambda t: dpmpp_2m(LAW.denoiser(VP()), X_T, []), ValueError, "times"),
        (lambda t: unipc(LAW.denoiser(VP()), X_T.long(), t), TypeError, "x_T"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.tensor([0.9, 0.6, 0.3, 0.1], dtype=torch.float64))
