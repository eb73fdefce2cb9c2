"""Results: a row knows the code behind it, a killed run costs one row, differences are paired."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from selective_lite.lab import results
from selective_lite.lab.experiments import movies, studies


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """An empty results folder, and code whose hash the test sets."""
    monkeypatch.setattr(results, "CHECKOUT", tmp_path / "results")
    code = {"hash": "today"}
    monkeypatch.setattr(results, "code_hash", lambda roots: f"{code['hash']} {'+'.join(roots)}")
    return code


def roots(config):
    return ["run.py:run", f"recipes.py:{config['method']}"]


CONFIGS = [{"method": "ours", "seed": seed, "lr": 1e-3} for seed in range(4)]


def test_a_killed_run_goes_on_where_it_stopped(capsys):
    started = []

    def run(config):
        started.append(config["seed"])
        if len(started) == 3:
            raise KeyboardInterrupt
        return {"accuracy": config["seed"] / 10}

    with pytest.raises(KeyboardInterrupt):
        results.run_missing("toy", CONFIGS, run, roots)
    assert [row["config"]["seed"] for row in results.read("toy")] == [0, 1]
    rows = results.run_missing("toy", CONFIGS, run, roots)
    assert started == [0, 1, 2, 2, 3]
    assert rows == results.read("toy")
    assert [row["accuracy"] for row in rows] == [0.0, 0.1, 0.2, 0.3]
    assert {row["library"] for row in rows} == {"today run.py:run+recipes.py:ours"}
    assert {tuple(row["roots"]) for row in rows} == {("run.py:run", "recipes.py:ours")}
    assert results.run_missing("toy", reversed(CONFIGS), run, roots) == rows[::-1]
    assert len(started) == 5
    said = capsys.readouterr().err
    assert "seed=3 lr=0.001 accuracy=0.3" in said
    results.write("toy", [{**row, "seconds": 900.0 * i} for i, row in enumerate(rows)])
    results.run_missing("toy", CONFIGS, run, roots)
    assert capsys.readouterr().err == "toy: 4 rows, 1.50 hours of runs, 1 at a time\n"


def side_by_side(config):
    """Wait for the other run of the same turn, then say who had started."""
    folder = Path(config["folder"])
    (folder / f"{config['round']}{config['seed']}").touch()
    for _ in range(600):
        started = sorted(path.name for path in folder.iterdir())
        if len([name for name in started if name.startswith(str(config["round"]))]) == 2:
            return {"started": started, "process": os.getpid()}
        time.sleep(0.1)
    raise TimeoutError(started)


def test_runs_go_side_by_side_with_one_thread_each_and_late_ones_after_the_others(tmp_path):
    (tmp_path / "started").mkdir()
    first, second = (
        [
            {"method": "ours", "round": r, "seed": seed, "folder": str(tmp_path / "started")}
            for seed in range(2)
        ]
        for r in range(2)
    )
    rows = results.run_missing(
        "toy",
        second + first,
        side_by_side,
        roots,
        workers=2,
        late=lambda config: config["round"] == 1,
    )
    assert [row["config"] for row in rows] == second + first
    assert {row["threads"] for row in rows} == {1}
    assert len({row["process"] for row in rows[2:]} - {os.getpid()}) == 2
    assert all(not name.startswith("1") for row in rows[2:] for name in row["started"])


def broken(config):
    """Fail for one config."""
    if config["seed"] == 1:
        raise ArithmeticError("seed 1")
    return {}


def test_a_worker_that_fails_costs_its_row_alone():
    with pytest.raises(ArithmeticError, match="seed 1"):
        results.run_missing(
            "toy", CONFIGS, broken, roots, workers=2, late=lambda config: config["seed"] > 0
        )
    seeds = {row["config"]["seed"] for row in results.read("toy")}
    assert 0 in seeds
    assert 1 not in seeds


def test_rows_of_other_code_are_stale_and_run_again(checkout):
    rows = results.run_missing("toy", CONFIGS[:2], lambda config: {"accuracy": 0.5}, roots)
    assert studies.stale(rows) == []
    checkout["hash"] = "tomorrow"
    assert studies.stale(rows) == rows
    fresh = results.run_missing("toy", CONFIGS[:1], lambda config: {"accuracy": 0.7}, roots)
    assert [row["accuracy"] for row in fresh] == [0.7]
    assert results.read("toy") == fresh


def test_rows_of_the_first_edition_are_neither_stale_nor_run_again(checkout):
    results.run_missing("toy", CONFIGS[:1], lambda config: {"accuracy": 0.5}, roots)
    first = [{**row, "edition": "first"} for row in results.read("toy")]
    results.write("toy", first)
    checkout["hash"] = "tomorrow"
    assert studies.stale(first) == []
    assert studies.changed(first) == first
    assert results.run_missing("toy", CONFIGS[:1], lambda config: {}, roots) == first


def test_code_that_is_gone_makes_a_row_stale_and_a_row_of_a_study_asks_the_study(monkeypatch):
    def gone(names):
        raise ValueError("no such definition")

    row = {"config": {"method": "fish"}, "roots": ["gone.py:run"], "library": "x"}
    monkeypatch.setattr(results, "code_hash", gone)
    assert studies.stale([row]) == [row]
    assert list(studies.roots_of(row)) == ["gone.py:run"]
    asked = studies.roots_of({**row, "study": "movies"})
    assert asked == movies.STUDY.roots(row["config"])
    assert any(root.endswith("recipes.py:fish") for root in asked)
    assert studies.stale([{**row, "study": "movies", "config": {"method": "gone"}}]) != []


def test_a_row_carries_the_code_that_it_started_with(checkout):
    def run(config):
        checkout["hash"] = "edited meanwhile"
        return {}

    rows = results.run_missing("toy", CONFIGS[:2], run, roots)
    assert {row["library"].split()[0] for row in rows} == {"today"}
    assert studies.stale(rows) == rows


def test_a_write_that_fails_leaves_the_old_rows():
    results.write("toy", [{"config": 1}])
    with pytest.raises(TypeError):
        results.write("toy", [{"config": object()}])
    assert results.read("toy") == [{"config": 1}]
    assert results.read("absent") == []


def test_a_file_of_rows_has_one_line_a_row():
    results.write("toy", [{"a": 1}, {"a": 2}])
    lines = (results.CHECKOUT / "toy.json").read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("count", [1, 8, 1003])
def test_packed_correctness_comes_back(count):
    correct = torch.rand(count) < 0.7
    text = results.pack(correct)
    assert results.unpack(text, count).tolist() == correct.tolist()
    assert len(text) <= count / 6 + 8


def test_a_paired_difference_on_a_hand_case():
    # One seed, 400 examples: ours alone is right on 60, theirs alone on 20. The differences have
    # the mean 0.1 and the variance 0.2 - 0.1^2, so that the interval is close to 0.1 -+ 1.96
    # sqrt(0.19 / 400).
    ours, theirs = np.zeros(400, bool), np.zeros(400, bool)
    ours[:60] = theirs[60:80] = True
    ours[200:300] = theirs[200:300] = True
    mean, low, high = results.paired_difference([ours], [theirs])
    half = 1.96 * (0.19 / 400) ** 0.5
    assert mean == pytest.approx(0.1)
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=0.006)
    assert results.paired_difference([theirs], [ours])[0] == pytest.approx(-0.1)


def test_pairing_cancels_what_the_runs_share_and_seeds_widen_the_interval():
    right = np.arange(500) % 3 == 0
    assert results.paired_difference([right, right], [right, right]) == (0.0, 0.0, 0.0)
    # Two seeds that disagree by 0.2: resampling examples alone would give an interval without
    # width.
    better = np.ones(500, bool)
    worse = np.zeros(500, bool)
    mean, low, high = results.paired_difference([better, worse], [worse, worse])
    assert (mean, low, high) == (0.5, 0.0, 1.0)


def test_bits_saved_per_token_on_a_hand_case():
    first, second, tokens = [[8.0, 4.0]], [[6.0, 3.0]], [4, 2]
    mean, low, high = results.paired_difference(first, second, weight=tokens)
    assert mean == 0.5  # three bits of twelve, over six tokens
    assert (low, high) == (0.5, 0.5)  # both texts save half a bit per token
    assert results.paired_difference(second, first, weight=tokens)[0] == -0.5


def test_a_weighted_interval_is_that_of_a_mean_if_examples_are_many_and_covers_seeds():
    tokens = np.full(400, 10)
    noise = np.random.default_rng(0).normal(size=(1, 400))
    _, low, high = results.paired_difference(noise, noise * 0, weight=tokens)
    assert high - low == pytest.approx(2 * 1.96 * noise.std() / 400**0.5 / 10, rel=0.1)
    # One seed saves nothing, the other a bit per token.
    runs = np.stack([np.zeros(400), np.full(400, 10.0)])
    assert results.paired_difference(runs, runs * 0, weight=tokens) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "weight", "message"),
    [
        ([[1, 1, 1]], [], None, r"ours is \(1, 3\), theirs \(0,\)"),
        ([[1.0, 2.0]], [[1.0, 2.0, 3.0]], None, r"ours is \(1, 2\), theirs \(1, 3\)"),
        ([[1.0, 2.0]], [[1.0, 2.0]], [1, 1, 1], r"weight \(3,\)"),
        ([[1.0, 2.0], [1.0]], [[1.0, 2.0]], None, r"ours is \(0,\)"),
    ],
)
def test_runs_that_cannot_be_paired_are_refused(ours, theirs, weight, message):
    with pytest.raises(ValueError, match=message):
        results.paired_difference(ours, theirs, weight=weight)
