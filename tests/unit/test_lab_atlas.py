"""The atlas: what is drawn and said follows from the rows."""

import matplotlib.pyplot as plt
import pytest
import torch

from selective_lite.lab import results
from selective_lite.lab.figures import atlas

NAMES = {"full": "full", "head": "head only", "random": "random", "fish": "FISH", "sara": "SaRA"}
RIGHT = {("random", 0.0002): 240, ("random", 0.005): 320, ("fish", 0.0002): 300}
RIGHT |= {("fish", 0.005): 322, ("full", 1.0): 330, ("head", 0.0): 310, ("random", "bitfit"): 310}


def rows():
    return [
        {
            "config": {"method": method, "budget": budget, "seed": seed},
            "accuracy": right / 400,
            "correct": results.pack(torch.arange(400) < right),
            "tested": 400,
        }
        for (method, budget), mean in RIGHT.items()
        for seed in range(1 if method == "head" else 4)
        # FISH's seeds differ, by -9, -3, 3 and 9
        for right in (mean + (6 * seed - 9 if method == "fish" else 0),)
    ]


def test_budgets_are_drawn_in_order_and_what_has_one_is_a_line():
    _, ax = plt.subplots()
    drawn = atlas.by_budget(ax, rows(), NAMES)
    plt.close("all")
    assert [point[:2] for point in drawn["fish"]] == [
        (0.0002, pytest.approx(100 * 300 / 400)),
        (0.005, pytest.approx(100 * 322 / 400)),
    ]
    assert len(drawn["random"]) == 2  # the control of BitFit's size has no budget of its own
    assert "sara" not in drawn
    labelled = {line.get_label() for line in ax.lines}
    assert {"FISH", "random"} <= labelled
    assert not {"full", "head only"} & labelled


def test_a_score_is_worth_what_it_gains_over_chance_at_its_budget():
    found = atlas.worth(rows(), NAMES)
    gains = {cell: round(400 * one.mean) for cell, one in found.items()}
    assert gains == {("fish", 0.0002): 60, ("fish", 0.005): 2}
    said = atlas.worth_sentences(found, NAMES)
    assert said[0].startswith("FISH 0.02 %: +15.00 points [")
    assert said[0].endswith("better")
    assert said[1].endswith("not distinguishable")


def test_a_lead_at_a_common_rate_is_not_the_lead_of_the_best():
    sweeps = [
        {"config": {"method": "fish", "budget": 0.005}, "rates": [1e-3, 3e-3, 1e-2]}
        | {"validation": [0.8, 0.7, None]},
        {"config": {"method": "random", "budget": 0.005}, "rates": [1e-3, 3e-3, 1e-2, 3e-2]}
        | {"validation": [0.6, 0.7, 0.79, 0.5]},
        {"config": {"method": "random", "budget": 0.0002}, "rates": [1e-3], "validation": [0.9]},
    ]
    _, ax = plt.subplots()
    curves = atlas.by_rate(ax, sweeps, NAMES, 0.005)
    plt.close("all")
    assert list(curves["fish"]) == [1e-3, 3e-3]
    common, best = atlas.leads(curves, "fish", "random")
    assert common == {1e-3: pytest.approx(20), 3e-3: pytest.approx(0)}
    assert best == pytest.approx(1)


def test_dots_are_the_cells_with_rows_best_at_the_top_between_two_lines():
    _, ax = plt.subplots()
    cells = [("random", 0.005), ("fish", 0.005), ("sara", 0.005), ("random", "bitfit")]
    drawn = atlas.dots(ax, rows(), NAMES, cells)
    lines = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    plt.close("all")
    assert [name for name, *_ in drawn] == ["FISH 0.5 %", "random 0.5 %", "random (bitfit's size)"]
    assert drawn[1][1:] == (80.0, 0.0)
    assert drawn[0][2] > 0
    assert sorted(lines) == [pytest.approx(100 * 310 / 400), pytest.approx(100 * 330 / 400)]


def test_a_place_is_the_mean_of_the_seeds():
    some = [
        {"config": {"method": "fish", "budget": 0.1, "seed": seed}, "per_tensor": {"a": count}}
        for seed, count in enumerate((4, 8))
    ]
    found = atlas.placed(some, "fish", 0.1, {"a": (4, 4), "b": (2,)})
    assert found.per_tensor() == {"a": 6, "b": 0}
    with pytest.raises(ValueError, match="no rows at budget=0.2"):
        atlas.placed(some, "fish", 0.2, {"a": (4, 4)})


def test_shares_are_of_two_scores_at_one_budget():
    def row(one, other, shared, budget=0.1):
        pair = {"ours": {"score": one}, "theirs": {"score": other}}
        return {"config": {"budget": budget, **pair}, "shared": shared}

    found = [row("a", "b", 0.3), row("a", "a", 0.9), row("b", "c", 0.01), row("a", "c", 0.5, 0.2)]
    _, ax = plt.subplots()
    shown = atlas.shares(ax, found, {"a": "A", "c": "C", "b": "B"}, 0.1)
    texts = {text.get_text() for text in ax.texts}
    plt.close("all")
    assert shown == {("a", "b"): 0.3, ("b", "c"): 0.01}
    assert texts == {"30.0", "1.0"}
