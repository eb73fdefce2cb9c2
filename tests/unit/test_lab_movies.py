"""The movies and their recipes: every method has one, and trains as many weights as it should."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from selective_lite.lab import results
from selective_lite.lab.data.sentiment import DOMAINS, Split, Task
from selective_lite.lab.experiments import four_deltas, movies, run
from selective_lite.lab.experiments.recipes import RECIPES
from selective_lite.params import weights

EXACT = ("random", "fish", "sara", "child_tuning_d")
NEAREST = {"spt": 0.1, "lora": 0.05}  # how far from the budget, as a share of it
SHUFFLED = ("unstructured", "fish")
SMALL = {"task": "movies", "train": 16, "validation": 40, "batch": 8, "epochs": 2, "seed": 0}


@pytest.fixture(scope="module")
def started():
    """MiniLM and a small task."""
    return movies.start(SMALL)


def first_phase(started, method, budget):
    config = {**SMALL, "method": method, "budget": budget}
    model, task = copy.deepcopy(started[0]), started[1]
    total = sum(p.numel() for p in weights(model).values())
    phases = RECIPES[method](model, task, config, 1e-3)
    phase = next(iter(phases))
    trained = run.trained(phase, model)
    fixed = run.is_fixed_mask(phase, model)
    phases.close()
    return trained, total, fixed


def test_every_planned_method_has_a_recipe():
    assert {method for method, _ in movies.GRIDS} == set(RECIPES)


@pytest.mark.parametrize("method", EXACT)
def test_an_exact_method_trains_exactly_k_weights(started, method):
    trained, total, fixed = first_phase(started, method, 0.0002)
    assert trained == round(0.0002 * total)
    assert fixed is (method != "sara")  # which has its own schedule and decay


@pytest.mark.parametrize("method", NEAREST)
@pytest.mark.parametrize("budget", movies.FAMILY_BUDGETS)
def test_modules_come_near_the_budget(started, method, budget):
    trained, total, fixed = first_phase(started, method, budget)
    assert abs(trained / (budget * total) - 1) < NEAREST[method]
    assert not fixed


def test_grids_are_parts_of_one_grid_of_half_decades():
    common = {f"{digit}e-{power:02d}" for digit in (1, 3) for power in range(7)}
    for grid in movies.GRIDS.values():
        assert list(grid) == sorted(grid)
        assert {f"{rate:.0e}" for rate in grid} <= common


def test_controls_that_shuffle_wait_for_what_they_shuffle():
    late = {config["method"] for config in movies.STUDY.rate_configs() if movies.shuffles(config)}
    assert late == {method for method, _ in movies.GRIDS if method.endswith("shuffled")}


@pytest.fixture
def tiny(accelerator, monkeypatch):
    """The study on a tiny model and task, on a GPU; the rows that controls shuffle are there."""
    from transformers import BertConfig, BertForSequenceClassification

    # A side of 72 is more than SaRA's smallest, and half a percent of all buys SPT one module.
    config = BertConfig(vocab_size=53, hidden_size=72, num_hidden_layers=6, num_attention_heads=2)
    config.update({"intermediate_size": 144, "max_position_embeddings": 16})
    tokens = torch.randint(1, 53, (24, 7)).tolist()

    def split(part):
        labels = [i % 2 for i in range(24)]
        return Split([""] * 8, labels[part], [""] * 8, tokens[part], 0, torch.device(accelerator))

    def start(config_):
        torch.manual_seed(0)
        task = Task(
            "tiny", split(slice(0, 8)), split(slice(8, 16)), split(slice(16, 24)), majority=0.5
        )
        return BertForSequenceClassification(config).to(accelerator), task

    def read(name):
        counts = {name: min(3, p.numel()) for name, p in weights(start(None)[0]).items()}
        return [
            {"config": {**SMALL, "method": m, "budget": 0.005}, "per_tensor": counts}
            for m in SHUFFLED
        ]

    monkeypatch.setattr(results, "read", read)
    return replace(movies.STUDY, start=start)


@pytest.mark.gpu
@pytest.mark.parametrize("method", RECIPES)
def test_every_method_runs_on_a_gpu(tiny, method):
    config = {
        **SMALL,
        "method": method,
        "budget": next(budget for name, budget in movies.GRIDS if name == method),
    }
    row = run.run(tiny, {**config, "lr": 1e-3})
    assert row["tested"] == 8
    assert all(math.isfinite(loss) for loss in (row["loss"], *row["first_losses"]))
    assert row["trained"] > 0
    assert len(run.sweep(tiny, {**config, "grid": (1e-3, 1e-2)})["validation"]) == 2


def test_the_larger_study_runs_every_method_on_every_domain_with_every_seed(monkeypatch):
    def read(name):
        study = {"domains_rates": movies.ALL_DOMAINS, "movies_rates": movies.STUDY}[name]
        best_in_the_middle = [0.1, 0.9] + [0.1] * 4
        return [
            {"config": c, "validation": best_in_the_middle[: len(c["grid"])]}
            for c in study.rate_configs()
        ]

    monkeypatch.setattr(results, "read", read)
    configs = list(movies.ALL_DOMAINS.configs())
    rows = [(c["task"], c["method"], c["budget"], c["seed"]) for c in configs]
    assert len(rows) == len(set(rows))
    assert set(rows) == {
        (task, *cell, seed) for task in DOMAINS for cell in movies.GRIDS for seed in movies.SEEDS
    }
    assert all(c["lr"] == movies.GRIDS[c["method"], c["budget"]][1] for c in configs)
    few = list(movies.STUDY.configs())
    assert {c["task"] for c in few} == {"movies"}
    assert {c["method"] for c in few} - {c["method"] for c in few if c["seed"]} == set(
        movies.ONE_SEED
    )


def test_what_is_missing_is_swept_before_it_is_run_and_controls_wait(monkeypatch):
    made = []

    def run_missing(name, configs, run, roots, **how):
        made.append((name, len(list(configs)), how["late"], how["study"]))

    monkeypatch.setattr(results, "run_missing", run_missing)
    run.make(movies.STUDY)
    run.make(four_deltas.STUDY)  # which takes the movies' rates
    assert made == [
        ("movies_rates", len(movies.GRIDS), movies.shuffles, "movies"),
        ("movies", len(list(movies.STUDY.configs())), movies.shuffles, "movies"),
        ("deltas", 8, run.no_config, "deltas"),
    ]


def test_a_climb_ends_at_the_first_rate_that_fails():
    seen = {1e-3: 0.6, 3e-3: 0.7, 1e-2: 0.55, 3e-2: 0.9}
    assert run.climb(seen, seen.get) == {1e-3: 0.6, 3e-3: 0.7, 1e-2: 0.55}
    assert run.climb(seen, seen.get, cliff=0.2) == seen
