"""The table of all rows: flat, complete, and the same as a file."""

import csv
import io

from selective_lite.lab import results
from selective_lite.lab.experiments import table


def row(study, **config):
    return {"study": study, "config": {"task": "movies", **config}, "accuracy": 0.8, "trained": 5}


def test_every_run_of_the_second_edition_is_a_line_and_no_sweep(monkeypatch):
    rows = {
        "reviews": [row("reviews", method="fish", budget=0.005, seed=s, lr=1e-3) for s in (0, 1)],
        "reviews_rates": [row("reviews", method="fish", budget=0.005)],
        "below_chance": [row("below_chance", method="fish", budget=0.005, seed=0, head="warm")],
        "movies": [{**row("movies", method="fish", budget=0.005, seed=0), "edition": "first"}],
    }
    monkeypatch.setattr(results, "read", lambda name: rows.get(name, []))
    found = table.table()
    assert [(line["study"], line["seed"], line["head"]) for line in found] == [
        ("reviews", 0, None),
        ("reviews", 1, None),
        ("below_chance", 0, "warm"),
    ]
    assert {tuple(line) for line in found} == {table.COLUMNS}
    read = list(csv.DictReader(io.StringIO(table.text())))
    assert len(read) == 3
    assert float(read[0]["lr"]) == 1e-3
    assert read[0]["bits_a_token"] == ""


def test_every_config_and_row_has_its_column():
    """A new study's config names something that the table does not have: give it a column."""
    apart = {"validation", "test", "other"}  # sizes of splits; `other` is what a row measured
    for study in table.STUDIES.values():
        if study.tuned_on != (0,):  # the second edition's
            assert {key for data in study.data for key in data} - apart <= set(table.COLUMNS)
