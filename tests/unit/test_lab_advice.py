"""Where to start: the cheapest of the methods that lose less than a point against the best."""

import pytest
import torch

from selective_lite.lab import results
from selective_lite.lab.figures import advice

NAMES = {"random": "random", "fish": "FISH", "lt_sft": "LT-SFT", "sara": "SaRA"}
RIGHT = {("head", 0.0): 280, ("full", 1.0): 340}
RIGHT |= {("random", 0.0002): 290, ("fish", 0.0002): 320, ("lt_sft", 0.0002): 321}
RIGHT |= {("sara", 0.0002): 318}
RIGHT |= {("random", 0.005): 339, ("fish", 0.005): 338, ("lt_sft", 0.005): 340}


def rows(seeds=5):
    return [
        {
            "config": {"method": method, "budget": budget, "seed": seed},
            "correct": results.pack(torch.arange(400) < right + spread * (seed - 2)),
            "tested": 400,
        }
        for (method, budget), right in RIGHT.items()
        for spread in (12 if method == "sara" else -2 if 0 < budget < 1 else 0,)
        for seed in range(1 if method == "head" else seeds)
    ]


def sweeps():
    """Validation puts LT-SFT first, and has one rate that failed."""
    return [
        {"config": {"method": method, "budget": budget}, "validation": [0.1, right / 400, None]}
        for (method, budget), right in RIGHT.items()
    ]


def test_the_cheapest_of_those_on_a_level_comes_first():
    small, large = advice.advice(rows(), sweeps())
    assert (small.budget, small.chosen, small.start) == (0.0002, "lt_sft", "fish")
    assert small.level == ["fish", "lt_sft"]  # not the noisy one, which cannot be told from them
    assert (large.chosen, large.start) == ("lt_sft", "random")
    assert small.over_head.mean == pytest.approx(0.1)
    assert small.under_full.verdict == "worse"
    assert large.under_full.verdict == "not distinguishable"


def test_the_lines_name_their_rows():
    said = advice.lines(advice.advice(rows(), sweeps()), NAMES, "reviews.json")
    assert said[0] == "0.02 %: start with FISH"
    assert said[1] == "    best on validation LT-SFT; within a point of it: FISH"
    assert "+10.00 points" in said[2]
    assert said[4] == "    rows: reviews.json, budget 0.0002, 5 seeds; head; full"
    assert said[5] == "0.5 %: start with random"


def test_methods_with_too_few_seeds_are_not_advised():
    assert advice.advice(rows(seeds=2), sweeps()) == []
