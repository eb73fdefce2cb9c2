"""Masks: what different scores choose of one model, and how much of it two of them share.

Every mask is chosen on the model of `reviews`, under the head that was trained alone. It is set
beside one that differs from it in one thing: the score, the seed, the task, or how many examples
were scored. Run this module (part of ``make results``) to compare what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import combinations
from math import prod
from typing import Any

from ...methods.controls import random_scores
from ...methods.fish import first_samples
from ...methods.lt_sft import movement
from ...params import snapshot
from ...scores import Scores, magnitude, squared_gradient, taylor
from ...selection import Selection, select
from ..data.sentiment import DOMAINS
from . import recipes, results, reviews
from .recipes import Config
from .results import Row
from .run import train

NAME = "masks"
BUDGETS = (0.0002, 0.005)
FEWER = (16, 64, 256)
FIRST: Config = {"score": "fish", "task": "movies", "samples": reviews.DATA["samples"], "seed": 0}
DENSE_RATE = reviews.LR_DENSE


def gradients(model: Any, task: Any, config: Config) -> Scores:
    """FISH: squared gradients of the first examples in a seed's order, each by itself."""
    batches = task.train.batches(config["batch"], seed=config["seed"])
    return squared_gradient(model, first_samples(batches, config["samples"]))


def batch_gradients(model: Any, task: Any, config: Config) -> Scores:
    """Child-Tuning-D and SPT: squared gradients of whole batches."""
    batches = task.train.batches(config["batch"], seed=config["seed"])
    some = first_samples(batches, config["samples"])
    return squared_gradient(model, some, reduction="batch")


def products(model: Any, task: Any, config: Config) -> Scores:
    """What a loss would lose without a weight, to first order: |theta g|."""
    return taylor(model, task.train.batches(config["batch"], seed=config["seed"]))


def moved(model: Any, task: Any, config: Config) -> Scores:
    """LT-SFT: how far each weight goes while all are trained, for half of a run."""
    before = snapshot(model)
    halved = {**config, "epochs": config["epochs"] // 2}
    train(model, task.train, config, recipes.full(model, task, halved, DENSE_RATE))
    return movement(model, before)


def sizes(model: Any, task: Any, config: Config) -> Scores:
    """Magnitudes."""
    return magnitude(model)


def draws(model: Any, task: Any, config: Config) -> Scores:
    """Random numbers."""
    return random_scores(model, config["seed"])


# provenance: apart, each row names its own scores
SCORES: Mapping[str, tuple[Callable[[Any, Any, Config], Scores], bool]] = {
    "fish": (gradients, True),
    "batch": (batch_gradients, True),
    "taylor": (products, True),
    "moved": (moved, True),
    "largest": (sizes, True),
    "smallest": (sizes, False),
    "random": (draws, True),
}


@cache
def chosen(score: str, task: str, samples: int, seed: int) -> dict[float, Selection]:
    """The masks of one score at each budget; made once in a process."""
    config = {**reviews.DATA, "task": task, "samples": samples, "seed": seed}
    model, data = reviews.start(config)
    rule, largest = SCORES[score]
    scores = rule(model, data, config)
    return {budget: select(scores, budget, largest=largest) for budget in BUDGETS}


def pairs() -> list[dict[str, Any]]:
    """Masks that differ in one thing, two by two, at each budget."""
    scored: list[Config] = [{**FIRST, "score": score} for score in SCORES]
    both = [*combinations(scored, 2)]
    moving: Config = {**FIRST, "score": "moved"}
    for one in (FIRST, moving):
        both += [(one, {**one, "task": task}) for task in DOMAINS if task != FIRST["task"]]
    both += combinations([*({**FIRST, "samples": samples} for samples in FEWER), FIRST], 2)
    few = {**FIRST, "samples": FEWER[-1]}
    both += [(few, {**few, "seed": 1}), (moving, {**moving, "seed": 1})]
    return [
        {"budget": budget, "ours": dict(ours), "theirs": dict(theirs)}
        for budget in BUDGETS
        for ours, theirs in both
    ]


def compare(config: Mapping[str, Any]) -> Row:
    """What two masks share, as shares of k, and what chance would give.

    Returns
    -------
    dict
        ``shared``; ``by_chance``, k / N; ``by_tensor``, what random positions would share that are
        as many in every tensor as theirs; ``per_tensor``, the counts of both masks.
    """
    ours, theirs = (chosen(**config[which])[config["budget"]] for which in ("ours", "theirs"))
    counts = ours.per_tensor(), theirs.per_tensor()
    alike = sum(
        count * counts[1][name] / prod(ours.shapes[name]) for name, count in counts[0].items()
    )
    return {
        "shared": ours.overlap(theirs),
        "by_chance": ours.fraction,
        "by_tensor": alike / ours.count,
        "per_tensor": list(counts),
    }


def roots(config: Mapping[str, Any]) -> list[str]:
    """Definitions that a row follows from: the two scores, and the comparison."""
    scores = [SCORES[config[which]["score"]][0] for which in ("ours", "theirs")]
    used: list[Callable[..., Any]] = [compare, reviews.start, *scores]
    return sorted({results.place(definition) for definition in used})


if __name__ == "__main__":
    results.run_missing(NAME, pairs(), compare, roots)
