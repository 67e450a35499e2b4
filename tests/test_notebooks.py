"""Rules of the notebooks: executed, clean, in short cells, with legal marks and captioned figures.

Each rule below yields (cell, complaint); its docstring is the remedy. A failure names both.
"""

import ast
import json
import re
import subprocess
import sys
from functools import cache

import pytest
from conftest import ABSOLUTE, ROOT, code_lines

pytestmark = pytest.mark.development

DIRECTIVES = re.compile(r"#\| (default_exp \w+|export|exporti)")
TAGS = {"remove-cell", "hide-input", "nbval-check-output", "train"}
FENCES = re.compile(r"prf:\w+|admonition|exercise|solution(-start|-end)?|bibliography")
NETWORK = re.compile(
    r"https?://|download\s*=\s*True|\b(requests|urllib|httpx|urlopen|urlretrieve|wget|curl|socket|"
    r"fetch_openml|hf_hub_download|snapshot_download|from_pretrained|torch\.hub)\b"
)
# Chapters that speak of these words, and use them on a local folder.
LOCAL = dict.fromkeys(("24_pretrained", "95_habits"),
                      re.compile(r"\b(from_pretrained|snapshot_download)\b"))
CLOSING = ["What we have", "Exercises", "Sources"]
CELL_LINES, COLUMNS, NOTEBOOK_BYTES = 25, 99, 500_000
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
TOC = re.findall(r"^\s*(?:- file|root):\s*(\S+)", (ROOT / "_toc.yml").read_text(), re.M)


class Cell:
    def __init__(self, index, content):
        self.source = "".join(content["source"])
        self.code = content["cell_type"] == "code"
        self.count = content.get("execution_count")
        self.metadata = content["metadata"]
        self.tags = set(self.metadata.get("tags", []))
        self.outputs = content.get("outputs", [])
        self.name = f"cell {index} (id {content.get('id')}{f', In [{self.count}]' * self.code})"

    @property
    def tree(self):
        return ast.parse(self.source)

    @property
    def shown(self):
        return {kind for output in self.outputs for kind in output.get("data", {})}

    @property
    def text(self):
        """Everything the outputs say in words."""
        data = [output.get("data", {}) for output in self.outputs]
        words = ["".join(d[kind]) for d in data for kind in d if kind.startswith("text/")]
        return "\n".join([*words, *("".join(o.get("text", "")) for o in self.outputs)])


@cache
def read(path):
    notebook = json.loads(path.read_text(encoding="utf8"))
    return notebook["metadata"], [Cell(*c) for c in enumerate(notebook["cells"], 1)]


def chapter(path):
    """True for a numbered chapter of the book; other pages have more freedom."""
    return path.stem in TOC and re.match(r"[0-8]\d_", path.stem)


RULES = []


def rule(function):
    RULES.append(function)
    return function


@rule
def executed(path, cells):
    """Run `make notebooks NB=…`: in order, from a fresh kernel; cure what it warns of."""
    code = [cell for cell in cells if cell.code and cell.source.strip()]
    for expected, cell in enumerate(code, 1):
        if cell.count != expected:
            yield cell, f"execution count {cell.count}, expected {expected}"
            return
        for output in cell.outputs:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                yield cell, f"an error or a warning in the output: {cell.text[:80]!r}"
        last = cell.tree.body[-1] if cell.tree.body else None
        quiet = cell.source.rstrip().endswith(";")
        value = isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call | ast.Constant)
        if value and not quiet and not cell.outputs:
            yield cell, "no output for its last expression"


@rule
def plain_python(path, cells):
    """Cells are plain Python: no magics, shell escapes, `import *`, nbdev_export() or network."""
    for cell in cells:
        if cell.code:
            try:
                tree = cell.tree
            except SyntaxError as error:
                yield cell, f"not plain Python: {error.msg}"
                continue
            imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            if any(alias.name == "*" for node in imports for alias in node.names):
                yield cell, "star import"
            told = LOCAL[path.stem].sub("", cell.source) if path.stem in LOCAL else cell.source
            if found := NETWORK.search(told):
                yield cell, f"uses the network? {found[0]!r}"
            if "nbdev_export" in cell.source:
                yield cell, "rewrites the package while it runs: nbdev_export"


