"""The tables: every contestant on every problem, within every budget of evaluations."""

import json
import os
import warnings
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path

import golden
import ours
import overhead
import peers
import torch
from problems import HEIGHTS, PROBLEMS, Problem

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = (5, 8, 10, 15, 20, 30, 50, 100)
warnings.simplefilter("ignore")


class Counted:
    """A problem's denoiser that counts its calls."""

    def __init__(self, problem):
        self.problem, self.count = problem, 0

    def __call__(self, y, s):
        self.count += 1
        return self.problem.denoise(y, s)


def measured(run, problem, y, budget, judge):
    """The judge's figure for a run within the budget; None where the run cannot do that."""
    model = Counted(problem)
    try:
        found = run(model, y, budget)
    except (ValueError, IndexError, AssertionError, RuntimeError, ZeroDivisionError):
        return None
    if found is None or not 0 < model.count <= budget:
        return None
    value = judge(found)
    return float(f"{value:.3g}") if value < 1e6 else None


def contestants(process, noisy):
    """Label -> function of (model, y, budget)."""
    top, bottom = HEIGHTS[process]
    theirs = peers.stochastic(process) if noisy else peers.deterministic(process)
    found = {label: lambda model, y, budget, run=run: run(model, top, bottom, y, budget)
             for label, run in theirs.items()}
    mine = ours.names(noisy)
    for name in [*mine, *([] if noisy else [ours.DEFAULT])]:
        label = name if name == ours.DEFAULT else f"diffnotes {name}"
        found[label] = lambda model, y, budget, name=name: ours.run(
            name, process, model, y, budget)
    return found


def accuracy_of(case):
    """Mean distance to the exact end of the flow, for every contestant and budget."""
    torch.set_num_threads(1)
    name, process = case
    problem = Problem(name)
    start = problem.start(process)

    def judge(x):
        return (x - problem.x0).norm(dim=1).mean().item()

    return {label: [measured(run, problem, start, budget, judge) for budget in BUDGETS]
            for label, run in contestants(process, noisy=False).items()}


def sliced(x, y):
    """Sliced Wasserstein distance of order 2 between samples of one size, projected and sorted."""
    return (x - y).square().mean().sqrt().item()


def noise_of(case):
    """Mean sliced distance of 8000 samples to exact ones, and between exact ones: the floor."""
    torch.set_num_threads(1)
    name, process = case
    problem, generator = Problem(name), torch.Generator().manual_seed(1)
    directions = torch.randn(problem.dim, 100, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    clean, *exact = [problem.sample(8000, generator) for _ in range(9)]
    sorted_exact = [(directions.T @ x.T).sort().values for x in exact]
    floor = torch.tensor([sliced(x, y) for x, y in combinations(sorted_exact, 2)])
    draw = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    start = clean + HEIGHTS[process][0] * draw
    rows = {}

    def judge(x):
        x = (directions.T @ x.T).sort().values
        return sum(sliced(x, y) for y in sorted_exact[:4]) / 4

    for label, run in contestants(process, noisy=True).items():
        torch.manual_seed(2)
        rows[label] = [measured(run, problem, start, budget, judge) for budget in BUDGETS]
    return {"floor": [round(floor.mean().item(), 4), round(floor.std().item(), 4)], "rows": rows}


def over_cases(function, processes):
    cases = list(product(PROBLEMS, processes))
    with get_context("spawn").Pool(max(1, min(os.cpu_count() or 1, len(cases)))) as pool:
        found = pool.map(function, cases, chunksize=1)
    return {f"{name} {process}": rows for (name, process), rows in zip(cases, found, strict=True)}


def show_accuracy(tables):
    """The peers' best, chosen for each cell in hindsight, and every sampler of diffnotes."""
    wins = halves = 0
    for case, rows in tables.items():
        theirs = {k: v for k, v in rows.items() if not k.startswith("diffnotes")}
        best = [min((v[i], k) for k, v in theirs.items() if v[i]) for i in range(len(BUDGETS))]
        print(f"\n{case:32}" + "".join(f"{budget:>9}" for budget in BUDGETS))
        print(f"{'peers, best in hindsight':32}" + "".join(f"{value:9.3g}" for value, _ in best))
        for label, values in rows.items():
            if label.startswith("diffnotes"):
                print(f"{label:32}" + "".join(f"{v:9.3g}" if v else "        -" for v in values))
        pairs = list(zip(rows[ours.DEFAULT], best, strict=True))
        wins += sum(bool(v) and v <= b for v, (b, _) in pairs)
        halves += sum(bool(v) and v <= b / 2 for v, (b, _) in pairs)
        holders = zip(BUDGETS, best, strict=True)
        print("held by: " + "; ".join(f"{n}: {label}" for n, (_, label) in holders))
    print(f"\nthe default is at or below the best peer in {wins} cells, at half of it in {halves}")


def show_noise(tables):
    for case, table in tables.items():
        floor, spread = table["floor"]
        print(f"\n{case:44}" + "".join(f"{budget:>8}" for budget in BUDGETS))
        print(f"{'floor':44}{floor:8.4f} +- {spread:.4f}")
        for label, values in table["rows"].items():
            print(f"{label:44}" + "".join(f"{v:8.3g}" if v else "       -" for v in values))


def save(name, value):
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    rows = json.dumps(value, indent=1)
    path.write_text(rows + "\n", encoding="utf8")


def main(wanted):
    if "golden" in wanted:
        golden.write(ROOT / "tests" / "golden_solvers.json")
    if "overhead" in wanted:
        save("overhead", overhead.table())
    if "accuracy" in wanted:
        tables = over_cases(accuracy_of, HEIGHTS)
        save("accuracy", {"budgets": BUDGETS, "tables": tables})
        show_accuracy(tables)
    if "noise" in wanted:
        tables = over_cases(noise_of, ("vp-disc", "ve-edm"))
        save("noise", {"budgets": BUDGETS, "tables": tables})
        show_noise(tables)
    results = {path.stem: json.loads(path.read_text(encoding="utf8"))
               for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))}
    text = json.dumps(results, separators=(",", ":")).replace('],"', '],\n"')
    (ROOT / "nbs" / "shootout.json").write_text(text + "\n", encoding="utf8")
