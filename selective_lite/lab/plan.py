"""The plan: which runs stand behind the book's figures; a config is the identity of its row.

Every choice is made on the validation split with seed 0 (`rate_configs`); the test split is read once, by a finished
row. Run this file (``make results``) to run what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import results
from .experiments import roots, run, sweep
from .recipes import Config

NAME = "diff_pruning_movies"
DATA = {"task": "movies", "train": 1000, "validation": 500, "batch": 32, "epochs": 4}
METHODS = ("unstructured", "structured", "random", "shuffled")
BUDGETS = (0.005, 0.001)
SEEDS = (0, 1, 2)
# By half decades; sparser masks want larger rates (Xu and Zhang 2024). Widened until no best rate lay on an edge.
GRIDS = {
    ("full", 1.0): (1e-5, 3e-5, 1e-4),
    ("unstructured", 0.005): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("unstructured", 0.001): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("structured", 0.005): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("structured", 0.001): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("random", 0.005): (1e-3, 3e-3, 1e-2, 3e-2),
    ("random", 0.001): (3e-3, 1e-2, 3e-2, 1e-1),
    ("shuffled", 0.005): (1e-3, 3e-3, 1e-2, 3e-2),
    ("shuffled", 0.001): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}


def rate(sweep: results.Row) -> float:
    """The rate with the best validation accuracy in the mean over itself and its two neighbours in the grid.

    One run at one rate is noisy, and large rates end at a cliff: the single best rate may stand beside it.
    """
    grid, accuracy = sweep["config"]["grid"], sweep["validation"]
    return grid[max(range(1, len(grid) - 1), key=lambda i: sum(accuracy[i - 1 : i + 2]))]


def rate_configs() -> Iterator[Config]:
    """What is tuned: a method at a budget, over its grid, on seed 0 and the validation split."""
    for (method, budget), grid in GRIDS.items():
        yield {"method": method, "budget": budget, "seed": 0, "grid": grid, **DATA}


def configs() -> Iterator[Config]:
    """The rows of `diff_pruning_movies`, each method at a budget with its own rate out of `rate_configs`' rows."""
    sweeps = results.read(NAME + "_rates")
    chosen = {(sweep["config"]["method"], sweep["config"]["budget"]): rate(sweep) for sweep in sweeps}
    for seed in SEEDS:
        for method, budget in GRIDS:
            yield {"method": method, "budget": budget, "seed": seed, "lr": chosen[method, budget], **DATA}


if __name__ == "__main__":
    results.run_missing(NAME + "_rates", rate_configs(), sweep, roots)
    results.run_missing(NAME, configs(), run, roots)