@rule
def normalised(path, cells):
    """Run `nbstripout --keep-output --keep-count --keep-id` on it (`make notebooks` does)."""
    options = ["--verify", "--keep-output", "--keep-count", "--keep-id"]
    verify = [sys.executable, "-m", "nbstripout", *options, str(path)]
    done = subprocess.run(verify, capture_output=True, text=True)
    if done.returncode:
        yield None, f"nbstripout would change it {done.stderr.strip()}"
    for key in set(read(path)[0]) - {"kernelspec", "language_info"}:
        yield None, f"stray notebook metadata {key!r}"
    if path.stat().st_size > NOTEBOOK_BYTES:
        yield None, f"{path.stat().st_size} bytes, at most {NOTEBOOK_BYTES}: smaller figures"
    for cell in cells:
        for key in set(cell.metadata) - {"tags", "mystnb"}:
            yield cell, f"stray metadata {key!r}"
        if found := ABSOLUTE.search(cell.source + cell.text):
            yield cell, f"absolute path: {found[0]!r}"


@rule
def marks(path, cells):
    """Legal marks stand at the top of this test; colon fences only; `$$` after a blank line."""
    for cell in cells:
        for tag in cell.tags - TAGS:
            yield cell, f"tag {tag!r} is not one of {sorted(TAGS)}"
        lines = cell.source.splitlines()
        if cell.code:
            for line in lines:
                if line.lstrip().startswith("#|") and not DIRECTIVES.fullmatch(line):
                    yield cell, f"directive {line!r} is not default_exp, export or exporti"
            continue
        for fence, name in re.findall(r"^\s*(:{3,}|`{3,}|~{3,})\{([^}]*)\}", cell.source, re.M):
            if fence[0] != ":":
                yield cell, f"{fence}{{{name}}}: write the directive as a colon fence"
            elif not FENCES.fullmatch(name):
                yield cell, f":::{{{name}}} is not one of the book's directives"
        inside = False
        for before, line in zip(["", *lines[:-1]], lines, strict=True):
            dollars = line.count("$$")
            if dollars and not inside and line.lstrip().startswith("$$") and before.strip():
                yield cell, f"a display must follow a blank line: {line!r}"
            inside ^= dollars % 2 == 1


@rule
def rhythm(path, cells):
    """Split the cell; prose between cells; imports in a cell of their own, headings too."""
    run = 0
    for cell in cells:
        if not cell.code:
            run = 0
            heading, *text = cell.source.strip().splitlines() or [""]
            if heading.startswith("##") and heading[3:] not in CLOSING and text:
                yield cell, f"a heading and text in one cell: {heading!r}"
            continue
        imports = [isinstance(node, ast.Import | ast.ImportFrom) for node in cell.tree.body]
        if any(imports) and not all(imports):
            yield cell, "imports and other code in one cell"
        run += not (all(imports) or cell.tags & {"remove-cell", "hide-input"})
        if run > 2:
            yield cell, f"code cell number {run} in a row without prose"
        size = len(code_lines(cell.source))
        if size > CELL_LINES:
            yield cell, f"{size} lines of code, at most {CELL_LINES}"
        for line in cell.source.splitlines():
            if len(line) > COLUMNS:
                yield cell, f"{len(line)} columns, at most {COLUMNS}: {line[:40]!r}"


@rule
def figures(path, cells):
    """Cell metadata: mystnb.figure.caption, mystnb.figure.name (`fig-…`), mystnb.image.alt."""
    for cell in cells:
        if "image/svg+xml" in cell.shown:
            yield cell, "an SVG figure"
        mystnb = cell.metadata.get("mystnb", {})
        figure, image = mystnb.get("figure", {}), mystnb.get("image", {})
        if path.stem in TOC and "image/png" in cell.shown and "remove-cell" not in cell.tags:
            if not figure.get("caption", "").strip():
                yield cell, "figure without a caption"
            if not figure.get("name", "").startswith("fig-"):
                yield cell, "figure without a name fig-…"
            if not image.get("alt", "").strip():
                yield cell, "figure without alt text"
        if figure and "image/png" not in cell.shown:
            yield cell, "figure metadata, but no picture among the outputs"
        if re.search(r"!\[\s*\]\(", cell.source):
            yield cell, "image without alt text"


