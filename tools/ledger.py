"""Writes nbs/ledger.md: every labelled equation, its chapter, code, check and printed error.

python tools/ledger.py           write the page; exit status 1 if a rule of the ledger is broken
python tools/ledger.py --check   write nothing; status 1 also if the page is out of date
"""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LABEL = re.compile(r"\$\$[ \t]*\(([^()\s]+)\)|^:label:\s*(eq-\S+)", re.M)
FORM = re.compile(r"eq-(?:([dns])(\d\d)|[a-z0-9]+)-[a-z0-9-]+")
PASSED = re.compile(r"^✓ (\S+)  (.*?)\s*$", re.M)
EXPORT = re.compile(r"#\|\s*export\b")
MODULES = {"dn", "checks", "mixtures", "processes", "denoisers", "stepping", "ddpm", "ncsn", "sde",
           "samplers", "likelihood", "data", "files", "sources",
           "networks", "training", "metrics", "pretrained",
           "batches", "updates", "checkpoints", "runs", "interop", "report", "habits", "pictures",
           "ddim", "exponential", "edm", "adaptive", "calibration", "brownian"}
CHECKS = {"check", "check_mc", "check_symbolic"}
PRINTED = {"max error": "closed form", "largest z": "Monte Carlo", "symbolic": "symbolic"}

# The equations of the three formulations that the book is built around, and who owes them.
NAMES = {
    "D": ["forward kernel", "forward marginal", "reparameterisation", "schedule", "posterior",
          "reverse model", "variational bound", "simple loss", "mean from eps", "ancestral step"],
    "N": ["score", "Langevin dynamics", "explicit score matching", "noise levels",
          "perturbation kernel", "score of the kernel", "denoising score matching",
          "annealed Langevin dynamics", "NCSNv2's choices"],
    "S": ["forward SDE", "variance-preserving SDE", "variance-exploding SDE", "sub-VP SDE",
          "perturbation kernels", "reverse SDE", "probability-flow ODE", "continuous objective",
          "Euler–Maruyama", "reverse-diffusion and ancestral samplers", "predictor–corrector",
          "exact likelihood", "conditional generation", "equivalence of the coordinates"],
}
IDS = {f"{letter}{i}": name for letter in NAMES for i, name in enumerate(NAMES[letter], 1)}
OWES = {
    "02_processes": "D1 D2 D3 D4 S1 S2 S3 S4 S5", "03_denoisers": "D5 S14",
    "10_ddpm": "D6 D7 D8 D9 D10", "11_ncsn": "N1 N2 N3 N4 N5 N6 N7 N8 N9",
    "12_sde": "S6 S7 S8 S9 S10 S11 S13", "14_likelihood": "S12",
}
OWNER = {i: chapter for chapter, ids in OWES.items() for i in ids.split()}


@dataclass
class Page:
    """What one notebook (or Markdown page) says: labels, calls of checks, and what passed."""

    name: str
    labels: list[str] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    passed: dict[str, list[str]] = field(default_factory=dict)
    code: dict[str, list[str]] = field(default_factory=dict)


