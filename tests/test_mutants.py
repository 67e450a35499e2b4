"""What the mutation run breaks, what it leaves alone, and that every named mutant exists."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import mutants  # noqa: E402

pytestmark = pytest.mark.development


def changes(source):
    return [f"{mutant.old} -> {mutant.new}" for mutant in mutants.mutants(1, source)]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("y = a + 2.0 * b", ["a + 2.0 * b -> a - 2.0 * b", "2.0 * b -> 2.0 / b", "2.0 -> 2.2"]),
        ("y = -x[k]", ["-x[k] -> x[k]", "x[k] -> x[k - 1]"]),
        ("y = x.sqrt()", ["x.sqrt() -> x"]),
        ("y = torch.sqrt(x)", ["torch.sqrt(x) -> x"]),
        ("if a < b:\n    y = a", ["a < b -> a >= b"]),
        ("y = f(a, b)", ["f(a, b) -> f(b, a)"]),
    ],
)
def test_formulas_are_broken(source, expected):
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "if not 0 < a <= 1 - b:\n    raise ValueError(f'{a + 1}')",
        "for k in (v <= 2 * eps).nonzero():\n    raise ValueError(k)",
        "flag: bool = True",
        "key: tuple[float, ...] = field(init=False, default=3)",
        "y = min(a, b)",
    ],
)
def test_refusals_and_options_are_left_alone(source):
    assert changes(source) == []


def test_a_choice_is_no_refusal():
    assert changes("if a < b:\n    raise ValueError\nelse:\n    y = a") == ["a < b -> a >= b"]


def test_a_mutant_is_a_whole_cell():
    mutant = list(mutants.mutants(3, "ä = 1.0\nif x:\n    y = -ä  # sign"))[-1]
    assert (mutant.cell, mutant.line, mutant.text) == (3, 3, "y = -ä  # sign")
    assert mutant.source == "ä = 1.0\nif x:\n    y = (ä)  # sign"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_named_mutants_exist(path):
    notebook = mutants.Notebook.read(path)
    mutants.equivalent(notebook, notebook.mutants())


def test_every_name_belongs_to_a_module():
    names = {path.partition(": ")[0] for path in mutants.EQUIVALENT.read_text().split("\n\n")[1:]}
    assert names <= {path.stem for path in mutants.PACKAGE.glob("*.py")}


def test_a_stale_name_is_reported(tmp_path, monkeypatch):
    names = tmp_path / "names.txt"
    names.write_text("Title.\n\nmixtures: no such line\n1 -> 2\nWhy.\n", encoding="utf8")
    monkeypatch.setattr(mutants, "EQUIVALENT", names)
    notebook = mutants.Notebook.read(ROOT / "nbs" / "01_mixtures.ipynb")
    with pytest.raises(SystemExit, match="no such line"):
        mutants.equivalent(notebook, notebook.mutants())


def test_swapping_what_is_equal_breaks_nothing():
    assert changes("layer = Linear(dim, dim)\n") == []
    assert changes("layer = Linear(dim, width)\n") == ["Linear(dim, width) -> Linear(width, dim)"]
