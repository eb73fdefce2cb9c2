"""Intervals over seeds and test examples cover the truth as often as they say."""

import numpy as np
import pytest
import torch

from selective_lite.lab import results
from selective_lite.lab.experiments.intervals import (
    Difference,
    against,
    difference,
    holm,
    mean_and_reach,
    sentences,
)

CONTROLS = {"random": None, "full": 1.0, "head": 0.0}

EXAMPLES, POINT = 3000, 0.01


def runs(generator, seeds, spread):
    """Two methods' answers whose true difference is zero; it varies by `spread` between seeds.

    Test examples are drawn too: another test set has others, easier for the one or the other.
    """
    theirs_right = np.clip(generator.normal(0.5, 0.3, EXAMPLES), 0, 1)
    tilt = generator.normal(0, 0.15, EXAMPLES)
    ours, theirs = {}, {}
    for seed in range(seeds):
        ours_right = np.clip(theirs_right + tilt + generator.normal(0, spread), 0, 1)
        theirs[seed] = generator.random(EXAMPLES) < theirs_right
        ours[seed] = generator.random(EXAMPLES) < ours_right
    return ours, theirs


@pytest.mark.parametrize(("seeds", "least"), [(3, 0.92), (5, 0.93)])  # 1,500 draws: 0.934, 0.959
@pytest.mark.parametrize("spread", [0.01, 1.1, 2.6])  # points: least, median, most seen
def test_an_interval_covers_the_truth_as_often_as_it_says(seeds, least, spread):
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(1200):
        low, high = difference(*runs(generator, seeds, spread * POINT)).interval
        covered.append(low <= 0 <= high)
    assert np.mean(covered) >= least


def test_the_bootstrap_that_it_replaces_does_not():
    """With three seeds a percentile interval covers 83 to 87 % at a spread of a point or more."""
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        drawn = generator.normal(0, 1, 3)
        means = drawn[generator.integers(3, size=(500, 3))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        covered.append(low <= 0 <= high)
    assert np.mean(covered) < 0.9


def test_a_difference_on_a_hand_case():
    """Two seeds, four examples: the seeds differ by 1/4 and 3/4, the examples by 1, 1/2, 1/2, 0."""
    ours = {0: [1, 0, 0, 0], 1: [1, 1, 1, 0], 2: [0, 0, 0, 0]}
    theirs = {0: [0, 0, 0, 0], 1: [0, 0, 0, 0]}
    found = difference(ours, theirs)
    between_seeds = ((1 / 4) ** 2 + (1 / 4) ** 2) / 1 / 2
    between_examples = (1 / 2) ** 2 * 2 / 3 / 4
    assert (found.mean, found.seeds) == (0.5, 2)
    assert found.error**2 == pytest.approx(between_seeds + between_examples)
    assert found.freedom == pytest.approx(((between_seeds + between_examples) / between_seeds) ** 2)
    low, high = found.interval
    assert low + high == pytest.approx(1)
    assert (found.p < 0.05) == (low > 0)


def test_weights_make_it_a_difference_of_ratios():
    bits = {0: [3.0, 8.0], 1: [3.0, 8.0], 2: [3.0, 8.0]}
    less = {0: [2.0, 6.0], 1: [2.0, 6.0], 2: [2.0, 6.0]}
    assert difference(bits, less, weight=[1, 3]).mean == 3 / 4
    even = {seed: [1.0, 3.0] for seed in range(3)}  # one bit saved for each token of every text
    assert difference(even, {s: [0, 0] for s in range(3)}, weight=[1, 3]).error == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({0: [1.0]}, {1: [1.0]}, r"ours has seeds \[0\], theirs \[1\]: none in common"),
        ({0: [1.0, 0.0]}, {0: [1.0]}, "the same number of examples"),
        ({0: [1.0, 0.0], 1: [1.0]}, {0: [1.0, 0.0], 1: [1.0]}, "the same number of examples"),
    ],
)
def test_what_cannot_be_paired_is_refused(ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        difference(ours, theirs)


def of(p, mean=1.0, seeds=5):
    return Difference(mean, 1.0, 4.0, seeds, p)


def test_holm_on_a_hand_case():
    """0.01 x 4, 0.015 x 3, 0.03 x 2, and 0.04, which is not less than the one before."""
    found = holm([of(0.03), of(0.01), of(0.04), of(0.015)])
    assert [one.p for one in found] == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert [one.verdict for one in found] == ["not distinguishable", "better"] * 2
    assert holm([]) == []


def test_a_family_without_an_effect_seldom_has_a_verdict():
    generator = np.random.default_rng(0)
    families = [holm(difference(*runs(generator, 5, POINT)) for _ in range(20)) for _ in range(80)]
    alone = [[one.interval[0] > 0 or one.interval[1] < 0 for one in family] for family in families]
    false = [any(one.verdict != "not distinguishable" for one in family) for family in families]
    assert np.mean([any(family) for family in alone]) > 0.2  # what Holm is for
    assert np.mean(false) <= 0.08


def test_a_verdict_takes_three_seeds_and_has_a_side():
    assert of(0.01).verdict == "better"
    assert of(0.01, mean=-1.0).verdict == "worse"
    assert of(0.06).verdict == "not distinguishable"
    with pytest.raises(ValueError, match="seeds=2 are too few for a verdict; it takes 3"):
        of(0.01, seeds=2).verdict  # noqa: B018


def test_gains_are_over_chance_at_the_same_budget_and_over_full_and_the_head():
    generator = np.random.default_rng(0)

    def row(method, budget, seed, share):
        right = torch.from_numpy(generator.random(500) < share)
        own = {"method": method, "budget": budget, "seed": seed}
        return {"config": own, "correct": results.pack(right), "tested": 500}

    cells = {
        ("fish", 0.005): 0.9,
        ("random", 0.005): 0.6,
        ("random", 0.02): 0.9,
        ("full", 1.0): 0.9,
    }
    rows = [row(*cell, seed, share) for cell, share in cells.items() for seed in range(5)]
    found = against([*rows, row("head", 0.0, 0, 0.6)], CONTROLS)
    assert found["random", ("fish", 0.005)].verdict == "better"
    assert found["full", ("random", 0.005)].verdict == "worse"
    assert found["head", ("full", 1.0)].verdict == "better"
    assert found["head", ("full", 1.0)].seeds == 5
    assert ("random", ("random", 0.02)) not in found
    assert {control for control, cell in found if cell == ("head", 0.0)} == {"full"}
    said = sentences(rows, CONTROLS).splitlines()
    assert len(said) == len(against(rows, CONTROLS))
    assert said[0].startswith("fish 0.005, against random: better, +0.")


def test_bits_are_costs_for_each_token_and_few_seeds_have_no_sentence():
    def row(method, seed, bits):
        own = {"method": method, "budget": 0.005, "seed": seed}
        return {"config": own, "bits": bits, "tokens": [1, 3]}

    rows = [row("random", s, [4.0, 4.0]) for s in (0, 1)]
    rows += [row("fish", s, [3.0, 3.0]) for s in (0, 1)]
    found = against(rows, {"random": None})["random", ("fish", 0.005)]
    assert found.mean == 0.5
    assert sentences(rows, {"random": None}) == ""


def test_a_band_is_the_t_interval_of_the_seeds():
    mean, reach = mean_and_reach([1.0, 2.0, 3.0])
    assert (mean, reach) == (2.0, pytest.approx(4.302653 / 3**0.5))
    assert np.isnan(mean_and_reach([1.0])[1])
