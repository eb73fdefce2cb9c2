"""Common rate: FISH and random masks at all learning rates from the best of one to the other's.

A sweep ends where its own best rate is bracketed, so the rates of two methods may not meet. These
runs add what a comparison at one rate needs, and look beyond the bracket. Run this module (part of
``make results``) after `reviews` to run what is missing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from . import results, reviews
from .results import Row
from .reviews import STUDY
from .run import RATES, trial

NAME = "common_rate"
PAIR = ("fish", "random")


def configs() -> list[dict[str, Any]]:
    """Each method at a budget, at the rates from its best to the other's that it has not tried."""
    sweeps = results.read(STUDY.name + "_rates")
    at = {(sweep["config"]["method"], sweep["config"]["budget"]): sweep for sweep in sweeps}
    missing = []
    for budget in reviews.BUDGETS:
        for method, other in (PAIR, PAIR[::-1]):
            own, theirs = (at.get((name, budget)) for name in (method, other))
            if own and theirs:
                low, high = sorted((reviews.rate(own), reviews.rate(theirs)))
                between = [lr for lr in RATES if low <= lr <= high and lr not in own["rates"]]
                named = {"method": method, "budget": budget, "seeds": STUDY.tuned_on}
                missing += [{**named, "lr": lr, **STUDY.data[0]} for lr in between]
    return missing


def tried(config: Mapping[str, Any]) -> Row:
    """Mean validation accuracy at the config's rate, as a sweep of one rate; None if it failed."""
    seeds = config["seeds"]
    gains = [trial(STUDY, {**config, "seed": seed})[0](config["lr"]) for seed in seeds]
    mean = sum(gains) / len(gains)
    return {"rates": [config["lr"]], "validation": [mean if math.isfinite(mean) else None]}


def roots(config: Mapping[str, Any]) -> list[str]:
    """Definitions that a row follows from."""
    return [results.place(tried), *STUDY.roots({**config, "start": config["lr"]})]


if __name__ == "__main__":
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    results.run_missing(NAME, configs(), tried, roots, workers=workers)