def cells(path: Path) -> list[tuple[str, str, str]]:
    """(cell type, source, printed text) of a notebook; a Markdown page is one cell."""
    if path.suffix == ".md":
        return [("markdown", path.read_text(encoding="utf8"), "")]
    return [(cell["cell_type"], "".join(cell["source"]),
             "".join("".join(out.get("text", "")) for out in cell.get("outputs", [])))
            for cell in json.loads(path.read_text(encoding="utf8"))["cells"]]


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """The (label, call) pairs of checks whose label is a literal."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
             and getattr(node.func, "id", None) in CHECKS and node.args]
    return [(call.args[0].value, call) for call in found
            if isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)]


def exported(sources: list[str]) -> set[str]:
    """Public functions and classes of the exported cells, without the checks themselves."""
    names = {node.name for source in sources if EXPORT.match(source)
             for node in ast.parse(source).body if hasattr(node, "name")}
    return {name for name in names if not name.startswith("_")} - CHECKS


def direct(node: ast.AST, library: set[str], scope: dict[str, ast.stmt | None]) -> list[str]:
    """Exported names in an expression: functions, and methods of the notebook's objects.

    The scope tells for a name the statement that defined it, or None for one of the library.
    """
    found = []
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in library and scope.get(part.id, 0) is None:
            found.append(part.id)
        owner = getattr(getattr(part, "value", None), "id", None)
        if not isinstance(part, ast.Attribute) or part.attr.startswith("_"):
            continue
        if scope.get(owner):
            made_by = direct(scope[owner], library, scope | {owner: None})[:1]
            found += [f"{name}.{part.attr}" for name in made_by if name[0].isupper()]
        elif owner in MODULES and part.attr in library:
            found.append(part.attr)
    return list(dict.fromkeys(name for name in found if name.count(".") < 2))


def symbols(nodes: list[ast.AST], library: set[str], scope: dict) -> list[str]:
    """The nearest exported names: in the check itself, else in what defined its variables."""
    for _ in range(3):
        found = [name for node in nodes for name in direct(node, library, scope)]
        if found:
            return list(dict.fromkeys(found))
        parts = [part for node in nodes for part in ast.walk(node)]
        names = dict.fromkeys(part.id for part in parts if isinstance(part, ast.Name))
        nodes = [scope[name] for name in names if scope.get(name)]
    return []


def bound(statement: ast.stmt, of_library: bool) -> dict[str, ast.stmt | None]:
    """The names that a statement defines, with the statement, or None if the library's."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name: None for alias in statement.names}
    if hasattr(statement, "name"):
        return {statement.name: None if of_library else statement}
    return {part.id: statement for part in ast.walk(statement)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def read_page(path: Path, library: set[str]) -> Page:
    """Reads one page; what a check printed counts in the cell that names the label."""
    page, scope = Page(path.stem), {}
    for kind, source, printed in cells(path):
        if kind == "markdown":
            page.labels += [a or b for a, b in LABEL.findall(source)]
        if kind != "code":
            continue
        here = set()
        for statement in ast.parse(source).body:
            for label, call in calls(statement):
                here.add(label)
                nodes = [*call.args[1:], *(keyword.value for keyword in call.keywords)]
                page.code.setdefault(label, []).extend(symbols(nodes, library, scope))
            scope |= bound(statement, bool(EXPORT.match(source)))
        said = PASSED.findall(printed)
        page.called += sorted(here | {label for label, _ in said})
        for label, text in said:
            page.passed.setdefault(label, []).extend([text] if label in here else [])
    return page


def read(root: Path = ROOT) -> tuple[list[Page], list[str]]:
    """All pages of nbs/ in order, and the names of those in the table of contents."""
    paths = [*sorted((root / "nbs").glob("*.ipynb")), *sorted((root / "nbs").glob("*.md"))]
    paths = [path for path in paths if path.name != "ledger.md"]
    library = exported([source for path in paths for _, source, _ in cells(path)])
    toc = re.findall(r"(?:file|root):\s*(\S+)", (root / "_toc.yml").read_text(encoding="utf8"))
    return [read_page(path, library) for path in paths], toc


def equation_id(label: str) -> str | None:
    """eq-d05-posterior -> D5; None for the label of an equation that has no number."""
    match = FORM.fullmatch(label)
    return f"{match[1].upper()}{int(match[2])}" if match and match[1] else None


def label_faults(label: str, page: Page) -> list[str]:
    """What is wrong with one labelled equation, seen by itself."""
    out, i = [], equation_id(label)
    if not FORM.fullmatch(label) or i and i not in IDS:
        out.append(f"{page.name}: {label} is not of the form eq-d05-word or eq-chapter-word")
    elif i and page.name != OWNER[i]:
        out.append(f"{page.name}: {label} belongs to {OWNER[i]}")
    if page.labels.count(label) > 1:
        out.append(f"{page.name}: {label} is labelled twice")
    if label not in page.code:
        out.append(f"{page.name}: no check names {label}")
    elif not page.passed.get(label):
        out.append(f"{page.name}: the check of {label} has printed no ✓; execute the notebook")
    return out


def faults(pages: list[Page], toc: list[str]) -> list[str]:
    """Every breach of the ledger's rules, one line each."""
    out, home = [], {}
    for page in pages:
        for label in dict.fromkeys(page.labels):
            out += label_faults(label, page)
            if home.setdefault(label, page.name) != page.name:
                out.append(f"{page.name}: {label} is labelled in {home[label]} already")
        out += [f"{page.name}: a check of {label}, which is no equation of this page"
                for label in dict.fromkeys(page.called) if label not in page.labels]
    done = {equation_id(label) for page in pages for label in page.labels}
    return out + [f"{chapter}: {i} ({IDS[i]}) is owed" for i, chapter in OWNER.items()
                  if chapter in toc and i not in done]


def evidence(said: list[str]) -> str:
    """The kinds of check, each with the largest error printed."""
    largest: dict[str, tuple[float, str]] = {}
    for text in said:
        kind = next((kind for start, kind in PRINTED.items() if text.startswith(start)), "?")
        number, n = re.search(r"\d[\d.]*(e[+-]?\d+)?", text), re.search(r"n = \d+", text)
        error = number[0] if number else ""
        shown = f"{kind} z {error}, {n[0]}" if n else f"{kind} {error}".strip()
        new = (float(error or 0), shown)
        largest[kind] = max(largest.get(kind, new), new)
    return "; ".join(shown for _, shown in largest.values())


def row(label: str, page: Page, linked: bool) -> str:
    """The cells of one equation: number and label, code, kinds of check with their errors."""
    names = list(dict.fromkeys(page.code.get(label, [])))
    names = [name for name in names if "." in name or name[0].islower()] or names
    code = ", ".join([*(f"`{name}`" for name in names[:4]), *["…"] * (len(names) > 4)]) or "–"
    number = f"{{eq}}`{label}` " if linked else ""
    return f"{number}`{label}` | {code} | {evidence(page.passed.get(label, []))} |"


def ledger(pages: list[Page], toc: list[str]) -> str:
    """The text of the page."""
    chapters = [page for page in pages if page.name in toc]
    known = [(equation_id(label), label, page) for page in chapters for label in page.labels]
    rest = [page for page in pages if any(not equation_id(label) for label in page.labels)]
    done = {i for i, _, _ in known} - {None}
    lines = [INTRO.format(n=len(known), done=len(done), of=len(IDS))]
    for letter, title in TITLES.items():
        lines += [f"## {title}\n", f"| id | what | chapter | {COLUMNS}", "|---" * 6 + "|"]
        for i in (i for i in IDS if i[0] == letter):
            lines += [f"| {i} | {IDS[i]} | {{doc}}`{page.name[:2]} <{page.name}>` "
                      f"| {row(label, page, True)}" for j, label, page in known if i == j]
            lines += [] if i in done else [f"| {i} | {IDS[i]} | to come | – | – | – |"]
        lines.append("")
    for page in sorted(rest, key=lambda page: page.name not in toc):
        inside = page.name in toc
        title = f"Further equations of {{doc}}`{page.name}`" if inside else f"Notebook {page.name}"
        lines += [f"## {title}\n", f"| {COLUMNS}", "|---" * 3 + "|"]
        lines += [f"| {row(label, page, inside)}" for label in page.labels
                  if not equation_id(label)] + [""]
    return "\n".join(lines).rstrip() + "\n"


COLUMNS = "equation | code | check, largest error |"
TITLES = {"D": "Denoising diffusion", "N": "Noise-conditional score networks", "S": "Score SDEs"}
INTRO = """# The equation ledger

Every equation of the book that states something has a label, and code that checks it.
There are {n} of them now, {done} of the {of} that make up the three formulations among them.

This page is written by a script from the executed notebooks. *Code* names what the check runs of
the library (– where it tests a formula of its own page). The error is the largest that was
printed: an absolute one for a closed form, a z-score and the number of draws for Monte Carlo, none
for a symbolic identity. {{doc}}`00_checks` explains what these mean, and what they are worth.
"""


def main(argv: list[str]) -> int:
    """Writes or checks the page; returns the exit status."""
    pages, toc = read()
    broken, text, path = faults(pages, toc), ledger(pages, toc), ROOT / "nbs" / "ledger.md"
    if "--check" not in argv:
        path.write_text(text, encoding="utf8")
    elif not path.exists() or path.read_text(encoding="utf8") != text:
        broken.append("nbs/ledger.md is out of date; run `make ledger`")
    print("\n".join(broken) or f"ledger: {sum(len(page.labels) for page in pages)} equations")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
