"""Breaks exported formulas, a sign, a factor or an index at a time, and lists what goes unnoticed.

    python tools/mutants.py [-n 60] [--seed 0] [--jobs 1] [nbs/10_ddpm.ipynb ...]

Each mutant runs the code cells of its notebook, in order, in a new process. It is caught when a
cell fails or time runs out; it survives when every cell passes. The broken code stands both in the
notebook's cell and in the copy of the package that other modules import. Cells tagged `train` are
left out, and so are the cells that cannot do without them.

What is no formula is not broken: annotations, messages, True and False, dataclass fields, and the
head of an `if` or a `for` that does nothing but raise (refusals are for tests/ to try). A mutant
that no check can notice is named in equivalent_mutants.txt, with the reason.
"""

import __future__

import argparse
import ast
import importlib
import json
import linecache
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffnotes"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
PRELOADED = ["torch", "numpy", "scipy.stats", "sympy", "matplotlib.pyplot", "pytest"]
FAULT = 3
OUTCOMES = {0: "survived", 1: "caught by a check", 2: "caught by an error"}
OUTCOMES |= dict.fromkeys([-signal.SIGXCPU, -signal.SIGALRM], "caught by the clock")
SURVIVED = OUTCOMES[0]

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
OPERATORS |= {ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}
OPERATORS |= {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt}
OPERATORS |= {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
DROPPED = {"sqrt", "rsqrt", "square", "exp", "expm1", "log", "log1p", "abs", "neg", "cumprod"}
UNORDERED = {"isinstance", "minimum", "maximum", "min", "max", "zip"}
UNORDERED |= {"promote_types", "result_type"}
NO_ARITHMETIC = ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom
DECLARATIONS = {"annotation", "returns", "decorator_list", "bases"}


@dataclass(frozen=True)
class Mutant:
    cell: int
    line: int
    text: str  # of the line
    old: str
    new: str
    source: str  # of the whole cell, changed

    @property
    def key(self):
        return self.text, f"{self.old} -> {self.new}"


def variants(node):
    """Yields what a node of the syntax tree may be changed to."""

    def changed(**fields):
        return ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), **fields}), node)

    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield changed(op=OPERATORS[type(op)]())
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            yield changed(ops=[OPERATORS[type(op)]()])
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield node.operand
        case ast.Constant(value=int(value)) if value is not True and value is not False:
            yield changed(value=value + 1)
        case ast.Constant(value=float(value)) if value == 0 or abs(value) > 1e-6:
            yield changed(value=1.1 * value or 1.0)
        case ast.Subscript(slice=ast.Name() | ast.BinOp() as index):
            yield changed(slice=ast.BinOp(index, ast.Sub(), ast.Constant(1)))
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=arguments):
            if name in DROPPED and len(arguments) < 2:
                yield arguments[0] if arguments else node.func.value
            plain = not any(isinstance(a, ast.Starred | ast.Constant) for a in arguments[:2])
            if len(arguments) > 1 and plain and name not in UNORDERED:
                yield changed(args=[arguments[1], arguments[0], *arguments[2:]])


def idle(node):
    """True of what holds no formula: a refusal with its condition, a message, a field."""
    match node:
        case ast.If(body=[ast.Raise()], orelse=[]) | ast.For(body=[ast.Raise()], orelse=[]):
            return True
        case ast.Call(func=ast.Name(id="field")):
            return True
    return isinstance(node, NO_ARITHMETIC)


def nodes(node):
    """Yields the nodes that compute."""
    if idle(node):
        return
    yield node
    for name, field in ast.iter_fields(node):
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST) and name not in DECLARATIONS:
                yield from nodes(child)


def splice(source, node, text):
    """The source with a node's text replaced; columns of syntax trees count bytes."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    return (before + text.encode() + after).decode()


def mutants(number, source):
    """Yields the mutants of one cell."""
    for node in nodes(ast.parse(source)):
        for new in variants(node):
            text = ast.unparse(new)
            if text == ast.unparse(node):
                continue
            changed = splice(source, node, f"({text})" if isinstance(new, ast.expr) else text)
            old = " ".join(ast.get_source_segment(source, node).split())
            line = source.splitlines()[node.lineno - 1].strip()
            yield Mutant(number, node.lineno, line, old, text, changed)


@dataclass(frozen=True)
class Notebook:
    path: Path
    cells: dict  # number -> cell, of the code cells

    module: str | None

    @classmethod
    def read(cls, path):
        cells = enumerate(json.loads(path.read_text(encoding="utf8"))["cells"], 1)
        code = {n: c for n, c in cells if c["cell_type"] == "code"}
        for cell in code.values():
            cell["source"] = "".join(cell["source"])
        module = re.search(r"^#\| default_exp (\w+)", code[min(code)]["source"]) if code else None
        return cls(path, code, module and module[1])

    def mutants(self):
        cells = [(n, c["source"]) for n, c in self.cells.items()]
        exported = [cell for cell in cells if re.search(r"^#\| exporti?$", cell[1], re.M)]
        return [mutant for cell in exported for mutant in mutants(*cell)]

    def package_copy(self, folder, mutant):
        """Writes the package into a folder, the mutant's cell in place of the exported one."""
        copied = shutil.copytree(PACKAGE, Path(folder, PACKAGE.name))
        if mutant:
            ending = f"#{self.cells[mutant.cell]['id']}"
            module = copied / f"{self.module}.py"
            chunks = re.split(r"^(?=# %% )", module.read_text(encoding="utf8"), flags=re.M)
            (at,) = (i for i, c in enumerate(chunks) if c.partition("\n")[0].endswith(ending))
            chunks[at] = f"# %% broken\n{mutant.source}\n\n"
            module.write_text("".join(chunks), encoding="utf8")

    def execute(self, skipped, mutant):
        """Runs the cells in this process; yields the cells that failed, with what they raised."""
        main = sys.modules["__main__"] = ModuleType("__main__")
        flags = 0
        for number, cell in self.cells.items():
            if number in skipped:
                continue
            source = mutant.source if mutant and mutant.cell == number else cell["source"]
            if "from __future__ import annotations" in source:
                flags |= __future__.annotations.compiler_flag
            name = f"cell {number}"
            linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
            try:
                exec(compile(source, name, "exec", flags, dont_inherit=True), vars(main))
            except BaseException as error:
                yield number, error


