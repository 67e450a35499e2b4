"""The ledger's rules hold for the book, and each breach of them is found on a small false book."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import ledger  # noqa: E402

pytestmark = pytest.mark.development

EQUATION = "text\n\n$$\na = b\n$$ ({})\n"
CHECK = 'check("{}", double(x), 2 * x)'
SAID = "✓ {}  max error 3e-16\n"


def code(source, printed=""):
    outputs = [{"output_type": "stream", "name": "stdout", "text": [printed]}] if printed else []
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": outputs}


def prose(source):
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def proved(label):
    return [prose(EQUATION.format(label)), code(CHECK.format(label), SAID.format(label))]


@pytest.fixture
def book(tmp_path):
    """Writes a book from its notebooks' cells, and returns its pages and table of contents."""
    def write(toc="", **notebooks):
        (tmp_path / "nbs").mkdir(exist_ok=True)
        lines = "".join(f"  - file: {name}\n" for name in toc.split())
        (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n" + lines)
        for name, cells in notebooks.items():
            path = tmp_path / "nbs" / f"{name.removeprefix('_')}.ipynb"
            path.write_text(json.dumps({"cells": cells}), encoding="utf8")
        return ledger.read(tmp_path)
    return write


def test_the_book_keeps_the_rules():
    assert ledger.faults(*ledger.read()) == []


def test_the_page_is_in_sync():
    text = (ROOT / "nbs" / "ledger.md").read_text(encoding="utf8")
    assert text == ledger.ledger(*ledger.read()), "run `make ledger`"


def test_the_list_is_complete():
    counts = [sum(i[0] == letter for i in ledger.IDS) for letter in "DNS"]
    assert counts == [10, 9, 14]
    assert sorted(ledger.OWNER) == sorted(ledger.IDS)
    assert sum(len(ids.split()) for ids in ledger.OWES.values()) == len(ledger.IDS)


def test_a_sound_page_has_no_faults(book):
    assert ledger.faults(*book(toc="1", _1=proved("eq-toy-double"))) == []


BREACHES = {
    "no check": ([prose(EQUATION.format("eq-toy-a"))], "no check names eq-toy-a"),
    "not executed": ([prose(EQUATION.format("eq-toy-a")), code(CHECK.format("eq-toy-a"))],
                     "has printed no ✓"),
    "another label printed": ([*proved("eq-toy-b"), prose(EQUATION.format("eq-toy-a")),
                               code(CHECK.format("eq-toy-a"), SAID.format("eq-toy-b"))],
                              "the check of eq-toy-a has printed no ✓"),
    "printed by a cell that names no label": (
        [prose(EQUATION.format("eq-toy-a")), code("f(x)", SAID.format("eq-toy-a"))],
        "no check names eq-toy-a"),
    "passed elsewhere than called": (
        [prose(EQUATION.format("eq-toy-a")), code(CHECK.format("eq-toy-a")),
         code("f(x)", SAID.format("eq-toy-a"))], "has printed no ✓"),
    "check in a comment": ([prose(EQUATION.format("eq-toy-a")),
                            code("# " + CHECK.format("eq-toy-a"), SAID.format("eq-toy-a"))],
                           "no check names eq-toy-a"),
    "check without equation": (proved("eq-toy-a")[1:], "which is no equation of this page"),
    "printed without a literal label": ([code("f(x)", SAID.format("eq-toy-a"))],
                                        "a check of eq-toy-a, which is no equation"),
    "misspelt label": ([prose(EQUATION.format("eq-toy-a")),
                        code(CHECK.format("eq-toy-b"), SAID.format("eq-toy-b"))],
                       "a check of eq-toy-b, which is no equation"),
    "same label twice": (proved("eq-toy-a") * 2, "eq-toy-a is labelled twice"),
    "label without a chapter word": (proved("eq-a"), "is not of the form"),
    "label of another kind": (proved("posterior"), "is not of the form"),
    "number that is not in the list": (proved("eq-d11-more"), "is not of the form"),
    "equation of another chapter": (proved("eq-d05-posterior"), "belongs to 03_denoisers"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_each_breach_is_found(book, breach):
    cells, message = BREACHES[breach]
    found = ledger.faults(*book(_1=cells))
    assert any(message in fault for fault in found), found


def test_two_owners_are_found(book):
    found = ledger.faults(*book(_1=proved("eq-toy-a"), _2=proved("eq-toy-a")))
    assert found == ["2: eq-toy-a is labelled in 1 already"]


def test_a_markdown_page_cannot_own_an_equation(book, tmp_path):
    book()
    (tmp_path / "nbs" / "notes.md").write_text(EQUATION.format("eq-toy-a"))
    assert ledger.faults(*ledger.read(tmp_path)) == ["notes: no check names eq-toy-a"]


@pytest.mark.parametrize("missing", ledger.OWES["03_denoisers"].split())
def test_a_finished_chapter_owes_its_equations(book, missing):
    labels = {"D5": "eq-d05-posterior", "S14": "eq-s14-coordinates"}
    cells = [cell for i, label in labels.items() if i != missing for cell in proved(label)]
    whole = [cell for label in labels.values() for cell in proved(label)]
    assert ledger.faults(*book(**{"03_denoisers": cells})) == []
    owed = f"03_denoisers: {missing} ({ledger.IDS[missing]}) is owed"
    assert ledger.faults(*book(toc="03_denoisers", **{"03_denoisers": cells})) == [owed]
    assert ledger.faults(*book(toc="03_denoisers", **{"03_denoisers": whole})) == []


def test_a_row_tells_code_kind_and_largest_error(book):
    label = "eq-toy-double"
    cells = [code("#| export\ndef double(x):\n    return 2 * x"), code("y = double(x)"),
             prose(EQUATION.format(label)),
             code(f'check("{label}", y, 2 * x)', SAID.format(label) + f"✓ {label}  max error 0\n"),
             code(f'check_mc("{label}", y, 2)', f"✓ {label}  largest z 1.3 of 4  (n = 50, se 1)")]
    page = ledger.ledger(*book(toc="1", _1=cells))
    assert ("| {eq}`eq-toy-double` `eq-toy-double` | `double` "
            "| closed form 3e-16; Monte Carlo z 1.3, n = 50 |") in page


def test_a_variable_with_the_name_of_a_function_is_no_function(book):
    cells = [code("double = 3"), prose(EQUATION.format("eq-toy-a")),
             code('check("eq-toy-a", double, 3)', SAID.format("eq-toy-a"))]
    library = [code("#| export\ndef double(x):\n    return 2 * x")]
    assert "| – | closed form 3e-16 |" in ledger.ledger(*book(toc="1", _1=cells, _2=library))


def test_imported_names_and_names_of_the_package_are_found(book):
    library = [code("#| export\ndef double(x):\n    return 2 * x\ndef half(x):\n    return x / 2")]
    cells = [code("from diffnotes.toy import double"), prose(EQUATION.format("eq-toy-a")),
             code('check("eq-toy-a", dn.half(double(3)), 3)', SAID.format("eq-toy-a"))]
    page = ledger.ledger(*book(toc="1", _1=cells, _2=library))
    assert "| `half`, `double` |" in page or "| `double`, `half` |" in page


def test_methods_are_named_with_their_class(book):
    cells = [code("#| export\nclass Curve:\n    pass"), code("curve = Curve()"),
             prose(EQUATION.format("eq-toy-a")),
             code('check("eq-toy-a", curve.alpha(t), 1)', SAID.format("eq-toy-a"))]
    assert "| `Curve.alpha` |" in ledger.ledger(*book(toc="1", _1=cells))


def test_classes_are_left_out_where_functions_tell_more(book):
    library = "#| export\nclass Curve:\n    pass\ndef double(x):\n    return 2 * x"
    cells = [code(library), prose(EQUATION.format("eq-toy-a")),
             code('check("eq-toy-a", double(Curve()), 3)', SAID.format("eq-toy-a"))]
    assert "| `double` |" in ledger.ledger(*book(toc="1", _1=cells))


def test_an_unfinished_notebook_is_not_linked(book):
    assert "{eq}`eq-toy-a`" not in ledger.ledger(*book(_1=proved("eq-toy-a")))
