"""Writes nbs/pitfalls.md: the Pitfall boxes of all pages, each with a link to where it stands.

python tools/pitfalls.py           write the page; exit status 1 if a box breaks a rule
python tools/pitfalls.py --check   write nothing; status 1 also if the page is out of date
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ledger import ROOT, cells

BOX = re.compile(r"(:{3,})\{admonition\}\s*(pitfall.*)", re.I)
TITLE = re.compile(r"Pitfall: (\S.*)")
OPTION = re.compile(r":(\w+):\s*(.*)")
NAME = re.compile(r"pitfall-[a-z0-9]+(-[a-z0-9]+)*")
HEADING = re.compile(r"(#{1,6}) (.+)")
LABEL = re.compile(r"\$\$[ \t]*\([^()\s]+\)")


@dataclass
class Box:
    """One Pitfall box, and the headings above it."""

    page: str
    chapter: str
    section: str
    title: str
    options: dict[str, str]
    text: str
    closed: bool

    @property
    def name(self) -> str:
        return self.options.get("name", "")

    @property
    def heading(self) -> str:
        """The title without the word Pitfall; a lone letter that begins it may be a symbol."""
        match = TITLE.fullmatch(self.title)
        title = match[1] if match else self.title
        symbol = len(title.split()[0]) == 1 and title[0] != "a"
        return title if symbol else title[0].upper() + title[1:]


def take(lines: list[str], fence: str) -> tuple[dict[str, str], str, bool]:
    """Options and text of a box from the lines after its first, and whether it is closed."""
    end = next((i for i, line in enumerate(lines)
                if re.fullmatch(r":+", line.strip()) and len(line.strip()) >= len(fence)), None)
    inside, options = lines[:end], {}
    while inside and (match := OPTION.fullmatch(inside[0].strip())):
        options[match[1]] = match[2]
        inside = inside[1:]
    return options, "\n".join(inside).strip(), end is not None


def read_page(path: Path) -> list[Box]:
    """The boxes of one notebook, in order."""
    found, chapter, section = [], path.stem, ""
    for kind, source, _ in cells(path):
        lines = source.splitlines() if kind == "markdown" else []
        for i, line in enumerate(lines):
            if match := HEADING.fullmatch(line.strip()):
                first = match[1] == "#"
                chapter, section = (match[2], "") if first else (chapter, match[2])
            if match := BOX.fullmatch(line.strip()):
                found.append(Box(path.stem, chapter, section, match[2].strip(),
                                 *take(lines[i + 1:], match[1])))
    return found


def read(root: Path = ROOT) -> tuple[list[Box], list[str]]:
    """The boxes of all notebooks, and the pages of the table of contents, in its order."""
    toc = re.findall(r"(?:file|root):\s*(\S+)", (root / "_toc.yml").read_text(encoding="utf8"))
    paths = sorted((root / "nbs").glob("*.ipynb"))
    return [box for path in paths for box in read_page(path)], toc


def box_faults(box: Box) -> list[str]:
    """What is wrong with one box, seen by itself."""
    out = []
    if not TITLE.fullmatch(box.title):
        out.append("the title is not of the form `Pitfall: …`")
    if not NAME.fullmatch(box.name):
        out.append(f"give it a line `:name: pitfall-word`, not {box.name!r}")
    if box.options.get("class") != "warning":
        out.append("give it a line `:class: warning`")
    if not box.closed:
        out.append("the box is not closed in its cell")
    if not box.text:
        out.append("the box is empty")
    return [f"{box.page}, {box.title!r}: {text}" for text in out]


def faults(boxes: list[Box]) -> list[str]:
    """Every breach of the rules, one line each."""
    out = [fault for box in boxes for fault in box_faults(box)]
    names = Counter(box.name for box in boxes if box.name)
    return out + [f"{box.page}, {box.title!r}: the name {box.name} is taken twice"
                  for box in boxes if names[box.name] > 1]


def entry(box: Box) -> str:
    """One box as a section of the page; equations in it lose their labels, which stay there."""
    place = " › ".join(filter(None, [box.chapter, box.section]))
    place = place.replace("[", r"\[").replace("]", r"\]")
    text = LABEL.sub("$$", box.text)
    return f"### {box.heading}\n\n{text}\n\n→ [{place}](#{box.name})\n"


def pitfalls(boxes: list[Box], toc: list[str]) -> str:
    """The text of the page."""
    pages = [(page, [box for box in boxes if box.page == page]) for page in toc]
    pages = [(page, here) for page, here in pages if here]
    n = sum(len(here) for _, here in pages)
    parts = [INTRO.format(n=n)]
    for _, here in pages:
        parts += [f"## {here[0].chapter}\n", *(entry(box) for box in here)]
    return "\n".join([*parts, SOURCES])


INTRO = """# Pitfalls

Places where code of this field has gone wrong, or would without a crash: {n} boxes, collected from
the pages of the book in their order. The link under each leads to the box at its place, where the
cells around it show what it says in numbers; a "cell" or "page" spoken of is one there.

This page is written by a script. Slips that are in print, each run beside the right form, have a
page of their own: {{doc}}`errata`.
"""
SOURCES = """## Sources

```{bibliography}
:filter: docname in docnames
```
"""


def main(argv: list[str]) -> int:
    """Writes or checks the page; returns the exit status."""
    boxes, toc = read()
    broken, text, path = faults(boxes), pitfalls(boxes, toc), ROOT / "nbs" / "pitfalls.md"
    if "--check" not in argv:
        path.write_text(text, encoding="utf8")
    elif not path.exists() or path.read_text(encoding="utf8") != text:
        broken.append("nbs/pitfalls.md is out of date; run `make ledger`")
    print("\n".join(broken) or f"pitfalls: {text.count(chr(10) + '### ')} boxes")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
