"""Restamp: a row whose code changed is current again only if its first losses are the same bits."""

from types import SimpleNamespace

import pytest

from selective_lite.lab import results
from selective_lite.lab.experiments import restamp, studies

CELL = {"method": "fish", "budget": 0.005, "seed": 0, "task": "movies"}
LOSSES = [0.6931471824645996, 0.5]


def row(library="old", **more):
    config = {**CELL, "lr": 1e-2}
    circumstances = {"device": "cpu, 2 cores", "threads": 1, "versions": {}, "seconds": 1.0}
    return {"config": config, "study": "toy", "roots": ["gone"], **circumstances, **more} | {
        "library": library
    }


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A study whose code hash is "new", and whose replays a test sets, in this process."""
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    monkeypatch.setattr(results, "code_hash", lambda roots: "new" if roots != ("gone",) else "")
    study = SimpleNamespace(roots=lambda config: ["here"], choose=lambda sweep: sweep["best"])
    monkeypatch.setitem(studies.STUDIES, "toy", study)
    now = {"losses": LOSSES, "replayed": []}

    def losses(study, config, steps):
        now["replayed"].append(config["seed"])
        if isinstance(now["losses"], Exception):
            raise now["losses"]
        return now["losses"][:steps]

    monkeypatch.setattr(restamp, "losses", losses)
    monkeypatch.setattr(
        results, "in_processes", lambda call, arguments, workers: map(call, arguments)
    )
    return now


def test_losses_that_agree_bit_for_bit_renew_the_hash_and_keep_the_old_one(toy):
    results.write("toy", [row(first_losses=LOSSES), row("new", first_losses=[9.0])])
    assert restamp.restamp() == []
    first, second = results.read("toy")
    assert (first["library"], first["roots"]) == ("new", ["here"])
    ((old, day),) = first["restamped"]
    assert old == "old"
    assert len(day.split("-")) == 3
    assert "restamped" not in second  # current before: not replayed
    assert toy["replayed"] == [0]
    assert restamp.restamp() == []
    assert toy["replayed"] == [0]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ([0.6931471824645997, 0.5], "loss 1 was 0.6931471824645996, is 0.6931471824645997"),
        ([0.6931471824645996], "has 1 losses, not 2"),
        (KeyError("weights"), "KeyError: 'weights'"),
    ],
)
def test_losses_that_differ_in_the_last_bit_leave_the_row_and_name_it(toy, now, said):
    before = [row(first_losses=LOSSES)]
    results.write("toy", before)
    toy["losses"] = now
    (line,) = restamp.restamp()
    assert line.startswith("toy method fish budget 0.005 seed 0 task movies lr 0.01: ")
    assert said in line
    assert results.read("toy") == before


def sweep(best):
    config = {**CELL, "grid": [1e-3, 1e-2, 1e-1]}
    return {**row(), "config": config, "best": best}


@pytest.mark.parametrize(
    ("best", "losses", "library"),
    [(1e-2, LOSSES, "new"), (1e-1, LOSSES, "old"), (1e-2, [0.1, 0.2], "old")],
)
def test_a_sweep_is_vouched_for_by_its_run_at_the_rate_it_chose(toy, best, losses, library):
    results.write("toy", [row(first_losses=losses)])
    results.write("toy_rates", [sweep(best)])
    left = restamp.restamp()
    assert results.read("toy_rates")[0]["library"] == library
    assert any("toy_rates" in line for line in left) == (library == "old")


def test_a_restamp_of_some_methods_leaves_the_others_as_they_were(toy):
    other = row(first_losses=LOSSES)
    other["config"] = {**other["config"], "method": "random", "seed": 1}
    results.write("toy", [row(first_losses=LOSSES), other])
    assert restamp.restamp(only=["random"]) == []
    assert toy["replayed"] == [1]
    assert [row["library"] for row in results.read("toy")] == ["old", "new"]


def test_rows_of_benchmarks_are_named_with_the_command_that_makes_them(toy):
    bench = {**row(), "config": {"way": "LoRA"}}
    del bench["study"]
    results.write("bench", [bench])
    assert restamp.restamp(["bench"]) == ["bench way LoRA: has no losses; run `make benchmarks`"]
