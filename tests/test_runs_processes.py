"""Runs that are really killed, and runs of really several processes."""

import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from diffnotes.runs import read_run

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

COMMON = '''
import os, random, resource, signal, sys, threading, time, warnings
from pathlib import Path
import numpy as np
import torch
from diffnotes.denoisers import Denoiser
from diffnotes.networks import MLP
from diffnotes.pretrained import load
from diffnotes.processes import Cosine
from diffnotes.runs import train
import accelerate, torch._dynamo  # what every child would import anew, with its first optimiser

torch.set_num_threads(1)
OUT = Path(sys.argv[1])
X = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 3

def denoiser(dtype=torch.float32, **options):
    torch.manual_seed(0)
    net = MLP(2, 8, 2, n_classes=3, **options)
    torch.nn.init.normal_(net.last.weight, std=0.1)
    return Denoiser(net.to(dtype), Cosine(), "v", (2,))

def flat(d):
    return torch.cat([p.detach().flatten() for p in d.parameters()]).numpy()

def run(out, **options):
    options = dict(steps=24, batch_size=8, save_every=4, log_every=3, profiles=(0.1,),
                   progress=False, resume=True, out=out) | options
    return train(denoiser(), (X, Y), **options)
'''

KILLS = COMMON + '''
def attempt(out, prepare=lambda: None, delay=None, **options):
    """A child that trains in out; its exit status, 0 or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            if (out / "config.json").exists():
                load(out)
            prepare()
            np.save(out.with_suffix(".npy"), flat(run(out, **options)))
            os._exit(0)
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            out.with_suffix(".txt").write_text(str(error))
            os._exit(7)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def same(out):
    kept = flat(load(out))
    ends = np.load(out.with_suffix(".npy")), np.load(OUT / "whole.npy")
    return all(np.array_equal(kept.astype(end.dtype), end) for end in ends)

def die_at(name, n, after):
    """Makes the process kill itself at its n-th call of os.<name>, before or after the call."""
    call, count = getattr(os, name), [0]
    def counted(*arguments, **options):
        count[0] += 1
        if count[0] == n and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments, **options)
        if count[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(os, name, counted)

begun = time.monotonic()
assert attempt(OUT / "whole") == 0
took, killed = time.monotonic() - begun, 0
for seed in range(3):
    out, dice = OUT / f"time{seed}", random.Random(seed)
    for _ in range(3):
        status = attempt(out, delay=dice.uniform(0, 0.8 * took))
        assert status in (0, -9), status
        killed += status == -9
    assert attempt(out) == 0 and same(out), out
assert killed >= 4, killed
for name, counts in (("replace", range(1, 40, 9)), ("fsync", range(2, 70, 15))):
    for n in counts:
        out = OUT / f"{name}{n}"
        status = attempt(out, lambda: die_at(name, n, after=n % 2 == 1))
        assert status in (0, -9), (name, n, status)
        killed += status == -9
        assert attempt(out, lambda: die_at(name, n // 2 + 1, after=n % 2 == 0)) in (0, -9)
        assert attempt(out) == 0 and same(out), out
        assert not list(out.rglob(".*.tmp")), out
print("killed", killed)

def full():
    def limit(k, value):
        if k == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    global run
    run = lambda out, plain=run, **options: plain(out, callback=limit, **options)

out = OUT / "full"
assert attempt(out, full) == 7
text = out.with_suffix(".txt").read_text()
assert "was not saved: File too large; the last checkpoint in" in text, text
load(out)
assert attempt(out) == 0 and same(out)
print("done")
'''

SEVERAL = COMMON + '''
from diffnotes.batches import Batches

def shift(x, generator):
    return x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=generator)

def case(name, dtype=torch.float32, **options):
    data = X.to(dtype), Y
    options = dict(steps=30, batch_size=9, lr=1e-2, log_every=1, progress=False) | options
    result = train(denoiser(dtype), data, out=OUT / name, **options)
    if int(os.environ.get("RANK", 0)) == 0:
        np.save(OUT / f"{name}.npy", flat(result))

parts = dict(accumulate=1) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else dict(accumulate=2)
case("double", torch.float64)
case("single", clip=0.5)
case("bf16", precision="bf16")
case("parts", torch.float64, augment=shift, **parts)
case("accumulated", torch.float64, accumulate=3)
case("resumed", torch.float64, save_every=10, steps=20, schedule="constant")
case("resumed", torch.float64, save_every=10, steps=30, schedule="constant", resume=True)
none = train(denoiser(), (X, -torch.ones_like(Y)), steps=3, batch_size=4, progress=False)
assert np.isfinite(flat(none)).all()
try:
    case("double", torch.float64)
except FileExistsError:
    print("refused")
'''


def script(folder, text):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    (folder / "out").mkdir()
    return str(path), str(folder / "out")


def call(*command, **environment):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240,
                          env={**ONE_THREAD, **environment})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def test_killed_and_resumed_is_as_if_never_killed(tmp_path):
    printed = call(*script(tmp_path, KILLS))
    assert "done" in printed and int(printed.split()[1]) >= 12


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    call(*script(folder, SEVERAL))
    return folder / "out"


def compare(alone, together, name, tolerance):
    one, two = (read_run(folder / name)["log"] for folder in (alone, together))
    assert {line["processes"] for line in one} == {1}
    assert {line["processes"] for line in two} == {2}
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for key in ("loss", "by_level"):
        ours, theirs = (np.array([line[key] for line in log], dtype=float) for log in (one, two))
        np.testing.assert_allclose(theirs, ours, rtol=tolerance, atol=tolerance)
    weights = [np.load(folder / f"{name}.npy") for folder in (alone, together)]
    np.testing.assert_allclose(*weights, rtol=0, atol=100 * tolerance)


def test_two_processes_give_the_curve_of_one(alone, tmp_path):
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = call(*run, *script(tmp_path, SEVERAL))
    assert printed.count("refused") == 2
    for name in ("double", "parts", "accumulated", "resumed"):
        compare(alone, tmp_path / "out", name, 1e-10)
    compare(alone, tmp_path / "out", "single", 1e-5)
    compare(alone, tmp_path / "out", "bf16", 2e-2)


def test_accelerate_launches_two(alone, tmp_path):
    pytest.importorskip("accelerate")
    if torch.cuda.is_available():
        pytest.skip("the launcher would take the GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1",
              "--main_process_port", port]
    call(*launch, *script(tmp_path, SEVERAL), ACCELERATE_USE_CPU="true")
    compare(alone, tmp_path / "out", "double", 1e-10)
