"""The wheel as a stranger gets it: built, inspected, run in a new environment."""

import re
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.development

PROGRAM = """
import torch, diffnotes as dn
print(dn.__file__)
images = dn.sample(dn.load_pretrained("digits"), n=4, seed=0)
assert images.shape == (4, 1, 8, 8) and images.isfinite().all(), images
assert images.std() > 0.2, "the samples are blank"
"""


def run(*command, cwd):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(checkout):
    """Builds the wheel with no network."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", "dist"]
    run(sys.executable, "-m", "pip", "wheel", ".", *options, cwd=checkout)
    (path,) = (checkout / "dist").glob("*.whl")
    return path


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_contents(wheel):
    assert wheel.stat().st_size < 10e6, f"{wheel.stat().st_size / 1e6:.1f} MB: the budget is 10 MB"
    with zipfile.ZipFile(wheel) as archive:
        inside = {n for n in archive.namelist() if ".dist-info/" not in n}
    sources = [p for p in (ROOT / "diffnotes").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    expected = {path.relative_to(ROOT).as_posix() for path in sources}
    assert "diffnotes/py.typed" in expected and "diffnotes/assets/digits.npz" in expected
    assert "diffnotes/assets/digits/model.safetensors" in expected
    assert inside == expected, f"add to package-data in pyproject.toml: {inside ^ expected}"


def test_requirements(wheel):
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf8")
    ini, message = parser["DEFAULT"], metadata(wheel)
    assert message["Version"] == ini["version"]
    assert message["Requires-Python"] == f">={ini['min_python']}"
    core = [r for r in message.get_all("Requires-Dist") if "extra ==" not in r]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in core}
    assert names == {"torch", "numpy", "safetensors", "tqdm"}, "one more thing to install for all"
    assert sorted(core) == sorted(ini["requirements"].split())
    extras = {key.removesuffix("_requirements") for key in ini if key.endswith("_requirements")}
    assert set(message.get_all("Provides-Extra", [])) == extras


def test_runs_where_it_is_installed(wheel, tmp_path):
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-I", "-c", purelib, cwd=empty).strip())
    # Dependencies come from the development environment; its own .pth files, the editable install
    # among them, are not read from here.
    (site / "development.pth").write_text(sysconfig.get_path("purelib"))
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=empty)
    where = Path(run(python, "-I", "-c", PROGRAM, cwd=empty).strip())
    assert where.is_relative_to(site), f"{where} was imported, not the wheel"
    assert not list(empty.iterdir()), "importing or sampling left files in the working folder"
