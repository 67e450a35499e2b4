"""Saved denoisers: bit-equal round trips, failures at every moment, files that are not ours."""

import builtins
import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffnotes import networks, processes
from diffnotes.denoisers import Denoiser, guided
from diffnotes.mixtures import Empirical
from diffnotes.pretrained import (
    from_pretrained,
    list_pretrained,
    load,
    load_pretrained,
    model_card,
    push_to_hub,
    read_config,
    save,
)
from diffnotes.processes import EDM, VE, VP, Cosine, Discrete, Flow, SubVP

WEIGHTS, CONFIG, PREVIOUS = "model.safetensors", "config.json", "model.safetensors.previous"
CARD = "README.md"


def stirred(net):
    """The network with no weight left at its initial zero."""
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def mlp(seed=0, **sizes):
    torch.manual_seed(seed)
    return stirred(networks.MLP(2, **{"hidden": 16, "depth": 1, **sizes}))


def make(seed=0, process=None, predicts="v", **options):
    return Denoiser(mlp(seed), process or VP(), predicts, (2,), **options)


def same(one, other):
    """Same conventions, and bit for bit the same weights."""
    names = ("process", "predicts", "time", "shape", "sigma_data", "dtype")
    told = all(getattr(one, name) == getattr(other, name) for name in names)
    weights, others = one.net.state_dict(), other.net.state_dict()
    equal = [torch.equal(weights[k], others[k]) for k in weights]
    return told and weights.keys() == others.keys() and all(equal)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


@pytest.fixture
def saved(folder):
    save(make(), folder)
    return folder


# --- Round trips --------------------------------------------------------------


@pytest.mark.parametrize(
    "process",
    [
        VP(0.2, 15.0), SubVP(), VE(0.02, 40.0), EDM(0.001, 90.0), Cosine(), Flow(),
        Discrete(processes.linear_betas(50)), Discrete(processes.cosine_betas(1000)),
    ],
    ids=lambda process: type(process).__name__,
)
def test_every_process(process, folder):
    denoiser = make(process=process)
    assert save(denoiser, folder) == folder
    again = load(folder)
    assert same(denoiser, again)
    x_t = torch.randn(5, 2)
    assert torch.equal(again(x_t, 0.5), denoiser(x_t, 0.5))


@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "score", "velocity", "edm"])
@pytest.mark.parametrize("time", ["t", "log_snr", "log_sigma", "index"])
def test_every_convention(predicts, time, folder):
    process = Discrete(processes.linear_betas(100))
    denoiser = make(process=process, predicts=predicts, time=time, sigma_data=0.3)
    save(denoiser, folder)
    assert same(denoiser, load(folder)) and load(folder).sigma_data == 0.3


@pytest.mark.parametrize("shape", [None, (2,), (2, 1)])
def test_every_shape(shape, folder):
    denoiser = Denoiser(mlp(), VP(), "eps", shape)
    save(denoiser, folder)
    assert same(denoiser, load(folder))


def test_a_u_net_with_classes(folder):
    net = stirred(networks.UNet(1, channels=8, multipliers=(1, 2), n_classes=10))
    denoiser = Denoiser(net, Cosine(), "v", (1, 8, 8)).eval()
    save(denoiser, folder)
    x_t, cond = torch.randn(3, 1, 8, 8), torch.tensor([1, 9, -1])
    assert torch.equal(load(folder)(x_t, 0.4, cond), denoiser(x_t, 0.4, cond))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_network_keeps_its_dtype(dtype, folder):
    denoiser = make().to(dtype=dtype)
    save(denoiser, folder)
    assert same(denoiser, load(folder)) and load(folder).dtype == dtype


def test_again_and_again(folder):
    denoiser = make()
    for _ in range(3):
        save(denoiser, folder)
        denoiser = load(folder)
    assert same(denoiser, make())
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]


def test_where_and_how_it_comes_back(saved):
    assert not load(saved).net.training and load(str(saved)).device == torch.device("cpu")
    assert all(p.requires_grad for p in load(saved).parameters())
    assert load(saved, device="meta").device.type == "meta"


def test_training_mode_and_devices_of_the_original_stay(folder):
    denoiser = make().train()
    save(denoiser, folder)
    assert denoiser.net.training


