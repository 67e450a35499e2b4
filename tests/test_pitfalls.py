"""The page of pitfalls is in step with the boxes, and each breach of their rules is found."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import pitfalls  # noqa: E402

pytestmark = pytest.mark.development

SOUND = """Before.

:::{admonition} Pitfall: off by one
:class: warning
:name: pitfall-off-by-one
Index 0 is the *first* noisy state.

$$
a = b
$$ (eq-toy-a)

So {eq}`eq-toy-a`.
:::

After."""


@pytest.fixture
def book(tmp_path):
    """Writes a book from its notebooks' Markdown cells; returns the boxes and the contents."""
    def write(toc="", **notebooks):
        (tmp_path / "nbs").mkdir(exist_ok=True)
        lines = "".join(f"  - file: {name}\n" for name in toc.split())
        (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n" + lines)
        for name, sources in notebooks.items():
            path = tmp_path / "nbs" / f"{name.removeprefix('_')}.ipynb"
            made = [{"cell_type": "markdown", "source": text} for text in sources]
            path.write_text(json.dumps({"cells": made}), encoding="utf8")
        return pitfalls.read(tmp_path)
    return write


def test_the_book_keeps_the_rules():
    assert pitfalls.faults(pitfalls.read()[0]) == []


def test_the_page_is_in_sync():
    text = (ROOT / "nbs" / "pitfalls.md").read_text(encoding="utf8")
    assert text == pitfalls.pitfalls(*pitfalls.read()), "run `make ledger`"


def test_a_box_becomes_an_entry(book):
    boxes, toc = book(toc="1", _1=["# Toy\n\n> One line.", "## Counting", SOUND])
    assert pitfalls.faults(boxes) == []
    page = pitfalls.pitfalls(boxes, toc)
    assert ("## Toy\n\n### Off by one\n\nIndex 0 is the *first* noisy state.\n\n$$\na = b\n$$\n\n"
            "So {eq}`eq-toy-a`.\n\n→ [Toy › Counting](#pitfall-off-by-one)\n") in page
    assert "1 boxes" in page and "After." not in page


@pytest.mark.parametrize("title, shown", [
    ("off by one", "Off by one"), ("a root too many", "A root too many"),
    ("g is not g²", "g is not g²"), ("8 bits", "8 bits"), ("`k`, or k - 1?", "`k`, or k - 1?"),
])
def test_headings_begin_with_a_capital_unless_with_a_symbol(book, title, shown):
    boxes, _ = book(_1=[SOUND.replace("off by one", title)])
    assert boxes[0].heading == shown


def test_pages_follow_the_table_of_contents(book):
    other = SOUND.replace("off-by-one", "other").replace("off by one", "other")
    boxes, toc = book(toc="2 1", _1=["# A", SOUND], _2=["# B", other], _3=["# C"])
    page = pitfalls.pitfalls(boxes, toc)
    assert page.index("## B") < page.index("## A") and "## C" not in page


def test_a_page_outside_the_contents_is_checked_and_not_shown(book):
    boxes, toc = book(_1=["# A", SOUND.replace(":name: pitfall-off-by-one\n", "")])
    assert len(pitfalls.faults(boxes)) == 1 and "## A" not in pitfalls.pitfalls(boxes, toc)


def test_a_longer_fence_may_hold_a_shorter_one(book):
    nested = SOUND.replace(":::", "::::").replace("So {eq}", ":::{note}\nInside.\n:::\nSo {eq}")
    boxes, _ = book(_1=[nested])
    assert pitfalls.faults(boxes) == [] and "Inside." in boxes[0].text
    assert boxes[0].text.endswith("So {eq}`eq-toy-a`.")


BREACHES = {
    "no name": (":name: pitfall-off-by-one\n", "", "give it a line `:name: pitfall-word`"),
    "another kind of name": ("pitfall-off", "off", "give it a line `:name: pitfall-word`"),
    "capitals in the name": ("pitfall-off", "pitfall-Off", "`:name: pitfall-word`, not 'pitf"),
    "no class": (":class: warning\n", "", "`:class: warning`"),
    "another class": ("warning", "tip", "`:class: warning`"),
    "no colon": ("Pitfall: off", "Pitfall off", "not of the form `Pitfall: …`"),
    "lower case": ("Pitfall: off", "pitfall: off", "not of the form `Pitfall: …`"),
    "no title": ("Pitfall: off by one", "Pitfall:", "not of the form `Pitfall: …`"),
    "not closed": ("`.\n:::", "`.", "the box is not closed"),
    "empty": (SOUND[SOUND.index("Index"):SOUND.index(":::\n\nAfter")], "", "the box is empty"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_each_breach_is_found(book, breach):
    old, new, message = BREACHES[breach]
    assert SOUND.count(old) == 1
    found = pitfalls.faults(book(_1=["# Toy", SOUND.replace(old, new)])[0])
    assert any(message in fault for fault in found), found


def test_a_name_taken_twice_is_found(book):
    found = pitfalls.faults(book(_1=[SOUND], _2=[SOUND])[0])
    assert len(found) == 2 and all("is taken twice" in fault for fault in found)
    assert len(pitfalls.faults(book(_1=[SOUND + "\n" + SOUND], _2=["none"])[0])) == 2


def test_check_leaves_the_page_alone(monkeypatch, tmp_path, book, capsys):
    book(toc="1", _1=["# Toy", SOUND])
    monkeypatch.setattr(pitfalls, "ROOT", tmp_path)
    monkeypatch.setattr(pitfalls.read, "__defaults__", (tmp_path,))
    page = tmp_path / "nbs" / "pitfalls.md"
    assert pitfalls.main(["--check"]) == 1 and not page.exists()
    assert pitfalls.main([]) == 0 and pitfalls.main(["--check"]) == 0
    page.write_text("stale")
    assert pitfalls.main(["--check"]) == 1 and page.read_text() == "stale"
    assert "out of date" in capsys.readouterr().out
