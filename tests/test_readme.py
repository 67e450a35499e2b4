"""The README's examples run as printed and do what their comments say; its links hold."""

import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

import diffnotes as dn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.S | re.M)
TOC = re.findall(r"file: (\S+)", (ROOT / "_toc.yml").read_text(encoding="utf8"))


@pytest.fixture(scope="module")
def names():
    scope = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), scope)
    return scope


def test_the_examples_are_short():
    lengths = [len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS]
    assert len(lengths) == 2 and lengths[0] <= 12 and lengths[1] <= 4


def test_the_shipped_model_draws_images(names):
    images = names["images"]
    assert images.shape == (64, 1, 8, 8)
    assert images.isfinite().all() and images.min() >= -1.2 and images.max() <= 1.2
    digits, _ = dn.digits()
    nearest = torch.cdist(images.flatten(1), digits.flatten(1)).amin(1)
    noise = torch.cdist(torch.randn(64, 64).clamp(-1, 1), digits.flatten(1)).amin(1)
    assert nearest.max() < noise.min()


def test_the_exact_model_draws_from_its_law(names):
    samples, law = names["samples"], names["law"]
    dn.check_mc("mean", samples, law.mean)
    dn.check_mc("weights", (samples[:, :1] > 0).double(), [0.5])
    outside = (samples.abs() - torch.tensor([2.0, 0.0])).square().sum(-1) > 0.25 * 9.21
    dn.check_mc("one per cent outside", outside.double(), 0.01)
    torch.testing.assert_close(names["scores"], law.marginal_score(samples, 0.5, dn.VP()))


def test_a_class_on_request(names):
    digits, labels = dn.digits()
    distances = torch.cdist(names["sevens"].flatten(1), digits.flatten(1))
    found = labels[distances.argmin(1)]
    assert len(found) == 16 and (found == 7).sum() >= 14


def test_training_helps(names):
    law, trained = names["law"], names["trained"]
    assert isinstance(trained, dn.Denoiser)
    x0 = law.sample(2000, generator=torch.Generator().manual_seed(0))
    x_t = dn.VP().perturb(x0, 0.3, torch.randn(x0.shape, generator=torch.Generator()))
    errors = [(denoiser(x_t, 0.3) - names["exact"](x_t, 0.3)).square().mean()
              for denoiser in (trained, dn.Denoiser(dn.MLP(2), dn.VP(), "v", shape=(2,)))]
    assert errors[0] < 0.5 * errors[1]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_chapter_table_is_the_book():
    chapters = [name for name in TOC if re.match(r"\d\d_", name)]
    assert re.findall(r"^\| \[`(\d\d_\w+)`\]", README, re.M) == chapters


def test_citation_has_the_version():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf8")
    version = parser["DEFAULT"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf8")


def test_the_comparison_is_the_one_that_was_measured():
    found = json.loads((ROOT / "nbs" / "shootout.json").read_text(encoding="utf8"))["accuracy"]
    wins = cells = 0
    for rows in found["tables"].values():
        theirs = [row for label, row in rows.items() if not label.startswith("diffnotes")]
        assert 60 <= len(theirs) <= 90
        for ours, *others in zip(rows["diffnotes default"], *theirs, strict=True):
            wins, cells = wins + (ours <= min(filter(None, others))), cells + 1
    assert f"in {wins} of {cells} cells" in README
