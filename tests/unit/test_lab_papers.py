"""The papers' table: a claim is called replicated by the rows, and never without them."""

from dataclasses import replace

import pytest
import torch

from selective_lite.lab import results
from selective_lite.lab.experiments import reviews
from selective_lite.lab.experiments.intervals import Difference
from selective_lite.lab.figures import papers

BETTER = replace(papers.CLAIMS[1], gain=1.2, better=True)
MATCH = replace(papers.CLAIMS[0], better=False)


def found(mean, error, p):
    return Difference(mean / 100, error / 100, float("inf"), 5, p)


@pytest.mark.parametrize(
    ("claim", "ours", "said"),
    [
        (BETTER, found(2.0, 0.5, 0.001), "yes"),
        (BETTER, found(0.5, 0.1, 0.001), "yes"),  # smaller than theirs, and seen
        (BETTER, found(0.0, 0.5, 0.9), "no"),  # up to 0.98: their 1.2 is excluded
        (BETTER, found(0.5, 0.5, 0.3), "cannot tell"),
        (BETTER, None, "cannot tell"),
        (BETTER, replace(found(2.0, 0.5, 0.001), seeds=2), "cannot tell"),
        (replace(BETTER, gain=None), found(-0.5, 0.5, 0.3), "cannot tell"),
        (replace(BETTER, gain=None), found(-2.0, 0.5, 0.001), "no"),
        (MATCH, found(-0.3, 0.2, 0.1), "yes"),
        (MATCH, found(-0.5, 0.1, 0.001), "yes"),  # worse, but by less than a point
        (MATCH, found(2.0, 0.5, 0.001), "yes"),
        (MATCH, found(-0.8, 0.5, 0.2), "cannot tell"),
        (MATCH, found(-2.0, 0.5, 0.001), "no"),
        (MATCH, None, "cannot tell"),
    ],
)
def test_a_claim_is_replicated_by_our_interval(claim, ours, said):
    assert papers.replicated(claim, ours) == said


def test_every_comparison_of_a_claim_is_one_that_will_have_rows():
    cells = set(reviews.GRIDS)
    for claim in papers.CLAIMS:
        assert claim.ours is None or set(claim.ours) <= cells, claim.text


def test_the_table_has_every_claim_and_says_which_have_no_rows():
    rows = [
        {
            "config": {"method": method, "budget": budget, "seed": seed},
            "correct": results.pack(torch.arange(400) < right + seed),
            "tested": 400,
        }
        for method, budget, right in (("fish", 0.005, 300), ("full", 1.0, 330))
        for seed in range(3)
    ]
    lines = papers.table(rows).splitlines()
    assert len(lines) == 3 * len(papers.CLAIMS)
    assert [line for line in lines if "Replicated: no" in line] == [
        line for line in lines if "-7.50 points" in line
    ]
    assert sum("not in results" in line for line in lines) == len(papers.CLAIMS) - 2
    assert sum("no such comparison here" in line for line in lines) == 1
