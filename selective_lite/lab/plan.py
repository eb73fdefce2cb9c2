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
# By half decades; sparser masks want larger rates (Xu and Zhang 2024), and no best rate may lie on an edge.
GRIDS = {
    ("full", 1.0): (1e-5, 3e-5, 1e-4),
    ("unstructured", 0.005): (3e-4, 1e-3, 3e-3, 1e-2),
    ("unstructured", 0.001): (1e-3, 3e-3, 1e-2, 3e-2),
    ("structured", 0.005): (3e-4, 1e-3, 3e-3, 1e-2),
    ("structured", 0.001): (1e-3, 3e-3, 1e-2, 3e-2),
    ("random", 0.005): (1e-3, 3e-3, 1e-2, 3e-2),
    ("random", 0.001): (3e-3, 1e-2, 3e-2, 1e-1),
    ("shuffled", 0.005): (1e-3, 3e-3, 1e-2, 3e-2),
    ("shuffled", 0.001): (1e-3, 3e-3, 1e-2, 3e-2),
}


def rate_configs() -> Iterator[Config]:
    """What is tuned: a method at a budget, over its grid, on seed 0 and the validation split."""
    for (method, budget), grid in GRIDS.items():
        yield {"method": method, "budget": budget, "seed": 0, "grid": grid, **DATA}


def configs() -> Iterator[Config]:
    """The rows of `diff_pruning_movies`, each method at a budget with its own rate out of `rate_configs`' rows."""
    chosen = {(row["config"]["method"], row["config"]["budget"]): row["lr"] for row in results.read(NAME + "_rates")}
    for seed in SEEDS:
        for method, budget in GRIDS:
            yield {"method": method, "budget": budget, "seed": seed, "lr": chosen[method, budget], **DATA}


if __name__ == "__main__":
    results.run_missing(NAME + "_rates", rate_configs(), sweep, roots)
    results.run_missing(NAME, configs(), run, roots)
