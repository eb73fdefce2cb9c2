"""The movies: the methods on one sentiment task, the runs behind the book's figures.

Every choice is made on the validation split with seed 0; the test split is read once, by a finished
run. Run this module (part of ``make results``) to run what is missing; on a GPU, all four domains
with all seeds too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..data.sentiment import DOMAINS, Task, evaluate, load_task
from ..models import load_classifier
from . import results
from .recipes import RECIPES, Config
from .run import Cell, Study, make

NAME, LARGE = "movies", "domains"
DATA = {"train": 1000, "validation": 500, "batch": 32, "epochs": 4}
SEEDS = (0, 1, 2)
# Diff Pruning and its controls, chapters 4 and 5.
METHODS = ("unstructured", "structured", "random", "shuffled")
BUDGETS = (0.005, 0.001)
# All methods; "own" is the size of a method without a budget.
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
# was the smallest or the largest.
GRIDS: dict[Cell, tuple[float, ...]] = {
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


def start(config: Config) -> tuple[Any, Task]:
    """The model, its head drawn from the seed, and the task that a config names."""
    torch.manual_seed(config["seed"])  # dropout
    model, tokenizer = load_classifier(seed=config["seed"])
    sizes = {"train": config["train"], "validation": config["validation"]}
    device = next(model.parameters()).device
    return model, load_task(config["task"], tokenizer, **sizes, device=device)


def validate(model: Any, task: Task) -> float:
    """Accuracy on the validation split."""
    return evaluate(model, task.validation)["accuracy"]


def measure(model: Any, task: Task) -> results.Row:
    """As `tested`, and accuracy on the validation split."""
    return {**tested(model, task), "validation": validate(model, task)}


def tested(model: Any, task: Task) -> results.Row:
    """Accuracy and loss on the test split, and which answers are right."""
    test = evaluate(model, task.test)
    return {
        "accuracy": test["accuracy"],
        "loss": test["loss"],
        "majority": task.majority,
        "tested": len(task.test),
        "correct": results.pack(test["correct"]),
    }


def seeds(method: str, budget: float | str) -> tuple[int, ...]:
    """Three seeds for what the book compares, one for the others."""
    return SEEDS[:1] if method in ONE_SEED else SEEDS


def all_seeds(method: str, budget: float | str) -> tuple[int, ...]:
    """Three seeds for every method: those of the larger study."""
    return SEEDS


def rate(sweep: results.Row) -> float:
    """The rate with the best mean validation accuracy over itself and its two neighbours.

    One run at one rate is noisy, and large rates fail suddenly: the single best rate may be the
    last before that.
    """
    grid, accuracy = sweep["config"]["grid"], sweep["validation"]
    return grid[max(range(1, len(grid) - 1), key=lambda i: sum(accuracy[i - 1 : i + 2]))]


def shuffles(config: Config) -> bool:
    """Whether a config is a control that shuffles another method's selection, read in its row."""
    return config["method"] in SHUFFLES


STUDY = Study(
    NAME,
    data=({"task": "movies", **DATA},),
    recipes=RECIPES,
    start=start,
    validate=validate,
    measure=measure,
    grids=GRIDS,
    seeds=seeds,
    choose=rate,
    late=shuffles,
)
ALL_DOMAINS = replace(
    STUDY, name=LARGE, data=tuple({"task": task, **DATA} for task in DOMAINS), seeds=all_seeds
)

if __name__ == "__main__":
    make(STUDY)
    if torch.cuda.is_available():
        make(ALL_DOMAINS)