def start(notebook, scratch, skipped, mutant=None, limit=600, report=None):
    """Forks a process that runs the notebook; its exit status is a key of OUTCOMES."""
    if child := os.fork():
        return child
    status = FAULT
    try:
        signal.alarm(20 * limit)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        folder = tempfile.tempdir = tempfile.mkdtemp(dir=scratch)
        notebook.package_copy(folder, mutant)
        sys.path.insert(0, folder)
        os.chdir(notebook.path.parent)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        status = 0
        for number, error in notebook.execute(skipped, mutant):
            if report is None:
                status = 1 if type(error).__name__ in {"AssertionError", "Failed"} else 2
                break
            print(json.dumps([number, repr(error)]), file=report, flush=True)
    except Exception as error:
        print(repr(error), file=sys.stderr)
    finally:
        os._exit(status)


def finish(running):
    """Waits for one of the processes; returns what it ran and how it ended."""
    pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    if code == FAULT:
        sys.exit("mutants: a run could not start; is the package in step (`make export`)?")
    return running.pop(pid), OUTCOMES.get(code, OUTCOMES[2])


def processor_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def baseline(notebook, scratch):
    """Runs the unbroken notebook; returns (cells to leave out, seconds of the processor)."""
    skipped = {n for n, c in notebook.cells.items() if "train" in c["metadata"].get("tags", [])}
    first = min(skipped, default=math.inf)
    while True:
        began = processor_seconds()
        with tempfile.TemporaryFile("w+") as report:
            _, outcome = finish({start(notebook, scratch, skipped, report=report): None})
            report.seek(0)
            failed = dict(map(json.loads, report))
        early = {number: said for number, said in failed.items() if number < first}
        if early or outcome != OUTCOMES[0]:
            sys.exit(f"{notebook.path.name} fails without any break: {early or outcome}")
        if not failed:
            return skipped, processor_seconds() - began
        skipped |= set(failed)


def equivalent(notebook, every):
    """The notebook's named mutants, key -> reason; each name must fit one mutant."""
    blocks = re.split(r"\n{2,}", EQUIVALENT.read_text(encoding="utf8").strip())[1:]
    named = {}
    for block in blocks:
        place, change, reason = block.split("\n", 2)
        module, _, text = place.partition(": ")
        if module == notebook.module:
            named[text, change] = " ".join(reason.split())
    fits = Counter(mutant.key for mutant in every)
    if wrong := [key for key in named if fits[key] != 1]:
        sys.exit(f"{EQUIVALENT.name}: names that do not fit one mutant: {wrong}")
    return named


def survey(notebook, count, seed, jobs):
    """Runs a sample of the notebook's mutants, prints those that survive, returns the tally."""
    every = notebook.mutants()
    named = equivalent(notebook, every)
    chosen = random.Random(seed).sample(every, min(count, len(every)))
    chosen.sort(key=lambda mutant: (mutant.cell, mutant.line))
    with tempfile.TemporaryDirectory() as scratch:
        skipped, seconds = baseline(notebook, scratch)
        left = f"without cells {sorted(skipped)}" if skipped else "every cell"
        print(f"{notebook.path.stem}: {len(chosen)} of {len(every)} mutants, {left}", flush=True)
        limit, queue, running, outcomes = int(10 + 5 * seconds), iter(chosen), {}, Counter()
        while outcomes.total() < len(chosen):
            while len(running) < jobs and (mutant := next(queue, None)):
                running[start(notebook, scratch, skipped, mutant, limit)] = mutant
            mutant, outcome = finish(running)
            if outcome == SURVIVED:
                if reason := named.get(mutant.key):
                    outcome = "equivalent"
                place = f"cell {mutant.cell} line {mutant.line}"
                note = f"  (equivalent: {reason})" if reason else ""
                print(f"  {place}:  {mutant.old}  ->  {mutant.new}{note}", flush=True)
            outcomes[outcome] += 1
    print("  " + ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common()), flush=True)
    return outcomes


def verdict(name, outcomes):
    """A line of the closing table: how many were caught, with and without the equivalent ones."""
    total, same = outcomes.total(), outcomes["equivalent"]
    caught = total - same - outcomes[SURVIVED]
    line = f"{name:16} {caught} of {total} caught, {caught / total:.1%}"
    return line + (f"; {caught / (total - same):.1%} without {same} equivalent" if same else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of nbs/ if none is named")
    parser.add_argument("-n", type=int, default=60, help="most mutants of a notebook")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, choices=[1, 2])
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", MPLBACKEND="Agg")
    for name in PRELOADED:  # only imports: a process that has computed with threads must not fork
        importlib.import_module(name)
    tallies = {}
    for path in options.notebooks or sorted((ROOT / "nbs").glob("*.ipynb")):
        if (notebook := Notebook.read(path.resolve())).module:
            tallies[path.stem] = survey(notebook, options.n, options.seed, options.jobs)
    print(*(verdict(*tally) for tally in tallies.items()), sep="\n")


if __name__ == "__main__":
    main()