def test_the_random_state_stays(folder):
    denoiser = make()
    before = torch.get_rng_state()
    save(denoiser, folder)
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_weights(folder):
    net = mlp(depth=2)
    names = [k for k, v in net.state_dict().items() if v.shape == (16, 16)]
    first, second = net.get_parameter(names[0]), net.get_parameter(names[1])
    with torch.no_grad():
        second.copy_(first)
    denoiser = Denoiser(net, VP(), "v", (2,))
    owner, _, leaf = names[1].rpartition(".")
    setattr(net.get_submodule(owner), leaf, first)
    save(denoiser, folder)
    assert same(denoiser, load(folder))


def test_the_sentence_can_be_read(folder):
    save(make(), folder, data_range=(-1, 1), levels=17, info={"data": "moons", "steps": 7})
    config = read_config(folder)
    assert config == json.loads((folder / CONFIG).read_text())
    assert config["data_range"] == [-1.0, 1.0] and config["info"] == {"data": "moons", "steps": 7}
    assert config["levels"] == 17
    assert config["network"]["name"] == "MLP" and config["process"]["name"] == "VP"
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert config["weights_sha256"] == digest
    assert len((folder / CONFIG).read_text().splitlines()) == len(config) + 2


@pytest.mark.parametrize("levels", [1, 0, -3, 2.5, True, "17"])
def test_senseless_levels(folder, levels):
    with pytest.raises((TypeError, ValueError), match="count"):
        save(make(), folder, levels=levels)
    assert not folder.exists()


def test_files_from_before_there_were_levels(saved):
    edit(saved, levels=...)
    assert read_config(saved)["levels"] is None and same(load(saved), make())


# --- Fewer bits ---------------------------------------------------------------


@pytest.mark.parametrize("dtype,bits", [(torch.float16, 11), (torch.bfloat16, 8)])
def test_half_storage(dtype, bits, folder):
    denoiser = make()
    save(denoiser, folder)
    full = (folder / WEIGHTS).stat().st_size
    save(denoiser, folder, dtype=dtype)
    stored = load_file(folder / WEIGHTS)
    assert all(v.dtype == dtype for v in stored.values() if v.is_floating_point())
    assert (folder / WEIGHTS).stat().st_size < 0.65 * full
    again = load(folder)
    assert again.dtype == torch.float32
    for one, other in zip(denoiser.parameters(), again.parameters(), strict=True):
        assert torch.equal(other, one.to(dtype).float())
        assert ((other - one).abs() <= 2.0**-bits * one.abs() + 2.0**-25).all()


def test_values_beyond_the_range(folder):
    denoiser = make()
    torch.nn.init.constant_(next(denoiser.parameters()), 7e4)
    with pytest.raises(ValueError, match="beyond the range of torch.float16"):
        save(denoiser, folder, dtype=torch.float16)
    assert not folder.exists()
    save(denoiser, folder, dtype=torch.bfloat16)
    torch.nn.init.constant_(next(denoiser.parameters()), torch.inf)
    save(denoiser, folder, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e5m2])
def test_other_dtypes(dtype, folder):
    with pytest.raises(ValueError, match="dtype must be one of 'float64', 'float32'"):
        save(make(), folder, dtype=dtype)


# --- What cannot be saved -----------------------------------------------------


@pytest.mark.parametrize(
    "thing,message",
    [
        (lambda: Empirical(torch.randn(3, 2)).denoiser(VP()), "no exact law"),
        (lambda: Denoiser(lambda x, t: x, VP(), "v", (2,)), "net is a function"),
        (lambda: Denoiser(torch.nn.Linear(2, 2).forward, VP(), "v", (2,)), "net is a method"),
        (lambda: Denoiser(torch.nn.Linear(2, 2), VP(), "v", (2,)), "net is a Linear"),
        (lambda: guided(Denoiser(mlp(n_classes=3), VP(), "v", (2,)), 2.0), "net is a _Guided"),
        (lambda: make(time=lambda t: 1000 * t), "time with a name"),
        (lambda: mlp(), "only a Denoiser.*MLP"),
        (lambda: None, "only a Denoiser.*NoneType"),
    ],
)
def test_what_has_no_words(thing, message, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(TypeError, match=message):
        save(thing(), saved)
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}


