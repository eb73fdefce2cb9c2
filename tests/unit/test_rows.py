"""The committed rows of `results/`: by today's code, complete, with rates inside their grids."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from selective_lite.lab import comparison, results
from selective_lite.lab.experiments import movies, reviews, table
from selective_lite.lab.experiments.run import RATES
from selective_lite.lab.experiments.studies import STUDIES, stale

FILES = sorted(path.stem for path in results.CHECKOUT.glob("*.json"))
OF_STUDIES = sorted(set(FILES) & {name + end for name in STUDIES for end in ("", "_rates")})
UNFINISHED = {"reviews", "reviews_rates"}  # `make results` goes on where it stopped


def test_there_are_rows():
    assert {movies.NAME, movies.NAME + "_rates", "masked_step"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_no_row_is_stale(name):
    old = [row["config"] for row in stale(results.read(name))]
    remedy = "`make restamp`, then `make results`" if name in OF_STUDIES else "`make benchmarks`"
    assert not old, f"its code has changed; run {remedy}: {old}"


@pytest.mark.parametrize("name", FILES)
def test_a_row_says_where_it_comes_from(name):
    keys = {"config", "seconds", "device", "threads", "versions", "roots", "library"}
    assert all(keys <= set(row) for row in results.read(name))


@pytest.mark.parametrize("name", OF_STUDIES)
def test_a_row_of_the_first_edition_says_so_and_pages_repeat_it(name):
    rows = results.read(name)
    assert {row["study"] for row in rows} == {name.removesuffix("_rates")}
    assert {row.get("edition", "first") for row in rows} == {"first"}
    first = [row for row in rows if "edition" in row]
    assert comparison.edition(rows).startswith("First edition") == bool(first)


@pytest.mark.parametrize("name", OF_STUDIES)
def test_every_config_has_its_row(name):
    study = STUDIES[name.removesuffix("_rates")]
    if name in UNFINISHED and not name.endswith("_rates"):
        sweeps = [row["config"] for row in results.read(name + "_rates")]
        swept = {(config["method"], config["budget"]) for config in sweeps} | {("head", 0.0)}
        study = replace(study, grids={c: g for c, g in study.grids.items() if c in swept})
    configs = study.rate_configs() if name.endswith("_rates") else study.configs()
    wanted = json.loads(json.dumps(list(configs)))
    made = [row["config"] for row in results.read(name)]
    if name in UNFINISHED:
        assert all(config in wanted for config in made)
        assert len(made) < len(wanted), f"{name} is finished: say so in this test"
    else:
        assert made == wanted


BRACKETED = [(name, row) for name in OF_STUDIES for row in results.read(name) if "rates" in row]


@pytest.mark.parametrize(
    ("name", "row"), BRACKETED, ids=[f"{n} {r['config']['method']}" for n, r in BRACKETED]
)
def test_a_best_rate_lies_strictly_inside_with_a_worse_one_on_both_sides(name, row):
    study = STUDIES[name.removesuffix("_rates")]
    sign = -1 if study.lower else 1
    gains = [-math.inf if v is None else sign * v for v in row["validation"]]
    rates = row["rates"]
    place = rates.index(study.choose(row))
    assert gains[place] == max(gains)
    assert gains[0] < max(gains) > gains[-1]
    assert rates == sorted(rates)
    assert set(rates) <= set(RATES)
    assert len(row["config"]["seeds"]) >= 2


def test_the_table_is_written_as_the_rows_are():
    """Not until the second edition has rows: then `make results` writes it."""
    kept = results.CHECKOUT / table.FILE
    assert (kept.read_text() if kept.exists() else "") == (table.text() if table.table() else "")


def test_no_best_learning_rate_lies_on_the_edge_of_its_grid():
    for row in results.read(movies.NAME + "_rates"):
        inside, edges = row["validation"][1:-1], (row["validation"][0], row["validation"][-1])
        assert max(inside) >= max(edges), f"widen this grid: {row['config']}"


def test_the_rate_taken_is_the_best_with_its_neighbours_and_not_the_one_beside_the_cliff():
    def sweep(*validation):
        return {
            "config": {"grid": [10.0**-i for i in range(len(validation), 0, -1)]},
            "validation": validation,
        }

    assert movies.rate(sweep(0.7, 0.78, 0.77, 0.79, 0.5)) == pytest.approx(1e-3)
    assert movies.rate(sweep(0.9, 0.5, 0.6, 0.7)) == pytest.approx(1e-3)


def test_rows_with_a_budget_selected_exactly_k_weights_but_for_those_of_modules():
    for row in results.read(movies.NAME):
        if row["config"]["budget"] != "own" and row["config"]["method"] not in (
            "full",
            "spt",
            "lora",
        ):
            assert (
                row["selected"]
                == round(row["config"]["budget"] * row["total"])
                == sum(row["per_tensor"].values())
            )


def test_the_installed_package_carries_the_rows():
    # pyproject.toml maps results/ to the package's folder of rows, which `results.read` falls back
    # to.
    project = (Path(results.CHECKOUT).parent / "pyproject.toml").read_text()
    assert '"selective_lite.rows" = "results"' in project


def test_lt_sft_trains_densely_at_the_rate_that_full_fine_tuning_chose():
    chosen = [
        reviews.rate(row)
        for row in results.read("reviews_rates")
        if row["config"]["method"] == "full"
    ]
    assert chosen == [reviews.LR_DENSE]
