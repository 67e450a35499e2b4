"""The program: what its lines do, what it says when they fail, and the help it makes of itself."""

import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_wheel import run, wheel  # noqa: F401

import diffnotes
from diffnotes import cli, habits, networks, pictures, pretrained, runs
from diffnotes.data import Images
from diffnotes.denoisers import Denoiser
from diffnotes.processes import VE
from diffnotes.stepping import SAMPLERS, register

pytest.importorskip("cyclopts")
pytest.importorskip("accelerate")
HERE = {**os.environ, "PYTHONPATH": str(ROOT)}
TINY = "train --data digits --network mlp --width 8 --depth 1 --batch-size 8 --device cpu".split()
DRAW = "sample digits -n 4 --steps 2 --device cpu".split()


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """Runs a line in an empty folder; returns exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def run_module(*words, cwd, **options):
    """The same in a process of its own."""
    command = [sys.executable, "-m", "diffnotes.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=HERE, capture_output=True, text=True, **options)


def one_line(text):
    assert text.startswith("diffnotes: ") and text.count("\n") == 1, text
    return text


# --- The commands ---------------------------------------------------------------


def test_train_resume_info_sample(say, tmp_path):
    out = tmp_path / "runs" / "a"
    code, said, error = say(*TINY, "--out", out, "--steps", 4)
    assert (code, error) == (0, "") and str(out) in said and "trained to step 4, loss" in said
    assert pretrained.load(out).shape == (1, 8, 8)
    code, _, error = say(*TINY, "--out", out, "--steps", 4)
    assert code == 1 and "--resume" in one_line(error) and "resume=True" not in error
    assert say(*TINY, "--out", out, "--steps", 6, "--resume")[0] == 0
    code, said, _ = say("info", out)
    assert code == 0
    for fact in ["MLP of", "VP(", "predicts v", "1×8×8, 17 levels in [-1.0, 1.0]", "step 6 of 6"]:
        assert fact in said, said
    code, _, error = say(*TINY, "--out", out, "--steps", 6, "--resume", "--lr", 0.5)
    assert code == 1 and "lr" in one_line(error)
    assert say("sample", out, "-n", 3, "--steps", 2, "--out", "x.npz")[0] == 0


@pytest.mark.parametrize("process", habits.HABITS)
def test_every_process_trains(say, process):
    code, _, error = say(*TINY, "--process", process, "--out", "run", "--steps", 2)
    assert code == 0, error
    denoiser, habit = pretrained.load("run"), habits.HABITS[process]
    assert type(denoiser.process) is type(habit.make()) and denoiser.predicts == habit.predicts
    recipe = pretrained.read_config("run")["info"]["recipe"]
    assert (recipe["weighting"], recipe["times"]) == (habit.weighting, habit.times)


def test_options_reach_the_engine(say, monkeypatch):
    seen = {}
    monkeypatch.setattr(runs, "train", lambda d, data, **options: seen.update(options, d=d))
    words = "--minutes 0.5 --lr 0.1 --clip 2 --profiles 0.05 0.1 --flip --precision bf16 --compile"
    words += " --weighting x0 --times log_snr --predicts eps --seed 3 --save-every 7 --warmup 9"
    assert say(*TINY, "--out", "run", *words.split())[0] == 0
    assert seen["minutes"] == 0.5 and seen["steps"] is None and seen["out"].name == "run"
    assert (seen["lr"], seen["clip"], seen["profiles"]) == (0.1, 2, (0.05, 0.1))
    assert (seen["precision"], seen["compile"], seen["seed"]) == ("bf16", True, 3)
    assert (seen["weighting"], seen["times"], seen["warmup"]) == ("x0", "log_snr", 9)
    assert seen["augment"].__name__ == "hflip" and seen["d"].predicts == "eps"
    assert seen["progress"] is False, "a bar where nobody watches"


def test_defaults_are_the_engine_s():
    ours, engine = (inspect.signature(f).parameters for f in (cli.train, runs.train))
    same = ours.keys() & engine.keys() - {"data", "out", "weighting", "times"}
    assert {n: ours[n].default for n in same} == {n: engine[n].default for n in same}
    left_out = engine.keys() - ours.keys()
    assert left_out == {"denoiser", "augment", "progress", "callback"}, "new options of train"
    assert set(ours) == {name for names in cli.PANELS.values() for name in names}


def test_png(say, tmp_path):
    code, said, error = say(*DRAW, "--out", "deep/grid.png")
    assert (code, error) == (0, "") and said.startswith("deep/grid.png: 4 samples of digits")
    image = Image.open(tmp_path / "deep" / "grid.png")
    assert image.format == "PNG" and image.mode == "L"
    assert say(*DRAW, "--out", "wide.png", "--columns", 4)[0] == 0
    wide = Image.open(tmp_path / "wide.png")
    assert wide.width > 3 * wide.height
    assert say("sample", "digits", "-n", 20, "--steps", 1, "--out", "classes.png")[0] == 0
    classes = Image.open(tmp_path / "classes.png")
    assert classes.width / classes.height == 91 / 19, "ten columns of 8 + 1 pixels, two rows"


def test_a_folder_goes_before_a_name(say):
    mine = Denoiser(networks.MLP(64, 8, 1), VE(), "eps", shape=(1, 8, 8))
    pretrained.save(mine, "digits")
    assert "MLP" in say("info", "digits")[1]


def test_gif(say, tmp_path):
    words = "--out film.gif --sampler ancestral --steps 5 --batch-size 3".split()
    assert say("sample", "digits", "-n", 4, *words)[0] == 0
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames == 6
    film.seek(5)
    assert film.info["duration"] == 2000


def test_npz_and_labels(say):
    assert say(*DRAW, "--out", "a.npz", "--cond", "3,1", "--seed", 5, "--guidance", 2)[0] == 0
    with np.load("a.npz", allow_pickle=False) as a:
        assert a["samples"].shape == (4, 1, 8, 8) and a["samples"].dtype == np.float32
        assert a["labels"].tolist() == [3, 1, 3, 1]
        assert (a["seed"], a["guidance"], a["evaluations"]) == (5, 2, 2)
        first = a["samples"]
    same = dict(cond=torch.tensor([3, 1, 3, 1]), steps=2, guidance=2.0, seed=5)
    expected = diffnotes.sample(diffnotes.load_pretrained("digits"), **same)
    assert np.abs(first - expected.numpy()).max() < 1e-5  # rounding of 2 evaluations
    assert say(*DRAW, "--out", "b.npz")[0] == 0
    assert say(*DRAW, "--out", "c.npz", "--cond", "none")[0] == 0
    assert np.load("b.npz")["labels"].tolist() == [0, 1, 2, 3]
    assert "labels" not in np.load("c.npz")


def test_evaluate(say, tmp_path):
    code, said, error = say("evaluate", "digits", "-n", 60, "--steps", 2, "--out", "r.json")
    assert (code, error) == (0, ""), error
    assert "real data" in said and "read as asked" in said and "held-out images: 297" in said
    assert json.loads((tmp_path / "r.json").read_text())["about"]["samples"] == 60
    assert say("evaluate", "digits", "-n", 60, "--out", "r.json")[0] == 1
    assert say("evaluate", "digits", "--out", "r.txt")[0] == 2


def test_points_are_no_pictures(say):
    pretrained.save(Denoiser(networks.MLP(2, 8, 1), VE(), "eps", shape=(2,)), "points")
    code, _, error = say("sample", "points", "--out", "x.png")
    assert code == 1 and "npz" in one_line(error)
    assert say("sample", "points", "-n", 3, "--steps", 2, "--out", "x.npz")[0] == 0


def test_colour_data_from_a_file(say, tmp_path):
    counts = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    np.savez("set.npz", images=counts, labels=np.arange(40) % 3)
    small = "--width 8 --depth 1 --batch-size 2 --steps 1".split()
    code, _, error = say("train", "--data", "set.npz", "--out", "run", "--process", "edm", *small)
    assert code == 0, error
    assert pretrained.load("run").net.config()["multipliers"] == [1, 2, 2, 2]
    assert say("sample", "run", "-n", 3, "--steps", 2, "--out", "x.png")[0] == 0
    assert Image.open("x.png").mode == "RGB"
    assert say("sample", "run", "-n", 3, "--steps", 2, "--out", "x.gif")[0] == 0
    code, said, error = say("evaluate", "run", "--data", "set.npz", "-n", 20, "--steps", 2)
    assert code == 0 and "held-out images: 0" in said, error


# --- What goes wrong ------------------------------------------------------------

USAGE = [
    ("sample digits --sampler nothing", "ancestral"),
    ("sample digits --out x.jpg", ".png"),
    ("sample digits --n", "-n"),
    ("sample digits -n many", "many"),
    ("sample digits -n 0", "-n: 0 is no whole number from 1 on"),
    ("sample digits --n -1", "-1"),
    ("sample digits -n 2.5", "2.5"),
    ("sample digits -n 9999999999999999999", "9999999999999999999"),
    ("sample digits --steps 0", "--steps: 0"),
    ("sample digits --seed -1", "--seed: -1 is no whole number from 0 on"),
    ("sample digits --columns 0", "--columns: 0"),
    ("sample digits --batch-size 0", "--batch-size: 0"),
    ("sample digits --cond 3,", "'3,'"),
    ("sample digits --cond=", "''"),
    ("sample digits 3 4", "3"),
    ("sample digits --out noending", ".npz"),
    ("sample digits --cond three", "three"),
    ("sample", "MODEL"),
    ("smaple", "sample"),
    ("sample digits --bogus 1", "--bogus"),
    ("train --data digits --out run", "--minutes"),
    ("train --data digits --out run --steps 1 --minutes 1", "--minutes"),
    ("train --data digits --out run --steps 1 --process ddpm", "cosine"),
    ("train --data digits --steps 1", "--out"),
    ("train --data digits --out run --steps 0", "--steps: 0"),
    ("train --data digits --out run --steps 1 --width 0", "--width: 0"),
    ("train --data digits --out run --steps 1 --warmup -1", "--warmup: -1"),
    ("train --data digits --out run --steps 1 --workers -1", "--workers: -1"),
    ("train --data digits --out run --steps 1 --size 16", "8×8"),
    ("evaluate digits -n 6", "at least 7"),
    ("evaluate digits --bits 1", "at least 2"),
    ("evaluate digits --out x.txt", ".json"),
    ("info", "MODEL"),
    ("info digits --device cpu", "--device"),
]
FAILURES = [
    ("sample nowhere", "digits"),
    ("sample taken.png --out x.png", "taken.png"),
    ("sample digits --cond 10", "0 to 9"),
    ("sample digits --cond 3,-1", "0 to 9"),
    ("sample digits --guidance nan", "nan"),
    ("sample digits --device nothing", "device nothing here"),
    ("sample digits --device meta", "device meta here"),
    ("sample digits --device cuda:99", "choose from cpu"),
    ("sample hf:nobody --out x.png", "hf:someone/name"),
    ("sample digits --out taken.png", "--force"),
    ("sample digits --out folder.png", "folder"),
    ("sample digits --out taken.png/x.png --force", "taken.png is a file"),
    ("evaluate digits --out taken.png/x.json", "taken.png is a file"),
    ("train --data nowhere --out run --steps 1", "nowhere"),
    ("train --data taken.png --out run --steps 1", "taken.png"),
    ("train --data folder.png --out run --steps 1", "has no pictures"),
    ("train --data digits --out taken.png --steps 1", "taken.png is a file"),
    ("train --data digits --out taken.png/run --steps 1", "taken.png is a file"),
    ("train --data digits --out run --steps 1 --lr -1", "lr"),
    ("train --data digits --out run --steps 1 --network mlp --dropout 0.1", "0.1"),
    ("train --data digits --out run --minutes nan", "nan"),
    ("evaluate digits --data nowhere", "nowhere"),
    ("evaluate digits --data taken.png", "taken.png"),
    ("info nowhere", "nowhere"),
    ("info folder.png", "folder.png"),
]


@pytest.mark.parametrize("line, word", USAGE, ids=[line for line, _ in USAGE])
def test_usage(say, line, word):
    code, said, error = say(*line.split())
    assert code == 2 and said == "" and word in one_line(error), error


@pytest.mark.parametrize("line, word", FAILURES, ids=[line for line, _ in FAILURES])
def test_failure(say, tmp_path, line, word):
    (tmp_path / "taken.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    code, said, error = say(*line.split())
    assert code == 1 and said == "" and word in one_line(error), error
    assert (tmp_path / "taken.png").read_text() == "mine"
    left = {path.name for path in tmp_path.iterdir()} - {"run"}
    assert left == {"taken.png", "folder.png"}, f"{left} left behind"


def test_force(say, tmp_path):
    (tmp_path / "a.png").write_text("mine")
    assert say(*DRAW, "--out", "a.png", "--force")[0] == 0
    assert Image.open(tmp_path / "a.png").format == "PNG"


def damage(folder, how):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    if how == "one bit":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    if how == "missing":
        weights.unlink()
    if how == "foreign":
        config.write_text('{"architectures": ["UNet2DModel"]}')
    if how == "no JSON":
        config.write_text("{")


@pytest.mark.parametrize("how", ["cut short", "one bit", "missing", "foreign", "no JSON"])
@pytest.mark.parametrize("command", ["sample", "info", "evaluate"])
def test_damaged_model(say, tmp_path, command, how):
    folder = pretrained.save(diffnotes.load_pretrained("digits"), tmp_path / "model")
    damage(folder, how)
    code, said, error = say(command, "model")
    assert code == 1 and said == "" and "model" in one_line(error), error


DAMAGED = {
    "text": b"images, they say",
    "a head and no body": b"PK\x03\x04 and then nothing",
    "nothing": b"",
}


@pytest.mark.parametrize("how", DAMAGED)
@pytest.mark.parametrize("line", ["train --out run --steps 1", "evaluate digits"])
def test_damaged_data(say, tmp_path, line, how):
    (tmp_path / "bad.npz").write_bytes(DAMAGED[how])
    code, _, error = say(*line.split(), "--data", "bad.npz")
    assert code == 1 and "bad.npz is damaged" in one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_images_of_another_shape(say):
    np.savez("other.npz", images=np.zeros((8, 28, 28), np.uint8))
    code, _, error = say("evaluate", "digits", "--data", "other.npz", "-n", 8, "--steps", 2)
    assert code == 1 and "draws 1×8×8, the images of other.npz are 1×28×28" in one_line(error)
    np.savez("digits.npz", images=np.zeros((8, 8, 8), np.uint8), levels=17)
    assert say(*TINY, "--out", "run", "--steps", 2)[0] == 0
    other = ["train", "--data", "digits.npz", *TINY[3:], "--out", "run", "--steps", 4, "--resume"]
    code, _, error = say(*other)
    assert code == 1 and "run holds another run" in one_line(error)


def test_a_damaged_test_set_is_not_passed_over(say, tmp_path):
    (tmp_path / "set").mkdir()
    images = np.random.default_rng(0).integers(0, 17, (40, 8, 8), np.uint8)
    np.savez("set/train.npz", images=images, levels=17)
    assert len(habits.both_sets("set", (1, 8, 8))) == 40
    (tmp_path / "set" / "test.npz").write_bytes(b"half")
    code, _, error = say("evaluate", "digits", "--data", "set", "-n", 8, "--steps", 2)
    assert code == 1 and "set/test.npz is damaged" in one_line(error)
    np.savez("split.npz", x_train=images, levels=17)
    assert len(habits.both_sets("split.npz", (1, 8, 8))) == 40
    np.savez("split.npz", x_train=images, x_test=images[:9], levels=17)
    assert [len(part) for part in habits.both_sets("split.npz", (1, 8, 8))] == [40, 9]


@pytest.fixture
def full_disk():
    """No file can grow beyond 3000 bytes until the switch is called again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def switch(on):
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]) if on else before)

    yield switch
    switch(False)


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.npz"])
def test_full_disk_keeps_the_old_samples(say, tmp_path, full_disk, name):
    (tmp_path / name).write_text("mine")
    full_disk(True)
    code, _, error = say("sample", "digits", "--steps", 2, "--out", name, "--force")
    assert code == 1 and f"{name} was not written: File too large" in one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_full_disk_shows_the_report(say, tmp_path, full_disk):
    full_disk(True)
    code, said, error = say("evaluate", "digits", "-n", 20, "--steps", 2, "--out", "r.json")
    assert code == 1 and "r.json was not written" in one_line(error)
    assert "read as asked" in said and not list(tmp_path.iterdir())


