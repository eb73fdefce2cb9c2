"""The committed rows of `results/`: made by today's code, complete, and chosen inside their grids."""

import json
from pathlib import Path

import pytest

from selective_lite.lab import experiments, plan, results

FILES = sorted(path.stem for path in results.CHECKOUT.glob("*.json"))

# What `make results` has still to run; pages name these methods as not in the results.
NOT_RUN = {
    ("sara", 0.0002),
    *((method, 0.0002) for method in ("unstructured", "shuffled")),
    *((method, budget) for method in ("fish_shuffled", "child_tuning_d", "lt_sft") for budget in plan.FAMILY_BUDGETS),
    *((method, "own") for method in ("bitfit", "last_layers", "child_tuning_f", "sara_threshold", "sora")),
}


def test_there_are_rows():
    assert {plan.NAME, plan.NAME + "_rates", "masked_step"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_no_row_is_stale(name):
    old = [row["config"] for row in results.stale(results.read(name))]
    assert not old, f"made by other code than today's; run `make results`: {old}"


@pytest.mark.parametrize("name", FILES)
def test_a_row_says_where_it_comes_from(name):
    for row in results.read(name):
        assert {"config", "seconds", "device", "threads", "versions", "roots", "library"} <= set(row)


def test_every_config_has_its_row_or_is_named_as_not_run():
    swept = {(row["config"]["method"], row["config"]["budget"]) for row in results.read(plan.NAME + "_rates")}
    assert set(plan.GRIDS) - swept == NOT_RUN
    wanted = [c for c in json.loads(json.dumps(list(plan.rate_configs()))) if (c["method"], c["budget"]) in swept]
    assert [row["config"] for row in results.read(plan.NAME + "_rates")] == wanted
    assert [row["config"] for row in results.read(plan.NAME)] == json.loads(json.dumps(list(plan.configs())))


def test_every_row_s_code_is_the_one_that_the_plan_would_run():
    for name in (plan.NAME, plan.NAME + "_rates"):
        assert all(row["roots"] == experiments.roots(row["config"]) for row in results.read(name))


def test_no_best_learning_rate_lies_on_the_edge_of_its_grid():
    for row in results.read(plan.NAME + "_rates"):
        inside, edges = row["validation"][1:-1], (row["validation"][0], row["validation"][-1])
        assert max(inside) >= max(edges), f"widen this grid: {row['config']}"


def test_the_rate_taken_is_the_best_with_its_neighbours_and_not_the_one_beside_the_cliff():
    def sweep(*validation):
        return {"config": {"grid": [10.0**-i for i in range(len(validation), 0, -1)]}, "validation": validation}

    assert plan.rate(sweep(0.7, 0.78, 0.77, 0.79, 0.5)) == pytest.approx(1e-3)
    assert plan.rate(sweep(0.9, 0.5, 0.6, 0.7)) == pytest.approx(1e-3)


def test_diff_pruning_rows_changed_exactly_k_weights():
    for row in results.read(plan.NAME):
        if row["config"]["method"] in (*plan.METHODS, "fish", "sara"):
            assert row["selected"] == round(row["config"]["budget"] * row["total"]) == sum(row["per_tensor"].values())


def test_the_installed_package_carries_the_rows():
    # pyproject.toml maps results/ to the package's folder of rows, which `results.read` falls back to.
    project = (Path(results.CHECKOUT).parent / "pyproject.toml").read_text()
    assert '"selective_lite.rows" = "results"' in project