@rule
def anatomy(path, cells):
    """Keep an unfinished chapter out of _toc.yml; a finished one has all of its parts."""
    if not chapter(path):
        return
    if path.stem == "34_shootout":  # it measures what the others export
        cells = [cells[0], *cells]
    elif not cells[0].source.startswith("#| default_exp ") or cells[0].tags != {"remove-cell"}:
        yield cells[0], "the first cell is `#| default_exp name`, tagged remove-cell"
    if not re.match(r"# .+\n\n> .+(\n\n|$)", cells[1].source):
        yield cells[1], "the second cell is `# Title`, a blank line, `> subtitle of one line`"
    opening = "\n".join(cell.source for cell in cells[1:5] if not cell.code)
    for word in ["*Needs*", "*Gives*", "*Costs*"]:
        if word not in opening:
            yield cells[1], f"{word} is missing from the opening"
    prose = "\n".join(cell.source for cell in cells if not cell.code)
    headings = re.findall(r"^## (.+)$", prose, re.M)
    if headings[-3:] != CLOSING:
        yield cells[-1], f"the last sections are {headings[-3:]}, should be {CLOSING}"
    if ":::{bibliography}" not in cells[-1].source:
        yield cells[-1], "the last cell holds the page's bibliography"
    exercises = re.findall(r":::\{exercise\}.*\n:label: (\S+)", prose)
    solutions = re.findall(r":::\{solution(?:-start)?\} (\S+)\n:class: dropdown", prose)
    if not 3 <= len(exercises) <= 6:
        yield cells[-1], f"{len(exercises)} exercises, 3 to 6"
    for label in set(exercises) ^ set(solutions):
        yield cells[-1], f"{label}: an exercise and a solution (class dropdown) belong together"


def complaints(path, check):
    return [
        f"{path.name}, {cell.name if cell else 'as a whole'}: {text}"
        for cell, text in check(path, read(path)[1])
    ]


each_rule = pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)


@each_rule
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, check):
    found = complaints(path, check)
    assert not found, "\n".join([check.__doc__, *found])


