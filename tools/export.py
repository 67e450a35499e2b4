"""Writes diffnotes/ from the notebooks, removes modules whose notebook has gone."""

import os
import sys
from pathlib import Path

os.chdir(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)

from nbdev.export import nb_export  # noqa: E402  (reads settings.ini from the working folder)

HAND_WRITTEN = {"__init__"}
kept = set(HAND_WRITTEN)
for path in sorted(Path("nbs").glob("*.ipynb")):
    text = path.read_text(encoding="utf8")
    if "#| default_exp " in text:
        nb_export(str(path), lib_path="diffnotes")
        kept.add(text.split("#| default_exp ")[1].split('"')[0].strip())
for path in Path("diffnotes").glob("*.py"):
    if path.stem not in kept:
        print(f"removed {path}: no notebook exports it")
        path.unlink()