@pytest.mark.parametrize(
    "options,error",
    [
        ({"info": {"f": print}}, TypeError),
        ({"info": {"loss": float("nan")}}, TypeError),
        ({"info": {"x": torch.ones(2)}}, TypeError),
        ({"data_range": (1, -1)}, ValueError),
        ({"data_range": (0, float("inf"))}, ValueError),
        ({"data_range": (0, 1, 2)}, ValueError),
    ],
)
def test_senseless_options(options, error, folder):
    with pytest.raises(error):
        save(make(), folder, **options)
    assert not folder.exists()


def test_what_would_not_load_is_not_saved(folder):
    denoiser = make()
    denoiser.net.extra = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"do not fit.*1 unknown \(extra\)"):
        save(denoiser, folder)
    assert not folder.exists()


def test_a_shape_that_the_network_does_not_take(folder):
    for net, shape in ((mlp(), (3,)), (networks.UNet(channels=4), (1, 7, 8))):
        with pytest.raises(ValueError, match="shape .* does not fit the network"):
            save(Denoiser(net, VP(), "v", shape), folder)
    assert not folder.exists()


# --- Where nothing can be saved -----------------------------------------------


@pytest.mark.parametrize("config", [
    '{"_class_name": "UNet2DModel"}', '{"format": "pt"}', "[]", "no JSON", "", None])
