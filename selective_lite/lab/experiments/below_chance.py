"""Below chance: why FISH's mask lost to random ones in the first edition, by a designed experiment.

Four things were particular there: the head was fresh, the model had a pooler that nobody had
trained, 256 examples were scored, and each by itself. Each is one factor of two levels; FISH is run
in half of the sixteen combinations, those in which an even number of factors is as it was, so that
the effect of each factor is a mean over all levels of the others. Random masks, and the head alone,
are run on each of the four models. Rates, seeds and intervals as in `reviews`. Run this module
(part of ``make results``) to run what is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch

from ...methods.fish import first_samples
from ...methods.fixed_mask import fixed_mask
from ...scores import squared_gradient
from ...selection import select
from ...training import Phases
from ..data.sentiment import Task, load_task
from ..models import load_classifier, load_mean_classifier
from . import movies, recipes, results, reviews
from .intervals import Difference, difference, holm
from .probes import install, probe
from .recipes import Config, Recipe
from .run import Study, make

NAME, CHANCE = "below_chance", "below_chance_controls"
BUDGET = 0.005
# The first level of each factor is the first edition's.
FACTORS: dict[str, tuple[Any, Any]] = {
    "head": ("fresh", "warm"),
    "pooling": ("pooler", "mean"),
    "samples": (256, 1000),
    "reduction": ("per_sample", "batch"),
}
SIZES = {part: reviews.DATA[part] for part in ("train", "validation", "test", "batch", "epochs")}
MODEL = ("head", "pooling")
SEEDS = (0, 1, 2)


def combinations(names: Iterable[str]) -> list[dict[str, Any]]:
    """All combinations of these factors' levels."""
    names = list(names)
    return [
        dict(zip(names, levels, strict=True))
        for levels in product(*(FACTORS[name] for name in names))
    ]


def even(config: Config) -> bool:
    """Whether an even number of the four factors is at its second level."""
    return sum(levels.index(config[name]) for name, levels in FACTORS.items()) % 2 == 0


@cache
def prepared(task: str, head: str, pooling: str) -> tuple[Any, Task]:
    """A model and its data, made once in a process; of a fresh head each seed draws another."""
    model, tokenizer = (load_classifier if pooling == "pooler" else load_mean_classifier)()
    sizes = {part: SIZES[part] for part in ("train", "validation")}
    data = load_task(task, tokenizer, **sizes, device=next(model.parameters()).device)
    if head == "warm":
        install(model, probe(model, data))
    return model, replace(data, test=reviews.shorter(data.test, SIZES["test"]))


def start(config: Config) -> tuple[Any, Task]:
    """The model and the data that a config names, with its seed's head if that is fresh."""
    model, data = prepared(config["task"], config["head"], config["pooling"])
    model = copy.deepcopy(model)
    torch.manual_seed(config["seed"])
    if config["head"] == "fresh":
        model.classifier.weight.data.normal_(0, model.config.initializer_range)
    return model, data


def fish(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """The largest squared gradients of some examples, each by itself or of batches."""
    batches = task.train.batches(config["batch"], seed=config["seed"])
    some = first_samples(batches, config["samples"])
    scores = squared_gradient(model, some, reduction=config["reduction"])
    rates = {"lr": lr, "lr_head": recipes.LR_HEAD, "epochs": config["epochs"]}
    return fixed_mask(model, select(scores, config["budget"]), **rates)


def seeds(method: str, budget: float | str) -> tuple[int, ...]:
    """Three seeds; every effect is a mean over eight cells of them."""
    return SEEDS


# provenance: apart
RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe for recipe in (recipes.head, recipes.random, fish)
}
STUDY = Study(
    NAME,
    data=tuple(
        {"task": "movies", **SIZES, **levels} for levels in combinations(FACTORS) if even(levels)
    ),
    recipes=RECIPES,
    start=start,
    validate=movies.validate,
    measure=movies.tested,
    grids={("fish", BUDGET): 3e-3},
    seeds=seeds,
    choose=reviews.rate,
    tuned_on=reviews.TUNED_ON,
)
CONTROLS = replace(
    STUDY,
    name=CHANCE,
    data=tuple({"task": "movies", **SIZES, **levels} for levels in combinations(MODEL)),
    grids={("head", 0.0): (), ("random", BUDGET): 1e-2},
)


def gains(
    rows: Iterable[results.Row], chance: Iterable[results.Row]
) -> dict[tuple[Any, ...], dict[int, np.ndarray]]:
    """FISH's right answers less those of random masks on the same model.

    Returns
    -------
    dict
        ``{levels: {seed: one number for each test example}}``, levels in the order of `FACTORS`.
    """
    by_chance = {
        (*(row["config"][name] for name in MODEL), row["config"]["seed"]): answers(row)
        for row in chance
        if row["config"]["method"] == "random"
    }
    found: dict[tuple[Any, ...], dict[int, np.ndarray]] = {}
    for row in rows:
        config = row["config"]
        at = (*(config[name] for name in MODEL), config["seed"])
        levels = tuple(config[name] for name in FACTORS)
        found.setdefault(levels, {})[config["seed"]] = answers(row) - by_chance[at]
    return found


def answers(row: results.Row) -> np.ndarray:
    """Which answers are right, as numbers."""
    return results.unpack(row["correct"], row["tested"]).astype(float)


def effects(rows: Iterable[results.Row], chance: Iterable[results.Row]) -> dict[str, Difference]:
    """What the second level of each factor adds to FISH's gain over random masks.

    The mean over the cells at the second level, less that over those at the first; p values hold
    for all factors together.
    """
    found = gains(rows, chance)
    pairs = {}
    for place, (name, levels) in enumerate(FACTORS.items()):
        first, second = (
            {
                seed: np.mean([cell[seed] for at, cell in found.items() if at[place] == level], 0)
                for seed in SEEDS
            }
            for level in levels
        )
        pairs[name] = difference(second, first)
    return dict(zip(pairs, holm(pairs.values()), strict=True))


if __name__ == "__main__":
    make(CONTROLS)
    make(STUDY)
    for factor, effect in effects(results.read(NAME), results.read(CHANCE)).items():
        low, high = effect.interval
        print(f"{factor}: {effect.mean:+.4f} [{low:+.4f}, {high:+.4f}], {effect.verdict}")
