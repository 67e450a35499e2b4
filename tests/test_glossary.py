"""The glossary: each entry in both languages, in a line, with links that lead somewhere."""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT

pytestmark = pytest.mark.development

TEXT = (ROOT / "nbs" / "glossary.md").read_text(encoding="utf8")
TOC = re.findall(r"(?:file|root):\s*(\S+)", (ROOT / "_toc.yml").read_text(encoding="utf8"))
BLOCKS = re.findall(r"^```\{glossary\}\n(.*?)^```", TEXT, re.M | re.S)
ENTRIES = [entry.splitlines() for block in BLOCKS for entry in block.strip().split("\n\n")]
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def terms(entry):
    return [line for line in entry if not line.startswith("  ")]


def labels():
    """Labels of equations on the pages of the table of contents."""
    found = set()
    for path in (ROOT / "nbs").glob("*.ipynb"):
        if path.stem in TOC:
            cells = json.loads(path.read_text(encoding="utf8"))["cells"]
            prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
            found |= set(re.findall(r"\$\$[ \t]*\(([^()\s]+)\)", prose))
    return found


def test_there_are_enough_and_none_twice():
    assert 60 <= len(ENTRIES) <= 110
    counts = Counter(term for entry in ENTRIES for term in terms(entry))
    assert [term for term, n in counts.items() if n > 1] == []


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry[0])
def test_entry(entry):
    english, *chinese = terms(entry)
    assert not CHINESE.search(english), "the English term comes first"
    assert chinese and all(CHINESE.search(term) for term in chinese), "no Chinese term"
    definition = entry[-1].strip()
    assert len(entry) == len(terms(entry)) + 1, "the definition is one line, after the terms"
    meaning, arrow, links = definition.rpartition(" → ")
    assert arrow and re.fullmatch(r".{10,160}\.", meaning), "a sentence of 10 to 160 characters"
    assert re.fullmatch(r"\{(eq|doc)\}`[^`]+`(, \{(eq|doc)\}`[^`]+`)*", links), "links at the end"


def test_links_lead_somewhere():
    pages = {re.sub(r".*<|>", "", target) for target in re.findall(r"\{doc\}`([^`]+)`", TEXT)}
    assert pages <= set(TOC), f"not in the table of contents: {sorted(pages - set(TOC))}"
    equations = set(re.findall(r"\{eq\}`([^`]+)`", TEXT))
    assert equations <= labels(), f"no such equation: {sorted(equations - labels())}"