def test_full_disk_keeps_the_run(say, full_disk):
    full_disk(True)
    code, _, error = say(*TINY, "--out", "run", "--steps", 4)
    assert code == 1 and "run" in one_line(error) and "File too large" in error
    full_disk(False)
    assert say(*TINY, "--out", "run", "--steps", 4)[0] == 0
    full_disk(True)
    code, _, error = say(*TINY, "--out", "run", "--steps", 6, "--resume")
    assert code == 1 and "was not saved" in one_line(error)
    full_disk(False)
    assert "step 4 of 4" in say("info", "run")[1]
    assert say(*TINY, "--out", "run", "--steps", 6, "--resume")[0] == 0
    assert "step 6 of 6" in say("info", "run")[1]


def test_damaged_checkpoint_is_told_in_one_line(say):
    assert say(*TINY, "--out", "run", "--steps", 4, "--save-every", 2)[0] == 0
    Path("run", "checkpoints", "step-00000004", "state.safetensors").write_bytes(b"half")
    code, said, error = say(*TINY, "--out", "run", "--steps", 6, "--resume")
    assert code == 0 and "trained to step 6" in said
    assert "step-00000004 is no sound checkpoint" in one_line(error)


def test_debug_shows_where(say):
    code, _, error = say("info", "nowhere", "--debug")
    assert code == 1 and "Traceback" in error and error.endswith("digits\n")


