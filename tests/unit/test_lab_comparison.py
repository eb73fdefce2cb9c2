"""Comparison: what is drawn and said follows from the rows."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from selective_lite.lab import comparison, results
from selective_lite.lab.experiments import studies

NAMES = {"full": "full", "random": "random", "ours": "Ours", "rule": "Rule", "absent": "Absent"}


def row(method, budget, seed, wrong, trained):
    correct = torch.ones(400, dtype=torch.bool)
    correct[torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:wrong]] = False
    return {
        "config": {"method": method, "budget": budget, "seed": seed, "lr": 0.01},
        "accuracy": correct.double().mean().item(),
        "correct": results.pack(correct),
        "tested": 400,
        "trained": trained,
    }


ROWS = [
    row("full", 1.0, 0, 40, 1000), row("full", 1.0, 1, 44, 1000),
    row("ours", 0.1, 0, 40, 100), row("ours", 0.1, 1, 44, 100), row("ours", 0.01, 0, 60, 10),
    row("random", 0.1, 0, 140, 100), row("random", 0.1, 1, 160, 100), row("rule", "own", 0, 50, 33),
]  # fmt: skip


def test_a_summary_has_the_mean_its_interval_and_what_is_left_elsewhere():
    rows = [{**r, "told_apart": 0.5 + r["config"]["seed"] / 10} for r in ROWS[2:4]] + ROWS[4:5]
    first, second = comparison.summaries(rows, "ours")
    assert first[2:5] == (2, 100, 89.5)
    assert first.reach == pytest.approx(12.7062 * 0.5, rel=1e-4)  # t with one degree of freedom
    assert first.elsewhere == pytest.approx(55)
    assert second[2:5] == (1, 10, 85)
    assert np.isnan(second.reach)
    assert second.elsewhere is None


def test_verdicts_follow_the_paired_interval():
    forest = comparison.paired(
        ROWS, NAMES, [("ours", "full"), ("ours", "random"), ("random", "ours")]
    )
    assert [
        line.rsplit(":", 1)[0] + line.split(":")[1].split(",")[0]
        for line in comparison.sentences(forest).splitlines()
    ] == [
        "Ours 10 % \u2212 full not distinguishable",
        "Ours 1 % \u2212 full worse",
        "Ours 10 % \u2212 random 10 % better",
        "random 10 % \u2212 Ours 10 % worse",
    ]
    assert forest[2][1] == -forest[3][1] == pytest.approx(27)


def test_a_rule_is_compared_with_every_budget_and_what_has_no_rows_is_named():
    forest = comparison.paired(ROWS, NAMES, [("rule", "ours"), ("absent", "full")])
    assert [label for label, *_ in forest] == ["Rule \u2212 Ours 10 %", "Rule \u2212 Ours 1 %"]
    assert comparison.missing(ROWS, NAMES) == "Absent"
    assert comparison.missing(ROWS, {"ours": "Ours"}) == "nothing"


def test_the_table_has_a_line_for_each_method_and_budget_and_an_interval_with_two_seeds():
    lines = comparison.table(ROWS, NAMES).splitlines()[1:-1]
    assert [line.split()[0] for line in lines] == ["full", "random", "Ours", "Ours", "Rule"]
    assert ["\u00b1" in line for line in lines] == [True, True, True, False, False]
    assert "told apart" not in comparison.table(ROWS, NAMES)
    more = [{**ROWS[2], "told_apart": 0.875}]
    assert comparison.table(more, NAMES).splitlines()[1].endswith("87.5")


def test_a_table_of_rows_of_the_first_edition_says_so_once_and_first():
    rows = [*ROWS[:-1], {**ROWS[-1], "edition": "first"}]
    table = comparison.table(rows, NAMES)
    assert table.splitlines()[0].startswith("First edition")
    assert table.count("First edition") == 1
    assert table.splitlines()[1:] == comparison.table(ROWS, NAMES).splitlines()


def test_every_method_with_rows_is_drawn_and_described():
    _, ax = plt.subplots()
    comparison.draw(ax, ROWS, NAMES)
    assert ax.get_legend_handles_labels()[1] == ["full", "random", "Ours", "Rule"]
    drawn = {
        tuple(map(float, line.get_xdata())) for line in ax.lines if line.get_marker() in "osD^"
    }
    lines = {line.get_label(): line.get_linestyle() for line in ax.lines}
    hollow = {
        tuple(map(float, line.get_xdata())) for line in ax.lines if line.get_fillstyle() == "none"
    }
    plt.close("all")
    assert hollow == {(33.0,)}  # one seed
    assert {(10.0, 100.0), (100.0,), (33.0,)} <= drawn
    assert lines["full"] == "--"
    text = comparison.alt_text(ROWS, NAMES)
    assert "Ours 85.0 % with 10; Ours 89.5 % with 100" in text
    with pytest.raises(ValueError, match="absent"):
        comparison.draw(ax, ROWS, {"absent": "Absent"})


def test_runs_without_a_common_seed_are_refused():
    with pytest.raises(ValueError, match="none in common"):
        results.compare([ROWS[0]], [ROWS[1]])


def test_a_page_shows_rows_only_while_their_code_is_todays(monkeypatch, capsys):
    monkeypatch.setattr(
        comparison,
        "read",
        lambda name: [dict(r, majority=0.5) for r in ROWS] if name == "toy" else [],
    )
    monkeypatch.setattr(studies, "stale", lambda rows: [])
    drawn = []
    monkeypatch.setattr(comparison, "draw", lambda ax, rows, names: drawn.append(rows))
    rows = comparison.show("toy", {"full": "full", "ours": "Ours"})
    assert [r["config"]["method"] for r in rows] == ["full"] * 2 + ["ours"] * 3
    assert drawn == [rows]
    said = capsys.readouterr().out
    assert "not in results: nothing" in said
    assert "400 test examples; always the majority class: 50.0%" in said
    monkeypatch.setattr(studies, "stale", lambda rows: rows[:1])
    with pytest.raises(AssertionError, match="make restamp"):
        comparison.show("toy", {"full": "full"})


def test_a_forest_draws_and_says_every_difference(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(
        comparison.plots, "interval", lambda ax, rows, unit: drawn.append((rows, unit))
    )
    differences = comparison.paired(ROWS, NAMES, [("ours", "full"), ("ours", "random")])
    comparison.show_differences(iter(differences))
    assert drawn == [(differences, "points")]
    assert comparison.sentences(differences) in capsys.readouterr().out


def judged(method, budget, right):
    """Five seeds, each with about this share of 400 answers right; those of a rule vary."""
    wrong = round(400 * (1 - right))
    spread = 8 if method == "rule" else 1
    return [row(method, budget, seed, wrong + spread * (seed - 2), 9) for seed in range(5)]


def test_methods_meet_at_equal_budgets_and_a_rule_meets_the_control_of_its_size():
    rows = [
        *(judged("ours", 0.005, 0.9) + judged("ours", 0.02, 0.9) + judged("random", 0.005, 0.8)),
        *(judged("rule", "own", 0.8) + judged("random", "rule", 0.8) + judged("full", 1.0, 0.8)),
        *judged("full", "rule", 0.8),
    ]
    pairs = [("ours", "random"), ("rule", "random")]
    pairs += [("ours", "full"), ("rule", "full"), ("ours", "rule")]
    assert list(comparison.opponents(rows, NAMES, pairs).values()) == [
        "Ours 0.5 % \u2212 random 0.5 %",
        "Rule \u2212 random (Rule's size)",
        "Ours 2 % \u2212 full",
        "Ours 0.5 % \u2212 full",
        "Rule \u2212 full",
        "Rule \u2212 full (Rule's size)",
        "Ours 2 % \u2212 Rule",
        "Ours 0.5 % \u2212 Rule",
    ]


def test_verdicts_are_corrected_for_how_many_there_are(capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        comparison.plots, "interval", lambda ax, rows, unit, clear: drawn.extend(clear)
    )
    monkeypatch.setattr(comparison.plots, "show", lambda fig, alt: None)
    rows = judged("ours", 0.005, 0.95) + judged("rule", 0.005, 0.81) + judged("random", 0.005, 0.8)
    found = comparison.show_verdicts(rows, NAMES, [("ours", "random"), ("rule", "random")])
    said = capsys.readouterr().out
    assert [one.verdict for one in found.values()] == ["better", "not distinguishable"]
    assert drawn == [True, False]
    assert said.startswith("Ours 0.5 % \u2212 random 0.5 %: better, +15.00 points [")
    assert "2 comparisons" in said
    alone = comparison.show_verdicts(rows, NAMES, [("rule", "random")])
    p = [one.p for one in (*alone.values(), *found.values())]
    assert p[0] <= p[2] <= min(1, 2 * p[0])


def test_no_verdict_from_two_seeds(monkeypatch):
    monkeypatch.setattr(comparison.plots, "show", lambda fig, alt: None)
    rows = [
        r for r in judged("ours", 0.1, 0.9) + judged("random", 0.1, 0.8) if r["config"]["seed"] < 2
    ]
    with pytest.raises(ValueError, match="seeds=2 are too few for a verdict"):
        comparison.show_verdicts(rows, NAMES, [("ours", "random")])