def test_files_of_another_library_stay(folder, config):
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"theirs")
    if config is not None:
        (folder / CONFIG).write_text(config)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    name = WEIGHTS if config is None else CONFIG
    with pytest.raises(FileExistsError, match=f"{folder} has a {name} that diffnotes did not"):
        save(make(), folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_later_version_is_still_ours(saved):
    edit(saved, version=2)
    save(make(1), saved)
    assert same(load(saved), make(1))


def test_a_file_is_no_folder(folder):
    folder.write_text("mine")
    with pytest.raises(FileExistsError, match=f"{folder} is a file"):
        save(make(), folder)
    assert folder.read_text() == "mine"


def test_a_folder_that_cannot_be_written(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    if getattr(os, "geteuid", int)() == 0:  # nothing is closed to root
        monkeypatch.setattr(builtins, "open", closed)
    saved.chmod(0o555)
    try:
        with pytest.raises(OSError, match=f"{saved} could not be written.*[Pp]ermission denied"):
            save(make(1), saved)
    finally:
        saved.chmod(0o755)
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}


def closed(path, *args):
    raise PermissionError(13, "permission denied")


@pytest.mark.parametrize("k", [1, 2])
def test_a_first_save_that_fails_leaves_nothing(folder, monkeypatch, k):
    count, really = 0, os.replace

    def failing(*args):
        nonlocal count
        count += 1
        if count == k:
            raise OSError(28, "No space left on device")
        really(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="No space"):
            save(make(), folder)
    assert os.listdir(folder) == []
    save(make(), folder)
    assert same(load(folder), make())


# --- Failures in the middle ---------------------------------------------------


def test_a_failing_disk(saved, monkeypatch):
    """Every system call that a save makes fails in turn; the old model loads after each."""
    really = {"replace": os.replace, "fsync": os.fsync, "open": builtins.open}
    for name, where in (("replace", os), ("fsync", os), ("open", builtins)):
        for k in range(1, 4):
            count = 0

            def failing(*args, really=really[name], k=k, **options):
                nonlocal count
                count += 1
                if count == k:
                    raise OSError(28, "No space left on device")
                return really(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(where, name, failing)
                try:
                    save(make(1), saved)
                    done = True
                except OSError:
                    done = False
            assert same(load(saved), make(1 if done else 0)), (name, k)
            assert sorted(os.listdir(saved)) == [CONFIG, WEIGHTS], (name, k)
            assert not done or count < k, (name, k)
            save(make(0), saved)


def test_a_failing_writer(saved, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(make(1), saved)
    assert same(load(saved), make(0)) and sorted(os.listdir(saved)) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_killed_process(saved, k):
    """The process dies just before its k-th renaming, with no chance to tidy up."""
    code = f"""
import os
from diffnotes import networks
from diffnotes.denoisers import Denoiser
from diffnotes.pretrained import save
from diffnotes.processes import VP
count, really = 0, os.replace
def replace(*args):
    global count
    count += 1
    if count == {k}: os._exit(9)
    really(*args)
os.replace = replace
save(Denoiser(networks.MLP(2, hidden=8, depth=1), VP(), "v", (2,)), {str(saved)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (9 if k < 4 else 0), done.stderr
    if k < 4:
        assert same(load(saved), make(0))
    else:
        assert load(saved).net.config()["hidden"] == 8
    save(make(2), saved)
    assert same(load(saved), make(2)) and not (saved / PREVIOUS).exists()


def test_leftovers_of_a_finished_save_do_no_harm(saved, monkeypatch):
    """A save that was cut off after its last renaming leaves the previous weights behind."""
    old = (saved / WEIGHTS).read_bytes()
    save(make(1), saved)
    (saved / PREVIOUS).write_bytes(old)
    assert same(load(saved), make(1))
    monkeypatch.setattr(os, "fsync", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(make(2), saved)
    assert same(load(saved), make(1))


FULL = """
import resource, sys
import torch
from diffnotes import networks, pretrained, processes
from diffnotes.denoisers import Denoiser
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    wide = networks.MLP(2, hidden=64, depth=1)
    pretrained.save(Denoiser(wide, processes.VP(), "v", (2,)), sys.argv[1])
except OSError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("limit", [0, 100, 4096, 40_000])
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk(folder, limit, there):
    """A process that may write no more than so many bytes into a file."""
    pytest.importorskip("resource")
    if there:
        save(make(), folder)
    done = subprocess.run([sys.executable, "-c", FULL, folder, str(limit)], capture_output=True,
                          text=True)
    message = f"{folder} could not be written, and holds what it held before: File too large"
    assert done.returncode == 1 and done.stderr.splitlines() == [message]
    assert sorted(os.listdir(folder)) == ([CONFIG, WEIGHTS] if there else [])
    assert not there or same(load(folder), make())
    save(make(2), folder)
    assert same(load(folder), make(2))


def test_other_files_stay(saved):
    (saved / "notes.txt").write_text("mine")
    save(make(1), saved)
    assert (saved / "notes.txt").read_text() == "mine"


# --- Files that are not ours --------------------------------------------------


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    for key, value in changes.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("where", ["nowhere", "empty", "no_weights", "no_config"])
def test_missing(where, saved, tmp_path):
    target = {"nowhere": tmp_path / "nowhere", "empty": tmp_path}.get(where, saved)
    if where.startswith("no_"):
        (saved / (WEIGHTS if where == "no_weights" else CONFIG)).unlink()
    with pytest.raises(FileNotFoundError, match="holds no saved denoiser"):
        load(target)


@pytest.mark.parametrize("keep", [0, 1, 7, 100, -100, -1])
def test_cut_short(saved, keep):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(ValueError, match="model.safetensors is not the file.*damaged, cut short"):
        load(saved)


@pytest.mark.parametrize("place", [0, 20, 2000, -1])
def test_one_flipped_bit(saved, place):
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[place] ^= 1
    (saved / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load(saved)


def test_no_safetensors_at_all(saved):
    torch.save(mlp().state_dict(), saved / WEIGHTS)
    with pytest.raises(ValueError, match="is not the file that config.json names"):
        load(saved)
    edit(saved, weights_sha256=hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="no safetensors file"):
        load(saved)


@pytest.mark.parametrize("text", ["", "{", '{"format": ', "\x00\x01", '"a string"', "[]"])
def test_a_damaged_sentence(saved, text):
    (saved / CONFIG).write_text(text)
    with pytest.raises(ValueError, match="config.json (is damaged|was not written by diffnotes)"):
        load(saved)


def test_bytes_that_are_no_text(saved):
    (saved / CONFIG).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is damaged"):
        load(saved)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"format": "diffusers"}, "not written by diffnotes"),
        ({"format": ...}, "not written by diffnotes"),
        ({"version": 2}, "config.json has version 2, we read 1"),
        ({"version": ...}, "has version None"),
        ({"network": ..., "time": ...}, "lacks network, time"),
        ({"weights_sha256": ...}, "lacks weights_sha256"),
        ({"network": {"name": "Transformer"}}, "Transformer"),
        ({"network": {"name": "MLP", "dim": 2, "colour": 3}}, "colour"),
        ({"network": {"name": "MLP"}}, "describes no denoiser.*dim"),
        ({"network": None}, "describes no denoiser"),
        ({"network": {"name": "MLP", "dim": 3, "hidden": 16, "depth": 1}}, "of another shape"),
        ({"network": {"name": "MLP", "dim": 2, "hidden": 16, "depth": 2}}, "missing"),
        ({"process": {"name": "Heat"}}, "Heat"),
        ({"process": {"name": "VP", "beta_min": -1.0}}, "beta_min"),
        ({"process": []}, "describes no denoiser"),
        ({"predicts": "noise"}, "noise"),
        ({"time": "seconds"}, "seconds"),
        ({"time": "index"}, "Discrete"),
        ({"shape": [2, 0]}, "shape"),
        ({"shape": 3}, "describes no denoiser"),
        ({"shape": [3]}, r"shape \(3,\) does not fit the network.*\(B, 2\)"),
        ({"network": {"name": "MLP", "dim": 2, "time_scale": "a"}}, "time_scale"),
        ({"dtype": "float8"}, "float8"),
        ({"predicts": "edm"}, "sigma_data"),
    ],
)
def test_a_sentence_that_makes_no_sense(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load(saved)
    assert CONFIG in str(caught.value) and caught.value.__cause__ is None


def test_weights_of_another_network(saved, tmp_path):
    other = save(Denoiser(mlp(depth=3), VP(), "v", (2,)), tmp_path / "other")
    (saved / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match="is not the file that config.json names"):
        load(saved)
    edit(saved, weights_sha256=read_config(other)["weights_sha256"])
    with pytest.raises(ValueError, match=r"\d+ unknown \(.*, …\)"):
        load(saved)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e5m2])
