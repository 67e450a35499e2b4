"""Accuracy, samples and overhead of diffnotes and its peers, side by side in one run.

    _build/peers/bin/python benchmarks/solvers [accuracy] [noise] [overhead] [golden]

`make bench` makes that environment; `make bench TABLES=accuracy` makes one table. Writes
benchmarks/results/*.json, nbs/shootout.json, which the chapter on the comparison shows, and
tests/golden_solvers.json.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    import tables

    tables.main(sys.argv[1:] or ["golden", "overhead", "accuracy", "noise"])
