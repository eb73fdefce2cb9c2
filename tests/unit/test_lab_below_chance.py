"""The designed experiment of why FISH lost to random masks: its half fraction, and its effects."""

from collections import Counter
from itertools import combinations

import pytest
import torch

from selective_lite.lab import results
from selective_lite.lab.experiments import below_chance, run
from selective_lite.lab.experiments.below_chance import FACTORS, MODEL, STUDY, effects

EXAMPLES = 400
SMALL = {"task": "tweets", "train": 48, "validation": 40, "test": 30, "batch": 8, "epochs": 1}


def test_each_level_meets_each_level_of_the_others_equally_often():
    assert len(STUDY.data) == 8
    assert len(below_chance.CONTROLS.data) == 4
    for pair in combinations(FACTORS, 2):
        met = Counter(tuple(data[name] for name in pair) for data in STUDY.data)
        assert len(met) == 4
        assert set(met.values()) == {2}


def row(method, right, seed, levels):
    return {
        "config": {"method": method, "budget": 0.005, "seed": seed, **levels},
        "correct": results.pack(torch.arange(EXAMPLES) < right),
        "tested": EXAMPLES,
    }


def test_an_effect_is_what_a_level_adds_whatever_the_model_gives_random_masks():
    worth = {"head": 8, "pooling": 40, "samples": 0, "reduction": -20}  # right answers of 400
    rows, chance = [], []
    for seed in below_chance.SEEDS:
        for data in below_chance.CONTROLS.data:
            base = 200 + 30 * (data["pooling"] == "mean") + 4 * seed
            chance += [row("random", base, seed, data), row("head", 100, seed, data)]
        for data in STUDY.data:
            base = 200 + 30 * (data["pooling"] == "mean") + 4 * seed
            gain = sum(worth[name] * (data[name] == FACTORS[name][1]) for name in FACTORS)
            rows.append(row("fish", base + gain - 10, seed, data))
    found = effects(rows, chance)
    assert {name: round(EXAMPLES * effect.mean, 6) for name, effect in found.items()} == worth
    assert found["pooling"].verdict == "better"
    assert found["samples"].verdict == "not distinguishable"


@pytest.mark.parametrize("levels", below_chance.combinations(MODEL), ids=str)
def test_the_models_are_what_their_levels_say(levels):
    config = {**SMALL, **levels, "seed": 0}
    model, _ = below_chance.start(config)
    other, _ = below_chance.start({**config, "seed": 1})
    same = torch.equal(model.classifier.weight, other.classifier.weight)
    assert same == (levels["head"] == "warm")
    pooled = any("pooler" in name for name, _ in model.named_parameters())
    assert pooled == (levels["pooling"] == "pooler")


def test_samples_and_what_is_squared_make_masks_of_their_own():
    model, task = below_chance.start({**SMALL, "head": "warm", "pooling": "mean", "seed": 0})
    chosen_ones = []
    for samples, reduction in ((16, "per_sample"), (48, "per_sample"), (48, "batch")):
        config = {**SMALL, "samples": samples, "reduction": reduction, "seed": 0, "budget": 0.005}
        phases = below_chance.fish(model, task, config, 1e-3)
        chosen = next(iter(phases)).selection
        phases.close()
        chosen_ones.append(chosen)
    assert len({chosen.count for chosen in chosen_ones}) == 1
    assert all(0.1 < one.overlap(two) < 0.95 for one, two in combinations(chosen_ones, 2))


def test_a_sweep_of_a_cell_chooses_the_rate_of_its_own_levels(monkeypatch):
    sweeps = [
        {"config": config, "rates": [1e-3, 3e-3], "validation": [0.6 + 0.01 * i, 0.65]}
        for i, config in enumerate(STUDY.rate_configs())
    ]
    monkeypatch.setattr(results, "read", lambda name: sweeps)
    rates = [config["lr"] for config in STUDY.configs() if config["seed"] == 0]
    assert rates == [3e-3] * 5 + [1e-3] * 3
    assert run.best(sweeps[5]) == 1e-3  # the smaller of two equals
