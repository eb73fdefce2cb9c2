"""Relaxation: structured Diff Pruning with a relaxed phase as long as the paper's, and a short one.

The paper's smallest tasks give its gates about a thousand steps of eight examples; `reviews` gives
them sixty-three. Here the gates of the two upper layers get 125 steps or a thousand (the layers
below are frozen, which makes a step cheap enough), then both variants train their masks for two
passes. Full fine-tuning and random masks take as many steps in all. Rates, seeds and intervals as
in `reviews`. Run this module (part of ``make results``) to run what is missing.
"""

from __future__ import annotations

from typing import Any

from ...methods.controls import random_scores
from ...methods.diff_pruning import diff_pruning
from ...methods.fixed_mask import fixed_mask, full_finetuning
from ...selection import select
from ...training import Phases
from ..data.sentiment import Task
from . import movies, results, reviews
from .intervals import sentences
from .recipes import LR_HEAD, LR_W, Config, Recipe
from .run import Study, make

NAME = "relaxation"
BUDGET, UPPER = 0.005, 2
SIZES = {**{part: reviews.DATA[part] for part in ("train", "validation", "test")}, "batch": 8}
# Passes of the relaxed phase and the gates' rate in it: the long one can afford the paper's.
SHORT, LONG = {"relaxed": 1, "lr_alpha": 0.3}, {"relaxed": 8, "lr_alpha": 0.1}
MASKED = 2  # passes


def start(config: Config) -> tuple[Any, Task]:
    """The model of `reviews`, frozen below its upper layers, and the data that a config names."""
    model, data = reviews.start(config)
    encoder = model.bert.encoder.layer
    for part in (model.bert.embeddings, *encoder[: len(encoder) - UPPER]):
        part.requires_grad_(False)
    return model, data


def unstructured(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """Diff Pruning with a gate for every weight."""
    return _diff_pruning(model, config, lr, groups=None)


def structured(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """Diff Pruning with a second gate for every tensor."""
    return _diff_pruning(model, config, lr, groups="tensor")


def _diff_pruning(model: Any, config: Config, lr: float, groups: Any) -> Phases:
    return diff_pruning(
        model,
        config["budget"],
        lr_w=LR_W,
        lr_alpha=config["lr_alpha"],
        lr=lr,
        lr_head=LR_HEAD,
        epochs=(config["relaxed"], MASKED),
        groups=groups,
        seed=config["seed"],
    )


def random(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """Random positions, trained in both phases."""
    selection = select(random_scores(model, config["seed"]), config["budget"])
    return fixed_mask(model, selection, lr=lr, lr_head=LR_HEAD, epochs=config["relaxed"] + MASKED)


def full(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """All weights of the upper layers."""
    return full_finetuning(model, lr=lr, lr_head=LR_HEAD, epochs=config["relaxed"] + MASKED)


# provenance: apart, each row names its own recipe
RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe for recipe in (full, random, unstructured, structured)
}
STUDY = Study(
    NAME,
    data=tuple({"task": "movies", **SIZES, **phase} for phase in (SHORT, LONG)),
    recipes=RECIPES,
    start=start,
    validate=movies.validate,
    measure=movies.tested,
    grids={
        ("full", 1.0): 1e-4,
        ("random", BUDGET): 1e-2,
        **{(name, BUDGET): 3e-3 for name in ("unstructured", "structured")},
    },
    seeds=reviews.seeds,
    choose=reviews.rate,
    tuned_on=reviews.TUNED_ON,
)


def of_length(rows: list[results.Row], relaxed: int) -> list[results.Row]:
    """The rows with one length of the relaxed phase."""
    return [row for row in rows if row["config"]["relaxed"] == relaxed]


if __name__ == "__main__":
    make(STUDY)
    for phase in (SHORT, LONG):
        print(f"{phase['relaxed']} relaxed passes")
        rows = of_length(results.read(NAME), int(phase["relaxed"]))
        print(sentences(rows, {"random": None, "full": 1.0}))
