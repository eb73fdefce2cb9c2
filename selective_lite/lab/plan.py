"""The plan: which runs stand behind the book's figures; a config is the identity of its row.

Every choice is made on the validation split with seed 0 (`rate_configs`); the test split is read once, by a finished
row. Run this file (``make results``) to run what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import results
from .experiments import NAME, Config, run, sweep

DATA = {
    "task": "movies",
    "train": 1000,
    "validation": 500,
    "batch": 32,
    "epochs": 4,
}  # Diff Pruning: 2 relaxed, 2 fixed
# At 0.1 % the groups' gates, which keep pace with their members', leave fewer than k differences: no structured row.
METHODS = {
    0.005: ("unstructured", "structured", "random", "shuffled"),
    0.001: ("unstructured", "random", "shuffled"),
}
BUDGETS = tuple(METHODS)
SEEDS = (0,)
# By half decades; sparser masks want larger rates (Xu and Zhang 2024), and no best rate may lie on an edge.
GRIDS = {"unstructured": (1e-3, 3e-3, 1e-2, 3e-2), "random": (1e-3, 3e-3, 1e-2, 3e-2), "full": (1e-5, 3e-5, 1e-4)}
WIDER = {("random", 0.001): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}


def rate_configs() -> Iterator[Config]:
    """What is tuned: a method at a budget, over its grid, on seed 0 and the validation split."""
    for method in ("unstructured", "random"):
        for budget in BUDGETS:
            grid = WIDER.get((method, budget), GRIDS[method])
            yield {"method": method, "budget": budget, "seed": 0, "grid": grid, **DATA}
    yield {"method": "full", "budget": 1.0, "seed": 0, "grid": GRIDS["full"], **DATA}


def configs() -> Iterator[Config]:
    """The rows of `diff_pruning_movies`, the learning rates out of `rate_configs`' rows."""
    chosen = {(row["config"]["method"], row["config"]["budget"]): row["lr"] for row in results.read(NAME + "_rates")}
    for seed in SEEDS:
        yield {"method": "full", "budget": 1.0, "seed": seed, "lr": chosen["full", 1.0], **DATA}
        for budget in BUDGETS:
            for method in METHODS[budget]:
                # Structured differs by a gate, shuffled by positions: both take the unstructured run's rate.
                tuned = "random" if method == "random" else "unstructured"
                yield {"method": method, "budget": budget, "seed": seed, "lr": chosen[tuned, budget], **DATA}


if __name__ == "__main__":
    results.run_missing(NAME + "_rates", rate_configs(), sweep)
    results.run_missing(NAME, configs(), run)
