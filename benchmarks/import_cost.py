"""What `import diffnotes` costs beyond `import torch`: seconds in alternating fresh processes."""

import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
CLOCK = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
REPEATS = 15


def seconds(module: str) -> float:
    command = [sys.executable, "-c", CLOCK.format(module)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main():
    modules = ["torch", "diffnotes"]
    for module in modules:  # warms the disk cache
        seconds(module)
    rounds = [[seconds(module) for module in modules] for _ in range(REPEATS)]
    for module, times in zip(modules, zip(*rounds, strict=True), strict=True):
        print(f"import {module:10} {median(times):.2f} s  ({min(times):.2f} to {max(times):.2f})")
    ratio = median(ours / torch for torch, ours in rounds)
    print(f"ratio {ratio:.3f}, median of {REPEATS} pairs (budget 1.10)")


if __name__ == "__main__":
    main()
