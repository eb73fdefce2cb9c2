"""Results: a row knows the code that made it, a killed run costs one row, and differences are paired."""

import json

import numpy as np
import pytest
import torch

from selective_lite.lab import results


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in place of the library, and an empty results folder."""
    folder = tmp_path / "package"
    (folder / "methods").mkdir(parents=True)
    (folder / "lab").mkdir()
    (folder / "train.py").write_text('"""Train."""\n\n\ndef step(x):\n    """One."""\n    return x + 1  # one\n')
    (folder / "methods" / "one.py").write_text("RATE = 0.1\n")
    (folder / "delta.py").write_text("VERSION = 1\n")
    (folder / "lab" / "plots.py").write_text("COLOUR = 'red'\n")
    monkeypatch.setattr(results, "PACKAGE", folder)
    monkeypatch.setattr(results, "CHECKOUT", tmp_path / "results")
    return folder


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "train.py",
            "# A comment.\n\n\ndef step(x):\n    '''Another docstring,\n    longer.'''\n\n    return (x +\n  1)\n",
        ),
        ("delta.py", "VERSION = 2\n"),
        ("lab/plots.py", "COLOUR = 'blue'\n"),
    ],
    ids=["docstrings, comments and layout", "no run's code", "no run's code in the lab"],
)
def test_what_no_number_follows_from_leaves_the_hash(package, file, text):
    before = results.library_hash()
    (package / file).write_text(text)
    assert results.library_hash() == before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train.py", '"""Train."""\n\n\ndef step(x):\n    """One."""\n    return x + 2  # one\n'),
        ("train.py", 'def step(x):\n    label = """One."""\n    return x + 1\n'),
        ("methods/one.py", "RATE = 0.2\n"),
        ("methods/two.py", ""),
        ("lab/tasks.py", ""),
    ],
)
def test_what_numbers_follow_from_changes_the_hash(package, file, text):
    before = results.library_hash()
    (package / file).write_text(text)
    assert results.library_hash() != before


def test_the_library_s_own_files_are_hashed():
    names = {
        path.relative_to(results.PACKAGE).as_posix()
        for pattern in results.SOURCES
        for path in results.PACKAGE.glob(pattern)
    }
    assert {"select.py", "masked.py", "train.py", "gates.py", "methods/diff_pruning.py", "lab/tasks.py"} <= names
    assert not names & {"lab/plots.py", "lab/explorers.py"}


CONFIGS = [{"method": "ours", "seed": seed, "lr": 1e-3} for seed in range(4)]


def test_a_killed_run_goes_on_where_it_stopped(package, capsys):
    started = []

    def run(config):
        started.append(config["seed"])
        if len(started) == 3:
            raise KeyboardInterrupt
        return {"accuracy": config["seed"] / 10}

    with pytest.raises(KeyboardInterrupt):
        results.run_missing("toy", CONFIGS, run)
    assert [row["config"]["seed"] for row in results.read("toy")] == [0, 1]
    rows = results.run_missing("toy", CONFIGS, run)
    assert started == [0, 1, 2, 2, 3]
    assert rows == results.read("toy")
    assert [row["accuracy"] for row in rows] == [0.0, 0.1, 0.2, 0.3]
    assert {row["library"] for row in rows} == {results.library_hash()}
    assert results.run_missing("toy", reversed(CONFIGS), run) == rows[::-1]
    assert len(started) == 5
    assert "seed=3 lr=0.001 accuracy=0.3" in capsys.readouterr().err


def test_rows_of_other_code_are_stale_and_run_again(package):
    rows = results.run_missing("toy", CONFIGS[:2], lambda config: {"accuracy": 0.5})
    assert results.stale(rows) == []
    (package / "methods" / "one.py").write_text("RATE = 0.3\n")
    assert results.stale(rows) == rows
    fresh = results.run_missing("toy", CONFIGS[:1], lambda config: {"accuracy": 0.7})
    assert [row["accuracy"] for row in fresh] == [0.7]
    assert results.read("toy") == fresh


def test_a_write_that_fails_leaves_the_old_rows(package):
    results.write("toy", [{"config": 1}])
    with pytest.raises(TypeError):
        results.write("toy", [{"config": object()}])
    assert results.read("toy") == [{"config": 1}]
    assert results.read("absent") == []


def test_a_file_of_rows_has_one_line_a_row(package):
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
    # One seed, 400 examples: ours alone is right on 60, theirs alone on 20. The differences have the mean 0.1 and the
    # variance 0.2 - 0.1^2, so that the interval is close to 0.1 -+ 1.96 sqrt(0.19 / 400).
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
    # Two seeds that disagree by 0.2: resampling examples alone would give an interval without width.
    better = np.ones(500, bool)
    worse = np.zeros(500, bool)
    mean, low, high = results.paired_difference([better, worse], [worse, worse])
    assert (mean, low, high) == (0.5, 0.0, 1.0)


def test_a_missing_pair_raises():
    with pytest.raises(ValueError, match="zip"):
        results.paired_difference([np.ones(3, bool)], [])