def test_unforeseen_errors_are_named(say, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("a\nb")

    monkeypatch.setattr(pretrained, "load", broken)
    code, _, error = say("info", "digits")
    assert code == 1 and "KeyError" in one_line(error)


@pytest.mark.parametrize("module, line", [("cyclopts", "info digits"), ("PIL", "sample digits")])
def test_missing_extra(say, monkeypatch, module, line):
    for name in [n for n in sys.modules if n.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    code, _, error = say(*line.split())
    assert code == 1 and "diffnotes[train]" in one_line(error)


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_stopped_run_goes_on(say, tmp_path, number, code):
    command = [sys.executable, "-m", "diffnotes.cli", *TINY, "--out", "run", "--minutes", "5"]
    process = subprocess.Popen(command, cwd=tmp_path, env=HERE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            if any(path.stat().st_size for path in tmp_path.glob("run/log.jsonl")):
                break
            time.sleep(0.1)
        process.send_signal(getattr(signal, number))
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert error == "" if number == "SIGKILL" else "--resume" in one_line(error)
    assert pretrained.load(tmp_path / "run").shape == (1, 8, 8)
    done, _, error = say(*TINY, "--out", "run", "--minutes", "0.001", "--resume")
    assert done == 0, error


@pytest.mark.parametrize("reader, code", [("gone", 0), ("full", 1)])
def test_output_that_cannot_be_written(tmp_path, reader, code):
    if reader == "full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    read, write = (None, os.open("/dev/full", os.O_WRONLY)) if reader == "full" else os.pipe()
    if read is not None:
        os.close(read)
    command = [sys.executable, "-m", "diffnotes.cli", "info", "digits"]
    environment = {k: v for k, v in HERE.items() if k != "PYTHONUNBUFFERED"}
    options = {"stdout": write, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **options)
    os.close(write)
    assert done.returncode == code
    assert one_line(done.stderr) if code else done.stderr == ""


# --- The help -------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "info"])
def test_help_tells_all(say, command):
    code, said, _ = say(command, "--help")
    flat = re.sub(r"[\s│]+", " ", said)
    function = getattr(cli, command)
    assert code == 0 and inspect.getdoc(function).splitlines()[0] in flat
    assert f"diffnotes {command}" in flat and "``" not in said
    for name, parameter in inspect.signature(function).parameters.items():
        flag = {"n": "-n", "model": "MODEL"}.get(name, "--" + name.replace("_", "-"))
        assert flag in flat, name
        if isinstance(parameter.default, float | int) and parameter.default > 1:
            assert f"[default: {parameter.default}]" in flat, name


def test_help_lists_commands_and_version(say):
    for words in ([], ["--help"]):
        code, said, error = say(*words)
        assert code == 0 and error == ""
        assert all(name in said for name in ("train", "sample", "evaluate", "info", "--debug"))
    assert say("--version") == (0, diffnotes.__version__ + "\n", "")


def test_a_registered_sampler_is_an_option(say):
    code, _, error = say(*DRAW, "--sampler", "mine")
    assert code == 2 and all(name in error for name in SAMPLERS)

    @register("mine", steps=3)
    def mine(denoiser, x_T, times, *, cond=None, noise=None, callback=None):
        return torch.zeros_like(x_T)

    try:
        assert "mine" in say("sample", "--help")[1]
        assert say(*DRAW, "--sampler", "mine", "--out", "x.npz")[0] == 0
        assert not np.load("x.npz")["samples"].any()
    finally:
        del SAMPLERS["mine"]


def test_module_runs(tmp_path):
    done = run_module("--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == diffnotes.__version__
    assert done.stderr == "", "no warning of runpy"


# --- Habits and pictures --------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "dit", "mlp"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12), (1, 28, 28), (3, 27, 30)])
def test_networks_fit(kind, shape):
    if kind == "unet" and 27 in shape:
        pytest.skip("attention over 810 pixels takes a while")
    net = habits.build_network(kind, shape, n_classes=3, width=48, depth=1)
    x, labels = torch.zeros(2, *shape), torch.tensor([0, 2])
    assert net(x, torch.tensor([0.1, 0.9]), labels).shape == x.shape


def test_network_refusals():
    for kind, shape in [("cnn", (1, 8, 8)), ("unet", (64,)), ("dit", (2,))]:
        with pytest.raises(ValueError, match="kind|images"):
            habits.build_network(kind, shape)
    for options in [{"width": 0}, {"depth": -1}, {"dropout": 0.1}]:
        with pytest.raises(ValueError, match=next(iter(options))):
            habits.build_network("mlp", (1, 8, 8), **options)


def test_fresh_denoiser_depends_on_the_seed_alone():
    images = Images(torch.randint(0, 17, (20, 1, 8, 8), dtype=torch.uint8))
    first = habits.fresh_denoiser(images, network="mlp", width=8, depth=1, seed=1)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    again = habits.fresh_denoiser(images, network="mlp", width=8, depth=1, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.net.n_classes is None and first.shape == (1, 8, 8)
    other = habits.fresh_denoiser(images, network="mlp", width=8, depth=1, seed=2)
    assert not torch.equal(other.net.first.weight, first.net.first.weight)
    spread = images.tensors()[0].std().item()
    assert abs(first.sigma_data - spread) < 1e-3, "four digits of it"


def test_halvings():
    sizes = {(8, 8): 1, (28, 28): 2, (64, 64): 3, (256, 256): 3, (27, 28): 0, (12, 64): 1}
    assert {size: habits._halvings(*size) for size in sizes} == sizes


def test_film_frames_are_at_the_size_of_the_data():
    process, x = VE(), torch.full((2, 1, 3, 3), 25.0)
    film = pictures.Film(process, (-1.0, 1.0), every=2)
    for i in range(4):
        film(i, 1.0, x, x)
    frames = film.frames()
    assert len(frames) == 2 and frames[0].shape == (2, 3, 3, 1)
    assert (frames[0] == round(255 * (1 + 25 / 2501**0.5) / 2)).all()  # sigma(1) = 50, alpha = 1


def test_page_layout():
    pixels = pictures.to_bytes(torch.linspace(-2, 2, 5).reshape(5, 1, 1, 1))
    assert pixels.ravel().tolist() == [0, 0, 128, 255, 255]
    page = pictures.page(pixels, columns=3, scale=1)
    expected = [[255] * 7, [255, 0, 255, 0, 255, 128, 255], [255] * 7,
                [255, 255, 255, 255, 255, 255, 255], [255] * 7]
    assert page.tolist() == expected
    assert pictures.page(pixels).shape == (5 * 58, 7 * 58), "400 pixels or more across"
    for bad in (torch.zeros(2, 2, 4, 4), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="pictures"):
            pictures.to_bytes(bad)
    with pytest.raises(ValueError, match="columns"):
        pictures.page(pixels, 0)


# --- The program, installed -----------------------------------------------------

LINES = """
diffnotes train --data digits --process vp --out runs/digits --minutes 0.03
diffnotes sample runs/digits --sampler heun --steps 10 -n 64 --out grid.png
diffnotes sample digits -n 4 --out film.gif
diffnotes sample digits -n 4 --out numbers.npz
diffnotes evaluate digits -n 50 --steps 4
diffnotes info runs/digits
"""


@pytest.mark.development
def test_installed_program(wheel, tmp_path):  # noqa: F811
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    site = run(python, "-Ic", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=empty)
    # Dependencies come from the development environment, whose .pth files are not read from here.
    Path(site.strip(), "development.pth").write_text(sysconfig.get_path("purelib"))
    options = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *options, cwd=empty)
    for line in LINES.split("\n")[1:-1]:
        program, *words = line.split()
        done = run(python.parent / program, *words, cwd=empty)
        assert done.strip(), line
    assert {path.name for path in empty.iterdir()} == {
        "runs", "grid.png", "film.gif", "numbers.npz"
    }, "a program leaves what it was asked for, and nothing else"
    failed = subprocess.run([python.parent / "diffnotes", "info", "runs/none"], cwd=empty,
                            capture_output=True, text=True)
    assert failed.returncode == 1 and "runs/none" in one_line(failed.stderr)
