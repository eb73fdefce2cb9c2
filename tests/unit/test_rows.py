"""The committed rows of `results/`: made by today's code, complete, and chosen inside their grids."""

import json
from pathlib import Path

import pytest

from selective_lite.lab import experiments, results

FILES = sorted(path.stem for path in results.CHECKOUT.glob("*.json"))


def test_there_are_rows():
    assert {experiments.NAME, experiments.NAME + "_rates", "masked_step"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_no_row_is_stale(name):
    old = [row["config"] for row in results.stale(results.read(name))]
    assert not old, f"made by other code than today's; run `make results`: {old}"


@pytest.mark.parametrize("name", FILES)
def test_a_row_says_where_it_comes_from(name):
    for row in results.read(name):
        assert {"config", "seconds", "device", "threads", "versions", "library"} <= set(row)


def _as_read(configs):
    return json.loads(json.dumps(list(configs)))


def test_every_config_has_its_row():
    assert [row["config"] for row in results.read(experiments.NAME)] == _as_read(experiments.configs())
    assert [row["config"] for row in results.read(experiments.NAME + "_rates")] == _as_read(experiments.rate_configs())


def test_no_learning_rate_lies_on_the_edge_of_its_grid():
    for row in results.read(experiments.NAME + "_rates"):
        grid = row["config"]["grid"]
        assert grid[0] < row["lr"] < grid[-1], f"widen the grid of {row['config']['method']} at {row['config']['budget']}"


def test_diff_pruning_rows_changed_exactly_k_weights():
    for row in results.read(experiments.NAME):
        if row["config"]["method"] in ("unstructured", "structured", "random", "shuffled"):
            assert row["selected"] == round(row["config"]["budget"] * row["total"]) == sum(row["per_tensor"].values())


def test_the_installed_package_carries_the_rows():
    # pyproject.toml maps results/ to the package's folder of rows, which `results.read` falls back to.
    project = (Path(results.CHECKOUT).parent / "pyproject.toml").read_text()
    assert '"selective_lite.rows" = "results"' in project