# A small sound notebook, and one break for each thing that a rule says.
PNG = {"output_type": "display_data", "data": {"image/png": "AAAA"}, "metadata": {}}
VALUE = {"output_type": "display_data", "data": {"text/plain": ["3"]}, "metadata": {}}
FIGURE = {"figure": {"caption": "A line.", "name": "fig-line"}, "image": {"alt": "a line"}}
WARNING = {"output_type": "stream", "name": "stderr", "text": ["careful\n"]}
PATH = {"output_type": "stream", "name": "stdout", "text": ["saved /" + "tmp/x\n"]}
EXERCISES = "".join(
    f":::{{exercise}} A\n:label: ex-{n}\n:::\n\n:::{{solution}} ex-{n}\n:class: dropdown\n:::\n"
    for n in "abc"
)
SOUND = [
    dict(source="#| default_exp toy", metadata={"tags": ["remove-cell"]}),
    "# Toy\n\n> Seen once.\n\n*Needs* nothing *Gives* a line *Costs* a minute",
    dict(source="import math"),
    dict(source="#| export\nx = 3"),
    dict(source="x", outputs=[VALUE]),
    "## A line",
    "Straight:\n\n$$\nx = 3\n$$ (eq-toy-line)",
    dict(source="x;", outputs=[PNG], metadata={"mystnb": FIGURE}),
    "## What we have\n\nA line.",
    "## Exercises",
    EXERCISES,
    "## Sources\n\n:::{bibliography}\n:filter: docname in docnames\n:::",
]
BREAKS = [
    (executed, 5, dict(execution_count=7), "execution count 7, expected 4"),
    (executed, 5, dict(outputs=[]), "no output for its last expression"),
    (executed, 5, dict(outputs=[WARNING]), "a warning in the output"),
    (plain_python, 4, dict(source="!ls"), "not plain Python"),
    (plain_python, 3, dict(source="from math import *"), "star import"),
    (plain_python, 4, dict(source="url = 'https" + "://example.org'"), "uses the network"),
    (plain_python, 4, dict(source="nbdev_export()"), "rewrites the package"),
    (normalised, 4, dict(metadata={"collapsed": True}), "nbstripout would change it"),
    (normalised, 4, dict(metadata={"slideshow": {}}), "stray metadata 'slideshow'"),
    (normalised, 4, dict(source="x = '" + "a" * NOTEBOOK_BYTES + "'"), "smaller figures"),
    (normalised, 4, dict(outputs=[PATH]), "absolute path"),
    (marks, 4, dict(metadata={"tags": ["slow"]}), "tag 'slow'"),
    (marks, 4, dict(source="#| hide\nx = 3"), "directive '#| hide'"),
    (marks, 7, dict(source="```{math}\nx\n```"), "write the directive as a colon fence"),
    (marks, 7, dict(source=":::{tip}\nx\n:::"), ":::{tip} is not one of"),
    (marks, 7, dict(source="Straight:\n$$\nx = 3\n$$ (eq-toy-line)"), "must follow a blank line"),
    (rhythm, 4, dict(source="import math\nx = 3"), "imports and other code"),
    (rhythm, 3, dict(source="y = 3"), "code cell number 3 in a row"),
    (rhythm, 4, dict(source="x = 3\n" * 26), "26 lines of code"),
    (rhythm, 4, dict(source="x = '" + "a" * 99 + "'"), "105 columns"),
    (rhythm, 6, dict(source="## A line\n\nStraight."), "a heading and text"),
    (figures, 8, dict(metadata={"mystnb": FIGURE | {"figure": {}}}), "without a caption"),
    (figures, 8, dict(metadata={"mystnb": FIGURE | {"figure": {}}}), "without a name"),
    (figures, 8, dict(metadata={"mystnb": FIGURE | {"image": {}}}), "without alt text"),
    (figures, 8, dict(outputs=[]), "no picture"),
    (figures, 7, dict(source="![](x.png)"), "image without alt text"),
    (anatomy, 1, dict(metadata={}), "tagged remove-cell"),
    (anatomy, 2, dict(source="# Toy\n\nSeen once."), "`> subtitle of one line`"),
    (anatomy, 2, dict(source="# Toy\n\n> Seen once."), "*Costs* is missing"),
    (anatomy, 10, dict(source="## Problems"), "the last sections are"),
    (anatomy, 11, dict(source=EXERCISES.replace("} ex-c", "} ex-d")), "belong together"),
    (anatomy, 11, dict(source=""), "0 exercises"),
    (anatomy, 12, dict(source="## Sources"), "bibliography"),
]


def write_notebook(folder, number=0, change=None):
    """Writes the sound notebook, with one cell changed, under the name of a chapter."""
    cells, count = [], 0
    for n, cell in enumerate(SOUND, 1):
        full = dict(cell_type="markdown", id=f"cell-{n}", metadata={}, source=cell)
        if isinstance(cell, dict):
            count += 1
            full |= dict(cell_type="code", outputs=[], execution_count=count) | cell
        cells.append(full | change if n == number else full)
    path = folder / "00_checks.ipynb"
    notebook = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(notebook), encoding="utf8")
    return path


@each_rule
def test_sound_notebook_passes(tmp_path, check):
    assert complaints(write_notebook(tmp_path), check) == []


@pytest.mark.parametrize("check, number, change, complaint", BREAKS, ids=[b[3] for b in BREAKS])
def test_broken_notebook_fails(tmp_path, check, number, change, complaint):
    assert complaint in "\n".join(complaints(write_notebook(tmp_path, number, change), check))