def test_weights_of_another_kind(saved, dtype):
    state = {k: v.to(dtype) for k, v in load_file(saved / WEIGHTS).items()}
    save_file(state, saved / WEIGHTS)
    edit(saved, weights_sha256=hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"\d+ of a dtype that no weight has \(.*, …\)"):
        load(saved)


def test_a_pickle_in_their_place_is_not_run(saved, tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    data = pickle.dumps(Trap())
    (saved / WEIGHTS).write_bytes(data)
    edit(saved, weights_sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ValueError, match="no safetensors file"):
        load(saved)
    assert not (tmp_path / "sprung").exists()


# --- Cards and the Hub ---


class Hub:
    """A folder in the Hub's place."""

    def __init__(self, shelf):
        self.shelf, self.made, self.commits, self.token = shelf, [], [], None

    def client(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        self.made.append((repo_id, private))

    def create_commit(self, repo_id, operations, *, commit_message, revision=None):
        folder = self.shelf / repo_id
        folder.mkdir(parents=True, exist_ok=True)
        for add in operations:
            (folder / add.path_in_repo).write_bytes(add.path_or_fileobj)
        self.commits.append((repo_id, sorted(add.path_in_repo for add in operations), revision))
        return SimpleNamespace(commit_url=f"hub:{repo_id}/{len(self.commits)}")

    def snapshot_download(self, repo_id, *, revision=None, token=None, allow_patterns=None):
        self.token = token
        assert allow_patterns == [CONFIG, WEIGHTS]
        if not (self.shelf / repo_id).is_dir():
            raise ConnectionError("404 Client Error.\n\nRepository Not Found")
        return str(self.shelf / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(library, "HfApi", fake.client)
    monkeypatch.setattr(library, "snapshot_download", fake.snapshot_download)
    return fake


def test_there_and_back(hub, saved):
    card = model_card(saved, "Moons")
    assert push_to_hub(saved, "a/moons", card=card, private=True, token="key") == "hub:a/moons/1"
    assert hub.made == [("a/moons", True)] and hub.token == "key"
    assert hub.commits == [("a/moons", [CARD, CONFIG, WEIGHTS], None)]
    assert (hub.shelf / "a/moons" / CARD).read_text() == card
    again = from_pretrained("a/moons", revision="main", token="other")
    assert same(again, make()) and not again.net.training and hub.token == "other"
    assert from_pretrained("a/moons", device="meta").device.type == "meta"


def test_a_denoiser_goes_without_a_folder(hub):
    push_to_hub(make(3), "a/moons", revision="trial")
    assert same(from_pretrained("a/moons"), make(3)) and hub.commits[0][2] == "trial"
    assert (hub.shelf / "a/moons" / CARD).read_text().startswith("---\nlibrary_name: diffnotes\n")


def test_the_folders_own_card(hub, saved):
    (saved / CARD).write_text("# Mine", encoding="utf-8")
    push_to_hub(saved, "a/moons")
    assert (hub.shelf / "a/moons" / CARD).read_text() == "# Mine"


def test_what_does_not_load_is_not_sent(hub, saved, tmp_path):
    (saved / WEIGHTS).write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged, cut short"):
        push_to_hub(saved, "a/moons")
    with pytest.raises(FileNotFoundError, match="holds no saved denoiser"):
        push_to_hub(tmp_path / "nowhere", "a/moons")
    with pytest.raises(TypeError, match="only a time with a name"):
        push_to_hub(make(time=lambda t: t), "a/moons")
    assert not hub.made and not hub.commits


def test_a_server_that_refuses(hub, saved, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("403 Forbidden:\n\n  no write access")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(OSError) as caught:
        push_to_hub(saved, "a/moons")
    assert str(caught.value) == "a/moons was not sent to the Hub: 403 Forbidden: no write access"
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    with pytest.raises(OSError) as caught:
        from_pretrained("a/unknown")
    assert str(caught.value) == ("a/unknown is no folder, and was not fetched from the Hub: "
                                 "404 Client Error. Repository Not Found")


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_what_comes_from_the_hub_is_not_trusted(hub, saved, damage):
    push_to_hub(saved, "a/moons")
    there = hub.shelf / "a/moons"
    if damage == "cut":
        (there / WEIGHTS).write_bytes((there / WEIGHTS).read_bytes()[:-1])
    elif damage == "foreign":
        (there / CONFIG).write_text('{"_class_name": "UNet2DModel"}')
    else:
        (there / CONFIG).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="damaged|not written by|holds no"):
        from_pretrained("a/moons")


def test_a_folder_comes_first(hub, saved, tmp_path, monkeypatch):
    assert same(from_pretrained(saved), make()) and same(from_pretrained(str(saved)), make())
    monkeypatch.chdir(tmp_path)
    push_to_hub(make(4), "a/moons")
    save(make(5), "a/moons")
    assert same(from_pretrained("a/moons"), make(5))
    for nowhere in (tmp_path / "gone", "gone", "./a/b/c", "../gone"):
        with pytest.raises(OSError, match="holds no saved denoiser|no folder"):
            from_pretrained(nowhere)


def test_no_network():
    """The real client, told to stay at home: one line."""
    pytest.importorskip("huggingface_hub")
    code = """
from diffnotes.pretrained import from_pretrained
try:
    from_pretrained("a/b")
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.stdout.startswith("a/b is no folder, and was not fetched from the Hub: ")
    assert len(done.stdout.splitlines()) == 1 and not done.stderr, done.stderr


def test_without_the_client_library(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    needed = r"needs huggingface_hub: pip install 'diffnotes\[train\]'"
    with pytest.raises(ImportError, match=needed):
        push_to_hub(saved, "a/moons")
    with pytest.raises(ImportError, match=needed):
        from_pretrained("a/moons")
    assert same(from_pretrained(saved), make())


def test_the_card(folder):
    save(make(), folder, data_range=(0, 1), levels=256, info={"steps": 7})
    card = model_card(folder, "Moons", license="mit", about={"Data": "two moons", "Limits": "all"})
    head, body = card.split("---\n\n", 1)
    assert head == "---\nlicense: mit\nlibrary_name: diffnotes\ntags: [diffusion]\n"
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == ["# Moons", "## Data", "## Limits", "## What it is"]
    for row in ("| levels | `256` |", "| data_range | `[0.0, 1.0]` |", "| steps | `7` |",
                '| process | `{"name": "VP", "beta_min": 0.1, "beta_max": 20.0}` |'):
        assert row in body.splitlines()
    with pytest.raises(FileNotFoundError, match="holds no saved denoiser"):
        model_card(folder / "nowhere", "Moons")


# --- The models that ship -----------------------------------------------------


def test_unknown_names_list_the_known():
    known = ".*".join(list_pretrained())
    with pytest.raises(ValueError, match=f"name must be one of.*{known}"):
        load_pretrained("imagenet")
    with pytest.raises(ValueError, match="name must be"):
        load_pretrained("../assets/digits")


@pytest.mark.parametrize("name", list_pretrained() or [None])
def test_each_model_that_ships_loads(name):
    if name is None:
        pytest.skip("no model ships yet")
    denoiser = load_pretrained(name)
    x_t = torch.randn(2, *denoiser.shape)
    assert denoiser(x_t, 0.5).isfinite().all() and not denoiser.net.training
