"""Rules of the repository: package in step with notebooks, modules small, typed, documented.

A failure names the file and line, and the remedy.
"""

import ast
import filecmp
import importlib
import inspect
import re
import subprocess
import sys
from configparser import ConfigParser

import pytest
from conftest import ABSOLUTE, ROOT, code_lines

pytestmark = pytest.mark.development

# Exported imports point up this list; but for (module, imported, inside which function).
STORY = """checks mixtures processes denoisers stepping ddpm ncsn sde samplers likelihood data
files sources networks training metrics pretrained batches updates checkpoints pictures runs
interop report ddim exponential edm adaptive
calibration brownian guidance inverse editing representations plots habits
cli""".split()
DOWNWARD = {("mixtures", "denoisers", "denoiser")}
LAZY = {"matplotlib", "scipy", "sklearn", "sympy", "PIL", "accelerate", "huggingface_hub",
        "cyclopts", "datasets", "diffusers"}
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|-index[-]url", re.I)
FUNCTION_LINES, MODULE_LINES = 25, 250

MODULES = sorted(p for p in (ROOT / "diffnotes").glob("*.py") if not p.stem.startswith("_"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf8")
    return parser["DEFAULT"]


def tracked():
    """The text files that Git has or would add, with their contents."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a Git checkout")
    for name in done.stdout.splitlines():
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if data and b"\0" not in data:
            yield name, data.decode("utf8")


def run(*command, **options):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- The package is what the notebooks export ---------------------------------


def test_export_in_sync(checkout):
    run("tools/export.py", str(checkout), cwd=checkout)
    here, there = ROOT / "diffnotes", checkout / "diffnotes"
    files = {p.name for folder in (here, there) for p in folder.glob("*.py")}
    _, different, missing = filecmp.cmpfiles(here, there, files, shallow=False)
    assert not different + missing, (
        f"{sorted(different + missing)} differ from what the notebooks export: edit the notebook, "
        "never diffnotes/*.py, and run `make export`"
    )


def test_one_notebook_a_module():
    owners = {}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for name in set(re.findall(r'"#\| default_exp (\w+)', path.read_text(encoding="utf8"))):
            owners.setdefault(name, []).append(path.name)
    shared = {name: paths for name, paths in owners.items() if len(paths) > 1}
    assert not shared, f"two notebooks write the same module, rename one `default_exp`: {shared}"


def test_version_and_requirements_in_one_place():
    import diffnotes

    ini = settings()
    assert diffnotes.__version__ == ini["version"], "settings.ini and __init__.py disagree"
    project = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={ini["min_python"]}"' in project, "settings.ini says min_python"
    packages = {r for key in ini if key.endswith("requirements") for r in ini[key].split()}
    packages = {re.match(r"[\w-]+", requirement)[0] for requirement in packages}
    for name in ["pyproject.toml", "setup.py"]:
        repeated = packages & set(re.findall(r"[\w-]+", (ROOT / name).read_text()))
        assert not repeated, f"{name} names {repeated}: requirements belong in settings.ini alone"
    lock = re.findall(r"^([\w.-]+)==", (ROOT / "requirements-dev.txt").read_text(), re.M)
    unpinned = packages - {name.lower() for name in lock}
    assert not unpinned, f"add {unpinned} to requirements-dev.in and run `make lock`"


def test_import_is_cheap():
    code = f"import sys, diffnotes; print(*{LAZY!r} & set(sys.modules))"
    found = run("-c", code, cwd=ROOT).split()
    assert not found, f"`import diffnotes` imports {found}: import where it is used"


# --- Modules ------------------------------------------------------------------


def imported_modules(path):
    """Yields (diffnotes module imported, line, name of the innermost function around it)."""

    def visit(node, function):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "diffnotes." * bool(node.level) + (node.module or "")
            found = [f"{base}.{alias.name}".replace("..", ".") for alias in node.names]
        else:
            found = []
        for name in found:
            package, _, rest = name.partition(".")
            if package == "diffnotes":
                yield rest.split(".")[0], node.lineno, function
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(path.read_text(encoding="utf8")), None)


@each_module
def test_imports_point_up(path):
    assert path.stem in STORY, f"give {path.stem} its place in STORY, at the top of this test"
    earlier = STORY[: STORY.index(path.stem)]
    for name, line, function in imported_modules(path):
        allowed = name in earlier or (path.stem, name, function) in DOWNWARD
        assert allowed, f"{path.name}:{line} imports {name}, which comes later in the story"


@each_module
def test_size(path):
    source = path.read_text(encoding="utf8")
    lines = code_lines(source)
    assert len(lines) <= MODULE_LINES, (
        f"{path.name} has {len(lines)} lines of code, at most {MODULE_LINES}: split the chapter"
    )
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            size = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            assert size <= FUNCTION_LINES, (
                f"{path.name}: {node.name} has {size} lines, at most {FUNCTION_LINES}: split it"
            )
        star = isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
        assert not star, f"{path.name}:{node.lineno} star import: name what is imported"


@each_module
def test_api_page(path):
    page = ROOT / "nbs" / "api" / f"{path.stem}.md"
    assert page.exists(), f"no page nbs/api/{page.name} with an automodule directive"
    assert f"automodule:: diffnotes.{path.stem}\n" in page.read_text(), f"{page}: no automodule"
    toc = (ROOT / "_toc.yml").read_text()
    assert re.search(rf"file: api/{path.stem}\s*$", toc, re.M), f"_toc.yml lacks api/{path.stem}"


def public_symbols(module):
    """Yields (name, callable, docstring) for the public functions, classes and methods.

    A base class may document a method, and a class the arguments that its methods share.
    """
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield name, value, value.__doc__
        if inspect.isclass(value):
            family = [base for base in value.__mro__ if base.__module__.startswith("diffnotes.")]
            made = inspect.isfunction(value.__init__) and not getattr(value, "_is_protocol", False)
            yield name, value.__init__ if made else None, value.__doc__
            for key, member in vars(value).items():
                member = getattr(member, "__func__", member)
                if inspect.isfunction(member) and (key == "__call__" or key[0] != "_"):
                    docs = [vars(base)[key].__doc__ or "" for base in family if key in vars(base)]
                    yield f"{name}.{key}", member, "\n".join(docs).strip()


def undocumented(name, function, doc, class_doc):
    """Yields what a public symbol's docstring and signature lack."""
    if not doc:
        yield f"{name}: no docstring"
    if not doc or not function:
        return
    signature = inspect.signature(function)
    parameters = [p for key, p in signature.parameters.items() if key not in ("self", "cls")]
    section = re.search(r"^\s*(?:Args|Attributes):\n(.*?)(?:\n\s*\n|\Z)", doc, re.M | re.S)
    method = "." in name
    told = doc + class_doc if method else section[1] if section else ""
    for parameter in parameters:
        if parameter.annotation is parameter.empty:
            yield f"{name}: {parameter.name} has no type hint"
        if not re.search(rf"\b{parameter.name}\b", told):
            yield f"{name}: {parameter.name} is not in the docstring's Args"
    if function.__name__ == "__init__":
        return
    returns = signature.return_annotation
    if returns is signature.empty:
        yield f"{name}: no return type hint"
    said = method or not parameters or returns in (None, "None")
    if not said and not re.search(r"^\s*(Returns|Yields):", doc, re.M):
        yield f"{name}: no Returns in the docstring"


def public_constants(path):
    for node in ast.parse(path.read_text(encoding="utf8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (t.id for t in targets if isinstance(t, ast.Name) and t.id[0] != "_")


@each_module
def test_public_names_are_documented(path):
    module = importlib.import_module(f"diffnotes.{path.stem}")
    symbols = list(public_symbols(module))
    assert inspect.getdoc(module), f"{path.name}: the notebook lacks `# Title` and `> subtitle`"
    public = {name for name, _, _ in symbols if "." not in name} | set(public_constants(path))
    odd = set(module.__all__) ^ public
    assert not odd, f"{path.name}: {odd}: `#| export` it, or begin its name with an underscore"
    docs = {name: doc or "" for name, _, doc in symbols}
    found = [text for s in symbols for text in undocumented(*s, docs[s[0].partition(".")[0]])]
    assert not found, "\n".join([f"{path.name}, public names:", *found])


def test_top_level_names():
    import diffnotes

    for path in MODULES:
        module = importlib.import_module(f"diffnotes.{path.stem}")
        assert getattr(diffnotes, path.stem) is module, f"a function hides the module {path.stem}"
    for name, value in vars(diffnotes).items():
        home = getattr(value, "__module__", "")
        if not name.startswith("_") and str(home).startswith("diffnotes."):
            public = importlib.import_module(home).__all__
            assert name in public, f"diffnotes.{name} is not public in {home}"


# --- Text ---------------------------------------------------------------------


def test_text_is_portable():
    found = []
    for name, text in tracked():
        text = re.sub(r'"image/\w+": "[^"]*"', "", text)
        for number, line in enumerate(text.splitlines(), 1):
            if match := ABSOLUTE.search(line) or REGISTRY.search(line):
                found.append(f"{name}:{number}: {match[0]!r}")
    assert not found, "\n".join(["a path of one machine, or one package registry:", *found])
