"""The plan: which runs stand behind the book's figures; a config is the identity of its row.

Every choice is made on the validation split with seed 0 (`rate_configs`); the test split is read
once, by a finished row. Run this file (``make results``) to run what is missing: the movies, and
where there is a GPU, all four domains with all seeds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from ..data.sentiment import DOMAINS
from . import results
from .recipes import Config
from .run import roots, run, sweep

NAME, LARGE = "movies", "domains"
DATA = {"train": 1000, "validation": 500, "batch": 32, "epochs": 4}
SEEDS = (0, 1, 2)
# Diff Pruning and its controls, chapters 4 and 5.
METHODS = ("unstructured", "structured", "random", "shuffled")
BUDGETS = (0.005, 0.001)
# The whole family; what has no budget has its own size.
FAMILY_BUDGETS = (0.005, 0.0002)
SHUFFLES = ("shuffled", "fish_shuffled")
ONE_SEED = (
    "sara_threshold",
    "bitfit",
    "last_layers",
    "child_tuning_f",
    "child_tuning_d",
    "lt_sft",
    "sora",
)
# By half decades; sparser masks want larger rates (Xu and Zhang 2024). Widened until no best rate
# lay on an edge.
GRIDS: dict[tuple[str, float | str], tuple[float, ...]] = {
    ("full", 1.0): (1e-5, 3e-5, 1e-4),
    ("unstructured", 0.005): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("unstructured", 0.001): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("structured", 0.005): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("structured", 0.001): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("random", 0.005): (1e-3, 3e-3, 1e-2, 3e-2),
    ("random", 0.001): (3e-3, 1e-2, 3e-2, 1e-1),
    ("shuffled", 0.005): (1e-3, 3e-3, 1e-2, 3e-2),
    ("shuffled", 0.001): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("fish", 0.005): (1e-3, 3e-3, 1e-2, 3e-2),
    ("fish", 0.0002): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("random", 0.0002): (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ("lora", 0.005): (3e-4, 1e-3, 3e-3, 1e-2),
    ("lora", 0.0002): (1e-3, 3e-3, 1e-2, 3e-2),
    ("spt", 0.005): (3e-4, 1e-3, 3e-3, 1e-2),
    ("spt", 0.0002): (1e-3, 3e-3, 1e-2, 3e-2),
    ("sara", 0.005): (3e-3, 1e-2, 3e-2, 1e-1),
    ("sara", 0.0002): (1e-2, 3e-2, 1e-1, 3e-1),
    ("unstructured", 0.0002): (3e-3, 1e-2, 3e-2, 1e-1),
    ("shuffled", 0.0002): (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ("fish_shuffled", 0.005): (1e-3, 3e-3, 1e-2, 3e-2),
    ("fish_shuffled", 0.0002): (3e-3, 1e-2, 3e-2, 1e-1),
    ("child_tuning_d", 0.005): (1e-3, 3e-3, 1e-2, 3e-2),
    ("child_tuning_d", 0.0002): (1e-3, 3e-3, 1e-2, 3e-2),
    ("lt_sft", 0.005): (1e-3, 3e-3, 1e-2, 3e-2),
    ("lt_sft", 0.0002): (3e-3, 1e-2, 3e-2, 1e-1),
    ("bitfit", "own"): (1e-3, 3e-3, 1e-2, 3e-2),
    ("last_layers", "own"): (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    ("child_tuning_f", "own"): (1e-5, 3e-5, 1e-4, 3e-4),
    ("sara_threshold", "own"): (3e-4, 1e-3, 3e-3, 1e-2),
    ("sora", "own"): (3e-4, 1e-3, 3e-3, 1e-2),
}


def seeds(method: str, name: str = NAME) -> tuple[int, ...]:
    """Three seeds for what the book compares, one for the others; in the larger profile three for all."""
    return SEEDS[:1] if name == NAME and method in ONE_SEED else SEEDS


def rate(sweep: results.Row) -> float:
    """The rate with the best validation accuracy in the mean over itself and its two neighbours in the grid.

    One run at one rate is noisy, and large rates end at a cliff: the single best rate may stand
    beside it.
    """
    grid, accuracy = sweep["config"]["grid"], sweep["validation"]
    return grid[max(range(1, len(grid) - 1), key=lambda i: sum(accuracy[i - 1 : i + 2]))]


def rate_configs(task: str = "movies") -> Iterator[Config]:
    """What is tuned: a method at a budget, over its grid, on seed 0 and the validation split."""
    for (method, budget), grid in GRIDS.items():
        yield {"method": method, "budget": budget, "seed": 0, "grid": grid, "task": task, **DATA}


def configs(task: str = "movies", name: str = NAME) -> Iterator[Config]:
    """The rows of ``results/<name>.json``, each method at a budget with its own rate out of `rate_configs`' rows."""
    swept = [row for row in results.read(name + "_rates") if row["config"]["task"] == task]
    chosen = {(row["config"]["method"], row["config"]["budget"]): rate(row) for row in swept}
    for seed in SEEDS:
        for method, budget in GRIDS:
            if seed in seeds(method, name):
                yield {
                    "method": method,
                    "budget": budget,
                    "seed": seed,
                    "lr": chosen[method, budget],
                    "task": task,
                    **DATA,
                }


def shuffles(config: Config) -> bool:
    """Whether a config is a control that shuffles another method's selection, and so reads that method's rows."""
    return config["method"] in SHUFFLES


def everything(name: str, tasks: tuple[str, ...]) -> None:
    """Run what is missing of the sweeps and rows on these tasks: on CPU as many side by side as there are cores."""
    how: dict[str, Any] = {
        "workers": 1 if torch.cuda.is_available() else os.cpu_count() or 1,
        "late": shuffles,
    }
    results.run_missing(
        name + "_rates", [c for task in tasks for c in rate_configs(task)], sweep, roots, **how
    )
    results.run_missing(name, [c for task in tasks for c in configs(task, name)], run, roots, **how)


if __name__ == "__main__":
    everything(NAME, ("movies",))
    if torch.cuda.is_available():
        everything(LARGE, DOMAINS)
