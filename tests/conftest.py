"""Shared by the tests: a copy of the repository to work in, and how lines are counted."""

import ast
import io
import os
import re
import shutil
import tokenize
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
ABSOLUTE = re.compile(r"(?<![\w.:/~])(/(home|root|Users|work|tmp|opt)/\w|[A-Z]:\\\w)")


# Continuous integration tries the same examples every time; at a desk hypothesis searches on.
settings.register_profile("steady", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("steady")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources in a temporary folder, so that no test writes to the repository."""
    ignore = shutil.ignore_patterns(".*", "_build", "build", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / ROOT.name, ignore=ignore)


def docstrings(tree):
    """The docstring nodes of a module, its classes and functions."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    owners = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [node.body[0] for node in owners if ast.get_docstring(node, clean=False) is not None]


def code_lines(source):
    """The numbers of the lines that hold code: no blank line, comment or docstring."""
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in quiet | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in docstrings(ast.parse(source)):
        lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines
